#include "scheduler/adapter_table.h"

#include <algorithm>
#include <set>
#include <string>
#include <utility>

#include "common/check.h"

namespace lora_serve {
namespace {

std::string Subject(AdapterId id) { return "adapter " + std::to_string(id.value()); }

std::int64_t* CountOf(Adapter& adapter, RequestList list) {
  switch (list) {
    case RequestList::kNone:
      return nullptr;
    case RequestList::kQueued:
      return &adapter.num_queued_requests;
    case RequestList::kPreempted:
      return &adapter.num_preempted_requests;
    case RequestList::kRunning:
      return &adapter.num_running_requests;
  }
  LS_CHECK(false, "list ", static_cast<int>(list));
  return nullptr;
}

}  // namespace

AdapterTable::AdapterTable(KVPrefixCache* cache, std::int32_t max_loras)
    : cache_backptr_(cache), max_loras_(max_loras) {
  Adapter base;
  base.id = kBaseAdapter;
  base.namespace_id = kBaseNamespace;
  base.load_state = LoadState::kResident;
  adapters_.emplace(kBaseAdapter, base);
  used_ids_.insert(kBaseAdapter);
}

void AdapterTable::Open(AdapterId id, const AdapterOptions& options) {
  if (id <= kBaseAdapter) {
    throw InvalidArgumentError(Subject(id) +
                               " cannot be opened: ids of adapters are 1 or higher, " +
                               std::to_string(kBaseAdapter.value()) + " is the base model");
  }
  if (options.size_bytes < 0) {
    throw InvalidArgumentError(Subject(id) + " has size_bytes " +
                               std::to_string(options.size_bytes) + "; expected 0 or more");
  }
  if (used_ids_.contains(id)) {
    throw InvalidArgumentError(
        Subject(id) +
        " was opened before; every generation needs an id of its own, also after "
        "it was drained");
  }
  Adapter adapter;
  adapter.id = id;
  adapter.options = options;
  NamespaceOptions namespace_options;
  namespace_options.digest_seed = options.digest_seed;
  adapter.namespace_id = cache_backptr_->OpenNamespace(namespace_options);
  cache_backptr_->SetAdapterResident(adapter.namespace_id, false);
  adapters_.emplace(id, adapter);
  used_ids_.insert(id);
  registered_.push_back(id);
}

void AdapterTable::Drain(AdapterId id) {
  const auto it = adapters_.find(id);
  if (it == adapters_.end()) {
    throw AdapterNotFoundError(Subject(id) + " cannot be drained: it is not open");
  }
  Adapter& adapter = it->second;
  if (adapter.IsBase()) {
    throw AdapterNotFoundError(
        "adapter 0 cannot be drained: it is the base model, which is permanent");
  }
  if (adapter.is_draining) return;
  cache_backptr_->DrainNamespace(adapter.namespace_id);
  adapter.is_draining = true;
  CompleteDrainIfUnused(adapter);
}

Adapter& AdapterTable::GetOpen(AdapterId id) {
  const auto it = adapters_.find(id);
  if (it == adapters_.end()) {
    throw AdapterNotFoundError(Subject(id) + " is not open; open it before its first request");
  }
  if (it->second.is_draining) {
    throw AdapterNotFoundError(Subject(id) + " is draining and takes no new requests");
  }
  if (it->second.load_state == LoadState::kFailed) {
    throw AdapterNotFoundError(
        Subject(id) +
        " could not be loaded and takes no requests; drain it and open a new generation");
  }
  return it->second;
}

Adapter& AdapterTable::Get(AdapterId id) {
  const auto it = adapters_.find(id);
  LS_CHECK(it != adapters_.end(), "adapter ", id, " is not in the table");
  return it->second;
}

std::vector<AdapterId> AdapterTable::TakeDrained() { return std::exchange(drained_, {}); }

std::vector<const Adapter*> AdapterTable::TakeLoads() {
  std::vector<const Adapter*> loads;
  for (const AdapterId id : std::exchange(registered_, {})) {
    Adapter& adapter = Get(id);
    adapter.slot = TakeLowestFreeSlot();
    adapter.load_state = LoadState::kLoading;
    loads.push_back(&adapter);
  }
  return loads;
}

AdapterSlot AdapterTable::TakeLowestFreeSlot() {
  const auto it = std::find(slot_is_taken_.begin(), slot_is_taken_.end(), false);
  const auto slot = static_cast<std::int32_t>(it - slot_is_taken_.begin());
  if (it == slot_is_taken_.end()) {
    slot_is_taken_.push_back(true);
  } else {
    *it = true;
  }
  return AdapterSlot(slot);
}

void AdapterTable::OnLoaded(AdapterId id) { FinishLoad(id, LoadState::kResident); }

void AdapterTable::OnFailed(AdapterId id) { FinishLoad(id, LoadState::kFailed); }

void AdapterTable::FinishLoad(AdapterId id, LoadState outcome) {
  Adapter& adapter = Get(id);
  LS_CHECK(adapter.load_state == LoadState::kLoading, "adapter ", id, " was not loading");
  adapter.load_state = outcome;
  if (outcome == LoadState::kResident && cache_backptr_->HasNamespace(adapter.namespace_id)) {
    cache_backptr_->SetAdapterResident(adapter.namespace_id, true);
  }
  CompleteDrainIfUnused(adapter);
}

void AdapterTable::OnCopiesEnded() {
  // A copy: the ones that complete leave the set.
  const std::vector<AdapterId> waiting(waiting_for_copies_.begin(), waiting_for_copies_.end());
  for (const AdapterId id : waiting) CompleteDrainIfUnused(Get(id));
}

void AdapterTable::Remove(AdapterId id) {
  const Adapter& adapter = Get(id);
  LS_CHECK(adapter.is_drained, "adapter ", id, " is still in use");
  if (adapter.slot != kNoAdapterSlot) {
    slot_is_taken_[static_cast<std::size_t>(adapter.slot.value())] = false;
  }
  adapters_.erase(id);
}

bool AdapterTable::MayRun(const Adapter& adapter) const {
  if (adapter.IsBase()) return true;
  if (adapter.load_state != LoadState::kResident) return false;
  return adapter.HoldsPlace() || num_places_taken_ < max_loras_;
}

void AdapterTable::MoveRequest(Adapter& adapter, RequestList from, RequestList to) {
  const bool held_place = adapter.HoldsPlace();
  if (std::int64_t* count = CountOf(adapter, from)) {
    LS_CHECK(*count > 0, "adapter ", adapter.id);
    --*count;
  }
  if (std::int64_t* count = CountOf(adapter, to)) ++*count;
  num_places_taken_ +=
      static_cast<std::int32_t>(adapter.HoldsPlace()) - static_cast<std::int32_t>(held_place);
  CompleteDrainIfUnused(adapter);
}

void AdapterTable::CompleteDrainIfUnused(Adapter& adapter) {
  if (!adapter.is_draining || adapter.is_drained || adapter.load_state == LoadState::kLoading ||
      adapter.HasRequests()) {
    return;
  }
  if (cache_backptr_->HasNamespace(adapter.namespace_id)) {
    waiting_for_copies_.insert(adapter.id);
    return;
  }
  waiting_for_copies_.erase(adapter.id);
  adapter.is_drained = true;
  std::erase(registered_, adapter.id);  // never loaded, and now never will be
  drained_.push_back(adapter.id);
}

void AdapterTable::CheckInvariants() const {
  std::int32_t num_places = 0;
  std::set<AdapterSlot> slots;
  for (const auto& [id, adapter] : adapters_) {
    if (adapter.IsBase()) continue;
    if (adapter.HoldsPlace()) {
      ++num_places;
      LS_CHECK(adapter.load_state == LoadState::kResident, "adapter ", id,
               " runs but is not resident");
    }
    const bool needs_slot = adapter.load_state != LoadState::kRegistered;
    LS_CHECK((adapter.slot != kNoAdapterSlot) == needs_slot, "adapter ", id, " has slot ",
             adapter.slot);
    if (needs_slot) {
      LS_CHECK(slots.insert(adapter.slot).second, "two adapters in slot ", adapter.slot);
      LS_CHECK(slot_is_taken_.at(static_cast<std::size_t>(adapter.slot.value())), "slot ",
               adapter.slot, " of adapter ", id, " counts as free");
    }
    const bool waits_for_copies = waiting_for_copies_.contains(id);
    const bool is_in_use =
        adapter.HasRequests() || adapter.load_state == LoadState::kLoading || waits_for_copies;
    LS_CHECK(adapter.is_drained == (adapter.is_draining && !is_in_use), "adapter ", id,
             adapter.is_drained ? " is drained but in use" : " drains but waits for nothing");
    LS_CHECK(!waits_for_copies || (adapter.is_draining && !adapter.HasRequests()), "adapter ", id,
             " waits for copies too early");
    LS_CHECK(cache_backptr_->HasNamespace(adapter.namespace_id) ==
                 (!adapter.is_draining || adapter.HasRequests() || waits_for_copies),
             "adapter ", id, " and its namespace ", adapter.namespace_id, " disagree");
  }
  const auto num_taken = std::count(slot_is_taken_.begin(), slot_is_taken_.end(), true);
  LS_CHECK(std::cmp_equal(num_taken, slots.size()), num_taken, " slots taken by ", slots.size(),
           " adapters");
  LS_CHECK(num_places == num_places_taken_, num_places, " places taken, counted ",
           num_places_taken_);
  LS_CHECK(num_places_taken_ <= max_loras_, num_places_taken_, " places taken, max_loras is ",
           max_loras_);
}

}  // namespace lora_serve
