#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "common/strong_id.h"
#include "scheduler/request_states.h"
#include "scheduler/scheduler.h"

namespace lora_serve {

struct Adapter;

/// One request: its tokens, its progress, and the state that owns its resources.
///
/// Owns: the token sequence and, through its state, the namespace handle, the lease and the row.
/// Does not know: queues, other requests, the cache, plans. RequestTable moves it between lists and
/// states.
///
/// Invariants: num_prompt_tokens <= num_tokens < num_prompt_tokens + max_tokens while it is live;
/// num_computed_tokens <= num_tokens, with Decoding iff num_computed_tokens == num_tokens - 1
/// outside a plan.
class Request {
 public:
  /// `arrival_number` orders requests by age; lower is older.
  Request(NewRequest&& request, std::int64_t arrival_number, Adapter* adapter,
          NamespaceHandle namespace_handle);

  [[nodiscard]] RequestId id() const { return id_; }
  [[nodiscard]] std::int64_t arrival_number() const { return arrival_number_; }
  [[nodiscard]] Adapter& adapter() const { return *adapter_backptr_; }

  // --- Tokens
  // -----------------------------------------------------------------------------------------
  /// Prompt, then output.
  [[nodiscard]] std::span<const TokenId> tokens() const { return token_ids_; }
  [[nodiscard]] std::int32_t num_tokens() const {
    return static_cast<std::int32_t>(token_ids_.size());
  }
  [[nodiscard]] std::int32_t num_prompt_tokens() const { return num_prompt_tokens_; }
  [[nodiscard]] std::int32_t num_output_tokens() const { return num_tokens() - num_prompt_tokens_; }
  [[nodiscard]] bool HasAllOutput() const { return num_output_tokens() >= max_tokens_; }
  void AppendToken(TokenId token) { token_ids_.push_back(token); }

  // --- State
  // ------------------------------------------------------------------------------------------
  [[nodiscard]] const RequestState& state() const { return state_; }
  template <typename State>
  [[nodiscard]] bool Is() const {
    return std::holds_alternative<State>(state_);
  }
  template <typename Event>
  void Take(Event&& event) {
    Apply(state_, std::forward<Event>(event));
  }
  /// True when it holds a row and a lease: Loading, Prefilling, Decoding, Aborting.
  [[nodiscard]] bool IsRunning() const;
  /// Throws: InternalError unless IsRunning().
  [[nodiscard]] RunningResources& running();
  [[nodiscard]] const RunningResources& running() const;
  /// Throws: InternalError unless it waits (Queued, Preempted).
  [[nodiscard]] const NamespaceHandle& waiting_handle() const;

  // --- Progress
  // ---------------------------------------------------------------------------------------
  /// Tokens without KV.
  [[nodiscard]] std::int32_t num_missing_tokens() const {
    return num_tokens() - running().num_computed_tokens;
  }
  /// The KV of the next `num_tokens_computed` tokens is now in the pages.
  void RecordComputed(std::int32_t num_tokens_computed);
  /// How many leading tokens may come from the cache at the next admission. The newest token is
  /// always computed, because its logits are needed. Without reuse, a request only takes up again
  /// what it had itself before it was preempted.
  [[nodiscard]] std::int32_t MaxCachedTokens(bool enable_prefix_caching) const;

  /// Of the prompt, from the cache when it first ran; -1 before that. Recoveries do not change it.
  std::int32_t num_cached_prompt_tokens = -1;
  /// Newer requests admitted while this one was first in line and lacked pages, and newer requests
  /// of adapters admitted while it was first in line and lacked a place of its adapter.
  std::int32_t num_times_overtaken = 0;
  /// The newest plan with a row of this request.
  PlanId last_plan_id{-1};

 private:
  RequestId id_;
  std::int64_t arrival_number_;
  Adapter* adapter_backptr_;
  std::int32_t num_prompt_tokens_;
  std::int32_t max_tokens_;
  bool reuse_prefix_;
  /// The most tokens whose KV it ever had.
  std::int32_t max_computed_tokens_ = 0;
  std::vector<TokenId> token_ids_;
  RequestState state_;
};

}  // namespace lora_serve
