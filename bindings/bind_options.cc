#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "common/check.h"
#include "scheduler/scheduler.h"

namespace lora_serve::bindings {
namespace {

namespace py = pybind11;

/// What Python calls a value of an enumeration.
template <typename Enum>
struct Named {
  Enum value;
  const char* name;
};
constexpr std::array<Named<WritePolicy>, 3> kWritePolicyNames = {
    {{WritePolicy::kWriteThrough, "write_through"},
     {WritePolicy::kWriteBack, "write_back"},
     {WritePolicy::kOff, "off"}}};
constexpr std::array<Named<SchedulingPolicy>, 3> kSchedulingPolicyNames = {
    {{SchedulingPolicy::kFair, "fair"},
     {SchedulingPolicy::kFcfs, "fcfs"},
     {SchedulingPolicy::kLpm, "lpm"}}};

/// The value of an enumeration that Python calls `name`.
/// Throws: InvalidArgumentError naming `field` and the names there are.
template <typename Enum, std::size_t N>
Enum ValueOf(const std::array<Named<Enum>, N>& names, const std::string& name, const char* field) {
  std::string expected;
  for (const auto& entry : names) {
    if (name == entry.name) return entry.value;
    expected += (expected.empty() ? "'" : ", '") + std::string(entry.name) + "'";
  }
  throw InvalidArgumentError(std::string(field) + " is '" + name + "'; expected one of " +
                             expected);
}

template <typename Enum, std::size_t N>
std::string NameOf(const std::array<Named<Enum>, N>& names, Enum value) {
  for (const auto& entry : names) {
    if (value == entry.value) return entry.name;
  }
  LS_CHECK(false, "enumeration value ", static_cast<int>(value));
  return {};
}

}  // namespace

void BindSchedulerOptions(py::module_& module) {
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
    Distinct adapters among the requests that run or were preempted; the base model is not counted.
enable_prefix_caching : bool
    False: no request starts from another's pages. Preempted requests still recover their own.
num_host_pages : int
    KV pages of the host tier; 0 = there is none.
write_policy : str
    When pages are copied to the host: 'write_through' (as soon as they are published), 'write_back' (shortly
    before they would be evicted) or 'off' (only those of preempted requests).
write_back_watermark_pages : int
    For 'write_back': device pages to be kept free, or evictable without loss. 0 = what a step can take,
    ``max_num_batched_tokens / page_size + max_num_seqs``, but at most a quarter of the device pages.
adapter_memory_bytes : int
    Bytes of the adapters that are on the device or on their way there, together; 0 = no limit.
max_loading_adapters : int
    Loads that waiting requests start are under way at once, at least 1.
loads_staged_only : bool
    Loads wait until the caller has brought the adapter into host memory (``set_adapter_staged``), as it then
    must for those of ``adapters_to_stage``: nobody's room is kept, or taken from others, for weights that are
    still on a disk.
adapter_patience_us : int
    How long an adapter without room waits before one that has it is paused or closed to newcomers.
adapter_time_slice_steps : int
    Steps after which an adapter may be paused for one that waits, when as many wait as have room; 0 = never.
adapter_pause_us : int
    How long a paused adapter waits before another one is paused for it.
scheduling_policy : str
    Who of the waiting requests of one class of priority goes first: 'fair' (the adapter that has had the fewest
    tokens for its weight), 'fcfs' (in order of arrival) or 'lpm' (the longest cached prefix).
priority_ageing_us : int
    Waiting this long counts as much as one class of priority, at least 1.
max_queued_requests, max_queued_tokens : int
    Queued requests, and their prompt tokens, at most; 0 = no limit.
max_requests_per_adapter : int
    Live requests of one adapter, or of the base model, at most; 0 = no limit.
padded_batch_sizes : list of int
    Batch sizes of a decode graph, ascending: a plan of decodes only gets empty rows up to the next of them.

Raises
------
InvalidArgumentError
    A policy has none of its names. Ranges are checked by ``Scheduler``.
)doc")
      .def(
          py::init([](std::int32_t num_device_pages, std::int32_t page_size,
                      std::int32_t max_num_seqs, std::int32_t max_num_batched_tokens,
                      std::int32_t max_model_len, std::int32_t max_loras,
                      bool enable_prefix_caching, std::int32_t num_host_pages,
                      const std::string& write_policy, std::int32_t write_back_watermark_pages,
                      std::int64_t adapter_memory_bytes, std::int32_t max_loading_adapters,
                      bool loads_staged_only, std::int64_t adapter_patience_us,
                      std::int32_t adapter_time_slice_steps, std::int64_t adapter_pause_us,
                      const std::string& scheduling_policy, std::int64_t priority_ageing_us,
                      std::int32_t max_queued_requests, std::int64_t max_queued_tokens,
                      std::int32_t max_requests_per_adapter,
                      std::vector<std::int32_t> padded_batch_sizes) {
            return SchedulerOptions{
                .page_size = page_size,
                .num_device_pages = num_device_pages,
                .max_num_seqs = max_num_seqs,
                .max_num_batched_tokens = max_num_batched_tokens,
                .max_model_len = max_model_len,
                .max_loras = max_loras,
                .enable_prefix_caching = enable_prefix_caching,
                .num_host_pages = num_host_pages,
                .write_policy = ValueOf(kWritePolicyNames, write_policy, "write_policy"),
                .write_back_watermark_pages = write_back_watermark_pages,
                .adapter_memory_bytes = adapter_memory_bytes,
                .max_loading_adapters = max_loading_adapters,
                .loads_staged_only = loads_staged_only,
                .adapter_patience_us = adapter_patience_us,
                .adapter_time_slice_steps = adapter_time_slice_steps,
                .adapter_pause_us = adapter_pause_us,
                .scheduling_policy =
                    ValueOf(kSchedulingPolicyNames, scheduling_policy, "scheduling_policy"),
                .priority_ageing_us = priority_ageing_us,
                .max_queued_requests = max_queued_requests,
                .max_queued_tokens = max_queued_tokens,
                .max_requests_per_adapter = max_requests_per_adapter,
                .padded_batch_sizes = std::move(padded_batch_sizes)};
          }),
          py::kw_only(), py::arg("num_device_pages"), py::arg("page_size") = defaults.page_size,
          py::arg("max_num_seqs") = defaults.max_num_seqs,
          py::arg("max_num_batched_tokens") = defaults.max_num_batched_tokens,
          py::arg("max_model_len") = defaults.max_model_len,
          py::arg("max_loras") = defaults.max_loras,
          py::arg("enable_prefix_caching") = defaults.enable_prefix_caching,
          py::arg("num_host_pages") = defaults.num_host_pages,
          py::arg("write_policy") = NameOf(kWritePolicyNames, defaults.write_policy),
          py::arg("write_back_watermark_pages") = defaults.write_back_watermark_pages,
          py::arg("adapter_memory_bytes") = defaults.adapter_memory_bytes,
          py::arg("max_loading_adapters") = defaults.max_loading_adapters,
          py::arg("loads_staged_only") = defaults.loads_staged_only,
          py::arg("adapter_patience_us") = defaults.adapter_patience_us,
          py::arg("adapter_time_slice_steps") = defaults.adapter_time_slice_steps,
          py::arg("adapter_pause_us") = defaults.adapter_pause_us,
          py::arg("scheduling_policy") = NameOf(kSchedulingPolicyNames, defaults.scheduling_policy),
          py::arg("priority_ageing_us") = defaults.priority_ageing_us,
          py::arg("max_queued_requests") = defaults.max_queued_requests,
          py::arg("max_queued_tokens") = defaults.max_queued_tokens,
          py::arg("max_requests_per_adapter") = defaults.max_requests_per_adapter,
          py::arg("padded_batch_sizes") = defaults.padded_batch_sizes)
      .def_readonly("page_size", &SchedulerOptions::page_size)
      .def_readonly("num_device_pages", &SchedulerOptions::num_device_pages)
      .def_readonly("max_num_seqs", &SchedulerOptions::max_num_seqs)
      .def_readonly("max_num_batched_tokens", &SchedulerOptions::max_num_batched_tokens)
      .def_readonly("max_model_len", &SchedulerOptions::max_model_len)
      .def_readonly("max_loras", &SchedulerOptions::max_loras)
      .def_readonly("enable_prefix_caching", &SchedulerOptions::enable_prefix_caching)
      .def_readonly("num_host_pages", &SchedulerOptions::num_host_pages)
      .def_property_readonly(
          "write_policy",
          [](const SchedulerOptions& self) { return NameOf(kWritePolicyNames, self.write_policy); })
      .def_readonly("write_back_watermark_pages", &SchedulerOptions::write_back_watermark_pages)
      .def_readonly("adapter_memory_bytes", &SchedulerOptions::adapter_memory_bytes)
      .def_readonly("max_loading_adapters", &SchedulerOptions::max_loading_adapters)
      .def_readonly("loads_staged_only", &SchedulerOptions::loads_staged_only)
      .def_readonly("adapter_patience_us", &SchedulerOptions::adapter_patience_us)
      .def_readonly("adapter_time_slice_steps", &SchedulerOptions::adapter_time_slice_steps)
      .def_readonly("adapter_pause_us", &SchedulerOptions::adapter_pause_us)
      .def_property_readonly("scheduling_policy",
                             [](const SchedulerOptions& self) {
                               return NameOf(kSchedulingPolicyNames, self.scheduling_policy);
                             })
      .def_readonly("priority_ageing_us", &SchedulerOptions::priority_ageing_us)
      .def_readonly("max_queued_requests", &SchedulerOptions::max_queued_requests)
      .def_readonly("max_queued_tokens", &SchedulerOptions::max_queued_tokens)
      .def_readonly("max_requests_per_adapter", &SchedulerOptions::max_requests_per_adapter)
      .def_readonly("padded_batch_sizes", &SchedulerOptions::padded_batch_sizes);
}

}  // namespace lora_serve::bindings
