#pragma once

#include <compare>
#include <cstdint>
#include <span>
#include <vector>

#include "common/strong_id.h"
#include "kv_prefix_cache/cache_options.h"
#include "scheduler/request_states.h"
#include "scheduler/scheduler_options.h"

namespace lora_serve {

struct Adapter;

/// Who goes first among requests, whatever their adapter; lower is more senior. A class of priority
/// counts as much as priority_ageing_us of waiting, so the order of two requests never changes, and
/// nobody is passed by newcomers for ever.
struct Seniority {
  /// arrival_us + priority * priority_ageing_us.
  std::int64_t virtual_arrival_us = 0;
  /// In the order of AddRequest.
  std::int64_t arrival_number = 0;

  friend constexpr auto operator<=>(const Seniority&, const Seniority&) = default;
};

/// One request: its tokens, its progress, and the state that owns its resources.
///
/// Owns: the token sequence and, through its state, the namespace handle, the lease and the row.
/// Does not know: queues, other requests, the cache, plans. RequestTable moves it between lists and
/// states.
///
/// Invariants: num_prompt_tokens <= num_tokens < num_prompt_tokens + max_tokens until it has ended;
/// num_computed_tokens <= num_planned_tokens <= num_sequence_tokens; of the known tokens a decoding
/// request has not computed exactly one, the newest.
class Request {
 public:
  /// `request.arrival_us` is set.
  Request(NewRequest&& request, const Seniority& seniority, Adapter* adapter,
          NamespaceHandle namespace_handle);

  [[nodiscard]] RequestId id() const { return id_; }
  [[nodiscard]] const Seniority& seniority() const { return seniority_; }
  [[nodiscard]] std::int32_t priority() const { return priority_; }
  [[nodiscard]] std::int64_t arrival_us() const { return arrival_us_; }
  [[nodiscard]] std::int64_t deadline_us() const { return deadline_us_; }
  [[nodiscard]] Adapter& adapter() const { return *adapter_backptr_; }

  // --- Tokens -----------------------------------------------------------------------------------
  /// Prompt, then output.
  [[nodiscard]] std::span<const TokenId> tokens() const { return token_ids_; }
  [[nodiscard]] std::int32_t num_tokens() const {
    return static_cast<std::int32_t>(token_ids_.size());
  }
  [[nodiscard]] std::int32_t num_prompt_tokens() const { return num_prompt_tokens_; }
  [[nodiscard]] std::int32_t num_output_tokens() const { return num_tokens() - num_prompt_tokens_; }
  [[nodiscard]] bool HasAllOutput() const { return num_output_tokens() >= max_tokens_; }
  /// Known tokens, and those that outstanding plans sample.
  [[nodiscard]] std::int32_t num_sequence_tokens() const {
    return num_tokens() + num_pending_tokens_;
  }
  [[nodiscard]] std::int32_t num_pending_tokens() const { return num_pending_tokens_; }
  /// Output tokens that no plan samples yet.
  [[nodiscard]] std::int32_t num_unplanned_output_tokens() const {
    return max_tokens_ - num_output_tokens() - num_pending_tokens_;
  }
  /// The token that the oldest outstanding plan has sampled.
  void AppendToken(TokenId token);

  // --- State ------------------------------------------------------------------------------------
  [[nodiscard]] const RequestState& state() const { return state_; }
  template <typename State>
  [[nodiscard]] bool Is() const {
    return std::holds_alternative<State>(state_);
  }
  template <typename Event>
  void Take(Event&& event) {
    Apply(state_, std::forward<Event>(event));
  }
  /// True when it holds a row and a lease: Loading, Prefilling, Decoding, Aborting, Finishing.
  [[nodiscard]] bool IsRunning() const;
  /// True when it is only kept until outstanding plans return: Aborting, Finishing.
  [[nodiscard]] bool IsEnding() const { return Is<Aborting>() || Is<Finishing>(); }
  /// Throws: InternalError unless IsRunning().
  [[nodiscard]] RunningResources& running();
  [[nodiscard]] const RunningResources& running() const;
  /// Throws: InternalError unless it waits (Queued, Preempted).
  [[nodiscard]] const NamespaceHandle& waiting_handle() const;

  // --- Progress ---------------------------------------------------------------------------------
  /// Known tokens without KV.
  [[nodiscard]] std::int32_t num_missing_tokens() const {
    return num_tokens() - running().num_computed_tokens;
  }
  /// Tokens whose KV no plan computes yet; the last may be one that is known only to the executor.
  [[nodiscard]] std::int32_t num_unplanned_tokens() const {
    return num_sequence_tokens() - running().num_planned_tokens;
  }
  /// True when a plan may have a row of it: it computes, and has not all its output planned.
  [[nodiscard]] bool CanBePlanned() const {
    return (Is<Prefilling>() || Is<Decoding>()) && num_unplanned_output_tokens() > 0;
  }
  /// True when the next row is a decode: all but the newest token are computed or planned.
  [[nodiscard]] bool DecodesNext() const { return Is<Decoding>() || num_pending_tokens_ > 0; }
  /// A plan computes the next `num_tokens` tokens, and samples one if they are the last of the
  /// sequence. Returns whether it does.
  bool RecordPlanned(std::int32_t num_tokens);
  /// The KV of the next `num_tokens_computed` tokens is now in the pages. What an ending request
  /// computed beyond its known tokens does not count.
  void RecordComputed(std::int32_t num_tokens_computed);
  /// How many leading tokens may come from the cache at the next admission. The newest token is
  /// always computed, because its logits are needed. Without reuse, a request only takes up again
  /// what it had itself before it was preempted.
  [[nodiscard]] std::int32_t MaxCachedTokens(bool enable_prefix_caching) const;

  /// What it may have from the cache, for SchedulingPolicy::kLpm.
  [[nodiscard]] PrefixHint& prefix_hint() { return prefix_hint_; }

  /// Of the prompt, from the cache when it first ran; -1 before that. Recoveries do not change it.
  std::int32_t num_cached_prompt_tokens = -1;
  /// Newer requests admitted while this one was first in line and lacked pages, or was the most
  /// senior of those that a longer cached prefix let pass.
  std::int32_t num_times_overtaken = 0;
  /// The newest plan with a row of this request.
  PlanId last_plan_id{-1};

 private:
  RequestId id_;
  Seniority seniority_;
  std::int32_t priority_;
  std::int64_t arrival_us_;
  std::int64_t deadline_us_;
  Adapter* adapter_backptr_;
  std::int32_t num_prompt_tokens_;
  std::int32_t max_tokens_;
  bool reuse_prefix_;
  /// The most tokens whose KV it ever had.
  std::int32_t max_computed_tokens_ = 0;
  /// Tokens that outstanding plans sample.
  std::int32_t num_pending_tokens_ = 0;
  std::vector<TokenId> token_ids_;
  PrefixHint prefix_hint_;
  RequestState state_;
};

}  // namespace lora_serve
