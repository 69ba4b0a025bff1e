#pragma once

#include <compare>
#include <cstdint>
#include <map>

#include "common/strong_id.h"
#include "scheduler/adapter_domains.h"
#include "scheduler/request.h"
#include "scheduler/scheduler_options.h"

namespace lora_serve {

/// How far a generation is on its way to the device. Whether it drains is a question of its own: a
/// draining generation with requests still has to be loaded.
enum class LoadState : std::uint8_t {
  kRegistered,
  /// Has its bytes; the next plan loads it.
  kDue,
  kLoading,
  kResident,
  kFailed
};

/// What an adapter waits for or holds; each is one list of AdapterTable.
enum class AdapterStanding : std::uint8_t {
  /// The base; and adapters that need nothing, have failed, or are about to go.
  kNone,
  /// On the device, no requests, not pinned: it may be evicted at any time.
  kIdle,
  /// Not on the device, and requests wait for it or it is pinned.
  kInLine,
  /// On the device or on its way there; requests wait, none has started.
  kUnplaced,
  /// Holds one of the max_loras places: some of its requests run or were preempted.
  kPlaced,
  /// Some of its requests have started, but another one has its place for now. On the device or
  /// not.
  kPaused,
};

/// Whose turn it is to get room; lower goes first.
struct LineKey {
  /// Since when it waits, plus priority * priority_ageing_us of its most senior request.
  std::int64_t virtual_since_us = 0;
  /// Of those that began to wait together, the staged ones go first.
  bool must_be_read = false;
  /// In the order of joining.
  std::int64_t join_number = 0;

  friend constexpr auto operator<=>(const LineKey&, const LineKey&) = default;
};

/// One generation, or the base model (id 0, always resident, slot -1). AdapterTable changes it.
struct Adapter {
  AdapterId id;
  AdapterOptions options;
  /// Of the default domain.
  NamespaceId namespace_id;
  AdapterDomains domains;
  LoadState load_state = LoadState::kRegistered;
  AdapterSlot slot = kNoAdapterSlot;
  bool is_draining = false;
  /// Nothing refers to it any more; it waits for its report or for that plan's return.
  bool is_drained = false;

  /// Its queued requests, the most senior first.
  std::map<Seniority, Request*> queue;
  std::int64_t num_preempted_requests = 0;
  /// Requests that hold a page-table row.
  std::int64_t num_running_requests = 0;

  AdapterStanding standing = AdapterStanding::kNone;
  LineKey line_key;  // meaningful while kInLine, kUnplaced or kPaused
  std::int64_t waits_since_us = 0;
  /// From the first admission of a request to the end of the last started one, but for pauses.
  bool is_in_place = false;
  std::int64_t placed_at_step = 0;
  /// The last step in which it was paused.
  std::int64_t left_at_step = -1;
  /// It is about to be paused: plans have no rows of it any more.
  bool is_leaving = false;
  /// The newest plan with rows of it.
  PlanId last_plan_id{-1};
  std::int64_t last_used = 0;  // order of the ends of use
  /// Takes no newcomers but those of its turn, because another adapter waits for its room.
  bool is_closed = false;
  /// The last step in which a queued request of it lacked nothing but pages.
  std::int64_t lacked_pages_at_step = -1;
  /// Requests that it may still admit while it is closed.
  std::int64_t num_turn_requests = 0;

  /// Tokens scheduled, each as service_per_token; the fair policy admits where it is the least.
  std::int64_t virtual_service = 0;
  std::int64_t service_per_token = 0;

  std::int64_t num_scheduled_tokens = 0;
  std::int64_t num_started_requests = 0;
  std::int64_t total_queue_us = 0;
  std::int64_t num_loads = 0;
  std::int64_t num_evictions = 0;

  [[nodiscard]] bool IsBase() const { return id == kBaseAdapter; }
  /// A preempted request counts, too, so that newer work cannot take its adapter's place.
  [[nodiscard]] bool HasStarted() const {
    return num_running_requests + num_preempted_requests > 0;
  }
  /// True when it is in one of the three lines, and its `line_key` says where.
  [[nodiscard]] bool IsWaiting() const {
    return standing == AdapterStanding::kInLine || standing == AdapterStanding::kUnplaced ||
           standing == AdapterStanding::kPaused;
  }
  /// True when plans may have rows of it.
  [[nodiscard]] bool MayRun() const { return IsBase() || (is_in_place && !is_leaving); }
  [[nodiscard]] std::int64_t num_requests() const {
    return static_cast<std::int64_t>(queue.size()) + num_preempted_requests + num_running_requests;
  }
  /// True when it takes bytes of the device: from the decision to load it to its eviction, failure
  /// or drain.
  [[nodiscard]] bool HoldsBytes() const {
    return load_state == LoadState::kDue || load_state == LoadState::kLoading ||
           load_state == LoadState::kResident;
  }
  /// True when one more of its queued requests may start, as far as places are concerned.
  [[nodiscard]] bool TakesNewcomers() const {
    return !is_leaving && (!is_closed || num_turn_requests > 0);
  }
};

}  // namespace lora_serve
