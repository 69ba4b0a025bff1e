#include "kv_prefix_cache/lease.h"

#include <utility>

#include "kv_prefix_cache/kv_prefix_cache_impl.h"

namespace lora_serve {

Lease::~Lease() { Reset(); }

Lease::Lease(Lease&& other) noexcept { *this = std::move(other); }

Lease& Lease::operator=(Lease&& other) noexcept {
  if (this == &other) return *this;
  Reset();
  namespace_backptr_ = std::exchange(other.namespace_backptr_, nullptr);
  pinned_node_ = std::exchange(other.pinned_node_, nullptr);
  pages_ = std::exchange(other.pages_, {});
  tail_pages_ = std::move(other.tail_pages_);
  duplicate_pages_ = std::move(other.duplicate_pages_);
  num_cached_tokens_ = std::exchange(other.num_cached_tokens_, 0);
  num_published_pages_ = std::exchange(other.num_published_pages_, 0);
  return *this;
}

void Lease::Reset() noexcept {
  if (namespace_backptr_ == nullptr) return;
  namespace_backptr_->cache_backptr()->ReleaseLease(*this);
  namespace_backptr_ = nullptr;
  pinned_node_ = nullptr;
  pages_.clear();
  num_cached_tokens_ = 0;
  num_published_pages_ = 0;
}

}  // namespace lora_serve
