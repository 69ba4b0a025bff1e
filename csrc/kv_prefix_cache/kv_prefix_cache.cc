#include "kv_prefix_cache/kv_prefix_cache.h"

#include <string>
#include <string_view>

#include "common/check.h"
#include "common/errors.h"
#include "kv_prefix_cache/kv_prefix_cache_impl.h"

namespace lora_serve {
namespace {

void RequireAtLeast(std::string_view name, std::int64_t found, std::int64_t least,
                    std::string_view advice = "") {
  if (found >= least) return;
  throw InvalidArgumentError(std::string(name) + " is " + std::to_string(found) +
                             " but must be at least " + std::to_string(least) +
                             std::string(advice));
}

const KVPrefixCacheOptions& Validated(const KVPrefixCacheOptions& options) {
  RequireAtLeast("page_size", options.page_size, 1);
  RequireAtLeast("num_device_pages", options.num_device_pages, 1,
                 "; give the KV cache more memory");
  RequireAtLeast("num_host_pages", options.num_host_pages, 0);
  RequireAtLeast("write_back_watermark_pages", options.write_back_watermark_pages, 0);
  RequireAtLeast("num_device_state_slots", options.num_device_state_slots, 0);
  RequireAtLeast("num_host_state_slots", options.num_host_state_slots, 0);
  RequireAtLeast("max_snapshots_per_lease", options.max_snapshots_per_lease, 1);
  if (options.num_host_state_slots > 0 && options.num_device_state_slots == 0) {
    throw InvalidArgumentError(
        "num_host_state_slots is " + std::to_string(options.num_host_state_slots) +
        " but num_device_state_slots is 0; a model with recurrent state needs slots on the device");
  }
  if (options.num_host_state_slots > 0 && options.num_host_pages == 0) {
    throw InvalidArgumentError(
        "num_host_state_slots is " + std::to_string(options.num_host_state_slots) +
        " but num_host_pages is 0; snapshots are kept on the host only beside their pages");
  }
  return options;
}

void RequireQuota(std::string_view name, const std::optional<std::int64_t>& quota) {
  if (quota.has_value()) RequireAtLeast(name, *quota, 0);
}

}  // namespace

KVPrefixCache::KVPrefixCache(const KVPrefixCacheOptions& options)
    : impl_(std::make_unique<Impl>(Validated(options))) {}

KVPrefixCache::~KVPrefixCache() = default;

// --- Namespaces --------------------------------------------------------------------------------

NamespaceId KVPrefixCache::OpenNamespace(const NamespaceOptions& options) {
  RequireQuota("device_quota_pages", options.device_quota_pages);
  RequireQuota("host_quota_pages", options.host_quota_pages);
  return impl_->AddNamespace(options).id();
}

NamespaceHandle KVPrefixCache::RetainNamespace(NamespaceId id) {
  Namespace& ns = impl_->GetNamespace(id, "retained");
  if (ns.IsDraining()) {
    throw NotFoundError("namespace " + std::to_string(id.value()) +
                        " is draining and takes no new requests; open a new namespace");
  }
  return NamespaceHandle(&ns);
}

void KVPrefixCache::DrainNamespace(NamespaceId id) {
  if (id == kBaseNamespace) {
    throw InvalidArgumentError("the base namespace (id 0) is permanent and cannot be drained");
  }
  impl_->Drain(impl_->GetNamespace(id, "drained"));
}

bool KVPrefixCache::HasNamespace(NamespaceId id) const {
  return impl_->FindNamespace(id) != nullptr;
}

void KVPrefixCache::SetAdapterResident(NamespaceId id, bool is_resident) {
  impl_->SetAdapterResident(impl_->GetNamespace(id, "ranked"), is_resident);
}

void KVPrefixCache::SetQuota(NamespaceId id, Tier tier, std::optional<std::int64_t> num_pages) {
  RequireQuota(tier == Tier::kDevice ? "device quota" : "host quota", num_pages);
  impl_->SetQuota(impl_->GetNamespace(id, "given a quota"), tier, num_pages);
}

// --- Lookup ------------------------------------------------------------------------------------

ProbeResult KVPrefixCache::Probe(NamespaceId id, std::span<const TokenId> tokens,
                                 MatchIntent intent) const {
  return impl_->Probe(impl_->GetNamespace(id, "probed"), tokens, intent);
}

void KVPrefixCache::RefreshHints(std::span<PrefixHint> hints) const {
  for (PrefixHint& hint : hints) impl_->RefreshHint(hint);
}

AcquireResult KVPrefixCache::Acquire(const NamespaceHandle& handle, std::span<const TokenId> tokens,
                                     const AcquireOptions& options) {
  LS_CHECK(handle, "Acquire needs a namespace handle, got an empty one");
  LS_CHECK(handle.namespace_backptr_->cache_backptr() == impl_.get(),
           "this namespace handle comes from another cache");
  LS_CHECK(options.max_cached_tokens >= 0 &&
               static_cast<std::size_t>(options.max_cached_tokens) <= tokens.size(),
           "max_cached_tokens is ", options.max_cached_tokens, " for a sequence of ", tokens.size(),
           " tokens");
  LS_CHECK(options.num_capacity_tokens >= 0, "num_capacity_tokens is ",
           options.num_capacity_tokens);
  return impl_->Acquire(*handle.namespace_backptr_, tokens, options);
}

// --- Leases ------------------------------------------------------------------------------------

bool KVPrefixCache::Extend(Lease& lease, std::int32_t num_capacity_tokens) {
  CheckLease(lease, "Extend");
  LS_CHECK(num_capacity_tokens >= 0, "num_capacity_tokens is ", num_capacity_tokens);
  return impl_->Extend(lease, num_capacity_tokens);
}

void KVPrefixCache::Publish(Lease& lease, std::span<const TokenId> tokens) {
  CheckLease(lease, "Publish");
  LS_CHECK(!lease.IsLoading(), "Publish got a lease that waits for transfer ",
           lease.load_back_id());
  impl_->Publish(lease, tokens);
}

std::optional<StateSlot> KVPrefixCache::ReserveSnapshot(Lease& lease, std::int32_t num_tokens) {
  CheckLease(lease, "ReserveSnapshot");
  LS_CHECK(!lease.IsLoading(), "ReserveSnapshot got a lease that waits for transfer ",
           lease.load_back_id());
  return impl_->ReserveSnapshot(lease, num_tokens);
}

void KVPrefixCache::CheckLease(const Lease& lease, const char* action) const {
  LS_CHECK(lease && lease.namespace_backptr_->cache_backptr() == impl_.get(), action,
           " needs a lease of this cache, got an empty or a foreign one");
}

// --- Transfers ---------------------------------------------------------------------------------

void KVPrefixCache::PlanWriteBacks() { impl_->PlanWriteBacks(); }

bool KVPrefixCache::StartWriteBack(const Lease& lease) {
  CheckLease(lease, "StartWriteBack");
  return impl_->StartWriteBack(lease);
}

std::vector<TransferOrder> KVPrefixCache::TakeTransferOrders() {
  return impl_->TakeTransferOrders();
}

void KVPrefixCache::CompleteTransfer(TransferId id) { impl_->CompleteTransfer(id); }

void KVPrefixCache::FailTransfer(TransferId id) { impl_->FailTransfer(id); }

// --- Events, accounting ------------------------------------------------------------------------

void KVPrefixCache::SetEventsEnabled(bool is_enabled) { impl_->SetEventsEnabled(is_enabled); }

std::vector<KVEvent> KVPrefixCache::TakeEvents() { return impl_->TakeEvents(); }

std::int64_t KVPrefixCache::NumAvailablePages() const { return impl_->NumAvailablePages(); }

std::int32_t KVPrefixCache::page_size() const { return impl_->options().page_size; }

CacheStats KVPrefixCache::Stats() const { return impl_->Stats(); }

std::vector<NamespaceStats> KVPrefixCache::NamespaceStatsList() const {
  return impl_->NamespaceStatsList();
}

std::int64_t KVPrefixCache::Evict(Tier tier, std::int64_t num_pages) {
  LS_CHECK(num_pages >= 0, "cannot evict ", num_pages, " pages");
  return impl_->Evict(tier, num_pages);
}

void KVPrefixCache::CheckInvariants() const { impl_->CheckInvariants(); }

std::string KVPrefixCache::Dump() const { return impl_->Dump(); }

}  // namespace lora_serve
