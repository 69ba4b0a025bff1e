#include "kv_prefix_cache/namespace.h"

#include "common/check.h"

namespace lora_serve {

Namespace::Namespace(NamespaceId id, const NamespaceOptions& options, std::int32_t page_size,
                     NodeSequencer* sequencer, KVPrefixCache::Impl* cache)
    : id_(id),
      digest_seed_(options.digest_seed),
      cache_backptr_(cache),
      tree_(page_size, sequencer, this) {}

Namespace::~Namespace() {
  LS_FATAL(num_handles_ == 0 && num_leases_ == 0, "namespace ", id_, " was destroyed while ",
           num_handles_, " handles and ", num_leases_,
           " leases still point to it; destroy them before the cache");
  for (const LeafList& list : leaf_lists_) {
    LS_FATAL(list.IsEmpty(), "namespace ", id_, " was destroyed while eviction still lists it");
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

NamespaceStats Namespace::Stats() const {
  return {.id = id_,
          .is_draining = IsDraining(),
          .num_handles = num_handles_,
          .num_leases = num_leases_,
          .num_tree_pages = num_tree_pages_,
          .num_private_pages = num_private_pages_};
}

}  // namespace lora_serve
