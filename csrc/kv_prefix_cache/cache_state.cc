#include <utility>

#include "common/check.h"
#include "kv_prefix_cache/kv_prefix_cache_impl.h"

// Recurrent state of leases. A snapshot never changes once it is attached: a request that resumes
// copies it to a working slot of its own first (copy-on-write), and a request that leaves one
// behind copies its working slot to a reserved one.

namespace lora_serve {

std::int64_t KVPrefixCache::Impl::NumAvailableSlots(Tier tier, const Node* kept) const {
  const PagePool* const pool = FindPool(Component::kState, tier);
  if (pool == nullptr) return 0;
  const bool keeps_listed = kept != nullptr && kept->Snapshot(tier).leaf_hook.is_listed();
  return pool->num_free_pages() + SnapshotPolicy(tier).num_listed_pages() - (keeps_listed ? 1 : 0);
}

void KVPrefixCache::Impl::PinResumedSnapshot(Lease& lease, Node& node) {
  lease.state_.resumed_node = &node;
  SnapshotPolicy(Tier::kDevice).Pin(node);
}

void KVPrefixCache::Impl::ReleaseResumedSnapshot(Lease& lease, bool is_used) noexcept {
  Node* const node = std::exchange(lease.state_.resumed_node, nullptr);
  if (node == nullptr) return;
  if (is_used) {
    const Epoch now = Tick();
    for (const Tier tier : kTiers) {
      if (!node->Snapshot(tier).pages.IsEmpty()) Touch(*node, Component::kState, tier, now);
    }
  }
  SnapshotPolicy(Tier::kDevice).Unpin(*node);
}

std::optional<StateSlot> KVPrefixCache::Impl::ReserveSnapshot(Lease& lease,
                                                              std::int32_t num_tokens) {
  const std::int32_t boundary = num_tokens / options_.page_size;
  LS_CHECK(num_tokens % options_.page_size == 0 && boundary >= 1 &&
               boundary >= lease.num_published_pages_ &&
               static_cast<std::size_t>(boundary) <= lease.pages_.size(),
           "a snapshot cannot be taken after ", num_tokens, " tokens: expected whole pages of ",
           options_.page_size, " tokens, from ", lease.num_published_pages_,
           " published pages up to the ", lease.pages_.size(), " pages of the lease");
  LeaseState& state = lease.state_;
  if (!HasState() || !state.reserved_slot.IsEmpty() || lease.namespace_backptr_->IsDraining()) {
    return std::nullopt;
  }
  const bool is_taken = boundary == lease.num_published_pages_ &&
                        !lease.pinned_node_->Snapshot(Tier::kDevice).pages.IsEmpty();
  if (is_taken || NumAvailableSlots(Tier::kDevice, nullptr) == 0) return std::nullopt;
  state.reserved_slot = Allocate(Component::kState, Tier::kDevice, 1);
  state.reserved_page = boundary;
  return StateSlot{state.reserved_slot.ids().front().value()};
}

bool KVPrefixCache::Impl::AttachReservedSnapshot(Lease& lease) {
  LeaseState& state = lease.state_;
  if (state.reserved_slot.IsEmpty() || state.reserved_page > lease.num_published_pages_) {
    return false;
  }
  OwnedPages slot = std::move(state.reserved_slot);
  Node& node = NodeEndingAt(*lease.pinned_node_, state.reserved_page);
  if (!node.Snapshot(Tier::kDevice).pages.IsEmpty()) return false;  // the slot goes back
  GainSnapshot(node, Tier::kDevice, std::move(slot), /*in_flight=*/false);
  Touch(node, Component::kState, Tier::kDevice, Tick());
  state.attached_pages.push_back(state.reserved_page);
  if (std::ssize(state.attached_pages) > options_.max_snapshots_per_lease) {
    DropOldestAttached(lease);
  }
  return true;
}

void KVPrefixCache::Impl::DropOldestAttached(Lease& lease) noexcept {
  std::vector<std::int32_t>& attached = lease.state_.attached_pages;
  Node* const node = FindNodeEndingAt(*lease.pinned_node_, attached.front());
  attached.erase(attached.begin());
  if (node == nullptr) return;  // evicted, and its edge has grown over it since
  const Residency& snapshot = node->Snapshot(Tier::kDevice);
  if (snapshot.num_present() > 0 && snapshot.num_pins == 0) DropSnapshot(*node, Tier::kDevice);
}

}  // namespace lora_serve
