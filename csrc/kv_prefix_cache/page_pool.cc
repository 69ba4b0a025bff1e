#include "kv_prefix_cache/page_pool.h"

#include <algorithm>

#include "common/check.h"

namespace lora_serve {

PagePool::PagePool(std::int32_t num_pages) {
  LS_CHECK(num_pages >= 1, "a page pool needs at least 1 page, got ", num_pages);
  is_free_.assign(static_cast<std::size_t>(num_pages), 1);
  free_pages_.reserve(is_free_.size());
  for (std::int32_t page = num_pages - 1; page >= 0; --page) free_pages_.emplace_back(page);
}

PagePool::~PagePool() {
  LS_FATAL(free_pages_.size() == is_free_.size(), "a page pool was destroyed while ",
           is_free_.size() - free_pages_.size(), " of its ", is_free_.size(),
           " pages were still out; destroy their owners first");
}

bool PagePool::IsFree(PageId page) const {
  LS_CHECK(page.value() >= 0 && page.value() < num_pages(), "page ", page, " is not one of the ",
           num_pages(), " pages of this pool");
  return is_free_[static_cast<std::size_t>(page.value())] != 0;
}

OwnedPages PagePool::Allocate(std::int32_t num_pages) {
  LS_CHECK(num_pages >= 0 && num_pages <= num_free_pages(), "asked for ", num_pages, " pages, but ",
           num_free_pages(), " are free");
  const auto taken = std::span(free_pages_).last(static_cast<std::size_t>(num_pages));
  std::vector<PageId> ids(taken.rbegin(), taken.rend());
  free_pages_.resize(free_pages_.size() - ids.size());
  for (const PageId page : ids) is_free_[static_cast<std::size_t>(page.value())] = 0;
  return OwnedPages(this, std::move(ids));
}

void PagePool::Return(std::span<const PageId> pages) noexcept {
  for (auto it = pages.rbegin(); it != pages.rend(); ++it) {
    const PageId page = *it;
    LS_FATAL(page.value() >= 0 && page.value() < num_pages(), "page ", page,
             " was returned to a pool of ", num_pages(), " pages");
    std::uint8_t& is_free = is_free_[static_cast<std::size_t>(page.value())];
    LS_FATAL(is_free == 0, "page ", page, " was returned twice");
    is_free = 1;
    free_pages_.push_back(page);
  }
}

void PagePool::CheckInvariants() const {
  std::vector<std::uint8_t> is_listed(is_free_.size(), 0);
  for (const PageId page : free_pages_) {
    LS_CHECK(IsFree(page), "P1: page ", page, " is in the free list but not marked free");
    std::uint8_t& seen = is_listed[static_cast<std::size_t>(page.value())];
    LS_CHECK(seen == 0, "P1: page ", page, " is in the free list twice");
    seen = 1;
  }
  LS_CHECK(is_listed == is_free_, "P1: a page is marked free but not in the free list");
}

}  // namespace lora_serve
