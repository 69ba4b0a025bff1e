#include <algorithm>
#include <iterator>
#include <set>
#include <utility>

#include "common/check.h"
#include "scheduler/adapter_table.h"

// Who uses an adapter, what it waits for, and what that puts it in: the lists of AdapterTable.

namespace lora_serve {
namespace {

void TakePlace(Adapter& adapter, std::int64_t step) {
  adapter.is_in_place = true;
  adapter.placed_at_step = step;
}

void GiveUpPlace(Adapter& adapter) {
  adapter.is_in_place = false;
  adapter.is_leaving = false;
  adapter.is_closed = false;
}

}  // namespace

void AdapterTable::MoveRequest(Request& request, RequestList from, RequestList to) {
  Adapter& adapter = request.adapter();
  if (adapter.num_requests() == 0) {
    // It was away: what it did not use then is not saved up.
    adapter.virtual_service = std::max(adapter.virtual_service, virtual_time_);
  }
  CountMove(request, from, to);
  if (from == RequestList::kQueued && to == RequestList::kRunning) {
    if (!adapter.IsBase() && !adapter.is_in_place) {
      BeginTurn(adapter);
    } else if (adapter.num_turn_requests > 0) {
      --adapter.num_turn_requests;
    }
  }
  const bool had_started = from == RequestList::kRunning || from == RequestList::kPreempted;
  if (had_started && !adapter.HasStarted()) {
    GiveUpPlace(adapter);
    adapter.num_turn_requests = 0;
    adapter.last_used = next_use_number_++;
  }
  Relist(adapter);
  CompleteDrainIfUnused(adapter);
}

void AdapterTable::BeginTurn(Adapter& adapter) {
  // What had come by now, as far as rows go when all places share them. The first of it has left
  // the queue already.
  const auto num_places = static_cast<std::int64_t>(placed_.size()) + 1;
  const std::int64_t max_turn = std::max<std::int64_t>(1, max_num_seqs_ / num_places);
  adapter.num_turn_requests = std::min<std::int64_t>(std::ssize(adapter.queue), max_turn - 1);
  TakePlace(adapter, num_steps_);
}

void AdapterTable::EnterPlace(Adapter& adapter) {
  LS_CHECK(adapter.standing == AdapterStanding::kPaused &&
               adapter.load_state == LoadState::kResident && num_free_places() > 0,
           "adapter ", adapter.id, " cannot go on");
  TakePlace(adapter, num_steps_);
  Relist(adapter);
}

void AdapterTable::LeavePlace(Adapter& adapter) {
  LS_CHECK(adapter.is_in_place, "adapter ", adapter.id, " holds no place");
  GiveUpPlace(adapter);
  adapter.left_at_step = num_steps_;
  Relist(adapter);
}

void AdapterTable::CountMove(Request& request, RequestList from, RequestList to) {
  Adapter& adapter = request.adapter();
  const auto count = [&](RequestList list, std::int64_t sign) {
    if (list == RequestList::kPreempted) adapter.num_preempted_requests += sign;
    if (list == RequestList::kRunning) adapter.num_running_requests += sign;
  };
  if (from == RequestList::kQueued) {
    LS_CHECK(adapter.queue.erase(request.seniority()) == 1, "request ", request.id());
  }
  count(from, -1);
  count(to, +1);
  LS_CHECK(adapter.num_preempted_requests >= 0 && adapter.num_running_requests >= 0, "adapter ",
           adapter.id);
  if (to == RequestList::kQueued) adapter.queue.emplace(request.seniority(), &request);
}

void AdapterTable::Charge(Adapter& adapter, std::int32_t num_tokens) {
  adapter.virtual_service += num_tokens * adapter.service_per_token;
  adapter.num_scheduled_tokens += num_tokens;
}

void AdapterTable::AdvanceVirtualTime(const Adapter& adapter) {
  virtual_time_ = std::max(virtual_time_, adapter.virtual_service);
}

AdapterStanding AdapterTable::StandingOf(const Adapter& adapter) {
  if (adapter.IsBase() || adapter.load_state == LoadState::kFailed) return AdapterStanding::kNone;
  if (adapter.is_in_place) return AdapterStanding::kPlaced;
  if (adapter.HasStarted()) return AdapterStanding::kPaused;
  const bool has_queue = !adapter.queue.empty();
  const bool is_kept = adapter.options.is_pinned && !adapter.is_draining;
  if (adapter.HoldsBytes()) {
    if (has_queue) return AdapterStanding::kUnplaced;
    const bool is_idle =
        adapter.load_state == LoadState::kResident && !is_kept && !adapter.is_draining;
    return is_idle ? AdapterStanding::kIdle : AdapterStanding::kNone;
  }
  const bool needs_load =
      adapter.load_state == LoadState::kRegistered && (has_queue || is_kept) && !adapter.is_drained;
  return needs_load ? AdapterStanding::kInLine : AdapterStanding::kNone;
}

AdapterTable::Line* AdapterTable::LineOf(AdapterStanding standing) {
  switch (standing) {
    case AdapterStanding::kInLine:
      return &line_;
    case AdapterStanding::kUnplaced:
      return &unplaced_;
    case AdapterStanding::kPaused:
      return &paused_;
    case AdapterStanding::kNone:
    case AdapterStanding::kIdle:
    case AdapterStanding::kPlaced:
      break;
  }
  return nullptr;
}

void AdapterTable::Relist(Adapter& adapter) {
  const AdapterStanding standing = StandingOf(adapter);
  LineKey key = adapter.line_key;
  if (LineOf(standing) != nullptr) {
    if (LineOf(adapter.standing) == nullptr) {  // it begins to wait
      adapter.waits_since_us = now_us_;
      key.join_number = next_join_number_++;
    }
    const std::int64_t priority =
        adapter.queue.empty() ? 0 : adapter.queue.begin()->second->priority();
    key.virtual_since_us = adapter.waits_since_us + priority * priority_ageing_us_;
    key.must_be_read = !adapter.options.is_staged;
  }
  if (standing == adapter.standing && key == adapter.line_key) return;
  Unlist(adapter);
  adapter.standing = standing;
  adapter.line_key = key;
  List(adapter);
}

void AdapterTable::List(Adapter& adapter) {
  if (Line* const line = LineOf(adapter.standing)) line->emplace(adapter.line_key, &adapter);
  if (adapter.standing == AdapterStanding::kPlaced) placed_.emplace(adapter.id, &adapter);
  if (adapter.standing == AdapterStanding::kIdle) {
    idle_.emplace(adapter.last_used, &adapter);
    num_idle_bytes_ += adapter.options.size_bytes;
  }
}

void AdapterTable::Unlist(const Adapter& adapter) {
  if (Line* const line = LineOf(adapter.standing)) line->erase(adapter.line_key);
  if (adapter.standing == AdapterStanding::kPlaced) placed_.erase(adapter.id);
  if (adapter.standing == AdapterStanding::kIdle) {
    idle_.erase(adapter.last_used);
    num_idle_bytes_ -= adapter.options.size_bytes;
  }
}

// --- Invariants --------------------------------------------------------------------------------

void AdapterTable::CheckInvariants() const {
  std::set<AdapterSlot> slots;
  std::int64_t num_bytes = 0;
  std::int64_t num_domains = 0;
  for (const auto& [id, adapter] : adapters_) {
    num_domains += std::ssize(adapter.domains.by_name);
    if (adapter.IsBase()) continue;
    num_bytes += adapter.HoldsBytes() ? adapter.options.size_bytes : 0;
    LS_CHECK(!adapter.is_in_place ||
                 (adapter.load_state == LoadState::kResident && adapter.HasStarted()),
             "adapter ", id, " holds a place but does not run");
    LS_CHECK(adapter.is_in_place || (!adapter.is_closed && !adapter.is_leaving), "adapter ", id,
             " is closed or leaving but holds no place");
    const bool needs_slot = adapter.load_state == LoadState::kLoading ||
                            adapter.load_state == LoadState::kResident ||
                            adapter.load_state == LoadState::kFailed;
    LS_CHECK(!needs_slot || adapter.slot != kNoAdapterSlot, "adapter ", id, " has no slot");
    if (adapter.slot != kNoAdapterSlot) {
      LS_CHECK(needs_slot || adapter.is_drained, "adapter ", id, " has slot ", adapter.slot);
      LS_CHECK(slots.insert(adapter.slot).second, "two adapters in slot ", adapter.slot);
      LS_CHECK(slot_is_taken_.at(static_cast<std::size_t>(adapter.slot.value())), "slot ",
               adapter.slot, " of adapter ", id, " counts as free");
    }
    const bool waits_for_copies = waiting_for_copies_.contains(id);
    const bool is_in_use =
        adapter.num_requests() > 0 || adapter.load_state == LoadState::kLoading || waits_for_copies;
    LS_CHECK(adapter.is_drained == (adapter.is_draining && !is_in_use), "adapter ", id,
             adapter.is_drained ? " is drained but in use" : " drains but waits for nothing");
    LS_CHECK(!waits_for_copies || (adapter.is_draining && adapter.num_requests() == 0), "adapter ",
             id, " waits for copies too early");
    LS_CHECK(HasNamespace(adapter) ==
                 (!adapter.is_draining || adapter.num_requests() > 0 || waits_for_copies),
             "adapter ", id, " and its namespaces disagree");
  }
  const auto num_taken = std::count(slot_is_taken_.begin(), slot_is_taken_.end(), true);
  LS_CHECK(std::cmp_equal(num_taken, slots.size()), num_taken, " slots taken by ", slots.size(),
           " adapters");
  LS_CHECK(num_bytes == num_bytes_, num_bytes, " bytes in use, counted ", num_bytes_);
  LS_CHECK(num_bytes_ <= max_bytes_, num_bytes_, " bytes in use of ", max_bytes_);
  LS_CHECK(num_domains == num_domains_, num_domains, " domains, counted ", num_domains_);
  LS_CHECK(num_free_places() >= 0, placed_.size(), " places taken, max_loras is ", max_loras_);
  CheckLists();
}

void AdapterTable::CheckLists() const {
  std::size_t num_listed = 0;
  std::int64_t num_idle_bytes = 0;
  std::int64_t num_pinned_bytes = 0;
  for (const auto& [id, adapter] : adapters_) {
    LS_CHECK(adapter.standing == StandingOf(adapter), "adapter ", id, " is in the wrong list");
    num_listed += adapter.standing != AdapterStanding::kNone;
    if (adapter.standing == AdapterStanding::kIdle) num_idle_bytes += adapter.options.size_bytes;
    const bool counts = !adapter.is_drained && adapter.load_state != LoadState::kFailed;
    if (counts && adapter.options.is_pinned) num_pinned_bytes += adapter.options.size_bytes;
  }
  const std::size_t num_in_lists =
      idle_.size() + line_.size() + unplaced_.size() + placed_.size() + paused_.size();
  LS_CHECK(num_in_lists == num_listed, num_in_lists, " adapters listed, expected ", num_listed);
  LS_CHECK(num_idle_bytes == num_idle_bytes_, num_idle_bytes, " idle bytes, counted ",
           num_idle_bytes_);
  LS_CHECK(num_pinned_bytes == num_pinned_bytes_, num_pinned_bytes, " pinned bytes, counted ",
           num_pinned_bytes_);
}

}  // namespace lora_serve
