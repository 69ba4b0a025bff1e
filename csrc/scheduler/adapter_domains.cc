#include "scheduler/adapter_domains.h"

#include <algorithm>
#include <string_view>
#include <utility>
#include <vector>

#include "common/check.h"
#include "scheduler/adapter_table.h"

// The part of AdapterTable that gives each isolation domain of an adapter a namespace of its own.

namespace lora_serve {
namespace {

constexpr std::int64_t kMinDomainsToDrop = 64;
/// Beyond as many, domains go although they have pages.
constexpr std::int64_t kMaxIdleDomains = 4096;

/// Different for every domain of an adapter, so that their KV events tell each other's pages apart.
std::uint64_t SeedOf(std::uint64_t adapter_seed, std::string_view domain) {
  std::uint64_t hash = 0xcbf29ce484222325u ^ adapter_seed;  // FNV-1a
  for (const char byte : domain) {
    hash = (hash ^ static_cast<unsigned char>(byte)) * 0x100000001b3u;
  }
  return hash;
}

/// `stats` is ordered by id.
const NamespaceStats& StatsOf(const std::vector<NamespaceStats>& stats, NamespaceId id) {
  const auto it = std::ranges::lower_bound(stats, id, {}, &NamespaceStats::id);
  LS_CHECK(it != stats.end() && it->id == id, "namespace ", id, " of a domain is gone");
  return *it;
}

bool HasPages(const NamespaceStats& stats) {
  return stats.num_tree_pages + stats.num_host_pages + stats.num_device_snapshots +
             stats.num_host_snapshots >
         0;
}

bool IsUsed(const NamespaceStats& stats) {
  return stats.num_handles + stats.num_leases + stats.num_transfers > 0;
}

}  // namespace

NamespaceHandle AdapterTable::RetainNamespace(Adapter& adapter, const std::string& domain) {
  if (domain.empty()) return cache_backptr_->RetainNamespace(adapter.namespace_id);
  auto it = adapter.domains.by_name.find(domain);
  if (it == adapter.domains.by_name.end()) {
    if (num_domains_ >= num_domains_to_drop_at_) DropIdleDomains();
    NamespaceOptions options;
    options.digest_seed = SeedOf(adapter.options.digest_seed, domain);
    const NamespaceId id = cache_backptr_->OpenNamespace(options);
    by_namespace_[id] = adapter.id;
    cache_backptr_->SetAdapterResident(id, adapter.load_state == LoadState::kResident);
    it = adapter.domains.by_name.emplace(domain, AdapterDomains::Domain{.namespace_id = id}).first;
    ++num_domains_;
  }
  it->second.last_used = next_domain_use_number_++;
  return cache_backptr_->RetainNamespace(it->second.namespace_id);
}

std::vector<NamespaceId> AdapterTable::NamespacesOf(const Adapter& adapter) const {
  std::vector<NamespaceId> ids;
  const auto add = [&](NamespaceId id) {
    if (cache_backptr_->HasNamespace(id)) ids.push_back(id);
  };
  add(adapter.namespace_id);
  for (const auto& [name, domain] : adapter.domains.by_name) add(domain.namespace_id);
  return ids;
}

bool AdapterTable::HasNamespace(const Adapter& adapter) const {
  if (cache_backptr_->HasNamespace(adapter.namespace_id)) return true;
  return std::ranges::any_of(adapter.domains.by_name, [&](const auto& entry) {
    return cache_backptr_->HasNamespace(entry.second.namespace_id);
  });
}

void AdapterTable::DropIdleDomains() {
  struct Idle {
    std::int64_t last_used = 0;
    Adapter* adapter_backptr = nullptr;
    const std::string* name = nullptr;
  };
  // The events of what was dropped the last time have been taken since.
  for (const NamespaceId id : std::exchange(dropped_namespaces_, {})) by_namespace_.erase(id);
  const std::vector<NamespaceStats> stats = cache_backptr_->NamespaceStatsList();
  const auto drop = [&](Adapter& adapter, const std::string& name) {
    const auto it = adapter.domains.by_name.find(name);
    const NamespaceStats& found = StatsOf(stats, it->second.namespace_id);
    adapter.domains.num_dropped_hit_tokens += found.num_hit_tokens;
    adapter.domains.num_dropped_missed_tokens += found.num_missed_tokens;
    cache_backptr_->DrainNamespace(it->second.namespace_id);
    dropped_namespaces_.push_back(it->second.namespace_id);
    adapter.domains.by_name.erase(it);
    --num_domains_;
  };
  std::vector<Idle> idle;
  for (auto& [id, adapter] : adapters_) {
    if (adapter.is_draining) continue;  // its namespaces go with it
    for (auto it = adapter.domains.by_name.begin(); it != adapter.domains.by_name.end();) {
      const auto& [name, domain] = *(it++);  // dropping takes it off the map
      const NamespaceStats& found = StatsOf(stats, domain.namespace_id);
      if (IsUsed(found)) continue;
      if (HasPages(found)) {
        idle.push_back({domain.last_used, &adapter, &name});
      } else {
        drop(adapter, name);
      }
    }
  }
  std::ranges::sort(idle, {}, &Idle::last_used);
  const bool are_too_many = num_domains_ >= kMaxIdleDomains;
  for (const Idle& entry : idle) {
    if (!are_too_many || num_domains_ <= kMaxIdleDomains / 2) break;
    drop(*entry.adapter_backptr, *entry.name);
  }
  num_domains_to_drop_at_ =
      std::max(std::min(2 * num_domains_, kMaxIdleDomains), num_domains_ + kMinDomainsToDrop);
}

}  // namespace lora_serve
