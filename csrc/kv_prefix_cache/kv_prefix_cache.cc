#include "kv_prefix_cache/kv_prefix_cache.h"

#include <string>

#include "common/check.h"
#include "common/errors.h"
#include "kv_prefix_cache/kv_prefix_cache_impl.h"

namespace lora_serve {
namespace {

const KVPrefixCacheOptions& Validated(const KVPrefixCacheOptions& options) {
  if (options.page_size < 1) {
    throw InvalidArgumentError("page_size is " + std::to_string(options.page_size) +
                               " but must be at least 1");
  }
  if (options.num_device_pages < 1) {
    throw InvalidArgumentError("num_device_pages is " + std::to_string(options.num_device_pages) +
                               " but must be at least 1; give the KV cache more memory");
  }
  return options;
}

}  // namespace

KVPrefixCache::KVPrefixCache(const KVPrefixCacheOptions& options)
    : impl_(std::make_unique<Impl>(Validated(options))) {}

KVPrefixCache::~KVPrefixCache() = default;

NamespaceId KVPrefixCache::OpenNamespace(const NamespaceOptions& options) {
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

ProbeResult KVPrefixCache::Probe(NamespaceId id, std::span<const TokenId> tokens) const {
  const PrefixMatch match = impl_->Match(impl_->GetNamespace(id, "probed"), tokens);
  return {.num_device_tokens = match.num_pages * page_size()};
}

std::optional<Lease> KVPrefixCache::Acquire(const NamespaceHandle& handle,
                                            std::span<const TokenId> tokens,
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

bool KVPrefixCache::Extend(Lease& lease, std::int32_t num_capacity_tokens) {
  LS_CHECK(lease && lease.namespace_backptr_->cache_backptr() == impl_.get(),
           "Extend needs a lease of this cache, got an empty or a foreign one");
  LS_CHECK(num_capacity_tokens >= 0, "num_capacity_tokens is ", num_capacity_tokens);
  return impl_->Extend(lease, num_capacity_tokens);
}

void KVPrefixCache::Publish(Lease& lease, std::span<const TokenId> tokens) {
  LS_CHECK(lease && lease.namespace_backptr_->cache_backptr() == impl_.get(),
           "Publish needs a lease of this cache, got an empty or a foreign one");
  impl_->Publish(lease, tokens);
}

std::int64_t KVPrefixCache::NumAvailablePages() const { return impl_->NumAvailablePages(); }

std::int32_t KVPrefixCache::page_size() const { return impl_->options().page_size; }

CacheStats KVPrefixCache::Stats() const { return impl_->Stats(); }

std::vector<NamespaceStats> KVPrefixCache::NamespaceStatsList() const {
  return impl_->NamespaceStatsList();
}

std::int64_t KVPrefixCache::Evict(std::int64_t num_pages) {
  LS_CHECK(num_pages >= 0, "cannot evict ", num_pages, " pages");
  return impl_->Evict(num_pages);
}

void KVPrefixCache::CheckInvariants() const { impl_->CheckInvariants(); }

}  // namespace lora_serve
