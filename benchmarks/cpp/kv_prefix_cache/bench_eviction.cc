#include <benchmark/benchmark.h>

#include "common/check.h"
#include "workload.h"

// Removing pages: Evict, and DrainNamespace.

namespace lora_serve::bench {
namespace {

constexpr std::int64_t kNumVictims = 64;

/// Leaves of one page, published by one namespace after the other, so that the oldest leaves of all
/// namespaces take turns as victims.
class LeafForest : public Fixture {
 public:
  LeafForest(std::int64_t num_leaves, std::int64_t num_namespaces, bool has_host_tier)
      : cache_(OptionsFor(num_leaves, has_host_tier ? 2 * num_leaves : 0)) {
    for (std::int64_t i = 0; i < num_namespaces; ++i) {
      handles_.push_back(cache_.RetainNamespace(cache_.OpenNamespace({})));
    }
    AddLeaves(num_leaves);
    const CacheStats stats = cache_.Stats();
    LS_CHECK(stats.num_tree_pages == num_leaves);
    LS_CHECK(!has_host_tier ||
             stats.num_host_pages - stats.num_free_host_pages > num_leaves - kPromptsPerStep);
  }

  KVPrefixCache& cache() { return cache_; }

  void AddLeaves(std::int64_t num_leaves) {
    for (std::int64_t i = 0; i < num_leaves; ++i) {
      const std::size_t turn = static_cast<std::size_t>(next_leaf_) % handles_.size();
      PublishPrompt(cache_, handles_[turn],
                    RandomTokens(static_cast<std::uint64_t>(next_leaf_), kPageSize));
      ++next_leaf_;
      if (next_leaf_ % kPromptsPerStep == 0) FinishWriteBacks(cache_);
    }
  }

 private:
  KVPrefixCache cache_;
  std::vector<NamespaceHandle> handles_;
  std::int64_t next_leaf_ = 0;
};

/// With a host tier every victim has a copy there, and its node stays for that.
void Evict(benchmark::State& state) {
  auto& forest = FixtureFor<LeafForest>(state.range(0), state.range(1), state.range(2) != 0);
  for (auto _ : state) {
    std::int64_t num_evicted = 0;
    state.SetIterationTime(
        SecondsOf([&] { num_evicted = forest.cache().Evict(Tier::kDevice, kNumVictims); }));
    LS_CHECK(num_evicted == kNumVictims, num_evicted);
    forest.AddLeaves(kNumVictims);
  }
  state.counters["pages"] = kNumVictims;
}
BENCHMARK(Evict)
    ->Name("evict_64")
    ->ArgNames({"leaves", "namespaces", "host"})
    ->Args({Sized(100'000, 256), 1, 0})
    ->Args({Sized(100'000, 256), Sized(200, 8), 0})
    ->Args({Sized(100'000, 256), 1, 1})
    ->Args({Sized(100'000, 256), Sized(200, 8), 1})
    ->UseManualTime();

/// A cache with room for a namespace that comes and goes, beside a base namespace full of pages.
struct DrainForest : Fixture {
  DrainForest(std::int64_t num_other_pages, std::int64_t num_pages, bool has_host_tier)
      : cache(OptionsFor(num_other_pages + num_pages,
                         has_host_tier ? num_other_pages + num_pages : 0)),
        base(cache.RetainNamespace(kBaseNamespace)) {
    constexpr std::int64_t kPagesPerEdge = 8;
    if (num_other_pages == 0) return;
    PublishTree(cache, base,
                {.num_nodes = num_other_pages / kPagesPerEdge, .pages_per_edge = kPagesPerEdge});
  }
  KVPrefixCache cache;
  NamespaceHandle base;
};

/// A namespace that nobody uses any more: everything goes, and the namespace with it.
void Drain(benchmark::State& state) {
  TreeShape shape;
  shape.num_nodes = state.range(0) / state.range(1);
  shape.pages_per_edge = state.range(1);
  // Long edges are leaves below the root, short ones a tree.
  shape.fanout = state.range(1) >= 64 ? shape.num_nodes : 4;
  auto& forest = FixtureFor<DrainForest>(state.range(2), state.range(0), state.range(3) != 0);
  for (auto _ : state) {
    const NamespaceId id = forest.cache.OpenNamespace({});
    {
      const NamespaceHandle handle = forest.cache.RetainNamespace(id);
      PublishTree(forest.cache, handle, shape);
    }
    LS_CHECK(forest.cache.Stats().num_tree_pages == shape.num_pages() + state.range(2));
    state.SetIterationTime(SecondsOf([&] { forest.cache.DrainNamespace(id); }));
    LS_CHECK(!forest.cache.HasNamespace(id));
    ++shape.seed;
  }
  state.counters["pages"] = static_cast<double>(shape.num_pages());
}
void DrainSizes(benchmark::internal::Benchmark* benchmark) {
  const std::int64_t num_pages = Sized(100'000, 1'000);
  const std::int64_t num_other_pages = Sized(1'000'000, 1'000);
  benchmark->Name("drain")
      ->ArgNames({"pages", "pages_per_edge", "other_pages", "host"})
      ->Args({num_pages, 100, 0, 0})
      ->Args({num_pages, 8, 0, 0})
      ->Args({num_pages, 100, num_other_pages, 0})
      ->Args({num_pages, 8, num_other_pages, 0})
      ->Args({num_pages, 100, 0, 1});
}
BENCHMARK(Drain)->Apply(DrainSizes)->UseManualTime()->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace lora_serve::bench
