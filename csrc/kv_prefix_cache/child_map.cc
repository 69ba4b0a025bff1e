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
  if (many_ == nullptr) {
    return only_child_ != nullptr && StartsWith(*only_child_, page) ? only_child_.get() : nullptr;
  }
  const auto [begin, end] = many_->equal_range(HashPage(page));
  for (auto it = begin; it != end; ++it) {
    if (StartsWith(*it->second, page)) return it->second.get();
  }
  return nullptr;
}

void ChildMap::Insert(std::unique_ptr<Node> child, std::size_t page_size) {
  if (IsEmpty()) {
    only_child_ = std::move(child);
    return;
  }
  if (many_ == nullptr) {
    many_ = std::make_unique<Map>();
    const std::uint64_t hash = HashFirstPage(*only_child_, page_size);
    many_->emplace(hash, std::move(only_child_));
  }
  const std::uint64_t hash = HashFirstPage(*child, page_size);
  many_->emplace(hash, std::move(child));
}

std::unique_ptr<Node> ChildMap::Remove(const Node& child, std::size_t page_size) {
  if (only_child_.get() == &child) return std::move(only_child_);
  const Map::iterator position = FindPosition(child, page_size);
  std::unique_ptr<Node> removed = std::move(many_->extract(position).mapped());
  if (many_->size() == 1) {
    only_child_ = std::move(many_->begin()->second);
    many_.reset();
  }
  return removed;
}

std::unique_ptr<Node> ChildMap::Replace(const Node& child, std::unique_ptr<Node> replacement,
                                        std::size_t page_size) {
  if (only_child_.get() == &child) return std::exchange(only_child_, std::move(replacement));
  return std::exchange(FindPosition(child, page_size)->second, std::move(replacement));
}

ChildMap::Map::iterator ChildMap::FindPosition(const Node& child, std::size_t page_size) {
  LS_CHECK(many_ != nullptr, "node ", child.sequence, " is not its parent's only child");
  const auto [begin, end] = many_->equal_range(HashFirstPage(child, page_size));
  for (auto it = begin; it != end; ++it) {
    if (it->second.get() == &child) return it;
  }
  LS_CHECK(false, "node ", child.sequence, " is not among its parent's ", many_->size(),
           " children");
  return many_->end();
}

// A test compiles this file again with another seed: no decision may depend on it.
#ifndef LORA_SERVE_PAGE_HASH_SEED
#define LORA_SERVE_PAGE_HASH_SEED 0
#endif

std::uint64_t HashPage(std::span<const TokenId> page) {
  constexpr std::uint64_t kMultiplier = 0x9e3779b97f4a7c15;  // 2^64 / golden ratio: mixes upwards
  std::uint64_t hash = page.size() + std::uint64_t{LORA_SERVE_PAGE_HASH_SEED};
  for (const TokenId token : page) {
    hash = (hash ^ static_cast<std::uint32_t>(token)) * kMultiplier;
    hash ^= hash >> 32;  // the next multiplication only carries upwards, so fold the high bits down
  }
  return hash;
}

}  // namespace lora_serve
