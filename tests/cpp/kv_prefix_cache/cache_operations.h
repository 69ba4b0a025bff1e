#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "cache_comparison.h"
#include "kv_prefix_cache/kv_prefix_cache.h"
#include "naive_cache.h"
#include "operation_chooser.h"
#include "operation_coverage.h"

namespace lora_serve {

struct CacheOperationsConfig {
  KVPrefixCacheOptions cache;
  /// Tokens are 0, ..., alphabet - 1: few, so that sequences share prefixes and branch.
  std::int32_t alphabet = 2;
  std::int32_t max_sequence_pages = 8;
  std::int32_t max_requests = 8;
  std::int32_t max_namespaces = 4;
  /// Accounts, leases and a few probes are compared after every so many operations.
  std::int64_t comparison_interval = 1;
  /// CheckInvariants after every so many operations.
  std::int64_t invariants_interval = 1;
};

/// Any cache whatsoever, as small as the interesting things allow.
[[nodiscard]] CacheOperationsConfig ChooseAnyConfig(OperationChooser& chooser);

/// Applies operations, chosen by a chooser, to a KVPrefixCache and to a NaiveCache, and compares
/// what both answer and all that can be observed afterwards.
///
/// Plays the scheduler (handles, leases) and the executor (ends transfers in any order).
class CacheOperations {
 public:
  CacheOperations(const CacheOperationsConfig& config, OperationChooser* chooser,
                  OperationCoverage* coverage);

  /// Stops early when the chooser is exhausted.
  /// Throws: CacheDisagreement, with the operations that led to it.
  void Run(std::int64_t num_operations);
  /// Ends everything, and checks that nothing is left; or leaves transfers under way, which the
  /// cache must survive. Throws: CacheDisagreement.
  void Finish();

  [[nodiscard]] const KVPrefixCache& cache() const { return cache_; }
  [[nodiscard]] std::int64_t num_operations() const { return num_operations_; }

 private:
  struct Request {
    Tokens tokens;  // the whole sequence; what is computed grows with Publish
    Lease lease;
  };
  struct WeightedOperation {
    std::size_t weight = 0;
    bool (CacheOperations::*run)() = nullptr;
  };
  struct Published {
    NamespaceId ns;
    Tokens tokens;
  };
  static constexpr std::size_t kNumHints = 4;

  // Operations, in cache_operations.cc; false: there was nothing to do it to.
  void RunOne();
  bool OpenNamespace();
  bool DrainNamespace();
  bool RetainNamespace();
  bool DropHandle();
  bool SetAdapterResident();
  bool SetQuota();
  bool Acquire();
  bool Extend();
  bool Publish();
  bool ReserveSnapshot();
  bool EndLease();
  bool MoveLease();
  bool PlanWriteBacks();
  bool StartWriteBack();
  bool EndTransfer();
  bool Evict();
  bool RefreshHints();
  bool SwitchEvents();
  bool MisuseNamespaces();
  bool MisuseLeases();

  void DropHandle(std::size_t index);
  void EndLease(int number);
  void EndTransfer(std::int64_t transfer);
  /// Write-backs are planned and completed until no more are wanted.
  void SettleWriteBacks();
  void CountBranches(int number, std::size_t num_published_before);
  void Compare();
  [[nodiscard]] bool ComparesDumps();
  /// Runs `call` and adds to its exceptions what led to them.
  template <typename Call>
  void Report(const Call& call);

  // Choices.
  [[nodiscard]] NamespaceId AnyNamespace();
  [[nodiscard]] std::map<int, Request>::value_type& AnyRequest();
  [[nodiscard]] std::optional<int> FindRequestIn(NamespaceId id) const;
  [[nodiscard]] std::optional<std::int64_t> AnyQuota();
  [[nodiscard]] TokenId AnyToken() { return chooser_.Between(0, config_.alphabet - 1); }
  [[nodiscard]] Tokens AnySequence(NamespaceId id);
  void Remember(NamespaceId id, std::span<const TokenId> tokens);
  template <typename... Values>
  void Log(const Values&... values);

  const CacheOperationsConfig config_;
  OperationChooser& chooser_;
  OperationCoverage& coverage_;
  KVPrefixCache cache_;
  NaiveCache model_;
  CacheComparison comparison_;
  std::int64_t num_operations_ = 0;
  NamespaceId newest_id_ = kBaseNamespace;
  int next_lease_ = 0;
  bool is_events_enabled_ = false;
  std::vector<NamespaceHandle> handles_;
  std::map<int, Request> requests_;
  std::vector<Published> history_;
  std::array<Tokens, kNumHints> hint_tokens_;
  std::array<PrefixHint, kNumHints> hints_;
  std::deque<std::string> log_;
};

}  // namespace lora_serve
