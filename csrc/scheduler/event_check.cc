#include "scheduler/event_check.h"

#include <algorithm>
#include <set>
#include <string>
#include <string_view>
#include <vector>

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

void CheckLoads(const ExecutionEvent& event, const OutstandingPlan& plan) {
  std::vector<std::int64_t> reported = event.loaded_adapter_ids;
  reported.insert(reported.end(), event.failed_adapter_ids.begin(), event.failed_adapter_ids.end());
  std::sort(reported.begin(), reported.end());
  std::vector<std::int64_t> planned;
  for (const AdapterId id : plan.loads) planned.push_back(id.value());
  std::sort(planned.begin(), planned.end());
  if (reported == planned) return;
  const auto list = [](const std::vector<std::int64_t>& ids) {
    std::string text = "[";
    for (const std::int64_t id : ids) text += (text.size() > 1 ? ", " : "") + std::to_string(id);
    return text + "]";
  };
  Refuse(event, "reports the loads of adapters " + list(reported) +
                    "; expected those of the plan, each " +
                    "as loaded or as failed: " + list(planned));
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
  CheckLoads(event, plan);
}

void CheckEventHasNoRows(const ExecutionEvent& event) {
  const auto check_empty = [&event](std::string_view field, std::size_t found) {
    if (found == 0) return;
    Refuse(event, "has " + std::to_string(found) + " entries in " + std::string(field) +
                      "; expected none, because it answers no plan and may only report copies");
  };
  check_empty("sampled_token_ids", event.sampled_token_ids.size());
  check_empty("is_finished", event.is_finished.size());
  check_empty("loaded_adapter_ids", event.loaded_adapter_ids.size());
  check_empty("failed_adapter_ids", event.failed_adapter_ids.size());
}

void CheckTransferReports(const ExecutionEvent& event, const TransferTable& transfers) {
  std::set<std::int64_t> reported;
  const auto check = [&](std::string_view field, const std::vector<std::int64_t>& ids) {
    for (const std::int64_t id : ids) {
      const std::string found = "reports copy " + std::to_string(id) + " in " + std::string(field);
      if (!transfers.IsUnderWay(TransferId(id))) {
        Refuse(event, found + "; expected one of a plan that was not reported before");
      }
      if (!reported.insert(id).second) {
        Refuse(event, found + " for the second time; expected each once, as completed or failed");
      }
    }
  };
  check("completed_transfer_ids", event.completed_transfer_ids);
  check("failed_transfer_ids", event.failed_transfer_ids);
}

}  // namespace lora_serve
