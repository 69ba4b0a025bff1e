#include "scheduler/admission_order.h"

#include <gtest/gtest.h>

#include <vector>

#include "support/scheduler_parts.h"

namespace lora_serve {
namespace {

using Ids = std::vector<std::int64_t>;

constexpr std::int64_t kAgeingUs = 100;

class AdmissionOrderTest : public ::testing::Test {
 protected:
  static SchedulerOptions Options(SchedulingPolicy policy) {
    return {.page_size = 2,
            .num_device_pages = 64,
            .max_num_seqs = 32,
            .max_loras = 4,
            .scheduling_policy = policy,
            .priority_ageing_us = kAgeingUs};
  }
  static AdmissionOrder Order(SchedulingPolicy policy, const testing::SchedulerParts& parts) {
    return {Options(policy), &parts.cache};
  }
  /// The ids in the order in which they are tried when none can be admitted.
  static Ids Tried(AdmissionOrder& order, const std::vector<Adapter*>& adapters,
                   std::int64_t now_us = 0) {
    order.Begin(adapters, now_us);
    Ids ids;
    while (const Request* request = order.Next()) ids.push_back(request->id().value());
    return ids;
  }

  testing::SchedulerParts parts_{Options(SchedulingPolicy::kFair)};
  Adapter& base_ = parts_.adapters.base();
  Adapter& first_ = parts_.OpenResident(1);
  Adapter& second_ = parts_.OpenResident(2);
  const std::vector<Adapter*> all_ = {&base_, &first_, &second_};
};

TEST_F(AdmissionOrderTest, FcfsTriesEachRequestOnceInOrderOfArrival) {
  for (Adapter* adapter : {&second_, &base_, &first_, &second_, &base_}) parts_.Queue(*adapter);
  AdmissionOrder order = Order(SchedulingPolicy::kFcfs, parts_);
  EXPECT_EQ(Tried(order, all_), (Ids{0, 1, 2, 3, 4}));
  EXPECT_EQ(Tried(order, all_), (Ids{0, 1, 2, 3, 4})) << "a new step begins anew";
  EXPECT_EQ(Tried(order, {&second_}), (Ids{0, 3}));
}

TEST_F(AdmissionOrderTest, FairTriesTheQueueWithTheLeastServiceForItsWeight) {
  parts_.adapters.SetWeight(AdapterId(2), 4.0);
  for (Adapter* adapter : all_) parts_.Queue(*adapter);
  AdapterTable::Charge(base_, 10);
  AdapterTable::Charge(first_, 5);
  AdapterTable::Charge(second_, 16);  // as 4 of weight 1
  AdmissionOrder order = Order(SchedulingPolicy::kFair, parts_);
  EXPECT_EQ(Tried(order, all_), (Ids{2, 1, 0}));
}

TEST_F(AdmissionOrderTest, FairGoesByWhatTheAdmissionsOfTheStepHaveChargedAlready) {
  for (int count = 0; count < 2; ++count) {
    for (Adapter* adapter : {&first_, &second_}) parts_.Queue(*adapter);
  }
  AdmissionOrder order = Order(SchedulingPolicy::kFair, parts_);
  order.Begin(all_, 0);
  Ids admitted;
  while (Request* request = order.Next()) {
    admitted.push_back(request->id().value());
    AdapterTable::Charge(request->adapter(), 2);
    order.OnAdmitted(*request);
    parts_.Start(*request);
  }
  EXPECT_EQ(admitted, (Ids{0, 1, 2, 3}));
}

TEST_F(AdmissionOrderTest, FairTriesBetterClassesFirstUntilWaitingHasMadeUpForThem) {
  parts_.Queue(first_, {.priority = 2, .arrival_us = 0});
  parts_.Queue(second_, {.priority = 0, .arrival_us = 0});
  AdapterTable::Charge(second_, 100);
  AdmissionOrder order = Order(SchedulingPolicy::kFair, parts_);
  EXPECT_EQ(Tried(order, all_, 2 * kAgeingUs - 1), (Ids{1, 0}));
  EXPECT_EQ(Tried(order, all_, 2 * kAgeingUs), (Ids{0, 1})) << "now it goes by service";
}

TEST_F(AdmissionOrderTest, AClosedAdapterGoesFirstWithItsTurnAndThenNotAtAll) {
  parts_.QueueAndStart(second_);
  for (int count = 0; count < 2; ++count) {
    for (Adapter* adapter : {&first_, &second_}) parts_.Queue(*adapter);
  }
  AdapterTable::Charge(second_, 100);
  second_.is_closed = true;
  second_.num_turn_requests = 1;
  for (const SchedulingPolicy policy :
       {SchedulingPolicy::kFair, SchedulingPolicy::kFcfs, SchedulingPolicy::kLpm}) {
    AdmissionOrder order = Order(policy, parts_);
    order.Begin(all_, 0);
    Request* request = order.Next();
    ASSERT_NE(request, nullptr);
    EXPECT_EQ(&request->adapter(), &second_);
    second_.num_turn_requests = 0;  // what its admission does
    while (Request* next = order.Next()) EXPECT_EQ(&next->adapter(), &first_);
    second_.num_turn_requests = 1;
  }
}

TEST_F(AdmissionOrderTest, LpmTriesTheLongestCachedPrefixAndPassesTheEldestABoundedNumberOfTimes) {
  const std::vector<TokenId> cached(8, 7);
  {
    const NamespaceHandle handle = parts_.cache.RetainNamespace(first_.namespace_id);
    AcquireResult acquired = parts_.cache.Acquire(handle, cached, {.num_capacity_tokens = 8});
    parts_.cache.Publish(acquired.lease, cached);
  }
  Request& eldest = parts_.Queue(first_);
  AdmissionOrder order = Order(SchedulingPolicy::kLpm, parts_);
  for (std::int32_t count = 0; count < AdmissionOrder::kMaxTimesOvertaken; ++count) {
    Request& cheap = parts_.Queue(first_, {.prompt_token_ids = cached});
    order.Begin(all_, 0);
    ASSERT_EQ(order.Next(), &cheap) << "step " << count;
    order.OnAdmitted(cheap);
    parts_.Start(cheap);
    parts_.End(cheap);
    EXPECT_EQ(eldest.num_times_overtaken, count + 1);
  }
  parts_.Queue(first_, {.prompt_token_ids = cached});
  order.Begin(all_, 0);
  EXPECT_EQ(order.Next(), &eldest);
}

TEST_F(AdmissionOrderTest, LpmComparesOnlyTheMostSenior) {
  const auto window = static_cast<std::int64_t>(AdmissionOrder::kLpmWindow);
  for (std::int64_t count = 0; count < window + 5; ++count) parts_.Queue(base_);
  AdmissionOrder order = Order(SchedulingPolicy::kLpm, parts_);
  const Ids tried = Tried(order, all_);
  ASSERT_EQ(std::ssize(tried), window);
  EXPECT_EQ(tried.front(), 0);
  EXPECT_EQ(tried.back(), window - 1);
}

}  // namespace
}  // namespace lora_serve
