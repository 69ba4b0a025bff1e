#include "kv_prefix_cache/eviction_policy.h"

#include <algorithm>
#include <limits>
#include <queue>
#include <vector>

#include "common/check.h"
#include "kv_prefix_cache/namespace.h"

namespace lora_serve {

// --- Pins --------------------------------------------------------------------------------------

void EvictionPolicy::Pin(Node& node) noexcept {
  if (Held(node).num_pins++ > 0) return;
  pinned_paths_.Add(node);
  Refresh(node);
}

void EvictionPolicy::Unpin(Node& node) noexcept {
  Residency& held = Held(node);
  LS_FATAL(held.num_pins > 0, "unbalanced unpin of node ", node.sequence);
  if (--held.num_pins > 0) return;
  pinned_paths_.Remove(node);
  Refresh(node);
}

// --- Listing -----------------------------------------------------------------------------------

bool EvictionPolicy::IsEvictable(const Node& node) const {
  const Residency& held = Held(node);
  return !held.pages.IsEmpty() && held.num_in_flight == 0 && held.num_pins == 0 &&
         held.num_continuations == 0;
}

bool EvictionPolicy::IsBacked(const Node& node) const {
  return tier_ == Tier::kDevice &&
         node.Of(component_, Tier::kHost).num_present() >= Held(node).pages.size();
}

void EvictionPolicy::Refresh(Node& node) noexcept {
  Residency& held = Held(node);
  const bool is_evictable = IsEvictable(node);
  if (is_evictable == held.leaf_hook.is_listed()) return;
  if (!is_evictable) {
    Unlist(node);
    return;
  }
  held.is_listed_as_backed = IsBacked(node);
  LeafList& list = ListOf(node, held.is_listed_as_backed);
  list.leaves_.List(held.leaf_hook, {held.epoch, node.sequence}, &node);
  num_listed_pages_ += held.pages.size();
  RerankHead(list);
}

void EvictionPolicy::Unlist(Node& node) noexcept {
  Residency& held = Held(node);
  if (!held.leaf_hook.is_listed()) return;
  LeafList& list = ListOf(node, held.is_listed_as_backed);
  list.leaves_.Unlist(held.leaf_hook);
  num_listed_pages_ -= held.pages.size();
  RerankHead(list);
}

void EvictionPolicy::RerankNamespace(Namespace& ns) noexcept {
  for (const bool is_backed : {false, true}) {
    RerankHead(ns.leaf_list(component_, tier_, is_backed));
  }
}

void EvictionPolicy::RerankHead(LeafList& list) noexcept {
  auto& hook = list.head_hook_;
  if (list.IsEmpty()) {
    if (hook.is_listed()) heads_.Unlist(hook);
    return;
  }
  const HeadRank rank = RankOf(list.leaves_.head());
  if (hook.is_listed()) {
    if (hook.rank() == rank) return;
    heads_.Unlist(hook);
  }
  heads_.List(hook, rank, &list);
}

LeafList& EvictionPolicy::ListOf(const Node& node, bool is_backed) const {
  return node.namespace_backptr->leaf_list(component_, tier_, is_backed);
}

HeadRank EvictionPolicy::RankOf(const LeafSet::Entry& leaf) const {
  const Namespace& ns = *leaf.item->namespace_backptr;
  return {.is_within_quota = ns.NumPagesOverQuota(tier_) <= 0,
          .age_bucket = leaf.rank.epoch / kAgeBucketEpochs,
          .is_adapter_resident = ns.is_adapter_resident(),
          .is_unbacked = !Held(*leaf.item).is_listed_as_backed,
          .leaf = leaf.rank};
}

// --- Who goes ----------------------------------------------------------------------------------

Node* EvictionPolicy::Victim() const {
  return heads_.IsEmpty() ? nullptr : heads_.head().item->leaves_.head().item;
}

Node* EvictionPolicy::VictimOf(const Namespace& ns) const {
  for (const bool is_backed : {false, true}) {
    const LeafList& list = ns.leaf_list(component_, tier_, is_backed);
    if (!list.IsEmpty()) return list.leaves_.head().item;
  }
  return nullptr;
}

std::int32_t EvictionPolicy::NumVictimPages(const Node& leaf) const {
  const Residency& held = Held(leaf);
  std::int64_t num_pages = held.pages.size();
  if (tier_ == Tier::kDevice && !held.is_listed_as_backed) {
    num_pages -= leaf.Of(component_, Tier::kHost).num_present();
  }
  const std::int64_t num_over_quota = leaf.namespace_backptr->NumPagesOverQuota(tier_);
  if (num_over_quota > 0) num_pages = std::min(num_pages, num_over_quota);
  return static_cast<std::int32_t>(num_pages);
}

void EvictionPolicy::ForEachVictim(const std::function<bool(Node&)>& visit) const {
  struct Cursor {
    HeadRank rank;
    LeafSet::Iterator next;
    LeafSet::Iterator end;
  };
  const auto goes_later = [](const Cursor& a, const Cursor& b) { return a.rank > b.rank; };
  std::priority_queue<Cursor, std::vector<Cursor>, decltype(goes_later)> cursors(goes_later);
  for (const HeadSet::Entry& head : heads_) {
    const LeafSet& leaves = head.item->leaves_;
    cursors.push({head.rank, leaves.begin(), leaves.end()});
  }
  while (!cursors.empty()) {
    Cursor cursor = cursors.top();
    cursors.pop();
    if (!visit(*cursor.next->item)) return;
    if (++cursor.next == cursor.end) continue;
    cursor.rank = RankOf(*cursor.next);
    cursors.push(cursor);
  }
}

// --- Checks ------------------------------------------------------------------------------------

void EvictionPolicy::CheckInvariants() const {
  std::int64_t num_listed_pages = 0;
  for (const HeadSet::Entry& head : heads_) {
    LS_CHECK(!head.item->IsEmpty() && head.rank == RankOf(head.item->leaves_.head()),
             "E3: a namespace is not ranked by the head of its leaf list");
    for (const LeafSet::Entry& leaf : head.item->leaves_) {
      const Residency& held = Held(*leaf.item);
      LS_CHECK((leaf.rank == EvictionRank{held.epoch, leaf.item->sequence}), "E2: node ",
               leaf.item->sequence, " was used in epoch ", held.epoch, " but is ranked by epoch ",
               leaf.rank.epoch);
      LS_CHECK(held.is_listed_as_backed == IsBacked(*leaf.item) &&
                   &ListOf(*leaf.item, held.is_listed_as_backed) == head.item,
               "E2: node ", leaf.item->sequence, " stands in the list of another class");
      num_listed_pages += held.pages.size();
    }
  }
  LS_CHECK(num_listed_pages == num_listed_pages_, "E3: listed leaves have ", num_listed_pages,
           " pages but ", num_listed_pages_, " are counted");
  pinned_paths_.CheckInvariants();
}

// --- All of them -------------------------------------------------------------------------------

EvictionPolicies::EvictionPolicies()
    : policies_{
          {{{{Component::kFullAttention, Tier::kDevice}, {Component::kFullAttention, Tier::kHost}}},
           {{{Component::kState, Tier::kDevice}, {Component::kState, Tier::kHost}}}}} {}

void EvictionPolicies::Unlist(Node& node) noexcept {
  for (auto& tiers : policies_) {
    for (EvictionPolicy& policy : tiers) policy.Unlist(node);
  }
}

void EvictionPolicies::Refresh(Node& node) noexcept {
  for (auto& tiers : policies_) {
    for (EvictionPolicy& policy : tiers) policy.Refresh(node);
  }
}

void EvictionPolicies::RerankNamespace(Namespace& ns) noexcept {
  for (auto& tiers : policies_) {
    for (EvictionPolicy& policy : tiers) policy.RerankNamespace(ns);
  }
}

void EvictionPolicies::Forget(Node& node) noexcept {
  for (auto& tiers : policies_) {
    for (EvictionPolicy& policy : tiers) policy.Forget(node);
  }
}

}  // namespace lora_serve
