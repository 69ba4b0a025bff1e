#include <algorithm>

#include "naive_cache.h"

// What NaiveCache protects, who goes first, and what a page takes with it.

namespace lora_serve {

using enum Component;
using enum Tier;

namespace {

std::uint64_t Mix(std::uint64_t value) {
  const std::uint64_t mixed = (value + 0x9e3779b97f4a7c15u) * 0xbf58476d1ce4e5b9u;
  return mixed ^ (mixed >> 32);
}

}  // namespace

// --- Protection --------------------------------------------------------------------------------

bool NaiveCache::IsPageProtected(Tier tier, const SequenceKey& page) const {
  const bool is_leased = std::ranges::any_of(leases_, [&page](const auto& entry) {
    return Continues(SequenceView{entry.second.ns, entry.second.published}, page);
  });
  if (tier == kDevice && is_leased) return true;
  return std::ranges::any_of(transfers_, [&](const auto& entry) {
    const NaiveTransfer& transfer = entry.second;
    const bool copies_pages = NumPages(transfer.path.tokens) > transfer.first_page;
    return (tier == kDevice || copies_pages) && Continues(transfer.path, page);
  });
}

bool NaiveCache::IsSnapshotProtected(Tier tier, const SequenceKey& boundary) const {
  const bool is_resumed = std::ranges::any_of(leases_, [&](const auto& entry) {
    return entry.second.ns == boundary.ns && entry.second.resumed == boundary.tokens;
  });
  if (tier == kDevice && is_resumed) return true;
  return std::ranges::any_of(transfers_, [&](const auto& entry) {
    return Continues(entry.second.path, boundary) &&
           std::ranges::count(entry.second.boundaries, NumPages(boundary.tokens)) > 0;
  });
}

bool NaiveCache::IsEvictable(Component component, Tier tier,
                             ResidentMap::const_iterator resident) const {
  if (component == kState) {
    return !resident->second.is_in_flight && !IsSnapshotProtected(tier, resident->first);
  }
  const auto next = std::next(resident);  // what continues a page comes right after it
  const bool is_continued = next != pages(tier).end() && Continues(next->first, resident->first);
  return !is_continued && !IsPageProtected(tier, resident->first);
}

// --- Room --------------------------------------------------------------------------------------

std::int64_t NaiveCache::NumFree(Component component, Tier tier) const {
  const auto num_resident = static_cast<std::int64_t>(Residents(component, tier).size());
  if (tier == kHost) {
    return (component == kState ? options_.num_host_state_slots : options_.num_host_pages) -
           num_resident;
  }
  std::int64_t num_of_leases = 0;
  for (const auto& [number, lease] : leases_) {
    if (component == kFullAttention) {
      num_of_leases += std::ranges::count(lease.is_private, true);
    } else {
      num_of_leases += lease.working_slot != kNoStateSlot ? 1 : 0;
      num_of_leases += lease.reserved_slot != kNoStateSlot ? 1 : 0;
    }
  }
  return (component == kState ? options_.num_device_state_slots : options_.num_device_pages) -
         num_resident - num_of_leases;
}

/// Free ones, and those that eviction could free one after the other.
std::int64_t NaiveCache::NumRoom(Component component, Tier tier) const {
  const ResidentMap& residents = Residents(component, tier);
  std::int64_t num_room = NumFree(component, tier);
  for (auto it = residents.begin(); it != residents.end(); ++it) {
    const bool can_go = component == kFullAttention ? !IsPageProtected(tier, it->first)
                                                    : IsEvictable(component, tier, it);
    num_room += can_go ? 1 : 0;
  }
  return num_room;
}

void NaiveCache::MakeRoom(Component component, Tier tier, std::int64_t num_wanted) {
  while (NumFree(component, tier) < num_wanted && EvictOne(component, tier)) {
  }
}

std::int64_t NaiveCache::Evict(Tier tier, std::int64_t num_pages) {
  std::int64_t num_evicted = 0;
  while (num_evicted < num_pages && EvictOne(kFullAttention, tier)) ++num_evicted;
  return num_evicted;
}

// --- Who goes first ----------------------------------------------------------------------------

std::map<NamespaceId, bool> NaiveCache::FindNamespacesOverQuota(Tier tier) const {
  std::map<NamespaceId, std::int64_t> num_pages;
  for (const auto& [key, page] : pages(tier)) ++num_pages[key.ns];
  std::map<NamespaceId, bool> is_over_quota;
  for (const auto& [id, ns] : namespaces_) {
    const std::optional<std::int64_t> quota = ns.quota_pages[IndexOf(tier)];
    is_over_quota[id] = quota.has_value() && num_pages[id] > *quota;
  }
  return is_over_quota;
}

NaiveCache::EvictionRank NaiveCache::RankOf(Component component, Tier tier, bool is_over_quota,
                                            const ResidentMap::value_type& resident) const {
  constexpr std::int64_t kAgeBucket = 64;
  const auto& [key, held] = resident;
  bool is_backed = false;
  if (tier == kDevice) {
    const ResidentMap& on_host = Residents(component, kHost);
    const auto copy = on_host.find(key);
    is_backed = copy != on_host.end() && !copy->second.is_in_flight;
  }
  return {.is_within_quota = !is_over_quota,
          .age_bucket = held.last_use / kAgeBucket,
          .is_adapter_resident = namespaces_.at(key.ns).is_adapter_resident,
          .is_only_copy = !is_backed,
          .last_use = held.last_use};
}

bool NaiveCache::EvictOne(Component component, Tier tier, bool spares_victims) {
  ResidentMap& residents = Residents(component, tier);
  const std::map<NamespaceId, bool> is_over_quota = FindNamespacesOverQuota(tier);
  auto victim = residents.end();
  EvictionRank victim_rank;
  for (auto it = residents.begin(); it != residents.end(); ++it) {
    if (!IsEvictable(component, tier, it)) continue;
    const EvictionRank rank = RankOf(component, tier, is_over_quota.at(it->first.ns), *it);
    if (victim != residents.end() && rank > victim_rank) continue;
    victim = it;
    victim_rank = rank;
  }
  if (victim == residents.end()) return false;
  const bool is_device_victim =
      pages(kDevice).contains(victim->first) && !IsPageProtected(kDevice, victim->first);
  if (spares_victims && is_device_victim) {
    coverage_.Count("a copy of what the device could evict keeps its place");
    return false;
  }
  coverage_.Count("evict over quota", !victim_rank.is_within_quota);
  coverage_.Count("evict of an adapter that is not resident", !victim_rank.is_adapter_resident);
  coverage_.Count("evict what the host has too", !victim_rank.is_only_copy);
  if (component == kState) {
    coverage_.Count(tier == kDevice ? "evict a device snapshot" : "evict a host snapshot");
    residents.erase(victim);
    return true;
  }
  coverage_.Count(tier == kDevice ? "evict a device page" : "evict a host page");
  ++num_evicted_pages_[IndexOf(tier)];
  ++namespaces_.at(victim->first.ns).num_evicted_pages[IndexOf(tier)];
  DropPage(tier, SequenceKey(victim->first));
  return true;
}

// --- Going -------------------------------------------------------------------------------------

void NaiveCache::DropPage(Tier tier, const SequenceKey& page) {
  ResidentMap& residents = Residents(kFullAttention, tier);
  const auto dropped = residents.find(page);
  if (!dropped->second.is_in_flight) NoteEvent(KVEventKind::kRemoved, tier, page);
  residents.erase(dropped);
  if (tier == kDevice) {
    const auto num_forgotten =
        std::erase_if(notes_, [&page](const SequenceKey& note) { return Continues(note, page); });
    coverage_.Count("a note is forgotten with a page", num_forgotten > 0);
  }
  const bool has_copy =
      std::ranges::any_of(kTiers, [&](Tier any) { return pages(any).contains(page); });
  if (has_copy) {
    coverage_.Count("a snapshot stays where its page goes",
                    Residents(kState, tier).contains(page) &&
                        !Residents(kState, tier == kDevice ? kHost : kDevice).contains(page));
    return;
  }
  for (const Tier any : kTiers) {
    coverage_.Count("a page takes its snapshot with it", Residents(kState, any).erase(page) > 0);
  }
}

void NaiveCache::DropUnprotected(NamespaceId id) {
  for (const Tier tier : kTiers) {
    std::vector<SequenceKey> dropped;
    for (const auto& [key, page] : pages(tier)) {
      if (key.ns == id && !IsPageProtected(tier, key)) dropped.push_back(key);
    }
    for (const SequenceKey& key : dropped) DropPage(tier, key);
    std::erase_if(Residents(kState, tier), [&](const auto& entry) {
      return entry.first.ns == id && !entry.second.is_in_flight &&
             !IsSnapshotProtected(tier, entry.first);
    });
  }
}

void NaiveCache::Touch(Tier tier, const SequenceView& path) {
  ResidentMap& residents = Residents(kFullAttention, tier);
  for (std::size_t page = 1; page <= NumPages(path.tokens); ++page) {
    const auto touched = residents.find(Prefix(path, page));
    if (touched != residents.end()) touched->second.last_use = clock_;
  }
}

// --- Events ------------------------------------------------------------------------------------

void NaiveCache::NoteEvent(KVEventKind kind, Tier tier, const SequenceView& page) {
  const NaiveNamespace& ns = namespaces_.at(page.ns);
  if (!is_events_enabled_ || ns.is_draining) return;
  coverage_.Count(kind == KVEventKind::kStored ? "tell a stored page" : "tell a removed page");
  std::optional<std::uint64_t> parent;
  std::uint64_t hash = Mix(ns.digest_seed);
  for (std::size_t index = 0; index < page.tokens.size(); ++index) {
    const bool is_new_page = index > 0 && index % page_size_ == 0;
    if (is_new_page) parent = hash;
    hash = Mix(hash ^ static_cast<std::uint32_t>(page.tokens[index]));
  }
  const auto own = page.tokens.last(page_size_);
  events_.push_back(
      {.kind = kind,
       .tier = tier,
       .ns = page.ns,
       .parent_hash = parent,
       .hash = hash,
       .tokens = kind == KVEventKind::kStored ? Tokens(own.begin(), own.end()) : Tokens()});
}

void NaiveCache::SetEventsEnabled(bool is_enabled) {
  if (is_enabled == is_events_enabled_) return;
  is_events_enabled_ = is_enabled;
  events_.clear();
  for (const Tier tier : kTiers) {
    for (const auto& [key, page] : pages(tier)) {
      if (!page.is_in_flight) NoteEvent(KVEventKind::kStored, tier, key);
    }
  }
}

}  // namespace lora_serve
