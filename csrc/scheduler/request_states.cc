#include "scheduler/request_states.h"

#include <array>
#include <string>
#include <type_traits>
#include <utility>

#include "common/errors.h"

namespace lora_serve {
namespace {

constexpr std::array<std::string_view, std::variant_size_v<RequestState>> kStateNames = {
    "Queued",   "Loading",   "Prefilling", "Decoding", "Preempted",
    "Aborting", "Finishing", "Finished",   "Aborted"};

[[noreturn]] void ThrowIllegal(const RequestState& state, std::string_view event) {
  throw InternalError("a request in state " + std::string(StateName(state)) +
                      " cannot take the event " + std::string(event));
}

template <typename State, typename... States>
inline constexpr bool kIsOneOf = (std::is_same_v<State, States> || ...);

/// Replaces `state` by `next(current)` if the current state is one of `From`; throws otherwise,
/// before anything has been moved.
template <typename... From, typename Next>
void Move(RequestState& state, std::string_view event, Next next) {
  RequestState replacement = std::visit(
      [&](auto& current) -> RequestState {
        if constexpr (kIsOneOf<std::remove_cvref_t<decltype(current)>, From...>) {
          return next(current);
        } else {
          ThrowIllegal(state, event);
        }
      },
      state);
  state = std::move(replacement);  // what the old state still owns is given back here
}

}  // namespace

std::string_view StateName(const RequestState& state) { return kStateNames.at(state.index()); }

void Apply(RequestState& state, request_event::Admit&& event) {
  Move<Queued, Preempted>(state, "Admit", [&event](auto& current) -> RequestState {
    RunningResources running;
    running.namespace_handle = std::move(current.namespace_handle);
    running.row = std::move(event.row);
    running.lease = std::move(event.lease);
    running.num_computed_tokens = running.lease.num_cached_tokens();
    running.num_planned_tokens = running.num_computed_tokens;
    if (running.lease.IsLoading()) return Loading{std::move(running)};
    return Prefilling{std::move(running)};
  });
}

void Apply(RequestState& state, request_event::CompleteLoad) {
  Move<Loading>(state, "CompleteLoad",
                [](Loading& current) { return Prefilling{std::move(current.running)}; });
}

void Apply(RequestState& state, request_event::FailLoad) {
  Move<Loading>(state, "FailLoad", [](Loading& current) {
    // No plan has written its pages yet, so the executor has nothing to take back.
    current.running.num_computed_tokens = current.running.lease.num_cached_tokens();
    current.running.num_planned_tokens = current.running.num_computed_tokens;
    return Prefilling{std::move(current.running)};
  });
}

void Apply(RequestState& state, request_event::CompletePrefill) {
  Move<Prefilling>(state, "CompletePrefill",
                   [](Prefilling& current) { return Decoding{std::move(current.running)}; });
}

void Apply(RequestState& state, request_event::Preempt) {
  Move<Loading, Prefilling, Decoding>(state, "Preempt", [](auto& current) {
    return Preempted{std::move(current.running.namespace_handle)};
  });
}

void Apply(RequestState& state, request_event::AbortInPlan) {
  Move<Prefilling, Decoding>(state, "AbortInPlan",
                             [](auto& current) { return Aborting{std::move(current.running)}; });
}

void Apply(RequestState& state, request_event::Abort) {
  Move<Queued, Loading, Prefilling, Decoding, Preempted, Aborting>(state, "Abort",
                                                                   [](auto&) { return Aborted{}; });
}

void Apply(RequestState& state, request_event::FinishInPlan) {
  Move<Decoding>(state, "FinishInPlan",
                 [](Decoding& current) { return Finishing{std::move(current.running)}; });
}

void Apply(RequestState& state, request_event::Finish) {
  Move<Decoding, Finishing>(state, "Finish", [](auto&) { return Finished{}; });
}

}  // namespace lora_serve
