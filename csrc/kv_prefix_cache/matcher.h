#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "kv_prefix_cache/cache_options.h"
#include "kv_prefix_cache/radix_tree.h"
#include "kv_prefix_cache/tier.h"

namespace lora_serve {

/// How many leading pages of a matched path one tier has.
struct TierCoverage {
  std::int32_t num_present = 0;
  /// With those in flight.
  std::int32_t num_covered = 0;
};

/// A sequence that was followed through a tree, and what the tiers have of it.
struct MatchedPath {
  PrefixMatch match;
  std::array<TierCoverage, kNumTiers> coverage;

  [[nodiscard]] const TierCoverage& On(Tier tier) const { return coverage[IndexOf(tier)]; }
};

/// Reads the tiers' coverage of `match`. Without `has_host_tier`, only the device's.
/// Complexity: O(nodes of the path that a tier lacks).
[[nodiscard]] MatchedPath Cover(const PrefixMatch& match, bool has_host_tier);

/// The same for the whole path to the end of `node`, on both tiers.
[[nodiscard]] MatchedPath CoverPathTo(Node& node);

/// Says for one kind of layer state from which page boundaries a request can resume.
class Matcher {
 public:
  virtual ~Matcher() = default;
  /// The deepest boundary, in pages, of at most `limit` pages of the path that this kind of state
  /// can be taken up at, on whichever tier; 0 is always one. Requires: 0 <= limit <= matched pages.
  [[nodiscard]] virtual std::int32_t DeepestBoundary(const MatchedPath& path,
                                                     std::int32_t limit) const = 0;
};

/// Full attention, and sliding windows kept in the same pages: every page up to the boundary must
/// be present in one tier.
class AttentionMatcher final : public Matcher {
 public:
  [[nodiscard]] std::int32_t DeepestBoundary(const MatchedPath& path,
                                             std::int32_t limit) const override;
};

/// Recurrent state: exists only where a snapshot was taken.
class StateMatcher final : public Matcher {
 public:
  [[nodiscard]] std::int32_t DeepestBoundary(const MatchedPath& path,
                                             std::int32_t limit) const override;
};

/// Sliding windows in a ring buffer of the running request: by the time another request comes, the
/// window of any boundary is overwritten. Reusing the full-attention pages without it corrupts the
/// output silently, so there is no boundary but the start.
class RingBufferMatcher final : public Matcher {
 public:
  [[nodiscard]] std::int32_t DeepestBoundary(const MatchedPath& path,
                                             std::int32_t limit) const override;
};

/// The matchers of a model; a boundary counts when all agree on it.
class Matchers {
 public:
  explicit Matchers(const KVPrefixCacheOptions& options);
  /// As Matcher::DeepestBoundary, for all kinds of state together.
  [[nodiscard]] std::int32_t DeepestBoundary(const MatchedPath& path, std::int32_t limit) const;

 private:
  std::vector<std::unique_ptr<Matcher>> matchers_;
};

/// The node of the path to `node` in whose edge the first `num_pages` pages of the path end, there
/// or at its end; the root for 0. Requires: num_pages <= node.end_page().
[[nodiscard]] Node& NodeReaching(Node& node, std::int32_t num_pages);
/// The node of the path to `node` whose edge ends after `num_pages` pages, or null when that is
/// inside an edge. The root for 0. Requires: num_pages <= node.end_page().
[[nodiscard]] Node* FindNodeEndingAt(Node& node, std::int32_t num_pages);
/// The deepest node of the path to `node` of which the tier holds pages, or the root.
[[nodiscard]] Node& DeepestNodeOn(Tier tier, Node& node);

}  // namespace lora_serve
