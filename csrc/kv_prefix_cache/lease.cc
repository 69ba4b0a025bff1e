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
  num_host_cached_tokens_ = std::exchange(other.num_host_cached_tokens_, 0);
  num_published_pages_ = std::exchange(other.num_published_pages_, 0);
  branching_tokens_ = std::exchange(other.branching_tokens_, 0);
  state_ = std::exchange(other.state_, {});
  loading_ = std::exchange(other.loading_, nullptr);
  if (loading_ != nullptr) loading_->lease = this;
  return *this;
}

void Lease::Reset() noexcept {
  if (namespace_backptr_ == nullptr) return;
  namespace_backptr_->cache_backptr()->ReleaseLease(*this);
  namespace_backptr_ = nullptr;
  pinned_node_ = nullptr;
  pages_.clear();
  num_cached_tokens_ = 0;
  num_host_cached_tokens_ = 0;
  num_published_pages_ = 0;
  branching_tokens_ = 0;
  state_ = {};
  loading_ = nullptr;
}

TransferId Lease::load_back_id() const { return loading_ == nullptr ? kNoTransfer : loading_->id; }

StateSlot Lease::state_slot() const {
  if (state_.working_slot.IsEmpty()) return kNoStateSlot;
  return StateSlot{state_.working_slot.ids().front().value()};
}

StateSlot Lease::resumed_snapshot() const {
  if (state_.resumed_node == nullptr) return kNoStateSlot;
  return StateSlot{state_.resumed_node->Snapshot(Tier::kDevice).pages.ids().front().value()};
}

}  // namespace lora_serve
