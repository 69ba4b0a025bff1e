#include <benchmark/benchmark.h>

#include <deque>
#include <utility>

#include "common/check.h"
#include "workload.h"

// Traffic: requests that come and go while the cache is too small for all of them.

namespace lora_serve::bench {
namespace {

constexpr std::int64_t kNumOutputTokens = 64;

/// Each sequence goes on from some token of an earlier one (a branch, a next turn, a retry), so
/// nearly every publish splits an edge.
struct Sequence {
  std::size_t namespace_index = 0;
  Tokens tokens;  // prompt, then kNumOutputTokens of output
};

class BranchingTraffic : public Fixture {
 public:
  BranchingTraffic(std::int64_t num_sequences, std::int64_t num_namespaces, bool has_host_tier)
      : cache_(OptionsFor(kNumDevicePages, has_host_tier ? 4 * kNumDevicePages : 0)) {
    for (std::int64_t i = 0; i < num_namespaces; ++i) {
      handles_.push_back(cache_.RetainNamespace(cache_.OpenNamespace({})));
    }
    for (std::int64_t i = 0; i < num_sequences; ++i) AddSequence(static_cast<std::uint64_t>(i));
  }
  ~BranchingTraffic() override { running_.clear(); }

  /// One request from its arrival to its last token. Those before it are still running; the oldest
  /// one ends.
  void RunNext() {
    const Sequence& sequence = sequences_[next_];
    next_ = next_ + 1 == sequences_.size() ? 0 : next_ + 1;
    const NamespaceHandle& handle = handles_[sequence.namespace_index];
    const TokenSpan all = sequence.tokens;
    const TokenSpan prompt = all.first(all.size() - kNumOutputTokens);
    probed_tokens_ +=
        cache_.Probe(handle.id(), prompt, MatchIntent::kPrefixReuse).num_resumable_tokens;
    running_.push_back(Acquire(handle, prompt));
    Lease& lease = running_.back();
    if (lease.IsLoading()) FinishCopies();
    cache_.Publish(lease, prompt);
    cache_.Publish(lease, all);
    if (running_.size() > kNumRunning) running_.pop_front();
    if (++num_requests_ % 8 == 0) {
      cache_.PlanWriteBacks();
      FinishCopies();
    }
  }

  [[nodiscard]] CacheStats Stats() const { return cache_.Stats(); }
  [[nodiscard]] std::int64_t num_requests() const { return num_requests_; }
  [[nodiscard]] std::int64_t probed_tokens() const { return probed_tokens_; }

 private:
  static constexpr std::int64_t kNumDevicePages = 8192;
  static constexpr std::size_t kNumRunning = 32;
  static constexpr std::uint64_t kNumRecent = 256;
  static constexpr std::uint64_t kMaxTokens = 4096;

  void AddSequence(std::uint64_t index) {
    Sequence sequence;
    sequence.namespace_index = index % handles_.size();
    const std::uint64_t dice = Scramble(index);
    if (index >= handles_.size()) {
      const std::uint64_t num_recent = std::min<std::uint64_t>(index, kNumRecent);
      const Sequence& earlier = sequences_[index - 1 - dice % num_recent];
      const std::uint64_t num_shared = Scramble(dice) % (earlier.tokens.size() + 1);
      sequence.namespace_index = earlier.namespace_index;
      sequence.tokens.assign(earlier.tokens.begin(),
                             earlier.tokens.begin() + static_cast<std::ptrdiff_t>(num_shared));
    }
    const std::uint64_t num_own = 64 + Scramble(dice + 1) % 960 + kNumOutputTokens;
    if (sequence.tokens.size() + num_own > kMaxTokens) sequence.tokens.resize(kMaxTokens - num_own);
    const Tokens own = RandomTokens(dice, static_cast<std::int64_t>(num_own));
    sequence.tokens.insert(sequence.tokens.end(), own.begin(), own.end());
    sequences_.push_back(std::move(sequence));
  }

  Lease Acquire(const NamespaceHandle& handle, TokenSpan prompt) {
    AcquireOptions options;
    options.max_cached_tokens = NumTokensOf(prompt) - 1;
    options.num_capacity_tokens = NumTokensOf(prompt) + std::int32_t{kNumOutputTokens};
    AcquireResult result = cache_.Acquire(handle, prompt, options);
    LS_CHECK(result.outcome == AcquireOutcome::kAcquired);
    return std::move(result.lease);
  }

  void FinishCopies() {
    for (const TransferOrder& order : cache_.TakeTransferOrders()) {
      cache_.CompleteTransfer(order.id);
    }
  }

  KVPrefixCache cache_;
  std::vector<NamespaceHandle> handles_;
  std::vector<Sequence> sequences_;
  std::deque<Lease> running_;
  std::size_t next_ = 0;
  std::int64_t num_requests_ = 0;
  std::int64_t probed_tokens_ = 0;
};

/// The rate is of whole requests: Probe, Acquire (with what it evicts), two Publish calls, the end.
void Traffic(benchmark::State& state) {
  auto& traffic =
      FixtureFor<BranchingTraffic>(Sized(16'384, 64), state.range(0), state.range(1) != 0);
  for (auto _ : state) traffic.RunNext();
  const CacheStats stats = traffic.Stats();
  const auto num_requests = static_cast<double>(traffic.num_requests());
  state.SetItemsProcessed(state.iterations());
  state.counters["hit_tokens"] = static_cast<double>(traffic.probed_tokens()) / num_requests;
  state.counters["evicted_pages"] = static_cast<double>(stats.num_evicted_pages) / num_requests;
  state.counters["nodes"] = static_cast<double>(stats.num_nodes);
}
BENCHMARK(Traffic)
    ->Name("traffic")
    ->ArgNames({"namespaces", "host"})
    ->Args({1, 0})
    ->Args({Sized(64, 4), 0})
    ->Args({1, 1});

}  // namespace
}  // namespace lora_serve::bench
