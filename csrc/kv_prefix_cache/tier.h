#pragma once

#include <cstddef>
#include <cstdint>

namespace lora_serve {

/// Where a page's bytes lie. Tables indexed by a tier have kNumTiers entries.
enum class Tier : std::uint8_t { kDevice = 0 };

inline constexpr std::size_t kNumTiers = 1;

[[nodiscard]] constexpr std::size_t IndexOf(Tier tier) { return static_cast<std::size_t>(tier); }

}  // namespace lora_serve
