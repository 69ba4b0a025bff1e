#include "scheduler/adapter_residency.h"

#include <gtest/gtest.h>

#include <optional>
#include <utility>
#include <vector>

#include "support/scheduler_parts.h"

namespace lora_serve {
namespace {

using Ids = std::vector<std::int64_t>;

/// Decisions of single steps. What follows from them over many: scheduler_residency_test.cc,
/// scheduler_time_slice_test.cc.
class AdapterResidencyTest : public ::testing::Test {
 protected:
  /// Room for `num_adapters` of one byte.
  void Make(std::int64_t num_adapters, std::int32_t time_slice_steps = 0,
            std::int32_t max_loras = 8, bool loads_staged_only = false) {
    const SchedulerOptions options = {.page_size = 2,
                                      .num_device_pages = 64,
                                      .max_num_seqs = 16,
                                      .max_loras = max_loras,
                                      .adapter_memory_bytes = num_adapters,
                                      .loads_staged_only = loads_staged_only,
                                      .adapter_time_slice_steps = time_slice_steps,
                                      .adapter_pause_us = 0};
    parts_.emplace(options);
    residency_.emplace(options, &parts_->adapters, &parts_->requests);
  }
  Adapter& Open(std::int64_t id) { return parts_->Open(id, {.size_bytes = 1}); }
  Adapter& OpenResident(std::int64_t id) { return parts_->OpenResident(id, {.size_bytes = 1}); }
  /// Loaded by a plan from host memory.
  Adapter& OpenStaged(std::int64_t id) {
    Adapter& adapter = parts_->Open(id, {.size_bytes = 1, .is_staged = true});
    EXPECT_EQ(LoadsOf(Plan()), Ids{id});
    return adapter;
  }
  /// Room for one adapter, which 2 has taken from 1; that has left the host, too.
  std::pair<Adapter*, Adapter*> PauseOneOnADisk() {
    Make(1, /*time_slice_steps=*/1, 8, /*loads_staged_only=*/true);
    Adapter& first = OpenStaged(1);
    StartLong(first);
    Adapter& second = Open(2);
    parts_->Queue(second);
    parts_->adapters.SetStaged(AdapterId(2), true);
    EXPECT_EQ(EvictedOf(Plan()), Ids{1});
    EXPECT_EQ(first.standing, AdapterStanding::kPaused);
    parts_->adapters.SetStaged(AdapterId(1), false);
    return {&first, &second};
  }
  /// A started request of `max_tokens`.
  Request& StartLong(Adapter& adapter, std::int32_t max_tokens = 20) {
    return parts_->QueueAndStart(adapter, max_tokens);
  }
  AdapterResidency::Changes Plan(AdapterResidency::Now now = {.num_free_rows = 8}) {
    now.now_us = ++now_us_;
    parts_->adapters.BeginStep(now_us_);
    AdapterResidency::Changes changes = residency_->Plan(now);
    for (const Adapter* adapter : changes.loads) {  // at once
      if (adapter->load_state == LoadState::kLoading) parts_->adapters.OnLoaded(adapter->id);
    }
    parts_->CheckInvariants();
    return changes;
  }
  static Ids LoadsOf(const AdapterResidency::Changes& changes) {
    Ids ids;
    for (const Adapter* adapter : changes.loads) ids.push_back(adapter->id.value());
    return ids;
  }
  static Ids EvictedOf(const AdapterResidency::Changes& changes) {
    Ids ids;
    for (const AdapterId id : changes.evicted) ids.push_back(id.value());
    return ids;
  }
  static Ids NewcomersOf(const AdapterResidency::Changes& changes) {
    Ids ids;
    for (const Adapter* adapter : changes.newcomers) ids.push_back(adapter->id.value());
    return ids;
  }

  Ids ToStage() const { return ValuesOf(residency_->ToStage()); }
  Ids WaitingOf(const Ids& ids) const {
    return ValuesOf(residency_->Waiting(std::vector<AdapterId>(ids.begin(), ids.end())));
  }
  static Ids ValuesOf(const std::vector<AdapterId>& ids) {
    Ids values;
    for (const AdapterId id : ids) values.push_back(id.value());
    return values;
  }

  std::optional<testing::SchedulerParts> parts_;
  std::optional<AdapterResidency> residency_;
  std::int64_t now_us_ = 0;
};

TEST_F(AdapterResidencyTest, TheIdleMakeRoomInTheOrderOfTheirUse) {
  Make(2);
  OpenResident(1);
  OpenResident(2);
  parts_->Queue(Open(3));
  const AdapterResidency::Changes changes = Plan();
  EXPECT_EQ(EvictedOf(changes), Ids{1});
  EXPECT_EQ(LoadsOf(changes), Ids{3});
  EXPECT_TRUE(Plan().loads.empty());
}

TEST_F(AdapterResidencyTest, NobodyBehindTheFirstTakesTheBytesThatComeTogetherForIt) {
  Make(3);
  StartLong(OpenResident(1));
  StartLong(OpenResident(2));
  parts_->Queue(parts_->Open(3, {.size_bytes = 2}));
  parts_->Queue(parts_->Open(4, {.size_bytes = 1}));
  EXPECT_TRUE(Plan().loads.empty()) << "one byte is free, and two are needed first";
}

TEST_F(AdapterResidencyTest, WhoOnlyLacksAPlaceGivesItsBytesToThoseBeforeItAndNotToThoseBehind) {
  Make(2, 0, /*max_loras=*/1);
  Adapter& placed = OpenResident(1);
  Adapter& unplaced = OpenResident(2);
  StartLong(placed);
  Adapter& in_line = Open(3);
  parts_->Queue(unplaced);
  Plan();
  parts_->Queue(in_line);
  EXPECT_TRUE(Plan().evicted.empty()) << "adapter 3 waits behind it";
  parts_->Queue(in_line, {.priority = -1});  // a class counts more than the wait
  const AdapterResidency::Changes changes = Plan();
  EXPECT_EQ(EvictedOf(changes), Ids{2});
  EXPECT_EQ(LoadsOf(changes), Ids{3});
}

TEST_F(AdapterResidencyTest, NewcomersAreThoseOnTheDeviceInTheOrderOfWaiting) {
  Make(4, 0, /*max_loras=*/2);
  Adapter& first = OpenResident(1);
  Adapter& second = OpenResident(2);
  Adapter& third = OpenResident(3);
  for (Adapter* adapter : {&third, &first, &second}) parts_->Queue(*adapter);
  EXPECT_EQ(NewcomersOf(Plan()), (Ids{3, 1, 2})) << "more than there are places: some lack pages";
}

TEST_F(AdapterResidencyTest, TheOneWithTheLeastLeftIsClosedAndOnlyWhileSomebodyLacksRoom) {
  Make(2);
  Adapter& first = OpenResident(1);
  Adapter& second = OpenResident(2);
  StartLong(first, 20);
  StartLong(second, 10);
  Request& waiting = parts_->Queue(Open(3));
  Plan();
  EXPECT_FALSE(first.is_closed);
  EXPECT_TRUE(second.is_closed);
  parts_->End(waiting);
  Plan();
  EXPECT_FALSE(second.is_closed);
}

TEST_F(AdapterResidencyTest, AsManyAreClosedAsTheRoomTakes) {
  Make(3);
  StartLong(OpenResident(1), 20);
  StartLong(OpenResident(2), 10);
  StartLong(OpenResident(3), 15);
  parts_->Queue(parts_->Open(4, {.size_bytes = 2}));
  Plan();
  EXPECT_FALSE(parts_->adapters.GetOpen(AdapterId(1)).is_closed);
  EXPECT_TRUE(parts_->adapters.GetOpen(AdapterId(2)).is_closed);
  EXPECT_TRUE(parts_->adapters.GetOpen(AdapterId(3)).is_closed);
}

TEST_F(AdapterResidencyTest, ASliceLastsItsStepsAndWhoHasTheMostLeftIsPaused) {
  Make(2, /*time_slice_steps=*/16);
  Adapter& first = OpenResident(1);
  Adapter& second = OpenResident(2);
  StartLong(first, 20);
  StartLong(second, 10);
  parts_->Queue(Open(3));
  EXPECT_TRUE(Plan().evicted.empty()) << "a slice is two steps: half as many wait as are in place";
  EXPECT_EQ(EvictedOf(Plan()), Ids{1});
  EXPECT_EQ(first.standing, AdapterStanding::kPaused);
  EXPECT_TRUE(second.is_in_place);
  EXPECT_EQ(residency_->num_pauses(), 1);
}

TEST_F(AdapterResidencyTest, WhoIsPausedLeavesWhenNoPlanTouchesIt) {
  Make(1, /*time_slice_steps=*/1);
  Adapter& adapter = OpenResident(1);
  StartLong(adapter);
  adapter.last_plan_id = PlanId(5);
  parts_->Queue(Open(2));
  for (int step = 0; step < 3; ++step) {
    EXPECT_TRUE(Plan({.newest_ended_plan = PlanId(4), .num_free_rows = 8}).evicted.empty());
    EXPECT_TRUE(adapter.is_leaving);
    EXPECT_FALSE(adapter.MayRun()) << "no further plan touches it";
  }
  EXPECT_EQ(EvictedOf(Plan({.newest_ended_plan = PlanId(5), .num_free_rows = 8})), Ids{1});
}

TEST_F(AdapterResidencyTest, WhoWasToldToLeaveStaysWhenNobodyWaitsAnyMore) {
  Make(1, /*time_slice_steps=*/1);
  Adapter& adapter = OpenResident(1);
  StartLong(adapter);
  adapter.last_plan_id = PlanId(5);
  Request& waiting = parts_->Queue(Open(2));
  Plan({.newest_ended_plan = PlanId(4), .num_free_rows = 8});
  ASSERT_TRUE(adapter.is_leaving);
  parts_->End(waiting);
  Plan({.newest_ended_plan = PlanId(4), .num_free_rows = 8});
  EXPECT_TRUE(adapter.MayRun());
}

TEST_F(AdapterResidencyTest, NobodyIsPausedForANewAdapterWhileNoRowIsFree) {
  Make(1, /*time_slice_steps=*/1);
  Adapter& adapter = OpenResident(1);
  StartLong(adapter);
  parts_->Queue(Open(2));
  for (int step = 0; step < 3; ++step) Plan({.num_free_rows = 0});
  EXPECT_EQ(residency_->num_pauses(), 0);
  EXPECT_TRUE(adapter.is_closed) << "it is closed instead";
  Plan();
  EXPECT_EQ(residency_->num_pauses(), 1);
}

TEST_F(AdapterResidencyTest, InACrowdNobodyIsPausedAndThoseThatHaveStartedGoFirst) {
  Make(1, /*time_slice_steps=*/1);
  Adapter& first = OpenResident(1);
  StartLong(first);
  parts_->Queue(Open(2));
  for (int step = 0; step < 3 && residency_->num_pauses() == 0; ++step) Plan();
  ASSERT_EQ(first.standing, AdapterStanding::kPaused);
  Request& request = *parts_->adapters.GetOpen(AdapterId(2)).queue.begin()->second;
  parts_->Start(request);
  for (const std::int64_t id : {3, 4, 5}) parts_->Queue(Open(id));  // four wait for one place
  const std::int64_t num_pauses = residency_->num_pauses();
  for (int step = 0; step < 5; ++step) Plan();
  EXPECT_EQ(residency_->num_pauses(), num_pauses);
  EXPECT_TRUE(request.adapter().is_closed);
  parts_->End(request);
  EXPECT_EQ(LoadsOf(Plan()), Ids{1}) << "it has started";
}

TEST_F(AdapterResidencyTest, WhoComesBackHasAStepBeforeItGivesWayAgain) {
  Make(1, /*time_slice_steps=*/1);
  // Two with nothing but preempted requests, each of which would give way to the other at once.
  Adapter& first = OpenResident(1);
  Request& one = StartLong(first);
  parts_->Queue(Open(2));
  for (int step = 0; step < 3 && first.is_in_place; ++step) Plan();
  Adapter& second = parts_->adapters.GetOpen(AdapterId(2));
  Request& two = *second.queue.begin()->second;
  parts_->Start(two);
  for (Request* request : {&one, &two}) parts_->requests.Preempt(*request);
  for (int step = 0; step < 20; ++step) {
    const bool was_in_place = first.is_in_place;
    Plan();
    if (!was_in_place && first.is_in_place) break;
  }
  EXPECT_TRUE(first.is_in_place) << "nobody ever has a place when the rows are chosen";
  parts_->Start(one);
  Plan();
  EXPECT_TRUE(second.standing == AdapterStanding::kPaused);
}

TEST_F(AdapterResidencyTest, WhenNothingMovesOnlyPausedRequestsThatHoldPagesGetRoom) {
  Make(1, /*time_slice_steps=*/1);
  Adapter& first = OpenResident(1);
  StartLong(first);
  Request& other = parts_->Queue(Open(2));
  for (int step = 0; step < 3 && first.is_in_place; ++step) Plan();
  ASSERT_EQ(first.standing, AdapterStanding::kPaused);
  ASSERT_EQ(other.adapter().load_state, LoadState::kResident);
  EXPECT_EQ(NewcomersOf(Plan()), Ids{2}) << "it may lack pages, which the first one holds";
  const AdapterResidency::Changes changes = Plan({.num_free_rows = 8, .is_stuck = true});
  EXPECT_EQ(EvictedOf(changes), Ids{2});
  EXPECT_EQ(LoadsOf(changes), Ids{1});
  EXPECT_TRUE(changes.newcomers.empty());
}

TEST_F(AdapterResidencyTest, WhenNothingMovesNewcomersGetNoPlace) {
  Make(2, /*time_slice_steps=*/100, /*max_loras=*/1);
  Adapter& first = OpenResident(1);
  StartLong(first);
  parts_->adapters.LeavePlace(first);
  Adapter& preempted = OpenResident(2);
  Request& other = StartLong(preempted);
  parts_->adapters.LeavePlace(preempted);
  parts_->requests.Preempt(other);
  const AdapterResidency::Changes changes = Plan({.num_free_rows = 8, .is_stuck = true});
  EXPECT_TRUE(changes.newcomers.empty());
  EXPECT_TRUE(first.is_in_place);
  parts_->adapters.LeavePlace(first);
  Plan();
  Plan({.num_free_rows = 8, .is_stuck = true});
  EXPECT_FALSE(preempted.is_in_place && !first.is_in_place) << "it holds no pages";
}

TEST_F(AdapterResidencyTest, WhoHasOnlyPreemptedRequestsGivesWayToAPausedOneAtAnyTime) {
  Make(2, /*time_slice_steps=*/100, /*max_loras=*/1);
  Adapter& first = OpenResident(1);
  StartLong(first);
  parts_->adapters.LeavePlace(first);
  Adapter& second = OpenResident(2);
  parts_->requests.Preempt(StartLong(second));
  for (int step = 0; step < 3; ++step) Plan();
  EXPECT_EQ(second.standing, AdapterStanding::kPaused);
  EXPECT_TRUE(first.is_in_place);
}

TEST_F(AdapterResidencyTest, NobodyIsClosedForOneThatLacksPages) {
  Make(1);
  Adapter& adapter = OpenResident(1);
  StartLong(adapter);
  Adapter& needy = parts_->Queue(Open(2)).adapter();
  needy.lacked_pages_at_step = parts_->adapters.num_steps();
  Plan();
  EXPECT_FALSE(adapter.is_closed);
  Plan();
  EXPECT_TRUE(adapter.is_closed);
}

TEST_F(AdapterResidencyTest, APinnedOneThatNobodyWaitsForNeedsNoPlace) {
  Make(10, 0, /*max_loras=*/1);
  Adapter& adapter = OpenResident(1);
  StartLong(adapter);
  parts_->adapters.Evict(OpenResident(2));
  for (const std::int64_t id : {3, 4, 5, 6}) Open(id);
  ASSERT_EQ(parts_->adapters.TakeDue().size(), 4U) << "as many loads as may be under way";
  parts_->adapters.SetPinned(AdapterId(2), true);
  Plan();
  EXPECT_FALSE(adapter.is_closed);
}

TEST_F(AdapterResidencyTest, TheEndOfAPinnedOneGivesAPlaceAndNoBytes) {
  Make(3, 0, /*max_loras=*/2);
  Adapter& pinned = parts_->OpenResident(1, {.size_bytes = 1, .is_pinned = true});
  Adapter& other = OpenResident(2);
  StartLong(pinned, 5);
  StartLong(other, 20);
  parts_->Queue(parts_->Open(3, {.size_bytes = 2}));
  Plan();
  EXPECT_TRUE(pinned.is_closed);
  EXPECT_TRUE(other.is_closed);
}

// --- Reading ahead ------------------------------------------------------------------------------

TEST_F(AdapterResidencyTest, WhatTheDeviceHoldsAtOnceIsToBeStagedInTheOrderOfTheLine) {
  Make(3);
  for (const std::int64_t id : {1, 2, 3}) StartLong(OpenResident(id));
  for (const std::int64_t id : {4, 5, 6, 7}) Open(id);
  for (const AdapterId id : {AdapterId(7), AdapterId(5), AdapterId(6), AdapterId(4)}) {
    parts_->Queue(parts_->adapters.GetOpen(id));
  }
  Plan();
  EXPECT_EQ(ToStage(), (Ids{7, 5, 6})) << "three are on the device at once";
  parts_->adapters.SetStaged(AdapterId(5), true);
  EXPECT_EQ(ToStage(), (Ids{7, 6})) << "5 counts, but is there";
  EXPECT_EQ(LoadsOf(Plan()), Ids{}) << "to ask changes nothing";
}

TEST_F(AdapterResidencyTest, FourRoundsOfLoadsAreToBeStagedAtMost) {
  Make(100);
  StartLong(parts_->OpenResident(1, {.size_bytes = 100}));
  Ids waiting;
  for (std::int64_t id = 2; id < 30; ++id) {
    parts_->Queue(Open(id));
    waiting.push_back(id);
  }
  EXPECT_EQ(ToStage(), Ids(waiting.begin(), waiting.begin() + 16)) << "four at once";
  EXPECT_EQ(WaitingOf(waiting), waiting);
}

TEST_F(AdapterResidencyTest, InACrowdThoseThatHaveStartedAreToBeStagedFirst) {
  Make(1, /*time_slice_steps=*/1);
  Adapter& first = OpenResident(1);
  StartLong(first);
  parts_->Queue(Open(2));
  for (int step = 0; step < 3 && first.is_in_place; ++step) Plan();
  ASSERT_EQ(first.standing, AdapterStanding::kPaused);
  ASSERT_FALSE(first.HoldsBytes());
  parts_->Queue(Open(3), {.priority = -5});
  EXPECT_EQ(WaitingOf({1, 2, 3}), (Ids{3, 2, 1}));
  EXPECT_EQ(ToStage(), Ids{3});
  for (const std::int64_t id : {4, 5, 6}) parts_->Queue(Open(id));
  StartLong(parts_->adapters.GetOpen(AdapterId(2)));
  Plan();
  EXPECT_EQ(ToStage(), Ids{1});
  EXPECT_EQ(WaitingOf({6, 5, 4, 3, 1}), (Ids{1, 3, 4, 5, 6}));
}

TEST_F(AdapterResidencyTest, OnlyThoseWaitThatLackBytesOrAPlace) {
  Make(4, 0, /*max_loras=*/1);
  StartLong(OpenResident(1));
  OpenResident(2);
  parts_->Queue(OpenResident(3));
  OpenResident(4);
  Open(5);
  parts_->Queue(Open(6), {.priority = -5});
  parts_->adapters.SetPinned(AdapterId(4), true);
  EXPECT_EQ(WaitingOf({1, 2, 3, 4, 5, 6, 99}), (Ids{6, 3}));
  EXPECT_EQ(ToStage(), Ids{6}) << "3 lacks only a place";
}

// --- Adapters whose weights are to be read ------------------------------------------------------

TEST_F(AdapterResidencyTest, WhoIsToBeReadTakesNoRoomAndIsPassedUntilItIsThere) {
  Make(3, 0, 8, /*loads_staged_only=*/true);
  StartLong(OpenStaged(1));
  Adapter& on_disk = Open(2);
  parts_->Queue(on_disk);
  parts_->Queue(Open(3));
  parts_->Queue(Open(4));
  parts_->adapters.SetStaged(AdapterId(3), true);
  EXPECT_EQ(LoadsOf(Plan()), Ids{3});
  EXPECT_EQ(LoadsOf(Plan()), Ids{}) << "one byte is free, for whoever is there first";
  EXPECT_EQ(ToStage(), (Ids{2, 4}));
  parts_->adapters.SetStaged(AdapterId(4), true);
  parts_->adapters.SetStaged(AdapterId(2), true);
  EXPECT_EQ(LoadsOf(Plan()), Ids{2}) << "it has waited longest";
}

TEST_F(AdapterResidencyTest, NobodyIsPausedForOneThatIsToBeRead) {
  Make(1, /*time_slice_steps=*/1, 8, /*loads_staged_only=*/true);
  Adapter& runs = OpenStaged(1);
  StartLong(runs);
  parts_->Queue(Open(2));
  for (int step = 0; step < 5; ++step) {
    EXPECT_TRUE(Plan().evicted.empty());
    EXPECT_FALSE(runs.is_leaving);
  }
  parts_->adapters.SetStaged(AdapterId(2), true);
  const AdapterResidency::Changes changes = Plan();
  EXPECT_EQ(EvictedOf(changes), Ids{1});
  EXPECT_EQ(LoadsOf(changes), Ids{2});
}

TEST_F(AdapterResidencyTest, NobodyIsClosedForOneThatIsToBeRead) {
  Make(1, 0, 8, /*loads_staged_only=*/true);
  Adapter& runs = OpenStaged(1);
  StartLong(runs);
  parts_->Queue(Open(2));
  Plan();
  EXPECT_FALSE(runs.is_closed);
  parts_->adapters.SetStaged(AdapterId(2), true);
  Plan();
  EXPECT_TRUE(runs.is_closed);
}

TEST_F(AdapterResidencyTest, APausedOneThatLeftTheHostComesBackWhenItIsReadAgain) {
  const auto [first, second] = PauseOneOnADisk();
  StartLong(*second);
  for (int step = 0; step < 5; ++step) EXPECT_TRUE(Plan().evicted.empty());
  EXPECT_EQ(ToStage(), Ids{1});
  parts_->adapters.SetStaged(AdapterId(1), true);
  for (int step = 0; step < 5 && !first->is_in_place; ++step) Plan();
  EXPECT_TRUE(first->is_in_place);
}

TEST_F(AdapterResidencyTest, WhenNothingMovesPausedOnesOnADiskHoldNobodyBack) {
  PauseOneOnADisk();
  const AdapterResidency::Now stuck = {.num_free_rows = 8, .is_stuck = true};
  EXPECT_EQ(NewcomersOf(Plan(stuck)), Ids{2}) << "it has pages to itself, perhaps";
  EXPECT_EQ(ToStage(), Ids{1});
  parts_->adapters.SetStaged(AdapterId(1), true);
  EXPECT_EQ(LoadsOf(Plan(stuck)), Ids{1}) << "now it goes first";
}

TEST_F(AdapterResidencyTest, WhenNothingMovesAPausedOneThatIsThereHoldsNewcomersBack) {
  Make(2, /*time_slice_steps=*/100, /*max_loras=*/1, /*loads_staged_only=*/true);
  Adapter& first = OpenStaged(1);
  Adapter& newcomer = OpenStaged(2);
  StartLong(first);
  parts_->adapters.LeavePlace(first);
  parts_->Queue(newcomer);
  EXPECT_EQ(NewcomersOf(Plan({.num_free_rows = 8, .is_stuck = true})), Ids{});
  EXPECT_TRUE(first.is_in_place);
}

TEST_F(AdapterResidencyTest, InACrowdPausedOnesOnADiskHoldNobodyBack) {
  const auto [first, second] = PauseOneOnADisk();
  Request& request = StartLong(*second);
  for (const std::int64_t id : {3, 4, 5, 6}) {
    parts_->Queue(Open(id));
    parts_->adapters.SetStaged(AdapterId(id), true);
  }
  parts_->End(request);
  EXPECT_EQ(LoadsOf(Plan()), Ids{3});
}

TEST_F(AdapterResidencyTest, InACrowdWhoIsPausedInThisStepHoldsNewcomersBack) {
  Make(1, /*time_slice_steps=*/1, 8, /*loads_staged_only=*/true);
  Adapter& first = OpenStaged(1);
  StartLong(first);
  first.last_plan_id = PlanId(5);
  parts_->Queue(Open(2));
  parts_->adapters.SetStaged(AdapterId(2), true);
  Plan({.newest_ended_plan = PlanId(4), .num_free_rows = 8});
  ASSERT_TRUE(first.is_leaving);
  for (const std::int64_t id : {3, 4, 5}) {
    parts_->Queue(Open(id));
    parts_->adapters.SetStaged(AdapterId(id), true);
  }
  EXPECT_EQ(LoadsOf(Plan({.newest_ended_plan = PlanId(5), .num_free_rows = 8})), Ids{});
  EXPECT_TRUE(first.HoldsBytes());
}

TEST_F(AdapterResidencyTest, OnlyWhatIsThereIsLoadedAheadOfItsRequests) {
  Make(2, 0, 8, /*loads_staged_only=*/true);
  parts_->Queue(Open(1));
  parts_->Open(2, {.size_bytes = 1, .is_staged = true});
  EXPECT_EQ(LoadsOf(Plan()), Ids{2});
}

// --- Orders of one plan -------------------------------------------------------------------------

TEST_F(AdapterResidencyTest, WhatAPlanEvictsItDoesNotLoad) {
  Make(25, 0, /*max_loras=*/1);
  Adapter& large = parts_->OpenResident(1, {.size_bytes = 20});
  Adapter& small = parts_->OpenResident(2, {.size_bytes = 5});
  parts_->Queue(large);
  parts_->Queue(small);
  parts_->adapters.BeginStep(++now_us_);
  parts_->Queue(parts_->Open(3, {.size_bytes = 12}), {.priority = -1});
  const AdapterResidency::Changes changes = Plan();
  EXPECT_EQ(EvictedOf(changes), (Ids{2, 1}));
  EXPECT_EQ(LoadsOf(changes), Ids{3}) << "there is room for the small one again";
}

}  // namespace
}  // namespace lora_serve
