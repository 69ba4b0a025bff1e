#pragma once

#include <compare>
#include <cstdint>
#include <optional>
#include <set>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "kv_prefix_cache/kv_prefix_cache.h"
#include "naive_cache.h"

namespace lora_serve {

/// The cache and the model differ, or the cache broke a promise of its own. An exception and not a
/// GoogleTest assertion, because the fuzz target reports it too.
class CacheDisagreement : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

template <typename Found, typename Expected>
void ExpectEqual(const Found& found, const Expected& expected, const char* what) {
  if (found == expected) return;
  std::ostringstream os;
  os << what << ": the cache says " << found << ", the model says " << expected;
  throw CacheDisagreement(os.str());
}

inline void ExpectTrue(bool condition, const char* what) {
  if (!condition) throw CacheDisagreement(std::string("not true: ") + what);
}

template <typename Error, typename Call>
void ExpectThrows(const Call& call, const char* what) {
  try {
    call();
  } catch (const Error&) {
    return;
  }
  throw CacheDisagreement(std::string("misuse was not refused: ") + what);
}

/// Everything that can be observed of the cache, held against the model. Throws CacheDisagreement.
class CacheComparison {
 public:
  CacheComparison(KVPrefixCache* cache, NaiveCache* model) : cache_(*cache), model_(*model) {}

  void CompareStats() const;
  /// Apart from the others, because the question brings the cache's count up to date: asked every
  /// time, what changes between two questions would never be more than one operation.
  void CompareNumAvailablePages() const;
  void CompareLease(int number, const Lease& lease) const;
  void CompareProbe(NamespaceId id, std::span<const TokenId> tokens) const;
  /// Probes every sequence that is in some tier.
  void CompareAllProbes() const;
  void CompareHints(std::span<const PrefixHint> hints) const;

  /// Takes the orders of the cache; the model learns the destinations from them.
  void TakeOrders();
  /// Those whose orders were taken: the executor knows of no others.
  [[nodiscard]] std::vector<std::int64_t> TakenTransfers() const;
  [[nodiscard]] TransferId IdOf(std::int64_t transfer) const;

  void EventsSwitchedOn() { listed_pages_.clear(); }
  void TakeEvents();

 private:
  /// A page as a router lists it.
  struct ListedPage {
    NamespaceId ns;
    Tier tier = Tier::kDevice;
    std::uint64_t hash = 0;
    friend auto operator<=>(const ListedPage&, const ListedPage&) = default;
  };

  void CompareOrder(const TransferOrder& found, std::int64_t transfer) const;
  void CompareNamespaceStats() const;
  void ListInRouter(const NaiveCache::NaiveEvent& event);

  KVPrefixCache& cache_;
  NaiveCache& model_;
  std::int64_t num_taken_transfers_ = 0;
  std::optional<std::int64_t> first_transfer_id_;
  std::set<ListedPage> listed_pages_;
};

}  // namespace lora_serve
