#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "common/errors.h"
#include "kv_prefix_cache/kv_prefix_cache.h"
#include "naive_cache.h"

// Random operations against NaiveCache: after every one of them both give the same answers, the
// same pages, the same counts. LORA_SERVE_TEST_SEED and LORA_SERVE_TEST_OPERATIONS choose another
// run; a failure prints the seed of its episode, and LORA_SERVE_TEST_SEED set to that repeats the
// episode at once.

namespace lora_serve {
namespace {

using Tokens = std::vector<TokenId>;

std::int64_t FromEnvironment(const char* name, std::int64_t otherwise) {
  const char* const value = std::getenv(name);
  return value == nullptr ? otherwise : std::strtoll(value, nullptr, 10);
}

/// What the operations did, so that a generator that went blind is noticed.
struct Coverage {
  std::map<std::string, std::int64_t> counts;
  void Count(const std::string& what, bool happened = true) { counts[what] += happened ? 1 : 0; }
};

/// One cache and one model, from their first operation to their last.
class Episode {
 public:
  Episode(std::uint64_t seed, Coverage* coverage)
      : random_(seed),
        page_size_(Between(1, 3)),
        num_pages_(Chance(50) ? Between(1, 12) : Between(1, 64)),
        alphabet_(Between(1, 3)),
        max_sequence_pages_(Between(1, 10)),
        coverage_(*coverage),
        cache_({.page_size = page_size_, .num_device_pages = num_pages_}),
        model_(page_size_, num_pages_) {}

  void Run(int num_operations) {
    for (int operation = 0; operation < num_operations; ++operation) {
      SCOPED_TRACE("operation " + std::to_string(operation));
      RunOne();
      if (testing::Test::HasFailure()) return;
      ExpectAgreement();
      if (testing::Test::HasFailure()) return;
    }
    Finish();
  }

 private:
  struct Request {
    Tokens tokens;  // the whole sequence; what is computed grows with Publish
    Lease lease;
  };

  void RunOne() {
    const int choice = Between(0, 99);
    if (choice < 4) return OpenNamespace();
    if (choice < 8) return DrainNamespace();
    if (choice < 16) return RetainNamespace();
    if (choice < 19) return DropHandle();
    if (choice < 42) return Acquire();
    if (choice < 49) return Extend();
    if (choice < 75) return Publish();
    if (choice < 92) return Release();
    if (choice < 96) return Evict();
    if (choice < 98) return MoveLease();
    return MisuseNamespaces();
  }

  // --- Operations ------------------------------------------------------------------------------

  void OpenNamespace() {
    if (model_.NamespaceIds().size() >= 5) return;
    const NamespaceId id = cache_.OpenNamespace({.digest_seed = random_()});
    ASSERT_GT(id, newest_id_) << "an id was reused";
    newest_id_ = id;
    model_.Open(id);
  }

  void DrainNamespace() {
    if (!Chance(40)) return;
    const NamespaceId id = AnyNamespace();
    if (id == kBaseNamespace) {
      EXPECT_THROW(cache_.DrainNamespace(id), InvalidArgumentError);
      return;
    }
    coverage_.Count("drain with leases", model_.NumLeases(id) > 0);
    coverage_.Count("drain again", model_.IsDraining(id));
    coverage_.Count("drain with tree pages", model_.NumTreePages(id) > 0);
    cache_.DrainNamespace(id);
    model_.Drain(id);
  }

  void RetainNamespace() {
    const NamespaceId id = AnyNamespace();
    if (handles_.size() >= 8) return;
    if (model_.IsDraining(id)) {
      EXPECT_THROW((void)cache_.RetainNamespace(id), NotFoundError);
      return;
    }
    handles_.push_back(cache_.RetainNamespace(id));
    model_.Retain(id);
  }

  void DropHandle() {
    if (handles_.empty() || !Chance(50)) return;
    const std::size_t index = Index(handles_.size());
    const NamespaceId id = handles_[index].id();
    handles_.erase(handles_.begin() + static_cast<std::ptrdiff_t>(index));
    model_.DropHandle(id);
    coverage_.Count("namespace ends with a handle", !model_.Has(id));
  }

  void Acquire() {
    if (handles_.empty() || requests_.size() >= 8) return;
    const NamespaceHandle& handle = handles_[Index(handles_.size())];
    Tokens tokens = AnySequence();
    const auto num_tokens = static_cast<std::int32_t>(tokens.size());
    const std::int32_t max_cached = Chance(50)   ? num_tokens
                                    : Chance(50) ? 0
                                                 : Between(0, num_tokens);
    const std::int32_t capacity = Chance(60) ? num_tokens : Between(0, num_tokens + 2 * page_size_);
    const std::int64_t num_nodes = cache_.Stats().num_nodes;
    const std::int64_t num_evicted = model_.num_evicted_pages();

    auto lease = cache_.Acquire(handle, tokens,
                                {.max_cached_tokens = max_cached, .num_capacity_tokens = capacity});
    const int number = next_lease_++;
    const auto expected = model_.Acquire(number, handle.id(), tokens, max_cached, capacity);
    ASSERT_EQ(lease.has_value(), expected.has_value());
    coverage_.Count(lease ? "acquire" : "acquire without room");
    if (!lease) {
      EXPECT_EQ(cache_.Stats().num_nodes, num_nodes) << "a failed Acquire left a split";
      return;
    }
    coverage_.Count("acquire splits", cache_.Stats().num_nodes > num_nodes);
    coverage_.Count("acquire evicts", model_.num_evicted_pages() > num_evicted);
    coverage_.Count("acquire hits", !expected->empty());
    ASSERT_EQ(lease->num_cached_tokens(), static_cast<std::int32_t>(expected->size()) * page_size_);
    ASSERT_EQ(lease->num_published_pages(), static_cast<std::int32_t>(expected->size()));
    ASSERT_GE(lease->pages().size(), expected->size());
    ASSERT_TRUE(std::equal(expected->begin(), expected->end(), lease->pages().begin()))
        << "the cache gave other pages than those published for this prefix";
    ASSERT_EQ(model_.GiveFreshPages(number, lease->pages()), "");
    ASSERT_GE(static_cast<std::int64_t>(lease->pages().size()) * page_size_, capacity);
    requests_.emplace(number, Request{std::move(tokens), std::move(*lease)});
  }

  void Extend() {
    if (requests_.empty()) return;
    auto& [number, request] = AnyRequest();
    const auto num_pages = static_cast<std::int32_t>(request.lease.pages().size());
    const std::int32_t capacity = Between(0, (num_pages + 3) * page_size_);
    const bool is_extended = cache_.Extend(request.lease, capacity);
    ASSERT_EQ(is_extended, model_.Extend(number, capacity));
    coverage_.Count(is_extended ? "extend" : "extend without room");
    ASSERT_EQ(model_.GiveFreshPages(number, request.lease.pages()), "");
  }

  void Publish() {
    if (requests_.empty()) return;
    auto& [number, request] = AnyRequest();
    const auto capacity = static_cast<std::int32_t>(request.lease.pages().size()) * page_size_;
    const std::int32_t num_computed = Chance(70) ? capacity : Between(0, capacity);
    while (static_cast<std::int32_t>(request.tokens.size()) < num_computed) {
      request.tokens.push_back(AnyToken());
    }
    const std::span computed =
        std::span(request.tokens).first(static_cast<std::size_t>(num_computed));
    const std::int64_t num_nodes = cache_.Stats().num_nodes;
    const std::int64_t num_tree_pages = cache_.Stats().num_tree_pages;
    cache_.Publish(request.lease, computed);
    model_.Publish(number, computed);
    Remember(computed);
    const std::int64_t num_new_nodes = cache_.Stats().num_nodes - num_nodes;
    const bool has_new_pages = cache_.Stats().num_tree_pages > num_tree_pages;
    coverage_.Count("publish grows an edge", num_new_nodes == 0 && has_new_pages);
    coverage_.Count("publish splits and branches", num_new_nodes == 2);
    const NaiveCache::NaiveLease& expected = model_.LeaseOf(number);
    coverage_.Count(
        "publish keeps duplicates",
        std::find(expected.is_private.begin(),
                  expected.is_private.begin() + request.lease.num_published_pages(),
                  true) != expected.is_private.begin() + request.lease.num_published_pages());
  }

  void Release() {
    if (requests_.empty()) return;
    const int number = AnyRequest().first;
    const NamespaceId id = model_.LeaseOf(number).ns;
    requests_.erase(number);
    model_.Release(number);
    coverage_.Count("namespace ends with a lease", !model_.Has(id));
  }

  void Evict() {
    const std::int64_t num_pages = Between(0, Chance(80) ? 3 : num_pages_);
    ASSERT_EQ(cache_.Evict(num_pages), model_.Evict(num_pages));
  }

  void MoveLease() {
    if (requests_.empty()) return;
    Lease& lease = AnyRequest().second.lease;
    Lease parked(std::move(lease));
    EXPECT_FALSE(lease);
    lease = std::move(parked);
  }

  void MisuseNamespaces() {
    const NamespaceId unknown{newest_id_.value() + 1};
    EXPECT_THROW((void)cache_.Probe(unknown, Tokens{}), NotFoundError);
    EXPECT_THROW((void)cache_.RetainNamespace(unknown), NotFoundError);
    EXPECT_THROW(cache_.DrainNamespace(unknown), NotFoundError);
  }

  // --- Comparison ------------------------------------------------------------------------------

  void ExpectAgreement() {
    ASSERT_NO_THROW(cache_.CheckInvariants());
    const CacheStats stats = cache_.Stats();
    ASSERT_EQ(stats.num_free_pages, model_.num_free_pages());
    ASSERT_EQ(stats.num_tree_pages + stats.num_private_pages + stats.num_free_pages, num_pages_);
    ASSERT_EQ(stats.num_evicted_pages, model_.num_evicted_pages());
    ASSERT_EQ(cache_.NumAvailablePages(), model_.NumAvailablePages());
    const std::vector<NamespaceStats> list = cache_.NamespaceStatsList();
    const std::vector<NamespaceId> ids = model_.NamespaceIds();
    ASSERT_EQ(list.size(), ids.size());
    for (std::size_t i = 0; i < ids.size(); ++i) ExpectSameNamespace(list[i], ids[i]);
    for (const auto& [number, request] : requests_) ExpectSameLease(number, request);
    for (int i = 0; i < 2; ++i) {
      const NamespaceId id = AnyNamespace();
      const Tokens tokens = AnySequence();
      ASSERT_EQ(cache_.Probe(id, tokens).num_device_tokens, model_.Probe(id, tokens));
    }
  }

  void ExpectSameNamespace(const NamespaceStats& stats, NamespaceId id) {
    ASSERT_EQ(stats.id, id);
    ASSERT_EQ(stats.is_draining, model_.IsDraining(id));
    ASSERT_EQ(stats.num_handles, model_.NumHandles(id));
    ASSERT_EQ(stats.num_leases, model_.NumLeases(id));
    ASSERT_EQ(stats.num_tree_pages, model_.NumTreePages(id));
    ASSERT_EQ(stats.num_private_pages, model_.NumPrivatePages(id));
  }

  void ExpectSameLease(int number, const Request& request) {
    const NaiveCache::NaiveLease& expected = model_.LeaseOf(number);
    ASSERT_TRUE(std::ranges::equal(request.lease.pages(), expected.pages))
        << "a page changed under lease " << number;
    const auto num_published = static_cast<std::int32_t>(expected.published.size());
    ASSERT_EQ(request.lease.num_published_pages() * page_size_, num_published);
    ASSERT_EQ(cache_.Probe(expected.ns, expected.published).num_device_tokens, num_published)
        << "a leased prefix is not fully cached";
  }

  /// All requests and handles end; then every page can come back.
  void Finish() {
    while (!requests_.empty()) Release();
    while (!handles_.empty()) DropHandle();
    ExpectAgreement();
    for (const NamespaceStats& stats : cache_.NamespaceStatsList()) {
      EXPECT_FALSE(stats.is_draining) << "namespace " << stats.id << " did not destroy itself";
    }
    EXPECT_EQ(cache_.NumAvailablePages(), num_pages_);
    cache_.Evict(num_pages_);
    model_.Evict(num_pages_);
    ExpectAgreement();
    EXPECT_EQ(cache_.Stats().num_free_pages, num_pages_);
  }

  // --- Randomness ------------------------------------------------------------------------------

  std::int32_t Between(std::int64_t low, std::int64_t high) {
    return static_cast<std::int32_t>(
        low + static_cast<std::int64_t>(random_() % static_cast<std::uint64_t>(high - low + 1)));
  }
  bool Chance(int percent) { return Between(0, 99) < percent; }
  std::size_t Index(std::size_t size) { return random_() % size; }
  TokenId AnyToken() { return Between(0, alphabet_ - 1); }
  NamespaceId AnyNamespace() {
    const std::vector<NamespaceId> ids = model_.NamespaceIds();
    return ids[Index(ids.size())];
  }
  std::map<int, Request>::value_type& AnyRequest() {
    return *std::next(requests_.begin(), static_cast<std::ptrdiff_t>(Index(requests_.size())));
  }
  /// From scratch, or a variation of what was published before, here or in another namespace.
  Tokens AnySequence() {
    Tokens tokens;
    if (!history_.empty() && Chance(75)) {
      tokens = history_[Index(history_.size())];
      if (Chance(50)) tokens.resize(Index(tokens.size() + 1));
      if (Chance(30)) return tokens;
    }
    const auto max_num_tokens = static_cast<std::size_t>(max_sequence_pages_ * page_size_) + 2;
    const std::size_t num_tokens = Index(max_num_tokens);
    while (tokens.size() < num_tokens) tokens.push_back(AnyToken());
    return tokens;
  }
  void Remember(std::span<const TokenId> tokens) {
    constexpr std::size_t kHistory = 6;
    if (history_.size() < kHistory) history_.emplace_back();
    history_[Index(history_.size())].assign(tokens.begin(), tokens.end());
  }

  std::mt19937_64 random_;
  const std::int32_t page_size_;
  const std::int32_t num_pages_;
  const std::int32_t alphabet_;
  const std::int32_t max_sequence_pages_;
  Coverage& coverage_;
  KVPrefixCache cache_;
  NaiveCache model_;
  NamespaceId newest_id_ = kBaseNamespace;
  int next_lease_ = 0;
  std::vector<NamespaceHandle> handles_;
  std::map<int, Request> requests_;
  std::vector<Tokens> history_;
};

TEST(KVPrefixCacheRandomTest, AgreesWithTheNaiveModel) {
  constexpr int kEpisodeOperations = 1000;
  const std::int64_t num_operations = FromEnvironment("LORA_SERVE_TEST_OPERATIONS", 200'000);
  std::uint64_t seed =
      static_cast<std::uint64_t>(FromEnvironment("LORA_SERVE_TEST_SEED", 20'261'120));
  Coverage coverage;
  for (std::int64_t done = 0; done < num_operations; done += kEpisodeOperations, ++seed) {
    SCOPED_TRACE("LORA_SERVE_TEST_SEED=" + std::to_string(seed));
    Episode episode(seed, &coverage);
    episode.Run(kEpisodeOperations);
    if (HasFailure()) return;
  }
  for (const auto& [what, count] : coverage.counts) {
    RecordProperty(what, std::to_string(count));
    const std::int64_t expected_count = num_operations >= 100'000 ? 50 : 0;
    EXPECT_GE(count, expected_count) << what << " hardly ever happened";
  }
}

}  // namespace
}  // namespace lora_serve
