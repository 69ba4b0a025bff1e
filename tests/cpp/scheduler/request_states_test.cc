#include "scheduler/request_states.h"

#include <gtest/gtest.h>

#include <fstream>
#include <functional>
#include <map>
#include <set>
#include <span>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "common/errors.h"
#include "kv_prefix_cache/kv_prefix_cache.h"

namespace lora_serve {
namespace {

constexpr std::int32_t kNumPages = 8;
constexpr std::int32_t kNumHostPages = 4;
constexpr std::int32_t kNumRows = 4;

/// Makes any state with real resources, and tells what is held.
class Resources {
 public:
  explicit Resources(bool use_adapter)
      : cache_({.page_size = 2, .num_device_pages = kNumPages, .num_host_pages = kNumHostPages}),
        rows_(kNumRows) {
    namespace_ = use_adapter ? cache_.OpenNamespace({}) : kBaseNamespace;
  }

  NamespaceHandle Handle() { return cache_.RetainNamespace(namespace_); }
  /// A loading lease takes four tokens from the host; the other finds nothing.
  request_event::Admit MakeAdmit(const NamespaceHandle& handle, bool is_loading = false) {
    if (is_loading) PutOnHost(handle);
    AcquireResult acquired = cache_.Acquire(handle, is_loading ? host_tokens_ : tokens_,
                                            {.max_cached_tokens = 4, .num_capacity_tokens = 5});
    return {.row = rows_.Take(), .lease = std::move(acquired.lease)};
  }
  RunningResources Running(bool is_loading = false) {
    RunningResources running;
    running.namespace_handle = Handle();
    request_event::Admit admit = MakeAdmit(running.namespace_handle, is_loading);
    running.row = std::move(admit.row);
    running.lease = std::move(admit.lease);
    return running;
  }
  RequestState Make(const std::string& name) {
    if (name == "Queued") return Queued{Handle()};
    if (name == "Loading") return Loading{Running(/*is_loading=*/true)};
    if (name == "Prefilling") return Prefilling{Running()};
    if (name == "Decoding") return Decoding{Running()};
    if (name == "Preempted") return Preempted{Handle()};
    if (name == "Aborting") return Aborting{Running()};
    if (name == "Finishing") return Finishing{Running()};
    if (name == "Finished") return Finished{};
    EXPECT_EQ(name, "Aborted");
    return Aborted{};
  }

  /// Ends the copies under way.
  void EndCopies(bool has_failed) {
    for (const TransferOrder& order : cache_.TakeTransferOrders()) under_way_.push_back(order.id);
    for (const TransferId id : std::exchange(under_way_, {})) {
      has_failed ? cache_.FailTransfer(id) : cache_.CompleteTransfer(id);
    }
  }
  /// Frees what only copies and the tree hold, so that what is held by states is left.
  void Settle() {
    EndCopies(/*has_failed=*/false);
    cache_.Evict(Tier::kDevice, kNumPages);
  }

  struct Held {
    std::int64_t num_handles = 0;
    std::int64_t num_leases = 0;
    std::int64_t num_pages = 0;
    std::int64_t num_rows = 0;
    bool operator==(const Held&) const = default;
  };
  [[nodiscard]] Held Count() const {
    const CacheStats stats = cache_.Stats();
    Held held{.num_pages = stats.num_device_pages - stats.num_free_pages,
              .num_rows = rows_.num_taken()};
    for (const NamespaceStats& ns : cache_.NamespaceStatsList()) {
      held.num_handles += ns.num_handles;
      held.num_leases += ns.num_leases;
    }
    return held;
  }

 private:
  void PutOnHost(const NamespaceHandle& handle) {
    AcquireResult acquired = cache_.Acquire(handle, host_tokens_, {.num_capacity_tokens = 4});
    cache_.Publish(acquired.lease, std::span(host_tokens_).first(4));
    static_cast<void>(cache_.StartWriteBack(acquired.lease));
    acquired.lease = Lease();
    Settle();
  }

  KVPrefixCache cache_;
  PageTableRows rows_;
  NamespaceId namespace_;
  std::vector<TokenId> tokens_ = {1, 2, 3, 4, 5};
  std::vector<TokenId> host_tokens_ = {6, 7, 8, 9, 10};
  std::vector<TransferId> under_way_;
};

constexpr Resources::Held kNothing{};
constexpr Resources::Held kWaiting{.num_handles = 1};
constexpr Resources::Held kRunning{
    .num_handles = 1, .num_leases = 1, .num_pages = 3, .num_rows = 1};

/// A failed load takes the pages away.
constexpr Resources::Held kCutBack{.num_handles = 1, .num_leases = 1, .num_rows = 1};

const std::map<std::string, Resources::Held> kHeldIn = {
    {"Queued", kWaiting},    {"Loading", kRunning},   {"Prefilling", kRunning},
    {"Decoding", kRunning},  {"Preempted", kWaiting}, {"Aborting", kRunning},
    {"Finishing", kRunning}, {"Finished", kNothing},  {"Aborted", kNothing}};

/// By state, then by event.
using Transitions = std::map<std::string, std::map<std::string, std::string>>;

/// The transition table of csrc/scheduler/README.md; every pair that is not here is illegal.
/// "AdmitLoading" is Admit with pages that are on their way.
const Transitions kTransitions = {
    {"Queued", {{"Admit", "Prefilling"}, {"AdmitLoading", "Loading"}, {"Abort", "Aborted"}}},
    {"Loading",
     {{"CompleteLoad", "Prefilling"},
      {"FailLoad", "Prefilling"},
      {"Preempt", "Preempted"},
      {"Abort", "Aborted"}}},
    {"Prefilling",
     {{"CompletePrefill", "Decoding"},
      {"Preempt", "Preempted"},
      {"AbortInPlan", "Aborting"},
      {"Abort", "Aborted"}}},
    {"Decoding",
     {{"Preempt", "Preempted"},
      {"AbortInPlan", "Aborting"},
      {"Abort", "Aborted"},
      {"FinishInPlan", "Finishing"},
      {"Finish", "Finished"}}},
    {"Preempted", {{"Admit", "Prefilling"}, {"AdmitLoading", "Loading"}, {"Abort", "Aborted"}}},
    {"Aborting", {{"Abort", "Aborted"}}},
    {"Finishing", {{"Finish", "Finished"}}},
    {"Finished", {}},
    {"Aborted", {}}};

/// The words in backticks.
std::vector<std::string> Quoted(const std::string& text) {
  std::vector<std::string> words;
  for (std::size_t begin = text.find('`'); begin != std::string::npos;
       begin = text.find('`', begin + 1)) {
    const std::size_t end = text.find('`', begin + 1);
    words.push_back(text.substr(begin + 1, end - begin - 1));
    begin = end;
  }
  return words;
}

/// The cells of a line of a Markdown table.
std::vector<std::string> Cells(const std::string& line) {
  std::vector<std::string> cells;
  std::istringstream stream(line.substr(1));
  for (std::string cell; std::getline(stream, cell, '|');) cells.push_back(cell);
  return cells;
}

/// By state, then by event: the states that the README names. What throws is left out.
using DocumentedTransitions = std::map<std::string, std::map<std::string, std::set<std::string>>>;

DocumentedTransitions ReadmeTransitions() {
  std::ifstream readme(SCHEDULER_README);
  EXPECT_TRUE(readme) << SCHEDULER_README;
  DocumentedTransitions documented;
  std::vector<std::string> header;
  for (std::string line; std::getline(readme, line);) {
    if (line.starts_with("| state | owns |")) {
      header = Cells(line);
    } else if (!header.empty() && !line.starts_with("|")) {
      break;
    } else if (!header.empty() && !line.starts_with("|---")) {
      const std::vector<std::string> cells = Cells(line);
      EXPECT_EQ(cells.size(), header.size()) << line;
      auto& of_state = documented[Quoted(cells.at(0)).at(0)];
      for (std::size_t column = 2; column < cells.size(); ++column) {
        const std::vector<std::string> next = Quoted(cells[column]);
        EXPECT_EQ(next.empty(), cells[column] == " throws ") << line;
        for (const std::string& event : Quoted(header[column])) {
          if (!next.empty()) of_state[event] = {next.begin(), next.end()};
        }
      }
    }
  }
  return documented;
}

class RequestStatesTest : public ::testing::TestWithParam<bool> {
 protected:
  Resources resources_{GetParam()};

  const std::map<std::string, std::function<void(RequestState&)>> events_ = {
      {"Admit",
       [this](RequestState& state) {
         const NamespaceHandle other = resources_.Handle();
         Apply(state, resources_.MakeAdmit(other));
       }},
      {"AdmitLoading",
       [this](RequestState& state) {
         const NamespaceHandle other = resources_.Handle();
         Apply(state, resources_.MakeAdmit(other, /*is_loading=*/true));
       }},
      {"CompleteLoad",
       [this](RequestState& state) {
         resources_.EndCopies(/*has_failed=*/false);
         Apply(state, request_event::CompleteLoad{});
       }},
      {"FailLoad",
       [this](RequestState& state) {
         resources_.EndCopies(/*has_failed=*/true);
         Apply(state, request_event::FailLoad{});
       }},
      {"CompletePrefill",
       [](RequestState& state) { Apply(state, request_event::CompletePrefill{}); }},
      {"Preempt", [](RequestState& state) { Apply(state, request_event::Preempt{}); }},
      {"AbortInPlan", [](RequestState& state) { Apply(state, request_event::AbortInPlan{}); }},
      {"Abort", [](RequestState& state) { Apply(state, request_event::Abort{}); }},
      {"FinishInPlan", [](RequestState& state) { Apply(state, request_event::FinishInPlan{}); }},
      {"Finish", [](RequestState& state) { Apply(state, request_event::Finish{}); }}};
};

TEST_P(RequestStatesTest, EveryPairOfStateAndEventMovesOrThrowsAsDocumented) {
  ASSERT_EQ(kTransitions.size(), std::variant_size_v<RequestState>);
  for (const auto& [name, transitions] : kTransitions) {
    for (const auto& [event, apply] : events_) {
      SCOPED_TRACE(name + " + " + event);
      {
        RequestState state = resources_.Make(name);
        ASSERT_EQ(StateName(state), name);
        ASSERT_EQ(resources_.Count(), kHeldIn.at(name));
        const auto next = transitions.find(event);
        if (next != transitions.end()) {
          apply(state);
          resources_.Settle();
          EXPECT_EQ(StateName(state), next->second);
          EXPECT_EQ(resources_.Count(), event == "FailLoad" ? kCutBack : kHeldIn.at(next->second));
        } else {
          try {
            apply(state);
            ADD_FAILURE() << "moved to " << StateName(state);
          } catch (const InternalError& error) {
            EXPECT_NE(std::string(error.what()).find("state " + name), std::string::npos)
                << error.what();
            const std::string event_name = event == "AdmitLoading" ? "Admit" : event;
            EXPECT_NE(std::string(error.what()).find("event " + event_name), std::string::npos)
                << error.what();
          }
          resources_.Settle();
          EXPECT_EQ(StateName(state), name);
          EXPECT_EQ(resources_.Count(), kHeldIn.at(name));
        }
      }
      resources_.Settle();
      EXPECT_EQ(resources_.Count(), kNothing) << "a destroyed state kept something";
    }
  }
}

TEST(RequestStatesReadmeTest, TheTableOfTheReadmeIsTheOneThatIsTested) {
  DocumentedTransitions tested;
  for (const auto& [state, transitions] : kTransitions) {
    auto& of_state = tested[state];
    for (const auto& [event, next] : transitions) {
      of_state[event == "AdmitLoading" ? "Admit" : event].insert(next);
    }
  }
  EXPECT_EQ(ReadmeTransitions(), tested);
}

TEST_P(RequestStatesTest, WhatIsComputedFollowsTheLeaseWhenALoadEnds) {
  for (const bool has_failed : {false, true}) {
    RequestState state = Queued{resources_.Handle()};
    const NamespaceHandle other = resources_.Handle();
    Apply(state, resources_.MakeAdmit(other, /*is_loading=*/true));
    EXPECT_EQ(std::get<Loading>(state).running.num_computed_tokens, 4);
    resources_.EndCopies(has_failed);
    if (has_failed) {
      Apply(state, request_event::FailLoad{});
    } else {
      Apply(state, request_event::CompleteLoad{});
    }
    const RunningResources& running = std::get<Prefilling>(state).running;
    EXPECT_EQ(running.num_computed_tokens, has_failed ? 0 : 4);
    EXPECT_EQ(running.num_planned_tokens, running.num_computed_tokens);
    EXPECT_EQ(running.lease.pages().size(), has_failed ? 0U : 3U);
  }
}

TEST_P(RequestStatesTest, ARefusedAdmissionLeavesTheOfferedResourcesWithTheCaller) {
  RequestState state = Finished{};
  const NamespaceHandle handle = resources_.Handle();
  request_event::Admit event = resources_.MakeAdmit(handle);
  EXPECT_THROW(Apply(state, std::move(event)), InternalError);
  EXPECT_TRUE(
      static_cast<bool>(event.row));  // NOLINT(bugprone-use-after-move): the point of the test
  EXPECT_TRUE(static_cast<bool>(event.lease));
}

INSTANTIATE_TEST_SUITE_P(BaseAndAdapter, RequestStatesTest, ::testing::Bool());

}  // namespace
}  // namespace lora_serve
