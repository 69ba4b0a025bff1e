#include "kv_prefix_cache/event_log.h"

#include <utility>

#include "kv_prefix_cache/namespace.h"

namespace lora_serve {
namespace {

std::uint64_t Mix(std::uint64_t value) {
  // Without the addition 0 would stay 0, and a run of zero tokens would have one hash.
  value = (value + 0x9e3779b97f4a7c15) * 0xbf58476d1ce4e5b9;
  return value ^ (value >> 32);  // a multiplication only carries upwards: fold the high bits down
}

std::uint64_t HashBeforeEdge(const Node& node) {
  const Node& parent = *node.parent_backptr;
  return parent.IsRoot() ? ChainRoot(node.namespace_backptr->digest_seed()) : parent.end_hash;
}

std::span<const TokenId> PageTokens(const Node& node, std::int32_t page) {
  const std::size_t page_size = node.tokens.size() / static_cast<std::size_t>(node.num_pages);
  return std::span(node.tokens).subspan(static_cast<std::size_t>(page) * page_size, page_size);
}

std::uint64_t HashPages(const Node& node, std::int32_t num_pages) {
  std::uint64_t hash = HashBeforeEdge(node);
  for (std::int32_t page = 0; page < num_pages; ++page) {
    hash = ChainHash(hash, PageTokens(node, page));
  }
  return hash;
}

}  // namespace

std::uint64_t ChainRoot(std::uint64_t digest_seed) { return Mix(digest_seed); }

std::uint64_t ChainHash(std::uint64_t parent, std::span<const TokenId> page) {
  std::uint64_t hash = parent;
  for (const TokenId token : page) hash = Mix(hash ^ static_cast<std::uint32_t>(token));
  return hash;
}

void EventLog::set_is_enabled(bool is_enabled) {
  is_enabled_ = is_enabled;
  if (!is_enabled) events_ = {};
}

void EventLog::EdgeChanged(Node& node) {
  if (is_enabled_) node.end_hash = HashPages(node, node.num_pages);
}

void EventLog::Add(KVEventKind kind, Tier tier, const Node& node, std::int32_t first_page,
                   std::int32_t num_pages) {
  if (!is_enabled_ || num_pages == 0) return;
  KVEvent event{.kind = kind,
                .tier = tier,
                .namespace_id = node.namespace_backptr->id(),
                .parent_hash = {},
                .page_hashes = {},
                .token_ids = {}};
  std::uint64_t hash = HashPages(node, first_page);
  if (node.start_page + first_page > 0) event.parent_hash = hash;
  event.page_hashes.reserve(static_cast<std::size_t>(num_pages));
  for (std::int32_t page = first_page; page < first_page + num_pages; ++page) {
    const auto tokens = PageTokens(node, page);
    hash = ChainHash(hash, tokens);
    event.page_hashes.push_back(hash);
    if (kind == KVEventKind::kStored) {
      event.token_ids.insert(event.token_ids.end(), tokens.begin(), tokens.end());
    }
  }
  events_.push_back(std::move(event));
}

std::vector<KVEvent> EventLog::Take() { return std::exchange(events_, {}); }

}  // namespace lora_serve
