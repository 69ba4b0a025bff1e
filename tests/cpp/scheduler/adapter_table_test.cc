#include "scheduler/adapter_table.h"

#include <gtest/gtest.h>

#include <vector>

#include "common/errors.h"
#include "support/scheduler_parts.h"

namespace lora_serve {
namespace {

class AdapterTableTest : public ::testing::Test {
 protected:
  Adapter& OpenResident(std::int64_t id, const AdapterOptions& options = {}) {
    return parts_.OpenResident(id, options);
  }
  Request& Queue(Adapter& adapter, std::int32_t priority = 0) {
    return parts_.Queue(adapter, {.priority = priority, .arrival_us = 0});
  }
  /// A page of the adapter is on its way to the host, and nobody else refers to it.
  TransferId StartCopy(const Adapter& adapter) {
    const std::vector<TokenId> tokens = {1, 2};
    const NamespaceHandle handle = cache_.RetainNamespace(adapter.namespace_id);
    AcquireResult acquired = cache_.Acquire(handle, tokens, {.num_capacity_tokens = 2});
    cache_.Publish(acquired.lease, tokens);
    EXPECT_TRUE(cache_.StartWriteBack(acquired.lease));
    return cache_.TakeTransferOrders().at(0).id;
  }
  std::vector<AdapterId> InLine() const {
    std::vector<AdapterId> ids;
    for (const auto& [key, adapter] : table_.line()) ids.push_back(adapter->id);
    return ids;
  }
  std::vector<AdapterId> Idle() const {
    std::vector<AdapterId> ids;
    for (const auto& [last_used, adapter] : table_.idle()) ids.push_back(adapter->id);
    return ids;
  }

  testing::SchedulerParts parts_{{.page_size = 2,
                                  .num_device_pages = 8,
                                  .max_num_seqs = 8,
                                  .max_loras = 2,
                                  .num_host_pages = 8,
                                  .adapter_memory_bytes = 30,
                                  .priority_ageing_us = 1'000'000}};
  KVPrefixCache& cache_ = parts_.cache;
  AdapterTable& table_ = parts_.adapters;
};

TEST_F(AdapterTableTest, WhatFitsIsDueOnceInTheOrderOfOpenWithTheLowestFreeSlot) {
  EXPECT_TRUE(table_.Open(AdapterId(3), {.size_bytes = 10}));
  EXPECT_TRUE(table_.Open(AdapterId(9), {.size_bytes = 10}));
  EXPECT_FALSE(table_.Open(AdapterId(10), {.size_bytes = 11})) << "ten bytes are left";
  const std::vector<const Adapter*> loads = table_.TakeDue();
  ASSERT_EQ(loads.size(), 2U);
  EXPECT_EQ(loads[0]->id, AdapterId(3));
  EXPECT_EQ(loads[0]->slot, AdapterSlot(0));
  EXPECT_EQ(loads[1]->id, AdapterId(9));
  EXPECT_EQ(loads[1]->slot, AdapterSlot(1));
  EXPECT_TRUE(table_.TakeDue().empty());
  EXPECT_EQ(table_.NumFreeBytes(), 10);
  table_.CheckInvariants();
}

TEST_F(AdapterTableTest, ASlotIsFreeAfterAnEvictionButOnlyAfterTheReportOfADrainReturned) {
  Adapter& first = OpenResident(1);
  OpenResident(2);
  table_.Drain(AdapterId(2));
  EXPECT_EQ(table_.TakeDrained(), std::vector{AdapterId(2)});
  EXPECT_EQ(OpenResident(3).slot, AdapterSlot(2));
  table_.Evict(first);
  EXPECT_EQ(OpenResident(4).slot, AdapterSlot(0));
  table_.Remove(AdapterId(2));
  EXPECT_EQ(OpenResident(5).slot, AdapterSlot(1));
  table_.CheckInvariants();
}

TEST_F(AdapterTableTest, AFailedGenerationGivesItsBytesBackAndIsNeitherRetriedNorOpen) {
  table_.Open(AdapterId(1), {.size_bytes = 30});
  static_cast<void>(table_.TakeDue());
  EXPECT_EQ(table_.NumFreeBytes(), 0);
  table_.OnFailed(AdapterId(1));
  EXPECT_EQ(table_.NumFreeBytes(), 30);
  EXPECT_TRUE(table_.TakeDue().empty());
  EXPECT_THROW(static_cast<void>(table_.GetOpen(AdapterId(1))), AdapterNotFoundError);
  table_.Drain(AdapterId(1));
  EXPECT_EQ(table_.TakeDrained(), std::vector{AdapterId(1)});
  table_.CheckInvariants();
}

TEST_F(AdapterTableTest, AStagedLoadThatFailsAfterTheEvictionChangesNothing) {
  table_.Open(AdapterId(1), {.size_bytes = 30, .is_staged = true});
  static_cast<void>(table_.TakeDue());
  table_.Evict(table_.GetOpen(AdapterId(1)));
  table_.OnStagedFailed(AdapterId(1));
  EXPECT_EQ(table_.GetOpen(AdapterId(1)).load_state, LoadState::kRegistered) << "it may be tried";
  parts_.CheckInvariants();
}

TEST_F(AdapterTableTest, ADrainedGenerationThatWasNeverLoadedIsReportedAndNotLoaded) {
  table_.Open(AdapterId(1), {});
  table_.Drain(AdapterId(1));
  EXPECT_TRUE(table_.TakeDue().empty());
  EXPECT_EQ(table_.TakeDrained(), std::vector{AdapterId(1)});
  EXPECT_TRUE(table_.TakeDrained().empty());
  table_.CheckInvariants();
}

TEST_F(AdapterTableTest, ADrainWaitsForTheLoadAndForTheLastRequest) {
  table_.Open(AdapterId(1), {});
  Request& request = Queue(table_.GetOpen(AdapterId(1)));
  static_cast<void>(table_.TakeDue());
  table_.Drain(AdapterId(1));
  table_.OnLoaded(AdapterId(1));
  EXPECT_TRUE(table_.TakeDrained().empty());
  parts_.End(request);
  EXPECT_EQ(table_.TakeDrained(), std::vector{AdapterId(1)});
  table_.CheckInvariants();
}

TEST_F(AdapterTableTest, ADrainWaitsForTheCopiesOfItsPages) {
  const TransferId copy = StartCopy(OpenResident(1));
  table_.Drain(AdapterId(1));
  table_.CheckInvariants();
  EXPECT_TRUE(table_.TakeDrained().empty());
  EXPECT_TRUE(table_.HasWork()) << "the drain is due";
  table_.OnCopiesEnded();  // of others
  EXPECT_TRUE(table_.TakeDrained().empty());
  cache_.CompleteTransfer(copy);
  table_.OnCopiesEnded();
  EXPECT_EQ(table_.TakeDrained(), std::vector{AdapterId(1)});
  EXPECT_FALSE(table_.HasWork());
  table_.CheckInvariants();
}

TEST_F(AdapterTableTest, ADrainWaitsForALoadAndForTheCopiesOfItsPagesWhicheverEndsFirst) {
  for (const bool copy_ends_first : {false, true}) {
    const AdapterId id(copy_ends_first ? 2 : 1);
    const TransferId copy = StartCopy(OpenResident(id.value()));
    table_.Evict(table_.GetOpen(id));
    table_.ReserveBytes(table_.GetOpen(id));
    ASSERT_EQ(table_.TakeDue().size(), 1U);
    table_.Drain(id);
    table_.CheckInvariants();
    const auto end_copy = [&] {
      cache_.CompleteTransfer(copy);
      table_.OnCopiesEnded();
    };
    copy_ends_first ? end_copy() : table_.OnLoaded(id);
    table_.CheckInvariants();
    EXPECT_TRUE(table_.TakeDrained().empty());
    copy_ends_first ? table_.OnLoaded(id) : end_copy();
    EXPECT_EQ(table_.TakeDrained(), std::vector{id});
    table_.CheckInvariants();
  }
}

TEST_F(AdapterTableTest, OnlyAdaptersWithStartedRequestsTakeAPlace) {
  Adapter& first = OpenResident(1);
  Adapter& second = OpenResident(2);
  EXPECT_EQ(Idle(), (std::vector{AdapterId(1), AdapterId(2)}));
  Request& one = Queue(first);
  Request& two = Queue(second);
  EXPECT_EQ(table_.num_free_places(), 2);
  EXPECT_EQ(table_.unplaced().size(), 2U);
  EXPECT_TRUE(Idle().empty());
  parts_.Start(one);
  parts_.Start(two);
  EXPECT_EQ(table_.num_free_places(), 0);
  parts_.End(two);
  EXPECT_EQ(table_.num_free_places(), 1);
  parts_.requests.Preempt(one);
  EXPECT_EQ(table_.num_free_places(), 1) << "a preempted request keeps its adapter's place";
  Request& base = Queue(table_.base());
  parts_.Start(base);
  EXPECT_EQ(table_.num_free_places(), 1) << "the base model takes none";
}

TEST_F(AdapterTableTest, TheIdleAreOrderedByTheEndOfTheirUse) {
  Adapter& first = OpenResident(1);
  OpenResident(2);
  OpenResident(3);
  Request& request = Queue(first);
  parts_.Start(request);
  parts_.End(request);
  EXPECT_EQ(Idle(), (std::vector{AdapterId(2), AdapterId(3), AdapterId(1)}));
}

TEST_F(AdapterTableTest, TheLineGoesByTheTimeOfJoiningAndByPriority) {
  OpenResident(1, {.size_bytes = 30});
  table_.BeginStep(1000);
  for (const std::int64_t id : {2, 3, 4}) {
    EXPECT_FALSE(table_.Open(AdapterId(id), {.size_bytes = 10}));
  }
  EXPECT_TRUE(InLine().empty()) << "nobody needs them";
  Queue(table_.GetOpen(AdapterId(4)));
  table_.BeginStep(2000);
  Queue(table_.GetOpen(AdapterId(3)));
  Queue(table_.GetOpen(AdapterId(2)), /*priority=*/-1);
  EXPECT_EQ(InLine(), (std::vector{AdapterId(2), AdapterId(4), AdapterId(3)}));
  Queue(table_.GetOpen(AdapterId(4)), /*priority=*/-2);
  EXPECT_EQ(InLine(), (std::vector{AdapterId(4), AdapterId(2), AdapterId(3)}));
}

TEST_F(AdapterTableTest, TheStagedGoFirstAmongThoseThatBeganToWaitTogether) {
  OpenResident(1, {.size_bytes = 30});
  for (const std::int64_t id : {2, 3, 4}) table_.Open(AdapterId(id), {.size_bytes = 10});
  table_.BeginStep(1000);
  Queue(table_.GetOpen(AdapterId(2)));
  table_.BeginStep(2000);
  Queue(table_.GetOpen(AdapterId(3)));
  Queue(table_.GetOpen(AdapterId(4)));
  table_.SetStaged(AdapterId(4), true);
  EXPECT_EQ(InLine(), (std::vector{AdapterId(2), AdapterId(4), AdapterId(3)}))
      << "2 has waited longer";
  table_.SetStaged(AdapterId(3), true);
  EXPECT_EQ(InLine(), (std::vector{AdapterId(2), AdapterId(3), AdapterId(4)}));
  table_.SetStaged(AdapterId(3), false);
  EXPECT_EQ(InLine(), (std::vector{AdapterId(2), AdapterId(4), AdapterId(3)}));
  table_.CheckInvariants();
}

TEST_F(AdapterTableTest, WhatIsPinnedAndTheLargestOtherMustFitTogether) {
  OpenResident(1, {.size_bytes = 10});
  table_.Open(AdapterId(2), {.size_bytes = 15});
  table_.SetPinned(AdapterId(1), true);
  table_.SetPinned(AdapterId(2), true);
  EXPECT_THROW(table_.Open(AdapterId(3), {.size_bytes = 6}), CapacityError) << "25 + 6";
  table_.SetPinned(AdapterId(2), false);
  table_.Open(AdapterId(3), {.size_bytes = 6});
  EXPECT_THROW(table_.SetPinned(AdapterId(2), true), CapacityError);
  table_.CheckInvariants();
}

TEST_F(AdapterTableTest, AnIdIsAboveAllThatWereOpenedBeforeAlsoThoseThatAreGone) {
  OpenResident(5);
  table_.Drain(AdapterId(5));
  EXPECT_EQ(table_.TakeDrained().size(), 1U);
  table_.Remove(AdapterId(5));
  for (const std::int64_t id : {5, 4, 1}) {
    EXPECT_THROW(table_.Open(AdapterId(id), {}), InvalidArgumentError) << id;
  }
  EXPECT_THROW(table_.Open(AdapterId(9), {.size_bytes = 31}), CapacityError);
  OpenResident(7);
  EXPECT_THROW(table_.Open(AdapterId(6), {}), InvalidArgumentError);
  EXPECT_EQ(table_.adapters().size(), 2U);
}

TEST_F(AdapterTableTest, RefusesIdsThatWereUsedBeforeAlsoAfterTheDrain) {
  OpenResident(1);
  EXPECT_THROW(table_.Open(AdapterId(1), {}), InvalidArgumentError);
  table_.Drain(AdapterId(1));
  table_.Drain(AdapterId(1));
  EXPECT_EQ(table_.TakeDrained().size(), 1U);
  table_.Remove(AdapterId(1));
  EXPECT_THROW(table_.Open(AdapterId(1), {}), InvalidArgumentError);
  EXPECT_THROW(table_.Drain(AdapterId(1)), AdapterNotFoundError);
  EXPECT_THROW(table_.Open(kBaseAdapter, {}), InvalidArgumentError);
  EXPECT_THROW(table_.Open(AdapterId(-1), {}), InvalidArgumentError);
  EXPECT_THROW(table_.Open(AdapterId(2), {.size_bytes = -1}), InvalidArgumentError);
  EXPECT_THROW(table_.Open(AdapterId(2), {.weight = 0.0}), InvalidArgumentError);
  EXPECT_THROW(table_.Open(AdapterId(2), {.weight = 1001.0}), InvalidArgumentError);
  EXPECT_THROW(table_.Drain(kBaseAdapter), AdapterNotFoundError);
  EXPECT_EQ(table_.adapters().size(), 1U);
}

}  // namespace
}  // namespace lora_serve
