#include <pybind11/pybind11.h>

#include <string>
#include <type_traits>

#include "array_conversion.h"
#include "bindings.h"
#include "scheduler/execution_plan.h"

namespace lora_serve::bindings {
namespace {

namespace py = pybind11;

/// Binds one array of the plan as a property that returns a view.
template <typename T>
void BindArray(py::class_<ExecutionPlan>& plan, const char* name,
               std::vector<T> ExecutionPlan::* member, const char* doc) {
  using Array = py::array_t<T>;
  plan.def_property_readonly(
      name,
      [member](const py::object& self) -> Array {
        return ViewOf(self.cast<const ExecutionPlan&>().*member, self);
      },
      doc);
}

void BindExecutionPlan(py::module_& module) {
  py::class_<ExecutionPlan> plan(module, "ExecutionPlan", R"doc(
One step of work, as plain arrays.

Every array is a read-only NumPy view of the plan's memory, without a copy; it keeps the plan alive.
Axis letters: B rows (one a scheduled request), T tokens of the step, D page-table deltas, C copies between the
tiers. Rows are ordered: decodes first, then prefill chunks, both in the order of admission. The copies start
before the rows run; until a copy is reported, no row writes its source pages or touches its destination pages.
)doc");
  plan.def_readonly("plan_id", &ExecutionPlan::plan_id,
                    "Counts up by one from plan to plan; -1 when the plan is empty.");
  plan.def_property_readonly("has_rows", &ExecutionPlan::HasRows,
                             "Whether any request runs in this step.");
  plan.def_property_readonly(
      "is_empty", &ExecutionPlan::IsEmpty,
      "Whether there is nothing to execute or to report: no ``advance`` is owed.");
  BindArray(plan, "request_ids", &ExecutionPlan::request_ids, "[B] int64.");
  BindArray(plan, "page_table_rows", &ExecutionPlan::page_table_rows,
            "[B] int32, row of the executor's page table, in [0, max_num_seqs).");
  BindArray(plan, "num_scheduled_tokens", &ExecutionPlan::num_scheduled_tokens,
            "[B] int32, tokens of the row in this step, at least 1.");
  BindArray(plan, "num_computed_tokens", &ExecutionPlan::num_computed_tokens,
            "[B] int32, position of the row's first token.");
  BindArray(plan, "num_cached_tokens", &ExecutionPlan::num_cached_tokens,
            "[B] int32, prompt tokens that came from the prefix cache at the first admission.");
  BindArray(plan, "adapter_slots", &ExecutionPlan::adapter_slots,
            "[B] int32, adapter slot; -1 = no adapter.");
  BindArray(plan, "samples_token", &ExecutionPlan::samples_token,
            "[B] uint8, 1 when a token is sampled for the row; 0 inside a prefill.");
  BindArray(plan, "token_ids", &ExecutionPlan::token_ids,
            "[T] int32, input tokens, row after row.");
  BindArray(plan, "delta_rows", &ExecutionPlan::delta_rows,
            "[D] int32, page-table row of each delta.");
  BindArray(plan, "delta_starts", &ExecutionPlan::delta_starts,
            "[D] int32, first changed entry of the row; entries before it are unchanged.");
  BindArray(plan, "delta_offsets", &ExecutionPlan::delta_offsets,
            "[D + 1] int32, ``delta_pages[delta_offsets[d]:delta_offsets[d + 1]]`` are the pages "
            "of delta d.");
  BindArray(plan, "delta_pages", &ExecutionPlan::delta_pages,
            "[sum of the deltas] int32, page ids.");
  BindArray(plan, "load_adapter_ids", &ExecutionPlan::load_adapter_ids,
            "int64, generations to bring to the device.");
  BindArray(plan, "load_adapter_slots", &ExecutionPlan::load_adapter_slots,
            "int32, the slot of each generation in ``load_adapter_ids``.");
  BindArray(plan, "drained_adapter_ids", &ExecutionPlan::drained_adapter_ids,
            "int64, generations to free, before the loads.");
  BindArray(plan, "transfer_ids", &ExecutionPlan::transfer_ids,
            "[C] int64, copies between the tiers, in this order; ids are never reused.");
  BindArray(plan, "transfer_kinds", &ExecutionPlan::transfer_kinds,
            "[C] int8, 0 = write back (device to host), 1 = load back (host to device).");
  BindArray(plan, "transfer_offsets", &ExecutionPlan::transfer_offsets,
            "[C + 1] int32, entries ``transfer_offsets[c]:transfer_offsets[c + 1]`` of the two "
            "page arrays belong to copy c.");
  BindArray(plan, "transfer_source_pages", &ExecutionPlan::transfer_source_pages,
            "[pages of all copies] int32, page ids of the tier that is read.");
  BindArray(plan, "transfer_destination_pages", &ExecutionPlan::transfer_destination_pages,
            "[pages of all copies] int32, page ids of the tier that is written.");
}

void BindExecutionEvent(py::module_& module) {
  py::class_<ExecutionEvent>(module, "ExecutionEvent", R"doc(
What the executor did with a plan.

Parameters
----------
plan_id : int
    The plan it answers; -1 = none: then it only reports copies, for those that end while nothing runs.
sampled_token_ids : array-like of int, [B], range int32
    In the plan's row order; -1 where the row did not sample.
is_finished : array-like of int or bool, [B]
    1 = the request ends with this token. The scheduler ends it at ``max_tokens`` by itself.
loaded_adapter_ids, failed_adapter_ids : array-like of int
    The generations of the plan's loads, each in exactly one of the two.
completed_transfer_ids, failed_transfer_ids : array-like of int
    Copies of this or an earlier plan that have ended; each is reported once, in one of the two.

Raises
------
InvalidArgumentError
    An array is not flat, not of integers, or out of range. Values are copied, never rounded or wrapped.
)doc")
      .def(
          py::init([](std::int64_t plan_id, const py::object& sampled_token_ids,
                      const py::object& is_finished, const py::object& loaded_adapter_ids,
                      const py::object& failed_adapter_ids,
                      const py::object& completed_transfer_ids,
                      const py::object& failed_transfer_ids) {
            return ExecutionEvent{
                .plan_id = plan_id,
                .sampled_token_ids = ToVector<std::int32_t>(sampled_token_ids, "sampled_token_ids"),
                .is_finished = ToVector<std::uint8_t>(is_finished, "is_finished"),
                .loaded_adapter_ids =
                    ToVector<std::int64_t>(loaded_adapter_ids, "loaded_adapter_ids"),
                .failed_adapter_ids =
                    ToVector<std::int64_t>(failed_adapter_ids, "failed_adapter_ids"),
                .completed_transfer_ids =
                    ToVector<std::int64_t>(completed_transfer_ids, "completed_transfer_ids"),
                .failed_transfer_ids =
                    ToVector<std::int64_t>(failed_transfer_ids, "failed_transfer_ids")};
          }),
          py::kw_only(), py::arg("plan_id"), py::arg("sampled_token_ids") = py::tuple(),
          py::arg("is_finished") = py::tuple(), py::arg("loaded_adapter_ids") = py::tuple(),
          py::arg("failed_adapter_ids") = py::tuple(),
          py::arg("completed_transfer_ids") = py::tuple(),
          py::arg("failed_transfer_ids") = py::tuple())
      .def_readonly("plan_id", &ExecutionEvent::plan_id);
}

}  // namespace

void BindPlan(py::module_& module) {
  BindExecutionPlan(module);
  BindExecutionEvent(module);
}

}  // namespace lora_serve::bindings
