#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "scheduler/adapter_table.h"
#include "scheduler/request_table.h"
#include "scheduler/scheduler_options.h"

namespace lora_serve {

/// Decides which adapters are brought to the device, which leave it, who of those that have started
/// pauses, and who is closed to newcomers, so that each that waits gets room. The policy in prose:
/// README.md.
///
/// Owns: counters, and who is leaving or closed; it borrows the adapters and the requests. Does not
/// know: rows, pages, plans, who of an adapter's requests goes first.
class AdapterResidency {
 public:
  /// `adapters` and `requests` must outlive it.
  AdapterResidency(const SchedulerOptions& options, AdapterTable* adapters,
                   const RequestTable* requests)
      : max_loading_(options.max_loading_adapters),
        patience_us_(options.adapter_patience_us),
        pause_us_(options.adapter_pause_us),
        time_slice_steps_(options.adapter_time_slice_steps),
        adapters_backptr_(adapters),
        requests_backptr_(requests) {}

  struct Now {
    std::int64_t now_us = 0;
    PlanId newest_ended_plan{-1};
    /// Page-table rows: without one a new adapter could not start.
    std::int32_t num_free_rows = 0;
    /// A plan was empty although nothing was under way, and none has had rows since.
    bool is_stuck = false;
    /// Plans, loads or copies have not returned.
    bool is_under_way = false;
  };
  struct Changes {
    std::vector<AdapterId> evicted;
    std::vector<const Adapter*> loads;
    /// Resident adapters without started requests, in the order in which they may take the places
    /// that are free.
    std::vector<Adapter*> newcomers;
  };
  /// Makes the changes of one step, in the tables. To be carried out in this order: evictions, then
  /// loads. Complexity: O(loads + evictions + places + adapters without bytes that wait); while
  /// somebody lacks room, also O(running requests).
  [[nodiscard]] Changes Plan(const Now& now);

  /// See Scheduler::AdaptersToStage.
  [[nodiscard]] std::vector<AdapterId> ToStage() const;
  /// See Scheduler::WaitingAdapters.
  [[nodiscard]] std::vector<AdapterId> Waiting(std::span<const AdapterId> ids) const;

  [[nodiscard]] std::int64_t num_closings() const { return num_closings_; }
  [[nodiscard]] std::int64_t num_pauses() const { return num_pauses_; }

 private:
  /// What is to be had, or short where it is negative, as those in line are gone through.
  struct Room {
    std::int64_t num_places = 0;
    std::int64_t num_bytes = 0;
    [[nodiscard]] bool IsShort() const { return num_places < 0 || num_bytes < 0; }
  };
  /// An adapter in place and the steps until the last of its started requests ends.
  struct Holder {
    Adapter* adapter_backptr = nullptr;
    std::int64_t num_remaining_steps = 0;
  };

  // --- Giving the room that there is ------------------------------------------------------------
  void Serve(Changes& changes);
  void StartLoads(std::vector<AdapterId>& evicted);
  /// The first in line that has no bytes and may load; nullptr when there is none.
  [[nodiscard]] Adapter* FirstWithoutBytes() const;
  /// Evicts until `needy` fits. False, and nothing is changed, when not even that makes room.
  bool MakeRoom(const Adapter& needy, std::vector<AdapterId>& evicted);
  /// Lets paused adapters go on for which a place is left by those in front of them, and lists the
  /// newcomers.
  void GivePlaces(std::vector<Adapter*>& newcomers);
  /// Those that have no bytes, at most so many, in the order in which they get them.
  [[nodiscard]] std::vector<const Adapter*> FrontOfLine(std::size_t max_adapters) const;

  // --- Taking it from others -------------------------------------------------------------------
  /// Pauses those that were told to leave, once no plan touches them. True when one has.
  bool FinishLeaving(PlanId newest_ended_plan);
  /// Tells holders to leave, or closes them, for those whose room lacks.
  void TakeForThoseInNeed(const Now& now);
  /// True when an adapter whose time slice is over may be paused for this one.
  [[nodiscard]] bool MayEndSlicesFor(const Adapter& needy, const Now& now) const;
  /// Several times more adapters wait than have room: then turns, which keep the batches large, do
  /// more for all than time slices, and those that have started end first.
  [[nodiscard]] bool IsCrowded() const;
  /// Steps. Few that wait are served at once; a crowd must not spend the places on swapping.
  [[nodiscard]] std::int64_t TimeSlice() const;
  /// Paused adapters go before new ones, where many wait.
  [[nodiscard]] bool StartedComeFirst() const;
  /// False for one that comes behind others now, in being read as in getting room.
  [[nodiscard]] bool GoesFirst(const Adapter& adapter) const;
  /// True for one whose requests hold pages that all others may lack, when nothing moves.
  [[nodiscard]] bool IsUrgent(const Adapter& adapter) const;
  /// False when it must leave room to those that go first.
  [[nodiscard]] bool MayTakeRoom(const Adapter& adapter) const;
  /// Takes one holder out of the list and adds its room. False when none is fit. Who has nothing
  /// but preempted requests gives way to a paused one at any time, but for its first step.
  bool PauseOne(std::vector<Holder>& holders, Room& room, const Adapter& needy,
                bool may_end_slices);
  bool CloseOne(std::vector<Holder>& holders, Room& room);
  void AddRoomOf(const Adapter& holder, Room& room) const;
  /// Ordered by remaining steps, the most first.
  [[nodiscard]] std::vector<Holder> ListHolders() const;

  const std::int32_t max_loading_;
  const std::int64_t patience_us_;
  const std::int64_t pause_us_;
  const std::int32_t time_slice_steps_;
  AdapterTable* adapters_backptr_;
  const RequestTable* requests_backptr_;
  // In this step.
  std::int64_t num_holders_ = 1;
  std::int64_t num_waiting_ = 0;
  /// Nothing runs, and nothing is under way that will change that, but paused requests hold pages
  /// that all others may lack: only they are served.
  bool is_stalled_ = false;
  /// Of the paused ones that go first, none could use room now: nobody holds others back.
  bool are_first_on_disk_ = false;
  std::vector<Adapter*> closed_;   // by the last step
  std::vector<Adapter*> leaving_;  // told by the last step
  std::int64_t num_closings_ = 0;
  std::int64_t num_pauses_ = 0;
};

}  // namespace lora_serve
