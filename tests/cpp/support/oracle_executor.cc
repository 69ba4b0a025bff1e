#include "support/oracle_executor.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <utility>

namespace lora_serve::testing {
namespace {

constexpr std::size_t kMaxOutstandingPlans = 2;

void Require(bool condition, const std::string& message) {
  if (!condition) throw std::logic_error("oracle executor: " + message);
}

std::string Name(AdapterId id) { return "adapter " + std::to_string(id.value()); }

std::uint64_t Mix(std::uint64_t hash, std::uint64_t value) {
  hash ^= value + 0x9e3779b97f4a7c15ULL + (hash << 6) + (hash >> 2);
  hash *= 0xff51afd7ed558ccdULL;
  return hash ^ (hash >> 33);
}

std::uint64_t Mix(std::uint64_t hash, const OracleEntry& entry) {
  hash = Mix(hash, static_cast<std::uint64_t>(entry.adapter_id));
  hash = Mix(hash, static_cast<std::uint64_t>(entry.token));
  hash = Mix(hash, static_cast<std::uint64_t>(entry.position));
  return Mix(hash, entry.prefix_hash);
}

std::uint64_t StartHash(AdapterId adapter) {
  return Mix(17, static_cast<std::uint64_t>(adapter.value()));
}

TokenId TokenOf(std::uint64_t hash) {
  return static_cast<TokenId>(hash % static_cast<std::uint64_t>(OracleExecutor::kVocabSize));
}

OracleEntry MakeEntry(AdapterId adapter, TokenId token, std::int32_t position,
                      const OracleEntry* before) {
  return {adapter.value(), token, position, before == nullptr ? 1 : Mix(3, *before)};
}

}  // namespace

OracleExecutor::OracleExecutor(const SchedulerOptions& options)
    : page_size_(options.page_size),
      pages_(options.page_size, options.num_device_pages, options.num_host_pages),
      hazards_(options.num_device_pages),
      page_table_(static_cast<std::size_t>(options.max_num_seqs)) {}

void OracleExecutor::Submit(const ExecutionPlan& plan) {
  Require(outstanding_.size() < kMaxOutstandingPlans, "more than two plans are outstanding");
  Require(plan.plan_id >= 0, "an empty plan is executed");
  ChangeAdapters(plan);
  pages_.Start(plan);
  ApplyDeltas(plan);
  Outstanding& outstanding = outstanding_.emplace_back();
  outstanding.plan_backptr = &plan;
  hazards_.Begin(plan.plan_id);
  CheckRows(plan, outstanding);
}

void OracleExecutor::ChangeAdapters(const ExecutionPlan& plan) {
  std::vector<std::int32_t> slots_emptied;
  const auto empty_slot = [&](AdapterId id) {
    const auto it =
        std::ranges::find_if(slots_, [id](const auto& item) { return item.second == id; });
    if (it == slots_.end()) return false;
    slots_emptied.push_back(it->first);
    slots_.erase(it);
    return true;
  };
  const auto is_loading = [&](AdapterId id) {
    return std::ranges::any_of(
        loading_, [id](const Load& load) { return load.adapter == id && !load.is_staged; });
  };
  for (const std::int64_t id : plan.drained_adapter_ids) {
    Require(removed_.insert(AdapterId(id)).second, Name(AdapterId(id)) + " was drained twice");
    Require(!is_loading(AdapterId(id)), Name(AdapterId(id)) + " is drained while it is loaded");
    empty_slot(AdapterId(id));
  }
  for (const std::int64_t id : plan.evicted_adapter_ids) {
    Require(empty_slot(AdapterId(id)), Name(AdapterId(id)) + " is evicted but not loaded");
  }
  hazards_.CheckControl(plan, slots_emptied);
  for (std::size_t index = 0; index < plan.load_adapter_ids.size(); ++index) {
    const AdapterId id(plan.load_adapter_ids[index]);
    const std::int32_t slot = plan.load_adapter_slots[index];
    Require(slot >= 0 && !slots_.contains(slot), "slot " + std::to_string(slot) + " is in use");
    Require(
        std::ranges::none_of(
            loading_, [slot](const Load& load) { return load.slot == slot && !load.is_staged; }),
        "two adapters are loaded into slot " + std::to_string(slot));
    Require(!removed_.contains(id), "a drained adapter is loaded");
    Require(!IsLoaded(id) && !is_loading(id), Name(id) + " is loaded twice");
    const bool is_staged = staged.contains(id);
    broken_.erase(id);
    if (is_staged) slots_.emplace(slot, id);
    loading_.push_back({id, slot, plan.plan_id, is_staged});
  }
}

void OracleExecutor::ApplyDeltas(const ExecutionPlan& plan) {
  Require(plan.delta_offsets.size() == plan.delta_rows.size() + 1,
          "delta_offsets has a wrong length");
  for (std::size_t index = 0; index < plan.delta_rows.size(); ++index) {
    std::vector<std::int32_t>& pages = RowAt(plan.delta_rows[index]).pages;
    const auto start = static_cast<std::size_t>(plan.delta_starts[index]);
    Require(start <= pages.size(), "a delta leaves a gap");
    pages.resize(start);
    for (auto entry = plan.delta_offsets[index]; entry < plan.delta_offsets[index + 1]; ++entry) {
      pages.push_back(plan.delta_pages[static_cast<std::size_t>(entry)]);
    }
  }
}

void OracleExecutor::CheckRows(const ExecutionPlan& plan, Outstanding& outstanding) {
  for (std::size_t index = 0; index < plan.request_ids.size(); ++index) {
    outstanding.adapters.push_back(AdapterIn(plan.adapter_slots[index]));
    const std::vector<std::int32_t>& pages = RowAt(plan.page_table_rows[index]).pages;
    const std::int32_t begin = plan.num_computed_tokens[index];
    const std::int32_t end = begin + plan.num_scheduled_tokens[index];
    const auto num_pages = static_cast<std::size_t>((end + page_size_ - 1) / page_size_);
    Require(begin >= 0 && end > begin && num_pages <= pages.size(),
            "a row of tokens without pages");
    const PlanHazards::Row row = {.request_id = plan.request_ids[index],
                                  .page_table_row = plan.page_table_rows[index],
                                  .adapter_slot = plan.adapter_slots[index],
                                  .pages = std::span(pages).first(num_pages),
                                  .first_written = static_cast<std::size_t>(begin / page_size_)};
    hazards_.AddRow(row);
    for (std::size_t page = 0; page < num_pages; ++page) {
      pages_.CheckMayTouch(pages[page], /*writes=*/page >= row.first_written);
    }
  }
}

ExecutionEvent OracleExecutor::Collect() {
  Require(!outstanding_.empty(), "no plan is outstanding");
  const Outstanding outstanding = std::move(outstanding_.front());
  outstanding_.pop_front();
  const ExecutionPlan& plan = *outstanding.plan_backptr;
  ExecutionEvent event;
  event.plan_id = plan.plan_id;
  EndStagedLoads(plan.plan_id, event);
  std::size_t offset = 0;
  for (std::size_t index = 0; index < plan.request_ids.size(); ++index) {
    const auto num_tokens = static_cast<std::size_t>(plan.num_scheduled_tokens[index]);
    RunRow(outstanding, index, plan.token_ids.subspan(offset, num_tokens), event);
    offset += num_tokens;
  }
  hazards_.End(plan.plan_id);
  EndLoads(plan.plan_id, event);
  EndCopies(plan.plan_id, event);
  return event;
}

ExecutionEvent OracleExecutor::Report() {
  ExecutionEvent event;
  const std::int64_t newest = std::numeric_limits<std::int64_t>::max();
  EndLoads(newest, event);
  EndCopies(newest, event);
  return event;
}

void OracleExecutor::EndStagedLoads(std::int64_t plan_id, ExecutionEvent& event) {
  for (const Load& load : loading_) {
    if (!load.is_staged || load.plan_id != plan_id) continue;
    if (!load_outcome || load_outcome(load.adapter) != Outcome::kFailed) {
      event.loaded_adapter_ids.push_back(load.adapter.value());
      continue;
    }
    event.failed_adapter_ids.push_back(load.adapter.value());
    broken_.insert(load.adapter);
    const auto it = slots_.find(load.slot);
    if (it != slots_.end() && it->second == load.adapter) slots_.erase(it);
  }
  std::erase_if(loading_,
                [plan_id](const Load& load) { return load.is_staged && load.plan_id == plan_id; });
}

void OracleExecutor::EndLoads(std::int64_t newest_plan_id, ExecutionEvent& event) {
  std::vector<Load> under_way;
  for (const Load& load : std::exchange(loading_, {})) {
    const bool is_due = load.plan_id <= newest_plan_id && !load.is_staged;
    const Outcome outcome = !is_due        ? Outcome::kUnderWay
                            : load_outcome ? load_outcome(load.adapter)
                                           : Outcome::kDone;
    switch (outcome) {
      case Outcome::kUnderWay:
        under_way.push_back(load);
        break;
      case Outcome::kDone:
        slots_.emplace(load.slot, load.adapter);
        event.loaded_adapter_ids.push_back(load.adapter.value());
        break;
      case Outcome::kFailed:
        event.failed_adapter_ids.push_back(load.adapter.value());
        break;
    }
  }
  loading_ = std::move(under_way);
}

void OracleExecutor::EndCopies(std::int64_t newest_plan_id, ExecutionEvent& event) {
  for (const std::int64_t id : pages_.UnderWay(newest_plan_id)) {
    const Outcome outcome =
        copy_outcome ? copy_outcome(TransferId(id), pages_.KindOf(id)) : Outcome::kDone;
    if (outcome == Outcome::kUnderWay) continue;
    const bool has_failed = outcome == Outcome::kFailed;
    pages_.End(id, has_failed);
    (has_failed ? event.failed_transfer_ids : event.completed_transfer_ids).push_back(id);
  }
}

void OracleExecutor::RunRow(const Outstanding& outstanding, std::size_t index,
                            std::span<const TokenId> tokens, ExecutionEvent& event) {
  const ExecutionPlan& plan = *outstanding.plan_backptr;
  AdapterId adapter = outstanding.adapters[index];
  if (broken_.contains(adapter)) adapter = AdapterId(adapter.value() + OracleEntry::kGarbage);
  const std::int32_t row = plan.page_table_rows[index];
  PageTableRow& kept = RowAt(row);
  if (kept.request_id != plan.request_ids[index]) {
    kept.request_id = plan.request_ids[index];
    kept.last_sampled = -1;
  }
  std::int32_t position = plan.num_computed_tokens[index];
  for (const TokenId planned : tokens) {
    const TokenId token = planned == -1 ? kept.last_sampled : planned;
    Require(token >= 0, "an input token is unknown, and the row's request sampled none before");
    const OracleEntry* before = position == 0 ? nullptr : &At(row, position - 1);
    pages_.Write(PageAt(row, position), position % page_size_,
                 MakeEntry(adapter, token, position, before));
    ++position;
  }
  if (plan.samples_token[index] == 0) {
    event.sampled_token_ids.push_back(-1);
    event.is_finished.push_back(0);
    return;
  }
  std::uint64_t hash = StartHash(adapter);
  for (std::int32_t read = 0; read < position; ++read) hash = Mix(hash, At(row, read));
  kept.last_sampled = TokenOf(hash);
  event.sampled_token_ids.push_back(kept.last_sampled);
  event.is_finished.push_back(IsStopToken(kept.last_sampled) ? 1 : 0);
}

AdapterId OracleExecutor::AdapterIn(std::int32_t slot) const {
  if (slot == kNoAdapterSlot.value()) return kBaseAdapter;
  const auto it = slots_.find(slot);
  Require(it != slots_.end(), "nothing is loaded in adapter slot " + std::to_string(slot));
  return it->second;
}

std::int32_t OracleExecutor::SlotOf(AdapterId adapter) const {
  const auto it =
      std::ranges::find_if(slots_, [&](const auto& item) { return item.second == adapter; });
  return it == slots_.end() ? -1 : it->first;
}

bool OracleExecutor::MayRun(AdapterId adapter) const {
  return adapter == kBaseAdapter || IsLoaded(adapter);
}

std::vector<AdapterId> OracleExecutor::OnDevice() const {
  std::vector<AdapterId> ids;
  for (const auto& [slot, id] : slots_) ids.push_back(id);
  for (const Load& load : loading_) {
    if (!load.is_staged) ids.push_back(load.adapter);
  }
  return ids;
}

std::size_t OracleExecutor::num_loading_adapters() const {
  return static_cast<std::size_t>(
      std::ranges::count_if(loading_, [](const Load& load) { return !load.is_staged; }));
}

OracleExecutor::PageTableRow& OracleExecutor::RowAt(std::int32_t row) {
  return page_table_.at(static_cast<std::size_t>(row));
}

std::int32_t OracleExecutor::PageAt(std::int32_t row, std::int32_t position) const {
  const auto& pages = page_table_.at(static_cast<std::size_t>(row)).pages;
  return pages.at(static_cast<std::size_t>(position / page_size_));
}

const OracleEntry& OracleExecutor::At(std::int32_t row, std::int32_t position) const {
  return pages_.Read(PageAt(row, position), position % page_size_);
}

std::vector<TokenId> OracleExecutor::RunAlone(AdapterId adapter, std::span<const TokenId> prompt,
                                              std::int32_t max_tokens) {
  OracleEntry newest;
  std::int32_t num_tokens = 0;
  std::uint64_t hash = StartHash(adapter);
  const auto append = [&](TokenId token) {
    newest = MakeEntry(adapter, token, num_tokens, num_tokens == 0 ? nullptr : &newest);
    ++num_tokens;
    hash = Mix(hash, newest);
  };
  for (const TokenId token : prompt) append(token);
  std::vector<TokenId> output;
  while (static_cast<std::int32_t>(output.size()) < max_tokens) {
    output.push_back(TokenOf(hash));
    if (IsStopToken(output.back())) break;
    append(output.back());
  }
  return output;
}

}  // namespace lora_serve::testing
