#include "kv_prefix_cache/kv_prefix_cache_impl.h"

#include <algorithm>
#include <limits>
#include <string>
#include <utility>

#include "common/check.h"
#include "common/errors.h"

namespace lora_serve {

KVPrefixCache::Impl::Impl(const KVPrefixCacheOptions& options)
    : options_(options), device_pool_(options.num_device_pages) {
  const Namespace& base = AddNamespace({});
  LS_CHECK(base.id() == kBaseNamespace, "the base namespace got id ", base.id());
}

KVPrefixCache::Impl::~Impl() {
  for (const auto& [id, ns] : namespaces_) {
    const NamespaceStats stats = ns->Stats();
    LS_FATAL(stats.num_handles == 0 && stats.num_leases == 0,
             "the KV prefix cache was destroyed before its users: namespace ", id, " has ",
             stats.num_handles, " handles and ", stats.num_leases,
             " leases; destroy them before the cache");
    DropUnpinned(*ns);
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

void KVPrefixCache::Impl::Drain(Namespace& ns) {
  if (ns.IsDraining()) return;
  ns.StartDraining();
  DropUnpinned(ns);
  DestroyIfAbandoned(ns);
}

void KVPrefixCache::Impl::DropUnpinned(Namespace& ns) noexcept {
  while (Node* const leaf = EvictionPolicy::VictimOf(ns.leaf_list(Tier::kDevice))) {
    DropTail(*leaf, leaf->num_pages);
  }
}

void KVPrefixCache::Impl::DestroyIfAbandoned(Namespace& ns) noexcept {
  if (!ns.IsAbandoned()) return;
  LS_FATAL(ns.tree().num_nodes() == 0 && ns.Stats().num_private_pages == 0, "namespace ", ns.id(),
           " ends with ", ns.tree().num_nodes(), " nodes and ", ns.Stats().num_private_pages,
           " private pages");
  namespaces_.erase(ns.id());
}

// --- Leases ------------------------------------------------------------------------------------

PrefixMatch KVPrefixCache::Impl::Match(const Namespace& ns, std::span<const TokenId> tokens) const {
  return ns.tree().Match(ns.tree().root(), tokens);
}

std::optional<Lease> KVPrefixCache::Impl::Acquire(Namespace& ns, std::span<const TokenId> tokens,
                                                  const AcquireOptions& options) {
  const PrefixMatch match =
      Match(ns, tokens.first(static_cast<std::size_t>(options.max_cached_tokens)));
  const std::int32_t num_new_pages =
      std::max(0, NumPagesFor(options.num_capacity_tokens) - match.num_pages);
  if (!CanAllocate(num_new_pages, match)) return std::nullopt;

  Node& node = EndNode(ns, match);
  // From here on the lease undoes everything when it dies. It pins first: the eviction that makes
  // room must not take the prefix that was just found.
  Lease lease;
  lease.namespace_backptr_ = &ns;
  ns.AddLease();
  lease.pinned_node_ = &node;
  device_policy_.Pin(node);
  lease.num_published_pages_ = match.num_pages;
  lease.num_cached_tokens_ = match.num_pages * options_.page_size;
  lease.pages_.resize(static_cast<std::size_t>(match.num_pages));
  for (const Node* part = &node; !part->IsRoot(); part = part->parent_backptr) {
    std::ranges::copy(part->On(Tier::kDevice).pages.ids(), lease.pages_.begin() + part->start_page);
  }
  AllocateFor(lease, num_new_pages);
  return lease;
}

bool KVPrefixCache::Impl::Extend(Lease& lease, std::int32_t num_capacity_tokens) {
  const auto num_pages = static_cast<std::int32_t>(lease.pages_.size());
  const std::int32_t num_new_pages = NumPagesFor(num_capacity_tokens) - num_pages;
  if (num_new_pages <= 0) return true;
  if (!CanAllocate(num_new_pages, {})) return false;
  AllocateFor(lease, num_new_pages);
  return true;
}

void KVPrefixCache::Impl::Publish(Lease& lease, std::span<const TokenId> tokens) {
  Namespace& ns = *lease.namespace_backptr_;
  if (ns.IsDraining()) return;  // private pages go back to the pool with the lease
  const std::size_t num_full_pages = tokens.size() / NumTokens(1);
  LS_CHECK(num_full_pages <= lease.pages_.size(), "Publish got ", tokens.size(),
           " computed tokens for a lease of ", lease.pages_.size(), " pages");
  const auto num_published = static_cast<std::size_t>(lease.num_published_pages_);
  if (num_full_pages <= num_published) return;
  LS_DCHECK(num_published == 0 ||
                std::ranges::equal(tokens.subspan((num_published - 1) * NumTokens(1), NumTokens(1)),
                                   std::span(lease.pinned_node_->tokens).last(NumTokens(1))),
            "Publish got another sequence than the one published so far");
  const auto fresh =
      tokens.subspan(num_published * NumTokens(1), (num_full_pages - num_published) * NumTokens(1));

  //   fresh = [ twins: the tree keeps its page, the lease its own | the rest: lease to tree ]
  const PrefixMatch twins = ns.tree().Match(*lease.pinned_node_, fresh);
  if (twins.num_pages > 0) {
    MovePin(lease, EndNode(ns, twins));
    lease.duplicate_pages_.Append(lease.tail_pages_.TakeFront(twins.num_pages));
    lease.num_published_pages_ += twins.num_pages;
  }
  const auto rest = fresh.subspan(NumTokens(twins.num_pages));
  if (!rest.empty()) InsertBelowPin(lease, rest);
}

void KVPrefixCache::Impl::InsertBelowPin(Lease& lease, std::span<const TokenId> tokens) {
  Namespace& ns = *lease.namespace_backptr_;
  Node& parent = *lease.pinned_node_;
  const auto num_pages = static_cast<std::int32_t>(tokens.size() / NumTokens(1));
  const bool is_own_leaf =
      !parent.IsRoot() && parent.children.IsEmpty() && parent.On(Tier::kDevice).num_pins == 1;
  if (is_own_leaf) {  // nobody else's pin may move: a decoding request grows one edge, not a chain
    ns.tree().ExtendLeaf(parent, tokens);
    parent.On(Tier::kDevice).pages.Append(lease.tail_pages_.TakeFront(num_pages));
  } else {
    Node& child = ns.tree().AddChild(parent, tokens);
    child.On(Tier::kDevice).pages = lease.tail_pages_.TakeFront(num_pages);
    MovePin(lease, child);
  }
  lease.num_published_pages_ += num_pages;
  ns.AddPrivatePages(-num_pages);
  ns.AddTreePages(num_pages);
  num_private_pages_ -= num_pages;
  num_tree_pages_ += num_pages;
}

void KVPrefixCache::Impl::ReleaseLease(Lease& lease) noexcept {
  Namespace& ns = *lease.namespace_backptr_;
  const std::int64_t num_private = lease.tail_pages_.size() + lease.duplicate_pages_.size();
  lease.tail_pages_ = {};
  lease.duplicate_pages_ = {};
  ns.AddPrivatePages(-num_private);
  num_private_pages_ -= num_private;
  lease.pinned_node_->epoch = ++clock_;  // in use until now; what pins protect needs no age
  device_policy_.Unpin(*lease.pinned_node_);
  ns.RemoveLease();
  if (ns.IsDraining()) {
    DropUnpinned(ns);
    DestroyIfAbandoned(ns);
  }
}

void KVPrefixCache::Impl::ReleaseHandle(Namespace& ns) noexcept {
  ns.RemoveHandle();
  DestroyIfAbandoned(ns);
}

Node& KVPrefixCache::Impl::EndNode(Namespace& ns, const PrefixMatch& match) {
  Node& node = *match.node;
  if (match.num_edge_pages == node.num_pages) return node;
  device_policy_.Unlist(node);  // its pages change
  Node& upper = ns.tree().Split(node, match.num_edge_pages);
  device_policy_.Refresh(node);
  return upper;
}

void KVPrefixCache::Impl::MovePin(Lease& lease, Node& node) noexcept {
  Node& previous = *std::exchange(lease.pinned_node_, &node);
  device_policy_.Pin(node);
  device_policy_.Unpin(previous);
}

// --- Pages -------------------------------------------------------------------------------------

bool KVPrefixCache::Impl::CanAllocate(std::int32_t num_pages, const PrefixMatch& match) const {
  const std::int64_t num_missing = num_pages - device_pool_.num_free_pages();
  if (num_missing <= 0) return true;
  // Leaves alone are mostly enough. A pin inside a listed leaf takes its first part away.
  std::int64_t num_listed = device_policy_.num_listed_pages();
  if (match.node != nullptr && match.node->On(Tier::kDevice).leaf_hook.is_listed()) {
    num_listed -= match.num_edge_pages;
  }
  if (num_missing <= num_listed) return true;
  return num_missing <= num_tree_pages_ - device_policy_.CountProtectedPages(match);
}

void KVPrefixCache::Impl::AllocateFor(Lease& lease, std::int32_t num_pages) {
  const std::int64_t num_missing = num_pages - device_pool_.num_free_pages();
  if (num_missing > 0) {
    const std::int64_t num_evicted = Evict(num_missing);
    LS_CHECK(num_evicted == num_missing, "evicted ", num_evicted, " pages where ", num_missing,
             " were promised");
  }
  OwnedPages pages = device_pool_.Allocate(num_pages);
  lease.pages_.insert(lease.pages_.end(), pages.ids().begin(), pages.ids().end());
  lease.tail_pages_.Append(std::move(pages));
  lease.namespace_backptr_->AddPrivatePages(num_pages);
  num_private_pages_ += num_pages;
}

std::int64_t KVPrefixCache::Impl::Evict(std::int64_t num_pages) noexcept {
  std::int64_t num_evicted = 0;
  while (num_evicted < num_pages) {
    Node* const leaf = device_policy_.Victim();
    if (leaf == nullptr) break;
    const auto num_dropped =
        static_cast<std::int32_t>(std::min<std::int64_t>(leaf->num_pages, num_pages - num_evicted));
    DropTail(*leaf, num_dropped);
    num_evicted += num_dropped;
  }
  num_evicted_pages_ += num_evicted;
  return num_evicted;
}

void KVPrefixCache::Impl::DropTail(Node& leaf, std::int32_t num_pages) noexcept {
  Namespace& ns = *leaf.namespace_backptr;
  device_policy_.Unlist(leaf);
  if (num_pages < leaf.num_pages) {
    ns.tree().TruncateLeaf(leaf, leaf.num_pages - num_pages);
    device_policy_.Refresh(leaf);
  } else {
    Node& parent = *leaf.parent_backptr;
    const Epoch epoch = leaf.epoch;
    ns.tree().RemoveLeaf(leaf);
    device_policy_.ChildRemoved(parent, epoch);
  }
  ns.AddTreePages(-num_pages);
  num_tree_pages_ -= num_pages;
}

std::int64_t KVPrefixCache::Impl::NumAvailablePages() const {
  return device_pool_.num_free_pages() + num_tree_pages_ - device_policy_.CountProtectedPages();
}

std::int32_t KVPrefixCache::Impl::NumPagesFor(std::int32_t num_tokens) const {
  return num_tokens / options_.page_size + (num_tokens % options_.page_size != 0 ? 1 : 0);
}

std::size_t KVPrefixCache::Impl::NumTokens(std::int32_t num_pages) const {
  return static_cast<std::size_t>(num_pages) * static_cast<std::size_t>(options_.page_size);
}

}  // namespace lora_serve
