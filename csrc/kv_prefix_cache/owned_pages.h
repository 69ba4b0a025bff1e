#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "common/strong_id.h"

namespace lora_serve {

class PagePool;

/// The move-only owner of some pages of one pool, in the order of their tokens. Returns them to the
/// pool when it dies.
///
/// Owns: the right to use its pages. Does not know: what the pages hold.
/// A moved-from or default-constructed owner is empty and safe to use.
class OwnedPages {
 public:
  OwnedPages() = default;
  ~OwnedPages();
  OwnedPages(OwnedPages&& other) noexcept;
  /// Returns the pages held so far, then takes over those of `other`.
  OwnedPages& operator=(OwnedPages&& other) noexcept;
  OwnedPages(const OwnedPages&) = delete;
  OwnedPages& operator=(const OwnedPages&) = delete;

  [[nodiscard]] std::span<const PageId> ids() const { return ids_; }
  [[nodiscard]] std::int32_t size() const { return static_cast<std::int32_t>(ids_.size()); }
  [[nodiscard]] bool IsEmpty() const { return ids_.empty(); }

  /// Splits off the first `num_pages` pages; this keeps the others.
  /// Requires: 0 <= num_pages <= size(). Complexity: O(size()).
  [[nodiscard]] OwnedPages TakeFront(std::int32_t num_pages);

  /// Adds the pages of `other` at the end; `other` becomes empty.
  /// Requires: both come from the same pool, or one of them is empty.
  void Append(OwnedPages&& other);

  /// Returns the last `num_pages` pages to the pool.
  /// Requires: 0 <= num_pages <= size().
  void ReleaseBack(std::int32_t num_pages) noexcept;

 private:
  friend class PagePool;
  OwnedPages(PagePool* pool, std::vector<PageId> ids);

  PagePool* pool_backptr_ = nullptr;
  std::vector<PageId> ids_;
};

}  // namespace lora_serve
