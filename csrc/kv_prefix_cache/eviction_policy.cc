#include "kv_prefix_cache/eviction_policy.h"

#include <algorithm>

#include "common/check.h"
#include "kv_prefix_cache/namespace.h"

namespace lora_serve {

void EvictionPolicy::Pin(Node& node) noexcept {
  Residency& residency = node.On(tier_);
  if (residency.num_pins++ > 0) return;
  residency.next_pinned = first_pinned_;
  if (first_pinned_ != nullptr) first_pinned_->On(tier_).previous_pinned = &node;
  first_pinned_ = &node;
  Refresh(node);
}

void EvictionPolicy::Unpin(Node& node) noexcept {
  Residency& residency = node.On(tier_);
  LS_FATAL(residency.num_pins > 0, "unbalanced unpin of node ", node.sequence);
  if (--residency.num_pins > 0) return;
  Node*& link_to_node = residency.previous_pinned == nullptr
                            ? first_pinned_
                            : residency.previous_pinned->On(tier_).next_pinned;
  link_to_node = residency.next_pinned;
  if (residency.next_pinned != nullptr) {
    residency.next_pinned->On(tier_).previous_pinned = residency.previous_pinned;
  }
  residency.previous_pinned = nullptr;
  residency.next_pinned = nullptr;
  Refresh(node);
}

void EvictionPolicy::Refresh(Node& node) noexcept {
  Residency& residency = node.On(tier_);
  const bool is_evictable = !node.IsRoot() && node.children.IsEmpty() && residency.num_pins == 0;
  if (is_evictable == residency.leaf_hook.is_listed()) return;
  if (!is_evictable) {
    Unlist(node);
    return;
  }
  LeafList& list = ListOf(node);
  list.leaves_.List(residency.leaf_hook, {node.epoch, node.sequence}, &node);
  num_listed_pages_ += residency.pages.size();
  RerankHead(list);
}

void EvictionPolicy::ChildRemoved(Node& parent, Epoch child_epoch) noexcept {
  Unlist(parent);
  parent.epoch = std::max(parent.epoch, child_epoch);
  Refresh(parent);
}

void EvictionPolicy::Unlist(Node& node) noexcept {
  Residency& residency = node.On(tier_);
  if (!residency.leaf_hook.is_listed()) return;
  LeafList& list = ListOf(node);
  list.leaves_.Unlist(residency.leaf_hook);
  num_listed_pages_ -= residency.pages.size();
  RerankHead(list);
}

Node* EvictionPolicy::Victim() const {
  return heads_.IsEmpty() ? nullptr : VictimOf(*heads_.head().item);
}

Node* EvictionPolicy::VictimOf(const LeafList& list) {
  return list.IsEmpty() ? nullptr : list.leaves_.head().item;
}

std::int64_t EvictionPolicy::CountProtectedPages(const PrefixMatch& match) const {
  ++current_mark_;
  std::int64_t num_pages = 0;
  for (const Node* node = first_pinned_; node != nullptr; node = node->On(tier_).next_pinned) {
    num_pages += MarkPath(node);
  }
  if (match.node != nullptr && match.node->visit_mark != current_mark_) {
    num_pages += match.num_edge_pages + MarkPath(match.node->parent_backptr);
  }
  return num_pages;
}

std::int64_t EvictionPolicy::MarkPath(const Node* node) const {
  std::int64_t num_pages = 0;
  for (; node != nullptr && node->visit_mark != current_mark_; node = node->parent_backptr) {
    node->visit_mark = current_mark_;
    num_pages += node->On(tier_).pages.size();
  }
  return num_pages;
}

LeafList& EvictionPolicy::ListOf(const Node& node) const {
  return node.namespace_backptr->leaf_list(tier_);
}

void EvictionPolicy::RerankHead(LeafList& list) noexcept {
  auto& hook = list.head_hook_;
  const bool is_ranked = hook.is_listed();
  if (list.IsEmpty()) {
    if (is_ranked) heads_.Unlist(hook);
    return;
  }
  const EvictionRank& rank = list.leaves_.head().rank;
  if (is_ranked) {
    if (hook.rank() == rank) return;
    heads_.Unlist(hook);
  }
  heads_.List(hook, rank, &list);
}

std::int64_t EvictionPolicy::CountPinnedNodes() const {
  std::int64_t num_nodes = 0;
  for (const Node* node = first_pinned_; node != nullptr; node = node->On(tier_).next_pinned) {
    ++num_nodes;
  }
  return num_nodes;
}

void EvictionPolicy::CheckInvariants() const {
  std::int64_t num_listed_pages = 0;
  heads_.ForEach([&](const RankedSet<LeafList>::Entry& head) {
    LS_CHECK(!head.item->IsEmpty() && head.rank == head.item->leaves_.head().rank,
             "E3: a namespace is not ranked by the head of its leaf list");
    head.item->leaves_.ForEach([&](const RankedSet<Node>::Entry& leaf) {
      LS_CHECK((leaf.rank == EvictionRank{leaf.item->epoch, leaf.item->sequence}), "E2: node ",
               leaf.item->sequence, " was used in epoch ", leaf.item->epoch,
               " but is ranked by epoch ", leaf.rank.epoch);
      num_listed_pages += leaf.item->On(tier_).pages.size();
    });
  });
  LS_CHECK(num_listed_pages == num_listed_pages_, "E3: listed leaves have ", num_listed_pages,
           " pages but ", num_listed_pages_, " are counted");
  const Node* previous = nullptr;
  for (const Node* node = first_pinned_; node != nullptr; node = node->On(tier_).next_pinned) {
    LS_CHECK(node->On(tier_).num_pins > 0 && node->On(tier_).previous_pinned == previous,
             "E4: node ", node->sequence, " with ", node->On(tier_).num_pins,
             " pins is wrongly linked among the pinned nodes");
    previous = node;
  }
}

}  // namespace lora_serve
