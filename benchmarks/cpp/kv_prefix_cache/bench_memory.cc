#include <benchmark/benchmark.h>
#include <malloc.h>

#include "common/check.h"
#include "workload.h"

// Memory of the tree: what the cache keeps on the CPU for every page.

namespace lora_serve::bench {
namespace {

/// What malloc has given out, its own overhead included.
double NumAllocatedBytes() {
  const struct mallinfo2 info = mallinfo2();
  return static_cast<double>(info.uordblks + info.hblkhd);
}

/// `bytes_per_page` is of the tree; the pools' tables are there from the start and stand beside it.
void Memory(benchmark::State& state) {
  CurrentFixture() = {};
  const TreeShape shape{.num_nodes = state.range(0) / state.range(1),
                        .pages_per_edge = state.range(1)};
  const auto num_pages = static_cast<double>(shape.num_pages());
  for (auto _ : state) {
    const double without_cache = NumAllocatedBytes();
    KVPrefixCache cache(OptionsFor(shape.num_pages(), state.range(2) * shape.num_pages()));
    const NamespaceHandle handle = cache.RetainNamespace(kBaseNamespace);
    const double empty = NumAllocatedBytes();
    PublishTree(cache, handle, shape);
    const double full = NumAllocatedBytes();
    const CacheStats stats = cache.Stats();
    LS_CHECK(stats.num_tree_pages == shape.num_pages(), stats.num_tree_pages);
    LS_CHECK(stats.num_free_host_pages == 0, stats.num_free_host_pages);
    state.counters["bytes_per_page"] = (full - empty) / num_pages;
    state.counters["pool_bytes_per_page"] = (empty - without_cache) / num_pages;
    state.counters["nodes"] = static_cast<double>(stats.num_nodes);
  }
}
void MemorySizes(benchmark::internal::Benchmark* benchmark) {
  const std::int64_t num_pages = Sized(1'048'576, 1'024);
  benchmark->Name("memory")
      ->ArgNames({"pages", "pages_per_edge", "host"})
      ->Args({num_pages, 1, 0})
      ->Args({num_pages, 8, 0})
      ->Args({num_pages, 64, 0})
      ->Args({num_pages, 8, 1})
      ->Iterations(1)
      ->Repetitions(1)  // it is the same every time
      ->Unit(benchmark::kMillisecond);
}
BENCHMARK(Memory)->Apply(MemorySizes);

}  // namespace
}  // namespace lora_serve::bench
