#include "kv_prefix_cache/namespace.h"

#include <algorithm>

#include "common/check.h"

namespace lora_serve {

Namespace::Namespace(NamespaceId id, const NamespaceOptions& options, std::int32_t page_size,
                     NodeSequencer* sequencer, KVPrefixCache::Impl* cache)
    : id_(id),
      digest_seed_(options.digest_seed),
      cache_backptr_(cache),
      quota_pages_{options.device_quota_pages, options.host_quota_pages},
      tree_(page_size, sequencer, this) {}

Namespace::~Namespace() {
  LS_FATAL(num_handles_ == 0 && num_leases_ == 0 && num_transfers_ == 0, "namespace ", id_,
           " was destroyed while ", num_handles_, " handles, ", num_leases_, " leases and ",
           num_transfers_, " transfers still point to it; destroy them before the cache");
  for (const auto& tiers : leaf_lists_) {
    for (const auto& lists : tiers) {
      for (const LeafList& list : lists) {
        LS_FATAL(list.IsEmpty(), "namespace ", id_, " was destroyed while eviction still lists it");
      }
    }
  }
}

void Namespace::StartDraining() {
  LS_CHECK(id_ != kBaseNamespace, "the base namespace cannot drain");
  state_ = NamespaceState::kDraining;
}

void Namespace::RemoveHandle() noexcept {
  LS_FATAL(num_handles_ > 0, "namespace ", id_, " has no handle to give back");
  --num_handles_;
}

void Namespace::RemoveLease() noexcept {
  LS_FATAL(num_leases_ > 0, "namespace ", id_, " has no lease to give back");
  --num_leases_;
}

void Namespace::RemoveTransfer() noexcept {
  LS_FATAL(num_transfers_ > 0, "namespace ", id_, " has no transfer to end");
  --num_transfers_;
}

std::int64_t Namespace::NumPagesOverQuota(Tier tier) const {
  const std::optional<std::int64_t>& quota = quota_pages_[IndexOf(tier)];
  if (!quota.has_value()) return 0;
  return std::max<std::int64_t>(0, counts_.tree_pages[IndexOf(tier)] - *quota);
}

NamespaceStats Namespace::Stats() const {
  constexpr std::size_t kDevice = IndexOf(Tier::kDevice);
  constexpr std::size_t kHost = IndexOf(Tier::kHost);
  return {.id = id_,
          .is_draining = IsDraining(),
          .num_handles = num_handles_,
          .num_leases = num_leases_,
          .num_transfers = num_transfers_,
          .num_tree_pages = counts_.tree_pages[kDevice],
          .num_private_pages = counts_.private_pages,
          .num_host_pages = counts_.tree_pages[kHost],
          .num_device_snapshots = counts_.snapshots[kDevice],
          .num_host_snapshots = counts_.snapshots[kHost],
          .num_hit_tokens = counts_.hit_tokens,
          .num_missed_tokens = counts_.missed_tokens,
          .num_evicted_device_pages = counts_.evicted_pages[kDevice],
          .num_evicted_host_pages = counts_.evicted_pages[kHost]};
}

}  // namespace lora_serve
