#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "common/strong_id.h"
#include "kv_prefix_cache/tier.h"

// The plain values that go into KVPrefixCache and come out of it.

namespace lora_serve {

/// Pages that `num_tokens` tokens take.
[[nodiscard]] constexpr std::int32_t NumPagesFor(std::int32_t num_tokens, std::int32_t page_size) {
  return num_tokens / page_size + (num_tokens % page_size != 0 ? 1 : 0);
}

/// When device pages are copied to the host tier.
enum class WritePolicy : std::uint8_t {
  /// Never by itself; StartWriteBack still works.
  kOff,
  /// Shortly before they would be evicted (see write_back_watermark_pages).
  kWriteBack,
  /// As soon as they are published.
  kWriteThrough,
};

/// What a match is for.
enum class MatchIntent : std::uint8_t {
  /// A request starts from what others computed. KVPrefixCacheOptions can switch it off.
  kPrefixReuse,
  /// A preempted request takes up what it had computed itself. Always works.
  kRecovery,
};

/// How the model keeps the KV of its sliding-window layers.
enum class WindowLayers : std::uint8_t {
  /// It has none.
  kNone,
  /// In the same pages as full attention, at every position: any boundary can be resumed from.
  kPaged,
  /// In a ring buffer of each running request, which the cache does not hold: at no boundary is the
  /// window known, so nothing can be resumed from.
  kRingBuffer,
};

struct KVPrefixCacheOptions {
  /// Tokens in one page, at least 1.
  std::int32_t page_size = 16;
  /// Pages of the device tier, at least 1.
  std::int32_t num_device_pages = 0;
  /// Pages of the host tier; 0 = there is none.
  std::int32_t num_host_pages = 0;
  WritePolicy write_policy = WritePolicy::kWriteThrough;
  /// kWriteBack: PlanWriteBacks starts copies until this many device pages are free, being written,
  /// or evictable and on the host already; fewer when the host cannot hold so many.
  std::int32_t write_back_watermark_pages = 0;
  /// False: MatchIntent::kPrefixReuse finds nothing.
  bool enable_prefix_reuse = true;
  WindowLayers window_layers = WindowLayers::kNone;
  /// Slots for recurrent state on the device: one for every lease and one for every snapshot there.
  /// 0 = the model has no recurrent state.
  std::int32_t num_device_state_slots = 0;
  /// Slots for snapshots on the host; 0 = snapshots stay on the device. Needs
  /// num_device_state_slots.
  std::int32_t num_host_state_slots = 0;
  /// Snapshots that one lease may leave behind at chunk ends; older ones of it go first. At
  /// least 1.
  std::int32_t max_snapshots_per_lease = 4;
};

struct NamespaceOptions {
  /// Seeds the hash chain of KV events: well-mixed 64 bits, derived from the adapter's name and
  /// content digest. 0 for the base model.
  std::uint64_t digest_seed = 0;
  /// Soft quotas: while the namespace's tree holds more pages of a tier, its own leaves are the
  /// first victims there. Nothing = no quota.
  std::optional<std::int64_t> device_quota_pages = std::nullopt;
  std::optional<std::int64_t> host_quota_pages = std::nullopt;
};

/// What a request could resume from, if it were admitted now. Whole pages only.
struct ProbeResult {
  /// Leading tokens whose pages are on the device, copies completed.
  std::int32_t num_device_tokens = 0;
  /// Tokens right after them whose pages are on the host, copies completed.
  std::int32_t num_host_tokens = 0;
  /// Leading tokens that every component of the model can resume from, of the device's and the
  /// host's: what Acquire would take. 0 when this kind of match is switched off.
  std::int32_t num_resumable_tokens = 0;
  /// Some of those are on their way to the device for somebody else: Acquire would say kInFlight.
  bool is_in_flight = false;
};

struct AcquireOptions {
  MatchIntent intent = MatchIntent::kPrefixReuse;
  /// At most this many tokens are taken from the cache (rounded down to whole pages). A fully
  /// cached prompt still recomputes its last token, so the scheduler passes at most num_tokens - 1.
  std::int32_t max_cached_tokens = 0;
  /// The lease must have room for this many tokens, cached ones included. May be less than the
  /// sequence: a chunked prefill asks for its first chunk.
  std::int32_t num_capacity_tokens = 0;
};

enum class AcquireOutcome : std::uint8_t {
  /// The lease is valid. If it IsLoading(), its pages may be used only after the copy's event.
  kAcquired,
  /// Not enough pages or state slots even after eviction. Nothing has changed.
  kNoRoom,
  /// The wanted pages are being copied to the device for somebody else: try again after that
  /// copy's event. Nothing has changed.
  kInFlight,
};

/// A prefix-match hint of one waiting request, kept by the scheduler between steps.
struct PrefixHint {
  NamespaceId namespace_id;
  /// The request's tokens; must stay alive between calls.
  std::span<const TokenId> tokens;
  /// Of the namespace when the hint was computed; 0 = never. Written by RefreshHints.
  std::uint64_t version = 0;
  /// As ProbeResult::num_resumable_tokens. Written by RefreshHints.
  std::int32_t num_resumable_tokens = 0;
};

// --- Transfers -----------------------------------------------------------------------------------

enum class TransferKind : std::uint8_t {
  kWriteBack,  // device to host
  kLoadBack,   // host to device
};

/// The ids are of the source's and the destination's tier, in that order.
struct PageCopy {
  PageId source;
  PageId destination;
  friend bool operator==(const PageCopy&, const PageCopy&) = default;
};

struct StateCopy {
  StateSlot source;
  StateSlot destination;
  friend bool operator==(const StateCopy&, const StateCopy&) = default;
};

/// A copy between the tiers that the executor shall do. The pairs are final: both ends are pinned
/// until CompleteTransfer or FailTransfer, whatever happens to the tree and to the request.
struct TransferOrder {
  TransferId id;
  TransferKind kind = TransferKind::kWriteBack;
  NamespaceId namespace_id;
  std::vector<PageCopy> pages;
  std::vector<StateCopy> states;
};

// --- Events --------------------------------------------------------------------------------------

enum class KVEventKind : std::uint8_t { kStored, kRemoved };

/// Pages of one namespace that came to a tier or left it, in the order of the sequence.
///
/// A page's hash is a chain over all tokens before it, seeded by the namespace's digest (see
/// ChainHash in event_log.h), so that a router can compute it from a prompt.
struct KVEvent {
  KVEventKind kind = KVEventKind::kStored;
  Tier tier = Tier::kDevice;
  NamespaceId namespace_id;
  /// Hash of the page before the first one; nothing when it is the first of its sequence.
  std::optional<std::uint64_t> parent_hash = std::nullopt;
  std::vector<std::uint64_t> page_hashes;
  /// kStored: num_pages * page_size tokens. kRemoved: empty.
  std::vector<TokenId> token_ids;
};

// --- Statistics ----------------------------------------------------------------------------------

struct NamespaceStats {
  NamespaceId id;
  bool is_draining = false;
  std::int64_t num_handles = 0;
  std::int64_t num_leases = 0;
  std::int64_t num_transfers = 0;
  /// Device pages that the tree owns, leased and in-flight ones included.
  std::int64_t num_tree_pages = 0;
  /// Device pages that leases own: tails not published yet, and duplicates of pages the tree had.
  std::int64_t num_private_pages = 0;
  /// Host pages, all owned by the tree; in-flight ones included.
  std::int64_t num_host_pages = 0;
  std::int64_t num_device_snapshots = 0;
  std::int64_t num_host_snapshots = 0;
  /// Of successful Acquires with kPrefixReuse: tokens taken from the device or the host, and the
  /// other tokens of those sequences.
  std::int64_t num_hit_tokens = 0;
  std::int64_t num_missed_tokens = 0;
  /// Evicted so far; what a drain frees does not count.
  std::int64_t num_evicted_device_pages = 0;
  std::int64_t num_evicted_host_pages = 0;
};

struct CacheStats {
  std::int64_t num_device_pages = 0;
  std::int64_t num_free_pages = 0;
  std::int64_t num_tree_pages = 0;
  std::int64_t num_private_pages = 0;
  std::int64_t num_evicted_pages = 0;
  std::int64_t num_nodes = 0;
  std::int64_t num_host_pages = 0;
  std::int64_t num_free_host_pages = 0;
  std::int64_t num_evicted_host_pages = 0;
  std::int64_t num_device_state_slots = 0;
  std::int64_t num_free_device_state_slots = 0;
  std::int64_t num_host_state_slots = 0;
  std::int64_t num_free_host_state_slots = 0;
  std::int64_t num_transfers = 0;
  /// Device pages that are the source of a write-back: evictable once it has completed.
  std::int64_t num_pages_being_written_back = 0;
};

}  // namespace lora_serve
