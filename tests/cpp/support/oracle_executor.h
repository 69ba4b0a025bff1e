#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <map>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/strong_id.h"
#include "scheduler/execution_plan.h"
#include "scheduler/scheduler.h"
#include "support/oracle_pages.h"

namespace lora_serve::testing {

/// What became of a copy in one step.
enum class CopyOutcome : std::uint8_t { kDone, kUnderWay, kFailed };

/// An executor without a model. Its "KV" of a token is (adapter, token, position, hash of the KV
/// before it); the next token is a hash of everything it reads through its page table for the row's
/// sequence. It knows only what plans told it: the page table is built from deltas, the slot table
/// from loads and drains, the host's pages from copies. Any wrong page, row, adapter, order, delta
/// or copy changes a token. It throws std::logic_error where a real executor would read or write
/// out of bounds, or something that is being copied.
class OracleExecutor {
 public:
  static constexpr TokenId kVocabSize = 30011;
  /// Multiples of this are stop tokens.
  static constexpr TokenId kStopTokenDivisor = 47;

  explicit OracleExecutor(const SchedulerOptions& options)
      : page_size_(options.page_size),
        pages_(options.page_size, options.num_device_pages, options.num_host_pages),
        page_table_(static_cast<std::size_t>(options.max_num_seqs)) {}

  /// Runs the plan. Adapters for which `load_fails` is true are reported as failed.
  ExecutionEvent Execute(const ExecutionPlan& plan,
                         const std::function<bool(AdapterId)>& load_fails = nullptr) {
    ExecutionEvent event;
    event.plan_id = plan.plan_id;
    for (const std::int64_t id : plan.drained_adapter_ids) Remove(AdapterId(id));
    Load(plan, load_fails, event);
    pages_.Start(plan);
    ApplyDeltas(plan);
    std::size_t offset = 0;
    for (std::size_t index = 0; index < plan.request_ids.size(); ++index) {
      const auto num_tokens = static_cast<std::size_t>(plan.num_scheduled_tokens[index]);
      RunRow(plan, index, std::span(plan.token_ids).subspan(offset, num_tokens), event);
      offset += num_tokens;
    }
    Require(offset == plan.token_ids.size(), "token_ids has tokens of no row");
    EndCopies(event);
    return event;
  }

  /// Reports the copies that end now, outside a plan.
  ExecutionEvent ReportCopies() {
    ExecutionEvent event;
    EndCopies(event);
    return event;
  }

  /// The adapter in `slot`, as plans have told it; the base model for -1.
  [[nodiscard]] AdapterId AdapterIn(std::int32_t slot) const {
    if (slot == kNoAdapterSlot.value()) return kBaseAdapter;
    const auto it = slots_.find(slot);
    Require(it != slots_.end(), "nothing is loaded in adapter slot " + std::to_string(slot));
    return it->second;
  }
  /// True for the base model and for loaded adapters.
  [[nodiscard]] bool MayRun(AdapterId adapter) const {
    return adapter == kBaseAdapter ||
           std::ranges::any_of(slots_, [&](const auto& item) { return item.second == adapter; });
  }
  [[nodiscard]] std::size_t num_loaded_adapters() const { return slots_.size(); }

  /// What a request gets when it runs alone: a pure function.
  static std::vector<TokenId> RunAlone(AdapterId adapter, std::span<const TokenId> prompt,
                                       std::int32_t max_tokens) {
    std::vector<OracleEntry> sequence;
    const auto append = [&](TokenId token) {
      sequence.push_back(MakeEntry(adapter, token, static_cast<std::int32_t>(sequence.size()),
                                   sequence.empty() ? nullptr : &sequence.back()));
    };
    for (const TokenId token : prompt) append(token);
    std::vector<TokenId> output;
    while (static_cast<std::int32_t>(output.size()) < max_tokens) {
      std::uint64_t hash = StartHash(adapter);
      for (const OracleEntry& entry : sequence) hash = Mix(hash, entry);
      output.push_back(TokenOf(hash));
      if (IsStopToken(output.back())) break;
      append(output.back());
    }
    return output;
  }

  static bool IsStopToken(TokenId token) { return token % kStopTokenDivisor == 0; }

  /// Asked for each copy under way, lowest id first, once a step; by default each is done at once.
  std::function<CopyOutcome(TransferId, TransferKind)> copy_outcome;

 private:
  static void Require(bool condition, const std::string& message) {
    if (!condition) throw std::logic_error("oracle executor: " + message);
  }
  static std::uint64_t Mix(std::uint64_t hash, std::uint64_t value) {
    hash ^= value + 0x9e3779b97f4a7c15ULL + (hash << 6) + (hash >> 2);
    hash *= 0xff51afd7ed558ccdULL;
    return hash ^ (hash >> 33);
  }
  static std::uint64_t Mix(std::uint64_t hash, const OracleEntry& entry) {
    hash = Mix(hash, static_cast<std::uint64_t>(entry.adapter_id));
    hash = Mix(hash, static_cast<std::uint64_t>(entry.token));
    hash = Mix(hash, static_cast<std::uint64_t>(entry.position));
    return Mix(hash, entry.prefix_hash);
  }
  static std::uint64_t StartHash(AdapterId adapter) {
    return Mix(17, static_cast<std::uint64_t>(adapter.value()));
  }
  static TokenId TokenOf(std::uint64_t hash) {
    return static_cast<TokenId>(hash % static_cast<std::uint64_t>(kVocabSize));
  }
  static OracleEntry MakeEntry(AdapterId adapter, TokenId token, std::int32_t position,
                               const OracleEntry* before) {
    return {adapter.value(), token, position, before == nullptr ? 1 : Mix(3, *before)};
  }

  void Remove(AdapterId id) {
    Require(!removed_.contains(id), "adapter " + std::to_string(id.value()) + " was drained twice");
    removed_[id] = true;
    std::erase_if(slots_, [id](const auto& item) { return item.second == id; });
  }

  void Load(const ExecutionPlan& plan, const std::function<bool(AdapterId)>& load_fails,
            ExecutionEvent& event) {
    for (std::size_t index = 0; index < plan.load_adapter_ids.size(); ++index) {
      const AdapterId id(plan.load_adapter_ids[index]);
      const std::int32_t slot = plan.load_adapter_slots[index];
      Require(!slots_.contains(slot), "slot " + std::to_string(slot) + " is in use");
      Require(!removed_.contains(id), "a drained adapter is loaded");
      if (load_fails && load_fails(id)) {
        event.failed_adapter_ids.push_back(id.value());
      } else {
        slots_.emplace(slot, id);
        event.loaded_adapter_ids.push_back(id.value());
      }
    }
  }

  void ApplyDeltas(const ExecutionPlan& plan) {
    Require(plan.delta_offsets.size() == plan.delta_rows.size() + 1,
            "delta_offsets has a wrong length");
    for (std::size_t index = 0; index < plan.delta_rows.size(); ++index) {
      auto& row = page_table_.at(static_cast<std::size_t>(plan.delta_rows[index]));
      const auto start = static_cast<std::size_t>(plan.delta_starts[index]);
      Require(start <= row.size(), "a delta leaves a gap");
      row.resize(start);
      for (auto entry = plan.delta_offsets[index]; entry < plan.delta_offsets[index + 1]; ++entry) {
        row.push_back(plan.delta_pages.at(static_cast<std::size_t>(entry)));
      }
    }
  }

  void EndCopies(ExecutionEvent& event) {
    for (const std::int64_t id : pages_.UnderWay()) {
      const CopyOutcome outcome =
          copy_outcome ? copy_outcome(TransferId(id), pages_.KindOf(id)) : CopyOutcome::kDone;
      if (outcome == CopyOutcome::kUnderWay) continue;
      const bool has_failed = outcome == CopyOutcome::kFailed;
      pages_.End(id, has_failed);
      (has_failed ? event.failed_transfer_ids : event.completed_transfer_ids).push_back(id);
    }
  }

  [[nodiscard]] std::int32_t PageAt(std::int32_t row, std::int32_t position) const {
    const auto& pages = page_table_.at(static_cast<std::size_t>(row));
    return pages.at(static_cast<std::size_t>(position / page_size_));
  }
  [[nodiscard]] const OracleEntry& At(std::int32_t row, std::int32_t position) const {
    return pages_.Read(PageAt(row, position), position % page_size_);
  }

  void RunRow(const ExecutionPlan& plan, std::size_t index, std::span<const TokenId> tokens,
              ExecutionEvent& event) {
    const AdapterId adapter = AdapterIn(plan.adapter_slots[index]);
    const std::int32_t row = plan.page_table_rows[index];
    std::int32_t position = plan.num_computed_tokens[index];
    for (const TokenId token : tokens) {
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
    event.sampled_token_ids.push_back(TokenOf(hash));
    event.is_finished.push_back(IsStopToken(TokenOf(hash)) ? 1 : 0);
  }

  std::int32_t page_size_;
  OraclePages pages_;
  std::vector<std::vector<std::int32_t>> page_table_;
  std::map<std::int32_t, AdapterId> slots_;
  std::map<AdapterId, bool> removed_;
};

}  // namespace lora_serve::testing
