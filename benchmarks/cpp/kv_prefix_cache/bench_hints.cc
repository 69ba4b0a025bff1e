#include <benchmark/benchmark.h>

#include "common/check.h"
#include "workload.h"

// RefreshHints: what a step pays for the prefix-match hints of the waiting requests.

namespace lora_serve::bench {
namespace {

/// Requests that wait; every second prompt was computed before, the others share its prefix.
struct WaitingRequests : Fixture {
  explicit WaitingRequests(std::int64_t num_requests)
      : prompts(SharedPrefixPrompts(num_requests)),
        cache(OptionsFor(num_requests * NumTokensOf(prompts.front()) / kPageSize)),
        handle(cache.RetainNamespace(kBaseNamespace)) {
    for (std::size_t i = 0; i < prompts.size(); i += 2) PublishPrompt(cache, handle, prompts[i]);
    for (const Tokens& prompt : prompts) hints.push_back({kBaseNamespace, prompt});
  }
  std::vector<Tokens> prompts;
  KVPrefixCache cache;
  NamespaceHandle handle;
  std::vector<PrefixHint> hints;
};

void CheckHints(const WaitingRequests& waiting) {
  LS_CHECK(waiting.hints[0].num_resumable_tokens == 2048);
  LS_CHECK(waiting.hints[1].num_resumable_tokens == 1536);
}

/// Nothing was published or evicted since the last step.
void RefreshUnchanged(benchmark::State& state) {
  auto& waiting = FixtureFor<WaitingRequests>(state.range(0));
  waiting.cache.RefreshHints(waiting.hints);
  for (auto _ : state) waiting.cache.RefreshHints(waiting.hints);
  CheckHints(waiting);
}
BENCHMARK(RefreshUnchanged)
    ->Name("refresh_hints_unchanged")
    ->ArgName("requests")
    ->Arg(Sized(1000, 20));

/// All requests wait for one namespace, and it has changed: every prompt is probed.
void RefreshChanged(benchmark::State& state) {
  auto& waiting = FixtureFor<WaitingRequests>(state.range(0));
  for (auto _ : state) {
    for (PrefixHint& hint : waiting.hints) hint.version = 0;  // as if never computed
    waiting.cache.RefreshHints(waiting.hints);
  }
  CheckHints(waiting);
}
BENCHMARK(RefreshChanged)->Name("refresh_hints_changed")->ArgName("requests")->Arg(Sized(1000, 20));

}  // namespace
}  // namespace lora_serve::bench
