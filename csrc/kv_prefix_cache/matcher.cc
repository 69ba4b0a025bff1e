#include "kv_prefix_cache/matcher.h"

#include <algorithm>

#include "common/check.h"

namespace lora_serve {
namespace {

/// The leading pages of the path to the end of `match` that lie on `tier`.
TierCoverage CoverTier(const PrefixMatch& match, Tier tier) {
  TierCoverage coverage;
  const Node* node = match.node;
  std::int32_t num_edge_pages = match.num_edge_pages;
  for (; !node->IsRoot(); node = node->parent_backptr, num_edge_pages = node->num_pages) {
    const Residency& held = node->On(tier);
    const std::int32_t num_covered = std::min(held.pages.size(), num_edge_pages);
    const std::int32_t num_present = std::min(held.num_present(), num_edge_pages);
    if (coverage.num_covered == 0 && num_covered > 0) {
      coverage.num_covered = node->start_page + num_covered;
    }
    if (num_present > 0) {
      coverage.num_present = node->start_page + num_present;
      break;
    }
  }
  return coverage;
}

}  // namespace

MatchedPath Cover(const PrefixMatch& match, bool has_host_tier) {
  MatchedPath path{.match = match, .coverage = {}};
  path.coverage[IndexOf(Tier::kDevice)] = CoverTier(match, Tier::kDevice);
  if (has_host_tier) path.coverage[IndexOf(Tier::kHost)] = CoverTier(match, Tier::kHost);
  return path;
}

MatchedPath CoverPathTo(Node& node) {
  return Cover({.node = &node, .num_pages = node.end_page(), .num_edge_pages = node.num_pages},
               /*has_host_tier=*/true);
}

std::int32_t AttentionMatcher::DeepestBoundary(const MatchedPath& path, std::int32_t limit) const {
  return std::min(limit,
                  std::max(path.On(Tier::kDevice).num_present, path.On(Tier::kHost).num_present));
}

std::int32_t StateMatcher::DeepestBoundary(const MatchedPath& path, std::int32_t limit) const {
  for (const Node* node = path.match.node; !node->IsRoot(); node = node->parent_backptr) {
    // A match that ends inside the last edge does not reach the snapshot at its end.
    if (node->end_page() > std::min(limit, path.match.node->start_page + path.match.num_edge_pages))
      continue;
    for (const Tier tier : kTiers) {
      if (node->Snapshot(tier).num_present() > 0) return node->end_page();
    }
  }
  return 0;
}

std::int32_t RingBufferMatcher::DeepestBoundary(const MatchedPath& /*path*/,
                                                std::int32_t /*limit*/) const {
  return 0;
}

Matchers::Matchers(const KVPrefixCacheOptions& options) {
  matchers_.push_back(std::make_unique<AttentionMatcher>());
  if (options.window_layers == WindowLayers::kRingBuffer) {
    matchers_.push_back(std::make_unique<RingBufferMatcher>());
  }
  if (options.num_device_state_slots > 0) matchers_.push_back(std::make_unique<StateMatcher>());
}

std::int32_t Matchers::DeepestBoundary(const MatchedPath& path, std::int32_t limit) const {
  // Each answer can only become shorter, so asking all again until nobody shortens it ends.
  std::int32_t boundary = limit;
  for (std::size_t num_agreed = 0; num_agreed < matchers_.size();) {
    num_agreed = 0;
    for (const auto& matcher : matchers_) {
      const std::int32_t deepest = matcher->DeepestBoundary(path, boundary);
      if (deepest == boundary) ++num_agreed;
      boundary = deepest;
    }
  }
  return boundary;
}

Node& NodeReaching(Node& node, std::int32_t num_pages) {
  LS_CHECK(num_pages <= node.end_page(), "node ", node.sequence, " ends after ", node.end_page(),
           " pages, before ", num_pages);
  Node* found = &node;
  while (found->start_page >= num_pages && !found->IsRoot()) found = found->parent_backptr;
  return *found;
}

Node* FindNodeEndingAt(Node& node, std::int32_t num_pages) {
  Node& found = NodeReaching(node, num_pages);
  return found.end_page() == num_pages ? &found : nullptr;
}

Node& DeepestNodeOn(Tier tier, Node& node) {
  Node* deepest = &node;
  while (deepest->On(tier).pages.IsEmpty() && !deepest->IsRoot()) deepest = deepest->parent_backptr;
  return *deepest;
}

}  // namespace lora_serve
