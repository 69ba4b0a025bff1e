#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "scheduler/scheduler_stats.h"

namespace lora_serve::bindings {
namespace {

namespace py = pybind11;

void BindAdapterStats(py::module_& module) {
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
          "-1 for the base model, and while it is neither on the device nor on its way there.")
      .def_readonly("load_failed", &AdapterStats::load_failed)
      .def_readonly("is_pinned", &AdapterStats::is_pinned)
      .def_readonly("is_closed", &AdapterStats::is_closed,
                    "Closed to newcomers until an adapter that has waited for its room got in.")
      .def_readonly("is_paused", &AdapterStats::is_paused,
                    "Its started requests are left out of the plans for a while.")
      .def_readonly("size_bytes", &AdapterStats::size_bytes)
      .def_readonly("num_waiting_requests", &AdapterStats::num_waiting_requests)
      .def_readonly("num_running_requests", &AdapterStats::num_running_requests)
      .def_readonly("num_tree_pages", &AdapterStats::num_tree_pages)
      .def_readonly("num_private_pages", &AdapterStats::num_private_pages)
      .def_readonly("num_host_pages", &AdapterStats::num_host_pages)
      .def_readonly("num_hit_tokens", &AdapterStats::num_hit_tokens)
      .def_readonly("num_missed_tokens", &AdapterStats::num_missed_tokens)
      .def_readonly("num_scheduled_tokens", &AdapterStats::num_scheduled_tokens,
                    "Prompt tokens computed, and output.")
      .def_readonly("num_started_requests", &AdapterStats::num_started_requests)
      .def_readonly("total_queue_us", &AdapterStats::total_queue_us,
                    "From arrival to the first step, of the requests that started.")
      .def_readonly("num_loads", &AdapterStats::num_loads)
      .def_readonly("num_evictions", &AdapterStats::num_evictions,
                    "Times that it was taken off the device to make room.");
}

void BindCounters(py::module_& module) {
  py::class_<SchedulerCounters>(
      module, "SchedulerCounters",
      "Counts that cost the same however many adapters and requests there are; ``total_*`` count "
      "since the scheduler was made.")
      .def_readonly("num_queued_requests", &SchedulerCounters::num_queued_requests)
      .def_readonly("num_queued_tokens", &SchedulerCounters::num_queued_tokens)
      .def_readonly("num_preempted_requests", &SchedulerCounters::num_preempted_requests)
      .def_readonly("num_running_requests", &SchedulerCounters::num_running_requests)
      .def_readonly("num_resident_adapters", &SchedulerCounters::num_resident_adapters)
      .def_readonly("num_loading_adapters", &SchedulerCounters::num_loading_adapters)
      .def_readonly("num_adapter_bytes", &SchedulerCounters::num_adapter_bytes,
                    "Of the resident and the loading ones.")
      .def_readonly("num_adapters_in_line", &SchedulerCounters::num_adapters_in_line,
                    "Those with waiting requests that are neither resident nor loading.")
      .def_readonly("num_paused_adapters", &SchedulerCounters::num_paused_adapters)
      .def_readonly("total_plans", &SchedulerCounters::total_plans)
      .def_readonly("total_decode_rows", &SchedulerCounters::total_decode_rows)
      .def_readonly("total_prefill_rows", &SchedulerCounters::total_prefill_rows)
      .def_readonly("total_prefill_tokens", &SchedulerCounters::total_prefill_tokens)
      .def_readonly("total_step_adapters", &SchedulerCounters::total_step_adapters,
                    "Distinct adapters of each plan, added up.")
      .def_readonly("total_started_requests", &SchedulerCounters::total_started_requests)
      .def_readonly("total_queue_us", &SchedulerCounters::total_queue_us,
                    "From arrival to the first step, of the requests that started.")
      .def_readonly("total_finished_requests", &SchedulerCounters::total_finished_requests)
      .def_readonly("total_aborted_requests", &SchedulerCounters::total_aborted_requests)
      .def_readonly("total_expired_requests", &SchedulerCounters::total_expired_requests)
      .def_readonly("total_rejected_requests", &SchedulerCounters::total_rejected_requests)
      .def_readonly("total_preemptions", &SchedulerCounters::total_preemptions)
      .def_readonly("total_adapter_loads", &SchedulerCounters::total_adapter_loads)
      .def_readonly("total_failed_adapter_loads", &SchedulerCounters::total_failed_adapter_loads)
      .def_readonly("total_adapter_evictions", &SchedulerCounters::total_adapter_evictions)
      .def_readonly("total_adapter_pauses", &SchedulerCounters::total_adapter_pauses)
      .def_readonly("total_closings", &SchedulerCounters::total_closings,
                    "Adapters closed to newcomers, added up over the plans.");
}

}  // namespace

void BindStats(py::module_& module) {
  BindAdapterStats(module);
  BindCounters(module);
  py::class_<SchedulerStats, SchedulerCounters>(
      module, "SchedulerStats",
      "All counts: those of ``SchedulerCounters``, of pages, and of each adapter.")
      .def_readonly("num_waiting_requests", &SchedulerStats::num_waiting_requests,
                    "Queued and preempted.")
      .def_readonly("num_device_pages", &SchedulerStats::num_device_pages)
      .def_readonly("num_free_pages", &SchedulerStats::num_free_pages)
      .def_readonly("num_available_pages", &SchedulerStats::num_available_pages,
                    "Free, or evictable now: what no request uses.")
      .def_readonly("num_tree_pages", &SchedulerStats::num_tree_pages)
      .def_readonly("num_private_pages", &SchedulerStats::num_private_pages)
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

}  // namespace lora_serve::bindings
