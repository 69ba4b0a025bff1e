#include "common/check.h"
#include "kv_prefix_cache/kv_prefix_cache_impl.h"

// Statistics and the invariants of this folder's README. Reads everything, changes nothing.

namespace lora_serve {
namespace {

const char* NameOf(Tier tier) { return tier == Tier::kDevice ? "device" : "host"; }

std::int64_t NumPages(const PagePool* pool) { return pool == nullptr ? 0 : pool->num_pages(); }
std::int64_t NumFreePages(const PagePool* pool) {
  return pool == nullptr ? 0 : pool->num_free_pages();
}

}  // namespace

CacheStats KVPrefixCache::Impl::Stats() const {
  const PagePool* const device = FindPool(Component::kFullAttention, Tier::kDevice);
  const PagePool* const host = FindPool(Component::kFullAttention, Tier::kHost);
  const PagePool* const device_slots = FindPool(Component::kState, Tier::kDevice);
  const PagePool* const host_slots = FindPool(Component::kState, Tier::kHost);
  CacheStats stats{.num_device_pages = NumPages(device),
                   .num_free_pages = NumFreePages(device),
                   .num_tree_pages = num_tree_pages_[IndexOf(Tier::kDevice)],
                   .num_private_pages = num_private_pages_,
                   .num_evicted_pages = num_evicted_pages_[IndexOf(Tier::kDevice)],
                   .num_nodes = 0,
                   .num_host_pages = NumPages(host),
                   .num_free_host_pages = NumFreePages(host),
                   .num_evicted_host_pages = num_evicted_pages_[IndexOf(Tier::kHost)],
                   .num_device_state_slots = NumPages(device_slots),
                   .num_free_device_state_slots = NumFreePages(device_slots),
                   .num_host_state_slots = NumPages(host_slots),
                   .num_free_host_state_slots = NumFreePages(host_slots),
                   .num_transfers = std::ssize(transfers_),
                   .num_pages_being_written_back = num_pages_being_written_back_};
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
  for (const Component component : kComponents) {
    for (const Tier tier : kTiers) {
      if (const PagePool* pool = FindPool(component, tier)) pool->CheckInvariants();
      policies_.Of(component, tier).CheckInvariants();
    }
  }
  for (const auto& [id, ns] : namespaces_) {
    LS_CHECK(ns->id() == id && id.value() < next_namespace_id_, "N1: namespace ", ns->id(),
             " is kept under id ", id, "; the next id is ", next_namespace_id_);
    CheckNamespace(*ns);
  }
  const Namespace* const base = FindNamespace(kBaseNamespace);
  LS_CHECK(base != nullptr && !base->IsDraining(), "N1: the base namespace is not live");
  CheckPages();
  CheckPins();
  CheckTransfers();
}

void KVPrefixCache::Impl::CheckNamespace(const Namespace& ns) const {
  ns.tree().CheckInvariants();
  NamespaceCounts found;
  std::int64_t num_device_pins = 0;
  ns.tree().ForEachNode([&](const Node& node) {
    CheckNode(node);
    for (const Tier tier : kTiers) {
      found.tree_pages[IndexOf(tier)] += node.On(tier).pages.size();
      found.snapshots[IndexOf(tier)] += node.Snapshot(tier).pages.size();
    }
    num_device_pins += node.On(Tier::kDevice).num_pins;
  });
  LS_CHECK(ns.counts().tree_pages == found.tree_pages && ns.counts().snapshots == found.snapshots,
           "P4: namespace ", ns.id(), " counts ", ns.counts().tree_pages[0], " and ",
           ns.counts().tree_pages[1], " pages in its tree of ", found.tree_pages[0], " and ",
           found.tree_pages[1], ", ", ns.counts().snapshots[0], " and ", ns.counts().snapshots[1],
           " snapshots of ", found.snapshots[0], " and ", found.snapshots[1]);
  const NamespaceStats stats = ns.Stats();
  LS_CHECK(stats.num_leases + stats.num_transfers == num_device_pins, "N2: namespace ", ns.id(),
           " has ", stats.num_leases, " leases and ", stats.num_transfers, " transfers but ",
           num_device_pins, " pins on the device");
  for (const Component component : kComponents) {
    for (const Tier tier : kTiers) {
      const bool lists_none = ns.leaf_list(component, tier, false).IsEmpty() &&
                              ns.leaf_list(component, tier, true).IsEmpty();
      LS_CHECK(!ns.IsDraining() || lists_none, "N3: namespace ", ns.id(), " is draining but holds ",
               NameOf(tier), " pages that nothing protects");
    }
  }
  LS_CHECK(!ns.IsAbandoned(), "N3: namespace ", ns.id(), " should have destroyed itself");
}

void KVPrefixCache::Impl::CheckNode(const Node& node) const {
  std::int32_t num_longest = 0;
  for (const Tier tier : kTiers) {
    const Residency& held = node.On(tier);
    num_longest = std::max(num_longest, held.pages.size());
    std::int32_t num_continuations = 0;
    node.children.ForEach(
        [&](const Node& child) { num_continuations += child.On(tier).pages.IsEmpty() ? 0 : 1; });
    LS_CHECK(held.num_continuations == num_continuations, "T2: node ", node.sequence, " counts ",
             held.num_continuations, " children on the ", NameOf(tier), " of ", num_continuations);
    const bool must_be_present = num_continuations > 0 || held.num_pins > 0;
    LS_CHECK(!must_be_present || held.pages.size() == node.num_pages, "T2: node ", node.sequence,
             " holds ", held.pages.size(), " of ", node.num_pages, " pages on the ", NameOf(tier),
             " under ", held.num_pins, " pins and ", num_continuations, " continuations");
    if (!node.IsRoot() && held.num_present() > 0) {
      LS_CHECK(node.parent_backptr->On(tier).num_in_flight == 0, "T3: node ", node.sequence,
               " is present on the ", NameOf(tier), " below pages in flight");
    }
    for (const Component component : kComponents) CheckResidency(node, component, tier);
    LS_CHECK(!node.IsRoot() || node.Snapshot(tier).pages.IsEmpty(),
             "T1: a virtual root holds a snapshot");
  }
  LS_CHECK(num_longest == node.num_pages, "T1: node ", node.sequence, " has an edge of ",
           node.num_pages, " pages of which the tiers hold ", num_longest);
  const auto note = notes_.find(node.write_back_note);
  LS_CHECK(node.write_back_note == 0 || (note != notes_.end() && note->second == &node),
           "T6: node ", node.sequence, " carries a note that is not listed");
}

void KVPrefixCache::Impl::CheckResidency(const Node& node, Component component, Tier tier) const {
  const Residency& held = node.Of(component, tier);
  LS_CHECK(held.num_in_flight >= 0 && held.num_in_flight <= held.pages.size(), "T1: node ",
           node.sequence, " has ", held.num_in_flight, " pages in flight of ", held.pages.size());
  const bool is_evictable = policies_.Of(component, tier).IsEvictable(node);
  LS_CHECK(held.leaf_hook.is_listed() == is_evictable, "E1: node ", node.sequence, " with ",
           held.num_continuations, " continuations, ", held.num_in_flight, " pages in flight and ",
           held.num_pins, " pins on the ", NameOf(tier),
           is_evictable ? " is not listed" : " is listed");
  LS_CHECK(held.num_pins >= 0 && held.epoch <= clock_, "E4: node ", node.sequence, " has ",
           held.num_pins, " pins and epoch ", held.epoch, " of ", clock_);
}

void KVPrefixCache::Impl::CheckPages() const {
  for (const Component component : kComponents) {
    for (const Tier tier : kTiers) {
      const PagePool* const pool = FindPool(component, tier);
      std::vector<std::uint8_t> is_in_tree(static_cast<std::size_t>(NumPages(pool)), 0);
      std::int64_t num_in_tree = 0;
      for (const auto& [id, ns] : namespaces_) {
        ns->tree().ForEachNode([&](const Node& node) {
          for (const PageId page : node.Of(component, tier).pages.ids()) {
            LS_CHECK(!pool->IsFree(page), "P3: ", NameOf(tier), " page ", page,
                     " is free and in the tree");
            std::uint8_t& seen = is_in_tree[static_cast<std::size_t>(page.value())];
            LS_CHECK(seen == 0, "P3: ", NameOf(tier), " page ", page, " is in the tree twice");
            seen = 1;
            ++num_in_tree;
          }
        });
      }
      if (component == Component::kState) continue;  // leases hold slots too, and do not list them
      LS_CHECK(num_in_tree == num_tree_pages_[IndexOf(tier)], "P4: trees hold ", num_in_tree, " ",
               NameOf(tier), " pages of ", num_tree_pages_[IndexOf(tier)], " counted");
      const std::int64_t num_private = tier == Tier::kDevice ? num_private_pages_ : 0;
      LS_CHECK(num_in_tree + num_private + NumFreePages(pool) == NumPages(pool),
               "P4: ", num_in_tree, " in trees + ", num_private, " private + ", NumFreePages(pool),
               " free is not ", NumPages(pool), " ", NameOf(tier), " pages");
    }
  }
  std::int64_t num_private = 0;
  for (const auto& [id, ns] : namespaces_) {
    LS_CHECK(ns->counts().private_pages >= 0, "P4: namespace ", id, " counts ",
             ns->counts().private_pages, " private pages");
    num_private += ns->counts().private_pages;
  }
  LS_CHECK(num_private == num_private_pages_, "P4: leases hold ", num_private, " pages of ",
           num_private_pages_, " counted");
}

void KVPrefixCache::Impl::CheckPins() const {
  for (const Component component : kComponents) {
    for (const Tier tier : kTiers) {
      const EvictionPolicy& policy = policies_.Of(component, tier);
      std::int64_t num_pinned_nodes = 0;
      for (const auto& [id, ns] : namespaces_) {
        ns->tree().ForEachNode([&](const Node& node) {
          num_pinned_nodes += node.Of(component, tier).num_pins > 0 ? 1 : 0;
        });
      }
      const std::int64_t num_linked = policy.pinned_paths().CountPinnedNodes();
      LS_CHECK(num_pinned_nodes == num_linked, "E4: ", num_pinned_nodes, " nodes have pins but ",
               num_linked, " are linked as pinned");
      if (component == Component::kState) continue;
      const std::int64_t num_evictable =
          num_tree_pages_[IndexOf(tier)] - policy.pinned_paths().CountPagesAfresh();
      LS_CHECK(num_evictable >= policy.num_listed_pages(), "E5: ", policy.num_listed_pages(), " ",
               NameOf(tier), " pages are listed but only ", num_evictable, " are unprotected");
    }
  }
}

void KVPrefixCache::Impl::CheckTransfers() const {
  std::int64_t num_written_back = 0;
  std::array<std::int64_t, kNumTiers> num_expected_in_flight{};
  for (const auto& [id, transfer] : transfers_) {
    const Tier tier = transfer.destination();
    const Node& end = *transfer.end_node;
    LS_CHECK(transfer.id == id && id.value() < next_transfer_id_ &&
                 end.end_page() == transfer.end_page && transfer.begin_page <= transfer.end_page,
             "T4: transfer ", id, " of pages [", transfer.begin_page, ", ", transfer.end_page,
             ") points to a node that ends with page ", end.end_page());
    for (const Tier pinned : kTiers) {
      LS_CHECK(!PinsPages(transfer, pinned) || end.On(pinned).num_pins > 0,
               "T4: the end of transfer ", id, " is not pinned on the ", NameOf(pinned));
      for (const Node* const node : transfer.snapshot_nodes) {
        LS_CHECK(node->Snapshot(pinned).num_pins > 0 && !node->Snapshot(pinned).pages.IsEmpty(),
                 "T4: a snapshot of transfer ", id, " is not held on the ", NameOf(pinned));
      }
    }
    const Lease* const lease = transfer.lease;
    LS_CHECK(lease == nullptr || (transfer.kind == TransferKind::kLoadBack &&
                                  lease->loading_ == &transfer && lease->pinned_node_ == &end),
             "T5: transfer ", id, " fills a lease that does not wait for it");
    num_expected_in_flight[IndexOf(tier)] += transfer.num_pages();
    if (transfer.kind == TransferKind::kWriteBack) num_written_back += transfer.num_pages();
  }
  LS_CHECK(num_written_back == num_pages_being_written_back_, "T4: ", num_written_back,
           " pages are being written back, ", num_pages_being_written_back_, " are counted");
  std::array<std::int64_t, kNumTiers> num_in_flight{};
  std::int64_t num_notes = 0;
  for (const auto& [id, ns] : namespaces_) {
    ns->tree().ForEachNode([&](const Node& node) {
      num_notes += node.write_back_note != 0 ? 1 : 0;
      for (const Tier tier : kTiers) num_in_flight[IndexOf(tier)] += node.On(tier).num_in_flight;
    });
  }
  LS_CHECK(num_in_flight == num_expected_in_flight, "T4: ", num_in_flight[0], " and ",
           num_in_flight[1], " pages are in flight, transfers bring ", num_expected_in_flight[0],
           " and ", num_expected_in_flight[1]);
  LS_CHECK(num_notes == std::ssize(notes_), "T6: ", num_notes, " nodes carry notes, ",
           std::ssize(notes_), " are listed");
}

}  // namespace lora_serve
