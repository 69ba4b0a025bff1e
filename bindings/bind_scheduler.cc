#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <utility>

#include "array_conversion.h"
#include "bindings.h"
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
prompt_token_ids : array-like of int, range int32
    1 to ``max_model_len - 1`` tokens; copied.
max_tokens : int
    Output tokens, at least 1; prompt and output together at most ``max_model_len``.
reuse_prefix : bool
    False when every prompt position must be computed (prompt logprobs).

Raises
------
InvalidArgumentError
    ``prompt_token_ids`` is not a flat array of integers in the range of int32.
)doc")
      .def(py::init([](std::int64_t request_id, std::int64_t adapter_id,
                       const py::object& prompt_token_ids, std::int32_t max_tokens,
                       bool reuse_prefix) {
             return NewRequest{
                 .request_id = RequestId(request_id),
                 .adapter_id = AdapterId(adapter_id),
                 .prompt_token_ids = ToVector<TokenId>(prompt_token_ids, "prompt_token_ids"),
                 .max_tokens = max_tokens,
                 .reuse_prefix = reuse_prefix};
           }),
           py::kw_only(), py::arg("request_id"), py::arg("adapter_id"), py::arg("prompt_token_ids"),
           py::arg("max_tokens"), py::arg("reuse_prefix") = true)
      .def_property_readonly("request_id",
                             [](const NewRequest& self) { return self.request_id.value(); })
      .def_property_readonly("adapter_id",
                             [](const NewRequest& self) { return self.adapter_id.value(); });
}

void BindStats(py::module_& module) {
  py::enum_<AdapterState>(module, "AdapterState",
                          "Where an adapter's generation stands; compare with ==.")
      .value("REGISTERED", AdapterState::kRegistered)
      .value("LOADING", AdapterState::kLoading)
      .value("RESIDENT", AdapterState::kResident)
      .value("DRAINING", AdapterState::kDraining);
  py::class_<AdapterStats>(module, "AdapterStats", "Requests and pages of one adapter generation.")
      .def_property_readonly("adapter_id",
                             [](const AdapterStats& self) { return self.adapter_id.value(); })
      .def_readonly("state", &AdapterStats::state)
      .def_property_readonly(
          "adapter_slot", [](const AdapterStats& self) { return self.adapter_slot.value(); },
          "-1 for the base model, and before the load was planned.")
      .def_readonly("load_failed", &AdapterStats::load_failed)
      .def_readonly("num_waiting_requests", &AdapterStats::num_waiting_requests)
      .def_readonly("num_running_requests", &AdapterStats::num_running_requests)
      .def_readonly("num_tree_pages", &AdapterStats::num_tree_pages)
      .def_readonly("num_private_pages", &AdapterStats::num_private_pages)
      .def_readonly("num_host_pages", &AdapterStats::num_host_pages)
      .def_readonly("num_hit_tokens", &AdapterStats::num_hit_tokens)
      .def_readonly("num_missed_tokens", &AdapterStats::num_missed_tokens);
  py::class_<SchedulerStats>(
      module, "SchedulerStats",
      "A snapshot of counts; ``total_*`` count since the scheduler was made.")
      .def_readonly("num_waiting_requests", &SchedulerStats::num_waiting_requests)
      .def_readonly("num_running_requests", &SchedulerStats::num_running_requests)
      .def_readonly("num_preempted_requests", &SchedulerStats::num_preempted_requests)
      .def_readonly("num_device_pages", &SchedulerStats::num_device_pages)
      .def_readonly("num_free_pages", &SchedulerStats::num_free_pages)
      .def_readonly("num_tree_pages", &SchedulerStats::num_tree_pages)
      .def_readonly("num_private_pages", &SchedulerStats::num_private_pages)
      .def_readonly("total_preemptions", &SchedulerStats::total_preemptions)
      .def_readonly("total_evicted_pages", &SchedulerStats::total_evicted_pages)
      .def_readonly("total_queried_tokens", &SchedulerStats::total_queried_tokens)
      .def_readonly("total_hit_tokens", &SchedulerStats::total_hit_tokens)
      .def_readonly("total_host_hit_tokens", &SchedulerStats::total_host_hit_tokens,
                    "Of ``total_hit_tokens``, those loaded back from the host.")
      .def_readonly("num_host_pages", &SchedulerStats::num_host_pages)
      .def_readonly("num_free_host_pages", &SchedulerStats::num_free_host_pages)
      .def_readonly("total_evicted_host_pages", &SchedulerStats::total_evicted_host_pages)
      .def_readonly("num_transfers", &SchedulerStats::num_transfers,
                    "Copies between the tiers that were started and not reported yet.")
      .def_readonly(
          "adapters", &SchedulerStats::adapters,
          "list of AdapterStats, ordered by adapter id; the base model (id 0) is the first.");
}

void BindStep(py::class_<Scheduler>& scheduler) {
  scheduler
      .def(
          "next_plan",
          [](Scheduler& self, std::int64_t now_us) {
            auto plan = std::make_unique<ExecutionPlan>();
            self.NextPlan(now_us, *plan);
            return plan;
          },
          py::arg("now_us"), py::call_guard<py::gil_scoped_release>(), R"doc(
Plan one step. The interpreter lock is released meanwhile.

Parameters
----------
now_us : int
    Microseconds of any clock that never goes back.

Returns
-------
ExecutionPlan
    Owned by the caller; empty when nothing can run, also because all that could waits for copies. An empty
    plan takes no ``advance``.

Raises
------
InternalError
    An earlier non-empty plan was not advanced, or the clock went back.
)doc")
      .def("advance", &Scheduler::Advance, py::arg("event"),
           py::call_guard<py::gil_scoped_release>(), R"doc(
Take the result of the outstanding plan. The interpreter lock is released meanwhile.

An event with ``plan_id`` -1 only reports copies; it is taken at any time.

Raises
------
InvalidArgumentError
    The event does not answer the plan (ids, lengths, loads), or reports a copy that is not under way; nothing
    is changed then.
)doc");
}

}  // namespace

void BindScheduler(py::module_& module) {
  BindNewRequest(module);
  BindStats(module);
  py::class_<Scheduler> scheduler(module, "Scheduler", R"doc(
Decides what runs next: continuous batching over the KV prefix cache, with adapters.

Not thread-safe. A step is ``plan = next_plan(now)``, then ``advance(event of that plan)``.

Parameters
----------
options : SchedulerOptions
    Limits; out-of-range values raise InvalidArgumentError.
)doc");
  scheduler.def(py::init<const SchedulerOptions&>(), py::arg("options"))
      .def(
          "open_adapter",
          [](Scheduler& self, std::int64_t adapter_id, std::uint64_t digest_seed,
             std::int64_t size_bytes) {
            self.OpenAdapter(AdapterId(adapter_id),
                             {.digest_seed = digest_seed, .size_bytes = size_bytes});
          },
          py::arg("adapter_id"), py::arg("digest_seed"), py::arg("size_bytes"), R"doc(
Open a generation: a namespace of its own, and a load in the next plan.

Raises
------
InvalidArgumentError
    The id was used before, or is not 1 or higher.
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
          "the plan is empty all the same, everything waits for copies to be reported.")
      .def("stats", &Scheduler::Stats, "A snapshot of the counts.")
      .def("check_invariants", &Scheduler::CheckInvariants,
           "Raise InternalError naming what is broken, in the scheduler or its cache; for tests.")
      .def_property_readonly("options", &Scheduler::options);
  BindStep(scheduler);
}

}  // namespace lora_serve::bindings
