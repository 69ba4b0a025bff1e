#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "common/strong_id.h"
#include "kv_prefix_cache/owned_pages.h"

namespace lora_serve {

/// The pages of one tier: which are free, and nothing else.
///
/// Owns: the free list. Does not know: who holds a page (OwnedPages says so), tokens, trees,
/// leases. Invariant: every page is either in the free list, once, or in exactly one OwnedPages.
/// The last page returned is the first to be handed out again, so that two pools fed the same calls
/// hand out the same pages. Outlives every OwnedPages that it hands out.
class PagePool {
 public:
  /// Requires: num_pages >= 1. Page 0 is handed out first.
  explicit PagePool(std::int32_t num_pages);
  /// Fatal when pages are still out.
  ~PagePool();
  PagePool(const PagePool&) = delete;
  PagePool& operator=(const PagePool&) = delete;

  [[nodiscard]] std::int32_t num_pages() const {
    return static_cast<std::int32_t>(is_free_.size());
  }
  [[nodiscard]] std::int32_t num_free_pages() const {
    return static_cast<std::int32_t>(free_pages_.size());
  }
  /// The last one is handed out next.
  [[nodiscard]] std::span<const PageId> free_pages() const { return free_pages_; }
  /// Requires: `page` is one of this pool.
  [[nodiscard]] bool IsFree(PageId page) const;

  /// Requires: 0 <= num_pages <= num_free_pages().
  /// Complexity: O(num_pages).
  [[nodiscard]] OwnedPages Allocate(std::int32_t num_pages);

  /// Throws: InternalError when the free list and the free marks disagree.
  void CheckInvariants() const;

 private:
  friend class OwnedPages;
  /// Fatal when a page is foreign or free already.
  void Return(std::span<const PageId> pages) noexcept;

  /// A stack: the back is handed out next. It has capacity for all pages: Return never allocates.
  std::vector<PageId> free_pages_;
  std::vector<std::uint8_t> is_free_;
};

}  // namespace lora_serve
