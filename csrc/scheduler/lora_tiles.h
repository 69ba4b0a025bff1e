#pragma once

#include <array>
#include <cstdint>

namespace lora_serve {

/// How groups of tokens are cut into the tiles of a LoRA kernel, one program's rows each. The last
/// tile of a group may be shorter; none holds tokens of two groups.
///
/// A kernel for one size has few == many. One that is built for two takes the large tiles for
/// groups that fill more than half of one: a smaller group would leave most of it idle.
struct LoraTileKind {
  std::int32_t few;
  std::int32_t many;

  /// Tokens of each tile of a group of `num_tokens`, but the last one.
  [[nodiscard]] constexpr std::int32_t TileSize(std::int32_t num_tokens) const {
    return num_tokens > many / 2 ? many : few;
  }
};

/// The lists of PlanArrays::lora_tiles. python/lora_serve/kernels/lora_tiles.py has the same ones.
inline constexpr std::array<LoraTileKind, 6> kLoraTileKinds = {
    {{16, 16}, {32, 32}, {64, 64}, {128, 128}, {16, 64}, {16, 128}}};
inline constexpr std::int32_t kSmallestLoraTile = 16;
/// int32 of each entry: where the tile starts, its tokens, its adapter slot.
inline constexpr std::int32_t kLoraTileFields = 3;

/// Tiles that no step of `num_tokens` in `num_groups` groups has more of, of any kind, since
/// ceil(n / B) <= floor(n / B) + 1 for each group.
[[nodiscard]] constexpr std::int64_t MaxLoraTiles(std::int32_t num_tokens,
                                                  std::int32_t num_groups) {
  return std::int64_t{num_tokens / kSmallestLoraTile} + num_groups;
}

/// int32 of all lists: each has an entry of counts and room for the most tiles.
[[nodiscard]] constexpr std::int64_t LoraTilesLength(std::int32_t num_tokens,
                                                     std::int32_t num_groups) {
  constexpr auto kNumKinds = static_cast<std::int64_t>(kLoraTileKinds.size());
  return kNumKinds * (1 + MaxLoraTiles(num_tokens, num_groups)) * kLoraTileFields;
}

}  // namespace lora_serve
