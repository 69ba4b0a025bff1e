#include <algorithm>
#include <numeric>
#include <sstream>

#include "naive_cache.h"

// The transfers of NaiveCache, and what it learns of the ids that the real cache chose.

namespace lora_serve {

using enum Component;
using enum Tier;

// --- Write-backs -------------------------------------------------------------------------------

bool NaiveCache::IsBlocked(const SequenceView& path) const {
  return NumCovered(kHost, path) > NumPresent(kHost, path);
}

NaiveCache::WriteBackTry NaiveCache::TryWriteBack(const SequenceKey& path, bool spares_victims) {
  if (options_.num_host_pages == 0 || IsDraining(path.ns) || IsBlocked(path)) return {};
  // It is entered before it is known what it copies: the room must not come from the path itself,
  // neither its pages nor its snapshots.
  NaiveTransfer& transfer = transfers_[next_transfer_];
  transfer = {.kind = TransferKind::kWriteBack,
              .path = path,
              .first_page = NumCovered(kHost, path),
              .boundaries = std::vector<std::size_t>(NumPages(path.tokens))};
  std::iota(transfer.boundaries.begin(), transfer.boundaries.end(), 1);

  const auto num_wanted = static_cast<std::int64_t>(NumPages(path.tokens) - transfer.first_page);
  while (NumFree(kFullAttention, kHost) < num_wanted &&
         EvictOne(kFullAttention, kHost, spares_victims)) {
  }
  const std::int64_t num_pages = std::min(num_wanted, NumFree(kFullAttention, kHost));
  const std::size_t end = transfer.first_page + static_cast<std::size_t>(num_pages);
  std::vector<std::size_t> boundaries;
  for (std::size_t page = 1; page <= end; ++page) {
    const SequenceView boundary = Prefix(path, page);
    if (HasPresentSnapshot(kDevice, boundary) && !Residents(kState, kHost).contains(boundary)) {
      boundaries.push_back(page);
    }
  }
  const std::size_t num_snapshots =
      std::min(boundaries.size(), static_cast<std::size_t>(NumRoom(kState, kHost)));
  MakeRoom(kState, kHost, static_cast<std::int64_t>(num_snapshots));
  const bool has_work = num_wanted > 0 || !boundaries.empty();
  coverage_.Count("write-back cut by lack of room", 0 < num_pages && num_pages < num_wanted);
  coverage_.Count("write-back without a slot", num_snapshots < boundaries.size());
  boundaries.resize(num_snapshots);
  if (num_pages == 0 && num_snapshots == 0) {
    transfers_.erase(next_transfer_);
    coverage_.Count("write-back without room", has_work);
    return {.is_started = false, .lacks_room = has_work};
  }
  transfer.path.tokens.resize(NumTokens(end));
  transfer.boundaries = boundaries;
  ++next_transfer_;
  for (std::size_t page = transfer.first_page + 1; page <= end; ++page) {
    const auto tokens = Prefix(path, page).tokens;
    Residents(kFullAttention,
              kHost)[{path.ns, {tokens.begin(), tokens.end()}}] = {.is_in_flight = true};
  }
  for (const std::size_t page : boundaries) {
    const auto tokens = Prefix(path, page).tokens;
    Residents(kState, kHost)[{path.ns, {tokens.begin(), tokens.end()}}] = {.is_in_flight = true};
  }
  coverage_.Count("write-back of pages", num_pages > 0);
  coverage_.Count("write-back of snapshots", num_snapshots > 0);
  coverage_.Count("write-back of snapshots alone", num_pages == 0);
  return {.is_started = true, .lacks_room = false};
}

bool NaiveCache::StartWriteBack(int number) {
  const NaiveLease& lease = leases_.at(number);
  if (lease.load_back) return false;
  return TryWriteBack({lease.ns, lease.published}).is_started;
}

void NaiveCache::PlanWriteBacks() {
  if (options_.num_host_pages == 0) return;
  if (options_.write_policy == WritePolicy::kWriteThrough) WriteBackNotes();
  if (options_.write_policy == WritePolicy::kWriteBack) WriteBackAhead();
}

void NaiveCache::WriteBackNotes() {
  const std::vector<SequenceKey> tried = std::exchange(notes_, {});
  for (const SequenceKey& note : tried) {
    if (IsBlocked(note)) {
      coverage_.Count("a note waits for a transfer");
      notes_.push_back(note);
    } else {
      coverage_.Count("write-back of a note", TryWriteBack(note).is_started);
    }
  }
}

void NaiveCache::WriteBackAhead() {
  std::int64_t credit = NumFree(kFullAttention, kDevice) + NumPagesBeingWrittenBack();
  const std::int64_t watermark = options_.write_back_watermark_pages;
  const std::map<NamespaceId, bool> is_over_quota = FindNamespacesOverQuota(kDevice);
  std::vector<std::pair<EvictionRank, SequenceKey>> leaves;
  for (auto it = pages(kDevice).begin(); it != pages(kDevice).end(); ++it) {
    if (!IsEvictable(kFullAttention, kDevice, it)) continue;
    leaves.emplace_back(RankOf(kFullAttention, kDevice, is_over_quota.at(it->first.ns), *it),
                        it->first);
  }
  std::ranges::sort(leaves, {}, [](const auto& leaf) { return leaf.first; });

  std::vector<SequenceKey> chosen;
  for (const auto& [rank, leaf] : leaves) {
    if (credit >= watermark) break;
    if (!rank.is_only_copy) {
      credit += NumPagesInRun(leaf);
      coverage_.Count("a leaf on the host counts as room");
    } else if (IsBlocked(leaf)) {
      coverage_.Count("a leaf waits for a transfer");
    } else {
      credit += static_cast<std::int64_t>(NumPages(leaf.tokens) - NumCovered(kHost, leaf));
      chosen.push_back(leaf);
    }
  }
  for (const SequenceKey& leaf : chosen) {
    coverage_.Count("a chosen leaf shares pages with another", IsBlocked(leaf));
    const WriteBackTry result = TryWriteBack(leaf, /*spares_victims=*/true);
    coverage_.Count("write-back of a leaf", result.is_started);
    if (result.lacks_room) break;
  }
}

/// Pages that eviction could take one after the other, from `leaf` up to where the path is
/// protected or branches.
std::int64_t NaiveCache::NumPagesInRun(const SequenceKey& leaf) const {
  std::int64_t num_pages = 1;
  for (std::size_t end = NumPages(leaf.tokens) - 1; end > 0; --end) {
    const SequenceView view = Prefix(leaf, end);
    const SequenceKey page{view.ns, {view.tokens.begin(), view.tokens.end()}};
    const auto num_next = std::ranges::count_if(pages(kDevice), [&](const auto& entry) {
      return entry.first.tokens.size() == NumTokens(end + 1) && Continues(entry.first, page);
    });
    if (num_next > 1 || IsPageProtected(kDevice, page)) break;
    ++num_pages;
  }
  return num_pages;
}

std::int64_t NaiveCache::NumPagesBeingWrittenBack() const {
  std::int64_t num_pages = 0;
  for (const auto& [number, transfer] : transfers_) {
    if (transfer.kind != TransferKind::kWriteBack) continue;
    num_pages += static_cast<std::int64_t>(NumPages(transfer.path.tokens) - transfer.first_page);
  }
  return num_pages;
}

// --- How transfers end -------------------------------------------------------------------------

void NaiveCache::CompleteTransfer(std::int64_t number) {
  const NaiveTransfer done = transfers_.at(number);
  const Tier destination = done.kind == TransferKind::kWriteBack ? kHost : kDevice;
  transfers_.erase(number);
  ++clock_;
  const bool copied_pages = NumPages(done.path.tokens) > done.first_page;
  if (copied_pages) Touch(destination, done.path);
  for (std::size_t page = done.first_page + 1; page <= NumPages(done.path.tokens); ++page) {
    const SequenceView key = Prefix(done.path, page);
    Residents(kFullAttention, destination).find(key)->second.is_in_flight = false;
    NoteEvent(KVEventKind::kStored, destination, key);
  }
  for (const std::size_t boundary : done.boundaries) {
    Resident& snapshot = Residents(kState, destination).find(Prefix(done.path, boundary))->second;
    snapshot.is_in_flight = false;
    snapshot.last_use = ++clock_;
  }
  bool has_lease = false;
  for (auto& [lease_number, lease] : leases_) {
    if (lease.load_back != number) continue;
    has_lease = true;
    lease.load_back.reset();
  }
  coverage_.Count(done.kind == TransferKind::kWriteBack ? "complete a write-back"
                  : has_lease                           ? "complete a load-back"
                                                        : "complete a load-back without its lease");
  TransferEnded(done.path.ns);
}

void NaiveCache::FailTransfer(std::int64_t number) {
  const NaiveTransfer failed = transfers_.at(number);
  transfers_.erase(number);
  if (failed.kind == TransferKind::kLoadBack) {
    EndFailedLoadBack(number, failed);
  } else {
    coverage_.Count("fail a write-back");
    for (std::size_t page = failed.first_page + 1; page <= NumPages(failed.path.tokens); ++page) {
      const auto copy = Residents(kFullAttention, kHost).find(Prefix(failed.path, page));
      Residents(kFullAttention, kHost).erase(copy);
    }
    for (const std::size_t boundary : failed.boundaries) {
      const auto copy = Residents(kState, kHost).find(Prefix(failed.path, boundary));
      Residents(kState, kHost).erase(copy);
    }
  }
  TransferEnded(failed.path.ns);
}

void NaiveCache::EndFailedLoadBack(std::int64_t number, const NaiveTransfer& failed) {
  bool has_lease = false;
  for (auto& [lease_number, lease] : leases_) {
    if (lease.load_back != number) continue;
    has_lease = true;
    const std::size_t num_kept = HasState() ? 0 : failed.first_page;
    lease.published.resize(NumTokens(num_kept));
    lease.pages.resize(num_kept);
    lease.is_private.resize(num_kept);
    lease.num_cached_tokens = static_cast<std::int32_t>(NumTokens(num_kept));
    lease.num_host_cached_tokens = 0;
    lease.load_back.reset();
    lease.resumed.reset();
  }
  coverage_.Count(has_lease ? "fail a load-back" : "fail a load-back without its lease");
  const std::size_t end = NumPages(failed.path.tokens);
  for (std::size_t page = end; page > failed.first_page; --page) {
    const SequenceView key = Prefix(failed.path, page);
    DropPage(kDevice, {key.ns, {key.tokens.begin(), key.tokens.end()}});
  }
  if (end == failed.first_page) {  // the pages are on the device, only the snapshot is lost
    for (const Tier tier : kTiers) Residents(kState, tier).erase(failed.path);
    return;
  }
  const SequenceView first_lost = Prefix(failed.path, failed.first_page + 1);
  std::vector<SequenceKey> lost;
  for (const auto& [key, page] : pages(kHost)) {
    if (Continues(key, first_lost)) lost.push_back(key);
  }
  coverage_.Count("a failed load-back drops what continues it",
                  lost.size() > end - failed.first_page);
  for (const SequenceKey& key : lost) DropPage(kHost, key);
}

void NaiveCache::TransferEnded(NamespaceId id) {
  coverage_.Count("a transfer ends in a draining namespace", IsDraining(id));
  if (IsDraining(id)) DropUnprotected(id);
  DestroyIfAbandoned(id);
  coverage_.Count("namespace ends with a transfer", !HasNamespace(id));
}

// --- Which ids the real cache chose ------------------------------------------------------------

StateSlot NaiveCache::ResumedSlot(int number) const {
  const NaiveLease& lease = leases_.at(number);
  if (!lease.resumed) return kNoStateSlot;
  return StateSlot(
      Residents(kState, kDevice).find(SequenceView{lease.ns, *lease.resumed})->second.id);
}

TransferOrder NaiveCache::OrderOf(std::int64_t number) const {
  const NaiveTransfer& transfer = transfers_.at(number);
  const bool is_write_back = transfer.kind == TransferKind::kWriteBack;
  const Tier source = is_write_back ? kDevice : kHost;
  const Tier destination = is_write_back ? kHost : kDevice;
  const auto id_of = [&](Component component, Tier tier, std::size_t num_pages) {
    return Residents(component, tier).find(Prefix(transfer.path, num_pages))->second.id;
  };
  TransferOrder order{.id = TransferId(number),
                      .kind = transfer.kind,
                      .namespace_id = transfer.path.ns,
                      .pages = {},
                      .states = {}};
  for (std::size_t page = transfer.first_page + 1; page <= NumPages(transfer.path.tokens); ++page) {
    order.pages.push_back({PageId(id_of(kFullAttention, source, page)),
                           PageId(id_of(kFullAttention, destination, page))});
  }
  for (const std::size_t boundary : transfer.boundaries) {
    order.states.push_back({StateSlot(id_of(kState, source, boundary)),
                            StateSlot(id_of(kState, destination, boundary))});
  }
  return order;
}

void NaiveCache::LearnPages(int number, std::span<const PageId> all_pages) {
  NaiveLease& lease = leases_.at(number);
  for (std::size_t index = lease.pages.size(); index < all_pages.size(); ++index) {
    const bool is_loaded = index < NumPages(lease.published);
    lease.pages.push_back(all_pages[index]);
    lease.is_private.push_back(!is_loaded);
    if (!is_loaded) continue;
    const SequenceView key = Prefix({lease.ns, lease.published}, index + 1);
    Residents(kFullAttention, kDevice).find(key)->second.id = all_pages[index].value();
  }
}

void NaiveCache::LearnSlots(int number, StateSlot working_slot, StateSlot resumed_slot) {
  NaiveLease& lease = leases_.at(number);
  lease.working_slot = working_slot;
  if (!lease.load_back || !lease.resumed) return;
  Resident& snapshot =
      Residents(kState, kDevice).find(SequenceView{lease.ns, *lease.resumed})->second;
  if (snapshot.is_in_flight) snapshot.id = resumed_slot.value();
}

void NaiveCache::LearnDestinations(std::int64_t number, const TransferOrder& order) {
  const NaiveTransfer& transfer = transfers_.at(number);
  const Tier destination = transfer.kind == TransferKind::kWriteBack ? kHost : kDevice;
  for (std::size_t index = 0; index < order.pages.size(); ++index) {
    const SequenceView key = Prefix(transfer.path, transfer.first_page + index + 1);
    Residents(kFullAttention, destination).find(key)->second.id =
        order.pages[index].destination.value();
  }
  for (std::size_t index = 0; index < order.states.size(); ++index) {
    const SequenceView key = Prefix(transfer.path, transfer.boundaries[index]);
    Residents(kState, destination).find(key)->second.id = order.states[index].destination.value();
  }
}

std::string NaiveCache::FindIdTrouble() const {
  for (const Component component : kComponents) {
    for (const Tier tier : kTiers) {
      std::vector<std::int32_t> ids;
      for (const auto& [key, resident] : Residents(component, tier)) {
        if (resident.id != Resident::kUnknown) ids.push_back(resident.id);
      }
      for (const auto& [number, lease] : leases_) {
        if (tier == kHost) break;
        if (component == kState) {
          for (const StateSlot slot : {lease.working_slot, lease.reserved_slot}) {
            if (slot != kNoStateSlot) ids.push_back(slot.value());
          }
          continue;
        }
        for (std::size_t page = 0; page < lease.pages.size(); ++page) {
          if (lease.is_private[page]) ids.push_back(lease.pages[page].value());
        }
      }
      std::ranges::sort(ids);
      const std::int32_t num_ids =
          component == kState
              ? (tier == kHost ? options_.num_host_state_slots : options_.num_device_state_slots)
              : (tier == kHost ? options_.num_host_pages : options_.num_device_pages);
      const auto twice = std::ranges::adjacent_find(ids);
      const bool is_out_of_range = !ids.empty() && (ids.front() < 0 || ids.back() >= num_ids);
      if (twice == ids.end() && !is_out_of_range) continue;
      std::ostringstream os;
      os << (component == kState ? "state slot " : "page ")
         << (is_out_of_range ? ids.back() : *twice) << " of the "
         << (tier == kHost ? "host" : "device")
         << (is_out_of_range ? " does not exist" : " has two owners");
      return os.str();
    }
  }
  return "";
}

}  // namespace lora_serve
