#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "array_conversion.h"
#include "bindings.h"
#include "python_plan.h"
#include "scheduler/scheduler.h"

namespace lora_serve::bindings {
namespace {

namespace py = pybind11;

void BindNewRequest(py::module_& module) {
  py::class_<NewRequest>(module, "NewRequest", R"doc(
A request for ``Scheduler.add_request``.

Parameters
----------
request_id : int
    Unique among the live requests.
adapter_id : int
    The adapter's generation; 0 = the base model.
isolation_domain : bytes
    Prefixes are shared within one domain only, whatever the adapter; empty = the default domain.
prompt_token_ids : array-like of int, range int32
    1 to ``max_model_len - 1`` tokens; copied.
max_tokens : int
    Output tokens, at least 1; prompt and output together at most ``max_model_len``.
reuse_prefix : bool
    False when every prompt position must be computed (prompt logprobs).
priority : int
    Class of priority; lower goes first.
arrival_us : int or None
    When it arrived, on the clock of ``next_plan``; None = at the last ``next_plan``.
deadline_us : int or None
    If it has not run by then, on the same clock, it fails; None = it waits as long as it must.

Raises
------
InvalidArgumentError
    ``prompt_token_ids`` is not a flat array of integers in the range of int32.
)doc")
      .def(py::init([](std::int64_t request_id, std::int64_t adapter_id,
                       const py::object& prompt_token_ids, std::int32_t max_tokens,
                       bool reuse_prefix, std::int32_t priority,
                       std::optional<std::int64_t> arrival_us,
                       std::optional<std::int64_t> deadline_us, const py::bytes& isolation_domain) {
             return NewRequest{
                 .request_id = RequestId(request_id),
                 .adapter_id = AdapterId(adapter_id),
                 .isolation_domain = std::string(isolation_domain),
                 .prompt_token_ids = ToVector<TokenId>(prompt_token_ids, "prompt_token_ids"),
                 .max_tokens = max_tokens,
                 .reuse_prefix = reuse_prefix,
                 .priority = priority,
                 .arrival_us = arrival_us.value_or(-1),
                 .deadline_us = deadline_us.value_or(kNoDeadline)};
           }),
           py::kw_only(), py::arg("request_id"), py::arg("adapter_id"), py::arg("prompt_token_ids"),
           py::arg("max_tokens"), py::arg("reuse_prefix") = true, py::arg("priority") = 0,
           py::arg("arrival_us") = py::none(), py::arg("deadline_us") = py::none(),
           py::arg("isolation_domain") = py::bytes())
      .def_property_readonly("request_id",
                             [](const NewRequest& self) { return self.request_id.value(); })
      .def_property_readonly("adapter_id",
                             [](const NewRequest& self) { return self.adapter_id.value(); });
}

void BindStep(py::class_<Scheduler>& scheduler) {
  scheduler
      .def(
          "next_plan",
          [](Scheduler& self, std::int64_t now_us, std::optional<py::array> block) {
            auto plan = std::make_unique<PythonPlan>();
            if (block.has_value()) {
              plan->memory = WritableEntries<std::int32_t>(*block, "block");
              plan->block_owner = *std::move(block);
            }
            // The interpreter lock is kept: a thread that loads adapters would take it, and the
            // step loop would wait for longer to get it back than all of this takes.
            self.NextPlan(now_us, *plan);
            return plan;
          },
          py::arg("now_us"), py::arg("block") = py::none(), R"doc(
Plan one step. The interpreter lock is kept: to get it back would take longer than the step.

Parameters
----------
now_us : int
    Microseconds of any clock that never goes back.
block : numpy.ndarray, [plan_block_size or more] int32, contiguous and writable, optional
    Where the plan's ``block`` is written, such as pinned memory; it starts at a multiple of 16 bytes. It must not
    be written again while the plan is read: take one more than plans outstanding, in turn. The plan keeps it
    alive. None: the plan has memory of its own.

Returns
-------
ExecutionPlan
    Owned by the caller; empty when nothing can run, also because all that could waits for the outstanding plan,
    for loads or for copies. An empty plan takes no ``advance``, but may list requests that expired.

Raises
------
InternalError
    Two earlier non-empty plans were not advanced, or the clock went back.
InvalidArgumentError
    ``block`` is not such an array; nothing is changed then.
)doc")
      .def("advance", &Scheduler::Advance, py::arg("event"), R"doc(
Take the result of the oldest outstanding plan. The interpreter lock is kept, as in ``next_plan``.

An event with ``plan_id`` -1 only reports loads and copies; it is taken at any time.

Raises
------
InvalidArgumentError
    The event does not answer the plan (ids, lengths), or reports a load or a copy that is not under way; nothing
    is changed then.
)doc");
}

/// What routers want to know of the cache.
void BindEvents(py::class_<Scheduler>& scheduler) {
  scheduler
      .def("set_events_enabled", &Scheduler::SetEventsEnabled, py::arg("is_enabled"), R"doc(
Note from now on which KV pages come to a tier and leave it, or end that.

The first events are all pages that are there. Switching off forgets what was not taken. Costs nothing while off.
)doc")
      .def("take_events", &Scheduler::TakeEvents, R"doc(
Give the events since the last call, in order.

Returns
-------
list of KVEvent
    Every page is stored once in a tier and removed once.
)doc");
}

/// What the engine asks between plans to keep the right adapters in host memory.
void BindReadAhead(py::class_<Scheduler>& scheduler) {
  const auto values_of = [](const std::vector<AdapterId>& ids) {
    std::vector<std::int64_t> values;
    for (const AdapterId id : ids) values.push_back(id.value());
    return values;
  };
  scheduler.def(
      "adapters_to_stage",
      [values_of](const Scheduler& self) { return values_of(self.AdaptersToStage()); },
      R"doc(
Give the generations to read into host memory next, the first in front.

Of those that wait to be loaded, the ones that the next four rounds of loads (of ``max_loading_adapters`` each) bring
to the device, as far as it holds them all at once, less those that are staged.
)doc");
  scheduler.def(
      "waiting_adapters",
      [values_of](const Scheduler& self, const std::vector<std::int64_t>& adapter_ids) {
        const std::vector<AdapterId> ids(adapter_ids.begin(), adapter_ids.end());
        return values_of(self.WaitingAdapters(ids));
      },
      py::arg("adapter_ids"), R"doc(
Give those of ``adapter_ids`` that wait for memory or a place on the device, whose turn comes first in front.

Unknown ids are left out.
)doc");
}

}  // namespace

void BindScheduler(py::module_& module) {
  BindNewRequest(module);
  py::class_<Scheduler> scheduler(module, "Scheduler", R"doc(
Decides what runs next: continuous batching over the KV prefix cache, with adapters.

Not thread-safe. A step is ``plan = next_plan(now)``, then ``advance(event of that plan)``. One more plan may be
made while one is outstanding; its rows may have input tokens that only the executor will know.

Parameters
----------
options : SchedulerOptions
    Limits; out-of-range values raise InvalidArgumentError.
)doc");
  scheduler.def(py::init<const SchedulerOptions&>(), py::arg("options"))
      .def(
          "open_adapter",
          [](Scheduler& self, std::int64_t adapter_id, std::uint64_t digest_seed,
             std::int64_t size_bytes, double weight, bool is_pinned, bool is_staged) {
            return self.OpenAdapter(AdapterId(adapter_id), {.digest_seed = digest_seed,
                                                            .size_bytes = size_bytes,
                                                            .weight = weight,
                                                            .is_pinned = is_pinned,
                                                            .is_staged = is_staged});
          },
          py::arg("adapter_id"), py::kw_only(), py::arg("digest_seed"), py::arg("size_bytes"),
          py::arg("weight") = 1.0, py::arg("is_pinned") = false, py::arg("is_staged") = false,
          R"doc(
Open a generation with a namespace of its own.

Parameters
----------
adapter_id : int
    1 or higher, and above every id opened before.
digest_seed : int
    64 bits that seed the hashes of its KV pages.
size_bytes : int
    Bytes on the device.
weight : float
    Its share under the policy 'fair', beside that of others; above 0, at most 1000.
is_pinned : bool
    Never taken off the device; it is brought in although no request waits for it.
is_staged : bool
    Its weights lie in host memory; see ``set_adapter_staged``.

Returns
-------
bool
    True when there is room for it without taking another off the device: then the next plan loads it. Else it is
    loaded when requests wait for it, or when it is pinned.

Raises
------
InvalidArgumentError
    The id is not 1 or higher, or not above every id opened before, or a field is out of range.
CapacityError
    It can never fit beside the pinned ones.
)doc")
      .def(
          "set_adapter_pinned",
          [](Scheduler& self, std::int64_t adapter_id, bool is_pinned) {
            self.SetAdapterPinned(AdapterId(adapter_id), is_pinned);
          },
          py::arg("adapter_id"), py::arg("is_pinned"), R"doc(
Pin a generation to the device, or end that.

Raises
------
AdapterNotFoundError
    The generation is not open, is draining, has failed to load, or is the base model.
CapacityError
    With it the pinned ones take so much that another open one could never run.
)doc")
      .def(
          "set_adapter_staged",
          [](Scheduler& self, std::int64_t adapter_id, bool is_staged) {
            self.SetAdapterStaged(AdapterId(adapter_id), is_staged);
          },
          py::arg("adapter_id"), py::arg("is_staged"), R"doc(
Say whether a generation's weights lie in host memory: then a load takes effect with its plan.

The rows of the plan that loads it may use it already, and the event of that plan reports the load. If it fails,
the tokens of these rows mean nothing, and their requests are aborted before the event.

Raises
------
AdapterNotFoundError
    The generation is not open.
)doc")
      .def(
          "set_adapter_weight",
          [](Scheduler& self, std::int64_t adapter_id, double weight) {
            self.SetAdapterWeight(AdapterId(adapter_id), weight);
          },
          py::arg("adapter_id"), py::arg("weight"), R"doc(
Set a generation's share under the policy 'fair'.

Raises
------
AdapterNotFoundError
    The generation is not open, or is draining.
InvalidArgumentError
    The weight is not above 0 and at most 1000.
)doc")
      .def(
          "drain_adapter",
          [](Scheduler& self, std::int64_t adapter_id) {
            self.DrainAdapter(AdapterId(adapter_id));
          },
          py::arg("adapter_id"), R"doc(
Refuse new requests of the generation; once nothing refers to it, one plan lists it as drained.

Raises
------
AdapterNotFoundError
    The generation is not open, or is the base model. Draining twice changes nothing.
)doc")
      .def(
          "add_request",
          [](Scheduler& self, const NewRequest& request) { self.AddRequest(request); },
          py::arg("request"), R"doc(
Queue a request.

Raises
------
InvalidArgumentError
    A field is out of range, or the id is live.
AdapterNotFoundError
    The generation is not open, is draining, or its load failed.
CapacityError
    A limit on what waits is reached.
)doc")
      .def(
          "add_requests",
          [](Scheduler& self, std::vector<NewRequest> requests) {
            self.AddRequests(std::move(requests));
          },
          py::arg("requests"), R"doc(
Queue all requests, in their order, or none of them.

Raises
------
InvalidArgumentError
    A field is out of range, or an id is live or named twice.
AdapterNotFoundError
    A generation is not open, is draining, or its load failed.
CapacityError
    With all of them a limit on what waits is exceeded; each counts as rejected.
)doc")
      .def(
          "abort",
          [](Scheduler& self, std::int64_t request_id) {
            return self.Abort(RequestId(request_id));
          },
          py::arg("request_id"), R"doc(
End a request wherever it is; returns False when the id is not live (a late abort is normal).
)doc")
      .def_property_readonly(
          "has_work", &Scheduler::HasWork,
          "Whether a request waits or runs, a load or drain is due, or a plan is outstanding. If "
          "the plan is empty all the same, and none is outstanding, everything waits for loads and "
          "copies to be reported.")
      .def("counters", &Scheduler::Counters,
           "The counts that cost the same however many adapters and requests there are.")
      .def("stats", &Scheduler::Stats, "All counts; costs in proportion to the adapters.")
      .def("check_invariants", &Scheduler::CheckInvariants,
           "Raise InternalError naming what is broken, in the scheduler or its cache; for tests.")
      .def_property_readonly(
          "plan_block_size",
          [](const Scheduler& self) { return PlanBlockCapacity(self.options()); },
          "Entries of a ``block`` that holds any plan of this scheduler.")
      .def_property_readonly("options", &Scheduler::options);
  BindStep(scheduler);
  BindReadAhead(scheduler);
  BindEvents(scheduler);
}

}  // namespace lora_serve::bindings
