#include "scheduler/request.h"

#include <algorithm>
#include <string>
#include <utility>

#include "common/check.h"

namespace lora_serve {
namespace {

template <typename Running, typename State>
Running* FindRunning(State& state) {
  return std::visit(
      [](auto& current) -> Running* {
        if constexpr (requires { current.running; }) {
          return &current.running;
        } else {
          return nullptr;
        }
      },
      state);
}

}  // namespace

Request::Request(NewRequest&& request, const Seniority& seniority, Adapter* adapter,
                 NamespaceHandle namespace_handle)
    : id_(request.request_id),
      seniority_(seniority),
      priority_(request.priority),
      arrival_us_(request.arrival_us),
      deadline_us_(request.deadline_us),
      adapter_backptr_(adapter),
      num_prompt_tokens_(static_cast<std::int32_t>(request.prompt_token_ids.size())),
      max_tokens_(request.max_tokens),
      reuse_prefix_(request.reuse_prefix),
      token_ids_(std::move(request.prompt_token_ids)),
      prefix_hint_{.namespace_id = namespace_handle.id(), .tokens = token_ids_},
      state_(Queued{std::move(namespace_handle)}) {}

bool Request::IsRunning() const { return FindRunning<const RunningResources>(state_) != nullptr; }

RunningResources& Request::running() {
  RunningResources* resources = FindRunning<RunningResources>(state_);
  LS_CHECK(resources != nullptr, "request ", id_, " holds no pages in state ", StateName(state_));
  return *resources;
}

const RunningResources& Request::running() const {
  const RunningResources* resources = FindRunning<const RunningResources>(state_);
  LS_CHECK(resources != nullptr, "request ", id_, " holds no pages in state ", StateName(state_));
  return *resources;
}

const NamespaceHandle& Request::waiting_handle() const {
  if (const auto* queued = std::get_if<Queued>(&state_)) return queued->namespace_handle;
  const auto* preempted = std::get_if<Preempted>(&state_);
  LS_CHECK(preempted != nullptr, "request ", id_, " does not wait in state ", StateName(state_));
  return preempted->namespace_handle;
}

bool Request::RecordPlanned(std::int32_t num_tokens) {
  RunningResources& resources = running();
  resources.num_planned_tokens += num_tokens;
  LS_CHECK(resources.num_planned_tokens <= num_sequence_tokens(), "request ", id_, " plans ",
           resources.num_planned_tokens, " of ", num_sequence_tokens(), " tokens");
  const bool samples_token = resources.num_planned_tokens == num_sequence_tokens();
  num_pending_tokens_ += samples_token ? 1 : 0;
  return samples_token;
}

void Request::AppendToken(TokenId token) {
  LS_CHECK(num_pending_tokens_ > 0, "request ", id_, " waits for no token");
  --num_pending_tokens_;
  token_ids_.push_back(token);
}

void Request::RecordComputed(std::int32_t num_tokens_computed) {
  RunningResources& resources = running();
  resources.num_computed_tokens += num_tokens_computed;
  if (IsEnding()) {
    resources.num_computed_tokens = std::min(resources.num_computed_tokens, num_tokens());
  }
  LS_CHECK(resources.num_computed_tokens <= num_tokens(), "request ", id_, " computed ",
           resources.num_computed_tokens, " of ", num_tokens(), " tokens");
  max_computed_tokens_ = std::max(max_computed_tokens_, resources.num_computed_tokens);
}

std::int32_t Request::MaxCachedTokens(bool enable_prefix_caching) const {
  const std::int32_t all_but_last = num_tokens() - 1;
  if (enable_prefix_caching && reuse_prefix_) return all_but_last;
  return std::min(all_but_last, max_computed_tokens_);
}

}  // namespace lora_serve
