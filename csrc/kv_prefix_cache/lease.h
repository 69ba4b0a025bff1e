#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "common/strong_id.h"
#include "kv_prefix_cache/owned_pages.h"

namespace lora_serve {

class KVPrefixCache;
class Namespace;
struct Node;

/// A request's right to use pages: one pin in the tree, and the private pages behind it.
///
///     logical pages:  [0 ........ num_published_pages) [num_published_pages .... pages().size())
///     who owns them:  the tree, protected by the pin,  this lease: not published yet, computed
///                     or this lease where the tree     or still to be computed
///                     already had a twin
///
/// Move-only; the destructor gives everything back: private pages to the pool, the pin to the tree.
class Lease {
 public:
  Lease() = default;
  ~Lease();
  Lease(Lease&& other) noexcept;
  Lease& operator=(Lease&& other) noexcept;
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;

  [[nodiscard]] explicit operator bool() const { return namespace_backptr_ != nullptr; }
  /// Page ids in the order of the sequence. Entries never change while the lease lives; new ones
  /// are added at the end.
  [[nodiscard]] std::span<const PageId> pages() const { return pages_; }
  /// Tokens that Acquire took from the cache.
  [[nodiscard]] std::int32_t num_cached_tokens() const { return num_cached_tokens_; }
  /// Leading pages that are in the tree (as themselves or as a twin).
  [[nodiscard]] std::int32_t num_published_pages() const { return num_published_pages_; }

 private:
  friend class KVPrefixCache;
  void Reset() noexcept;

  Namespace* namespace_backptr_ = nullptr;
  /// Holds this lease's pin. Its edge ends with page num_published_pages_ - 1; the virtual root
  /// when that is -1.
  Node* pinned_node_ = nullptr;
  std::vector<PageId> pages_;
  /// pages_[num_published_pages_ :].
  OwnedPages tail_pages_;
  /// Those of pages_[: num_published_pages_] that the tree has a twin of.
  OwnedPages duplicate_pages_;
  std::int32_t num_cached_tokens_ = 0;
  std::int32_t num_published_pages_ = 0;
};

}  // namespace lora_serve
