#include "kv_prefix_cache/child_map.h"

#include <cstring>
#include <utility>

#include "common/check.h"
#include "kv_prefix_cache/node.h"

namespace lora_serve {
namespace {

bool StartsWith(const Node& child, std::span<const TokenId> page) {
  return std::memcmp(child.tokens.data(), page.data(), page.size_bytes()) == 0;
}

std::uint64_t HashFirstPage(const Node& child, std::size_t page_size) {
  return HashPage(std::span(child.tokens).first(page_size));
}

}  // namespace

ChildMap::ChildMap() = default;
ChildMap::~ChildMap() = default;

Node* ChildMap::Find(std::span<const TokenId> page) const {
  if (children_.empty()) return nullptr;
  if (children_.size() ==
      1) {  // long chains have one child a node: comparing is cheaper than hashing
    Node* const only_child = children_.begin()->second.get();
    return StartsWith(*only_child, page) ? only_child : nullptr;
  }
  const auto [begin, end] = children_.equal_range(HashPage(page));
  for (auto it = begin; it != end; ++it) {
    if (StartsWith(*it->second, page)) return it->second.get();
  }
  return nullptr;
}

void ChildMap::Insert(std::unique_ptr<Node> child, std::size_t page_size) {
  const std::uint64_t hash = HashFirstPage(*child, page_size);
  children_.emplace(hash, std::move(child));
}

std::unique_ptr<Node> ChildMap::Remove(const Node& child, std::size_t page_size) {
  return std::move(children_.extract(FindPosition(child, page_size)).mapped());
}

std::unique_ptr<Node> ChildMap::Replace(const Node& child, std::unique_ptr<Node> replacement,
                                        std::size_t page_size) {
  return std::exchange(FindPosition(child, page_size)->second, std::move(replacement));
}

ChildMap::Map::iterator ChildMap::FindPosition(const Node& child, std::size_t page_size) {
  const auto [begin, end] = children_.equal_range(HashFirstPage(child, page_size));
  for (auto it = begin; it != end; ++it) {
    if (it->second.get() == &child) return it;
  }
  LS_CHECK(false, "node ", child.sequence, " is not among its parent's ", children_.size(),
           " children");
  return children_.end();
}

std::uint64_t HashPage(std::span<const TokenId> page) {
  constexpr std::uint64_t kMultiplier = 0x9e3779b97f4a7c15;  // 2^64 / golden ratio: mixes upwards
  std::uint64_t hash = page.size();
  for (const TokenId token : page) {
    hash = (hash ^ static_cast<std::uint32_t>(token)) * kMultiplier;
    hash ^= hash >> 32;  // the next multiplication only carries upwards, so fold the high bits down
  }
  return hash;
}

}  // namespace lora_serve
