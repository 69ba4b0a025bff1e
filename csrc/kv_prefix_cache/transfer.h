#pragma once

#include <cstdint>
#include <vector>

#include "kv_prefix_cache/cache_options.h"

namespace lora_serve {

class Lease;
class Namespace;
struct Node;

/// A copy between the tiers that is under way.
///
/// Pins `end_node` on both tiers (on the host only when it copies pages), and both ends of every
/// snapshot it copies: neither the tree's splits nor evictions nor the end of the request change
/// what is being copied. In one tier a path has at most one transfer that brings pages.
struct Transfer {
  TransferId id;
  TransferKind kind = TransferKind::kWriteBack;
  Namespace* namespace_backptr = nullptr;
  /// Its edge ends with page end_page - 1.
  Node* end_node = nullptr;
  /// Pages [begin_page, end_page) of the sequence are copied; none when only state is.
  std::int32_t begin_page = 0;
  std::int32_t end_page = 0;
  /// Nodes at whose ends the copied snapshots stand, from the shallowest to the deepest.
  std::vector<Node*> snapshot_nodes;
  /// Load-backs only: who waits for it; null when that lease has ended.
  Lease* lease = nullptr;

  [[nodiscard]] std::int32_t num_pages() const { return end_page - begin_page; }
  [[nodiscard]] Tier destination() const {
    return kind == TransferKind::kWriteBack ? Tier::kHost : Tier::kDevice;
  }
};

}  // namespace lora_serve
