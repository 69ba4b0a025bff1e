#include "scheduler/adapter_table.h"

#include <gtest/gtest.h>

#include <vector>

#include "common/errors.h"

namespace lora_serve {
namespace {

class AdapterTableTest : public ::testing::Test {
 protected:
  Adapter& OpenResident(std::int64_t id) {
    table_.Open(AdapterId(id), {});
    static_cast<void>(table_.TakeLoads());
    table_.OnLoaded(AdapterId(id));
    return table_.GetOpen(AdapterId(id));
  }
  void Queue(Adapter& adapter) {
    table_.MoveRequest(adapter, RequestList::kNone, RequestList::kQueued);
  }
  void Run(Adapter& adapter) {
    table_.MoveRequest(adapter, RequestList::kQueued, RequestList::kRunning);
  }
  void End(Adapter& adapter) {
    table_.MoveRequest(adapter, RequestList::kRunning, RequestList::kNone);
  }

  KVPrefixCache cache_{{.page_size = 2, .num_device_pages = 8, .num_host_pages = 8}};
  AdapterTable table_{&cache_, /*max_loras=*/2};
};

TEST_F(AdapterTableTest, LoadsEachGenerationOnceInTheOrderOfOpenIntoTheLowestFreeSlot) {
  table_.Open(AdapterId(9), {});
  table_.Open(AdapterId(3), {});
  const std::vector<const Adapter*> loads = table_.TakeLoads();
  ASSERT_EQ(loads.size(), 2U);
  EXPECT_EQ(loads[0]->id, AdapterId(9));
  EXPECT_EQ(loads[0]->slot, AdapterSlot(0));
  EXPECT_EQ(loads[1]->id, AdapterId(3));
  EXPECT_EQ(loads[1]->slot, AdapterSlot(1));
  EXPECT_TRUE(table_.TakeLoads().empty());
  table_.CheckInvariants();
}

TEST_F(AdapterTableTest, ASlotIsFreeOnlyAfterTheReportOfTheDrainReturned) {
  OpenResident(1);
  OpenResident(2);
  table_.Drain(AdapterId(1));
  EXPECT_EQ(table_.TakeDrained(), std::vector{AdapterId(1)});
  EXPECT_EQ(OpenResident(3).slot, AdapterSlot(2));
  table_.Remove(AdapterId(1));
  EXPECT_EQ(OpenResident(4).slot, AdapterSlot(0));
  table_.CheckInvariants();
}

TEST_F(AdapterTableTest, AFailedGenerationIsNeitherRetriedNorOpenToRequests) {
  table_.Open(AdapterId(1), {});
  static_cast<void>(table_.TakeLoads());
  table_.OnFailed(AdapterId(1));
  EXPECT_TRUE(table_.TakeLoads().empty());
  EXPECT_THROW(static_cast<void>(table_.GetOpen(AdapterId(1))), AdapterNotFoundError);
  EXPECT_FALSE(table_.MayRun(table_.adapters().at(AdapterId(1))));
  table_.Drain(AdapterId(1));
  EXPECT_EQ(table_.TakeDrained(), std::vector{AdapterId(1)});
  table_.CheckInvariants();
}

TEST_F(AdapterTableTest, ADrainedGenerationThatWasNeverLoadedIsReportedAndNotLoaded) {
  table_.Open(AdapterId(1), {});
  table_.Drain(AdapterId(1));
  EXPECT_TRUE(table_.TakeLoads().empty());
  EXPECT_EQ(table_.TakeDrained(), std::vector{AdapterId(1)});
  EXPECT_TRUE(table_.TakeDrained().empty());
  table_.CheckInvariants();
}

TEST_F(AdapterTableTest, ADrainWaitsForTheLoadAndForTheLastRequest) {
  table_.Open(AdapterId(1), {});
  Adapter& adapter = table_.GetOpen(AdapterId(1));
  NamespaceHandle handle = cache_.RetainNamespace(adapter.namespace_id);
  Queue(adapter);
  static_cast<void>(table_.TakeLoads());
  table_.Drain(AdapterId(1));
  table_.OnLoaded(AdapterId(1));
  EXPECT_FALSE(table_.HasWork());
  Run(adapter);
  table_.CheckInvariants();
  handle = NamespaceHandle();
  End(adapter);
  EXPECT_EQ(table_.TakeDrained(), std::vector{AdapterId(1)});
  table_.CheckInvariants();
}

TEST_F(AdapterTableTest, ADrainWaitsForTheCopiesOfItsPages) {
  Adapter& adapter = OpenResident(1);
  Queue(adapter);
  Run(adapter);
  const std::vector<TokenId> tokens = {1, 2};
  TransferId copy;
  {
    const NamespaceHandle handle = cache_.RetainNamespace(adapter.namespace_id);
    AcquireResult acquired = cache_.Acquire(handle, tokens, {.num_capacity_tokens = 2});
    cache_.Publish(acquired.lease, tokens);
    ASSERT_TRUE(cache_.StartWriteBack(acquired.lease));
    copy = cache_.TakeTransferOrders().at(0).id;
    table_.Drain(AdapterId(1));
  }
  End(adapter);
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

TEST_F(AdapterTableTest, OnlyAdaptersWithStartedRequestsTakeAPlace) {
  Adapter& first = OpenResident(1);
  Adapter& second = OpenResident(2);
  Adapter& third = OpenResident(3);
  for (Adapter* adapter : {&first, &second, &third}) Queue(*adapter);
  EXPECT_EQ(table_.num_places_taken(), 0);
  Run(first);
  Run(third);
  EXPECT_FALSE(table_.MayRun(second));
  EXPECT_TRUE(table_.MayRun(first));
  EXPECT_TRUE(table_.MayRun(table_.adapters().at(kBaseAdapter)));
  End(first);
  EXPECT_TRUE(table_.MayRun(second));
  table_.MoveRequest(third, RequestList::kRunning, RequestList::kPreempted);
  EXPECT_EQ(table_.num_places_taken(), 1) << "a preempted request keeps its adapter's place";
  table_.MoveRequest(third, RequestList::kPreempted, RequestList::kNone);
  EXPECT_EQ(table_.num_places_taken(), 0);
  table_.MoveRequest(second, RequestList::kQueued, RequestList::kNone);
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
  EXPECT_THROW(table_.Drain(kBaseAdapter), AdapterNotFoundError);
  EXPECT_EQ(table_.adapters().size(), 1U);
}

}  // namespace
}  // namespace lora_serve
