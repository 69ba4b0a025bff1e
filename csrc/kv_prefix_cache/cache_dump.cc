#include <algorithm>
#include <sstream>
#include <string>

#include "kv_prefix_cache/kv_prefix_cache_impl.h"

// The whole state as text: what tests compare between two caches, and what a report of a bug
// quotes.

namespace lora_serve {
namespace {

void DumpResidency(std::ostream& out, const char* name, const Residency& held) {
  if (held.pages.IsEmpty() && held.num_pins == 0) return;
  out << ' ' << name << "[";
  for (const PageId page : held.pages.ids()) out << ' ' << page.value();
  out << " ]";
  if (held.num_in_flight > 0) out << " in_flight=" << held.num_in_flight;
  if (held.num_pins > 0) out << " pins=" << held.num_pins;
  out << " epoch=" << held.epoch;
}

void DumpNode(std::ostream& out, const Node& node) {
  out << "  node " << node.sequence << " pages [" << node.start_page << ", " << node.end_page()
      << ") below " << (node.IsRoot() ? -1 : node.parent_backptr->sequence);
  DumpResidency(out, "device", node.On(Tier::kDevice));
  DumpResidency(out, "host", node.On(Tier::kHost));
  DumpResidency(out, "device_snapshot", node.Snapshot(Tier::kDevice));
  DumpResidency(out, "host_snapshot", node.Snapshot(Tier::kHost));
  if (node.write_back_note != 0) out << " note=" << node.write_back_note;
  out << " tokens";
  for (const TokenId token : node.tokens) out << ' ' << token;
  out << '\n';
}

}  // namespace

std::string KVPrefixCache::Impl::Dump() const {
  std::ostringstream out;
  out << "clock " << clock_ << ", next namespace " << next_namespace_id_ << ", next transfer "
      << next_transfer_id_ << '\n';
  for (const auto& [id, ns] : namespaces_) {
    const NamespaceStats stats = ns->Stats();
    out << "namespace " << id.value() << (ns->IsDraining() ? " draining" : "")
        << " handles=" << stats.num_handles << " leases=" << stats.num_leases
        << " private=" << stats.num_private_pages << " hit=" << stats.num_hit_tokens
        << " missed=" << stats.num_missed_tokens << '\n';
    std::vector<const Node*> nodes;
    ns->tree().ForEachNode([&nodes](const Node& node) { nodes.push_back(&node); });
    std::ranges::sort(nodes, {}, [](const Node* node) { return node->sequence; });
    for (const Node* const node : nodes) DumpNode(out, *node);
  }
  for (const auto& [id, transfer] : transfers_) {
    out << "transfer " << id.value()
        << (transfer.kind == TransferKind::kWriteBack ? " write_back" : " load_back") << " pages ["
        << transfer.begin_page << ", " << transfer.end_page << ") to node "
        << transfer.end_node->sequence << '\n';
  }
  // The free pages in the order in which they will be handed out are part of every later decision.
  for (const Component component : kComponents) {
    for (const Tier tier : kTiers) {
      const PagePool* const pool = FindPool(component, tier);
      if (pool == nullptr) continue;
      out << "free " << IndexOf(component) << ' ' << IndexOf(tier) << ':';
      for (const PageId page : pool->free_pages()) out << ' ' << page.value();
      out << '\n';
    }
  }
  return out.str();
}

}  // namespace lora_serve
