#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <vector>

#include "kv_prefix_cache/cache_options.h"

namespace lora_serve {

// The hash chain as the header of KVEvent describes it, written down a second time: a router in
// another language would have to do the same.

inline std::uint64_t MixHash(std::uint64_t value) {
  value = (value + 0x9e3779b97f4a7c15) * 0xbf58476d1ce4e5b9;
  return value ^ (value >> 32);
}

/// `parent_hash`: of the page before; nothing for the first page of a sequence.
inline std::uint64_t HashOfPage(std::uint64_t digest_seed, std::optional<std::uint64_t> parent_hash,
                                std::span<const TokenId> page) {
  std::uint64_t hash = parent_hash.value_or(MixHash(digest_seed));
  for (const TokenId token : page) hash = MixHash(hash ^ static_cast<std::uint32_t>(token));
  return hash;
}

/// The hashes of the whole pages of `tokens`.
inline std::vector<std::uint64_t> HashChain(std::uint64_t digest_seed,
                                            std::span<const TokenId> tokens,
                                            std::int32_t page_size) {
  std::vector<std::uint64_t> hashes;
  std::optional<std::uint64_t> parent;
  const auto size = static_cast<std::size_t>(page_size);
  for (std::size_t start = 0; start + size <= tokens.size(); start += size) {
    parent = HashOfPage(digest_seed, parent, tokens.subspan(start, size));
    hashes.push_back(*parent);
  }
  return hashes;
}

/// What a router that hears all events believes to be cached. Checks every event against that.
class KVEventMirror {
 public:
  explicit KVEventMirror(std::int32_t page_size)
      : page_size_(static_cast<std::size_t>(page_size)) {}

  void AddNamespace(NamespaceId id, std::uint64_t digest_seed) { seeds_[id] = digest_seed; }

  void Hear(const std::vector<KVEvent>& events) {
    for (const KVEvent& event : events) {
      ASSERT_TRUE(seeds_.contains(event.namespace_id)) << "namespace " << event.namespace_id;
      ASSERT_FALSE(event.page_hashes.empty()) << "an event about nothing";
      if (event.kind == KVEventKind::kStored) {
        Store(event);
      } else {
        Remove(event);
      }
    }
    for (const auto& [place, pages] : pages_) {
      for (const auto& [hash, parent] : pages) {
        EXPECT_TRUE(!parent || pages.contains(*parent))
            << "a page of namespace " << place.id << " has a parent that no router has seen";
      }
    }
  }

  [[nodiscard]] std::size_t NumPages(NamespaceId id, Tier tier) const {
    const auto pages = pages_.find({id, tier});
    return pages == pages_.end() ? 0 : pages->second.size();
  }
  /// Leading pages of the sequence that the router would find.
  [[nodiscard]] std::int32_t NumLeadingPages(NamespaceId id, Tier tier,
                                             std::span<const TokenId> tokens) const {
    const auto pages = pages_.find({id, tier});
    if (pages == pages_.end()) return 0;
    std::int32_t num_pages = 0;
    for (const std::uint64_t hash :
         HashChain(seeds_.at(id), tokens, static_cast<std::int32_t>(page_size_))) {
      if (!pages->second.contains(hash)) break;
      ++num_pages;
    }
    return num_pages;
  }

 private:
  struct Place {
    NamespaceId id;
    Tier tier;
    friend auto operator<=>(const Place&, const Place&) = default;
  };
  /// Hash to the parent's hash.
  using Pages = std::map<std::uint64_t, std::optional<std::uint64_t>>;

  void Store(const KVEvent& event) {
    Pages& pages = pages_[{event.namespace_id, event.tier}];
    ASSERT_EQ(event.token_ids.size(), event.page_hashes.size() * page_size_);
    std::optional<std::uint64_t> parent = event.parent_hash;
    const std::span<const TokenId> tokens(event.token_ids);
    for (std::size_t i = 0; i < event.page_hashes.size(); ++i) {
      const std::uint64_t hash = HashOfPage(seeds_.at(event.namespace_id), parent,
                                            tokens.subspan(i * page_size_, page_size_));
      EXPECT_EQ(event.page_hashes[i], hash) << "the hash chain is broken at page " << i;
      EXPECT_TRUE(!parent || pages.contains(*parent)) << "stored before its parent";
      EXPECT_TRUE(pages.emplace(hash, parent).second) << "stored twice";
      parent = hash;
    }
  }

  void Remove(const KVEvent& event) {
    Pages& pages = pages_[{event.namespace_id, event.tier}];
    EXPECT_TRUE(event.token_ids.empty());
    std::optional<std::uint64_t> parent = event.parent_hash;
    for (const std::uint64_t hash : event.page_hashes) {
      const auto page = pages.find(hash);
      if (page == pages.end()) {
        ADD_FAILURE() << "removed without having been stored, or removed twice";
      } else {
        EXPECT_EQ(page->second, parent) << "removed in another order than that of the sequence";
        pages.erase(page);
      }
      parent = hash;
    }
  }

  std::size_t page_size_;
  std::map<NamespaceId, std::uint64_t> seeds_;
  std::map<Place, Pages> pages_;
};

}  // namespace lora_serve
