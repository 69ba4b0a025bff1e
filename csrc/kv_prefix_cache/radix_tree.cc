#include "kv_prefix_cache/radix_tree.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "common/check.h"

namespace lora_serve {
namespace {

/// Whole pages at the start of `a` and `b` that are equal. Requires: both are whole pages.
/// Compares runs of pages at once: one call per page costs more than the bytes.
std::int32_t NumCommonPages(std::span<const TokenId> a, std::span<const TokenId> b,
                            std::size_t page_size) {
  constexpr std::size_t kRunPages = 32;
  const std::size_t num_pages = std::min(a.size(), b.size()) / page_size;
  std::size_t page = 0;
  std::size_t step = kRunPages;
  while (page < num_pages) {
    step = std::min(step, num_pages - page);
    const std::size_t offset = page * page_size;
    if (std::memcmp(&a[offset], &b[offset], step * page_size * sizeof(TokenId)) == 0) {
      page += step;
    } else if (step > 1) {
      step /= 2;
    } else {
      break;
    }
  }
  return static_cast<std::int32_t>(page);
}

/// Gives the first `num_upper_pages` pages of the edge to the new upper half; `lower` keeps the
/// rest with its pins, its children and its place at the end of the path.
void DivideResidency(Residency& lower, Residency& upper, std::int32_t num_upper_pages) {
  const std::int32_t num_present = lower.num_present();
  upper.epoch = lower.epoch;
  upper.pages = lower.pages.TakeFront(std::min(num_upper_pages, lower.pages.size()));
  upper.num_in_flight = std::max(0, upper.pages.size() - num_present);
  lower.num_in_flight -= upper.num_in_flight;
  upper.num_continuations = lower.pages.IsEmpty() ? 0 : 1;
  upper.num_counted_children = lower.IsOnCountedPath() ? 1 : 0;
}

}  // namespace

RadixTree::RadixTree(std::int32_t page_size, NodeSequencer* sequencer, Namespace* owner)
    : page_size_(page_size), sequencer_backptr_(sequencer), namespace_backptr_(owner) {
  LS_CHECK(page_size >= 1, "page_size is ", page_size);
  root_ = NewNode(nullptr);
}

RadixTree::~RadixTree() {
  std::vector<Node*> nodes;
  ForEachNode([&nodes](Node& node) { nodes.push_back(&node); });
  for (auto node = nodes.rbegin(); node != nodes.rend(); ++node) {  // children before their parents
    if (!(*node)->IsRoot()) RemoveLeaf(**node);
  }
}

PrefixMatch RadixTree::Match(Node& from, std::span<const TokenId> tokens) const {
  const auto page_size = static_cast<std::size_t>(page_size_);
  PrefixMatch match{.node = &from, .num_pages = 0, .num_edge_pages = from.num_pages};
  while (match.num_edge_pages == match.node->num_pages && tokens.size() >= page_size) {
    Node* const child = match.node->children.Find(tokens.first(page_size));
    if (child == nullptr) break;
    match.node = child;
    match.num_edge_pages = NumCommonPages(child->tokens, tokens, page_size);
    match.num_pages += match.num_edge_pages;
    tokens = tokens.subspan(NumTokens(match.num_edge_pages));
  }
  return match;
}

Node& RadixTree::Split(Node& node, std::int32_t num_upper_pages) {
  LS_CHECK(num_upper_pages > 0 && num_upper_pages < node.num_pages, "cannot cut an edge of ",
           node.num_pages, " pages after ", num_upper_pages);
  const auto page_size = static_cast<std::size_t>(page_size_);
  Node& parent = *node.parent_backptr;
  std::unique_ptr<Node> new_upper = NewNode(&parent);
  Node& upper = *new_upper;
  const auto cut = node.tokens.begin() + static_cast<std::ptrdiff_t>(NumTokens(num_upper_pages));
  upper.tokens.assign(node.tokens.begin(), cut);
  upper.num_pages = num_upper_pages;
  // The parent's entry is looked up by the first page, so replace it before the edge changes.
  std::unique_ptr<Node> lower = parent.children.Replace(node, std::move(new_upper), page_size);
  for (const Tier tier : kTiers) DivideResidency(node.On(tier), upper.On(tier), num_upper_pages);
  node.tokens.erase(node.tokens.begin(), cut);
  node.start_page += num_upper_pages;
  node.num_pages -= num_upper_pages;
  node.parent_backptr = &upper;
  upper.children.Insert(std::move(lower), page_size);
  return upper;
}

Node& RadixTree::AddChild(Node& parent, std::span<const TokenId> tokens) {
  const auto page_size = static_cast<std::size_t>(page_size_);
  LS_CHECK(!tokens.empty() && tokens.size() % page_size == 0, "an edge of ", tokens.size(),
           " tokens is not whole pages of ", page_size_);
  LS_DCHECK(parent.children.Find(tokens.first(page_size)) == nullptr, "node ", parent.sequence,
            " has a child that starts with this page");
  std::unique_ptr<Node> child = NewNode(&parent);
  child->tokens.assign(tokens.begin(), tokens.end());
  child->num_pages = static_cast<std::int32_t>(tokens.size() / page_size);
  Node& added = *child;
  parent.children.Insert(std::move(child), page_size);
  return added;
}

void RadixTree::ExtendLeaf(Node& leaf, std::span<const TokenId> tokens) {
  LS_CHECK(leaf.children.IsEmpty() && !leaf.IsRoot(), "node ", leaf.sequence, " is not a leaf");
  LS_CHECK(tokens.size() % static_cast<std::size_t>(page_size_) == 0, tokens.size(),
           " tokens are not whole pages of ", page_size_);
  leaf.tokens.insert(leaf.tokens.end(), tokens.begin(), tokens.end());
  leaf.num_pages += static_cast<std::int32_t>(tokens.size()) / page_size_;
}

void RadixTree::TruncateLeaf(Node& leaf, std::int32_t num_pages) {
  LS_CHECK(leaf.children.IsEmpty() && num_pages > 0 && num_pages < leaf.num_pages,
           "cannot cut node ", leaf.sequence, " with ", leaf.children.size(), " children from ",
           leaf.num_pages, " to ", num_pages, " pages");
  for (const Tier tier : kTiers) {
    LS_CHECK(leaf.On(tier).pages.size() <= num_pages, "node ", leaf.sequence, " still holds ",
             leaf.On(tier).pages.size(), " pages; its edge cannot end after ", num_pages);
  }
  leaf.tokens.resize(NumTokens(num_pages));
  leaf.num_pages = num_pages;
}

void RadixTree::RemoveLeaf(Node& leaf) {
  LS_CHECK(leaf.children.IsEmpty() && !leaf.IsRoot(), "node ", leaf.sequence, " is not a leaf");
  const auto removed =
      leaf.parent_backptr->children.Remove(leaf, static_cast<std::size_t>(page_size_));
  --num_nodes_;
}

std::unique_ptr<Node> RadixTree::NewNode(Node* parent) {
  auto node = std::make_unique<Node>();
  node->sequence = sequencer_backptr_->next++;
  node->namespace_backptr = namespace_backptr_;
  if (parent != nullptr) {
    node->parent_backptr = parent;
    node->start_page = parent->end_page();
    ++num_nodes_;
  }
  return node;
}

std::size_t RadixTree::NumTokens(std::int32_t num_pages) const {
  return static_cast<std::size_t>(num_pages) * static_cast<std::size_t>(page_size_);
}

void RadixTree::CheckInvariants() const {
  LS_CHECK(
      root_->IsRoot() && root_->start_page == 0 && root_->num_pages == 0 && root_->tokens.empty(),
      "S1: the virtual root has an edge of ", root_->num_pages, " pages at depth ",
      root_->start_page);
  std::int64_t num_nodes = -1;  // the root is not counted
  ForEachNode([&](const Node& node) {
    ++num_nodes;
    CheckNode(node);
  });
  LS_CHECK(num_nodes == num_nodes_, "S4: the tree has ", num_nodes, " nodes but counts ",
           num_nodes_);
}

void RadixTree::CheckNode(const Node& node) const {
  const auto page_size = static_cast<std::size_t>(page_size_);
  LS_CHECK(node.namespace_backptr == namespace_backptr_, "S4: node ", node.sequence,
           " points to another namespace");
  LS_CHECK(node.sequence < sequencer_backptr_->next, "S4: node ", node.sequence,
           " has a number from the future");
  node.children.ForEach([&](const Node& child) {
    LS_CHECK(child.parent_backptr == &node && child.start_page == node.end_page(), "S2: node ",
             child.sequence, " starts at page ", child.start_page, " below a node that ends at ",
             node.end_page());
    LS_CHECK(child.num_pages > 0 && child.tokens.size() == NumTokens(child.num_pages), "S2: node ",
             child.sequence, " has ", child.tokens.size(), " tokens on ", child.num_pages,
             " pages");
    LS_CHECK(node.children.Find(std::span(child.tokens).first(page_size)) == &child, "S3: node ",
             child.sequence, " is not the one child found by its first page");
  });
}

}  // namespace lora_serve
