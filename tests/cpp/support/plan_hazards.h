#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <span>
#include <vector>

#include "scheduler/execution_plan.h"

namespace lora_serve::testing {

/// What the outstanding plans touch, and who of a later plan must leave it alone: pages, page-table
/// rows and adapter slots may be reused only after the Advance of the last plan that touches them.
/// Throws std::logic_error at the first reuse that comes too early.
class PlanHazards {
 public:
  explicit PlanHazards(std::int32_t num_device_pages) : num_device_pages_(num_device_pages) {}

  /// One row of a plan, and the entries of the page table that it uses.
  struct Row {
    std::int64_t request_id = -1;
    std::int32_t page_table_row = -1;
    std::int32_t adapter_slot = -1;
    /// All pages that the row reads or writes.
    std::span<const std::int32_t> pages;
    /// Of these, the first that it writes.
    std::size_t first_written = 0;
  };

  /// The plan's deltas, copies and adapter slots, before its rows are known.
  /// `slot_of_gone`: slots that its drains and evictions empty.
  void CheckControl(const ExecutionPlan& plan, std::span<const std::int32_t> slots_emptied) const;
  /// From now on the plan is outstanding.
  void Begin(std::int64_t plan_id);
  /// One of the rows of the newest plan.
  void AddRow(const Row& row);
  /// The oldest outstanding plan has been advanced.
  void End(std::int64_t plan_id);

 private:
  /// Who of a plan touches a page.
  enum : std::int64_t { kNobody = -1, kSeveral = -2 };
  struct Outstanding {
    std::int64_t plan_id = -1;
    std::vector<std::int64_t> touchers;             // by page
    std::vector<std::int64_t> writers;              // by page
    std::map<std::int32_t, std::int64_t> requests;  // by page-table row
    std::map<std::int32_t, std::int64_t> slots;     // by adapter slot: a request that uses it
  };

  void CheckDeltas(const ExecutionPlan& plan, const Outstanding& earlier) const;
  void CheckCopies(const ExecutionPlan& plan, const Outstanding& earlier) const;

  std::int32_t num_device_pages_;
  std::deque<Outstanding> outstanding_;
};

}  // namespace lora_serve::testing
