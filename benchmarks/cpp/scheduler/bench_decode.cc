#include <benchmark/benchmark.h>

#include "common/check.h"
#include "scheduler_run.h"

// Plan and advance of a batch that only decodes.

namespace lora_serve::bench {
namespace {

/// Requests that decode from `context` tokens on; after kStepsPerLife steps they are replaced by
/// new ones with the same prompts, so that the context stays about the same.
class DecodingBatch : public Fixture {
 public:
  static constexpr std::int32_t kStepsPerLife = 256;

  DecodingBatch(std::int64_t num_requests, std::int64_t context, std::int64_t num_adapters,
                bool has_host_tier, bool overlaps)
      : num_requests_(static_cast<std::size_t>(num_requests)),
        num_adapters_(num_adapters),
        overlaps_(overlaps),
        run_(OptionsFor(num_requests, context, has_host_tier)) {
    run_.OpenAdapters(num_adapters);
    for (std::int64_t i = 0; i < num_requests; ++i) {
      prompts_.push_back(RandomTokens(static_cast<std::uint64_t>(i), context));
    }
    // Once with one token each, so that from now on every prompt comes from the cache.
    AddAll(1);
    while (run_.scheduler().HasWork()) run_.Step();
    Restart();
  }

  [[nodiscard]] bool MustRestart() const { return num_steps_left_ == 0; }
  /// Ends all requests and brings their successors to where they decode.
  void Restart() {
    run_.AbortRunning();
    AddAll(kStepsPerLife + 64);
    for (int num_decodes = 0; num_decodes < 3; num_decodes = IsDecoding() ? num_decodes + 1 : 0) {
      StepOnce();
    }
    num_steps_left_ = kStepsPerLife;
  }
  void Step() {
    StepOnce();
    --num_steps_left_;
  }
  [[nodiscard]] bool IsDecoding() const {
    return run_.plan().request_ids.size() == num_requests_ &&
           run_.plan().token_ids.size() == num_requests_;
  }

 private:
  static SchedulerOptions OptionsFor(std::int64_t num_requests, std::int64_t context,
                                     bool has_host_tier) {
    // Room for the running requests and a few former ones: as in service, the cache is full of
    // pages that may go.
    const std::int64_t num_pages = num_requests * ((context + 2 * kStepsPerLife) / kPageSize + 2);
    SchedulerOptions options;
    options.page_size = kPageSize;
    options.num_device_pages = static_cast<std::int32_t>(num_pages);
    options.num_host_pages = has_host_tier ? static_cast<std::int32_t>(num_pages) : 0;
    options.max_num_seqs = static_cast<std::int32_t>(num_requests);
    options.max_num_batched_tokens = 8192;
    options.max_model_len = static_cast<std::int32_t>(context) + 2 * kStepsPerLife;
    options.padded_batch_sizes = {1, 2, 4, 8, 16, 32, 64, 128};
    return options;
  }
  void AddAll(std::int32_t max_tokens) {
    for (std::size_t i = 0; i < num_requests_; ++i) {
      const std::int64_t adapter =
          num_adapters_ == 0 ? 0 : 1 + static_cast<std::int64_t>(i) % num_adapters_;
      run_.Add(adapter, prompts_[i], max_tokens);
    }
  }
  void StepOnce() { overlaps_ ? run_.StepAhead() : run_.Step(); }

  const std::size_t num_requests_;
  const std::int64_t num_adapters_;
  const bool overlaps_;
  SchedulerRun run_;
  std::vector<Tokens> prompts_;
  std::int32_t num_steps_left_ = 0;
};

void Decode(benchmark::State& state) {
  auto& batch = FixtureFor<DecodingBatch>(state.range(0), state.range(1), state.range(2),
                                          state.range(3) != 0, state.range(4) != 0);
  for (auto _ : state) {
    if (batch.MustRestart()) {
      state.PauseTiming();
      batch.Restart();
      state.ResumeTiming();
    }
    batch.Step();
  }
  LS_CHECK(batch.IsDecoding());
}
void DecodeSizes(benchmark::internal::Benchmark* benchmark) {
  benchmark->Name("decode")->ArgNames({"requests", "context", "adapters", "host", "overlap"});
  for (const std::int64_t num_requests : {Sized(16, 2), Sized(64, 4)}) {
    for (const std::int64_t context : {1024, 16 * 1024, 128 * 1024}) {
      if (IsSmallest() && context > 1024) continue;
      benchmark->Args({num_requests, context, 0, 0, 0});
      benchmark->Args({num_requests, context, Sized(8, 2), 0, 0});
      benchmark->Args({num_requests, context, Sized(8, 2), 0, 1});
      benchmark->Args({num_requests, context, Sized(8, 2), 1, 0});
      benchmark->Args({num_requests, context, Sized(8, 2), 1, 1});
      if (num_requests == 64) benchmark->Args({num_requests, context, 64, 0, 1});
    }
  }
}
BENCHMARK(Decode)->Apply(DecodeSizes)->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace lora_serve::bench
