#include <gtest/gtest.h>

#include <cstdint>
#include <cstdlib>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "cache_operations.h"

// Random operations on KVPrefixCache and NaiveCache: after every one of them both have given the
// same answers and hold the same pages. One TEST for each kind of cache, so that ctest -j runs them
// side by side. LORA_SERVE_TEST_SEED and LORA_SERVE_TEST_OPERATIONS (for each TEST) choose another
// run; a failure prints the seed of its episode, and LORA_SERVE_TEST_SEED set to that repeats the
// episode at once.

namespace lora_serve {
namespace {

constexpr std::int64_t kNumOperations = 250'000;

// --- What must have happened, or the generator has gone blind ----------------------------------

constexpr std::string_view kOnEveryCache[] = {"acquired",
                                              "acquire hits",
                                              "no room",
                                              "acquire evicts",
                                              "extend",
                                              "publish keeps a duplicate",
                                              "evict a device page",
                                              "evict over quota",
                                              "evict of an adapter that is not resident",
                                              "drain with leases",
                                              "drain with pages",
                                              "drain again",
                                              "namespace ends with a handle",
                                              "namespace ends with a lease",
                                              "tell a stored page",
                                              "tell a removed page",
                                              "hint of a namespace that is gone"};
constexpr std::string_view kOnTwoTiers[] = {"load-back of pages",
                                            "complete a load-back",
                                            "complete a load-back without its lease",
                                            "fail a load-back",
                                            "fail a load-back without its lease",
                                            "a failed load-back drops what continues it",
                                            "in flight",
                                            "lease ends while loading",
                                            "a loading lease moves",
                                            "misuse of a loading lease",
                                            "write-back of pages",
                                            "write-back of a lease",
                                            "no write-back of a lease",
                                            "complete a write-back",
                                            "fail a write-back",
                                            "transfers end out of order",
                                            "a path in flight branches",
                                            "a lease ends inside a path in flight",
                                            "publish stops in front of pages in flight",
                                            "publish what only the host had",
                                            "evict a host page",
                                            "evict what the host has too",
                                            "drain with host pages",
                                            "drain with transfers",
                                            "a transfer ends in a draining namespace",
                                            "namespace ends with a transfer"};
constexpr std::string_view kOnSmallHost[] = {
    "extend without room", "write-back cut by lack of room", "write-back without room"};
constexpr std::string_view kWithReuse[] = {"hint of a cached prefix"};
constexpr std::string_view kOfWriteThrough[] = {
    "write-back of a note", "a note waits for a transfer", "a note replaces those of its prefixes",
    "a note is forgotten with a page"};
constexpr std::string_view kOfWriteBack[] = {
    "a copy of what the device could evict keeps its place", "write-back of a leaf",
    "a leaf on the host counts as room", "a leaf waits for a transfer",
    "a chosen leaf shares pages with another"};
constexpr std::string_view kWithState[] = {"attach a snapshot",
                                           "resume from a device snapshot",
                                           "acquire with a branching point behind the snapshot",
                                           "acquire without a slot",
                                           "evict a device snapshot",
                                           "a page takes its snapshot with it",
                                           "a lease drops its oldest snapshot",
                                           "a reserved slot is not needed",
                                           "no reservation without a slot",
                                           "no reservation where there is a snapshot",
                                           "lease ends with a reservation"};
constexpr std::string_view kWithStateOnTwoTiers[] = {
    "load-back of a snapshot alone",           "load-back of pages and a snapshot",
    "load-back of pages to a device snapshot", "write-back of snapshots",
    "write-back of snapshots alone",           "write-back without a slot",
    "a snapshot stays where its page goes",    "evict a host snapshot"};
using ExpectedCoverage = std::vector<std::span<const std::string_view>>;

void ExpectCoverage(const OperationCoverage& coverage, std::int64_t num_operations,
                    const ExpectedCoverage& expected) {
  for (const auto& [what, count] : coverage.counts()) {
    testing::Test::RecordProperty(std::string(what), std::to_string(count));
  }
  if (num_operations < 100'000) return;  // too few to expect what is rare
  for (const std::span<const std::string_view> group : expected) {
    for (const std::string_view what : group) {
      EXPECT_GE(coverage.CountOf(what), num_operations / 50'000) << what << " hardly ever happened";
    }
  }
}

// --- Running -----------------------------------------------------------------------------------

std::int64_t FromEnvironment(const char* name, std::int64_t otherwise) {
  const char* const value = std::getenv(name);
  return value == nullptr ? otherwise : std::strtoll(value, nullptr, 10);
}

using ConfigChooser = CacheOperationsConfig (*)(OperationChooser&);

void RunRandomly(ConfigChooser choose_config, const ExpectedCoverage& expected) {
  constexpr std::int64_t kEpisodeOperations = 1'000;
  const std::int64_t num_operations = FromEnvironment("LORA_SERVE_TEST_OPERATIONS", kNumOperations);
  auto seed = static_cast<std::uint64_t>(FromEnvironment("LORA_SERVE_TEST_SEED", 20'261'120));
  OperationCoverage coverage;
  for (std::int64_t done = 0; done < num_operations; done += kEpisodeOperations, ++seed) {
    SeededChooser chooser(seed);
    CacheOperations operations(choose_config(chooser), &chooser, &coverage);
    try {
      operations.Run(kEpisodeOperations);
      operations.Finish();
    } catch (const CacheDisagreement& disagreement) {
      FAIL() << "LORA_SERVE_TEST_SEED=" << seed << ": " << disagreement.what();
    }
  }
  ExpectCoverage(coverage, num_operations, expected);
}

// --- Kinds of caches ---------------------------------------------------------------------------

/// A small cache of one tier, in which everything can be resumed from.
CacheOperationsConfig SmallDevice(OperationChooser& chooser) {
  CacheOperationsConfig config;
  config.cache.page_size = 1 << chooser.Between(0, 2);
  config.cache.num_device_pages = chooser.Between(4, chooser.Chance(50) ? 16 : 64);
  config.alphabet = chooser.Between(1, 3);
  config.max_sequence_pages = chooser.Between(3, 10);
  config.max_requests = chooser.Between(3, 8);
  return config;
}

CacheOperationsConfig SmallTiers(OperationChooser& chooser, WritePolicy policy) {
  CacheOperationsConfig config = SmallDevice(chooser);
  config.cache.num_host_pages = chooser.Between(2, chooser.Chance(50) ? 12 : 64);
  config.cache.write_policy = policy;
  config.cache.write_back_watermark_pages = chooser.Between(1, config.cache.num_device_pages);
  return config;
}

/// A few hundred pages in both tiers: the expensive comparisons come less often.
CacheOperationsConfig LargeTiers(OperationChooser& chooser, WritePolicy policy) {
  CacheOperationsConfig config = SmallTiers(chooser, policy);
  config.cache.num_device_pages = chooser.Between(150, 300);
  config.cache.num_host_pages = chooser.Between(100, 300);
  config.cache.write_back_watermark_pages = chooser.Between(20, 150);
  config.alphabet = 3;
  config.max_sequence_pages = 40;
  config.comparison_interval = 16;
  config.invariants_interval = 256;
  return config;
}

CacheOperationsConfig WithState(CacheOperationsConfig config, OperationChooser& chooser) {
  config.max_requests = chooser.Between(2, 5);
  config.cache.num_device_state_slots = chooser.Between(2, 12);
  config.cache.max_snapshots_per_lease = chooser.Between(1, 4);
  if (config.cache.num_host_pages > 0) config.cache.num_host_state_slots = chooser.Between(1, 8);
  return config;
}

// --- Tests -------------------------------------------------------------------------------------

TEST(KVPrefixCacheRandomTest, SmallDeviceAlone) {
  RunRandomly(SmallDevice, {kOnEveryCache, kWithReuse});
}

TEST(KVPrefixCacheRandomTest, SmallTiersWithoutWritePolicy) {
  const ConfigChooser choose_config = [](OperationChooser& chooser) {
    return SmallTiers(chooser, WritePolicy::kOff);
  };
  RunRandomly(choose_config, {kOnEveryCache, kWithReuse, kOnTwoTiers, kOnSmallHost});
}

TEST(KVPrefixCacheRandomTest, SmallTiersWriteThrough) {
  const ConfigChooser choose_config = [](OperationChooser& chooser) {
    return SmallTiers(chooser, WritePolicy::kWriteThrough);
  };
  RunRandomly(choose_config,
              {kOnEveryCache, kWithReuse, kOnTwoTiers, kOnSmallHost, kOfWriteThrough});
}

TEST(KVPrefixCacheRandomTest, SmallTiersWriteBack) {
  const ConfigChooser choose_config = [](OperationChooser& chooser) {
    return SmallTiers(chooser, WritePolicy::kWriteBack);
  };
  RunRandomly(choose_config, {kOnEveryCache, kWithReuse, kOnTwoTiers, kOnSmallHost, kOfWriteBack});
}

TEST(KVPrefixCacheRandomTest, StateOnTheDevice) {
  const ConfigChooser choose_config = [](OperationChooser& chooser) {
    return WithState(SmallDevice(chooser), chooser);
  };
  RunRandomly(choose_config, {kOnEveryCache, kWithReuse, kWithState});
}

TEST(KVPrefixCacheRandomTest, StateWriteThrough) {
  const ConfigChooser choose_config = [](OperationChooser& chooser) {
    return WithState(SmallTiers(chooser, WritePolicy::kWriteThrough), chooser);
  };
  RunRandomly(choose_config, {kOnEveryCache, kWithReuse, kOnTwoTiers, kOnSmallHost, kOfWriteThrough,
                              kWithState, kWithStateOnTwoTiers});
}

TEST(KVPrefixCacheRandomTest, StateWriteBack) {
  const ConfigChooser choose_config = [](OperationChooser& chooser) {
    return WithState(SmallTiers(chooser, WritePolicy::kWriteBack), chooser);
  };
  RunRandomly(choose_config, {kOnEveryCache, kWithReuse, kOnTwoTiers, kOnSmallHost, kOfWriteBack,
                              kWithState, kWithStateOnTwoTiers});
}

TEST(KVPrefixCacheRandomTest, ReuseSwitchedOff) {
  const ConfigChooser choose_config = [](OperationChooser& chooser) {
    CacheOperationsConfig config = SmallTiers(chooser, WritePolicy::kWriteThrough);
    if (chooser.Chance(30)) config = WithState(config, chooser);
    config.cache.enable_prefix_reuse = false;
    if (chooser.Chance(20)) config.cache.window_layers = WindowLayers::kRingBuffer;
    return config;
  };
  RunRandomly(choose_config, {kOnEveryCache, kOnTwoTiers, kOnSmallHost, kOfWriteThrough});
}

TEST(KVPrefixCacheRandomTest, LargeTiersWriteThrough) {
  const ConfigChooser choose_config = [](OperationChooser& chooser) {
    return LargeTiers(chooser, WritePolicy::kWriteThrough);
  };
  RunRandomly(choose_config, {kOnEveryCache, kWithReuse, kOnTwoTiers, kOfWriteThrough});
}

TEST(KVPrefixCacheRandomTest, LargeTiersWriteBackWithState) {
  const ConfigChooser choose_config = [](OperationChooser& chooser) {
    return WithState(LargeTiers(chooser, WritePolicy::kWriteBack), chooser);
  };
  RunRandomly(choose_config, {kOnEveryCache, kWithReuse, kOnTwoTiers, kOfWriteBack, kWithState,
                              kWithStateOnTwoTiers});
}

TEST(KVPrefixCacheRandomTest, AnyConfiguration) {
  RunRandomly(ChooseAnyConfig, {kOnEveryCache, kWithReuse, kOnTwoTiers, kOnSmallHost, kWithState,
                                kWithStateOnTwoTiers});
}

}  // namespace
}  // namespace lora_serve
