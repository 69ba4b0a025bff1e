#include "support/plan_hazards.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace lora_serve::testing {
namespace {

void Require(bool condition, const std::string& message) {
  if (!condition) throw std::logic_error("reused before its plan returned: " + message);
}

std::string Page(std::int32_t page) { return "device page " + std::to_string(page); }

std::string Plan(std::int64_t plan_id) { return "plan " + std::to_string(plan_id); }

}  // namespace

void PlanHazards::CheckControl(const ExecutionPlan& plan,
                               std::span<const std::int32_t> slots_emptied) const {
  for (const Outstanding& earlier : outstanding_) {
    for (const std::int32_t slot : slots_emptied) {
      Require(!earlier.slots.contains(slot), "adapter slot " + std::to_string(slot) +
                                                 " is emptied while " + Plan(earlier.plan_id) +
                                                 " uses it");
    }
    for (const std::int32_t slot : plan.load_adapter_slots) {
      Require(!earlier.slots.contains(slot), "adapter slot " + std::to_string(slot) +
                                                 " is loaded while " + Plan(earlier.plan_id) +
                                                 " uses it");
    }
    CheckDeltas(plan, earlier);
    CheckCopies(plan, earlier);
  }
}

void PlanHazards::CheckDeltas(const ExecutionPlan& plan, const Outstanding& earlier) const {
  for (std::size_t delta = 0; delta < plan.delta_rows.size(); ++delta) {
    const auto row =
        std::find(plan.page_table_rows.begin(), plan.page_table_rows.end(), plan.delta_rows[delta]);
    Require(row != plan.page_table_rows.end(), "a delta of a row that is not in its plan");
    const std::int64_t request =
        plan.request_ids[static_cast<std::size_t>(row - plan.page_table_rows.begin())];
    for (auto entry = plan.delta_offsets[delta]; entry < plan.delta_offsets[delta + 1]; ++entry) {
      const std::int32_t page = plan.delta_pages[static_cast<std::size_t>(entry)];
      const std::int64_t writer = earlier.writers.at(static_cast<std::size_t>(page));
      Require(writer == kNobody || writer == request,
              Page(page) + " goes to request " + std::to_string(request) + " while " +
                  Plan(earlier.plan_id) + " writes it for request " + std::to_string(writer));
    }
  }
}

void PlanHazards::CheckCopies(const ExecutionPlan& plan, const Outstanding& earlier) const {
  for (std::size_t copy = 0; copy < plan.transfer_ids.size(); ++copy) {
    const bool is_load_back = plan.transfer_kinds[copy] == 1;
    for (auto pair = plan.transfer_offsets[copy]; pair < plan.transfer_offsets[copy + 1]; ++pair) {
      const auto at = static_cast<std::size_t>(pair);
      const std::int32_t page =
          is_load_back ? plan.transfer_destination_pages[at] : plan.transfer_source_pages[at];
      const auto& users = is_load_back ? earlier.touchers : earlier.writers;
      Require(users.at(static_cast<std::size_t>(page)) == kNobody,
              Page(page) + (is_load_back ? " is loaded" : " is written back") + " while " +
                  Plan(earlier.plan_id) + " uses it");
    }
  }
}

void PlanHazards::Begin(std::int64_t plan_id) {
  Outstanding& newest = outstanding_.emplace_back();
  newest.plan_id = plan_id;
  newest.touchers.assign(static_cast<std::size_t>(num_device_pages_), kNobody);
  newest.writers.assign(static_cast<std::size_t>(num_device_pages_), kNobody);
}

void PlanHazards::AddRow(const Row& row) {
  Outstanding& newest = outstanding_.back();
  for (std::size_t index = 0; index < row.pages.size(); ++index) {
    const auto page = static_cast<std::size_t>(row.pages[index]);
    const bool is_written = index >= row.first_written;
    for (const Outstanding& earlier : outstanding_) {
      if (!is_written) break;
      const std::int64_t toucher = earlier.touchers.at(page);
      Require(toucher == kNobody || toucher == row.request_id,
              Page(row.pages[index]) + " is written for request " + std::to_string(row.request_id) +
                  " while " + Plan(earlier.plan_id) + " has it for request " +
                  std::to_string(toucher));
    }
    const std::int64_t writer = newest.writers.at(page);
    Require(writer == kNobody || writer == row.request_id,
            Page(row.pages[index]) + " is written for one request and read for another");
    std::int64_t& toucher = newest.touchers.at(page);
    toucher = toucher == kNobody || toucher == row.request_id ? row.request_id : kSeveral;
    if (is_written) newest.writers.at(page) = row.request_id;
  }
  for (const Outstanding& earlier : outstanding_) {
    const auto it = earlier.requests.find(row.page_table_row);
    Require(it == earlier.requests.end() || it->second == row.request_id,
            "page-table row " + std::to_string(row.page_table_row) + " goes to request " +
                std::to_string(row.request_id) + " while " + Plan(earlier.plan_id) + " uses it");
  }
  newest.requests[row.page_table_row] = row.request_id;
  if (row.adapter_slot >= 0) newest.slots[row.adapter_slot] = row.request_id;
}

void PlanHazards::End(std::int64_t plan_id) {
  if (outstanding_.empty() || outstanding_.front().plan_id != plan_id) {
    throw std::logic_error("plans end out of order");
  }
  outstanding_.pop_front();
}

}  // namespace lora_serve::testing
