#!/usr/bin/env python3
"""Plant single-line faults in the scheduler, one at a time, and see the tests find each.

Every fault below is built in a copy of the sources and must make ``scheduler_test`` fail. Exit
status 1 when one survives.

    scripts/mutate_scheduler.py                # all faults; several minutes
    scripts/mutate_scheduler.py --only 3 17    # some of them
    scripts/mutate_scheduler.py --list
"""

from __future__ import annotations

import sys

from planted_faults import Campaign, Fault, main

FAULTS = (
    # isolation domains
    Fault("adapter_domains.cc", "if (domain.empty()) return", "return"),
    Fault("adapter_domains.cc", "if (IsUsed(found)) continue;", ""),
    Fault("adapter_domains.cc", "if (HasPages(found)) {", "if (false) {"),
    Fault("adapter_domains.cc", "if (!are_too_many ||", "if (true ||"),
    Fault(
        "adapter_domains.cc", "std::ranges::sort(idle, {}, &Idle::last_used);", "std::ranges::reverse(idle);"
    ),
    Fault(
        "adapter_domains.cc",
        "adapter.domains.num_dropped_missed_tokens += found.num_missed_tokens;",
        "",
    ),
    Fault(
        "adapter_table.cc",
        "for (const NamespaceId namespace_id : NamespacesOf(adapter)) {",
        "for (const NamespaceId namespace_id : {adapter.namespace_id}) {",
    ),
    Fault("adapter_table.cc", "num_domains_ -= std::ssize(adapter.domains.by_name);", ""),
    # overlap: what an outstanding plan touches
    Fault(
        "scheduler_step.cc",
        "const bool is_in_later_plan = request.last_plan_id > plan_id;",
        "const bool is_in_later_plan = request.last_plan_id < plan_id;",
    ),
    Fault("scheduler_control.cc", "if (IsInOutstandingPlan(*request)) {", "if (request->Is<Loading>()) {"),
    Fault(
        "step_policy.cc",
        "if (victim.last_plan_id > newest_ended_plan_) {",
        "if (victim.last_plan_id > newest_ended_plan_ && !victim.Is<Decoding>()) {",
    ),
    Fault(
        "adapter_residency.cc",
        "} else if (adapter->last_plan_id > newest_ended_plan) {",
        "} else if (false) {",
    ),
    Fault("page_table_rows.cc", "if (newest_plan_ == newest_ended_) {", "if (true) {"),
    # tokens
    Fault(
        "request.cc",
        "num_pending_tokens_ += samples_token ? 1 : 0;",
        "num_pending_tokens_ = samples_token ? 1 : 0;",
    ),
    Fault(
        "request.cc",
        "resources.num_computed_tokens = std::min(resources.num_computed_tokens, num_tokens());",
        "",
    ),
    Fault(
        "request.cc",
        "max_computed_tokens_ = std::max(max_computed_tokens_, resources.num_computed_tokens);",
        "",
    ),
    Fault("plan_builder.cc", "running.num_planned_pages = num_pages;", ""),
    Fault(
        "plan_builder.cc",
        "*num_computed_tokens_++ = row.position;",
        "*num_computed_tokens_++ = running.num_computed_tokens;",
    ),
    # the tiles of the groups
    Fault(
        "adapter_grouping.cc",
        "const std::size_t first_adapter = !slots_.empty() && slots_.front() < 0 ? 1 : 0;",
        "const std::size_t first_adapter = 0;",
    ),
    Fault("adapter_grouping.cc", "if (first_adapter > 0) cut(0);", ""),
    Fault("adapter_grouping.cc", "*next++ = std::min(size, end - start);", "*next++ = size;"),
    Fault("adapter_grouping.cc", "std::fill(next, entries.end(), 0);", ""),
    Fault("lora_tiles.h", "num_tokens > many / 2", "num_tokens >= many / 2"),
    # rows and pages
    Fault("step_policy.cc", "num_awaited_pages_ += num_lacking;", ""),
    Fault("step_policy.cc", "num_sitting_out_pages_ += std::ssize(victim.running().lease.pages());", ""),
    Fault("step_policy.cc", "if (lacks_pages_ != nullptr) ++lacks_pages_->num_times_overtaken;", ""),
    Fault(
        "step_policy.cc",
        "const bool may_admit = !has_preempted_ || scheduled_.empty();",
        "const bool may_admit = true;",
    ),
    Fault(
        "request_table.cc",
        "found == nullptr || other->seniority() > found->seniority()",
        "found == nullptr || other->seniority() < found->seniority()",
    ),
    # places and bytes
    Fault("step_policy.cc", "newcomers = newcomers.subspan(next.size());", "newcomers = newcomers.first(0);"),
    Fault("adapter_residency.cc", "least->adapter_backptr->is_closed = true;", ""),
    Fault("adapter_residency.cc", "if (size > num_obtainable) return false;", ""),
    Fault("adapter_table.cc", "pinned <= max_bytes_ && other <= max_bytes_ - pinned", "pinned <= max_bytes_"),
    Fault("adapter_table.cc", "const bool is_due = is_first &&", "const bool is_due ="),
    Fault(
        "adapter_lists.cc",
        "std::min<std::int64_t>(std::ssize(adapter.queue), max_turn - 1);",
        "max_turn * 100;",
    ),
    Fault("adapter_lists.cc", "adapter.is_leaving = false;", ""),
    Fault("adapter_lists.cc", "adapter.is_closed = false;", ""),
    Fault("adapter_lists.cc", "adapter.placed_at_step = step;", ""),
    Fault("adapter_lists.cc", "adapter.left_at_step = num_steps_;", ""),
    Fault("adapter_lists.cc", "key.join_number = next_join_number_++;", ""),
    Fault(
        "adapter_residency.cc",
        "const bool is_time_up = may_end_slices && step - adapter.placed_at_step >= time_slice;",
        "const bool is_time_up = may_end_slices;",
    ),
    Fault("adapter_residency.cc", "if (adapter.placed_at_step == step) return false;", ""),
    Fault("adapter_residency.cc", "needy.HasStarted() && adapter.num_running_requests == 0", "false"),
    Fault(
        "adapter_residency.cc",
        "if (adapter->load_state == LoadState::kResident && !has_just_left) {",
        "if (adapter->load_state == LoadState::kResident) {",
    ),
    Fault("adapter_residency.cc", "return num_waiting_ > kCrowdedFactor * num_holders_;", "return false;"),
    Fault(
        "adapter_residency.cc",
        "return time_slice_steps_ * num_waiting_ * num_waiting_ * num_waiting_ /\n"
        "         (num_holders_ * num_holders_ * num_holders_);",
        "return time_slice_steps_;",
    ),
    Fault("adapter_residency.cc", "return is_stalled_ ? IsUrgent(adapter) :", "return"),
    Fault(
        "adapter_residency.cc",
        "return are_first_on_disk_ || GoesFirst(adapter);",
        "return GoesFirst(adapter);",
    ),
    Fault("adapter_residency.cc", "return GoesFirst(*entry.second) &&", "return false &&"),
    Fault("adapter_residency.cc", "are_first_on_disk_ = !paused.empty() &&", "are_first_on_disk_ ="),
    Fault("adapter_residency.cc", "if (adapters.IsToBeRead(*needy) || (is_stalled_", "if ((is_stalled_"),
    Fault("adapter_residency.cc", "adapters_backptr_->IsToBeRead(*needy) ||", ""),
    Fault("adapter_table.h", "!adapter.HoldsBytes() && !adapter.options.is_staged", "!adapter.HoldsBytes()"),
    Fault("adapter_table.cc", "is_first && !IsToBeRead(adapter) &&", "is_first &&"),
    Fault("adapter_table.cc", "return IsToBeRead(*entry.second);", "return false;"),
    Fault("adapter_residency.cc", "(IsUrgent(needy) || needy.line_key < other->line_key)", "true"),
    Fault(
        "adapter_residency.cc",
        "(IsUrgent(needy) || needy.line_key < other->line_key)",
        "(needy.line_key < other->line_key)",
    ),
    Fault("adapter_residency.cc", "if (is_stalled_ && !MayTakeRoom(*adapter)) continue;", ""),
    Fault("adapter_residency.cc", "return needy.HasStarted() || now.num_free_rows > 0;", "return true;"),
    Fault("adapter_residency.cc", "(waited_us < patience_us || lacks_pages)", "(waited_us < patience_us)"),
    Fault("adapter_residency.cc", "(waited_us < patience_us || lacks_pages)", "(lacks_pages)"),
    Fault(
        "adapter_residency.cc",
        "room.num_places -= needy->num_requests() > 0 ? 1 : 0;",
        "room.num_places -= 1;",
    ),
    Fault("adapter_residency.cc", "if (!is_needed) {", "if (false) {"),
    Fault("adapter_residency.cc", "if (!holder.options.is_pinned) room.num_bytes", "room.num_bytes"),
    Fault("adapter_table.cc", "if (adapter.options.is_staged) OnLoaded(id);", ""),
    Fault("adapter_table.cc", "if (adapter.is_in_place) LeavePlace(adapter);", ""),
    Fault("adapter_table.cc", "if (adapter.load_state != LoadState::kResident) return;", ""),
    Fault("adapter_lists.cc", "adapter.last_used = next_use_number_++;", ""),
    # order
    Fault(
        "adapter_lists.cc",
        "adapter.virtual_service = std::max(adapter.virtual_service, virtual_time_);",
        "",
    ),
    Fault(
        "adapter_lists.cc",
        "adapter.virtual_service += num_tokens * adapter.service_per_token;",
        "adapter.virtual_service += adapter.service_per_token;",
    ),
    Fault("adapter_lists.cc", "waits_since_us + priority * priority_ageing_us_", "waits_since_us"),
    Fault(
        "admission_order.cc",
        "-request->prefix_hint().num_resumable_tokens",
        "request->prefix_hint().num_resumable_tokens",
    ),
    Fault(
        "admission_order.cc",
        "request.priority() - waited_us / priority_ageing_us_",
        "std::int64_t{request.priority()}",
    ),
    Fault(
        "admission_order.cc",
        "return request.adapter().is_closed ? 0 : 1;",
        "return request.adapter().is_closed ? 1 : 1;",
    ),
    Fault(
        "admission_order.cc",
        "if (request->num_times_overtaken >= kMaxTimesOvertaken) return {-1, 0, 0, 0};",
        "",
    ),
    Fault(
        "admission_order.cc", "if (request->adapter().TakesNewcomers()) return request;", "return request;"
    ),
    Fault(
        "admission_order.cc",
        "std::max(best_priority_, request.priority()",
        "std::max<std::int64_t>(-1000, request.priority()",
    ),
    # limits, ends
    Fault(
        "scheduler_control.cc",
        "if (most == 0 || found <= most) return;",
        "if (most == 0 || found <= most + 1) return;",
    ),
    Fault(
        "scheduler_step.cc",
        "  AdvanceTransfers(event);  // first: rows cannot publish behind pages that are on their way\n",
        "",
    ),
    Fault(
        "scheduler_step.cc",
        "std::exchange(has_write_back_failed_, false) || nobody_could_run_",
        "false",
    ),
    Fault(
        "scheduler_step.cc",
        "is_stuck_ = !plan.HasRows() && (is_stuck_ || (plan.IsEmpty() && !is_under_way));",
        "is_stuck_ = !plan.HasRows();",
    ),
    Fault(
        "scheduler_step.cc",
        "is_stuck_ = !plan.HasRows() && (is_stuck_ || (plan.IsEmpty() && !is_under_way));",
        "is_stuck_ = false;",
    ),
    Fault("scheduler_step.cc", "for (const AdapterId id : plan.drained) adapters_.Remove(id);", ""),
)

CAMPAIGN = Campaign(
    folder="csrc/scheduler",
    target="scheduler_test",
    script="scripts/mutate_scheduler.py",
    faults=FAULTS,
    environment={"LORA_SERVE_TEST_STEPS": "30000"},
)

if __name__ == "__main__":
    sys.exit(main(CAMPAIGN, __doc__.splitlines()[0]))
