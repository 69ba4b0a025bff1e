#include "kv_prefix_cache/kv_prefix_cache_impl.h"

#include <algorithm>
#include <string>
#include <utility>

#include "common/check.h"
#include "common/errors.h"

namespace lora_serve {
namespace {

std::unique_ptr<PagePool> MakePool(std::int32_t num_pages) {
  return num_pages > 0 ? std::make_unique<PagePool>(num_pages) : nullptr;
}

}  // namespace

KVPrefixCache::Impl::Impl(const KVPrefixCacheOptions& options)
    : options_(options), matchers_(options) {
  auto& [page_pools, slot_pools] = pools_;
  page_pools[IndexOf(Tier::kDevice)] = MakePool(options.num_device_pages);
  page_pools[IndexOf(Tier::kHost)] = MakePool(options.num_host_pages);
  slot_pools[IndexOf(Tier::kDevice)] = MakePool(options.num_device_state_slots);
  slot_pools[IndexOf(Tier::kHost)] = MakePool(options.num_host_state_slots);
  const Namespace& base = AddNamespace({});
  LS_CHECK(base.id() == kBaseNamespace, "the base namespace got id ", base.id());
}

KVPrefixCache::Impl::~Impl() {
  events_.set_is_enabled(false);
  for (const auto& [id, transfer] : transfers_) UnpinTransfer(transfer);  // nobody waits any more
  for (const auto& [id, ns] : namespaces_) {
    const NamespaceStats stats = ns->Stats();
    LS_FATAL(stats.num_handles == 0 && stats.num_leases == 0,
             "the KV prefix cache was destroyed before its users: namespace ", id, " has ",
             stats.num_handles, " handles and ", stats.num_leases,
             " leases; destroy them before the cache");
    DropUnpinned(*ns);  // takes it off the eviction lists; the tree's destructor does the rest
  }
}

// --- Namespaces --------------------------------------------------------------------------------

Namespace& KVPrefixCache::Impl::AddNamespace(const NamespaceOptions& options) {
  const NamespaceId id{next_namespace_id_};
  auto ns = std::make_unique<Namespace>(id, options, options_.page_size, &sequencer_, this);
  Namespace& added = *namespaces_.emplace(id, std::move(ns)).first->second;
  ++next_namespace_id_;
  return added;
}

Namespace* KVPrefixCache::Impl::FindNamespace(NamespaceId id) const {
  const auto it = namespaces_.find(id);
  return it == namespaces_.end() ? nullptr : it->second.get();
}

Namespace& KVPrefixCache::Impl::GetNamespace(NamespaceId id, const char* action) const {
  Namespace* const ns = FindNamespace(id);
  if (ns == nullptr) {
    throw NotFoundError("namespace " + std::to_string(id.value()) + " cannot be " + action +
                        ": it was never opened, or it was drained and is gone");
  }
  return *ns;
}

void KVPrefixCache::Impl::SetAdapterResident(Namespace& ns, bool is_resident) {
  ns.set_is_adapter_resident(is_resident);
  policies_.RerankNamespace(ns);
}

void KVPrefixCache::Impl::SetQuota(Namespace& ns, Tier tier,
                                   std::optional<std::int64_t> num_pages) {
  ns.set_quota(tier, num_pages);
  policies_.RerankNamespace(ns);
}

void KVPrefixCache::Impl::ReleaseHandle(Namespace& ns) noexcept {
  ns.RemoveHandle();
  ContinueDrain(ns);
}

// --- Drain -------------------------------------------------------------------------------------

void KVPrefixCache::Impl::Drain(Namespace& ns) {
  if (ns.IsDraining()) return;
  // Routers must not send anybody here from now on, so they learn of all removals at once.
  LogWholeNamespace(ns, KVEventKind::kRemoved);
  ns.StartDraining();
  ContinueDrain(ns);
}

void KVPrefixCache::Impl::ContinueDrain(Namespace& ns) noexcept {
  if (!ns.IsDraining()) return;
  DropUnpinned(ns);
  if (!ns.IsAbandoned()) return;
  LS_FATAL(ns.tree().num_nodes() == 0 && ns.counts().private_pages == 0, "namespace ", ns.id(),
           " ends with ", ns.tree().num_nodes(), " nodes and ", ns.counts().private_pages,
           " private pages");
  policies_.Forget(ns.tree().root());
  namespaces_.erase(ns.id());
}

void KVPrefixCache::Impl::DropUnpinned(Namespace& ns) noexcept {
  for (const Tier tier : kTiers) {
    while (Node* const node = SnapshotPolicy(tier).VictimOf(ns)) DropSnapshot(*node, tier);
    while (Node* const leaf = PagePolicy(tier).VictimOf(ns)) {
      DropTail(*leaf, tier, leaf->On(tier).pages.size());
    }
  }
}

// --- Events ------------------------------------------------------------------------------------

void KVPrefixCache::Impl::SetEventsEnabled(bool is_enabled) {
  if (is_enabled == events_.is_enabled()) return;
  events_.set_is_enabled(is_enabled);
  if (!is_enabled) return;
  for (const auto& [id, ns] : namespaces_) {
    if (!ns->IsDraining()) LogWholeNamespace(*ns, KVEventKind::kStored);
  }
}

void KVPrefixCache::Impl::LogWholeNamespace(Namespace& ns, KVEventKind kind) {
  if (!events_.is_enabled()) return;
  NodePath nodes;
  ns.tree().ForEachNode([&nodes](Node& node) {
    if (!node.IsRoot()) nodes.push_back(&node);
  });
  std::ranges::sort(nodes, [](const Node* a, const Node* b) {  // parents before their children
    return a->start_page != b->start_page ? a->start_page < b->start_page
                                          : a->sequence < b->sequence;
  });
  for (Node* const node : nodes) {
    events_.EdgeChanged(*node);
    for (const Tier tier : kTiers) events_.Add(kind, tier, *node, 0, node->On(tier).num_present());
  }
}

}  // namespace lora_serve
