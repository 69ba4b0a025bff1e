#include <random>

#include "cache_scenario.h"

// Two tensor-parallel ranks fed the same calls decide the same, whatever their memory looks like
// (PITFALLS 12).

namespace lora_serve {
namespace {

/// One "rank": a cache, and allocations in between that give its nodes other addresses.
struct Rank {
  explicit Rank(std::size_t num_padding_bytes)
      : padding_bytes(num_padding_bytes), cache({.page_size = 1, .num_device_pages = 24}) {}

  void Scatter() { padding.push_back(std::vector<char>(padding_bytes)); }

  std::size_t padding_bytes;
  std::vector<std::vector<char>> padding;
  KVPrefixCache cache;
  std::vector<NamespaceHandle> handles;
  std::vector<std::optional<Lease>> leases;
};

Tokens RandomTokens(std::mt19937_64& random) {
  Tokens tokens(1 + random() % 10);
  for (TokenId& token : tokens) token = static_cast<TokenId>(random() % 3);
  return tokens;
}

/// One random call; what it answered.
std::vector<std::int64_t> Step(Rank& rank, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  rank.Scatter();
  const std::uint64_t choice = random() % 10;
  std::optional<Lease>& lease = rank.leases[random() % rank.leases.size()];
  const Tokens tokens = RandomTokens(random);
  const auto num_tokens = static_cast<std::int32_t>(tokens.size());
  if (choice < 6) {
    lease.reset();
    lease =
        rank.cache.Acquire(rank.handles[random() % rank.handles.size()], tokens,
                           {.max_cached_tokens = num_tokens, .num_capacity_tokens = num_tokens});
    if (lease) rank.cache.Publish(*lease, tokens);
  } else if (choice < 9) {
    lease.reset();
  } else {
    rank.cache.Evict(static_cast<std::int64_t>(random() % 4));
  }
  std::vector<std::int64_t> answer{rank.cache.Stats().num_nodes,
                                   rank.cache.Stats().num_evicted_pages};
  if (lease) {
    for (const PageId page : lease->pages()) answer.push_back(page.value());
  }
  return answer;
}

TEST(DeterminismTest, TwoRanksGiveTheSamePagesAndEvictTheSame) {
  Rank first(8);
  Rank second(1000);
  for (Rank* const rank : {&first, &second}) {
    for (int i = 0; i < 4; ++i) {
      rank->handles.push_back(
          rank->cache.RetainNamespace(i == 0 ? kBaseNamespace : rank->cache.OpenNamespace({})));
      rank->leases.emplace_back();
    }
  }
  for (std::uint64_t seed = 0; seed < 5000; ++seed) {
    ASSERT_EQ(Step(first, seed), Step(second, seed)) << "at call " << seed;
  }
  EXPECT_GT(first.cache.Stats().num_evicted_pages, 1000);
}

}  // namespace
}  // namespace lora_serve
