// The oracle executor refuses what a real one would do wrong without noticing: otherwise the tests
// that rely on it could not fail.
#include "support/oracle_executor.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "support/tracked_request.h"

namespace lora_serve::testing {
namespace {

using Ints = std::vector<std::int32_t>;
using Ids = std::vector<std::int64_t>;

constexpr SchedulerOptions kOptions = {
    .page_size = 2, .num_device_pages = 8, .max_num_seqs = 4, .num_host_pages = 4};

struct FakeRow {
  std::int64_t request_id = 0;
  std::int32_t page_table_row = 0;
  std::int32_t num_computed = 0;
  Ints tokens;
  std::int32_t adapter_slot = -1;
  /// Pages that the row of the page table gets, from entry `delta_start` on.
  Ints new_pages = {};
  std::int32_t delta_start = 0;
};

void Fill(ExecutionPlan& plan, PlanArrays::View array, const Ints& values) {
  std::ranges::copy(values, plan.Writable(array).begin());
}

ExecutionPlan MakePlan(std::int64_t plan_id, const std::vector<FakeRow>& rows) {
  ExecutionPlan plan;
  plan.plan_id = plan_id;
  plan.transfer_offsets = {0};
  Ints page_table_rows, num_scheduled, num_computed, slots, tokens;
  Ints delta_rows, delta_starts, delta_pages, delta_offsets = {0};
  for (const FakeRow& row : rows) {
    plan.request_ids.push_back(row.request_id);
    plan.samples_token.push_back(1);
    page_table_rows.push_back(row.page_table_row);
    num_scheduled.push_back(static_cast<std::int32_t>(row.tokens.size()));
    num_computed.push_back(row.num_computed);
    slots.push_back(row.adapter_slot);
    tokens.insert(tokens.end(), row.tokens.begin(), row.tokens.end());
    if (row.new_pages.empty()) continue;
    delta_rows.push_back(row.page_table_row);
    delta_starts.push_back(row.delta_start);
    delta_pages.insert(delta_pages.end(), row.new_pages.begin(), row.new_pages.end());
    delta_offsets.push_back(static_cast<std::int32_t>(delta_pages.size()));
  }
  const auto num_rows = static_cast<std::int32_t>(rows.size());
  const auto num_tokens = static_cast<std::int32_t>(tokens.size());
  plan.LayOut({.num_groups = 2,
               .num_rows = num_rows,
               .num_padded_rows = num_rows,
               .num_tokens = num_tokens,
               .num_padded_tokens = num_tokens,
               .num_deltas = static_cast<std::int32_t>(delta_rows.size()),
               .num_delta_pages = static_cast<std::int32_t>(delta_pages.size())});
  Fill(plan, plan.page_table_rows, page_table_rows);
  Fill(plan, plan.num_scheduled_tokens, num_scheduled);
  Fill(plan, plan.num_computed_tokens, num_computed);
  Fill(plan, plan.adapter_slots, slots);
  Fill(plan, plan.token_ids, tokens);
  Fill(plan, plan.delta_rows, delta_rows);
  Fill(plan, plan.delta_starts, delta_starts);
  Fill(plan, plan.delta_offsets, delta_offsets);
  Fill(plan, plan.delta_pages, delta_pages);
  return plan;
}

void AddCopy(ExecutionPlan& plan, std::int64_t id, bool is_load_back, std::int32_t source,
             std::int32_t destination) {
  plan.transfer_ids.push_back(id);
  plan.transfer_kinds.push_back(is_load_back ? 1 : 0);
  plan.transfer_source_pages.push_back(source);
  plan.transfer_destination_pages.push_back(destination);
  plan.transfer_offsets.push_back(static_cast<std::int32_t>(plan.transfer_source_pages.size()));
}

ExecutionPlan MakeLoadPlan(std::int64_t plan_id, std::int64_t adapter, std::int32_t slot) {
  ExecutionPlan plan = MakePlan(plan_id, {});
  plan.load_adapter_ids = {adapter};
  plan.load_adapter_slots = {slot};
  return plan;
}

/// What is refused, as the message of the error.
std::string Refusal(const std::function<void()>& call) {
  try {
    call();
  } catch (const std::logic_error& error) {
    return error.what();
  }
  return "nothing was refused";
}

void ExpectRefusal(const std::function<void()>& call, const std::string& part) {
  const std::string refusal = Refusal(call);
  EXPECT_NE(refusal.find(part), std::string::npos) << refusal;
}

/// Plan 0 is outstanding: request 1 writes pages 3 and 4, request 2 reads page 5 and writes page 6.
class OracleExecutorTest : public ::testing::Test {
 protected:
  void SetUp() override {
    executor_.Submit(first_);
    executor_.Collect();
    executor_.Submit(outstanding_);
  }

  OracleExecutor executor_{kOptions};
  const Ints prompt_ = MakeLongRunningPrompt(kBaseAdapter, 3, 2, 1);
  const ExecutionPlan first_ =
      MakePlan(0, {{.request_id = 2, .page_table_row = 1, .tokens = {7, 8}, .new_pages = {5}}});
  const ExecutionPlan outstanding_ =
      MakePlan(1, {{.request_id = 1, .page_table_row = 0, .tokens = prompt_, .new_pages = {3, 4}},
                   {.request_id = 2,
                    .page_table_row = 1,
                    .num_computed = 2,
                    .tokens = {9},
                    .new_pages = {6},
                    .delta_start = 1}});
};

TEST_F(OracleExecutorTest, APageThatAnOutstandingPlanWritesGoesToNobodyElse) {
  const ExecutionPlan plan =
      MakePlan(2, {{.request_id = 3, .page_table_row = 2, .tokens = {1}, .new_pages = {4}}});
  ExpectRefusal([&] { executor_.Submit(plan); }, "device page 4 goes to request 3 while plan 1");
}

TEST_F(OracleExecutorTest, APageThatAnOutstandingPlanReadsIsNotWrittenForAnother) {
  const ExecutionPlan plan =
      MakePlan(2, {{.request_id = 3, .page_table_row = 2, .tokens = {1}, .new_pages = {5}}});
  ExpectRefusal([&] { executor_.Submit(plan); }, "device page 5 is written for request 3 while");
}

TEST_F(OracleExecutorTest, APageThatAnOutstandingPlanReadsMayBeReadByOthers) {
  const ExecutionPlan plan = MakePlan(2, {{.request_id = 3,
                                           .page_table_row = 2,
                                           .num_computed = 2,
                                           .tokens = {1},
                                           .new_pages = {5, 7}}});
  executor_.Submit(plan);
}

TEST_F(OracleExecutorTest, APageMayBeReusedOnceItsPlanHasReturned) {
  executor_.Collect();
  const ExecutionPlan plan =
      MakePlan(2, {{.request_id = 3, .page_table_row = 2, .tokens = {1}, .new_pages = {4}}});
  executor_.Submit(plan);
}

TEST_F(OracleExecutorTest, APageThatAnOutstandingPlanTouchesIsNoTargetOfALoad) {
  for (const std::int32_t page : {3, 4, 5, 6}) {
    OracleExecutor executor{kOptions};
    executor.Submit(first_);
    executor.Collect();
    ExecutionPlan write_back = MakePlan(1, {});
    AddCopy(write_back, 0, /*is_load_back=*/false, 5, 0);
    executor.Submit(write_back);
    executor.Collect();
    ExecutionPlan later = outstanding_;
    later.plan_id = 2;
    executor.Submit(later);
    ExecutionPlan load_back = MakePlan(3, {});
    AddCopy(load_back, 1, /*is_load_back=*/true, 0, page);
    ExpectRefusal([&] { executor.Submit(load_back); }, "device page " + std::to_string(page));
  }
}

TEST_F(OracleExecutorTest, APageThatAnOutstandingPlanWritesIsNoSourceOfACopy) {
  ExecutionPlan plan = MakePlan(2, {});
  AddCopy(plan, 0, /*is_load_back=*/false, 3, 0);
  EXPECT_NE(Refusal([&] { executor_.Submit(plan); }), "nothing was refused");
}

TEST_F(OracleExecutorTest, ARowIsNotPlannedOnAPageThatIsCopied) {
  executor_.Collect();
  ExecutionPlan plan = MakePlan(2, {{.request_id = 3,
                                     .page_table_row = 2,
                                     .num_computed = 2,
                                     .tokens = {1},
                                     .new_pages = {5, 7}}});
  AddCopy(plan, 0, /*is_load_back=*/false, 5, 0);
  executor_.Submit(plan);  // reads only
  ExecutionPlan writing = MakePlan(
      3,
      {{.request_id = 4, .page_table_row = 3, .num_computed = 1, .tokens = {1}, .new_pages = {5}}});
  ExpectRefusal([&] { executor_.Submit(writing); }, "device page 5");
}

TEST_F(OracleExecutorTest, ARowOfThePageTableIsNotReusedBeforeItsPlanReturns) {
  const ExecutionPlan plan =
      MakePlan(2, {{.request_id = 3, .page_table_row = 0, .tokens = {1}, .new_pages = {7}}});
  ExpectRefusal([&] { executor_.Submit(plan); }, "page-table row 0 goes to request 3");
}

TEST_F(OracleExecutorTest, AtMostTwoPlansAreOutstandingAndTheyReturnInOrder) {
  const ExecutionPlan second = MakePlan(2, {});
  const ExecutionPlan third = MakePlan(3, {});
  executor_.Submit(second);
  ExpectRefusal([&] { executor_.Submit(third); }, "more than two plans");
  EXPECT_EQ(executor_.Collect().plan_id, 1);
  EXPECT_EQ(executor_.Collect().plan_id, 2);
  ExpectRefusal([&] { executor_.Collect(); }, "no plan is outstanding");
}

TEST_F(OracleExecutorTest, ATokenThatIsNotKnownIsTheOneThatItsRequestSampledLast) {
  const ExecutionPlan next =
      MakePlan(2, {{.request_id = 1, .page_table_row = 0, .num_computed = 3, .tokens = {-1}}});
  executor_.Submit(next);
  const TokenId first = executor_.Collect().sampled_token_ids[0];
  const TokenId second = executor_.Collect().sampled_token_ids[0];
  const std::vector<TokenId> alone = OracleExecutor::RunAlone(kBaseAdapter, prompt_, 2);
  EXPECT_EQ((Ints{first, second}), alone);
  const ExecutionPlan other =
      MakePlan(3, {{.request_id = 3, .page_table_row = 0, .tokens = {-1}, .new_pages = {3}}});
  executor_.Submit(other);
  ExpectRefusal([&] { executor_.Collect(); }, "sampled none before");
}

class OracleAdaptersTest : public ::testing::Test {
 protected:
  /// Adapter 9 is in slot 0, and plan 1, which uses it, is outstanding.
  void Load() {
    executor_.Submit(load_);
    EXPECT_EQ(executor_.Collect().loaded_adapter_ids, Ids{9});
    executor_.Submit(outstanding_);
  }

  OracleExecutor executor_{kOptions};
  const ExecutionPlan load_ = MakeLoadPlan(0, 9, 0);
  const ExecutionPlan outstanding_ = MakePlan(
      1,
      {{.request_id = 1, .page_table_row = 0, .tokens = {1}, .adapter_slot = 0, .new_pages = {3}}});
};

TEST_F(OracleAdaptersTest, ASlotIsNotEmptiedWhileAnOutstandingPlanUsesIt) {
  for (const bool is_drained : {false, true}) {
    OracleExecutor executor{kOptions};
    executor.Submit(load_);
    executor.Collect();
    executor.Submit(outstanding_);
    ExecutionPlan plan = MakePlan(2, {});
    (is_drained ? plan.drained_adapter_ids : plan.evicted_adapter_ids) = {9};
    ExpectRefusal([&] { executor.Submit(plan); }, "adapter slot 0 is emptied while plan 1");
  }
}

TEST_F(OracleAdaptersTest, ASlotIsNotLoadedOverAndAnAdapterNotTwice) {
  Load();
  const ExecutionPlan other = MakeLoadPlan(2, 8, 0);
  ExpectRefusal([&] { executor_.Submit(other); }, "adapter slot 0 is loaded while plan 1");
  executor_.Collect();
  ExpectRefusal([&] { executor_.Submit(other); }, "slot 0 is in use");
  const ExecutionPlan again = MakeLoadPlan(2, 9, 1);
  ExpectRefusal([&] { executor_.Submit(again); }, "adapter 9 is loaded twice");
}

TEST_F(OracleAdaptersTest, NoRowUsesASlotBeforeItsLoadWasReported) {
  executor_.load_outcome = [](AdapterId) { return Outcome::kUnderWay; };
  executor_.Submit(load_);
  EXPECT_TRUE(executor_.Collect().loaded_adapter_ids.empty());
  ExpectRefusal([&] { executor_.Submit(outstanding_); }, "nothing is loaded in adapter slot 0");
  executor_.load_outcome = nullptr;
  EXPECT_EQ(executor_.Report().loaded_adapter_ids, Ids{9});
}

TEST_F(OracleAdaptersTest, TheEventOfAPlanReportsNoLoadOfALaterOne) {
  const ExecutionPlan empty = MakePlan(0, {});
  const ExecutionPlan load = MakeLoadPlan(1, 9, 0);
  executor_.Submit(empty);
  executor_.Submit(load);
  EXPECT_TRUE(executor_.Collect().loaded_adapter_ids.empty());
  EXPECT_EQ(executor_.Collect().loaded_adapter_ids, Ids{9});
}

TEST_F(OracleAdaptersTest, RowsOfThePlanThatLoadsAStagedAdapterUseItAndGiveGarbageIfThatFails) {
  for (const bool has_failed : {false, true}) {
    OracleExecutor executor{kOptions};
    executor.staged = {AdapterId(9)};
    executor.load_outcome = [&](AdapterId) {
      return has_failed ? Outcome::kFailed : Outcome::kUnderWay;
    };
    ExecutionPlan plan = MakePlan(0, {{.request_id = 1,
                                       .page_table_row = 0,
                                       .tokens = {1},
                                       .adapter_slot = 0,
                                       .new_pages = {3}}});
    plan.load_adapter_ids = {9};
    plan.load_adapter_slots = {0};
    executor.Submit(plan);
    const ExecutionEvent event = executor.Collect();
    EXPECT_EQ(event.loaded_adapter_ids, has_failed ? Ids{} : Ids{9});
    EXPECT_EQ(event.failed_adapter_ids, has_failed ? Ids{9} : Ids{});
    const std::vector<TokenId> alone = OracleExecutor::RunAlone(AdapterId(9), Ints{1}, 1);
    EXPECT_EQ(event.sampled_token_ids == alone, !has_failed);
    EXPECT_EQ(executor.IsLoaded(AdapterId(9)), !has_failed);
  }
}

}  // namespace
}  // namespace lora_serve::testing
