#include <pybind11/pybind11.h>
#include <pybind11/typing.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>

#include "array_conversion.h"
#include "bindings.h"
#include "common/check.h"
#include "common/errors.h"
#include "python_plan.h"

namespace lora_serve::bindings {
namespace {

namespace py = pybind11;

/// Binds one array of the plan, a vector or a span, as a property that returns a view.
template <typename Array, typename Owner>
void BindArray(py::class_<PythonPlan>& plan, const char* name, Array Owner::* member,
               const char* doc) {
  using T = std::remove_const_t<typename Array::value_type>;
  plan.def_property_readonly(
      name,
      [member](const py::object& self) -> py::array_t<T> {
        return ViewOf(std::span<const T>(self.cast<const PythonPlan&>().*member), self);
      },
      doc);
}

constexpr const char* kPlanDoc = R"doc(
One step of work, as plain arrays.

Every array is a read-only NumPy view of the plan's memory, without a copy; it keeps the plan alive, and the
memory given to ``Scheduler.next_plan``. Axis letters: B rows (one a scheduled request), T tokens of the step, L
``max_loras``, D page-table deltas, C copies between the tiers. Rows are ordered: decodes first, then prefill
chunks, both in the order of admission. The copies start before the rows run; until a copy is reported, no row
writes its source pages or touches its destination pages.

What the device needs lies in ``block``, for one copy to the device; ``layout`` says where. There the arrays of
rows and tokens have P entries, not B or T, when the plan is padded for a decode graph
(``SchedulerOptions.padded_batch_sizes``): padded rows have no token, length 0, no adapter (-1) and the page-table
row ``max_num_seqs``; padded tokens have id 0, no adapter, and belong to no row and no group. The named views show
no padding, but ``lora_tiles`` is always as long as the padded sizes ask. Where the arrays of rows, tokens and
tiles lie depends on ``max_loras`` and the padded sizes only.
)doc";

/// Of each array of the block.
const char* DocOf(std::string_view name) {
  struct ArrayDoc {
    std::string_view name;
    const char* doc;
  };
  static constexpr std::array<ArrayDoc, kPlanArrays.size()> kDocs = {{
      {"header",
       "[8] int32: rows, tokens, padded rows, padded tokens, deltas, delta pages, groups in use of "
       "``active_lora_ids``, adapters of the step."},
      {"active_lora_ids",
       "[L + 1] int32, adapter slot of each group of tokens, ascending; -1 = the group without "
       "adapter (the first one, where it exists), and unused."},
      {"num_tokens_per_lora", "[L + 1] int32, tokens of each group; 0 where unused."},
      {"lora_token_start_loc",
       "[L + 2] int32, where each group starts in ``token_indices_sorted_by_lora_ids``; T behind "
       "the groups in use."},
      {"page_table_rows", "[B] int32, row of the executor's page table, in [0, max_num_seqs)."},
      {"num_scheduled_tokens", "[B] int32, tokens of the row in this step, at least 1."},
      {"num_computed_tokens", "[B] int32, position of the row's first token."},
      {"seq_lens", "[B] int32, computed plus scheduled tokens."},
      {"adapter_slots", "[B] int32, adapter slot; -1 = no adapter."},
      {"query_start_loc",
       "[B + 1] int32, row b's tokens are ``query_start_loc[b]:query_start_loc[b + 1]``."},
      {"token_ids",
       "[T] int32, input tokens, row after row; -1 = the token sampled by the newest earlier plan "
       "with a row of this request."},
      {"token_lora_mapping", "[T] int32, adapter slot of each token; -1 = no adapter."},
      {"token_indices_sorted_by_lora_ids",
       "[T] int32, token positions, stably sorted by adapter slot, those without adapter first."},
      {"lora_tiles",
       "[6 * (1 + N) * 3] int32, N = padded tokens // 16 + L + 1; to be seen as [6, 1 + N, 3]: the "
       "groups cut into tiles, as ``lora_serve.kernels.lora_tiles.build_lora_tiles`` says. Of each "
       "of the six kinds first (tiles, tiles of adapters, 0), then of each tile (first position "
       "in ``token_indices_sorted_by_lora_ids``, tokens, adapter slot or -1), those without "
       "adapter last; 0 behind the last tile."},
      {"delta_rows", "[D] int32, page-table row of each delta."},
      {"delta_starts",
       "[D] int32, first changed entry of the row; entries before it are unchanged."},
      {"delta_offsets",
       "[D + 1] int32, ``delta_pages[delta_offsets[d]:delta_offsets[d + 1]]`` are the pages of "
       "delta d."},
      {"delta_pages", "[sum of the deltas] int32, page ids."},
  }};
  const auto found = std::ranges::find(kDocs, name, &ArrayDoc::name);
  LS_CHECK(found != kDocs.end(), "the plan's array ", name, " has no text");
  return found->doc;
}

py::typing::Dict<py::str, py::slice> LayoutOf(const PlanBlock& block) {
  py::typing::Dict<py::str, py::slice> layout;
  const PlanArrays padded = block.Padded();
  for (const PlanArrayInfo& array : kPlanArrays) {
    const PlanArrays::View view = padded.*array.member;
    const py::ssize_t start = view.empty() ? 0 : view.data() - block.block().data();
    layout[array.name] = py::slice(start, start + std::ssize(view), 1);
  }
  return layout;
}

/// The arrays that go to the device, and the block that they lie in.
void BindBlock(py::class_<PythonPlan>& plan) {
  for (const PlanArrayInfo& array : kPlanArrays) {
    BindArray(plan, array.name, array.member, DocOf(array.name));
  }
  plan.def_property_readonly(
      "block",
      [](const py::object& self) -> py::array_t<std::int32_t> {
        return ViewOf(self.cast<const PythonPlan&>().block(), self);
      },
      "[all of it] int32, the memory that holds the arrays named in ``layout``, and nothing else.");
  plan.def_property_readonly(
      "layout", [](const PythonPlan& self) { return LayoutOf(self); },
      "Where each array lies in ``block``, padded entries included: name to slice.");
  plan.def_readonly("num_padded_rows", &ExecutionPlan::num_padded_rows,
                    "P, rows with the padded ones; B when nothing is padded.");
  plan.def_readonly("num_padded_tokens", &ExecutionPlan::num_padded_tokens,
                    "Tokens with the padded ones; T when nothing is padded.");
  plan.def_property_readonly(
      "num_adapters",
      [](const PythonPlan& self) { return self.HeaderEntry(PlanHeader::kNumAdapters); },
      "Distinct adapters of the step; 0 = no row has one.");
}

void BindExecutionPlan(py::module_& module) {
  py::class_<PythonPlan> plan(module, "ExecutionPlan", kPlanDoc);
  plan.def_readonly("plan_id", &ExecutionPlan::plan_id,
                    "Counts up by one from plan to plan; -1 when the plan is empty.");
  plan.def_property_readonly("has_rows", &ExecutionPlan::HasRows,
                             "Whether any request runs in this step.");
  plan.def_property_readonly(
      "is_empty", &ExecutionPlan::IsEmpty,
      "Whether there is nothing to execute or to report: no ``advance`` is owed.");
  BindBlock(plan);
  BindArray(plan, "request_ids", &ExecutionPlan::request_ids, "[B] int64.");
  BindArray(plan, "num_cached_tokens", &ExecutionPlan::num_cached_tokens,
            "[B] int32, prompt tokens that came from the prefix cache at the first admission.");
  BindArray(plan, "samples_token", &ExecutionPlan::samples_token,
            "[B] uint8, 1 when a token is sampled for the row; 0 inside a prefill.");
  BindArray(plan, "drained_adapter_ids", &ExecutionPlan::drained_adapter_ids,
            "int64, generations to free; the first of the three.");
  BindArray(plan, "evicted_adapter_ids", &ExecutionPlan::evicted_adapter_ids,
            "int64, generations to take off the device, after the drained ones and before the "
            "loads. They may be loaded again.");
  BindArray(plan, "load_adapter_ids", &ExecutionPlan::load_adapter_ids,
            "int64, generations to bring to the device.");
  BindArray(plan, "load_adapter_slots", &ExecutionPlan::load_adapter_slots,
            "int32, the slot of each generation in ``load_adapter_ids``.");
  BindArray(plan, "expired_request_ids", &ExecutionPlan::expired_request_ids,
            "int64, requests whose deadline passed before they ran: they have ended, and no "
            "``advance`` is owed for them.");
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
    The plan it answers; -1 = none: then it only reports loads and copies, for those that end while nothing runs.
sampled_token_ids : array-like of int, [B], range int32
    In the plan's row order; -1 where the row did not sample.
is_finished : array-like of int or bool, [B]
    1 = the request ends with this token. The scheduler ends it at ``max_tokens`` by itself.
loaded_adapter_ids, failed_adapter_ids : array-like of int
    Loads of this or an earlier plan that have ended; each is reported once, in one of the two.
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

void BindPlanLayout(py::module_& module) {
  module.def(
      "plan_layout",
      [](std::int32_t max_loras, std::int32_t num_padded_rows, std::int32_t num_padded_tokens) {
        if (max_loras < 1 || num_padded_rows < 0 || num_padded_tokens < num_padded_rows) {
          throw InvalidArgumentError(
              "plan_layout: max_loras is " + std::to_string(max_loras) + ", the plan has " +
              std::to_string(num_padded_rows) + " rows and " + std::to_string(num_padded_tokens) +
              " tokens; expected max_loras of at least 1 and at least one token a row");
        }
        PlanBlock block;
        block.LayOut({.num_groups = max_loras + 1,
                      .num_rows = num_padded_rows,
                      .num_padded_rows = num_padded_rows,
                      .num_tokens = num_padded_tokens,
                      .num_padded_tokens = num_padded_tokens});
        return LayoutOf(block);
      },
      py::arg("max_loras"), py::arg("num_padded_rows"), py::arg("num_padded_tokens"),
      R"doc(
Where the arrays of a plan of these padded sizes lie in its block, without any page-table delta.

Parameters
----------
max_loras : int
    As in ``SchedulerOptions``.
num_padded_rows, num_padded_tokens : int
    As of the plan.

Returns
-------
dict from str to slice
    As ``ExecutionPlan.layout``; only the arrays of deltas may lie elsewhere in a plan.

Raises
------
InvalidArgumentError
    A size is out of range.
)doc");
}

}  // namespace

void BindPlan(py::module_& module) {
  BindExecutionPlan(module);
  BindExecutionEvent(module);
  BindPlanLayout(module);
}

}  // namespace lora_serve::bindings
