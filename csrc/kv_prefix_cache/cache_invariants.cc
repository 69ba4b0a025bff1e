#include "common/check.h"
#include "kv_prefix_cache/kv_prefix_cache_impl.h"

// Statistics and the invariants of this folder's README. Reads everything, changes nothing.

namespace lora_serve {

CacheStats KVPrefixCache::Impl::Stats() const {
  CacheStats stats{.num_device_pages = device_pool_.num_pages(),
                   .num_free_pages = device_pool_.num_free_pages(),
                   .num_tree_pages = num_tree_pages_,
                   .num_private_pages = num_private_pages_,
                   .num_evicted_pages = num_evicted_pages_,
                   .num_nodes = 0};
  for (const auto& [id, ns] : namespaces_) stats.num_nodes += ns->tree().num_nodes();
  return stats;
}

std::vector<NamespaceStats> KVPrefixCache::Impl::NamespaceStatsList() const {
  std::vector<NamespaceStats> list;
  list.reserve(namespaces_.size());
  for (const auto& [id, ns] : namespaces_) list.push_back(ns->Stats());
  return list;
}

void KVPrefixCache::Impl::CheckInvariants() const {
  device_pool_.CheckInvariants();
  device_policy_.CheckInvariants();
  std::vector<std::uint8_t> is_in_tree(static_cast<std::size_t>(device_pool_.num_pages()), 0);
  for (const auto& [id, ns] : namespaces_) {
    LS_CHECK(ns->id() == id && id.value() < next_namespace_id_, "N1: namespace ", ns->id(),
             " is kept under id ", id, "; the next id is ", next_namespace_id_);
    CheckNamespace(*ns, is_in_tree);
  }
  const Namespace* const base = FindNamespace(kBaseNamespace);
  LS_CHECK(base != nullptr && !base->IsDraining(), "N1: the base namespace is not live");
  CheckPages(is_in_tree);
  CheckPins();
}

void KVPrefixCache::Impl::CheckNamespace(const Namespace& ns,
                                         std::vector<std::uint8_t>& is_in_tree) const {
  ns.tree().CheckInvariants();
  std::int64_t num_tree_pages = 0;
  std::int64_t num_pins = 0;
  ns.tree().ForEachNode([&](const Node& node) {
    const Residency& residency = node.On(Tier::kDevice);
    LS_CHECK(residency.pages.size() == node.num_pages, "P2: node ", node.sequence, " has ",
             residency.pages.size(), " pages on an edge of ", node.num_pages);
    for (const PageId page : residency.pages.ids()) {
      LS_CHECK(!device_pool_.IsFree(page), "P3: page ", page, " is free and in the tree");
      std::uint8_t& seen = is_in_tree[static_cast<std::size_t>(page.value())];
      LS_CHECK(seen == 0, "P3: page ", page, " is in the tree twice");
      seen = 1;
    }
    const bool is_evictable = !node.IsRoot() && node.children.IsEmpty() && residency.num_pins == 0;
    LS_CHECK(residency.leaf_hook.is_listed() == is_evictable, "E1: node ", node.sequence, " with ",
             node.children.size(), " children and ", residency.num_pins,
             is_evictable ? " pins is not listed" : " pins is listed");
    LS_CHECK(residency.num_pins >= 0 && node.epoch <= clock_, "E4: node ", node.sequence, " has ",
             residency.num_pins, " pins and epoch ", node.epoch, " of ", clock_);
    num_tree_pages += node.num_pages;
    num_pins += residency.num_pins;
  });
  const NamespaceStats stats = ns.Stats();
  LS_CHECK(stats.num_tree_pages == num_tree_pages, "P4: namespace ", ns.id(), " counts ",
           stats.num_tree_pages, " pages in its tree of ", num_tree_pages);
  LS_CHECK(stats.num_leases == num_pins, "N2: namespace ", ns.id(), " has ", stats.num_leases,
           " leases but ", num_pins, " pins");
  LS_CHECK(!ns.IsDraining() || ns.leaf_list(Tier::kDevice).IsEmpty(), "N3: namespace ", ns.id(),
           " is draining but holds pages that no lease protects");
  LS_CHECK(!ns.IsAbandoned(), "N3: namespace ", ns.id(), " should have destroyed itself");
}

void KVPrefixCache::Impl::CheckPages(const std::vector<std::uint8_t>& is_in_tree) const {
  std::int64_t num_in_tree = 0;
  for (const std::uint8_t in_tree : is_in_tree) num_in_tree += in_tree;
  std::int64_t num_private = 0;
  for (const auto& [id, ns] : namespaces_) {
    LS_CHECK(ns->Stats().num_private_pages >= 0, "P4: namespace ", id, " counts ",
             ns->Stats().num_private_pages, " private pages");
    num_private += ns->Stats().num_private_pages;
  }
  LS_CHECK(num_in_tree == num_tree_pages_ && num_private == num_private_pages_, "P4: trees hold ",
           num_in_tree, " pages of ", num_tree_pages_, " counted, leases ", num_private, " of ",
           num_private_pages_);
  LS_CHECK(num_in_tree + num_private + device_pool_.num_free_pages() == device_pool_.num_pages(),
           "P4: ", num_in_tree, " in trees + ", num_private, " private + ",
           device_pool_.num_free_pages(), " free is not ", device_pool_.num_pages());
}

void KVPrefixCache::Impl::CheckPins() const {
  std::int64_t num_pinned_nodes = 0;
  for (const auto& [id, ns] : namespaces_) {
    ns->tree().ForEachNode([&num_pinned_nodes](const Node& node) {
      num_pinned_nodes += node.On(Tier::kDevice).num_pins > 0 ? 1 : 0;
    });
  }
  LS_CHECK(num_pinned_nodes == device_policy_.CountPinnedNodes(), "E4: ", num_pinned_nodes,
           " nodes have pins but ", device_policy_.CountPinnedNodes(), " are linked as pinned");
  const std::int64_t num_evictable = num_tree_pages_ - device_policy_.CountProtectedPages();
  LS_CHECK(num_evictable >= device_policy_.num_listed_pages(),
           "E5: ", device_policy_.num_listed_pages(), " pages are listed but only ", num_evictable,
           " are unprotected");
}

}  // namespace lora_serve
