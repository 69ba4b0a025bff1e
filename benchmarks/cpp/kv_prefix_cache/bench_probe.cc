#include <benchmark/benchmark.h>

#include "common/check.h"
#include "workload.h"

// Probe: how many tokens of a prompt are cached.

namespace lora_serve::bench {
namespace {

/// Fully cached prompts, each a path of as many nodes.
struct CachedPrompts : Fixture {
  CachedPrompts(std::int64_t num_prompts, std::int64_t num_tokens, std::int64_t num_nodes)
      : cache(OptionsFor(num_prompts * num_tokens / kPageSize)),
        handle(cache.RetainNamespace(kBaseNamespace)) {
    for (std::int64_t i = 0; i < num_prompts; ++i) {
      prompts.push_back(RandomTokens(static_cast<std::uint64_t>(i), num_tokens));
      PublishChain(cache, handle, prompts.back(), num_nodes);
    }
  }
  KVPrefixCache cache;
  NamespaceHandle handle;
  std::vector<Tokens> prompts;
};

/// With one prompt everything stays in the core's own cache; with many, tokens and nodes come from
/// farther away, as they do when a scheduler looks at one prompt after another.
void Probe(benchmark::State& state) {
  const auto& fixture = FixtureFor<CachedPrompts>(state.range(2), state.range(0), state.range(1));
  std::size_t next = 0;
  for (auto _ : state) {
    const Tokens& prompt = fixture.prompts[next];
    const ProbeResult result =
        fixture.cache.Probe(kBaseNamespace, prompt, MatchIntent::kPrefixReuse);
    LS_CHECK(result.num_device_tokens == NumTokensOf(prompt));
    next = next + 1 == fixture.prompts.size() ? 0 : next + 1;
  }
  state.counters["tokens"] = static_cast<double>(state.range(0));
}
void ProbeSizes(benchmark::internal::Benchmark* benchmark) {
  const std::int64_t num_tokens = Sized(16'384, 256);
  benchmark->Name("probe")->ArgNames({"tokens", "nodes", "prompts"});
  for (const std::int64_t num_prompts : {std::int64_t{1}, Sized(64, 2)}) {
    for (const std::int64_t num_nodes : {std::int64_t{1}, Sized(1024, 16)}) {
      benchmark->Args({num_tokens, num_nodes, num_prompts});
    }
  }
}
BENCHMARK(Probe)->Apply(ProbeSizes);

/// The first page is not cached, in a namespace that holds other prompts.
void ProbeMiss(benchmark::State& state) {
  const auto& fixture = FixtureFor<CachedPrompts>(Sized(64, 2), state.range(0), 1);
  const Tokens prompt = RandomTokens(1'000'000, state.range(0));
  for (auto _ : state) {
    const ProbeResult result =
        fixture.cache.Probe(kBaseNamespace, prompt, MatchIntent::kPrefixReuse);
    LS_CHECK(result.num_device_tokens == 0);
  }
}
BENCHMARK(ProbeMiss)->Name("probe_miss")->ArgName("tokens")->Arg(Sized(16'384, 256));

}  // namespace
}  // namespace lora_serve::bench
