#pragma once

#include <cstdint>
#include <string_view>
#include <variant>

#include "kv_prefix_cache/lease.h"
#include "kv_prefix_cache/namespace_handle.h"
#include "scheduler/page_table_rows.h"

namespace lora_serve {

/// What a request holds while it has a place in the batch.
///
///     tokens:  [0 ........ num_computed_tokens) [.. num_planned_tokens) [.. capacity of the lease)
///              KV is in the pages               outstanding plans       room for the next chunk
///                                               compute it              or decode
///     pages:   [0 ... num_planned_pages) [num_planned_pages ... lease.pages().size())
///              the executor knows them   the next plan's delta
struct RunningResources {
  NamespaceHandle namespace_handle;
  OwnedRow row;
  Lease lease;
  std::int32_t num_computed_tokens = 0;
  /// Those and the ones that outstanding plans compute.
  std::int32_t num_planned_tokens = 0;
  /// Leading entries of the page-table row that plans have already written.
  std::int32_t num_planned_pages = 0;
};

// A state owns exactly the resources that are legal in it; leaving it gives back what the next one
// lacks.

/// Waits for its first admission.
struct Queued {
  NamespaceHandle namespace_handle;
};
/// Its first pages are being copied from the host: it is in no plan before that copy's event.
struct Loading {
  RunningResources running;
};
/// Computes the KV of the tokens it already has (its prompt; after a preemption, its output too).
struct Prefilling {
  RunningResources running;
};
/// Samples one token a step.
struct Decoding {
  RunningResources running;
};
/// Gave its pages and row to an older request; returns before newer work.
struct Preempted {
  NamespaceHandle namespace_handle;
};
/// Aborted inside a plan that has not returned: the executor may still touch its pages and its row.
struct Aborting {
  RunningResources running;
};
/// Has its last token, but a later plan that has not returned has a row of it, too.
struct Finishing {
  RunningResources running;
};
struct Finished {};
struct Aborted {};

using RequestState = std::variant<Queued, Loading, Prefilling, Decoding, Preempted, Aborting,
                                  Finishing, Finished, Aborted>;

/// Events. Those with members hand over what the next state owns.
namespace request_event {

/// A place in the batch was found; the lease says whether pages of it are still on their way.
struct Admit {
  OwnedRow row;
  Lease lease;
};
/// The copy has arrived.
struct CompleteLoad {};
/// The copy has failed, and the lease was cut back to what was on the device before.
struct FailLoad {};
/// Every known token is computed and a token was sampled.
struct CompletePrefill {};
struct Preempt {};
/// An abort that must wait for an outstanding plan.
struct AbortInPlan {};
/// An abort that takes effect now.
struct Abort {};
/// The last token was sampled, and a later plan that has not returned has a row of the request.
struct FinishInPlan {};
/// The last token was sampled, and no outstanding plan has a row of the request any more.
struct Finish {};

}  // namespace request_event

/// The state's name, as messages and the README's table have it.
[[nodiscard]] std::string_view StateName(const RequestState& state);

// Moves `state` along the transition table in this folder's README.
// Throws: InternalError naming the state and the event when the pair is illegal; then neither has
// changed.
void Apply(RequestState& state, request_event::Admit&& event);
void Apply(RequestState& state, request_event::CompleteLoad event);
void Apply(RequestState& state, request_event::FailLoad event);
void Apply(RequestState& state, request_event::CompletePrefill event);
void Apply(RequestState& state, request_event::Preempt event);
void Apply(RequestState& state, request_event::AbortInPlan event);
void Apply(RequestState& state, request_event::Abort event);
void Apply(RequestState& state, request_event::FinishInPlan event);
void Apply(RequestState& state, request_event::Finish event);

}  // namespace lora_serve
