#include <benchmark/benchmark.h>

#include <iostream>
#include <string>

#include "common/check.h"
#include "page_hash_map.h"
#include "page_hashes.h"
#include "workload.h"

// Radix tree or hash chain: the same prompts, matched by each.
//
//   radix_tree        Probe: compares tokens, hashes the first page of each edge
//   <hash>            hashes the prompt page by page and looks each hash up, until one is unknown
//   <hash>_hashed     only the look-ups, for a prompt that keeps its hashes from an earlier match

namespace lora_serve::bench {
namespace {

enum class Workload {
  kLongPrompt,      // one cached prompt of 16,384 tokens, in one edge of the tree
  kBranchedPrompt,  // the same prompt, along 1,024 nodes of the tree
  kSharedPrefixes,  // 1,000 prompts of 2,048 tokens; every second one was computed before
};

/// The prompts of one workload, and which of them are cached.
struct Prompts {
  std::vector<Tokens> wanted;
  std::vector<std::size_t> cached;
  std::int64_t num_nodes_each = 1;
};

Prompts PromptsOf(Workload workload) {
  Prompts prompts;
  if (workload == Workload::kSharedPrefixes) {
    prompts.wanted = SharedPrefixPrompts(Sized(1000, 20));
    for (std::size_t i = 0; i < prompts.wanted.size(); i += 2) prompts.cached.push_back(i);
  } else {
    prompts.wanted.push_back(RandomTokens(0, Sized(16'384, 256)));
    prompts.cached.push_back(0);
    if (workload == Workload::kBranchedPrompt) prompts.num_nodes_each = Sized(1024, 16);
  }
  return prompts;
}

std::int64_t NumPagesOf(const Prompts& prompts) {
  std::int64_t num_tokens = 0;
  for (const Tokens& tokens : prompts.wanted) num_tokens += NumTokensOf(tokens);
  return num_tokens / kPageSize;
}

struct RadixTreeProvider {
  explicit RadixTreeProvider(const Prompts& prompts)
      : cache(OptionsFor(NumPagesOf(prompts))), handle(cache.RetainNamespace(kBaseNamespace)) {
    for (const std::size_t i : prompts.cached) {
      if (prompts.num_nodes_each == 1) {
        PublishPrompt(cache, handle, prompts.wanted[i]);
      } else {
        PublishChain(cache, handle, prompts.wanted[i], prompts.num_nodes_each);
      }
    }
  }
  std::int32_t Match(std::size_t, TokenSpan tokens) {
    return cache.Probe(kBaseNamespace, tokens, MatchIntent::kPrefixReuse).num_device_tokens;
  }
  KVPrefixCache cache;
  NamespaceHandle handle;
};

template <typename PageHash, typename DigestHash>
struct HashChainProvider {
  using Map = PageHashMap<PageHash, DigestHash>;
  explicit HashChainProvider(const Prompts& prompts) : map(kPageSize, NumPagesOf(prompts)) {
    for (const std::size_t i : prompts.cached) map.Insert(prompts.wanted[i]);
  }
  std::int32_t Match(std::size_t, TokenSpan tokens) { return map.Match(tokens); }
  Map map;
};

template <typename PageHash, typename DigestHash>
struct HashedBeforeProvider : HashChainProvider<PageHash, DigestHash> {
  explicit HashedBeforeProvider(const Prompts& prompts)
      : HashChainProvider<PageHash, DigestHash>(prompts) {
    for (const Tokens& tokens : prompts.wanted) digests.push_back(this->map.DigestsOf(tokens));
  }
  std::int32_t Match(std::size_t index, TokenSpan) { return this->map.MatchHashed(digests[index]); }
  std::vector<std::vector<typename PageHash::Digest>> digests;
};

template <typename Provider>
struct MatchFixture : Fixture {
  explicit MatchFixture(Workload workload)
      : prompts(PromptsOf(workload)), provider(prompts), radix_tree(prompts) {}
  Prompts prompts;
  Provider provider;
  RadixTreeProvider radix_tree;  // says what is right
};

/// One call is the match of all prompts of the workload.
template <typename Provider>
void Match(benchmark::State& state, Workload workload) {
  auto& fixture = FixtureFor<MatchFixture<Provider>>(workload);
  const std::vector<Tokens>& prompts = fixture.prompts.wanted;
  std::int64_t num_matched = 0;
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    const std::int32_t expected = fixture.radix_tree.Match(i, prompts[i]);
    LS_CHECK(fixture.provider.Match(i, prompts[i]) == expected, "prompt ", i);
    num_matched += expected;
  }
  for (auto _ : state) {
    for (std::size_t i = 0; i < prompts.size(); ++i) {
      benchmark::DoNotOptimize(fixture.provider.Match(i, prompts[i]));
    }
  }
  state.counters["tokens"] = static_cast<double>(num_matched);
}

template <typename Provider>
void RegisterMatch(const std::string& provider, bool is_tree) {
  const auto add = [&](const std::string& name, Workload workload) {
    benchmark::RegisterBenchmark(("match/" + name + "/" + provider).c_str(), Match<Provider>,
                                 workload);
  };
  add("16k", Workload::kLongPrompt);
  if (is_tree) add("16k_1024_nodes", Workload::kBranchedPrompt);  // for a hash chain it is the same
  add("shared_prefixes", Workload::kSharedPrefixes);
}

[[maybe_unused]] const bool kIsRegistered = [] {
  RegisterMatch<RadixTreeProvider>("radix_tree", true);
  RegisterMatch<HashChainProvider<Chain64, Bucket64>>("chain64", false);
  RegisterMatch<HashChainProvider<Wide64, Bucket64>>("wide64", false);
  RegisterMatch<HashedBeforeProvider<Wide64, Bucket64>>("wide64_hashed", false);
#ifdef LORA_SERVE_BENCH_HAS_LIBCRYPTO
  RegisterMatch<HashChainProvider<Sha256, Sha256Bucket>>("sha256", false);
  RegisterMatch<HashedBeforeProvider<Sha256, Sha256Bucket>>("sha256_hashed", false);
#else
  std::cerr << "match/*/sha256: left out, the build did not find OpenSSL's libcrypto\n";
#endif
  return true;
}();

}  // namespace
}  // namespace lora_serve::bench
