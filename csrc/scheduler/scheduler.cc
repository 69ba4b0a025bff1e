#include "scheduler/scheduler.h"

#include <string>
#include <string_view>
#include <utility>

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

SchedulerOptions Checked(const SchedulerOptions& options) {
  CheckAtLeast("page_size", options.page_size, 1, "");
  CheckAtLeast("max_num_seqs", options.max_num_seqs, 1, "");
  CheckAtLeast("max_num_batched_tokens", options.max_num_batched_tokens, options.max_num_seqs,
               " (max_num_seqs, so that every running request can decode in one step)");
  CheckAtLeast("max_model_len", options.max_model_len, 2, " (a token of prompt and one of output)");
  CheckAtLeast("max_loras", options.max_loras, 1, "");
  const std::int64_t num_pages =
      (static_cast<std::int64_t>(options.max_model_len) + options.page_size - 1) /
      options.page_size;
  CheckAtLeast("num_device_pages", options.num_device_pages, num_pages,
               " (one request of max_model_len " + std::to_string(options.max_model_len) +
                   "), or lower max_model_len");
  return options;
}

}  // namespace

Scheduler::Impl::Impl(const SchedulerOptions& options)
    : options_(Checked(options)),
      cache_({.page_size = options.page_size, .num_device_pages = options.num_device_pages}),
      rows_(options.max_num_seqs),
      adapters_(&cache_, options.max_loras),
      requests_(&adapters_),
      policy_(options_,
              {.cache = &cache_, .rows = &rows_, .adapters = &adapters_, .requests = &requests_}) {}

Scheduler::Scheduler(const SchedulerOptions& options) : impl_(std::make_unique<Impl>(options)) {}

Scheduler::~Scheduler() = default;

void Scheduler::OpenAdapter(AdapterId adapter_id, const AdapterOptions& options) {
  impl_->OpenAdapter(adapter_id, options);
}

void Scheduler::DrainAdapter(AdapterId adapter_id) { impl_->DrainAdapter(adapter_id); }

void Scheduler::AddRequest(NewRequest request) { impl_->AddRequest(std::move(request)); }

bool Scheduler::Abort(RequestId request_id) { return impl_->Abort(request_id); }

const ExecutionPlan& Scheduler::NextPlan(std::int64_t now_us) { return impl_->NextPlan(now_us); }

void Scheduler::NextPlan(std::int64_t now_us, ExecutionPlan& plan) {
  impl_->NextPlan(now_us, plan);
}

void Scheduler::Advance(const ExecutionEvent& event) { impl_->Advance(event); }

bool Scheduler::HasWork() const { return impl_->HasWork(); }

SchedulerStats Scheduler::Stats() const { return impl_->Stats(); }

const SchedulerOptions& Scheduler::options() const { return impl_->options(); }

void Scheduler::CheckInvariants() const { impl_->CheckInvariants(); }

}  // namespace lora_serve
