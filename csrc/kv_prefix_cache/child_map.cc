#include "kv_prefix_cache/child_map.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "common/check.h"
#include "kv_prefix_cache/node.h"

namespace lora_serve {
namespace {

bool StartsWith(const Node& child, std::span<const TokenId> page) {
  return std::memcmp(child.tokens.data(), page.data(), page.size_bytes()) == 0;
}

constexpr std::size_t kMinSlots = 4;

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
  const std::uint64_t hash = HashPage(page);
  for (std::size_t index = hash & many_->mask();; index = (index + 1) & many_->mask()) {
    const Slot& slot = many_->slots[index];
    if (slot.child == nullptr) return nullptr;
    if (slot.hash == hash && StartsWith(*slot.child, page)) return slot.child.get();
  }
}

void ChildMap::Insert(std::unique_ptr<Node> child, std::size_t page_size) {
  if (IsEmpty()) {
    only_child_ = std::move(child);
    return;
  }
  if (many_ == nullptr) {
    many_ = std::make_unique<Table>();
    many_->Resize(kMinSlots);
    const std::uint64_t hash = HashFirstPage(*only_child_, page_size);
    many_->Insert(hash, std::move(only_child_));
  }
  const std::uint64_t hash = HashFirstPage(*child, page_size);
  many_->Insert(hash, std::move(child));
}

std::unique_ptr<Node> ChildMap::Remove(const Node& child, std::size_t page_size) {
  if (only_child_.get() == &child) return std::move(only_child_);
  std::unique_ptr<Node> removed = many_->Remove(FindSlot(child, page_size));
  if (many_->num_children == 1) {
    only_child_ = std::move(std::ranges::find_if(many_->slots, [](const Slot& slot) {
                              return slot.child != nullptr;
                            })->child);
    many_.reset();
  }
  return removed;
}

std::unique_ptr<Node> ChildMap::Replace(const Node& child, std::unique_ptr<Node> replacement,
                                        std::size_t page_size) {
  if (only_child_.get() == &child) return std::exchange(only_child_, std::move(replacement));
  return std::exchange(many_->slots[FindSlot(child, page_size)].child, std::move(replacement));
}

std::size_t ChildMap::FindSlot(const Node& child, std::size_t page_size) const {
  LS_CHECK(many_ != nullptr, "node ", child.sequence, " is not its parent's only child");
  std::size_t index = HashFirstPage(child, page_size) & many_->mask();
  while (many_->slots[index].child.get() != &child) {
    LS_CHECK(many_->slots[index].child != nullptr, "node ", child.sequence,
             " is not among its parent's ", many_->num_children, " children");
    index = (index + 1) & many_->mask();
  }
  return index;
}

void ChildMap::Table::Insert(std::uint64_t hash, std::unique_ptr<Node> child) {
  if (4 * (num_children + 1) > 3 * slots.size()) Resize(2 * slots.size());
  std::size_t index = hash & mask();
  while (slots[index].child != nullptr) index = (index + 1) & mask();
  slots[index] = {hash, std::move(child)};
  ++num_children;
}

std::unique_ptr<Node> ChildMap::Table::Remove(std::size_t index) {
  std::unique_ptr<Node> removed = std::move(slots[index].child);
  // Later ones that had to pass the gap move up, so that none stands behind an empty slot.
  for (std::size_t next = (index + 1) & mask(); slots[next].child != nullptr;
       next = (next + 1) & mask()) {
    const std::size_t distance = (next - slots[next].hash) & mask();
    if (distance < ((next - index) & mask())) continue;
    slots[index] = std::move(slots[next]);
    index = next;
  }
  --num_children;
  if (slots.size() > kMinSlots && 8 * num_children < slots.size()) Resize(slots.size() / 2);
  return removed;
}

void ChildMap::Table::Resize(std::size_t num_slots) {
  std::vector<Slot> old = std::exchange(slots, std::vector<Slot>(num_slots));
  num_children = 0;
  for (Slot& slot : old) {
    if (slot.child != nullptr) Insert(slot.hash, std::move(slot.child));
  }
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
