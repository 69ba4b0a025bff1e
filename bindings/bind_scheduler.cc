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

void BindOptions(py::module_& module) {
  const SchedulerOptions defaults;
  py::class_<SchedulerOptions>(module, "SchedulerOptions", R"doc(
Limits of the scheduler.

Parameters
----------
num_device_pages : int
    KV pages; at least ``ceil(max_model_len / page_size)``, so that any request can run alone to its end.
page_size : int
    Tokens of one page.
max_num_seqs : int
    Requests that may hold a page-table row at once.
max_num_batched_tokens : int
    Tokens of one step, decodes and prefill chunks together; at least ``max_num_seqs``.
max_model_len : int
    Prompt and output tokens of one request.
max_loras : int
    Distinct adapters among the started requests; the base model is not counted.
enable_prefix_caching : bool
    False: no request starts from another's pages. Preempted requests still recover their own.
)doc")
      .def(py::init([](std::int32_t num_device_pages, std::int32_t page_size,
                       std::int32_t max_num_seqs, std::int32_t max_num_batched_tokens,
                       std::int32_t max_model_len, std::int32_t max_loras,
                       bool enable_prefix_caching) {
             return SchedulerOptions{.page_size = page_size,
                                     .num_device_pages = num_device_pages,
                                     .max_num_seqs = max_num_seqs,
                                     .max_num_batched_tokens = max_num_batched_tokens,
                                     .max_model_len = max_model_len,
                                     .max_loras = max_loras,
                                     .enable_prefix_caching = enable_prefix_caching};
           }),
           py::kw_only(), py::arg("num_device_pages"), py::arg("page_size") = defaults.page_size,
           py::arg("max_num_seqs") = defaults.max_num_seqs,
           py::arg("max_num_batched_tokens") = defaults.max_num_batched_tokens,
           py::arg("max_model_len") = defaults.max_model_len,
           py::arg("max_loras") = defaults.max_loras,
           py::arg("enable_prefix_caching") = defaults.enable_prefix_caching)
      .def_readonly("page_size", &SchedulerOptions::page_size)
      .def_readonly("num_device_pages", &SchedulerOptions::num_device_pages)
      .def_readonly("max_num_seqs", &SchedulerOptions::max_num_seqs)
      .def_readonly("max_num_batched_tokens", &SchedulerOptions::max_num_batched_tokens)
      .def_readonly("max_model_len", &SchedulerOptions::max_model_len)
      .def_readonly("max_loras", &SchedulerOptions::max_loras)
      .def_readonly("enable_prefix_caching", &SchedulerOptions::enable_prefix_caching);
}

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
      .def_readonly("num_private_pages", &AdapterStats::num_private_pages);
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
    Owned by the caller; empty when nothing can run. An empty plan takes no ``advance``.

Raises
------
InternalError
    An earlier non-empty plan was not advanced, or the clock went back.
)doc")
      .def("advance", &Scheduler::Advance, py::arg("event"),
           py::call_guard<py::gil_scoped_release>(), R"doc(
Take the result of the outstanding plan. The interpreter lock is released meanwhile.

Raises
------
InvalidArgumentError
    The event does not answer the plan (ids, lengths, loads); nothing is changed then.
)doc");
}

}  // namespace

void BindScheduler(py::module_& module) {
  BindOptions(module);
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
          "Whether a request waits or runs, a load or drain is due, or a plan is outstanding.")
      .def("stats", &Scheduler::Stats, "A snapshot of the counts.")
      .def("check_invariants", &Scheduler::CheckInvariants,
           "Raise InternalError naming what is broken, in the scheduler or its cache; for tests.")
      .def_property_readonly("options", &Scheduler::options);
  BindStep(scheduler);
}

}  // namespace lora_serve::bindings
