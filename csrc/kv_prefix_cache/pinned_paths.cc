#include "kv_prefix_cache/pinned_paths.h"

#include <map>
#include <set>

#include "common/check.h"

namespace lora_serve {

// --- Notes -------------------------------------------------------------------------------------

void PinnedPaths::Add(Node& node) noexcept {
  if (Held(node).is_pin_counted) {  // it is back before anybody asked
    Unlink(noted_, node);
    Link(counted_, node);
  } else {
    Link(noted_, node);
  }
}

void PinnedPaths::Remove(Node& node) noexcept {
  if (Held(node).is_pin_counted) {
    Unlink(counted_, node);
    Link(noted_, node);
  } else {
    Unlink(noted_, node);
  }
}

void PinnedPaths::Forget(Node& node) noexcept {
  LS_FATAL(Held(node).num_pins == 0, "node ", node.sequence, " ends with ", Held(node).num_pins,
           " pins");
  if (!Held(node).is_pin_counted) return;
  Unlink(noted_, node);
  UncountPath(node);
}

void PinnedPaths::Link(Node*& first, Node& node) noexcept {
  Held(node).next_pinned = first;
  if (first != nullptr) Held(*first).previous_pinned = &node;
  first = &node;
}

void PinnedPaths::Unlink(Node*& first, Node& node) noexcept {
  Residency& held = Held(node);
  Node*& link_to_node =
      held.previous_pinned == nullptr ? first : Held(*held.previous_pinned).next_pinned;
  link_to_node = held.next_pinned;
  if (held.next_pinned != nullptr) Held(*held.next_pinned).previous_pinned = held.previous_pinned;
  held.previous_pinned = nullptr;
  held.next_pinned = nullptr;
}

// --- Counting ----------------------------------------------------------------------------------

void PinnedPaths::CountPath(Node& node) noexcept {
  bool is_counted = IsOnCountedPath(node);
  Held(node).is_pin_counted = true;
  for (Node* at = &node; !is_counted;) {
    num_pages_ += Held(*at).pages.size();
    at = at->parent_backptr;
    if (at == nullptr) return;
    is_counted = IsOnCountedPath(*at);
    ++Held(*at).num_counted_children;
  }
}

void PinnedPaths::UncountPath(Node& node) noexcept {
  Held(node).is_pin_counted = false;
  for (Node* at = &node; !IsOnCountedPath(*at);) {
    num_pages_ -= Held(*at).pages.size();
    at = at->parent_backptr;
    if (at == nullptr) return;
    --Held(*at).num_counted_children;
  }
}

void PinnedPaths::Settle() noexcept {
  // New pins first: most often they continue a path whose pin has just gone.
  for (Node* node = noted_; node != nullptr;) {
    Node& noted = *node;
    node = Held(noted).next_pinned;
    if (Held(noted).is_pin_counted) continue;
    CountPath(noted);
    Unlink(noted_, noted);
    Link(counted_, noted);
  }
  while (noted_ != nullptr) {
    Node& noted = *noted_;
    Unlink(noted_, noted);
    UncountPath(noted);
  }
}

std::int64_t PinnedPaths::CountPages(const PathPosition& extra) {
  Settle();
  if (extra.node == nullptr || IsOnCountedPath(*extra.node)) return num_pages_;
  std::int64_t num_pages = num_pages_ + extra.num_edge_pages;
  for (const Node* node = extra.node->parent_backptr; node != nullptr && !IsOnCountedPath(*node);
       node = node->parent_backptr) {
    num_pages += Held(*node).pages.size();
  }
  return num_pages;
}

// --- Checks ------------------------------------------------------------------------------------

std::int64_t PinnedPaths::CountPagesAfresh() const {
  std::set<const Node*> nodes;
  std::int64_t num_pages = 0;
  for (const Node* first : {counted_, noted_}) {
    for (const Node* pinned = first; pinned != nullptr; pinned = Held(*pinned).next_pinned) {
      if (Held(*pinned).num_pins == 0) continue;
      for (const Node* node = pinned; node != nullptr && nodes.insert(node).second;
           node = node->parent_backptr) {
        num_pages += Held(*node).pages.size();
      }
    }
  }
  return num_pages;
}

std::int64_t PinnedPaths::CountPinnedNodes() const {
  std::int64_t num_nodes = 0;
  for (const Node* first : {counted_, noted_}) {
    for (const Node* node = first; node != nullptr; node = Held(*node).next_pinned) {
      num_nodes += Held(*node).num_pins > 0 ? 1 : 0;
    }
  }
  return num_nodes;
}

void PinnedPaths::CheckList(const Node* first, bool is_counted_list) const {
  const Node* previous = nullptr;
  for (const Node* node = first; node != nullptr; node = Held(*node).next_pinned) {
    const Residency& held = Held(*node);
    const bool is_pinned = held.num_pins > 0;
    const bool is_right_list =
        is_counted_list ? is_pinned && held.is_pin_counted : is_pinned != held.is_pin_counted;
    LS_CHECK(is_right_list && held.previous_pinned == previous, "E4: node ", node->sequence,
             " with ", held.num_pins, " pins is wrongly linked among the pinned nodes");
    previous = node;
  }
}

void PinnedPaths::CheckInvariants() const {
  CheckList(counted_, true);
  CheckList(noted_, false);
  std::map<const Node*, std::int32_t> num_children;  // of the nodes on counted paths, on such paths
  std::int64_t num_pages = 0;
  for (const Node* first : {counted_, noted_}) {
    for (const Node* counted = first; counted != nullptr; counted = Held(*counted).next_pinned) {
      if (!Held(*counted).is_pin_counted) continue;
      for (const Node* node = counted; node != nullptr && num_children.try_emplace(node, 0).second;
           node = node->parent_backptr) {
        num_pages += Held(*node).pages.size();
      }
    }
  }
  LS_CHECK(num_pages == num_pages_, "E6: counted paths have ", num_pages, " pages but ", num_pages_,
           " are counted");
  for (const auto& [node, unused] : num_children) {
    if (!node->IsRoot()) ++num_children.at(node->parent_backptr);
  }
  for (const auto& [node, expected] : num_children) {
    LS_CHECK(Held(*node).num_counted_children == expected, "E6: node ", node->sequence, " has ",
             expected, " children on counted paths but counts ", Held(*node).num_counted_children);
  }
}

}  // namespace lora_serve
