#include "kv_prefix_cache/owned_pages.h"

#include <utility>

#include "common/check.h"
#include "kv_prefix_cache/page_pool.h"

namespace lora_serve {

OwnedPages::OwnedPages(PagePool* pool, std::vector<PageId> ids)
    : pool_backptr_(pool), ids_(std::move(ids)) {}

OwnedPages::~OwnedPages() { ReleaseBack(size()); }

OwnedPages::OwnedPages(OwnedPages&& other) noexcept
    : pool_backptr_(std::exchange(other.pool_backptr_, nullptr)),
      ids_(std::exchange(other.ids_, {})) {}

OwnedPages& OwnedPages::operator=(OwnedPages&& other) noexcept {
  if (this != &other) {
    ReleaseBack(size());
    pool_backptr_ = std::exchange(other.pool_backptr_, nullptr);
    ids_ = std::exchange(other.ids_, {});
  }
  return *this;
}

OwnedPages OwnedPages::TakeFront(std::int32_t num_pages) {
  LS_CHECK(num_pages >= 0 && num_pages <= size(), "cannot take ", num_pages, " of ", size(),
           " pages");
  if (num_pages == size()) return std::move(*this);
  const auto cut = ids_.begin() + num_pages;
  OwnedPages front(pool_backptr_, std::vector<PageId>(ids_.begin(), cut));
  ids_.erase(ids_.begin(), cut);
  return front;
}

void OwnedPages::Append(OwnedPages&& other) {
  if (other.IsEmpty()) return;
  LS_CHECK(IsEmpty() || pool_backptr_ == other.pool_backptr_, "pages of two pools cannot be mixed");
  LS_CHECK(this != &other, "pages cannot be appended to themselves");
  if (IsEmpty()) {
    *this = std::move(other);
    return;
  }
  ids_.insert(ids_.end(), other.ids_.begin(), other.ids_.end());
  other.ids_.clear();
}

void OwnedPages::ReleaseBack(std::int32_t num_pages) noexcept {
  LS_FATAL(num_pages >= 0 && num_pages <= size(), "cannot release ", num_pages, " of ", size(),
           " pages");
  if (num_pages == 0) return;
  pool_backptr_->Return(std::span(ids_).last(static_cast<std::size_t>(num_pages)));
  ids_.resize(ids_.size() - static_cast<std::size_t>(num_pages));
}

}  // namespace lora_serve
