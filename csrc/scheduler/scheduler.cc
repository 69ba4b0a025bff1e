#include "scheduler/scheduler.h"

#include <algorithm>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "common/errors.h"
#include "scheduler/scheduler_impl.h"

namespace lora_serve {
namespace {

void CheckAtLeast(std::string_view name, std::int64_t found, std::int64_t expected,
                  std::string_view why) {
  if (found < expected) {
    throw InvalidArgumentError(std::string(name) + " is " + std::to_string(found) +
                               "; expected at least " + std::to_string(expected) +
                               std::string(why) + "; raise " + std::string(name));
  }
}

void CheckAtMost(std::string_view name, std::int64_t found, std::int64_t expected) {
  if (found > expected) {
    throw InvalidArgumentError(std::string(name) + " is " + std::to_string(found) +
                               "; expected at most " + std::to_string(expected) + "; lower " +
                               std::string(name));
  }
}

/// So that no class of priority overflows the clock.
constexpr std::int64_t kMaxPriorityAgeingUs = 1'000'000'000;

SchedulerOptions Checked(const SchedulerOptions& options) {
  CheckAtLeast("page_size", options.page_size, 1, "");
  CheckAtLeast("max_num_seqs", options.max_num_seqs, 1, "");
  CheckAtLeast("max_num_batched_tokens", options.max_num_batched_tokens, options.max_num_seqs,
               " (max_num_seqs, so that every running request can decode in one step)");
  CheckAtLeast("max_model_len", options.max_model_len, 2, " (a token of prompt and one of output)");
  CheckAtLeast("max_loras", options.max_loras, 1, "");
  CheckAtLeast("num_device_pages", options.num_device_pages,
               NumPagesFor(options.max_model_len, options.page_size),
               " (one request of max_model_len " + std::to_string(options.max_model_len) +
                   "), or lower max_model_len");
  CheckAtLeast("num_host_pages", options.num_host_pages, 0, "");
  CheckAtLeast("write_back_watermark_pages", options.write_back_watermark_pages, 0, "");
  CheckAtLeast("adapter_memory_bytes", options.adapter_memory_bytes, 0, " (0 = no limit)");
  CheckAtLeast("max_loading_adapters", options.max_loading_adapters, 1, "");
  CheckAtLeast("adapter_patience_us", options.adapter_patience_us, 0, "");
  CheckAtLeast("adapter_time_slice_steps", options.adapter_time_slice_steps, 0, " (0 = never)");
  CheckAtLeast("adapter_pause_us", options.adapter_pause_us, 0, "");
  CheckAtLeast("priority_ageing_us", options.priority_ageing_us, 1, "");
  CheckAtMost("priority_ageing_us", options.priority_ageing_us, kMaxPriorityAgeingUs);
  CheckAtLeast("max_queued_requests", options.max_queued_requests, 0, " (0 = no limit)");
  CheckAtLeast("max_queued_tokens", options.max_queued_tokens, 0, " (0 = no limit)");
  CheckAtLeast("max_requests_per_adapter", options.max_requests_per_adapter, 0, " (0 = no limit)");
  std::int32_t last_size = 0;
  for (const std::int32_t size : options.padded_batch_sizes) {
    CheckAtLeast("padded_batch_sizes", size, last_size + 1, " (the sizes ascend from 1)");
    last_size = size;
  }
  return options;
}

std::int32_t WriteBackWatermark(const SchedulerOptions& options) {
  if (options.write_back_watermark_pages > 0) return options.write_back_watermark_pages;
  const std::int32_t pages_of_a_step = options.max_num_batched_tokens / options.page_size;
  const std::int32_t quarter = std::max(options.num_device_pages / 4, 1);
  return static_cast<std::int32_t>(std::min<std::int64_t>(
      static_cast<std::int64_t>(pages_of_a_step) + options.max_num_seqs, quarter));
}

/// Requires: the options were checked.
KVPrefixCacheOptions CacheOptions(const SchedulerOptions& options) {
  return {.page_size = options.page_size,
          .num_device_pages = options.num_device_pages,
          .num_host_pages = options.num_host_pages,
          .write_policy = options.write_policy,
          .write_back_watermark_pages = WriteBackWatermark(options),
          .enable_prefix_reuse = options.enable_prefix_caching};
}

}  // namespace

Scheduler::Impl::Impl(const SchedulerOptions& options)
    : options_(Checked(options)),
      cache_(CacheOptions(options)),
      transfers_(&cache_),
      rows_(options.max_num_seqs),
      adapters_(&cache_, options_),
      requests_(&adapters_, options_),
      residency_(options_, &adapters_, &requests_),
      policy_(options_, {.cache = &cache_,
                         .rows = &rows_,
                         .adapters = &adapters_,
                         .requests = &requests_,
                         .transfers = &transfers_}),
      plan_builder_(options_) {}

Scheduler::Scheduler(const SchedulerOptions& options) : impl_(std::make_unique<Impl>(options)) {}

Scheduler::~Scheduler() = default;

bool Scheduler::OpenAdapter(AdapterId adapter_id, const AdapterOptions& options) {
  return impl_->OpenAdapter(adapter_id, options);
}

void Scheduler::SetAdapterPinned(AdapterId adapter_id, bool is_pinned) {
  impl_->SetAdapterPinned(adapter_id, is_pinned);
}

void Scheduler::SetAdapterStaged(AdapterId adapter_id, bool is_staged) {
  impl_->SetAdapterStaged(adapter_id, is_staged);
}

std::vector<AdapterId> Scheduler::AdaptersToStage() const { return impl_->AdaptersToStage(); }

std::vector<AdapterId> Scheduler::WaitingAdapters(std::span<const AdapterId> adapter_ids) const {
  return impl_->WaitingAdapters(adapter_ids);
}

void Scheduler::SetAdapterWeight(AdapterId adapter_id, double weight) {
  impl_->SetAdapterWeight(adapter_id, weight);
}

void Scheduler::DrainAdapter(AdapterId adapter_id) { impl_->DrainAdapter(adapter_id); }

void Scheduler::AddRequest(NewRequest request) {
  std::vector<NewRequest> requests;
  requests.push_back(std::move(request));
  impl_->AddRequests(std::move(requests));
}

void Scheduler::AddRequests(std::vector<NewRequest> requests) {
  impl_->AddRequests(std::move(requests));
}

bool Scheduler::Abort(RequestId request_id) { return impl_->Abort(request_id); }

const ExecutionPlan& Scheduler::NextPlan(std::int64_t now_us) { return impl_->NextPlan(now_us); }

void Scheduler::NextPlan(std::int64_t now_us, ExecutionPlan& plan) {
  impl_->NextPlan(now_us, plan);
}

void Scheduler::Advance(const ExecutionEvent& event) { impl_->Advance(event); }

bool Scheduler::HasWork() const { return impl_->HasWork(); }

void Scheduler::SetEventsEnabled(bool is_enabled) { impl_->SetEventsEnabled(is_enabled); }

std::vector<AdapterKVEvent> Scheduler::TakeEvents() { return impl_->TakeEvents(); }

SchedulerCounters Scheduler::Counters() const { return impl_->Counters(); }

SchedulerStats Scheduler::Stats() const { return impl_->Stats(); }

const SchedulerOptions& Scheduler::options() const { return impl_->options(); }

void Scheduler::CheckInvariants() const { impl_->CheckInvariants(); }

}  // namespace lora_serve
