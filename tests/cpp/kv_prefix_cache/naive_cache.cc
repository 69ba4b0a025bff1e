#include "naive_cache.h"

#include <algorithm>

namespace lora_serve {

using enum Component;
using enum Tier;

NaiveCache::NaiveCache(const KVPrefixCacheOptions& options, OperationCoverage* coverage)
    : options_(options),
      page_size_(static_cast<std::size_t>(options.page_size)),
      coverage_(*coverage) {
  OpenNamespace(kBaseNamespace, {});
}

// --- Namespaces --------------------------------------------------------------------------------

void NaiveCache::OpenNamespace(NamespaceId id, const NamespaceOptions& options) {
  NaiveNamespace& ns = namespaces_[id];
  ns.digest_seed = options.digest_seed;
  ns.quota_pages = {options.device_quota_pages, options.host_quota_pages};
}

void NaiveCache::DropHandle(NamespaceId id) {
  --namespaces_.at(id).num_handles;
  DestroyIfAbandoned(id);
}

void NaiveCache::DrainNamespace(NamespaceId id) {
  NaiveNamespace& ns = namespaces_.at(id);
  if (ns.is_draining) return;
  for (const Tier tier : kTiers) {
    for (const auto& [key, page] : pages(tier)) {
      if (key.ns == id && !page.is_in_flight) NoteEvent(KVEventKind::kRemoved, tier, key);
    }
  }
  ns.is_draining = true;
  std::erase_if(notes_, [id](const SequenceKey& note) { return note.ns == id; });
  DropUnprotected(id);
  DestroyIfAbandoned(id);
}

void NaiveCache::SetAdapterResident(NamespaceId id, bool is_resident) {
  namespaces_.at(id).is_adapter_resident = is_resident;
}

void NaiveCache::SetQuota(NamespaceId id, Tier tier, std::optional<std::int64_t> num_pages) {
  namespaces_.at(id).quota_pages[IndexOf(tier)] = num_pages;
}

std::vector<NamespaceId> NaiveCache::NamespaceIds() const {
  std::vector<NamespaceId> ids;
  for (const auto& [id, ns] : namespaces_) ids.push_back(id);
  return ids;
}

void NaiveCache::DestroyIfAbandoned(NamespaceId id) {
  const NaiveNamespace& ns = namespaces_.at(id);
  const bool has_leases =
      std::ranges::any_of(leases_, [id](const auto& entry) { return entry.second.ns == id; });
  const bool has_transfers = std::ranges::any_of(
      transfers_, [id](const auto& entry) { return entry.second.path.ns == id; });
  if (ns.is_draining && ns.num_handles == 0 && !has_leases && !has_transfers) namespaces_.erase(id);
}

// --- Which pages there are ---------------------------------------------------------------------

std::size_t NaiveCache::NumTokens(std::size_t num_pages) const { return num_pages * page_size_; }

std::size_t NaiveCache::NumPages(std::span<const TokenId> tokens) const {
  return tokens.size() / page_size_;
}

SequenceView NaiveCache::Prefix(const SequenceView& sequence, std::size_t num_pages) const {
  return {sequence.ns, sequence.tokens.first(NumTokens(num_pages))};
}

std::size_t NaiveCache::NumCovered(Tier tier, const SequenceView& sequence) const {
  std::size_t num_pages = 0;
  while (num_pages < NumPages(sequence.tokens) &&
         pages(tier).contains(Prefix(sequence, num_pages + 1))) {
    ++num_pages;
  }
  return num_pages;
}

std::size_t NaiveCache::NumPresent(Tier tier, const SequenceView& sequence) const {
  std::size_t num_pages = 0;
  while (num_pages < NumPages(sequence.tokens)) {
    const auto page = pages(tier).find(Prefix(sequence, num_pages + 1));
    if (page == pages(tier).end() || page->second.is_in_flight) break;
    ++num_pages;
  }
  return num_pages;
}

bool NaiveCache::HasPresentSnapshot(Tier tier, const SequenceView& boundary) const {
  const ResidentMap& snapshots = Residents(kState, tier);
  const auto snapshot = snapshots.find(boundary);
  return snapshot != snapshots.end() && !snapshot->second.is_in_flight;
}

NaiveCache::Match NaiveCache::FindMatch(const SequenceView& sequence, std::size_t max_pages,
                                        MatchIntent intent) const {
  Match match{.device_present = NumPresent(kDevice, sequence),
              .host_present = NumPresent(kHost, sequence),
              .structural = std::max(NumCovered(kDevice, sequence), NumCovered(kHost, sequence))};
  const bool is_switched_off =
      options_.window_layers == WindowLayers::kRingBuffer ||
      (intent == MatchIntent::kPrefixReuse && !options_.enable_prefix_reuse);
  if (is_switched_off) return match;
  match.resumable = std::min(max_pages, std::max(match.device_present, match.host_present));
  if (HasState()) {
    while (match.resumable > 0 && !HasPresentSnapshot(kDevice, Prefix(sequence, match.resumable)) &&
           !HasPresentSnapshot(kHost, Prefix(sequence, match.resumable))) {
      --match.resumable;
    }
  }
  const ResidentMap& device_snapshots = Residents(kState, kDevice);
  const auto snapshot = device_snapshots.find(Prefix(sequence, match.resumable));
  const bool are_pages_in_flight = match.resumable > match.device_present &&
                                   NumCovered(kDevice, sequence) > match.device_present;
  const bool is_snapshot_in_flight =
      snapshot != device_snapshots.end() && snapshot->second.is_in_flight;
  match.is_in_flight = are_pages_in_flight || is_snapshot_in_flight;
  return match;
}

ProbeResult NaiveCache::Probe(NamespaceId id, std::span<const TokenId> tokens,
                              MatchIntent intent) const {
  const Match match = FindMatch({id, tokens}, NumPages(tokens), intent);
  const std::size_t num_host_pages =
      std::max(match.device_present, match.host_present) - match.device_present;
  return {.num_device_tokens = static_cast<std::int32_t>(NumTokens(match.device_present)),
          .num_host_tokens = static_cast<std::int32_t>(NumTokens(num_host_pages)),
          .num_resumable_tokens = static_cast<std::int32_t>(NumTokens(match.resumable)),
          .is_in_flight = match.is_in_flight};
}

// --- Leases ------------------------------------------------------------------------------------

AcquireOutcome NaiveCache::Acquire(int number, NamespaceId id, std::span<const TokenId> tokens,
                                   const AcquireOptions& options) {
  const SequenceView sequence{id, tokens};
  const std::size_t max_pages = static_cast<std::size_t>(options.max_cached_tokens) / page_size_;
  const Match match = FindMatch(sequence, max_pages, options.intent);
  if (match.is_in_flight) return AcquireOutcome::kInFlight;

  //   pages of the lease: [ on the device | loaded from the host | private ]
  //                       0               d                      b         capacity
  const std::size_t b = match.resumable;
  const std::size_t d = std::min(b, match.device_present);
  const auto capacity = static_cast<std::size_t>(options.num_capacity_tokens);
  const std::size_t num_pages = std::max((capacity + page_size_ - 1) / page_size_, b);
  const SequenceView resumed = Prefix(sequence, b);
  const bool loads_snapshot = HasState() && b > 0 && !HasPresentSnapshot(kDevice, resumed);

  NaiveLease lease;
  lease.ns = id;
  const SequenceView on_device = Prefix(sequence, d);
  lease.published.assign(on_device.tokens.begin(), on_device.tokens.end());
  if (HasState() && b > 0) lease.resumed.emplace(resumed.tokens.begin(), resumed.tokens.end());
  leases_[number] = lease;  // protects its prefix and its snapshot while room is made
  const auto num_new_pages = static_cast<std::int64_t>(num_pages - d);
  const std::int64_t num_new_slots = HasState() ? (loads_snapshot ? 2 : 1) : 0;
  if (num_new_pages > NumRoom(kFullAttention, kDevice) ||
      num_new_slots > NumRoom(kState, kDevice)) {
    coverage_.Count("acquire without a slot", num_new_slots > NumRoom(kState, kDevice));
    leases_.erase(number);
    return AcquireOutcome::kNoRoom;
  }
  MakeRoom(kFullAttention, kDevice, num_new_pages);  // first: pages may take snapshots with them
  AddLoadedPages(resumed, d);
  MakeRoom(kState, kDevice, num_new_slots);  // the loaded pages count against the quota already

  NaiveLease& added = leases_.at(number);
  for (std::size_t page = 1; page <= d; ++page) {
    added.pages.emplace_back(pages(kDevice).find(Prefix(sequence, page))->second.id);
  }
  added.is_private.assign(d, false);
  added.published.assign(resumed.tokens.begin(), resumed.tokens.end());
  added.num_cached_tokens = static_cast<std::int32_t>(NumTokens(b));
  added.num_host_cached_tokens = static_cast<std::int32_t>(NumTokens(b - d));
  const std::size_t num_known = std::min(match.structural, max_pages);
  if (HasState() && num_known > b) {
    added.branching_tokens = static_cast<std::int32_t>(NumTokens(num_known));
    coverage_.Count("acquire with a branching point behind the snapshot");
  }
  if (b > d || loads_snapshot) StartLoadBack(number, resumed, d, loads_snapshot);
  if (options.intent == MatchIntent::kPrefixReuse) {
    namespaces_.at(id).num_hit_tokens += added.num_cached_tokens;
    namespaces_.at(id).num_missed_tokens +=
        static_cast<std::int64_t>(tokens.size()) - added.num_cached_tokens;
  }
  coverage_.Count("resume from a device snapshot", HasState() && b > 0 && !loads_snapshot);
  return AcquireOutcome::kAcquired;
}

void NaiveCache::AddLoadedPages(const SequenceView& path, std::size_t first_page) {
  for (std::size_t page = first_page + 1; page <= NumPages(path.tokens); ++page) {
    const auto tokens = Prefix(path, page).tokens;
    Residents(kFullAttention,
              kDevice)[{path.ns, {tokens.begin(), tokens.end()}}] = {.is_in_flight = true};
  }
}

void NaiveCache::StartLoadBack(int number, const SequenceView& path, std::size_t first_page,
                               bool loads_snapshot) {
  const std::size_t end = NumPages(path.tokens);
  NaiveTransfer transfer{.kind = TransferKind::kLoadBack,
                         .path = {path.ns, {path.tokens.begin(), path.tokens.end()}},
                         .first_page = first_page,
                         .boundaries = {}};
  if (loads_snapshot) {
    Residents(kState, kDevice)[transfer.path] = {.is_in_flight = true};
    transfer.boundaries.push_back(end);
  }
  coverage_.Count("load-back of pages", end > first_page);
  coverage_.Count("load-back of a snapshot alone", end == first_page);
  coverage_.Count("load-back of pages and a snapshot", end > first_page && loads_snapshot);
  coverage_.Count("load-back of pages to a device snapshot",
                  HasState() && end > first_page && !loads_snapshot);
  leases_.at(number).load_back = next_transfer_;
  transfers_.emplace(next_transfer_, std::move(transfer));
  ++next_transfer_;
}

bool NaiveCache::Extend(int lease, std::int32_t num_capacity_tokens) {
  const auto capacity = static_cast<std::size_t>(num_capacity_tokens);
  const std::size_t num_pages = (capacity + page_size_ - 1) / page_size_;
  const std::size_t num_pages_now = leases_.at(lease).pages.size();
  if (num_pages <= num_pages_now) return true;
  const auto num_new_pages = static_cast<std::int64_t>(num_pages - num_pages_now);
  if (num_new_pages > NumRoom(kFullAttention, kDevice)) return false;
  MakeRoom(kFullAttention, kDevice, num_new_pages);
  return true;
}

void NaiveCache::Publish(int number, std::span<const TokenId> tokens) {
  NaiveLease& lease = leases_.at(number);
  UnpinResumed(lease);
  if (IsDraining(lease.ns)) {
    DropUnprotected(lease.ns);
    return;
  }
  ResidentMap& device_pages = Residents(kFullAttention, kDevice);
  bool is_worth_a_note = false;
  for (std::size_t page = NumPages(lease.published); page < NumPages(tokens); ++page) {
    const auto prefix = tokens.first(NumTokens(page + 1));
    const SequenceKey key{lease.ns, {prefix.begin(), prefix.end()}};
    const auto twin = device_pages.find(key);
    if (twin == device_pages.end()) {
      coverage_.Count("publish what only the host had", pages(kHost).contains(key));
      device_pages[key] = {.id = lease.pages[page].value()};
      lease.is_private[page] = false;
      is_worth_a_note = true;
      NoteEvent(KVEventKind::kStored, kDevice, key);
    } else if (twin->second.is_in_flight) {
      coverage_.Count("publish stops in front of pages in flight");
      break;
    } else {
      coverage_.Count("publish keeps a duplicate");
    }
    lease.published = key.tokens;
  }
  if (AttachReserved(lease)) is_worth_a_note = true;
  if (is_worth_a_note) NoteForWriteThrough({lease.ns, lease.published});
}

void NaiveCache::NoteForWriteThrough(const SequenceKey& path) {
  if (options_.write_policy != WritePolicy::kWriteThrough) return;
  const auto num_replaced =
      std::erase_if(notes_, [&path](const SequenceKey& note) { return Continues(path, note); });
  coverage_.Count("a note replaces those of its prefixes", num_replaced > 0);
  notes_.push_back(path);
}

void NaiveCache::UnpinResumed(NaiveLease& lease) {
  if (!lease.resumed) return;
  ++clock_;
  for (const Tier tier : kTiers) {
    ResidentMap& snapshots = Residents(kState, tier);
    const auto snapshot = snapshots.find(SequenceView{lease.ns, *lease.resumed});
    if (snapshot != snapshots.end()) snapshot->second.last_use = clock_;
  }
  lease.resumed.reset();
}

bool NaiveCache::AttachReserved(NaiveLease& lease) {
  if (lease.reserved_slot == kNoStateSlot) return false;
  if (lease.reserved_page > NumPages(lease.published)) return false;
  const StateSlot slot = std::exchange(lease.reserved_slot, kNoStateSlot);
  ResidentMap& snapshots = Residents(kState, kDevice);
  const SequenceView published{lease.ns, lease.published};
  const SequenceView boundary = Prefix(published, lease.reserved_page);
  if (snapshots.contains(boundary)) {
    coverage_.Count("a reserved slot is not needed");
    return false;
  }
  ++clock_;
  snapshots[{lease.ns, {boundary.tokens.begin(), boundary.tokens.end()}}] = {.id = slot.value(),
                                                                             .last_use = clock_};
  coverage_.Count("attach a snapshot");
  lease.attached_pages.push_back(lease.reserved_page);
  if (lease.attached_pages.size() <= static_cast<std::size_t>(options_.max_snapshots_per_lease)) {
    return true;
  }
  const auto oldest = snapshots.find(Prefix(published, lease.attached_pages.front()));
  lease.attached_pages.erase(lease.attached_pages.begin());
  if (oldest != snapshots.end() && !oldest->second.is_in_flight &&
      !IsSnapshotProtected(kDevice, oldest->first)) {
    snapshots.erase(oldest);
    coverage_.Count("a lease drops its oldest snapshot");
  }
  return true;
}

bool NaiveCache::ReserveSnapshot(int number, std::int32_t num_tokens) {
  NaiveLease& lease = leases_.at(number);
  const std::size_t boundary = static_cast<std::size_t>(num_tokens) / page_size_;
  if (!HasState() || lease.reserved_slot != kNoStateSlot || IsDraining(lease.ns)) return false;
  if (boundary == NumPages(lease.published) &&
      Residents(kState, kDevice).contains(SequenceView{lease.ns, lease.published})) {
    coverage_.Count("no reservation where there is a snapshot");
    return false;
  }
  if (NumRoom(kState, kDevice) < 1) {
    coverage_.Count("no reservation without a slot");
    return false;
  }
  MakeRoom(kState, kDevice, 1);
  lease.reserved_page = boundary;
  return true;
}

void NaiveCache::EndLease(int number) {
  UnpinResumed(leases_.at(number));
  const NaiveLease ended = leases_.at(number);
  ++clock_;
  for (const Tier tier : kTiers) Touch(tier, {ended.ns, ended.published});
  leases_.erase(number);
  coverage_.Count("lease ends while loading", ended.load_back.has_value());
  coverage_.Count("lease ends with a reservation", ended.reserved_slot != kNoStateSlot);
  if (IsDraining(ended.ns)) DropUnprotected(ended.ns);
  DestroyIfAbandoned(ended.ns);
  coverage_.Count("namespace ends with a lease", !HasNamespace(ended.ns));
}

// --- Statistics --------------------------------------------------------------------------------

std::int64_t NaiveCache::NumAvailablePages() const { return NumRoom(kFullAttention, kDevice); }

CacheStats NaiveCache::Stats() const {
  CacheStats stats{.num_device_pages = options_.num_device_pages,
                   .num_free_pages = NumFree(kFullAttention, kDevice),
                   .num_tree_pages = static_cast<std::int64_t>(pages(kDevice).size()),
                   .num_evicted_pages = num_evicted_pages_[IndexOf(kDevice)],
                   .num_host_pages = options_.num_host_pages,
                   .num_free_host_pages = NumFree(kFullAttention, kHost),
                   .num_evicted_host_pages = num_evicted_pages_[IndexOf(kHost)],
                   .num_device_state_slots = options_.num_device_state_slots,
                   .num_free_device_state_slots = NumFree(kState, kDevice),
                   .num_host_state_slots = options_.num_host_state_slots,
                   .num_free_host_state_slots = NumFree(kState, kHost),
                   .num_transfers = static_cast<std::int64_t>(transfers_.size()),
                   .num_pages_being_written_back = NumPagesBeingWrittenBack()};
  stats.num_private_pages = stats.num_device_pages - stats.num_free_pages - stats.num_tree_pages;
  return stats;
}

std::vector<NamespaceStats> NaiveCache::NamespaceStatsList() const {
  std::map<NamespaceId, NamespaceStats> by_id;
  for (const auto& [id, ns] : namespaces_) {
    by_id[id] = {.id = id,
                 .is_draining = ns.is_draining,
                 .num_handles = ns.num_handles,
                 .num_hit_tokens = ns.num_hit_tokens,
                 .num_missed_tokens = ns.num_missed_tokens,
                 .num_evicted_device_pages = ns.num_evicted_pages[IndexOf(kDevice)],
                 .num_evicted_host_pages = ns.num_evicted_pages[IndexOf(kHost)]};
  }
  for (const auto& [key, page] : pages(kDevice)) ++by_id.at(key.ns).num_tree_pages;
  for (const auto& [key, page] : pages(kHost)) ++by_id.at(key.ns).num_host_pages;
  for (const auto& [key, slot] : Residents(kState, kDevice))
    ++by_id.at(key.ns).num_device_snapshots;
  for (const auto& [key, slot] : Residents(kState, kHost)) ++by_id.at(key.ns).num_host_snapshots;
  for (const auto& [number, transfer] : transfers_) ++by_id.at(transfer.path.ns).num_transfers;
  for (const auto& [number, lease] : leases_) {
    NamespaceStats& stats = by_id.at(lease.ns);
    ++stats.num_leases;
    stats.num_private_pages += std::ranges::count(lease.is_private, true);
  }
  std::vector<NamespaceStats> list;
  for (const auto& [id, stats] : by_id) list.push_back(stats);
  return list;
}

}  // namespace lora_serve
