#include <algorithm>
#include <utility>

#include "common/check.h"
#include "kv_prefix_cache/kv_prefix_cache_impl.h"

// What each tier holds of the forest, and how room is made. The six functions that change it keep
// eviction lists, counts, versions and events right; nothing else touches a residency's pages.

namespace lora_serve {

// --- KV pages ----------------------------------------------------------------------------------

void KVPrefixCache::Impl::GainPages(Node& node, Tier tier, OwnedPages pages, bool in_flight) {
  if (pages.IsEmpty()) return;
  Namespace& ns = *node.namespace_backptr;
  Residency& held = node.On(tier);
  const std::int32_t num_held = held.pages.size();
  const std::int32_t num_gained = pages.size();
  LS_CHECK(num_held + num_gained <= node.num_pages && held.num_in_flight == 0, "node ",
           node.sequence, " cannot take ", num_gained, " pages behind ", num_held, " (",
           held.num_in_flight, " in flight) on an edge of ", node.num_pages);
  if (num_held == 0) {
    Node& parent = *node.parent_backptr;
    const ResidencyChange change(policies_, parent, Component::kFullAttention, tier);
    ++parent.On(tier).num_continuations;
  }
  {
    const ResidencyChange change(policies_, node, Component::kFullAttention, tier);
    held.pages.Append(std::move(pages));
    held.num_in_flight = in_flight ? num_gained : 0;
  }
  CountTreePages(ns, tier, num_gained);
  if (in_flight) return;
  ns.ContentChanged();
  if (!ns.IsDraining()) events_.Add(KVEventKind::kStored, tier, node, num_held, num_gained);
}

void KVPrefixCache::Impl::ArrivePages(Node& node, Tier tier) {
  Namespace& ns = *node.namespace_backptr;
  Residency& held = node.On(tier);
  const std::int32_t first_page = held.num_present();
  const std::int32_t num_arrived = held.num_in_flight;
  {
    const ResidencyChange change(policies_, node, Component::kFullAttention, tier);
    held.num_in_flight = 0;
  }
  ns.ContentChanged();
  if (!ns.IsDraining()) events_.Add(KVEventKind::kStored, tier, node, first_page, num_arrived);
}

void KVPrefixCache::Impl::DropTail(Node& node, Tier tier, std::int32_t num_pages) noexcept {
  if (num_pages == 0) return;
  Namespace& ns = *node.namespace_backptr;
  Residency& held = node.On(tier);
  LS_FATAL(held.num_pins == 0 && held.num_continuations == 0, "pages of node ", node.sequence,
           " were to be dropped under ", held.num_pins, " pins and ", held.num_continuations,
           " continuations");
  const std::int32_t num_kept = held.pages.size() - num_pages;
  const std::int32_t num_dropped_in_flight = std::min(num_pages, held.num_in_flight);
  if (!ns.IsDraining()) {
    events_.Add(KVEventKind::kRemoved, tier, node, num_kept, num_pages - num_dropped_in_flight);
  }
  if (tier == Tier::kDevice) ForgetNote(node);
  {
    const ResidencyChange change(policies_, node, Component::kFullAttention, tier);
    held.num_in_flight -= num_dropped_in_flight;
    held.pages.ReleaseBack(num_pages);
  }
  CountTreePages(ns, tier, -num_pages);
  ns.ContentChanged();
  if (num_kept == 0) {  // the parent is as young as what was used below it; maybe a leaf now
    Node& parent = *node.parent_backptr;
    const ResidencyChange change(policies_, parent, Component::kFullAttention, tier);
    --parent.On(tier).num_continuations;
    parent.On(tier).epoch = std::max(parent.On(tier).epoch, held.epoch);
  }
  ShrinkEdge(node);
}

void KVPrefixCache::Impl::ShrinkEdge(Node& node) noexcept {
  const std::int32_t num_needed =
      std::max(node.On(Tier::kDevice).pages.size(), node.On(Tier::kHost).pages.size());
  if (num_needed == node.num_pages) return;
  for (const Tier tier : kTiers) DropSnapshot(node, tier);  // its tokens are known no more
  RadixTree& tree = node.namespace_backptr->tree();
  if (num_needed > 0) {
    tree.TruncateLeaf(node, num_needed);
    events_.EdgeChanged(node);
    return;
  }
  policies_.Forget(node);
  tree.RemoveLeaf(node);
}

// --- Snapshots ---------------------------------------------------------------------------------

void KVPrefixCache::Impl::GainSnapshot(Node& node, Tier tier, OwnedPages slot, bool in_flight) {
  Residency& held = node.Snapshot(tier);
  LS_CHECK(held.pages.IsEmpty() && slot.size() == 1, "node ", node.sequence, " holds ",
           held.pages.size(), " snapshots and cannot take ", slot.size());
  {
    const ResidencyChange change(policies_, node, Component::kState, tier);
    held.pages = std::move(slot);
    held.num_in_flight = in_flight ? 1 : 0;
  }
  ++node.namespace_backptr->counts().snapshots[IndexOf(tier)];
  if (!in_flight) node.namespace_backptr->ContentChanged();
}

void KVPrefixCache::Impl::ArriveSnapshot(Node& node, Tier tier) {
  const ResidencyChange change(policies_, node, Component::kState, tier);
  node.Snapshot(tier).num_in_flight = 0;
  node.namespace_backptr->ContentChanged();
}

void KVPrefixCache::Impl::DropSnapshot(Node& node, Tier tier) noexcept {
  Residency& held = node.Snapshot(tier);
  if (held.pages.IsEmpty()) return;
  LS_FATAL(held.num_pins == 0, "the snapshot of node ", node.sequence, " was to be dropped under ",
           held.num_pins, " pins");
  {
    const ResidencyChange change(policies_, node, Component::kState, tier);
    held.pages.ReleaseBack(1);
    held.num_in_flight = 0;
  }
  --node.namespace_backptr->counts().snapshots[IndexOf(tier)];
  node.namespace_backptr->ContentChanged();
}

// --- Age and counts ----------------------------------------------------------------------------

void KVPrefixCache::Impl::Touch(Node& node, Component component, Tier tier, Epoch epoch) noexcept {
  const ResidencyChange change(policies_, node, component, tier);
  node.Of(component, tier).epoch = epoch;
}

void KVPrefixCache::Impl::TouchPath(Node& end, Tier tier, Epoch epoch) noexcept {
  Touch(DeepestNodeOn(tier, end), Component::kFullAttention, tier, epoch);
}

void KVPrefixCache::Impl::CountTreePages(Namespace& ns, Tier tier, std::int64_t delta) noexcept {
  const bool was_over_quota = ns.NumPagesOverQuota(tier) > 0;
  ns.counts().tree_pages[IndexOf(tier)] += delta;
  num_tree_pages_[IndexOf(tier)] += delta;
  if (was_over_quota != (ns.NumPagesOverQuota(tier) > 0)) policies_.RerankNamespace(ns);
}

// --- Room --------------------------------------------------------------------------------------

bool KVPrefixCache::Impl::CanAllocate(std::int32_t num_pages, const PathPosition& kept) const {
  const PagePool& pool = *FindPool(Component::kFullAttention, Tier::kDevice);
  const EvictionPolicy& policy = PagePolicy(Tier::kDevice);
  const std::int64_t num_missing = num_pages - pool.num_free_pages();
  if (num_missing <= 0) return true;
  // Leaves alone are mostly enough. A pin inside a listed leaf takes its first part away.
  std::int64_t num_listed = policy.num_listed_pages();
  if (kept.node != nullptr && kept.node->On(Tier::kDevice).leaf_hook.is_listed()) {
    num_listed -= kept.num_edge_pages;
  }
  if (num_missing <= num_listed) return true;
  return num_missing <= num_tree_pages_[IndexOf(Tier::kDevice)] - policy.CountProtectedPages(kept);
}

OwnedPages KVPrefixCache::Impl::Allocate(Component component, Tier tier, std::int32_t num_pages) {
  PagePool& pool = Pool(component, tier);
  const std::int64_t num_missing = num_pages - pool.num_free_pages();
  if (num_missing > 0) {
    if (component == Component::kState) {
      EvictSnapshots(tier, num_missing);
    } else {
      Evict(tier, num_missing);
    }
    LS_CHECK(pool.num_free_pages() >= num_pages, "eviction left ", pool.num_free_pages(),
             " pages free where ", num_pages, " were promised");
  }
  return pool.Allocate(num_pages);
}

std::int64_t KVPrefixCache::Impl::Evict(Tier tier, std::int64_t num_pages) noexcept {
  const EvictionPolicy& policy = PagePolicy(tier);
  std::int64_t num_evicted = 0;
  while (num_evicted < num_pages) {
    Node* const leaf = policy.Victim();
    if (leaf == nullptr) break;
    const auto num_dropped = static_cast<std::int32_t>(
        std::min<std::int64_t>(policy.NumVictimPages(*leaf), num_pages - num_evicted));
    EvictTail(*leaf, tier, num_dropped);
    num_evicted += num_dropped;
  }
  return num_evicted;
}

void KVPrefixCache::Impl::EvictTail(Node& leaf, Tier tier, std::int32_t num_pages) noexcept {
  leaf.namespace_backptr->counts().evicted_pages[IndexOf(tier)] += num_pages;
  num_evicted_pages_[IndexOf(tier)] += num_pages;
  DropTail(leaf, tier, num_pages);
}

void KVPrefixCache::Impl::EvictSnapshots(Tier tier, std::int64_t num_snapshots) noexcept {
  for (; num_snapshots > 0; --num_snapshots) {
    Node* const node = SnapshotPolicy(tier).Victim();
    if (node == nullptr) return;
    DropSnapshot(*node, tier);
  }
}

std::int64_t KVPrefixCache::Impl::NumAvailablePages() const {
  return FindPool(Component::kFullAttention, Tier::kDevice)->num_free_pages() +
         num_tree_pages_[IndexOf(Tier::kDevice)] - PagePolicy(Tier::kDevice).CountProtectedPages();
}

}  // namespace lora_serve
