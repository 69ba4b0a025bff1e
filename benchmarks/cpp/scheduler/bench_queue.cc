#include <benchmark/benchmark.h>

#include <algorithm>
#include <memory>
#include <utility>

#include "common/check.h"
#include "scheduler_run.h"

// A long queue in front of a full batch, and a step that takes many requests in.

namespace lora_serve::bench {
namespace {

/// What the waiting requests lack.
enum class Lack : std::int64_t {
  kRoom,   // their adapters are not on the device, and do not fit beside those that run
  kPlace,  // their adapters are on the device, but max_loras others run
  kPages,  // all adapters are on the device and have places; there are no pages
  kRow,    // as before, but it is page-table rows that are taken
};

/// Requests that decode, and behind them one waiting request of each of many adapters. Nobody ends,
/// and nobody that waits can be admitted.
class FullScheduler : public Fixture {
 public:
  FullScheduler(std::int64_t num_waiting, SchedulingPolicy policy, Lack lack)
      : num_waiting_(num_waiting), policy_(policy), lack_(lack) {
    Restart();
  }

  [[nodiscard]] bool MustRestart() const { return num_steps_left_ == 0; }
  void Restart() {
    run_ = std::make_unique<SchedulerRun>(Options());
    run_->OpenAdapters(kNumRunningAdapters);
    for (std::int64_t i = 0; i < kNumRunning; ++i) {
      run_->Add(1 + i % kNumRunningAdapters, PromptOf(i), kStepsPerLife + 64);
    }
    while (run_->plan().token_ids.size() != kNumRunning) run_->Step();
    for (std::int64_t i = 0; i < num_waiting_; ++i) {
      const std::int64_t adapter = kNumRunningAdapters + 1 + i;
      static_cast<void>(run_->scheduler().OpenAdapter(AdapterId(adapter), {.size_bytes = 1}));
      run_->Add(adapter, PromptOf(kNumRunning + i), 64);
    }
    // Loads what has room, and probes what waits.
    constexpr std::int32_t kNumWarmUpSteps = 16;
    for (std::int32_t step = 0; step < kNumWarmUpSteps; ++step) run_->Step();
    num_steps_left_ = kStepsPerLife - kNumWarmUpSteps;
    CheckNobodyWasAdmitted();
  }
  void Step() {
    run_->Step();
    --num_steps_left_;
  }
  void CheckNobodyWasAdmitted() const {
    LS_CHECK(run_->plan().request_ids.size() == kNumRunning, run_->plan().request_ids.size(),
             " requests run");
  }

 private:
  static constexpr std::int64_t kNumRunning = 16;
  static constexpr std::int64_t kNumRunningAdapters = 8;
  static constexpr std::int64_t kContext = 1024;
  static constexpr std::int32_t kStepsPerLife = 4096;

  [[nodiscard]] Tokens PromptOf(std::int64_t index) const {
    // With kPages a waiting prompt is longer than what the running ones leave to each other.
    const std::int64_t num_tokens =
        lack_ == Lack::kPages && index >= kNumRunning ? kStepsPerLife * kNumRunning : kContext;
    return RandomTokens(static_cast<std::uint64_t>(index), num_tokens);
  }
  [[nodiscard]] SchedulerOptions Options() const {
    const auto num_adapters = static_cast<std::int32_t>(kNumRunningAdapters + num_waiting_);
    SchedulerOptions options;
    options.page_size = kPageSize;
    options.max_model_len = kNumRunning * kStepsPerLife + 128;
    options.num_device_pages = kNumRunning * (kContext + kStepsPerLife) / kPageSize;
    options.max_num_seqs = lack_ == Lack::kRow ? kNumRunning : 128;
    options.max_num_batched_tokens = 8192;
    options.scheduling_policy = policy_;
    options.adapter_memory_bytes = lack_ == Lack::kRoom ? kNumRunningAdapters : 0;
    options.max_loras =
        lack_ == Lack::kRoom || lack_ == Lack::kPlace ? kNumRunningAdapters : num_adapters;
    return options;
  }

  const std::int64_t num_waiting_;
  const SchedulingPolicy policy_;
  const Lack lack_;
  std::unique_ptr<SchedulerRun> run_;
  std::int32_t num_steps_left_ = 0;
};

void WaitingStep(benchmark::State& state, SchedulingPolicy policy, Lack lack) {
  auto& full = FixtureFor<FullScheduler>(Sized(1000, 10), policy, lack);
  for (auto _ : state) {
    if (full.MustRestart()) {
      state.PauseTiming();
      full.Restart();
      state.ResumeTiming();
    }
    full.Step();
  }
  full.CheckNobodyWasAdmitted();
}

void RegisterWaitingSteps() {
  constexpr std::pair<const char*, SchedulingPolicy> kPolicies[] = {
      {"fair", SchedulingPolicy::kFair},
      {"fcfs", SchedulingPolicy::kFcfs},
      {"lpm", SchedulingPolicy::kLpm}};
  constexpr std::pair<const char*, Lack> kLacks[] = {
      {"room", Lack::kRoom}, {"place", Lack::kPlace}, {"pages", Lack::kPages}, {"row", Lack::kRow}};
  for (const auto& [lack_name, lack] : kLacks) {
    for (const auto& [policy_name, policy] : kPolicies) {
      const std::string name = "waiting_step/requests:" + std::to_string(Sized(1000, 10)) +
                               "/lack:" + lack_name + "/policy:" + policy_name;
      benchmark::RegisterBenchmark(name.c_str(), WaitingStep, policy, lack)
          ->Unit(benchmark::kMicrosecond);
    }
  }
}
[[maybe_unused]] const bool is_registered = (RegisterWaitingSteps(), true);

/// Requests that all start in one step, each with all its prompt in that step.
class Admission : public Fixture {
 public:
  Admission(std::int64_t num_requests, std::int64_t context, bool is_cached)
      : num_requests_(num_requests),
        context_(context),
        is_cached_(is_cached),
        run_(OptionsFor(num_requests, context)) {
    run_.OpenAdapters(kNumAdapters);
    AddAll();
    while (run_.scheduler().HasWork()) run_.Step();
  }
  void AddAll() {
    for (std::int64_t i = 0; i < num_requests_; ++i) {
      const auto seed = static_cast<std::uint64_t>(is_cached_ ? i : next_seed_++);
      run_.Add(1 + i % kNumAdapters, RandomTokens(seed, context_), 1);
    }
  }
  /// Admits, runs and ends what was added.
  void Step() { run_.Step(); }
  [[nodiscard]] bool HasAdmittedAll() {
    return std::ssize(run_.plan().request_ids) == num_requests_ && !run_.scheduler().HasWork();
  }

 private:
  static constexpr std::int64_t kNumAdapters = 8;
  static SchedulerOptions OptionsFor(std::int64_t num_requests, std::int64_t context) {
    SchedulerOptions options;
    options.page_size = kPageSize;
    options.num_device_pages =
        static_cast<std::int32_t>(2 * num_requests * (context / kPageSize + 1));
    options.max_num_seqs = static_cast<std::int32_t>(num_requests);
    options.max_num_batched_tokens = static_cast<std::int32_t>(num_requests * context);
    options.max_model_len = static_cast<std::int32_t>(context) + 16;
    return options;
  }

  const std::int64_t num_requests_;
  const std::int64_t context_;
  const bool is_cached_;
  SchedulerRun run_;
  std::int64_t next_seed_ = 0;
};

void Admit(benchmark::State& state) {
  auto& admission = FixtureFor<Admission>(state.range(0), state.range(1), state.range(2) != 0);
  for (auto _ : state) {
    admission.AddAll();
    state.SetIterationTime(SecondsOf([&] { admission.Step(); }));
  }
  LS_CHECK(admission.HasAdmittedAll());
  state.counters["requests"] = static_cast<double>(state.range(0));
}
BENCHMARK(Admit)
    ->Name("admit_run_and_end")
    ->ArgNames({"requests", "context", "cached"})
    ->Args({Sized(64, 4), 1024, 0})
    ->Args({Sized(64, 4), 1024, 1})
    ->Args({Sized(64, 4), Sized(16 * 1024, 2048), 1})
    ->UseManualTime()
    ->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace lora_serve::bench
