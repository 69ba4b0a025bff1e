#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <span>
#include <vector>

#include "kv_prefix_cache/kv_prefix_cache.h"
#include "scheduler/adapter.h"
#include "scheduler/scheduler_options.h"

namespace lora_serve {

/// In which order the queued requests of one step are tried: SchedulingPolicy.
///
/// Owns: nothing beyond a step. Does not know: pages, rows, places; the caller names the adapters
/// whose requests could start, and admits.
///
/// Source: the fair order is the virtual token counter of Sheng et al., "Fairness in Serving Large
/// Language Models" (2024), per adapter instead of per client, and charged with all tokens alike.
class AdmissionOrder {
 public:
  /// SchedulingPolicy::kLpm: only so many, the most senior, are compared.
  static constexpr std::size_t kLpmWindow = 128;
  /// A request is passed by at most so many that it is senior to (kLpm), or that find pages sooner.
  static constexpr std::int32_t kMaxTimesOvertaken = 16;

  /// `cache` must outlive it.
  AdmissionOrder(const SchedulerOptions& options, const KVPrefixCache* cache)
      : policy_(options.scheduling_policy),
        priority_ageing_us_(options.priority_ageing_us),
        cache_backptr_(cache) {}

  /// Begins a step. Requires: no queue of `adapters` changes before the last Next, but by the
  /// admission of what Next gave.
  void Begin(std::span<Adapter* const> adapters, std::int64_t now_us);
  /// The next request to try, each at most once a step; nullptr when none is left.
  [[nodiscard]] Request* Next();
  /// What Next gave last was admitted.
  void OnAdmitted(Request& request);

 private:
  /// Lower goes first.
  using Rank = std::array<std::int64_t, 4>;

  /// The rest of one adapter's queue.
  struct Flow {
    Adapter* adapter_backptr = nullptr;
    std::map<Seniority, Request*>::const_iterator next;
    Rank rank = {};
  };

  void PushFlow(Adapter& adapter, std::map<Seniority, Request*>::const_iterator next);
  [[nodiscard]] Request* TakeFromFlows();
  /// Of an adapter's queue that begins with `head`.
  [[nodiscard]] Rank RankOf(const Request& head) const;
  /// The class of priority that waiting has brought it to: no better than the best that waits.
  [[nodiscard]] std::int64_t EffectiveClass(const Request& request) const;
  void ChooseWindow();

  const SchedulingPolicy policy_;
  const std::int64_t priority_ageing_us_;
  const KVPrefixCache* cache_backptr_;

  // Of the step that has begun.
  std::int64_t now_us_ = 0;
  std::int64_t best_priority_ = 0;
  std::vector<Flow> flows_;        // a heap; the first to go in front
  Adapter* taken_from_ = nullptr;  // its flow goes back when the attempt is over
  std::map<Seniority, Request*>::const_iterator taken_next_;
  std::vector<Request*> window_;        // kLpm: the last is tried next
  std::vector<Request*> by_seniority_;  // kLpm: of the window; nullptr = admitted
};

}  // namespace lora_serve
