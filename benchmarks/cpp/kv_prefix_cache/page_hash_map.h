#pragma once

#include <cstdint>
#include <span>
#include <unordered_map>
#include <vector>

#include "common/strong_id.h"

namespace lora_serve::bench {

/// The other way to keep a prefix cache, to compare with: every page is known by a hash over all
/// tokens up to its end, and one table leads from hashes to pages.
///
/// `PageHash` has a `Digest`, `Digest First() const` (before the first page) and
/// `Digest Next(const Digest& parent, std::span<const TokenId> page)`; `DigestHash` makes a bucket
/// of a digest. The table is reserved in advance; nothing is allocated while it is searched.
template <typename PageHash, typename DigestHash>
class PageHashMap {
 public:
  using Digest = typename PageHash::Digest;

  PageHashMap(std::int32_t page_size, std::int64_t num_pages)
      : page_size_(static_cast<std::size_t>(page_size)) {
    pages_.reserve(static_cast<std::size_t>(num_pages));
  }

  /// Notes all whole pages of `tokens`.
  void Insert(std::span<const TokenId> tokens) {
    for (const Digest& digest : DigestsOf(tokens)) {
      pages_.emplace(digest, PageId(static_cast<std::int32_t>(pages_.size())));
    }
  }

  /// Of all whole pages: what a system keeps with a waiting request.
  [[nodiscard]] std::vector<Digest> DigestsOf(std::span<const TokenId> tokens) {
    std::vector<Digest> digests;
    Digest digest = hash_.First();
    for (std::size_t end = page_size_; end <= tokens.size(); end += page_size_) {
      digest = hash_.Next(digest, tokens.subspan(end - page_size_, page_size_));
      digests.push_back(digest);
    }
    return digests;
  }

  /// Leading tokens whose pages are known; hashes no page behind the first unknown one.
  [[nodiscard]] std::int32_t Match(std::span<const TokenId> tokens) {
    std::size_t num_matched = 0;
    Digest digest = hash_.First();
    while (num_matched + page_size_ <= tokens.size()) {
      digest = hash_.Next(digest, tokens.subspan(num_matched, page_size_));
      if (!pages_.contains(digest)) break;
      num_matched += page_size_;
    }
    return static_cast<std::int32_t>(num_matched);
  }

  /// The same for a prompt that was hashed before.
  [[nodiscard]] std::int32_t MatchHashed(std::span<const Digest> digests) const {
    std::size_t num_matched = 0;
    while (num_matched < digests.size() && pages_.contains(digests[num_matched])) ++num_matched;
    return static_cast<std::int32_t>(num_matched * page_size_);
  }

 private:
  const std::size_t page_size_;
  PageHash hash_;
  std::unordered_map<Digest, PageId, DigestHash> pages_;
};

}  // namespace lora_serve::bench
