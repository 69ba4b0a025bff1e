#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "common/strong_id.h"
#include "kv_prefix_cache/cache_options.h"
#include "scheduler/execution_plan.h"
#include "scheduler/scheduler_options.h"
#include "scheduler/scheduler_stats.h"

namespace lora_serve {

/// A KVEvent, and whose pages it is about.
struct AdapterKVEvent {
  /// Of every kStored; nothing when the generation has been drained and forgotten since.
  std::optional<AdapterId> adapter_id;
  /// Of an isolation domain of its own: requests of other domains cannot use these pages. False
  /// where `adapter_id` is nothing.
  bool is_private = false;
  KVEvent event;
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
///
/// Overlap: the caller may ask for one more plan while one is outstanding, and events return in the
/// order of the plans. The later plan counts on everything that the earlier one will compute; the
/// input token of a row may be one that only the executor knows yet. That a request ends (stop
/// token, abort) may become known when a later plan has a row of it: that row still runs, and what
/// it gives is dropped. Asking for the next plan only when none is outstanding switches overlap
/// off; both ways give the same tokens.
class Scheduler {
 public:
  /// Throws: InvalidArgumentError naming the option, what was found, expected and what to set.
  explicit Scheduler(const SchedulerOptions& options);
  ~Scheduler();
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  /// Opens a generation with a namespace of its own. Ids only grow. Returns true when there is room
  /// for it without taking another off the device: then the next plan loads it. Otherwise it is
  /// loaded when requests wait for it, or when it is pinned. A load that fails ends the generation:
  /// it takes and runs nothing any more; the caller aborts its requests and drains it.
  /// Throws: InvalidArgumentError when the id is not above kBaseAdapter and every id opened before,
  /// or a field is out of range; CapacityError when it can never fit beside the pinned ones.
  bool OpenAdapter(AdapterId adapter_id, const AdapterOptions& options);

  /// Pins a generation to the device, or ends that.
  /// Throws: AdapterNotFoundError (unknown, draining, failed, the base model); CapacityError when
  /// with it the pinned ones take so much that another open one could never run.
  void SetAdapterPinned(AdapterId adapter_id, bool is_pinned);
  /// Says whether the weights lie in host memory, ready to be copied. Then a load takes effect with
  /// its plan, behind the rows of earlier plans: the rows of the same plan may use it, and the
  /// event of that plan reports it. If it fails, the tokens of these rows mean nothing; the caller
  /// aborts their requests before the event.
  /// Throws: AdapterNotFoundError (unknown).
  void SetAdapterStaged(AdapterId adapter_id, bool is_staged);
  /// The generations to read into host memory next, the first in front: of those in line, the ones
  /// that the next four rounds of loads (of max_loading_adapters each) bring to the device, as far
  /// as it holds them all at once, less those that are staged.
  /// Complexity: O(max_loading_adapters), when paused ones go first O(paused).
  [[nodiscard]] std::vector<AdapterId> AdaptersToStage() const;
  /// Those of `adapter_ids` that wait for bytes or a place, whose turn comes first in front: the
  /// order in which host memory should keep them. Unknown ids are left out.
  /// Complexity: O(n log adapters) for n ids.
  [[nodiscard]] std::vector<AdapterId> WaitingAdapters(
      std::span<const AdapterId> adapter_ids) const;
  /// Throws: AdapterNotFoundError (unknown, draining); InvalidArgumentError (out of range).
  void SetAdapterWeight(AdapterId adapter_id, double weight);

  /// Refuses new requests of the generation from now on; those it has, queued and preempted
  /// included, run to their end. Once nothing refers to it, no copy of its pages either, one plan
  /// lists it in `drained_adapter_ids`, loaded or not; its slot is free after that plan's Advance.
  /// Draining twice changes nothing.
  /// Throws: AdapterNotFoundError (unknown, gone, or the base model).
  void DrainAdapter(AdapterId adapter_id);

  /// Queues a request and takes its namespace handle.
  /// Throws: InvalidArgumentError (bad fields, id in use), AdapterNotFoundError (unknown, draining
  /// or failed), CapacityError (a limit on what waits is reached); then nothing is changed. Every
  /// request that passes fits: num_device_pages holds one of max_model_len.
  void AddRequest(NewRequest request);
  /// Queues all of them, in their order, or none: they count together against the limits. Throws as
  /// AddRequest; when a limit refuses them, each counts as rejected.
  void AddRequests(std::vector<NewRequest> requests);

  /// Ends a request wherever it is: queued, running, preempted, or inside an outstanding plan
  /// (then its resources come back with the Advance of the last plan that has a row of it, and what
  /// is sampled for it is dropped; its id is free after that). Returns false when the id is not
  /// live, or has ended already: a late abort is normal.
  bool Abort(RequestId request_id);

  /// Plans one step. The plan stays valid until the next call. Empty when nothing can run now (all
  /// that could may wait for outstanding plans, loads or copies); an empty plan takes no Advance,
  /// but may list requests that expired.
  /// Requires: at most one non-empty plan has not been advanced; `now_us` never decreases.
  /// Throws: InternalError otherwise.
  [[nodiscard]] const ExecutionPlan& NextPlan(std::int64_t now_us);
  /// The same into the caller's plan, whose arrays' memory is reused: it stays valid as long as the
  /// caller keeps it.
  void NextPlan(std::int64_t now_us, ExecutionPlan& plan);

  /// Takes the result of the oldest outstanding plan: publishes full pages, appends tokens, ends
  /// requests. An event without a plan (kNoPlan) only reports loads and copies, and is taken at any
  /// time.
  /// Throws: InvalidArgumentError when the event does not match the plan (id, lengths), or reports
  /// a load or copy that is not under way; nothing is changed then.
  void Advance(const ExecutionEvent& event);

  /// True when a request waits or runs, a load or drain is due, or a plan is outstanding. When the
  /// plan is empty nevertheless and none is outstanding, everything waits for the reports of loads
  /// and copies. Those that nothing waits for are not work.
  [[nodiscard]] bool HasWork() const;

  /// From now on the cache notes which pages come to a tier and leave it, for TakeEvents, starting
  /// with all that it holds. Switching off forgets what was not taken. Costs nothing while off.
  void SetEventsEnabled(bool is_enabled);
  /// The events since the last call, in order: all of the plans and calls before, if it is called
  /// after each Advance. Complexity: O(events log adapters).
  [[nodiscard]] std::vector<AdapterKVEvent> TakeEvents();

  /// Complexity: O(1).
  [[nodiscard]] SchedulerCounters Counters() const;
  /// Complexity: O(adapters).
  [[nodiscard]] SchedulerStats Stats() const;
  [[nodiscard]] const SchedulerOptions& options() const;

  /// Throws: InternalError naming what is broken, in the scheduler or its cache.
  void CheckInvariants() const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace lora_serve
