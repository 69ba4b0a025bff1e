#include <pybind11/pybind11.h>

#include <array>
#include <string>

#include "bindings.h"
#include "common/check.h"
#include "scheduler/scheduler.h"

namespace lora_serve::bindings {
namespace {

namespace py = pybind11;

struct WritePolicyName {
  WritePolicy policy;
  const char* name;
};
constexpr std::array<WritePolicyName, 3> kWritePolicyNames = {
    {{WritePolicy::kWriteThrough, "write_through"},
     {WritePolicy::kWriteBack, "write_back"},
     {WritePolicy::kOff, "off"}}};

WritePolicy WritePolicyOf(const std::string& name) {
  std::string expected;
  for (const auto& entry : kWritePolicyNames) {
    if (name == entry.name) return entry.policy;
    expected += (expected.empty() ? "'" : ", '") + std::string(entry.name) + "'";
  }
  throw InvalidArgumentError("write_policy is '" + name + "'; expected one of " + expected);
}

std::string NameOf(WritePolicy policy) {
  for (const auto& entry : kWritePolicyNames) {
    if (policy == entry.policy) return entry.name;
  }
  LS_CHECK(false, "write policy ", static_cast<int>(policy));
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
    Distinct adapters among the started requests; the base model is not counted.
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

Raises
------
InvalidArgumentError
    ``write_policy`` is none of the three. Ranges are checked by ``Scheduler``.
)doc")
      .def(py::init([](std::int32_t num_device_pages, std::int32_t page_size,
                       std::int32_t max_num_seqs, std::int32_t max_num_batched_tokens,
                       std::int32_t max_model_len, std::int32_t max_loras,
                       bool enable_prefix_caching, std::int32_t num_host_pages,
                       const std::string& write_policy, std::int32_t write_back_watermark_pages) {
             return SchedulerOptions{.page_size = page_size,
                                     .num_device_pages = num_device_pages,
                                     .max_num_seqs = max_num_seqs,
                                     .max_num_batched_tokens = max_num_batched_tokens,
                                     .max_model_len = max_model_len,
                                     .max_loras = max_loras,
                                     .enable_prefix_caching = enable_prefix_caching,
                                     .num_host_pages = num_host_pages,
                                     .write_policy = WritePolicyOf(write_policy),
                                     .write_back_watermark_pages = write_back_watermark_pages};
           }),
           py::kw_only(), py::arg("num_device_pages"), py::arg("page_size") = defaults.page_size,
           py::arg("max_num_seqs") = defaults.max_num_seqs,
           py::arg("max_num_batched_tokens") = defaults.max_num_batched_tokens,
           py::arg("max_model_len") = defaults.max_model_len,
           py::arg("max_loras") = defaults.max_loras,
           py::arg("enable_prefix_caching") = defaults.enable_prefix_caching,
           py::arg("num_host_pages") = defaults.num_host_pages,
           py::arg("write_policy") = NameOf(defaults.write_policy),
           py::arg("write_back_watermark_pages") = defaults.write_back_watermark_pages)
      .def_readonly("page_size", &SchedulerOptions::page_size)
      .def_readonly("num_device_pages", &SchedulerOptions::num_device_pages)
      .def_readonly("max_num_seqs", &SchedulerOptions::max_num_seqs)
      .def_readonly("max_num_batched_tokens", &SchedulerOptions::max_num_batched_tokens)
      .def_readonly("max_model_len", &SchedulerOptions::max_model_len)
      .def_readonly("max_loras", &SchedulerOptions::max_loras)
      .def_readonly("enable_prefix_caching", &SchedulerOptions::enable_prefix_caching)
      .def_readonly("num_host_pages", &SchedulerOptions::num_host_pages)
      .def_property_readonly("write_policy",
                             [](const SchedulerOptions& self) { return NameOf(self.write_policy); })
      .def_readonly("write_back_watermark_pages", &SchedulerOptions::write_back_watermark_pages);
}

}  // namespace lora_serve::bindings
