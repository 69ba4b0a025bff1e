#include "scheduler/event_check.h"

#include <algorithm>
#include <array>
#include <set>
#include <span>
#include <string>
#include <string_view>

#include "common/errors.h"

namespace lora_serve {
namespace {

[[noreturn]] void Refuse(const ExecutionEvent& event, const std::string& what) {
  throw InvalidArgumentError("the event of plan " + std::to_string(event.plan_id) + " " + what);
}

void CheckLength(const ExecutionEvent& event, std::string_view field, std::size_t found,
                 std::size_t expected) {
  if (found != expected) {
    Refuse(event, "has " + std::to_string(found) + " entries in " + std::string(field) +
                      "; expected one a row of the plan: " + std::to_string(expected));
  }
}

void CheckRow(const ExecutionEvent& event, const ScheduledRow& row, std::size_t index) {
  const auto where = " in row " + std::to_string(index);
  const TokenId token = event.sampled_token_ids[index];
  const std::uint8_t is_finished = event.is_finished[index];
  if (row.samples_token && token < 0) {
    Refuse(event, "has sampled token " + std::to_string(token) + where + "; expected a token id");
  }
  if (!row.samples_token && token != -1) {
    Refuse(event, "has sampled token " + std::to_string(token) + where +
                      "; expected -1, because the row is inside its prefill");
  }
  if (is_finished > 1 || (is_finished == 1 && !row.samples_token)) {
    Refuse(event, "has is_finished " + std::to_string(is_finished) + where +
                      "; expected 0 or 1, and 0 where no token was sampled");
  }
}

/// One of the two lists in which something that goes on beside the plans is reported.
struct Reports {
  std::string_view field;
  std::span<const std::int64_t> ids;
};

template <typename IsUnderWay>
void CheckReports(const ExecutionEvent& event, std::string_view what,
                  const IsUnderWay& is_under_way, const std::array<Reports, 2>& lists) {
  std::set<std::int64_t> reported;
  for (const Reports& list : lists) {
    for (const std::int64_t id : list.ids) {
      const std::string found = "reports " + std::string(what) + " " + std::to_string(id) + " in " +
                                std::string(list.field);
      if (!is_under_way(id)) {
        Refuse(event, found + "; expected one of a plan that was not reported before");
      }
      if (!reported.insert(id).second) {
        Refuse(event, found + " for the second time; expected each once, as done or failed");
      }
    }
  }
}

}  // namespace

void CheckEventAnswersPlan(const ExecutionEvent& event, const OutstandingPlan& plan) {
  if (event.plan_id != plan.id.value()) {
    Refuse(event, "came while plan " + std::to_string(plan.id.value()) +
                      " is outstanding; events return in the order of their plans");
  }
  CheckLength(event, "sampled_token_ids", event.sampled_token_ids.size(), plan.rows.size());
  CheckLength(event, "is_finished", event.is_finished.size(), plan.rows.size());
  for (std::size_t index = 0; index < plan.rows.size(); ++index)
    CheckRow(event, plan.rows[index], index);
}

bool ReportsAnything(const ExecutionEvent& event) {
  return !event.loaded_adapter_ids.empty() || !event.failed_adapter_ids.empty() ||
         !event.completed_transfer_ids.empty() || !event.failed_transfer_ids.empty();
}

void CheckEventHasNoRows(const ExecutionEvent& event) {
  const auto check_empty = [&event](std::string_view field, std::size_t found) {
    if (found == 0) return;
    Refuse(event, "has " + std::to_string(found) + " entries in " + std::string(field) +
                      "; expected none, because it answers no plan and has no rows");
  };
  check_empty("sampled_token_ids", event.sampled_token_ids.size());
  check_empty("is_finished", event.is_finished.size());
}

void CheckTransferReports(const ExecutionEvent& event, const TransferTable& transfers) {
  const auto is_under_way = [&](std::int64_t id) { return transfers.IsUnderWay(TransferId(id)); };
  CheckReports(event, "copy", is_under_way,
               {{{"completed_transfer_ids", event.completed_transfer_ids},
                 {"failed_transfer_ids", event.failed_transfer_ids}}});
}

void CheckLoadReports(const ExecutionEvent& event, const AdapterTable& adapters,
                      std::span<const AdapterId> staged_loads) {
  const auto is_loading = [&](std::int64_t id) {
    return adapters.IsLoading(AdapterId(id)) ||
           std::ranges::find(staged_loads, AdapterId(id)) != staged_loads.end();
  };
  CheckReports(event, "the load of adapter", is_loading,
               {{{"loaded_adapter_ids", event.loaded_adapter_ids},
                 {"failed_adapter_ids", event.failed_adapter_ids}}});
}

}  // namespace lora_serve
