#include <algorithm>
#include <string>
#include <utility>

#include "common/errors.h"
#include "scheduler/scheduler_impl.h"

namespace lora_serve {
namespace {

std::string Subject(const NewRequest& request) {
  return "request " + std::to_string(request.request_id.value());
}

void CheckRequest(const NewRequest& request, const SchedulerOptions& options) {
  const auto num_prompt_tokens = static_cast<std::int64_t>(request.prompt_token_ids.size());
  if (num_prompt_tokens < 1 || num_prompt_tokens >= options.max_model_len) {
    throw InvalidArgumentError(Subject(request) + " has " + std::to_string(num_prompt_tokens) +
                               " prompt tokens; expected 1 to " +
                               std::to_string(options.max_model_len - 1) +
                               " (max_model_len less one token of output)");
  }
  if (request.max_tokens < 1 || num_prompt_tokens + request.max_tokens > options.max_model_len) {
    throw InvalidArgumentError(
        Subject(request) + " has max_tokens " + std::to_string(request.max_tokens) + " after " +
        std::to_string(num_prompt_tokens) + " prompt tokens; expected 1 to " +
        std::to_string(options.max_model_len - num_prompt_tokens) + " (max_model_len is " +
        std::to_string(options.max_model_len) + ")");
  }
  const auto negative =
      std::find_if(request.prompt_token_ids.begin(), request.prompt_token_ids.end(),
                   [](TokenId token) { return token < 0; });
  if (negative != request.prompt_token_ids.end()) {
    throw InvalidArgumentError(
        Subject(request) + " has token id " + std::to_string(*negative) + " at prompt position " +
        std::to_string(negative - request.prompt_token_ids.begin()) + "; expected 0 or more");
  }
}

}  // namespace

void Scheduler::Impl::OpenAdapter(AdapterId adapter_id, const AdapterOptions& options) {
  adapters_.Open(adapter_id, options);
}

void Scheduler::Impl::DrainAdapter(AdapterId adapter_id) { adapters_.Drain(adapter_id); }

void Scheduler::Impl::AddRequest(NewRequest&& request) {
  CheckRequest(request, options_);
  if (requests_.Find(request.request_id) != nullptr) {
    throw InvalidArgumentError(Subject(request) +
                               " is live already; every live request needs an id of its own");
  }
  Adapter& adapter = adapters_.GetOpen(request.adapter_id);
  NamespaceHandle handle = cache_.RetainNamespace(adapter.namespace_id);
  requests_.Add(std::move(request), adapter, std::move(handle));
}

bool Scheduler::Impl::Abort(RequestId request_id) {
  Request* request = requests_.Find(request_id);
  if (request == nullptr || request->Is<Aborting>()) return false;
  if (IsInOutstandingPlan(*request)) {
    requests_.AbortInPlan(*request);
  } else {
    End(*request, &RequestTable::Abort);
  }
  return true;
}

}  // namespace lora_serve
