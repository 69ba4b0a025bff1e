#include "cache_operations.h"

#include <algorithm>
#include <cstdio>
#include <exception>
#include <optional>
#include <sstream>
#include <utility>

#include "common/errors.h"

namespace lora_serve {
namespace {

constexpr std::size_t kMaxHandles = 8;
constexpr std::size_t kNumLogged = 60;

std::string Describe(std::span<const TokenId> tokens) {
  std::ostringstream os;
  os << '[';
  for (const TokenId token : tokens) os << token;
  os << ']';
  return os.str();
}

const char* NameOf(AcquireOutcome outcome) {
  return outcome == AcquireOutcome::kAcquired ? "acquired"
         : outcome == AcquireOutcome::kNoRoom ? "no room"
                                              : "in flight";
}

}  // namespace

CacheOperations::CacheOperations(const CacheOperationsConfig& config, OperationChooser* chooser,
                                 OperationCoverage* coverage)
    : config_(config),
      chooser_(*chooser),
      coverage_(*coverage),
      cache_(config.cache),
      model_(config.cache, coverage),
      comparison_(&cache_, &model_) {
  handles_.push_back(cache_.RetainNamespace(kBaseNamespace));
  model_.RetainNamespace(kBaseNamespace);
}

// --- Running -----------------------------------------------------------------------------------

template <typename Call>
void CacheOperations::Report(const Call& call) {
  try {
    call();
  } catch (const std::exception& error) {
    std::ostringstream os;
    os << error.what() << "\nafter operation " << num_operations_ << " of";
    for (const std::string& line : log_) os << "\n  " << line;
    // At once: leases that end now may find the cache in a state that aborts.
    std::fputs((os.str() + '\n').c_str(), stderr);
    throw CacheDisagreement(os.str());
  }
}

template <typename... Values>
void CacheOperations::Log(const Values&... values) {
  std::ostringstream os;
  os << '#' << num_operations_;
  ((os << ' ' << values), ...);
  if (log_.size() == kNumLogged) log_.pop_front();
  log_.push_back(os.str());
}

void CacheOperations::Run(std::int64_t num_operations) {
  Report([&] {
    for (std::int64_t done = 0; done < num_operations && !chooser_.IsExhausted(); ++done) {
      ++num_operations_;
      RunOne();
      Compare();
    }
  });
}

void CacheOperations::RunOne() {
  using Self = CacheOperations;
  static constexpr WeightedOperation kOperations[] = {
      {6, &Self::OpenNamespace},    {2, &Self::DrainNamespace}, {8, &Self::RetainNamespace},
      {3, &Self::DropHandle},       {3, &Self::SetQuota},       {3, &Self::SetAdapterResident},
      {50, &Self::Acquire},         {10, &Self::Extend},        {45, &Self::Publish},
      {20, &Self::ReserveSnapshot}, {30, &Self::EndLease},      {2, &Self::MoveLease},
      {14, &Self::PlanWriteBacks},  {8, &Self::StartWriteBack}, {30, &Self::EndTransfer},
      {10, &Self::Evict},           {6, &Self::RefreshHints},   {2, &Self::SwitchEvents},
      {1, &Self::MisuseNamespaces}, {3, &Self::MisuseLeases}};
  constexpr std::size_t kTotalWeight = 256;  // so that a fuzzer chooses with one byte
  static_assert([] {
    std::size_t total = 0;
    for (const WeightedOperation& operation : kOperations) total += operation.weight;
    return total == kTotalWeight;
  }());
  // An operation without anything to do it to does not count.
  for (int attempt = 0; attempt < 8; ++attempt) {
    std::size_t choice = chooser_.Choose(kTotalWeight);
    const WeightedOperation* operation = kOperations;
    while (choice >= operation->weight) choice -= (operation++)->weight;
    if ((this->*operation->run)()) return;
  }
}

void CacheOperations::Compare() {
  if (num_operations_ % config_.invariants_interval == 0) cache_.CheckInvariants();
  if (chooser_.Chance(60)) comparison_.TakeOrders();
  if (chooser_.Chance(70)) comparison_.TakeEvents();
  if (num_operations_ % config_.comparison_interval != 0) return;
  comparison_.CompareStats();
  if (chooser_.Chance(25)) comparison_.CompareNumAvailablePages();
  for (const auto& [number, request] : requests_) comparison_.CompareLease(number, request.lease);
  const NamespaceId id = AnyNamespace();
  comparison_.CompareProbe(id, AnySequence(id));
  if (num_operations_ % (64 * config_.comparison_interval) == 0) comparison_.CompareAllProbes();
}

void CacheOperations::Finish() {
  Report([this] {
    const bool leaves_transfers = chooser_.Chance(20);
    comparison_.TakeOrders();
    while (!leaves_transfers && !comparison_.TakenTransfers().empty()) {
      EndTransfer(comparison_.TakenTransfers().front());
    }
    while (!requests_.empty()) EndLease(requests_.begin()->first);
    while (!handles_.empty()) {
      model_.DropHandle(handles_.back().id());
      handles_.pop_back();
    }
    cache_.CheckInvariants();
    comparison_.CompareStats();
    if (leaves_transfers) return;
    SettleWriteBacks();
    ExpectEqual(cache_.NumAvailablePages(), std::int64_t{config_.cache.num_device_pages},
                "pages that can come back at the end");
    for (const NamespaceId id : model_.NamespaceIds()) {
      ExpectTrue(!model_.IsDraining(id), "a drained namespace destroys itself");
      if (id == kBaseNamespace) continue;
      cache_.DrainNamespace(id);
      model_.DrainNamespace(id);
      ExpectTrue(!cache_.HasNamespace(id), "an abandoned namespace is gone at once");
    }
    for (const Tier tier : kTiers) {
      ExpectEqual(cache_.Evict(tier, 1 << 20), model_.Evict(tier, 1 << 20), "pages evicted");
    }
    cache_.CheckInvariants();
    comparison_.CompareStats();
    comparison_.TakeEvents();
    const CacheStats stats = cache_.Stats();
    ExpectEqual(stats.num_free_pages, stats.num_device_pages, "free pages at the end");
    ExpectEqual(stats.num_free_host_pages, stats.num_host_pages, "free host pages at the end");
    ExpectEqual(stats.num_free_device_state_slots, stats.num_device_state_slots,
                "free device slots at the end");
    ExpectEqual(stats.num_free_host_state_slots, stats.num_host_state_slots,
                "free host slots at the end");
  });
}

void CacheOperations::SettleWriteBacks() {
  const std::int64_t max_rounds = 10 + 2 * config_.cache.num_device_pages;
  for (std::int64_t round = 0;; ++round) {
    PlanWriteBacks();
    comparison_.TakeOrders();
    if (comparison_.TakenTransfers().empty()) return;
    ExpectTrue(round < max_rounds, "write-backs come to rest when nobody uses the cache");
    for (const std::int64_t transfer : comparison_.TakenTransfers()) {
      cache_.CompleteTransfer(comparison_.IdOf(transfer));
      model_.CompleteTransfer(transfer);
    }
  }
}

// --- Namespaces --------------------------------------------------------------------------------

bool CacheOperations::OpenNamespace() {
  if (model_.NamespaceIds().size() >= static_cast<std::size_t>(config_.max_namespaces)) {
    return false;
  }
  const NamespaceOptions options{.digest_seed = 0x9ddfea08eb382d69u * (chooser_.Choose(200) + 1),
                                 .device_quota_pages = AnyQuota(),
                                 .host_quota_pages = AnyQuota()};
  const NamespaceId id = cache_.OpenNamespace(options);
  Log("OpenNamespace", id, "quotas", options.device_quota_pages.value_or(-1),
      options.host_quota_pages.value_or(-1));
  ExpectTrue(id > newest_id_, "ids are not reused");
  newest_id_ = id;
  model_.OpenNamespace(id, options);
  return true;
}

bool CacheOperations::DrainNamespace() {
  const NamespaceId id = AnyNamespace();
  if (id == kBaseNamespace) return false;
  if (chooser_.Chance(40)) {  // so that the last to let go of it may be a transfer
    for (std::size_t index = handles_.size(); index > 0; --index) {
      if (handles_[index - 1].id() == id) DropHandle(index - 1);
    }
    while (const std::optional<int> number = FindRequestIn(id)) EndLease(*number);
    if (!model_.HasNamespace(id)) return true;
  }
  Log("DrainNamespace", id);
  for (const NamespaceStats& stats : model_.NamespaceStatsList()) {
    if (stats.id != id) continue;
    coverage_.Count("drain again", stats.is_draining);
    coverage_.Count("drain with leases", stats.num_leases > 0);
    coverage_.Count("drain with transfers", stats.num_transfers > 0);
    coverage_.Count("drain with pages", stats.num_tree_pages > stats.num_leases);
    coverage_.Count("drain with host pages", stats.num_host_pages > 0);
  }
  cache_.DrainNamespace(id);
  model_.DrainNamespace(id);
  ExpectEqual(cache_.HasNamespace(id), model_.HasNamespace(id), "HasNamespace after a drain");
  return true;
}

bool CacheOperations::RetainNamespace() {
  const NamespaceId id = AnyNamespace();
  if (handles_.size() >= kMaxHandles) return false;
  Log("RetainNamespace", id);
  if (model_.IsDraining(id)) {
    ExpectThrows<NotFoundError>([&] { (void)cache_.RetainNamespace(id); }, "handle while draining");
    return true;
  }
  handles_.push_back(cache_.RetainNamespace(id));
  model_.RetainNamespace(id);
  return true;
}

bool CacheOperations::DropHandle() {
  if (handles_.empty()) return false;
  DropHandle(chooser_.Choose(handles_.size()));
  return true;
}

void CacheOperations::DropHandle(std::size_t index) {
  const NamespaceId id = handles_[index].id();
  Log("DropHandle", id);
  handles_.erase(handles_.begin() + static_cast<std::ptrdiff_t>(index));
  model_.DropHandle(id);
  ExpectEqual(cache_.HasNamespace(id), model_.HasNamespace(id), "HasNamespace after a handle");
  coverage_.Count("namespace ends with a handle", !model_.HasNamespace(id));
}

bool CacheOperations::SetAdapterResident() {
  const NamespaceId id = AnyNamespace();
  const bool is_resident = chooser_.Chance(50);
  Log("SetAdapterResident", id, is_resident);
  cache_.SetAdapterResident(id, is_resident);
  model_.SetAdapterResident(id, is_resident);
  return true;
}

bool CacheOperations::SetQuota() {
  const NamespaceId id = AnyNamespace();
  const Tier tier = chooser_.Chance(50) ? Tier::kDevice : Tier::kHost;
  const std::optional<std::int64_t> quota = AnyQuota();
  Log("SetQuota", id, tier == Tier::kDevice ? "device" : "host", quota.value_or(-1));
  cache_.SetQuota(id, tier, quota);
  model_.SetQuota(id, tier, quota);
  return true;
}

// --- Leases ------------------------------------------------------------------------------------

bool CacheOperations::Acquire() {
  if (handles_.empty() || requests_.size() >= static_cast<std::size_t>(config_.max_requests)) {
    return false;
  }
  const NamespaceHandle& handle = handles_[chooser_.Choose(handles_.size())];
  Tokens tokens = AnySequence(handle.id());
  const auto num_tokens = static_cast<std::int32_t>(tokens.size());
  const std::int32_t page_size = config_.cache.page_size;
  const std::size_t kind = chooser_.Choose(10);
  const AcquireOptions options{
      .intent = chooser_.Chance(75) ? MatchIntent::kPrefixReuse : MatchIntent::kRecovery,
      .max_cached_tokens = kind < 6    ? num_tokens
                           : kind == 6 ? std::max(num_tokens - 1, 0)
                           : kind == 7 ? 0
                                       : chooser_.Between(0, num_tokens),
      .num_capacity_tokens =
          chooser_.Chance(60) ? num_tokens : chooser_.Between(0, num_tokens + 2 * page_size)};
  const bool compares_dumps = ComparesDumps();
  const std::string before = compares_dumps ? cache_.Dump() : "";
  const std::int64_t num_evicted = model_.Stats().num_evicted_pages;

  AcquireResult result = cache_.Acquire(handle, tokens, options);
  const int number = next_lease_++;
  Log("Acquire", number, "in", handle.id(), Describe(tokens),
      "cached <=", options.max_cached_tokens, "capacity", options.num_capacity_tokens,
      options.intent == MatchIntent::kRecovery ? "recovery:" : "reuse:", NameOf(result.outcome));
  const AcquireOutcome expected = model_.Acquire(number, handle.id(), tokens, options);
  ExpectEqual(std::string(NameOf(result.outcome)), NameOf(expected), "outcome of Acquire");
  coverage_.Count(NameOf(expected));
  const bool is_acquired = expected == AcquireOutcome::kAcquired;
  ExpectEqual(static_cast<bool>(result.lease), is_acquired, "Acquire gives a lease");
  if (!is_acquired) {
    if (compares_dumps) ExpectTrue(before == cache_.Dump(), "a failed Acquire changes nothing");
    return true;
  }
  model_.LearnPages(number, result.lease.pages());
  model_.LearnSlots(number, result.lease.state_slot(), result.lease.resumed_snapshot());
  ExpectTrue(config_.cache.num_device_state_slots == 0 || result.lease.state_slot() != kNoStateSlot,
             "a lease of a model with state has a slot");
  ExpectTrue(static_cast<std::int32_t>(result.lease.pages().size()) * page_size >=
                 options.num_capacity_tokens,
             "a lease has the capacity that was asked for");
  coverage_.Count("acquire evicts", model_.Stats().num_evicted_pages > num_evicted);
  coverage_.Count("acquire hits", result.lease.num_cached_tokens() > 0);
  requests_.emplace(number, Request{std::move(tokens), std::move(result.lease)});
  CountBranches(number, 0);
  return true;
}

bool CacheOperations::Extend() {
  if (requests_.empty()) return false;
  auto& [number, request] = AnyRequest();
  const auto num_pages = static_cast<std::int32_t>(request.lease.pages().size());
  const std::int32_t capacity = chooser_.Between(0, (num_pages + 3) * config_.cache.page_size);
  const bool is_extended = cache_.Extend(request.lease, capacity);
  Log("Extend", number, "to", capacity, is_extended);
  ExpectEqual(is_extended, model_.Extend(number, capacity), "Extend");
  coverage_.Count(is_extended ? "extend" : "extend without room");
  model_.LearnPages(number, request.lease.pages());
  return true;
}

bool CacheOperations::Publish() {
  if (requests_.empty()) return false;
  auto& [number, request] = AnyRequest();
  if (request.lease.IsLoading()) return false;
  const auto capacity =
      static_cast<std::int32_t>(request.lease.pages().size()) * config_.cache.page_size;
  const std::int32_t num_computed = chooser_.Chance(70) ? capacity : chooser_.Between(0, capacity);
  while (static_cast<std::int32_t>(request.tokens.size()) < num_computed) {
    request.tokens.push_back(AnyToken());
  }
  const std::span computed =
      std::span(request.tokens).first(static_cast<std::size_t>(num_computed));
  Log("Publish", number, Describe(computed));
  const std::size_t num_published = model_.LeaseOf(number).published.size();
  cache_.Publish(request.lease, computed);
  model_.Publish(number, computed);
  CountBranches(number, num_published);
  Remember(model_.LeaseOf(number).ns, computed);
  return true;
}

/// Whether the lease's published prefix now leaves, or ends inside, what a transfer copies.
void CacheOperations::CountBranches(int number, std::size_t num_published_before) {
  const NaiveCache::NaiveLease& lease = model_.LeaseOf(number);
  const auto page_size = static_cast<std::size_t>(config_.cache.page_size);
  if (lease.published.size() == num_published_before) return;
  for (const auto& [id, transfer] : model_.transfers()) {
    if (transfer.path.ns != lease.ns) continue;
    const Tokens& path = transfer.path.tokens;
    std::size_t num_common = 0;
    while (num_common + page_size <= std::min(path.size(), lease.published.size()) &&
           std::equal(path.begin(),
                      path.begin() + static_cast<std::ptrdiff_t>(num_common + page_size),
                      lease.published.begin())) {
      num_common += page_size;
    }
    const bool is_inside = transfer.first_page * page_size < num_common && num_common < path.size();
    coverage_.Count("a path in flight branches", is_inside && num_common < lease.published.size());
    coverage_.Count("a lease ends inside a path in flight",
                    is_inside && num_common == lease.published.size());
  }
}

bool CacheOperations::ReserveSnapshot() {
  if (requests_.empty()) return false;
  auto& [number, request] = AnyRequest();
  const std::int32_t num_pages = static_cast<std::int32_t>(request.lease.pages().size());
  const std::int32_t first = std::max(request.lease.num_published_pages(), 1);
  if (request.lease.IsLoading() || first > num_pages) return false;
  const std::int32_t num_tokens = chooser_.Between(first, num_pages) * config_.cache.page_size;
  const std::optional<StateSlot> slot = cache_.ReserveSnapshot(request.lease, num_tokens);
  Log("ReserveSnapshot", number, "after", num_tokens, slot.value_or(kNoStateSlot));
  ExpectEqual(slot.has_value(), model_.ReserveSnapshot(number, num_tokens), "ReserveSnapshot");
  if (slot) model_.LearnReservedSlot(number, *slot);
  return true;
}

bool CacheOperations::EndLease() {
  if (requests_.empty()) return false;
  EndLease(AnyRequest().first);
  return true;
}

void CacheOperations::EndLease(int number) {
  Log("EndLease", number);
  const NamespaceId id = model_.LeaseOf(number).ns;
  requests_.erase(number);
  model_.EndLease(number);
  ExpectEqual(cache_.HasNamespace(id), model_.HasNamespace(id), "HasNamespace after a lease");
}

bool CacheOperations::MoveLease() {
  if (requests_.empty()) return false;
  auto& [number, request] = AnyRequest();
  Log("MoveLease", number);
  Lease parked(std::move(request.lease));
  ExpectTrue(!request.lease && parked, "a lease moves");  // NOLINT: moved from on purpose
  coverage_.Count("a loading lease moves", parked.IsLoading());
  request.lease = std::move(parked);
  return true;
}

// --- Transfers ---------------------------------------------------------------------------------

bool CacheOperations::PlanWriteBacks() {
  Log("PlanWriteBacks");
  cache_.PlanWriteBacks();
  model_.PlanWriteBacks();
  return true;
}

bool CacheOperations::StartWriteBack() {
  if (requests_.empty()) return false;
  auto& [number, request] = AnyRequest();
  const bool is_started = cache_.StartWriteBack(request.lease);
  Log("StartWriteBack", number, is_started);
  ExpectEqual(is_started, model_.StartWriteBack(number), "StartWriteBack");
  coverage_.Count(is_started ? "write-back of a lease" : "no write-back of a lease");
  return true;
}

bool CacheOperations::EndTransfer() {
  if (comparison_.TakenTransfers().empty()) comparison_.TakeOrders();
  const std::vector<std::int64_t> taken = comparison_.TakenTransfers();
  if (taken.empty()) return false;
  EndTransfer(taken[chooser_.Choose(taken.size())]);
  return true;
}

void CacheOperations::EndTransfer(std::int64_t transfer) {
  const TransferId id = comparison_.IdOf(transfer);
  const NamespaceId ns = model_.transfers().at(transfer).path.ns;
  const bool has_failed = chooser_.Chance(20);
  Log(has_failed ? "FailTransfer" : "CompleteTransfer", id);
  coverage_.Count("transfers end out of order", model_.transfers().begin()->first < transfer);
  if (has_failed) {
    cache_.FailTransfer(id);
    model_.FailTransfer(transfer);
  } else {
    cache_.CompleteTransfer(id);
    model_.CompleteTransfer(transfer);
  }
  ExpectEqual(cache_.HasNamespace(ns), model_.HasNamespace(ns), "HasNamespace after a transfer");
  if (!chooser_.Chance(10)) return;
  ExpectThrows<NotFoundError>([&] { cache_.CompleteTransfer(id); }, "complete what has ended");
  ExpectThrows<NotFoundError>([&] { cache_.FailTransfer(id); }, "fail what has ended");
}

// --- The rest ----------------------------------------------------------------------------------

bool CacheOperations::Evict() {
  const Tier tier = chooser_.Chance(80) ? Tier::kDevice : Tier::kHost;
  const std::int64_t num_pages =
      chooser_.Between(0, chooser_.Chance(60) ? 3 : config_.cache.num_device_pages);
  Log("Evict", tier == Tier::kDevice ? "device" : "host", num_pages);
  ExpectEqual(cache_.Evict(tier, num_pages), model_.Evict(tier, num_pages), "pages evicted");
  return true;
}

bool CacheOperations::RefreshHints() {
  Log("RefreshHints");
  if (chooser_.Chance(50)) {
    const std::size_t index = chooser_.Choose(kNumHints);
    const NamespaceId id = AnyNamespace();
    hint_tokens_[index] = AnySequence(id);
    hints_[index] = {.namespace_id = id, .tokens = hint_tokens_[index]};
  }
  cache_.RefreshHints(hints_);
  comparison_.CompareHints(hints_);
  for (const PrefixHint& hint : hints_) {
    coverage_.Count("hint of a namespace that is gone", !model_.HasNamespace(hint.namespace_id));
    coverage_.Count("hint of a cached prefix", hint.num_resumable_tokens > 0);
  }
  return true;
}

bool CacheOperations::SwitchEvents() {
  if (is_events_enabled_ && chooser_.Chance(80)) return false;  // mostly on
  comparison_.TakeEvents();
  is_events_enabled_ = !is_events_enabled_;
  Log("SetEventsEnabled", is_events_enabled_);
  cache_.SetEventsEnabled(is_events_enabled_);
  model_.SetEventsEnabled(is_events_enabled_);
  comparison_.EventsSwitchedOn();
  return true;
}

bool CacheOperations::MisuseNamespaces() {
  Log("misuse of namespaces");
  const NamespaceId unknown{newest_id_.value() + 1};
  const NamespaceId known = AnyNamespace();
  const Tokens none;
  ExpectThrows<NotFoundError>([&] { (void)cache_.Probe(unknown, none, MatchIntent::kRecovery); },
                              "probe of an unknown namespace");
  ExpectThrows<NotFoundError>([&] { (void)cache_.RetainNamespace(unknown); }, "unknown namespace");
  ExpectThrows<NotFoundError>([&] { cache_.DrainNamespace(unknown); }, "unknown namespace");
  ExpectThrows<NotFoundError>([&] { cache_.SetAdapterResident(unknown, true); }, "unknown");
  ExpectThrows<NotFoundError>([&] { cache_.SetQuota(unknown, Tier::kHost, 1); }, "unknown");
  ExpectThrows<InvalidArgumentError>([&] { cache_.SetQuota(known, Tier::kDevice, -1); },
                                     "a negative quota");
  ExpectThrows<InvalidArgumentError>(
      [&] {
        (void)cache_.OpenNamespace(
            {.digest_seed = 1, .device_quota_pages = std::nullopt, .host_quota_pages = -1});
      },
      "a negative quota");
  ExpectThrows<InvalidArgumentError>([&] { cache_.DrainNamespace(kBaseNamespace); },
                                     "drain of the base namespace");
  return true;
}

bool CacheOperations::MisuseLeases() {
  if (requests_.empty()) return false;
  auto& [number, request] = AnyRequest();
  Lease& lease = request.lease;
  Log("misuse of lease", number);
  const Tokens too_many((lease.pages().size() + 1) *
                        static_cast<std::size_t>(config_.cache.page_size));
  if (lease.IsLoading()) {
    ExpectThrows<InternalError>([&] { cache_.Publish(lease, Tokens{}); }, "publish while loading");
    ExpectTrue(!cache_.StartWriteBack(lease), "no write-back while loading");
    coverage_.Count("misuse of a loading lease");
  } else if (!model_.IsDraining(model_.LeaseOf(number).ns)) {
    ExpectThrows<InternalError>([&] { cache_.Publish(lease, too_many); },
                                "publish more than the lease has pages for");
  }
  return true;
}

// --- Choices -----------------------------------------------------------------------------------

bool CacheOperations::ComparesDumps() {
  return config_.cache.num_device_pages <= 64 && chooser_.Chance(5);
}

NamespaceId CacheOperations::AnyNamespace() {
  const std::vector<NamespaceId> ids = model_.NamespaceIds();
  return ids[chooser_.Choose(ids.size())];
}

std::map<int, CacheOperations::Request>::value_type& CacheOperations::AnyRequest() {
  return *std::next(requests_.begin(),
                    static_cast<std::ptrdiff_t>(chooser_.Choose(requests_.size())));
}

std::optional<int> CacheOperations::FindRequestIn(NamespaceId id) const {
  for (const auto& [number, request] : requests_) {
    if (model_.LeaseOf(number).ns == id) return number;
  }
  return std::nullopt;
}

std::optional<std::int64_t> CacheOperations::AnyQuota() {
  if (chooser_.Chance(60)) return std::nullopt;
  return chooser_.Between(0, std::min(config_.cache.num_device_pages, 200));
}

/// From scratch, or a variation of what was published before, mostly in the same namespace.
Tokens CacheOperations::AnySequence(NamespaceId id) {
  Tokens tokens;
  if (!history_.empty() && chooser_.Chance(85)) {
    std::size_t index = chooser_.Choose(history_.size());
    for (std::size_t tried = 0; tried < history_.size() && history_[index].ns != id; ++tried) {
      if (chooser_.Chance(15)) break;
      index = (index + 1) % history_.size();
    }
    tokens = history_[index].tokens;
    if (chooser_.Chance(40)) return tokens;
    if (chooser_.Chance(50)) tokens.resize(chooser_.Choose(tokens.size() + 1));
  }
  const std::int32_t max_num_tokens = config_.max_sequence_pages * config_.cache.page_size + 1;
  const auto num_tokens = static_cast<std::size_t>(chooser_.Between(0, max_num_tokens));
  while (tokens.size() < num_tokens) tokens.push_back(AnyToken());
  return tokens;
}

void CacheOperations::Remember(NamespaceId id, std::span<const TokenId> tokens) {
  constexpr std::size_t kHistory = 8;
  if (history_.size() < kHistory) history_.emplace_back();
  history_[chooser_.Choose(history_.size())] = {id, {tokens.begin(), tokens.end()}};
}

CacheOperationsConfig ChooseAnyConfig(OperationChooser& chooser) {
  CacheOperationsConfig config;
  KVPrefixCacheOptions& cache = config.cache;
  cache.page_size = 1 << chooser.Between(0, 2);
  cache.num_device_pages = chooser.Between(4, chooser.Chance(50) ? 16 : 64);
  const bool has_host = chooser.Chance(80);
  cache.num_host_pages = has_host ? chooser.Between(1, chooser.Chance(50) ? 12 : 64) : 0;
  constexpr WritePolicy kPolicies[] = {WritePolicy::kOff, WritePolicy::kWriteBack,
                                       WritePolicy::kWriteThrough};
  cache.write_policy = kPolicies[chooser.Choose(3)];
  cache.write_back_watermark_pages = chooser.Between(0, cache.num_device_pages);
  cache.enable_prefix_reuse = chooser.Chance(90);
  constexpr WindowLayers kWindows[] = {WindowLayers::kRingBuffer, WindowLayers::kPaged};
  cache.window_layers = chooser.Chance(85) ? WindowLayers::kNone : kWindows[chooser.Choose(2)];
  const bool has_state = chooser.Chance(50);
  cache.num_device_state_slots = has_state ? chooser.Between(1, 12) : 0;
  cache.num_host_state_slots = has_state && has_host ? chooser.Between(0, 8) : 0;
  cache.max_snapshots_per_lease = chooser.Between(1, 4);
  config.alphabet = chooser.Between(1, 3);
  config.max_sequence_pages = chooser.Between(2, 10);
  config.max_requests = chooser.Between(2, 8);
  return config;
}

}  // namespace lora_serve
