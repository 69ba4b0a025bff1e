// Isolation domains: who shares prefixes with whom, and what is left of domains that are not used
// any more.
#include <gtest/gtest.h>

#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include "support/scheduler_harness.h"
#include "support/trivial_executor.h"

namespace lora_serve {
namespace {

using testing::MakePrompt;
using testing::Overlap;
using testing::SchedulerHarness;
using testing::TrivialExecutor;

class SchedulerDomainsTest : public ::testing::TestWithParam<std::int64_t> {
 protected:
  AdapterId adapter() const { return AdapterId(GetParam()); }

  /// Cached tokens of a request that runs alone to its end.
  std::int32_t Run(const std::string& domain, const std::vector<TokenId>& prompt) {
    const std::int64_t id = next_id_++;
    harness_.Add({.request_id = RequestId(id),
                  .adapter_id = adapter(),
                  .isolation_domain = domain,
                  .prompt_token_ids = prompt,
                  .max_tokens = 2});
    harness_.RunToEnd();
    harness_.Step();  // what is to be copied to the host
    return harness_.request(id).num_cached_tokens;
  }

  SchedulerHarness harness_{
      {.page_size = 4, .num_device_pages = 16, .max_model_len = 32, .num_host_pages = 8}};
  std::int64_t next_id_ = 1;
};
INSTANTIATE_TEST_SUITE_P(BaseAndAdapter, SchedulerDomainsTest, ::testing::Values(0, 1));

TEST_P(SchedulerDomainsTest, SharesPrefixesWithinADomainAndWithNobodyElse) {
  harness_.OpenAndLoad(adapter());
  const std::vector<TokenId> prompt = MakePrompt(13);
  EXPECT_EQ(Run("acme", prompt), 0);
  EXPECT_EQ(Run("acme", prompt), 12);
  EXPECT_EQ(Run("", prompt), 0) << "the default domain is one, too";
  EXPECT_EQ(Run("bolt", prompt), 0);
  EXPECT_EQ(Run("acm", prompt), 0) << "a name that begins alike is another name";
  EXPECT_EQ(Run(std::string("acme\0x", 6), prompt), 0) << "names are bytes, not C strings";
  EXPECT_EQ(Run("bolt", prompt), 12);
}

TEST_P(SchedulerDomainsTest, CountsOfAnAdapterAreThoseOfAllItsDomains) {
  harness_.OpenAndLoad(adapter());
  Run("acme", MakePrompt(13));
  Run("acme", MakePrompt(13));
  Run("bolt", MakePrompt(9));
  const AdapterStats stats = harness_.StatsOf(adapter());
  EXPECT_EQ(stats.num_tree_pages, 3 + 2);
  EXPECT_EQ(stats.num_hit_tokens, 12);
  EXPECT_EQ(stats.num_missed_tokens, 13 + 1 + 9);
}

TEST_P(SchedulerDomainsTest, EventsOfEveryDomainDifferInTheirHashesAndSayWhatIsPrivate) {
  harness_.OpenAndLoad(adapter());
  harness_.scheduler().SetEventsEnabled(true);
  std::set<std::uint64_t> hashes;
  for (const std::string domain : {"", "acme", "bolt"}) {
    Run(domain, MakePrompt(5));
    for (const AdapterKVEvent& event : harness_.scheduler().TakeEvents()) {
      EXPECT_EQ(event.adapter_id, adapter());
      EXPECT_EQ(event.is_private, !domain.empty());
      if (event.event.tier != Tier::kDevice) continue;
      hashes.insert(event.event.page_hashes.begin(), event.event.page_hashes.end());
    }
  }
  EXPECT_EQ(hashes.size(), 3u) << "one page each";
}

TEST_P(SchedulerDomainsTest, CountsStayWhenDomainsThatNobodyUsesAreDropped) {
  harness_.OpenAndLoad(adapter());
  std::int64_t num_missed = 0;
  for (int domain = 0; domain < 300; ++domain) {
    EXPECT_EQ(Run("domain-" + std::to_string(domain), MakePrompt(13)), 0);
    num_missed += 13;
    EXPECT_EQ(harness_.StatsOf(adapter()).num_missed_tokens, num_missed);
  }
}

TEST_P(SchedulerDomainsTest, ADomainThatHasPagesSurvivesManyOthersWithoutAny) {
  harness_.OpenAndLoad(adapter());
  Run("acme", MakePrompt(13));
  for (int domain = 0; domain < 300; ++domain) {
    Run("domain-" + std::to_string(domain), MakePrompt(2));  // less than a page
  }
  EXPECT_EQ(Run("acme", MakePrompt(13)), 12);
}

TEST_P(SchedulerDomainsTest, ADomainWithARunningRequestSurvivesManyOthersAndPublishes) {
  harness_.OpenAndLoad(adapter());
  const std::vector<TokenId> prompt = MakePrompt(3);  // no page of its own until it has an answer
  harness_.Add({.request_id = RequestId(1000),
                .adapter_id = adapter(),
                .isolation_domain = "acme",
                .prompt_token_ids = prompt,
                .max_tokens = 4});
  for (std::int64_t id = 1; id <= 150; ++id) {
    harness_.Add({.request_id = RequestId(id),
                  .adapter_id = adapter(),
                  .isolation_domain = "domain-" + std::to_string(id),
                  .prompt_token_ids = MakePrompt(2),
                  .max_tokens = 1});
    if (id % 50 == 0) harness_.Abort(id);
  }
  harness_.RunToEnd();
  std::vector<TokenId> longer = prompt;
  const std::vector<TokenId>& output = harness_.request(1000).output;
  longer.insert(longer.end(), output.begin(), output.end());
  EXPECT_EQ(Run("acme", longer), 4);
}

TEST(SchedulerManyDomainsTest, OfMoreIdleDomainsThanAreKeptTheLeastRecentlyUsedGo) {
  Scheduler scheduler({.page_size = 4, .num_device_pages = 20000, .max_model_len = 32});
  TrivialExecutor executor(&scheduler, Overlap::kOff);
  std::int64_t next_id = 0;
  const auto run = [&](std::int64_t domain) {
    scheduler.AddRequest({.request_id = RequestId(next_id++),
                          .isolation_domain = "domain-" + std::to_string(domain),
                          .prompt_token_ids = MakePrompt(5),
                          .max_tokens = 1});
    const std::int32_t num_cached = executor.Step().num_cached_tokens.front();
    while (scheduler.HasWork()) executor.Step();
    return num_cached;
  };
  constexpr std::int64_t kNumDomains = 10000;
  for (std::int64_t domain = 0; domain < kNumDomains; ++domain) {
    ASSERT_EQ(run(domain), 0);
    if (domain > 0 && domain % 1000 == 0) {
      ASSERT_EQ(run(0), 4) << "it is used again and again";
    }
  }
  EXPECT_LE(scheduler.Stats().num_tree_pages, 4096);
  EXPECT_EQ(run(kNumDomains - 1), 4);
  EXPECT_EQ(run(1), 0);
  scheduler.CheckInvariants();
}

TEST(SchedulerDomainsDrainTest, ADrainFreesThePagesOfEveryDomain) {
  SchedulerHarness harness({.page_size = 4, .num_device_pages = 16, .max_model_len = 32});
  const AdapterId adapter(1);
  harness.OpenAndLoad(adapter);
  for (std::int64_t id = 1; id <= 3; ++id) {
    harness.Add({.request_id = RequestId(id),
                 .adapter_id = adapter,
                 .isolation_domain = "tenant-" + std::to_string(id),
                 .prompt_token_ids = MakePrompt(9),
                 .max_tokens = 2});
  }
  harness.RunToEnd();
  EXPECT_EQ(harness.StatsOf(adapter).num_tree_pages, 6);
  harness.Add({.request_id = RequestId(4),
               .adapter_id = adapter,
               .isolation_domain = "tenant-1",
               .prompt_token_ids = MakePrompt(9),
               .max_tokens = 6});
  harness.Step();
  harness.scheduler().DrainAdapter(adapter);
  harness.Step();
  EXPECT_FALSE(harness.drained().contains(adapter)) << "one of its requests runs";
  harness.RunToEnd();
  harness.Step();
  EXPECT_TRUE(harness.drained().contains(adapter));
  EXPECT_EQ(harness.scheduler().Stats().num_free_pages, 16);
  harness.scheduler().CheckInvariants();
}

}  // namespace
}  // namespace lora_serve
