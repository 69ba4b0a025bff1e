#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace lora_serve {

/// Where bytes lie. Tables indexed by a tier have kNumTiers entries.
enum class Tier : std::uint8_t { kDevice = 0, kHost = 1 };

inline constexpr std::size_t kNumTiers = 2;
inline constexpr std::array<Tier, kNumTiers> kTiers = {Tier::kDevice, Tier::kHost};

[[nodiscard]] constexpr std::size_t IndexOf(Tier tier) { return static_cast<std::size_t>(tier); }

/// What a model keeps of the tokens it has read. Tables indexed by a component have kNumComponents
/// entries.
enum class Component : std::uint8_t {
  /// KV pages: one for every page_size tokens.
  kFullAttention = 0,
  /// Snapshots of recurrent state (Mamba, gated delta nets): one slot each, at a page boundary.
  kState = 1,
};

inline constexpr std::size_t kNumComponents = 2;
inline constexpr std::array<Component, kNumComponents> kComponents = {Component::kFullAttention,
                                                                      Component::kState};

[[nodiscard]] constexpr std::size_t IndexOf(Component component) {
  return static_cast<std::size_t>(component);
}

}  // namespace lora_serve
