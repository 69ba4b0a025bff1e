#include <algorithm>
#include <iterator>
#include <map>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "common/errors.h"
#include "scheduler/scheduler_impl.h"

namespace lora_serve {
namespace {

std::string Subject(const NewRequest& request) {
  return "request " + std::to_string(request.request_id.value());
}

/// Requires: at least one.
std::string Subject(std::span<const NewRequest> requests) {
  if (requests.size() == 1) return Subject(requests.front());
  return std::to_string(requests.size()) + " requests from " + Subject(requests.front()) + " on";
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

bool Scheduler::Impl::OpenAdapter(AdapterId adapter_id, const AdapterOptions& options) {
  return adapters_.Open(adapter_id, options);
}

void Scheduler::Impl::SetAdapterPinned(AdapterId adapter_id, bool is_pinned) {
  adapters_.SetPinned(adapter_id, is_pinned);
}

void Scheduler::Impl::SetAdapterStaged(AdapterId adapter_id, bool is_staged) {
  adapters_.SetStaged(adapter_id, is_staged);
}

void Scheduler::Impl::SetAdapterWeight(AdapterId adapter_id, double weight) {
  adapters_.SetWeight(adapter_id, weight);
}

void Scheduler::Impl::DrainAdapter(AdapterId adapter_id) { adapters_.Drain(adapter_id); }

void Scheduler::Impl::AddRequests(std::vector<NewRequest>&& requests) {
  if (requests.empty()) return;
  std::set<RequestId> ids;
  std::map<AdapterId, std::int64_t> num_of_adapter;
  for (const NewRequest& request : requests) {
    CheckRequest(request, options_);
    const bool is_live = requests_.Find(request.request_id) != nullptr;
    if (is_live || !ids.insert(request.request_id).second) {
      throw InvalidArgumentError(Subject(request) + " is live already" +
                                 (is_live ? "" : " (it was added twice at once)") +
                                 "; every live request needs an id of its own");
    }
    static_cast<void>(adapters_.GetOpen(request.adapter_id));
    ++num_of_adapter[request.adapter_id];
  }
  CheckLimits(requests, num_of_adapter);
  for (NewRequest& request : requests) {
    Adapter& adapter = adapters_.GetOpen(request.adapter_id);
    NamespaceHandle handle = adapters_.RetainNamespace(adapter, request.isolation_domain);
    if (request.arrival_us < 0) request.arrival_us = last_now_us_;
    requests_.Add(std::move(request), adapter, std::move(handle));
  }
}

void Scheduler::Impl::CheckLimits(std::span<const NewRequest> requests,
                                  const std::map<AdapterId, std::int64_t>& num_of_adapter) {
  const std::int64_t num_requests = std::ssize(requests);
  const auto check = [&](std::string_view limit, std::int64_t most, std::int64_t found,
                         std::string_view what) {
    if (most == 0 || found <= most) return;
    num_rejected_requests_ += num_requests;
    throw CapacityError(Subject(requests) + " would make " + std::to_string(found) + " " +
                        std::string(what) + "; " + std::string(limit) + " is " +
                        std::to_string(most) + "; send " + (num_requests == 1 ? "it" : "them") +
                        " again later, or raise " + std::string(limit));
  };
  check("max_queued_requests", options_.max_queued_requests, requests_.num_queued() + num_requests,
        "queued requests");
  // One longer than the limit may still wait alone.
  if (requests_.num_queued() + num_requests > 1) {
    std::int64_t num_tokens = requests_.num_queued_tokens();
    for (const NewRequest& request : requests) num_tokens += std::ssize(request.prompt_token_ids);
    check("max_queued_tokens", options_.max_queued_tokens, num_tokens, "queued prompt tokens");
  }
  for (const auto& [id, num_of_it] : num_of_adapter) {
    check("max_requests_per_adapter", options_.max_requests_per_adapter,
          adapters_.GetOpen(id).num_requests() + num_of_it,
          "live requests of adapter " + std::to_string(id.value()));
  }
}

bool Scheduler::Impl::Abort(RequestId request_id) {
  Request* request = requests_.Find(request_id);
  if (request == nullptr || request->IsEnding()) return false;
  ++num_aborted_requests_;
  if (IsInOutstandingPlan(*request)) {
    requests_.AbortInPlan(*request);
  } else {
    End(*request, &RequestTable::Abort);
  }
  return true;
}

}  // namespace lora_serve
