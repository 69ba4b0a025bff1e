#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "common/strong_id.h"
#include "kv_prefix_cache/cache_options.h"
#include "scheduler/execution_plan.h"
#include "scheduler/scheduler_options.h"
#include "support/oracle_pages.h"
#include "support/plan_hazards.h"

namespace lora_serve::testing {

/// What becomes of a copy or an adapter's load in one step.
enum class Outcome : std::uint8_t { kDone, kUnderWay, kFailed };

/// An executor without a model. Its "KV" of a token is (adapter, token, position, hash of the KV
/// before it); the next token is a hash of everything it reads through its page table for the row's
/// sequence. It knows only what plans told it: the page table is built from deltas, the slot table
/// from drains, evictions and loads, the host's pages from copies, unknown input tokens from what
/// their page-table row sampled last. Any wrong page, row, adapter, order, delta or copy changes a
/// token. It throws std::logic_error where a real executor would read or write out of bounds, or
/// something that is being copied, or that an outstanding plan still uses.
///
/// What an adapter computes whose weights were staged, but could not be read after all, is garbage.
///
/// Up to two plans are outstanding. Of a plan, Submit carries out at once all that may run beside
/// the plan before it: drains, evictions, the start of loads and copies, the deltas. Its rows run
/// as late as they can: in Collect.
class OracleExecutor {
 public:
  static constexpr TokenId kVocabSize = 30011;
  /// Multiples of this are stop tokens.
  static constexpr TokenId kStopTokenDivisor = 47;

  explicit OracleExecutor(const SchedulerOptions& options);

  /// Takes a plan. The caller keeps it, unchanged, until it is collected.
  void Submit(const ExecutionPlan& plan);
  /// Runs the oldest outstanding plan.
  ExecutionEvent Collect();
  /// The loads and copies that end now, outside a plan.
  ExecutionEvent Report();

  [[nodiscard]] std::size_t num_outstanding() const { return outstanding_.size(); }
  /// The adapter in `slot`, as plans have told it; the base model for -1.
  [[nodiscard]] AdapterId AdapterIn(std::int32_t slot) const;
  [[nodiscard]] bool IsLoaded(AdapterId adapter) const { return SlotOf(adapter) >= 0; }
  /// -1 unless it is loaded.
  [[nodiscard]] std::int32_t SlotOf(AdapterId adapter) const;
  /// True for the base model and for loaded adapters.
  [[nodiscard]] bool MayRun(AdapterId adapter) const;
  [[nodiscard]] std::size_t num_loaded_adapters() const { return slots_.size(); }
  /// Loaded, or on their way.
  [[nodiscard]] std::vector<AdapterId> OnDevice() const;
  [[nodiscard]] std::size_t num_loading_adapters() const;
  /// True when its staged weights could not be read.
  [[nodiscard]] bool IsBroken(AdapterId adapter) const { return broken_.contains(adapter); }
  /// Adapters whose weights lie in host memory, as the scheduler was told: the rows of the plan
  /// that loads one may use it.
  std::set<AdapterId> staged;

  /// What a request gets when it runs alone: a pure function.
  static std::vector<TokenId> RunAlone(AdapterId adapter, std::span<const TokenId> prompt,
                                       std::int32_t max_tokens);
  static bool IsStopToken(TokenId token) { return token % kStopTokenDivisor == 0; }

  /// Asked for each copy under way, lowest id first, once an event; by default each is done at
  /// once.
  std::function<Outcome(TransferId, TransferKind)> copy_outcome;
  /// Asked for each load under way, in the order of the plans, once an event; by default each is
  /// done at once.
  std::function<Outcome(AdapterId)> load_outcome;

 private:
  struct Load {
    AdapterId adapter;
    std::int32_t slot = -1;
    std::int64_t plan_id = -1;
    /// The slot holds it already; the event of the plan says whether it does so rightly.
    bool is_staged = false;
  };
  struct Outstanding {
    const ExecutionPlan* plan_backptr = nullptr;
    std::vector<AdapterId> adapters;  // of the rows
  };
  /// What the executor keeps for a row of the page table.
  struct PageTableRow {
    std::vector<std::int32_t> pages;
    std::int64_t request_id = -1;
    TokenId last_sampled = -1;
  };

  void ChangeAdapters(const ExecutionPlan& plan);
  void ApplyDeltas(const ExecutionPlan& plan);
  void CheckRows(const ExecutionPlan& plan, Outstanding& outstanding);
  /// `newest_plan_id`: loads and copies of later plans are not asked for.
  void EndLoads(std::int64_t newest_plan_id, ExecutionEvent& event);
  void EndStagedLoads(std::int64_t plan_id, ExecutionEvent& event);
  void EndCopies(std::int64_t newest_plan_id, ExecutionEvent& event);
  void RunRow(const Outstanding& outstanding, std::size_t index, std::span<const TokenId> tokens,
              ExecutionEvent& event);
  [[nodiscard]] PageTableRow& RowAt(std::int32_t row);
  [[nodiscard]] std::int32_t PageAt(std::int32_t row, std::int32_t position) const;
  [[nodiscard]] const OracleEntry& At(std::int32_t row, std::int32_t position) const;

  std::int32_t page_size_;
  OraclePages pages_;
  PlanHazards hazards_;
  std::vector<PageTableRow> page_table_;
  std::map<std::int32_t, AdapterId> slots_;
  std::vector<Load> loading_;
  std::set<AdapterId> removed_;
  /// Their staged weights could not be read.
  std::set<AdapterId> broken_;
  std::deque<Outstanding> outstanding_;
};

}  // namespace lora_serve::testing
