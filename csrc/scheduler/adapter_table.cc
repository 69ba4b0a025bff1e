#include "scheduler/adapter_table.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <utility>

#include "common/check.h"

// The life of generations: opened, loaded, evicted, drained. Their lists: adapter_lists.cc.

namespace lora_serve {
namespace {

/// Of an adapter of weight 1.
constexpr double kServiceUnit = 1 << 20;
constexpr double kMaxWeight = 1000.0;
constexpr double kMinWeight = 0.001;

std::string Subject(AdapterId id) { return "adapter " + std::to_string(id.value()); }

std::int64_t ServicePerToken(AdapterId id, double weight) {
  if (!(weight >= kMinWeight && weight <= kMaxWeight)) {
    throw InvalidArgumentError(Subject(id) + " has weight " + std::to_string(weight) +
                               "; expected 0.001 to 1000");
  }
  return std::llround(kServiceUnit / weight);
}

}  // namespace

AdapterTable::AdapterTable(KVPrefixCache* cache, const SchedulerOptions& options)
    : cache_backptr_(cache),
      max_loras_(options.max_loras),
      max_num_seqs_(options.max_num_seqs),
      max_bytes_(options.adapter_memory_bytes > 0 ? options.adapter_memory_bytes
                                                  : std::numeric_limits<std::int64_t>::max()),
      priority_ageing_us_(options.priority_ageing_us),
      loads_staged_only_(options.loads_staged_only),
      base_(adapters_[kBaseAdapter]) {
  base_.id = kBaseAdapter;
  base_.namespace_id = kBaseNamespace;
  base_.load_state = LoadState::kResident;
  base_.service_per_token = ServicePerToken(kBaseAdapter, base_.options.weight);
  by_namespace_[kBaseNamespace] = kBaseAdapter;
}

bool AdapterTable::Open(AdapterId id, const AdapterOptions& options) {
  if (id <= kBaseAdapter) {
    throw InvalidArgumentError(Subject(id) +
                               " cannot be opened: ids of adapters are 1 or higher, " +
                               std::to_string(kBaseAdapter.value()) + " is the base model");
  }
  if (options.size_bytes < 0) {
    throw InvalidArgumentError(Subject(id) + " has size_bytes " +
                               std::to_string(options.size_bytes) + "; expected 0 or more");
  }
  if (id <= newest_id_) {
    throw InvalidArgumentError(Subject(id) + " cannot be opened: the newest one is adapter " +
                               std::to_string(newest_id_.value()) +
                               ", and every generation needs an id above all that were opened "
                               "before, also after they were drained");
  }
  const std::int64_t service_per_token = ServicePerToken(id, options.weight);
  CheckFits(id, options.size_bytes, options.is_pinned);
  NamespaceOptions namespace_options;
  namespace_options.digest_seed = options.digest_seed;
  Adapter& adapter = adapters_[id];
  adapter.id = id;
  adapter.options = options;
  adapter.service_per_token = service_per_token;
  adapter.namespace_id = cache_backptr_->OpenNamespace(namespace_options);
  by_namespace_[adapter.namespace_id] = id;
  cache_backptr_->SetAdapterResident(adapter.namespace_id, false);
  newest_id_ = id;
  CountSize(adapter);
  // Those in line were here before, and wait for more than is free; but for those to be read.
  const bool is_first =
      std::ranges::all_of(line_, [&](const auto& entry) { return IsToBeRead(*entry.second); });
  const bool is_due = is_first && !IsToBeRead(adapter) && options.size_bytes <= NumFreeBytes();
  if (is_due) ReserveBytes(adapter);
  Relist(adapter);
  return is_due;
}

void AdapterTable::CheckFits(AdapterId id, std::int64_t size_bytes, bool is_pinned) const {
  const std::int64_t largest = unpinned_sizes_.empty() ? 0 : *unpinned_sizes_.rbegin();
  const std::int64_t pinned = num_pinned_bytes_ + (is_pinned ? size_bytes : 0);
  const std::int64_t other = is_pinned ? largest : std::max(largest, size_bytes);
  if (pinned <= max_bytes_ && other <= max_bytes_ - pinned) return;
  throw CapacityError(Subject(id) + " takes " + std::to_string(size_bytes) + " bytes; with " +
                      std::to_string(num_pinned_bytes_) + " bytes of pinned adapters and " +
                      std::to_string(largest) + " of the largest other one, the " +
                      std::to_string(max_bytes_) + " bytes for adapters could not hold " +
                      (is_pinned ? "every adapter that may be needed; do not pin it, unpin another"
                                 : "it; unpin another") +
                      ", or raise the memory for adapters");
}

void AdapterTable::CountSize(const Adapter& adapter) {
  if (adapter.options.is_pinned) {
    num_pinned_bytes_ += adapter.options.size_bytes;
  } else {
    unpinned_sizes_.insert(adapter.options.size_bytes);
  }
}

void AdapterTable::UncountSize(const Adapter& adapter) {
  if (adapter.options.is_pinned) {
    num_pinned_bytes_ -= adapter.options.size_bytes;
  } else {
    unpinned_sizes_.erase(unpinned_sizes_.find(adapter.options.size_bytes));
  }
}

void AdapterTable::SetPinned(AdapterId id, bool is_pinned) {
  Adapter& adapter = GetOpen(id);
  if (adapter.IsBase()) {
    throw AdapterNotFoundError("adapter 0 cannot be pinned: it is the base model, always there");
  }
  if (adapter.options.is_pinned == is_pinned) return;
  UncountSize(adapter);
  try {
    CheckFits(id, adapter.options.size_bytes, is_pinned);
  } catch (const CapacityError&) {
    CountSize(adapter);
    throw;
  }
  adapter.options.is_pinned = is_pinned;
  CountSize(adapter);
  Relist(adapter);
}

void AdapterTable::SetStaged(AdapterId id, bool is_staged) {
  const auto it = adapters_.find(id);
  if (it == adapters_.end() || it->second.IsBase()) {
    throw AdapterNotFoundError(Subject(id) + " cannot be staged: it is not open");
  }
  it->second.options.is_staged = is_staged;
  Relist(it->second);
}

void AdapterTable::SetWeight(AdapterId id, double weight) {
  Adapter& adapter = GetOpen(id);
  adapter.service_per_token = ServicePerToken(id, weight);
  adapter.options.weight = weight;
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
  for (const NamespaceId namespace_id : NamespacesOf(adapter)) {
    cache_backptr_->DrainNamespace(namespace_id);
  }
  adapter.is_draining = true;
  Relist(adapter);
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

// --- To the device and back --------------------------------------------------------------------

std::vector<AdapterId> AdapterTable::TakeDrained() {
  for (const AdapterId id : drained_) {
    Adapter& adapter = Get(id);
    if (adapter.HoldsBytes()) SetLoadState(adapter, LoadState::kRegistered);
  }
  return std::exchange(drained_, {});
}

void AdapterTable::ReserveBytes(Adapter& adapter) {
  LS_CHECK(adapter.load_state == LoadState::kRegistered, "adapter ", adapter.id,
           " has its bytes already");
  LS_CHECK(adapter.options.size_bytes <= NumFreeBytes(), "adapter ", adapter.id, " takes ",
           adapter.options.size_bytes, " bytes of ", NumFreeBytes());
  SetLoadState(adapter, LoadState::kDue);
  due_.push_back(adapter.id);
  Relist(adapter);
}

std::vector<const Adapter*> AdapterTable::TakeDue() {
  std::vector<const Adapter*> loads;
  for (const AdapterId id : std::exchange(due_, {})) {
    Adapter& adapter = Get(id);
    adapter.slot = TakeLowestFreeSlot();
    SetLoadState(adapter, LoadState::kLoading);
    ++adapter.num_loads;
    loads.push_back(&adapter);
    if (adapter.options.is_staged) OnLoaded(id);
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

void AdapterTable::Evict(Adapter& adapter) {
  LS_CHECK(adapter.load_state == LoadState::kResident && !adapter.options.is_pinned &&
               !adapter.is_in_place,
           "adapter ", adapter.id, " cannot leave the device");
  slot_is_taken_[static_cast<std::size_t>(adapter.slot.value())] = false;
  adapter.slot = kNoAdapterSlot;
  SetLoadState(adapter, LoadState::kRegistered);
  ++adapter.num_evictions;
  SetResidentInCache(adapter, false);
  Relist(adapter);
}

void AdapterTable::SetLoadState(Adapter& adapter, LoadState state) {
  const auto count = [&](std::int32_t sign) {
    num_bytes_ += adapter.HoldsBytes() ? sign * adapter.options.size_bytes : 0;
    num_loading_ += adapter.load_state == LoadState::kLoading ? sign : 0;
    num_resident_ += adapter.load_state == LoadState::kResident ? sign : 0;
  };
  count(-1);
  adapter.load_state = state;
  count(+1);
}

void AdapterTable::SetResidentInCache(const Adapter& adapter, bool is_resident) {
  for (const NamespaceId id : NamespacesOf(adapter)) {
    cache_backptr_->SetAdapterResident(id, is_resident);
  }
}

bool AdapterTable::IsLoading(AdapterId id) const {
  const auto it = adapters_.find(id);
  return it != adapters_.end() && it->second.load_state == LoadState::kLoading;
}

void AdapterTable::OnLoaded(AdapterId id) { FinishLoad(id, LoadState::kResident); }

void AdapterTable::OnFailed(AdapterId id) {
  UncountSize(Get(id));
  FinishLoad(id, LoadState::kFailed);
}

void AdapterTable::OnStagedFailed(AdapterId id) {
  const auto it = adapters_.find(id);
  if (it == adapters_.end() || it->second.is_drained) return;
  Adapter& adapter = it->second;
  // Evicted since, or about to be loaded once more: that load will tell.
  if (adapter.load_state != LoadState::kResident) return;
  UncountSize(adapter);
  if (adapter.is_in_place) LeavePlace(adapter);
  SetLoadState(adapter, LoadState::kFailed);
  SetResidentInCache(adapter, false);
  Relist(adapter);
}

void AdapterTable::FinishLoad(AdapterId id, LoadState outcome) {
  Adapter& adapter = Get(id);
  LS_CHECK(adapter.load_state == LoadState::kLoading, "adapter ", id, " was not loading");
  SetLoadState(adapter, outcome);
  adapter.last_used = next_use_number_++;
  if (outcome == LoadState::kResident) SetResidentInCache(adapter, true);
  Relist(adapter);
  CompleteDrainIfUnused(adapter);
}

// --- The end -----------------------------------------------------------------------------------

void AdapterTable::OnCopiesEnded() {
  // A copy: the ones that complete leave the set.
  const std::vector<AdapterId> waiting(waiting_for_copies_.begin(), waiting_for_copies_.end());
  for (const AdapterId id : waiting) CompleteDrainIfUnused(Get(id));
}

void AdapterTable::CompleteDrainIfUnused(Adapter& adapter) {
  if (!adapter.is_draining || adapter.is_drained || adapter.num_requests() > 0) return;
  if (HasNamespace(adapter)) {
    waiting_for_copies_.insert(adapter.id);
    return;
  }
  waiting_for_copies_.erase(adapter.id);
  if (adapter.load_state == LoadState::kLoading) return;
  adapter.is_drained = true;
  if (adapter.load_state == LoadState::kDue) {  // never loaded, and now never will be
    std::erase(due_, adapter.id);
    SetLoadState(adapter, LoadState::kRegistered);
  }
  if (adapter.load_state != LoadState::kFailed) UncountSize(adapter);
  drained_.push_back(adapter.id);
}

void AdapterTable::Remove(AdapterId id) {
  const Adapter& adapter = Get(id);
  LS_CHECK(adapter.is_drained, "adapter ", id, " is still in use");
  if (adapter.slot != kNoAdapterSlot) {
    slot_is_taken_[static_cast<std::size_t>(adapter.slot.value())] = false;
  }
  num_domains_ -= std::ssize(adapter.domains.by_name);
  by_namespace_.erase(adapter.namespace_id);
  for (const auto& [name, domain] : adapter.domains.by_name) {
    by_namespace_.erase(domain.namespace_id);
  }
  adapters_.erase(id);
}

}  // namespace lora_serve
