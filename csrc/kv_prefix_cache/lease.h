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
struct Transfer;

/// The recurrent state of a lease, for models that have one.
struct LeaseState {
  /// The slot that the model reads and writes; a page pool's page used as a slot. Empty for models
  /// without recurrent state.
  OwnedPages working_slot;
  /// Holds the snapshot that the lease resumes from, pinned until the first Publish; null when it
  /// starts from nothing.
  Node* resumed_node = nullptr;
  /// Reserved for the state after `reserved_page` pages; attached to the tree by Publish.
  OwnedPages reserved_slot;
  std::int32_t reserved_page = 0;
  /// Boundaries, in pages, at which this lease attached snapshots, oldest first.
  std::vector<std::int32_t> attached_pages;
};

/// A request's right to use pages: one pin in the tree, and the private pages behind it.
///
///     logical pages:  [0 ........ num_published_pages) [num_published_pages .... pages().size())
///     who owns them:  the tree, protected by the pin,  this lease: not published yet, computed
///                     or this lease where the tree     or still to be computed
///                     already had a twin
///
/// While it IsLoading(), pages [.. num_published_pages) are being copied from the host.
/// Move-only; the destructor gives everything back: private pages to the pool, the pin to the tree.
/// A copy that is still under way goes on without it.
class Lease {
 public:
  Lease() = default;
  ~Lease();
  Lease(Lease&& other) noexcept;
  Lease& operator=(Lease&& other) noexcept;
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;

  [[nodiscard]] explicit operator bool() const { return namespace_backptr_ != nullptr; }
  /// Device page ids in the order of the sequence. Entries never change while the lease lives; new
  /// ones are added at the end. Only a failed load-back takes the loaded ones and all behind away.
  [[nodiscard]] std::span<const PageId> pages() const { return pages_; }
  /// Tokens that Acquire took from the cache; after a failed load-back, those that were on the
  /// device already (and for models with recurrent state: 0, the state is lost).
  [[nodiscard]] std::int32_t num_cached_tokens() const { return num_cached_tokens_; }
  /// Of these, tokens whose pages Acquire found on the host.
  [[nodiscard]] std::int32_t num_host_cached_tokens() const { return num_host_cached_tokens_; }
  /// Leading pages that are in the tree (as themselves or as a twin).
  [[nodiscard]] std::int32_t num_published_pages() const { return num_published_pages_; }

  /// True from Acquire to the event of the load-back that it started.
  [[nodiscard]] bool IsLoading() const { return loading_ != nullptr; }
  /// That transfer; kNoTransfer when it is not loading.
  [[nodiscard]] TransferId load_back_id() const;

  /// The slot of the request's own recurrent state; kNoStateSlot for models without.
  [[nodiscard]] StateSlot state_slot() const;
  /// The snapshot to be copied to state_slot() before the first step; kNoStateSlot when the request
  /// starts from nothing, and after the first Publish. The snapshot itself never changes.
  [[nodiscard]] StateSlot resumed_snapshot() const;
  /// A boundary behind the cached tokens at which other sequences left this one's path, in tokens:
  /// worth a snapshot. 0 = none.
  [[nodiscard]] std::int32_t branching_tokens() const { return branching_tokens_; }

 private:
  friend class KVPrefixCache;
  void Reset() noexcept;

  Namespace* namespace_backptr_ = nullptr;
  /// Holds this lease's pin on the device. Its edge ends with page num_published_pages_ - 1; the
  /// virtual root when that is -1.
  Node* pinned_node_ = nullptr;
  std::vector<PageId> pages_;
  /// pages_[num_published_pages_ :].
  OwnedPages tail_pages_;
  /// Those of pages_[: num_published_pages_] that the tree has a twin of.
  OwnedPages duplicate_pages_;
  std::int32_t num_cached_tokens_ = 0;
  std::int32_t num_host_cached_tokens_ = 0;
  std::int32_t num_published_pages_ = 0;
  std::int32_t branching_tokens_ = 0;
  LeaseState state_;
  /// The load-back that fills the last of the published pages; it points back to this lease.
  Transfer* loading_ = nullptr;
};

}  // namespace lora_serve
