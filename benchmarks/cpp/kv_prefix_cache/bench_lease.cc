#include <benchmark/benchmark.h>

#include "common/check.h"
#include "workload.h"

// What a request costs: Acquire and the end of its lease, Publish.

namespace lora_serve::bench {
namespace {

/// One cached prompt, a path of as many nodes.
struct CachedPrompt : Fixture {
  CachedPrompt(std::int64_t num_tokens, std::int64_t num_nodes)
      : cache(OptionsFor(num_tokens / kPageSize)),
        handle(cache.RetainNamespace(kBaseNamespace)),
        prompt(RandomTokens(0, num_tokens)) {
    PublishChain(cache, handle, prompt, num_nodes);
  }
  KVPrefixCache cache;
  NamespaceHandle handle;
  Tokens prompt;
};

std::int64_t NumPromptTokens() { return Sized(16'384, 256); }
std::int64_t NumChainNodes() { return Sized(1024, 16); }

void AcquireAndEnd(benchmark::State& state) {
  auto& fixture = FixtureFor<CachedPrompt>(state.range(0), state.range(1));
  for (auto _ : state) {
    const Lease lease =
        AcquireLease(fixture.cache, fixture.handle, fixture.prompt, NumTokensOf(fixture.prompt));
    LS_CHECK(lease.num_cached_tokens() == NumTokensOf(fixture.prompt));
  }
  state.counters["tokens"] = static_cast<double>(state.range(0));
}
BENCHMARK(AcquireAndEnd)
    ->Name("acquire_and_end")
    ->ArgNames({"tokens", "nodes"})
    ->Args({NumPromptTokens(), 1})
    ->Args({NumPromptTokens(), NumChainNodes()});

/// Requests that have computed their prompts and publish them one after the other. Before that, the
/// tree may hold the prompts too: then all pages of the requests are twins.
class PublishingRequests : public Fixture {
 public:
  /// `num_nodes` of each prompt that the tree holds already; 0 = none.
  PublishingRequests(std::int64_t num_tokens, std::int64_t num_nodes)
      : num_pages_(kNumRequests * num_tokens / kPageSize),
        cache_(OptionsFor(num_nodes == 0 ? num_pages_ : 2 * num_pages_)),
        handle_(cache_.RetainNamespace(kBaseNamespace)),
        is_tree_empty_(num_nodes == 0) {
    for (std::int64_t i = 0; i < kNumRequests; ++i) {
      prompts_.push_back(RandomTokens(static_cast<std::uint64_t>(i), num_tokens));
      if (!is_tree_empty_) PublishChain(cache_, handle_, prompts_.back(), num_nodes);
    }
  }

  /// Seconds that one Publish takes.
  double PublishAll() {
    std::vector<Lease> leases;
    for (const Tokens& prompt : prompts_) {
      leases.push_back(AcquireLease(cache_, handle_, prompt, 0));
    }
    const double seconds = SecondsOf([&] {
      for (std::size_t i = 0; i < leases.size(); ++i) cache_.Publish(leases[i], prompts_[i]);
    });
    LS_CHECK(cache_.Stats().num_private_pages == (is_tree_empty_ ? 0 : num_pages_));
    leases.clear();
    if (is_tree_empty_) LS_CHECK(cache_.Evict(Tier::kDevice, num_pages_) == num_pages_);
    return seconds / kNumRequests;
  }

 private:
  static constexpr std::int64_t kNumRequests = 16;
  const std::int64_t num_pages_;
  KVPrefixCache cache_;
  NamespaceHandle handle_;
  const bool is_tree_empty_;
  std::vector<Tokens> prompts_;
};

/// All pages are new to the tree.
void PublishFresh(benchmark::State& state) {
  auto& requests = FixtureFor<PublishingRequests>(state.range(0), 0);
  for (auto _ : state) state.SetIterationTime(requests.PublishAll());
  state.counters["tokens"] = static_cast<double>(state.range(0));
}
BENCHMARK(PublishFresh)
    ->Name("publish_fresh")
    ->ArgName("tokens")
    ->Arg(NumPromptTokens())
    ->UseManualTime();

/// The tree has all pages from others that computed the same prompts at the same time.
void PublishTwins(benchmark::State& state) {
  auto& requests = FixtureFor<PublishingRequests>(state.range(0), state.range(1));
  for (auto _ : state) state.SetIterationTime(requests.PublishAll());
  state.counters["tokens"] = static_cast<double>(state.range(0));
}
BENCHMARK(PublishTwins)
    ->Name("publish_twins")
    ->ArgNames({"tokens", "nodes"})
    ->Args({NumPromptTokens(), 1})
    ->Args({NumPromptTokens(), NumChainNodes()})
    ->UseManualTime();

/// A decoding request fills one page after another behind a long prompt: one Publish a page, the
/// second half of the prompt's length in all. The time is of all these calls.
void PublishPageByPage(benchmark::State& state) {
  const std::int64_t num_pages = state.range(0) / kPageSize;
  KVPrefixCache cache(OptionsFor(num_pages));
  const NamespaceHandle handle = cache.RetainNamespace(kBaseNamespace);
  const Tokens prompt = RandomTokens(0, state.range(0));
  const TokenSpan tokens = prompt;
  const auto num_tokens_of = [](std::int64_t pages) {
    return static_cast<std::size_t>(pages * kPageSize);
  };
  for (auto _ : state) {
    {
      Lease lease = AcquireLease(cache, handle, tokens, 0);
      cache.Publish(lease, tokens.first(num_tokens_of(num_pages / 2)));
      state.SetIterationTime(SecondsOf([&] {
        for (std::int64_t page = num_pages / 2; page < num_pages; ++page) {
          cache.Publish(lease, tokens.first(num_tokens_of(page + 1)));
        }
      }));
    }
    LS_CHECK(cache.Evict(Tier::kDevice, num_pages) == num_pages);
  }
  state.counters["tokens"] = static_cast<double>(state.range(0) / 2);
}
BENCHMARK(PublishPageByPage)
    ->Name("publish_page_by_page")
    ->ArgName("context_tokens")
    ->Arg(Sized(2048, 256))
    ->Arg(Sized(32'768, 512))
    ->UseManualTime();

}  // namespace
}  // namespace lora_serve::bench
