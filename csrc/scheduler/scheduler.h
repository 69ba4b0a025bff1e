#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "common/strong_id.h"
#include "kv_prefix_cache/cache_options.h"
#include "scheduler/execution_plan.h"

namespace lora_serve {

struct SchedulerOptions {
  std::int32_t page_size = 16;
  /// At least ceil(max_model_len / page_size), so that any admitted request can run alone to its
  /// end.
  std::int32_t num_device_pages = 0;
  /// Requests that may hold a page-table row at once.
  std::int32_t max_num_seqs = 128;
  /// Tokens of one step, decodes and prefill chunks together. At least max_num_seqs.
  std::int32_t max_num_batched_tokens = 2048;
  std::int32_t max_model_len = 4096;
  /// Distinct adapters among the requests that hold a row or were preempted; the base model is not
  /// counted.
  std::int32_t max_loras = 64;
  /// False: no request starts from another's pages. Preempted requests still recover their own.
  bool enable_prefix_caching = true;
  /// Pages of the host tier; 0 = there is none.
  std::int32_t num_host_pages = 0;
  /// When pages are copied to the host tier. Those of a preempted request are in any case.
  WritePolicy write_policy = WritePolicy::kWriteThrough;
  /// WritePolicy::kWriteBack: device pages to be kept free, or evictable without loss. 0 = what a
  /// step can take, max_num_batched_tokens / page_size + max_num_seqs, but at most a quarter of the
  /// device pages.
  std::int32_t write_back_watermark_pages = 0;
};

struct NewRequest {
  RequestId request_id;
  /// kBaseAdapter = the base model. Never defaulted on the Python side.
  AdapterId adapter_id = kBaseAdapter;
  /// 1 to max_model_len - 1 tokens.
  std::vector<TokenId> prompt_token_ids;
  /// Output tokens, at least 1; prompt + max_tokens <= max_model_len.
  std::int32_t max_tokens = 1;
  /// False when every prompt position must be computed (prompt logprobs).
  bool reuse_prefix = true;
};

struct AdapterOptions {
  /// Seeds the namespace's KV event hashes.
  std::uint64_t digest_seed = 0;
  /// Bytes on the device, for residency decisions.
  std::int64_t size_bytes = 0;
};

enum class AdapterState : std::uint8_t { kRegistered, kLoading, kResident, kDraining };

struct AdapterStats {
  AdapterId adapter_id;
  AdapterState state = AdapterState::kRegistered;
  /// -1 before its load was planned.
  AdapterSlot adapter_slot = kNoAdapterSlot;
  /// Its load failed: it runs nothing, takes nothing, and waits to be drained.
  bool load_failed = false;
  std::int64_t num_waiting_requests = 0;
  /// Requests that hold a page-table row; one aborted inside a plan does until that plan's Advance.
  std::int64_t num_running_requests = 0;
  /// Device pages of its namespace: in the tree, and private to requests.
  std::int64_t num_tree_pages = 0;
  std::int64_t num_private_pages = 0;
  /// Host pages of its namespace.
  std::int64_t num_host_pages = 0;
  /// Prompt tokens of first admissions: found in the cache, and the others.
  std::int64_t num_hit_tokens = 0;
  std::int64_t num_missed_tokens = 0;
};

struct SchedulerStats {
  std::int64_t num_waiting_requests = 0;
  std::int64_t num_running_requests = 0;
  std::int64_t num_preempted_requests =
      0;  // waiting to return; counted in num_waiting_requests too
  std::int64_t num_device_pages = 0;
  std::int64_t num_free_pages = 0;
  std::int64_t num_tree_pages = 0;
  std::int64_t num_private_pages = 0;
  std::int64_t total_preemptions = 0;
  std::int64_t total_evicted_pages = 0;
  std::int64_t total_queried_tokens = 0;   // prompt tokens of requests that started
  std::int64_t total_hit_tokens = 0;       // of these, taken from the cache
  std::int64_t total_host_hit_tokens = 0;  // of these, loaded back from the host
  std::int64_t num_host_pages = 0;
  std::int64_t num_free_host_pages = 0;
  std::int64_t total_evicted_host_pages = 0;
  /// Copies between the tiers that have started and were not reported yet.
  std::int64_t num_transfers = 0;
  /// Ordered by adapter id; the base model (id 0) is always the first.
  std::vector<AdapterStats> adapters;
};

/// Decides what runs next. Single-threaded by contract, deterministic, no callbacks, no clock of
/// its own.
///
/// Owns: the KVPrefixCache, every request's state, adapter slots and residency, page-table rows.
/// Does not know: tensors, names, text, sampling. A step is
///
///     plan = NextPlan(now)   ->  executor runs it  ->  Advance(event of that plan)
///
/// Whatever a plan touches (pages, rows, adapter slots) is reused only after that plan's Advance,
/// and both ends of a copy only after its report.
/// At most one plan is outstanding for now (overlap widens this to two); a second NextPlan throws
/// InternalError.
class Scheduler {
 public:
  /// Throws: InvalidArgumentError naming the option, what was found, expected and what to set.
  explicit Scheduler(const SchedulerOptions& options);
  ~Scheduler();
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  /// Opens a generation: a namespace, and a load in the next plan. Ids are never reused. If the
  /// event reports the load as failed, the generation takes and runs nothing any more; the caller
  /// aborts its requests and drains it.
  /// Throws: InvalidArgumentError when the id was used before, or is not above kBaseAdapter.
  void OpenAdapter(AdapterId adapter_id, const AdapterOptions& options);

  /// Refuses new requests of the generation from now on; those it has, queued and preempted
  /// included, run to their end. Once nothing refers to it, no copy of its pages either, one plan
  /// lists it in `drained_adapter_ids`, loaded or not; its slot is free after that plan's Advance.
  /// Draining twice changes nothing.
  /// Throws: AdapterNotFoundError (unknown, gone, or the base model).
  void DrainAdapter(AdapterId adapter_id);

  /// Queues a request and takes its namespace handle.
  /// Throws: InvalidArgumentError (bad fields, id in use), AdapterNotFoundError (unknown, draining
  /// or failed); then nothing is changed. Every request that passes fits: num_device_pages holds
  /// one of max_model_len.
  void AddRequest(NewRequest request);

  /// Ends a request wherever it is: queued, running, preempted, or inside the outstanding plan
  /// (then its resources come back with Advance, and its sampled token is dropped; its id is free
  /// after that). Returns false when the id is not live, or aborted already: a late abort is
  /// normal.
  bool Abort(RequestId request_id);

  /// Plans one step. The plan stays valid until the next call. Empty when nothing can run (also
  /// because all that could waits for copies); an empty plan takes no Advance.
  /// Requires: every earlier non-empty plan has been advanced; `now_us` never decreases.
  /// Throws: InternalError otherwise.
  [[nodiscard]] const ExecutionPlan& NextPlan(std::int64_t now_us);
  /// The same into the caller's plan, whose arrays' memory is reused: it stays valid as long as the
  /// caller keeps it.
  void NextPlan(std::int64_t now_us, ExecutionPlan& plan);

  /// Takes the result of the outstanding plan: publishes full pages, appends tokens, ends requests.
  /// An event without a plan (kNoPlan) only reports copies, and is taken at any time.
  /// Throws: InvalidArgumentError when the event does not match the plan (ids, lengths, loads), or
  /// reports a copy that is not under way; nothing is changed then.
  void Advance(const ExecutionEvent& event);

  /// True when a request waits or runs, a load or drain is due, or a plan is outstanding. When the
  /// plan is empty nevertheless, everything waits for the reports of copies. Copies that nothing
  /// waits for are not work.
  [[nodiscard]] bool HasWork() const;

  [[nodiscard]] SchedulerStats Stats() const;
  [[nodiscard]] const SchedulerOptions& options() const;

  /// Throws: InternalError naming what is broken, in the scheduler or its cache.
  void CheckInvariants() const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace lora_serve
