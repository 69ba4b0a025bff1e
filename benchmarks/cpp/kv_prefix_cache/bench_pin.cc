#include <benchmark/benchmark.h>

#include "common/check.h"
#include "kv_prefix_cache/eviction_policy.h"
#include "kv_prefix_cache/namespace.h"
#include "kv_prefix_cache/page_pool.h"
#include "workload.h"

// Protecting a path: the policy's Pin and Unpin alone, as a lease that takes no new pages, and the
// question what all pins leave to others.

namespace lora_serve::bench {
namespace {

/// A chain of nodes of one page, made by hand, and other leaves that are younger than its last
/// node: when that one is listed again, its place is not at the end.
class PinnedChain : public Fixture {
 public:
  PinnedChain(std::int64_t depth, std::int64_t num_other_leaves)
      : pool_(static_cast<std::int32_t>(depth + num_other_leaves)) {
    for (std::int64_t i = 0; i < depth; ++i) deepest_ = &Add(*deepest_);
    for (std::int64_t i = 0; i < num_other_leaves; ++i) Add(namespace_.tree().root());
  }
  ~PinnedChain() override {
    namespace_.tree().ForEachNode([this](Node& node) { policies_.Unlist(node); });
  }

  EvictionPolicy& policy() { return policies_.Of(Component::kFullAttention, Tier::kDevice); }
  Node& deepest() { return *deepest_; }

 private:
  Node& Add(Node& parent) {
    const Tokens tokens = RandomTokens(static_cast<std::uint64_t>(next_epoch_), kPageSize);
    policies_.Unlist(parent);
    Node& node = namespace_.tree().AddChild(parent, tokens);
    node.On(Tier::kDevice).pages = pool_.Allocate(1);
    node.On(Tier::kDevice).epoch = next_epoch_++;
    ++parent.On(Tier::kDevice).num_continuations;
    policies_.Refresh(parent);
    policies_.Refresh(node);
    return node;
  }

  PagePool pool_;

  NodeSequencer sequencer_;
  EvictionPolicies policies_;
  Namespace namespace_{kBaseNamespace, {}, kPageSize, &sequencer_, nullptr};
  Node* deepest_ = &namespace_.tree().root();
  Epoch next_epoch_ = 0;
};

/// The node leaves its list and is listed again each time.
void PinUnpin(benchmark::State& state) {
  auto& chain = FixtureFor<PinnedChain>(state.range(0), state.range(1));
  EvictionPolicy& policy = chain.policy();
  Node& node = chain.deepest();
  for (auto _ : state) {
    policy.Pin(node);
    policy.Unpin(node);
  }
  LS_CHECK(policy.IsEvictable(node));
  policy.CheckInvariants();
}
BENCHMARK(PinUnpin)
    ->Name("pin_unpin")
    ->ArgNames({"depth", "other_leaves"})
    ->Args({1, 0})
    ->Args({Sized(1000, 10), 0})
    ->Args({1, Sized(10'000, 10)})
    ->Args({Sized(1000, 10), Sized(10'000, 10)});

struct CachedChain : Fixture {
  explicit CachedChain(std::int64_t depth)
      : cache(OptionsFor(depth)),
        handle(cache.RetainNamespace(kBaseNamespace)),
        prompt(RandomTokens(0, depth * kPageSize)) {
    PublishChain(cache, handle, prompt, depth);
  }
  KVPrefixCache cache;
  NamespaceHandle handle;
  Tokens prompt;
};

/// The façade's whole way to a pin and back: the match and the lease's list of pages are in it.
void AcquireWithoutCapacity(benchmark::State& state) {
  auto& chain = FixtureFor<CachedChain>(state.range(0));
  AcquireOptions options;
  options.max_cached_tokens = NumTokensOf(chain.prompt);
  for (auto _ : state) {
    const AcquireResult result = chain.cache.Acquire(chain.handle, chain.prompt, options);
    LS_CHECK(result.lease.num_cached_tokens() == NumTokensOf(chain.prompt));
  }
}
BENCHMARK(AcquireWithoutCapacity)
    ->Name("acquire_without_capacity")
    ->ArgName("depth")
    ->Arg(1)
    ->Arg(Sized(1000, 10));

/// Requests that run, each on a path of `depth` nodes.
struct RunningRequests : Fixture {
  RunningRequests(std::int64_t num_requests, std::int64_t depth)
      : cache(OptionsFor((num_requests + 2) * depth)),
        handle(cache.RetainNamespace(kBaseNamespace)) {
    for (std::int64_t i = 0; i <= num_requests; ++i) {
      prompt = RandomTokens(static_cast<std::uint64_t>(i), depth * kPageSize);
      PublishChain(cache, handle, prompt, depth);
      if (i < num_requests) leases.push_back(Admit());
    }
  }
  Lease Admit() { return AcquireLease(cache, handle, prompt, NumTokensOf(prompt)); }

  KVPrefixCache cache;
  NamespaceHandle handle;
  Tokens prompt;
  std::vector<Lease> leases;
};

/// One request comes, and the scheduler asks what is left; it goes, and the scheduler asks again.
void AvailablePages(benchmark::State& state) {
  auto& running = FixtureFor<RunningRequests>(state.range(0), state.range(1));
  for (auto _ : state) {
    {
      const Lease lease = running.Admit();
      benchmark::DoNotOptimize(running.cache.NumAvailablePages());
    }
    benchmark::DoNotOptimize(running.cache.NumAvailablePages());
  }
}
BENCHMARK(AvailablePages)
    ->Name("acquire_and_end_asking_what_is_available")
    ->ArgNames({"running", "depth"})
    ->Args({Sized(64, 2), Sized(64, 4)});

}  // namespace
}  // namespace lora_serve::bench
