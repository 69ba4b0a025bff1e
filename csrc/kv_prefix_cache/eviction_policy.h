#pragma once

#include <array>
#include <cstdint>
#include <functional>

#include "kv_prefix_cache/leaf_list.h"
#include "kv_prefix_cache/node.h"
#include "kv_prefix_cache/pinned_paths.h"
#include "kv_prefix_cache/tier.h"

namespace lora_serve {

/// Says which leaf of one component and tier goes first, and which nodes are protected.
///
/// Owns: the ranking of the namespaces' leaf lists, and what is known of pinned paths. Does not
/// know: pages' ids, tokens, requests; it never removes anything.
///
/// A node is listed, so evictable, exactly while it is not a root, has pages here, all of them
/// present, and neither pins nor (for KV pages) children with pages here (E1). Refresh() is the
/// only function that lists or unlists by that rule: every path that changes one of these ends in
/// it. What a listed node holds in any tier, and its epoch, never change: first Unlist, then
/// change, then Refresh (ResidencyChange does both).
class EvictionPolicy {
 public:
  EvictionPolicy(Component component, Tier tier)
      : component_(component), tier_(tier), pinned_paths_(component, tier) {}
  EvictionPolicy(const EvictionPolicy&) = delete;
  EvictionPolicy& operator=(const EvictionPolicy&) = delete;

  /// Protects `node`, and for KV pages the path from the root to its end.
  /// Complexity: O(1) but for an unlisting.
  void Pin(Node& node) noexcept;
  /// Fatal when `node` has no pin. Complexity: O(1) but for a listing.
  void Unpin(Node& node) noexcept;

  /// Brings the listing of `node` in line with what it holds.
  /// Complexity: O(log leaves), O(1) for the youngest.
  void Refresh(Node& node) noexcept;
  /// Takes `node` off its list if it is on one.
  void Unlist(Node& node) noexcept;
  /// To be called when the namespace's quota, page count or adapter residency has changed.
  /// Complexity: O(log namespaces).
  void RerankNamespace(Namespace& ns) noexcept;

  /// The listed leaf of all namespaces that goes first, or null. Complexity: O(1).
  [[nodiscard]] Node* Victim() const;
  /// The listed leaf of one namespace that goes first, or null. Complexity: O(1).
  [[nodiscard]] Node* VictimOf(const Namespace& ns) const;
  /// How many of the last pages of a listed leaf have its place in the order: those that the host
  /// lacks, or when it has all of them, all; over quota, no more than the excess.
  [[nodiscard]] std::int32_t NumVictimPages(const Node& leaf) const;
  /// Calls `visit(Node&)` for the listed leaves in the order in which they would go, until it says
  /// false. Complexity: O(namespaces), then O(log namespaces) a leaf.
  void ForEachVictim(const std::function<bool(Node&)>& visit) const;

  /// Pages of listed leaves: what eviction can free before it looks at any parent.
  [[nodiscard]] std::int64_t num_listed_pages() const { return num_listed_pages_; }

  /// Pages that eviction must not touch: those on the path of a pin, and those that a pin at
  /// `extra` would protect. All others can be evicted, suffix first. For KV pages only.
  /// Complexity: amortised over pins O(1), see PinnedPaths.
  [[nodiscard]] std::int64_t CountProtectedPages(const PathPosition& extra = {}) const {
    return pinned_paths_.CountPages(extra);
  }
  /// The tier holds `delta` pages more of the node.
  void PagesChanged(const Node& node, std::int32_t delta) noexcept {
    pinned_paths_.PagesChanged(node, delta);
  }
  /// The node is about to be destroyed. Requires: neither pins nor children.
  void Forget(Node& node) noexcept { pinned_paths_.Forget(node); }

  /// Would Refresh list the node?
  [[nodiscard]] bool IsEvictable(const Node& node) const;

  /// Throws: InternalError naming the broken invariant (E2, E3, E4, E6). Changes nothing.
  void CheckInvariants() const;
  /// For checks.
  [[nodiscard]] const PinnedPaths& pinned_paths() const { return pinned_paths_; }

 private:
  [[nodiscard]] const Residency& Held(const Node& node) const { return node.Of(component_, tier_); }
  [[nodiscard]] Residency& Held(Node& node) const { return node.Of(component_, tier_); }
  /// Does the host have the last page (or the snapshot) too?
  [[nodiscard]] bool IsBacked(const Node& node) const;
  [[nodiscard]] LeafList& ListOf(const Node& node, bool is_backed) const;
  /// The rank of an entry of `list`, which belongs to the namespace of `leaf`.
  [[nodiscard]] HeadRank RankOf(const LeafSet::Entry& leaf) const;
  void RerankHead(LeafList& list) noexcept;

  const Component component_;
  const Tier tier_;
  HeadSet heads_;
  mutable PinnedPaths pinned_paths_;  // counts when it is asked
  std::int64_t num_listed_pages_ = 0;
};

/// The policies of all components and tiers.
class EvictionPolicies {
 public:
  EvictionPolicies();

  [[nodiscard]] EvictionPolicy& Of(Component component, Tier tier) {
    return policies_[IndexOf(component)][IndexOf(tier)];
  }
  [[nodiscard]] const EvictionPolicy& Of(Component component, Tier tier) const {
    return policies_[IndexOf(component)][IndexOf(tier)];
  }
  void Unlist(Node& node) noexcept;
  void Refresh(Node& node) noexcept;
  void RerankNamespace(Namespace& ns) noexcept;
  /// The node is about to be destroyed. Fatal when it is pinned anywhere.
  void Forget(Node& node) noexcept;

 private:
  std::array<std::array<EvictionPolicy, kNumTiers>, kNumComponents> policies_;
};

/// Keeps a node off the lists that its ranking by what a tier holds of it concerns, while that
/// changes: the tier's own, and for the host also the device's, where it decides who is backed; and
/// keeps the count of protected pages right. Not to be nested for one node: the inner end would
/// list it too early.
class ResidencyChange {
 public:
  ResidencyChange(EvictionPolicies& policies, Node& node, Component component, Tier tier)
      : device_policy_(policies.Of(component, Tier::kDevice)),
        host_policy_(policies.Of(component, Tier::kHost)),
        node_(node),
        held_(node.Of(component, tier)),
        tier_(tier),
        num_pages_before_(held_.pages.size()) {
    device_policy_.Unlist(node_);
    if (tier_ == Tier::kHost) host_policy_.Unlist(node_);
  }
  ~ResidencyChange() {
    EvictionPolicy& policy = tier_ == Tier::kHost ? host_policy_ : device_policy_;
    policy.PagesChanged(node_, held_.pages.size() - num_pages_before_);
    device_policy_.Refresh(node_);
    if (tier_ == Tier::kHost) host_policy_.Refresh(node_);
  }
  ResidencyChange(const ResidencyChange&) = delete;
  ResidencyChange& operator=(const ResidencyChange&) = delete;

 private:
  EvictionPolicy& device_policy_;
  EvictionPolicy& host_policy_;
  Node& node_;
  const Residency& held_;
  const Tier tier_;
  const std::int32_t num_pages_before_;
};

}  // namespace lora_serve
