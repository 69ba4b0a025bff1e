#include <algorithm>
#include <string>
#include <utility>

#include "common/check.h"
#include "common/errors.h"
#include "kv_prefix_cache/kv_prefix_cache_impl.h"

// Copies between the tiers: how one starts, what it pins, and how it ends. Which write-backs are
// wanted stands in cache_write_policy.cc.

namespace lora_serve {

// --- Write back --------------------------------------------------------------------------------

KVPrefixCache::Impl::WriteBackStart KVPrefixCache::Impl::TryWriteBack(Node& end,
                                                                      HostRoom host_room) {
  Namespace& ns = *end.namespace_backptr;
  if (!HasHostTier() || ns.IsDraining() || end.IsRoot()) return WriteBackStart::kNothingToCopy;
  const MatchedPath path = CoverPathTo(end);
  const TierCoverage& host = path.On(Tier::kHost);
  const std::int32_t num_device_pages = path.On(Tier::kDevice).num_present;
  if (host.num_covered > host.num_present) return WriteBackStart::kBlocked;

  //   pages of the path: [ on the host | to be copied now | no room on the host ]
  //                      0         begin              end_page          num_device_pages
  const std::int32_t begin = std::min(host.num_covered, num_device_pages);
  const std::int32_t num_wanted = num_device_pages - begin;
  Node& covered_end = DeepestNodeOn(Tier::kHost, end);
  const std::int32_t num_pages =
      num_wanted == 0 ? 0 : MakeHostRoom(covered_end, num_wanted, host_room);
  const std::int32_t end_page = begin + num_pages;
  NodePath snapshots = SnapshotsToWriteBack(end, end_page);
  const std::size_t num_wanted_snapshots = snapshots.size();
  snapshots.resize(static_cast<std::size_t>(MakeHostSlots(end, num_wanted_snapshots)));
  if (num_pages == 0 && snapshots.empty()) {
    const bool is_complete = num_wanted == 0 && num_wanted_snapshots == 0;
    return is_complete ? WriteBackStart::kNothingToCopy : WriteBackStart::kNoRoom;
  }

  const Node& above = covered_end.IsRoot() ? covered_end : *covered_end.parent_backptr;
  Node& copy_end = NodeEndingAt(end, end_page);  // may put a node between the two
  OwnedPages pages = Allocate(Component::kFullAttention, Tier::kHost, num_pages);
  for (Node* const node : PathBetween(above, copy_end)) {
    if (pages.IsEmpty()) break;
    const std::int32_t num_room = node->num_pages - node->On(Tier::kHost).pages.size();
    GainPages(*node, Tier::kHost, pages.TakeFront(std::min(num_room, pages.size())), true);
  }
  for (Node* const node : snapshots) {
    GainSnapshot(*node, Tier::kHost, Allocate(Component::kState, Tier::kHost, 1), true);
  }
  num_pages_being_written_back_ += num_pages;
  AddTransfer(TransferKind::kWriteBack, copy_end, begin, std::move(snapshots));
  return WriteBackStart::kStarted;
}

std::int32_t KVPrefixCache::Impl::MakeHostRoom(Node& covered_end, std::int32_t num_pages,
                                               HostRoom host_room) {
  const PagePool& pool = Pool(Component::kFullAttention, Tier::kHost);
  if (pool.num_free_pages() >= num_pages) return num_pages;
  EvictionPolicy& policy = PagePolicy(Tier::kHost);
  policy.Pin(covered_end);  // room for the end of a path must not be made of its start
  if (host_room == HostRoom::kAny) {
    Evict(Tier::kHost, num_pages - pool.num_free_pages());
  } else {
    EvictHostPagesNotOfVictims(num_pages - pool.num_free_pages());
  }
  policy.Unpin(covered_end);
  return static_cast<std::int32_t>(std::min<std::int64_t>(num_pages, pool.num_free_pages()));
}

void KVPrefixCache::Impl::EvictHostPagesNotOfVictims(std::int64_t num_pages) noexcept {
  const EvictionPolicy& policy = PagePolicy(Tier::kHost);
  while (num_pages > 0) {
    Node* const leaf = policy.Victim();
    if (leaf == nullptr) return;
    const auto num_dropped = static_cast<std::int32_t>(std::min<std::int64_t>(
        {policy.NumVictimPages(*leaf), NumPagesNotOfVictim(*leaf), num_pages}));
    if (num_dropped == 0) return;
    EvictTail(*leaf, Tier::kHost, num_dropped);
    num_pages -= num_dropped;
  }
}

std::int32_t KVPrefixCache::Impl::NumPagesNotOfVictim(const Node& leaf) const {
  const EvictionPolicy& policy = PagePolicy(Tier::kDevice);
  const std::int32_t num_host_pages = leaf.On(Tier::kHost).pages.size();
  const std::int32_t num_device_pages = leaf.On(Tier::kDevice).pages.size();
  if (num_device_pages < num_host_pages) return num_host_pages - num_device_pages;
  const bool is_protected =
      policy.CountProtectedPages({&leaf, num_device_pages}) == policy.CountProtectedPages();
  return is_protected ? num_host_pages : 0;
}

KVPrefixCache::Impl::NodePath KVPrefixCache::Impl::SnapshotsToWriteBack(
    Node& end, std::int32_t end_page) const {
  NodePath nodes;
  if (FindPool(Component::kState, Tier::kHost) == nullptr) return nodes;
  for (Node* node = &end; !node->IsRoot(); node = node->parent_backptr) {
    const bool is_wanted = node->Snapshot(Tier::kDevice).num_present() > 0 &&
                           node->Snapshot(Tier::kHost).pages.IsEmpty();
    if (is_wanted && node->end_page() <= end_page) nodes.push_back(node);
  }
  std::ranges::reverse(nodes);
  return nodes;
}

std::int32_t KVPrefixCache::Impl::MakeHostSlots(Node& end, std::size_t num_slots) {
  if (num_slots == 0) return 0;
  const PagePool& pool = Pool(Component::kState, Tier::kHost);
  EvictionPolicy& policy = SnapshotPolicy(Tier::kHost);
  const NodePath path = PathBetween(end.namespace_backptr->tree().root(), end);
  for (Node* const node : path) policy.Pin(*node);
  const auto num_possible = static_cast<std::int32_t>(std::min<std::int64_t>(
      static_cast<std::int64_t>(num_slots), pool.num_free_pages() + policy.num_listed_pages()));
  EvictSnapshots(Tier::kHost, num_possible - pool.num_free_pages());
  for (Node* const node : path) policy.Unpin(*node);
  return num_possible;
}

bool KVPrefixCache::Impl::StartWriteBack(const Lease& lease) {
  if (lease.loading_ != nullptr) return false;
  return TryWriteBack(*lease.pinned_node_) == WriteBackStart::kStarted;
}

// --- Load back ---------------------------------------------------------------------------------

void KVPrefixCache::Impl::StartLoadBack(Lease& lease, Node& end, std::int32_t begin_page,
                                        bool copies_snapshot) {
  NodePath snapshots;
  if (copies_snapshot) {
    Node& node = *lease.state_.resumed_node;
    GainSnapshot(node, Tier::kDevice, Allocate(Component::kState, Tier::kDevice, 1), true);
    snapshots.push_back(&node);
  }
  Transfer& transfer = AddTransfer(TransferKind::kLoadBack, end, begin_page, std::move(snapshots));
  transfer.lease = &lease;
  lease.loading_ = &transfer;
}

// --- Start and end -----------------------------------------------------------------------------

bool KVPrefixCache::Impl::PinsPages(const Transfer& transfer, Tier tier) {
  // A copy of snapshots alone reads and writes no page. It still needs the tokens of its nodes,
  // and with them the device's pages; the host may have evicted its own.
  return tier == Tier::kDevice || transfer.num_pages() > 0;
}

Transfer& KVPrefixCache::Impl::AddTransfer(TransferKind kind, Node& end, std::int32_t begin_page,
                                           NodePath snapshots) {
  const TransferId id{next_transfer_id_++};
  Transfer& transfer = transfers_[id];
  transfer = {.id = id,
              .kind = kind,
              .namespace_backptr = end.namespace_backptr,
              .end_node = &end,
              .begin_page = begin_page,
              .end_page = end.end_page(),
              .snapshot_nodes = std::move(snapshots),
              .lease = nullptr};
  end.namespace_backptr->AddTransfer();
  for (const Tier tier : kTiers) {
    if (PinsPages(transfer, tier)) PagePolicy(tier).Pin(end);
    for (Node* const node : transfer.snapshot_nodes) SnapshotPolicy(tier).Pin(*node);
  }
  AddOrder(transfer);
  return transfer;
}

void KVPrefixCache::Impl::AddOrder(const Transfer& transfer) {
  const Tier destination = transfer.destination();
  const Tier source = destination == Tier::kHost ? Tier::kDevice : Tier::kHost;
  TransferOrder order{.id = transfer.id,
                      .kind = transfer.kind,
                      .namespace_id = transfer.namespace_backptr->id(),
                      .pages = {},
                      .states = {}};
  for (const Node* node = transfer.end_node; node->end_page() > transfer.begin_page;
       node = node->parent_backptr) {
    const std::int32_t first = std::max(0, transfer.begin_page - node->start_page);
    for (std::int32_t page = node->num_pages - 1; page >= first; --page) {
      const auto index = static_cast<std::size_t>(page);
      order.pages.push_back({.source = node->On(source).pages.ids()[index],
                             .destination = node->On(destination).pages.ids()[index]});
    }
  }
  std::ranges::reverse(order.pages);
  for (const Node* const node : transfer.snapshot_nodes) {
    const auto slot = [node](Tier tier) {
      return StateSlot{node->Snapshot(tier).pages.ids().front().value()};
    };
    order.states.push_back({.source = slot(source), .destination = slot(destination)});
  }
  orders_.push_back(std::move(order));
}

std::vector<TransferOrder> KVPrefixCache::Impl::TakeTransferOrders() {
  return std::exchange(orders_, {});
}

Transfer KVPrefixCache::Impl::TakeTransfer(TransferId id) {
  const auto it = transfers_.find(id);
  if (it == transfers_.end()) {
    throw NotFoundError("transfer " + std::to_string(id.value()) +
                        " is not under way: it was never ordered, or its end was reported before");
  }
  Transfer transfer = std::move(it->second);
  transfers_.erase(it);
  // Whoever ends it before it was handed out does not want it done any more.
  std::erase_if(orders_, [id](const TransferOrder& order) { return order.id == id; });
  if (transfer.kind == TransferKind::kWriteBack) {
    num_pages_being_written_back_ -= transfer.num_pages();
  }
  if (transfer.lease != nullptr) transfer.lease->loading_ = nullptr;
  return transfer;
}

void KVPrefixCache::Impl::UnpinTransfer(const Transfer& transfer) noexcept {
  for (const Tier tier : kTiers) {
    if (PinsPages(transfer, tier)) PagePolicy(tier).Unpin(*transfer.end_node);
    for (Node* const node : transfer.snapshot_nodes) SnapshotPolicy(tier).Unpin(*node);
  }
  transfer.namespace_backptr->RemoveTransfer();
}

void KVPrefixCache::Impl::CompleteTransfer(TransferId id) {
  const Transfer transfer = TakeTransfer(id);
  const Tier tier = transfer.destination();
  NodePath nodes;
  for (Node* node = transfer.end_node; node->end_page() > transfer.begin_page;
       node = node->parent_backptr) {
    nodes.push_back(node);
  }
  std::ranges::reverse(nodes);  // a router must know a page before the one that continues it
  for (Node* const node : nodes) ArrivePages(*node, tier);
  const Epoch now = Tick();
  if (transfer.num_pages() > 0) {
    Touch(*transfer.end_node, Component::kFullAttention, tier, now);
  }
  for (Node* const node : transfer.snapshot_nodes) {
    ArriveSnapshot(*node, tier);
    Touch(*node, Component::kState, tier, Tick());
  }
  UnpinTransfer(transfer);
  ContinueDrain(*transfer.namespace_backptr);
}

void KVPrefixCache::Impl::FailTransfer(TransferId id) {
  const Transfer transfer = TakeTransfer(id);
  const bool is_load_back = transfer.kind == TransferKind::kLoadBack;
  if (transfer.lease != nullptr) CutBackLease(*transfer.lease, transfer);
  UnpinTransfer(transfer);
  const Tier tier = transfer.destination();
  for (Node* const node : transfer.snapshot_nodes) {
    DropSnapshot(*node, tier);
    if (is_load_back) DropSnapshot(*node, Tier::kHost);  // it could not be read
  }
  Node* top = nullptr;  // of the copied range
  for (Node* node = transfer.end_node; node->end_page() > transfer.begin_page;) {
    Node* const parent = node->parent_backptr;
    top = node;
    DropTail(*node, tier, node->On(tier).num_in_flight);
    node = parent;
  }
  if (is_load_back && top != nullptr) DropHostSubtree(*top);
  ContinueDrain(*transfer.namespace_backptr);
}

void KVPrefixCache::Impl::CutBackLease(Lease& lease, const Transfer& transfer) noexcept {
  // Recurrent state that could not be read is lost as a whole: there is no shallower snapshot that
  // this lease pins.
  const std::int32_t num_kept = HasState() ? 0 : transfer.begin_page;
  ReleaseResumedSnapshot(lease, /*is_used=*/false);
  MovePin(lease, *FindNodeEndingAt(*transfer.end_node, num_kept));
  CountPrivatePages(*lease.namespace_backptr_,
                    -(lease.tail_pages_.size() + lease.duplicate_pages_.size()));
  lease.tail_pages_ = {};
  lease.duplicate_pages_ = {};
  lease.pages_.resize(static_cast<std::size_t>(num_kept));
  lease.num_published_pages_ = num_kept;
  lease.num_cached_tokens_ = num_kept * options_.page_size;
  lease.num_host_cached_tokens_ = 0;
}

void KVPrefixCache::Impl::DropHostSubtree(Node& top) noexcept {
  NodePath nodes{&top};
  for (std::size_t next = 0; next < nodes.size(); ++next) {
    nodes[next]->children.ForEach([&nodes](Node& child) { nodes.push_back(&child); });
  }
  std::ranges::sort(nodes, [](const Node* a, const Node* b) {  // children before their parents
    return a->start_page != b->start_page ? a->start_page > b->start_page
                                          : a->sequence < b->sequence;
  });
  for (Node* const node : nodes) DropTail(*node, Tier::kHost, node->On(Tier::kHost).pages.size());
}

}  // namespace lora_serve
