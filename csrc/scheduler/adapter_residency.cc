#include "scheduler/adapter_residency.h"

#include <algorithm>
#include <array>
#include <iterator>
#include <map>
#include <utility>

namespace lora_serve {
namespace {

using Line = AdapterTable::Line;

/// Measured with the simulator: with fewer, saturated traffic is served as well, but short
/// crowds cost those who wait; with more, the batches of saturated traffic shrink.
constexpr std::int64_t kCrowdedFactor = 3;

/// Rounds of loads that are read ahead. A place in host memory that is taken early is lost to
/// adapters whose next request comes soon.
constexpr std::size_t kRoundsAhead = 4;

/// Several lines as one, in their common order.
template <std::size_t kNumLines>
class MergedLines {
 public:
  explicit MergedLines(const std::array<const Line*, kNumLines>& lines) : lines_(lines) {
    for (std::size_t index = 0; index < kNumLines; ++index) next_[index] = lines[index]->begin();
  }
  /// Nullptr after the last. Requires: the lines do not change meanwhile.
  [[nodiscard]] Adapter* Next() {
    std::size_t first = kNumLines;
    for (std::size_t index = 0; index < kNumLines; ++index) {
      if (next_[index] == lines_[index]->end()) continue;
      if (first == kNumLines || next_[index]->first < next_[first]->first) first = index;
    }
    return first == kNumLines ? nullptr : (next_[first]++)->second;
  }

 private:
  std::array<const Line*, kNumLines> lines_;
  std::array<Line::const_iterator, kNumLines> next_;
};

}  // namespace

AdapterResidency::Changes AdapterResidency::Plan(const Now& now) {
  Changes changes;
  // Before anybody leaves: it is about the places that there are to share.
  num_holders_ = std::max<std::int64_t>(1, std::ssize(adapters_backptr_->placed()));
  num_waiting_ = adapters_backptr_->num_waiting();
  const Line& paused = adapters_backptr_->paused();
  is_stalled_ =
      now.is_stuck && !now.is_under_way && std::ranges::any_of(paused, [](const auto& entry) {
        return entry.second->num_running_requests > 0;
      });
  are_first_on_disk_ = !paused.empty() && std::ranges::none_of(paused, [&](const auto& entry) {
    return GoesFirst(*entry.second) && !adapters_backptr_->IsToBeRead(*entry.second);
  });
  FinishLeaving(now.newest_ended_plan);
  Serve(changes);
  TakeForThoseInNeed(now);
  // Without an outstanding plan the room is there at once. But what a plan loads it does not evict.
  if (FinishLeaving(now.newest_ended_plan) && changes.loads.empty()) Serve(changes);
  return changes;
}

// --- Giving the room that there is ---------------------------------------------------------------

void AdapterResidency::Serve(Changes& changes) {
  GivePlaces(changes.newcomers);  // first: who is back goes on before those in front evict it again
  StartLoads(changes.evicted);
  const std::vector<const Adapter*> loads = adapters_backptr_->TakeDue();
  changes.loads.insert(changes.loads.end(), loads.begin(), loads.end());
  GivePlaces(changes.newcomers);
}

void AdapterResidency::StartLoads(std::vector<AdapterId>& evicted) {
  while (adapters_backptr_->num_loading() + adapters_backptr_->num_due() < max_loading_) {
    Adapter* needy = FirstWithoutBytes();
    // One that this plan has evicted comes back with a later one. And nobody behind the first takes
    // the room that comes together for it.
    if (needy == nullptr || std::ranges::find(evicted, needy->id) != evicted.end() ||
        !MakeRoom(*needy, evicted)) {
      return;
    }
    adapters_backptr_->ReserveBytes(*needy);
  }
}

Adapter* AdapterResidency::FirstWithoutBytes() const {
  MergedLines<2> lines({&adapters_backptr_->line(), &adapters_backptr_->paused()});
  Adapter* needy = lines.Next();
  while (needy != nullptr &&
         (needy->HoldsBytes() || adapters_backptr_->IsToBeRead(*needy) || !MayTakeRoom(*needy))) {
    needy = lines.Next();
  }
  return needy;
}

bool AdapterResidency::MakeRoom(const Adapter& needy, std::vector<AdapterId>& evicted) {
  AdapterTable& adapters = *adapters_backptr_;
  const std::int64_t size = needy.options.size_bytes;
  if (size <= adapters.NumFreeBytes()) return true;
  // Who waits behind it himself may have to give way, those at the end first.
  std::int64_t num_obtainable = adapters.NumFreeBytes() + adapters.num_idle_bytes();
  std::vector<Adapter*> behind;
  if (size > num_obtainable) {
    MergedLines<2> lines({&adapters.unplaced(), &adapters.paused()});
    while (Adapter* other = lines.Next()) {
      if (other->load_state == LoadState::kResident && !other->options.is_pinned &&
          (IsUrgent(needy) || needy.line_key < other->line_key)) {
        behind.push_back(other);
      }
    }
    std::size_t first = behind.size();
    while (size > num_obtainable && first > 0) {
      num_obtainable += behind[--first]->options.size_bytes;
    }
    if (size > num_obtainable) return false;
  }
  while (size > adapters.NumFreeBytes()) {
    Adapter* victim = nullptr;
    if (!adapters.idle().empty()) {
      victim = adapters.idle().begin()->second;
    } else {
      victim = behind.back();
      behind.pop_back();
    }
    evicted.push_back(victim->id);
    adapters.Evict(*victim);
  }
  return true;
}

void AdapterResidency::GivePlaces(std::vector<Adapter*>& newcomers) {
  AdapterTable& adapters = *adapters_backptr_;
  newcomers.clear();
  std::vector<Adapter*> candidates;
  MergedLines<2> lines({&adapters.unplaced(), &adapters.paused()});
  while (Adapter* adapter = lines.Next()) {
    // Who was paused in this step was so for somebody else.
    const bool has_just_left = adapter->left_at_step == adapters.num_steps();
    if (adapter->load_state == LoadState::kResident && !has_just_left) {
      candidates.push_back(adapter);
    }
  }
  if (StartedComeFirst()) std::ranges::stable_partition(candidates, &Adapter::HasStarted);
  std::int32_t num_places = adapters.num_free_places();
  for (Adapter* adapter : candidates) {
    if (is_stalled_ && !MayTakeRoom(*adapter)) continue;  // the places are for those alone, too
    --num_places;
    if (!adapter->HasStarted()) {
      newcomers.push_back(adapter);
    } else if (num_places >= 0) {
      adapters.EnterPlace(*adapter);
    }
  }
}

// --- What comes next -----------------------------------------------------------------------------

std::vector<const Adapter*> AdapterResidency::FrontOfLine(std::size_t max_adapters) const {
  std::vector<const Adapter*> front;
  const auto add_from = [&](auto lines, bool goes_first) {
    while (const Adapter* adapter = front.size() < max_adapters ? lines.Next() : nullptr) {
      if (!adapter->HoldsBytes() && GoesFirst(*adapter) == goes_first) {
        front.push_back(adapter);
      }
    }
  };
  const Line& line = adapters_backptr_->line();
  const Line& paused = adapters_backptr_->paused();
  if (!is_stalled_ && !StartedComeFirst()) {
    add_from(MergedLines<2>({&line, &paused}), true);
  } else {
    add_from(MergedLines<1>({&paused}), true);
    add_from(MergedLines<2>({&line, &paused}), false);
  }
  return front;
}

std::vector<AdapterId> AdapterResidency::ToStage() const {
  const std::size_t max_adapters = kRoundsAhead * static_cast<std::size_t>(max_loading_);
  std::int64_t num_bytes = adapters_backptr_->NumFreeBytes() + adapters_backptr_->num_bytes();
  std::vector<AdapterId> ids;
  for (const Adapter* adapter : FrontOfLine(max_adapters)) {
    num_bytes -= adapter->options.size_bytes;
    if (num_bytes < 0) break;
    if (!adapter->options.is_staged) ids.push_back(adapter->id);
  }
  return ids;
}

std::vector<AdapterId> AdapterResidency::Waiting(std::span<const AdapterId> ids) const {
  std::vector<const Adapter*> waiting;
  for (const AdapterId id : ids) {
    const Adapter* adapter = adapters_backptr_->Find(id);
    if (adapter != nullptr && adapter->IsWaiting()) waiting.push_back(adapter);
  }
  std::ranges::sort(waiting, {}, [this](const Adapter* adapter) {
    return std::pair(!GoesFirst(*adapter), adapter->line_key);
  });
  std::vector<AdapterId> in_order;
  for (const Adapter* adapter : waiting) in_order.push_back(adapter->id);
  return in_order;
}

// --- Taking it from others -----------------------------------------------------------------------

bool AdapterResidency::FinishLeaving(PlanId newest_ended_plan) {
  const bool is_needed = adapters_backptr_->num_waiting() > 0;
  bool has_left = false;
  for (Adapter* adapter : std::exchange(leaving_, {})) {
    if (!adapter->is_leaving) continue;  // its last request has ended meanwhile
    if (!is_needed) {
      adapter->is_leaving = false;
    } else if (adapter->last_plan_id > newest_ended_plan) {
      leaving_.push_back(adapter);
    } else {
      adapters_backptr_->LeavePlace(*adapter);
      ++num_pauses_;
      has_left = true;
    }
  }
  return has_left;
}

void AdapterResidency::TakeForThoseInNeed(const Now& now) {
  for (Adapter* adapter : std::exchange(closed_, {})) adapter->is_closed = false;
  AdapterTable& adapters = *adapters_backptr_;
  // What can be had without taking it from anybody goes to those in front.
  Room room = {.num_places = adapters.num_free_places(),
               .num_bytes = adapters.NumFreeBytes() + adapters.num_idle_bytes()};
  for (const Adapter* adapter : leaving_) AddRoomOf(*adapter, room);
  std::vector<Holder> holders;
  bool are_holders_listed = false;
  MergedLines<3> lines({&adapters.paused(), &adapters.line(), &adapters.unplaced()});
  while (Adapter* needy = lines.Next()) {
    if (adapters.IsToBeRead(*needy) || (is_stalled_ && !MayTakeRoom(*needy))) continue;
    const Room before = room;
    // A pinned one that nobody waits for needs no place.
    room.num_places -= needy->num_requests() > 0 ? 1 : 0;
    room.num_bytes -= needy->HoldsBytes() ? 0 : needy->options.size_bytes;
    if (!room.IsShort()) continue;
    const std::int64_t waited_us = now.now_us - needy->waits_since_us;
    const std::int64_t patience_us = needy->HasStarted() ? pause_us_ : patience_us_;
    const bool lacks_pages = needy->lacked_pages_at_step + 1 == adapters.num_steps();
    if (!IsUrgent(*needy) && (waited_us < patience_us || lacks_pages)) continue;
    if (!std::exchange(are_holders_listed, true)) holders = ListHolders();
    const bool may_end_slices = MayEndSlicesFor(*needy, now);
    while (room.IsShort() && PauseOne(holders, room, *needy, may_end_slices)) continue;
    if (may_end_slices) {
      if (room.IsShort()) room = before;  // nobody's time is up: it waits for that
    } else {
      while (room.IsShort() && CloseOne(holders, room)) continue;
      if (room.IsShort()) return;
    }
  }
}

bool AdapterResidency::MayEndSlicesFor(const Adapter& needy, const Now& now) const {
  if (time_slice_steps_ == 0 || IsCrowded()) return false;
  return needy.HasStarted() || now.num_free_rows > 0;
}

bool AdapterResidency::IsCrowded() const { return num_waiting_ > kCrowdedFactor * num_holders_; }

std::int64_t AdapterResidency::TimeSlice() const {
  return time_slice_steps_ * num_waiting_ * num_waiting_ * num_waiting_ /
         (num_holders_ * num_holders_ * num_holders_);
}

bool AdapterResidency::StartedComeFirst() const {
  return !adapters_backptr_->paused().empty() && IsCrowded();
}

bool AdapterResidency::GoesFirst(const Adapter& adapter) const {
  return is_stalled_ ? IsUrgent(adapter) : adapter.HasStarted() || !StartedComeFirst();
}

bool AdapterResidency::IsUrgent(const Adapter& adapter) const {
  return is_stalled_ && adapter.num_running_requests > 0;
}

bool AdapterResidency::MayTakeRoom(const Adapter& adapter) const {
  return are_first_on_disk_ || GoesFirst(adapter);
}

bool AdapterResidency::PauseOne(std::vector<Holder>& holders, Room& room, const Adapter& needy,
                                bool may_end_slices) {
  if (holders.empty()) return false;
  const std::int64_t step = adapters_backptr_->num_steps();
  const std::int64_t time_slice = TimeSlice();
  const auto most = std::ranges::find_if(holders, [&](const Holder& holder) {
    const Adapter& adapter = *holder.adapter_backptr;
    // Who has just come back must have a plan, or adapters take turns in which nothing runs.
    if (adapter.placed_at_step == step) return false;
    const bool is_time_up = may_end_slices && step - adapter.placed_at_step >= time_slice;
    // It may wait for pages that the requests of the needy one hold.
    const bool does_nothing = needy.HasStarted() && adapter.num_running_requests == 0;
    return (is_time_up || does_nothing) && (room.num_places < 0 || !adapter.options.is_pinned);
  });
  if (most == holders.end()) return false;
  most->adapter_backptr->is_leaving = true;
  leaving_.push_back(most->adapter_backptr);
  AddRoomOf(*most->adapter_backptr, room);
  holders.erase(most);
  return true;
}

bool AdapterResidency::CloseOne(std::vector<Holder>& holders, Room& room) {
  const auto least = std::find_if(holders.rbegin(), holders.rend(), [&](const Holder& holder) {
    return room.num_places < 0 || !holder.adapter_backptr->options.is_pinned;
  });
  if (least == holders.rend()) return false;
  least->adapter_backptr->is_closed = true;
  closed_.push_back(least->adapter_backptr);
  ++num_closings_;
  AddRoomOf(*least->adapter_backptr, room);
  holders.erase(std::next(least).base());
  return true;
}

void AdapterResidency::AddRoomOf(const Adapter& holder, Room& room) const {
  ++room.num_places;
  if (!holder.options.is_pinned) room.num_bytes += holder.options.size_bytes;
}

std::vector<AdapterResidency::Holder> AdapterResidency::ListHolders() const {
  std::map<AdapterId, std::int64_t> remaining;
  const auto note = [&](const Request& request) {
    std::int64_t& steps = remaining[request.adapter().id];
    steps = std::max(steps, requests_backptr_->NumRemainingSteps(request));
  };
  for (const Request* request : requests_backptr_->running()) note(*request);
  for (const auto& [seniority, request] : requests_backptr_->preempted()) note(*request);
  std::vector<Holder> holders;
  for (const auto& [id, adapter] : adapters_backptr_->placed()) {
    if (adapter->is_leaving) continue;
    holders.push_back({.adapter_backptr = adapter, .num_remaining_steps = remaining[id]});
  }
  std::ranges::stable_sort(holders, std::ranges::greater{}, &Holder::num_remaining_steps);
  return holders;
}

}  // namespace lora_serve
