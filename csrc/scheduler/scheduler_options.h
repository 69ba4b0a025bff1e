#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "common/strong_id.h"
#include "kv_prefix_cache/cache_options.h"

namespace lora_serve {

/// Who of the waiting requests is admitted first, within one class of priority.
enum class SchedulingPolicy : std::uint8_t {
  /// The adapter that has had the fewest tokens for its weight; its requests in order of arrival.
  kFair,
  /// In order of arrival.
  kFcfs,
  /// The longest cached prefix first.
  kLpm,
};

struct SchedulerOptions {
  std::int32_t page_size = 16;
  /// At least ceil(max_model_len / page_size), so that any admitted request can run alone to its
  /// end.
  std::int32_t num_device_pages = 0;
  /// Requests that may hold a page-table row at once.
  std::int32_t max_num_seqs = 128;
  /// Tokens of one step, decodes and prefill chunks together. At least max_num_seqs.
  std::int32_t max_num_batched_tokens = 2048;
  std::int32_t max_model_len = 4096;
  /// Distinct adapters among the requests that hold a row or were preempted; the base model is not
  /// counted.
  std::int32_t max_loras = 64;
  /// False: no request starts from another's pages. Preempted requests still recover their own.
  bool enable_prefix_caching = true;
  /// Pages of the host tier; 0 = there is none.
  std::int32_t num_host_pages = 0;
  /// When pages are copied to the host tier. Those of a preempted request are in any case.
  WritePolicy write_policy = WritePolicy::kWriteThrough;
  /// WritePolicy::kWriteBack: device pages to be kept free, or evictable without loss. 0 = what a
  /// step can take, max_num_batched_tokens / page_size + max_num_seqs, but at most a quarter of the
  /// device pages.
  std::int32_t write_back_watermark_pages = 0;

  // --- Adapters --------------------------------------------------------------------------------
  /// Bytes of the adapters that are on the device or on their way there, together. 0 = no limit.
  std::int64_t adapter_memory_bytes = 0;
  /// Loads that waiting requests start are under way at once (prefetch depth), at least 1.
  std::int32_t max_loading_adapters = 4;
  /// Loads wait until the caller has brought the adapter into host memory (SetAdapterStaged), as it
  /// then must for those of AdaptersToStage: nobody's room is kept, or taken from others, for
  /// weights that are still on a disk.
  bool loads_staged_only = false;
  /// How long an adapter without room waits before one that has it is paused or closed.
  std::int64_t adapter_patience_us = 0;
  /// Steps in place after which an adapter may be paused for one that waits, when as many wait as
  /// are in place; the slice goes with the cube of their number. 0 = never.
  std::int32_t adapter_time_slice_steps = 0;
  /// How long a paused adapter waits before another one is paused for it.
  std::int64_t adapter_pause_us = 75'000;

  // --- Order -----------------------------------------------------------------------------------
  SchedulingPolicy scheduling_policy = SchedulingPolicy::kFair;
  /// Waiting this long counts as much as one class of priority, at least 1.
  std::int64_t priority_ageing_us = 1'000'000;

  // --- Limits on what waits and runs; 0 = none -------------------------------------------------
  std::int32_t max_queued_requests = 0;
  /// Prompt tokens of the queued requests.
  std::int64_t max_queued_tokens = 0;
  /// Live requests of one adapter, waiting and running; the base model's, too.
  std::int32_t max_requests_per_adapter = 0;

  // --- Padding ---------------------------------------------------------------------------------
  /// Batch sizes of a decode graph, ascending: a plan of decodes only gets empty rows up to the
  /// next of them, none above the last.
  std::vector<std::int32_t> padded_batch_sizes = {};
};

/// The deadline of a request that has none.
inline constexpr std::int64_t kNoDeadline = std::numeric_limits<std::int64_t>::max();

struct NewRequest {
  RequestId request_id;
  /// kBaseAdapter = the base model. Never defaulted on the Python side.
  AdapterId adapter_id = kBaseAdapter;
  /// Prefixes are shared within one domain only, whatever the adapter; any bytes. Empty = the
  /// default domain.
  std::string isolation_domain = {};
  /// 1 to max_model_len - 1 tokens.
  std::vector<TokenId> prompt_token_ids;
  /// Output tokens, at least 1; prompt + max_tokens <= max_model_len.
  std::int32_t max_tokens = 1;
  /// False when every prompt position must be computed (prompt logprobs).
  bool reuse_prefix = true;
  /// Class of priority; lower goes first.
  std::int32_t priority = 0;
  /// When it arrived, on the clock of NextPlan; -1 = at the last NextPlan.
  std::int64_t arrival_us = -1;
  /// If it has not run by then, on the clock of NextPlan, it fails.
  std::int64_t deadline_us = kNoDeadline;
};

struct AdapterOptions {
  /// Seeds the namespace's KV event hashes.
  std::uint64_t digest_seed = 0;
  /// Bytes on the device.
  std::int64_t size_bytes = 0;
  /// Its share under SchedulingPolicy::kFair, beside that of others: above 0, at most 1000.
  double weight = 1.0;
  /// Never a victim; it is brought in although no request waits for it.
  bool is_pinned = false;
  /// Its weights lie in host memory, ready to be copied: see Scheduler::SetAdapterStaged.
  bool is_staged = false;
};

}  // namespace lora_serve
