#include "scheduler/request_states.h"

#include <gtest/gtest.h>

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "common/errors.h"
#include "kv_prefix_cache/kv_prefix_cache.h"

namespace lora_serve {
namespace {

constexpr std::int32_t kNumPages = 8;
constexpr std::int32_t kNumRows = 4;

/// Makes any state with real resources, and tells what is held.
class Resources {
 public:
  explicit Resources(bool use_adapter)
      : cache_({.page_size = 2, .num_device_pages = kNumPages}), rows_(kNumRows) {
    namespace_ = use_adapter ? cache_.OpenNamespace({}) : kBaseNamespace;
  }

  NamespaceHandle Handle() { return cache_.RetainNamespace(namespace_); }
  request_event::Admit MakeAdmit(const NamespaceHandle& handle) {
    return {.row = rows_.Take(),
            .lease = *cache_.Acquire(handle, tokens_,
                                     {.max_cached_tokens = 4, .num_capacity_tokens = 5})};
  }
  RunningResources Running() {
    RunningResources running;
    running.namespace_handle = Handle();
    request_event::Admit admit = MakeAdmit(running.namespace_handle);
    running.row = std::move(admit.row);
    running.lease = std::move(admit.lease);
    return running;
  }
  RequestState Make(const std::string& name) {
    if (name == "Queued") return Queued{Handle()};
    if (name == "Prefilling") return Prefilling{Running()};
    if (name == "Decoding") return Decoding{Running()};
    if (name == "Preempted") return Preempted{Handle()};
    if (name == "Aborting") return Aborting{Running()};
    if (name == "Finished") return Finished{};
    EXPECT_EQ(name, "Aborted");
    return Aborted{};
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
  KVPrefixCache cache_;
  PageTableRows rows_;
  NamespaceId namespace_;
  std::vector<TokenId> tokens_ = {1, 2, 3, 4, 5};
};

constexpr Resources::Held kNothing{};
constexpr Resources::Held kWaiting{.num_handles = 1};
constexpr Resources::Held kRunning{
    .num_handles = 1, .num_leases = 1, .num_pages = 3, .num_rows = 1};

const std::map<std::string, Resources::Held> kHeldIn = {
    {"Queued", kWaiting},    {"Prefilling", kRunning}, {"Decoding", kRunning},
    {"Preempted", kWaiting}, {"Aborting", kRunning},   {"Finished", kNothing},
    {"Aborted", kNothing}};

/// The transition table of csrc/scheduler/README.md; every pair that is not here is illegal.
const std::map<std::string, std::map<std::string, std::string>> kTransitions = {
    {"Queued", {{"Admit", "Prefilling"}, {"Abort", "Aborted"}}},
    {"Prefilling",
     {{"CompletePrefill", "Decoding"},
      {"Preempt", "Preempted"},
      {"AbortInPlan", "Aborting"},
      {"Abort", "Aborted"}}},
    {"Decoding",
     {{"Preempt", "Preempted"},
      {"AbortInPlan", "Aborting"},
      {"Abort", "Aborted"},
      {"Finish", "Finished"}}},
    {"Preempted", {{"Admit", "Prefilling"}, {"Abort", "Aborted"}}},
    {"Aborting", {{"Abort", "Aborted"}}},
    {"Finished", {}},
    {"Aborted", {}}};

class RequestStatesTest : public ::testing::TestWithParam<bool> {
 protected:
  Resources resources_{GetParam()};

  const std::map<std::string, std::function<void(RequestState&)>> events_ = {
      {"Admit",
       [this](RequestState& state) {
         const NamespaceHandle other = resources_.Handle();
         Apply(state, resources_.MakeAdmit(other));
       }},
      {"CompletePrefill",
       [](RequestState& state) { Apply(state, request_event::CompletePrefill{}); }},
      {"Preempt", [](RequestState& state) { Apply(state, request_event::Preempt{}); }},
      {"AbortInPlan", [](RequestState& state) { Apply(state, request_event::AbortInPlan{}); }},
      {"Abort", [](RequestState& state) { Apply(state, request_event::Abort{}); }},
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
          EXPECT_EQ(StateName(state), next->second);
          EXPECT_EQ(resources_.Count(), kHeldIn.at(next->second));
        } else {
          try {
            apply(state);
            ADD_FAILURE() << "moved to " << StateName(state);
          } catch (const InternalError& error) {
            EXPECT_NE(std::string(error.what()).find("state " + name), std::string::npos)
                << error.what();
            EXPECT_NE(std::string(error.what()).find("event " + event), std::string::npos)
                << error.what();
          }
          EXPECT_EQ(StateName(state), name);
          EXPECT_EQ(resources_.Count(), kHeldIn.at(name));
        }
      }
      EXPECT_EQ(resources_.Count(), kNothing) << "a destroyed state kept something";
    }
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
