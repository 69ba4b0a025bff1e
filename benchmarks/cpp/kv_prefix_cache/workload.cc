#include "workload.h"

#include <algorithm>
#include <utility>

#include "common/check.h"

namespace lora_serve::bench {
namespace {

std::uint64_t SeedOf(std::uint64_t kind, std::int64_t index) {
  return Scramble(kind) ^ static_cast<std::uint64_t>(index);
}

}  // namespace

KVPrefixCacheOptions OptionsFor(std::int64_t num_device_pages, std::int64_t num_host_pages) {
  KVPrefixCacheOptions options;
  options.page_size = kPageSize;
  options.num_device_pages = static_cast<std::int32_t>(num_device_pages);
  options.num_host_pages = static_cast<std::int32_t>(num_host_pages);
  return options;
}

Lease AcquireLease(KVPrefixCache& cache, const NamespaceHandle& handle, TokenSpan tokens,
                   std::int32_t max_cached_tokens) {
  AcquireOptions options;
  options.max_cached_tokens = max_cached_tokens;
  options.num_capacity_tokens = NumTokensOf(tokens);
  AcquireResult result = cache.Acquire(handle, tokens, options);
  LS_CHECK(result.outcome == AcquireOutcome::kAcquired, "no room for ", tokens.size(), " tokens");
  return std::move(result.lease);
}

Lease PublishPrompt(KVPrefixCache& cache, const NamespaceHandle& handle, TokenSpan tokens) {
  Lease lease = AcquireLease(cache, handle, tokens, NumTokensOf(tokens));
  cache.Publish(lease, tokens);
  return lease;
}

void FinishWriteBacks(KVPrefixCache& cache) {
  std::vector<TransferOrder> orders;
  do {  // a path whose start is on its way to the host waits for the next round
    cache.PlanWriteBacks();
    orders = cache.TakeTransferOrders();
    for (const TransferOrder& order : orders) cache.CompleteTransfer(order.id);
  } while (!orders.empty());
}

void PublishChain(KVPrefixCache& cache, const NamespaceHandle& handle, TokenSpan tokens,
                  std::int64_t num_nodes) {
  const std::int64_t num_pages = NumTokensOf(tokens) / kPageSize;
  const std::int64_t num_nodes_before = cache.Stats().num_nodes;
  // Every lease stays until the end: a leaf that somebody else pins is not made longer in place.
  std::vector<Lease> leases;
  for (std::int64_t node = 1; node <= num_nodes; ++node) {
    const std::int64_t end_page = num_pages * node / num_nodes;
    const TokenSpan prefix = tokens.first(static_cast<std::size_t>(end_page * kPageSize));
    leases.push_back(PublishPrompt(cache, handle, prefix));
  }
  LS_CHECK(cache.Stats().num_nodes - num_nodes_before == num_nodes, "the chain has ",
           cache.Stats().num_nodes - num_nodes_before, " nodes");
}

void PublishTree(KVPrefixCache& cache, const NamespaceHandle& handle, const TreeShape& shape) {
  // Nodes are numbered level by level; the children of node n are those from fanout * (n + 1) on.
  const std::int64_t first_leaf = (shape.num_nodes - 1) / shape.fanout;
  std::vector<std::int64_t> path;
  Tokens tokens;
  for (std::int64_t leaf = first_leaf; leaf < shape.num_nodes; ++leaf) {
    path.clear();
    for (std::int64_t node = leaf; node >= 0; node = node / shape.fanout - 1) path.push_back(node);
    std::ranges::reverse(path);
    tokens.clear();
    for (const std::int64_t node : path) {
      AppendTokens(tokens, SeedOf(shape.seed, node), shape.pages_per_edge * kPageSize);
    }
    PublishPrompt(cache, handle, tokens);
    if (leaf % kPromptsPerStep == 0) FinishWriteBacks(cache);
  }
  FinishWriteBacks(cache);
}

std::vector<Tokens> SharedPrefixPrompts(std::int64_t num_prompts) {
  constexpr std::int64_t kPromptsPerGroup = 50;
  constexpr std::int64_t kPromptsPerSubgroup = 10;
  std::vector<Tokens> prompts;
  for (std::int64_t i = 0; i < num_prompts; ++i) {
    Tokens& tokens = prompts.emplace_back();
    tokens.reserve(2048);
    AppendTokens(tokens, SeedOf(1, i / kPromptsPerGroup), 1024);
    AppendTokens(tokens, SeedOf(2, i / kPromptsPerSubgroup), 512);
    AppendTokens(tokens, SeedOf(3, i), 512);
  }
  return prompts;
}

}  // namespace lora_serve::bench
