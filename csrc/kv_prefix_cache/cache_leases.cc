#include <algorithm>
#include <iterator>
#include <utility>

#include "common/check.h"
#include "kv_prefix_cache/kv_prefix_cache_impl.h"

// Requests: what they could resume from, and the pages they use from Acquire to the lease's end.

namespace lora_serve {

// --- Lookup ------------------------------------------------------------------------------------

KVPrefixCache::Impl::ResumePoint KVPrefixCache::Impl::FindResumePoint(
    const Namespace& ns, std::span<const TokenId> tokens, MatchIntent intent) const {
  ResumePoint point;
  point.path = Cover(ns.tree().Match(ns.tree().root(), tokens), HasHostTier());
  const TierCoverage& device = point.path.On(Tier::kDevice);
  if (intent == MatchIntent::kPrefixReuse && !options_.enable_prefix_reuse) return point;
  point.num_pages = matchers_.DeepestBoundary(point.path, point.path.match.num_pages);
  point.num_device_pages = std::min(point.num_pages, device.num_present);
  if (HasState() && point.num_pages > 0) {
    point.snapshot_node = FindNodeEndingAt(*point.path.match.node, point.num_pages);
  }
  const bool waits_for_pages =
      point.num_pages > device.num_present && device.num_covered > device.num_present;
  const bool waits_for_snapshot = point.snapshot_node != nullptr &&
                                  point.snapshot_node->Snapshot(Tier::kDevice).num_in_flight > 0;
  point.is_in_flight = waits_for_pages || waits_for_snapshot;
  return point;
}

ProbeResult KVPrefixCache::Impl::Probe(const Namespace& ns, std::span<const TokenId> tokens,
                                       MatchIntent intent) const {
  const ResumePoint point = FindResumePoint(ns, tokens, intent);
  const std::int32_t num_device = point.path.On(Tier::kDevice).num_present;
  const std::int32_t num_host = point.path.On(Tier::kHost).num_present;
  return {.num_device_tokens = num_device * options_.page_size,
          .num_host_tokens = std::max(0, num_host - num_device) * options_.page_size,
          .num_resumable_tokens = point.num_pages * options_.page_size,
          .is_in_flight = point.is_in_flight};
}

void KVPrefixCache::Impl::RefreshHint(PrefixHint& hint) const {
  const Namespace* const ns = FindNamespace(hint.namespace_id);
  if (ns == nullptr) {
    hint.version = 0;
    hint.num_resumable_tokens = 0;
  } else if (hint.version != ns->version()) {
    hint.version = ns->version();
    hint.num_resumable_tokens =
        Probe(*ns, hint.tokens, MatchIntent::kPrefixReuse).num_resumable_tokens;
  }
}

// --- Acquire -----------------------------------------------------------------------------------

AcquireResult KVPrefixCache::Impl::Acquire(Namespace& ns, std::span<const TokenId> tokens,
                                           const AcquireOptions& options) {
  const ResumePoint point = FindResumePoint(
      ns, tokens.first(static_cast<std::size_t>(options.max_cached_tokens)), options.intent);
  if (point.is_in_flight) return {.outcome = AcquireOutcome::kInFlight, .lease = {}};
  const std::int32_t num_loaded_pages = point.num_pages - point.num_device_pages;
  const std::int32_t num_new_pages =
      std::max(NumPagesFor(options.num_capacity_tokens, options_.page_size), point.num_pages) -
      point.num_device_pages;
  if (!HasRoomFor(point, num_new_pages)) return {.outcome = AcquireOutcome::kNoRoom, .lease = {}};

  //   pages: [ on the device | to be loaded back | private, to be computed ]
  //          0        num_device_pages       num_pages          capacity
  const bool needs_load_back = point.NeedsLoadBack();
  const bool copies_snapshot = point.NeedsSnapshotCopy();
  Node& end = NodeEndingAt(*point.path.match.node, point.num_pages);
  Node& device_end = NodeEndingAt(end, point.num_device_pages);
  // From here on the lease undoes everything when it dies. It pins first: the eviction that makes
  // room must not take the prefix that was just found.
  AcquireResult result{.outcome = AcquireOutcome::kAcquired, .lease = {}};
  Lease& lease = result.lease;
  lease.namespace_backptr_ = &ns;
  ns.AddLease();
  lease.pinned_node_ = &device_end;
  PagePolicy(Tier::kDevice).Pin(device_end);
  lease.num_published_pages_ = point.num_pages;
  lease.num_cached_tokens_ = point.num_pages * options_.page_size;
  lease.num_host_cached_tokens_ = num_loaded_pages * options_.page_size;
  if (HasState()) {
    const std::int32_t num_matched_pages = point.path.match.num_pages;
    if (num_matched_pages > point.num_pages) {
      lease.branching_tokens_ = num_matched_pages * options_.page_size;
    }
    if (point.snapshot_node != nullptr) PinResumedSnapshot(lease, *point.snapshot_node);
  }
  OwnedPages loaded = Allocate(Component::kFullAttention, Tier::kDevice, num_loaded_pages);
  OwnedPages tail =
      Allocate(Component::kFullAttention, Tier::kDevice, num_new_pages - num_loaded_pages);
  for (Node* const node : PathBetween(device_end, end)) {
    GainPages(*node, Tier::kDevice, loaded.TakeFront(node->num_pages), /*in_flight=*/true);
  }
  MovePin(lease, end);
  for (const Node* const node : PathBetween(ns.tree().root(), end)) {
    const auto ids = node->On(Tier::kDevice).pages.ids();
    lease.pages_.insert(lease.pages_.end(), ids.begin(), ids.end());
  }
  AddPrivatePages(lease, std::move(tail));
  // Slots after pages: the eviction of pages may have freed some.
  if (HasState()) lease.state_.working_slot = Allocate(Component::kState, Tier::kDevice, 1);
  if (needs_load_back) StartLoadBack(lease, end, point.num_device_pages, copies_snapshot);
  if (options.intent == MatchIntent::kPrefixReuse) {
    ns.counts().hit_tokens += lease.num_cached_tokens_;
    ns.counts().missed_tokens += std::ssize(tokens) - lease.num_cached_tokens_;
  }
  return result;
}

bool KVPrefixCache::Impl::HasRoomFor(const ResumePoint& point, std::int32_t num_new_pages) const {
  if (HasState()) {
    const std::int64_t num_slots = point.NeedsSnapshotCopy() ? 2 : 1;
    if (num_slots > NumAvailableSlots(Tier::kDevice, point.snapshot_node)) return false;
  }
  const Node& kept = NodeReaching(*point.path.match.node, point.num_device_pages);
  return CanAllocate(num_new_pages,
                     {.node = &kept, .num_edge_pages = point.num_device_pages - kept.start_page});
}

bool KVPrefixCache::Impl::Extend(Lease& lease, std::int32_t num_capacity_tokens) {
  const auto num_pages = static_cast<std::int32_t>(lease.pages_.size());
  const std::int32_t num_new_pages =
      NumPagesFor(num_capacity_tokens, options_.page_size) - num_pages;
  if (num_new_pages <= 0) return true;
  if (!CanAllocate(num_new_pages, {})) return false;
  AddPrivatePages(lease, Allocate(Component::kFullAttention, Tier::kDevice, num_new_pages));
  return true;
}

void KVPrefixCache::Impl::AddPrivatePages(Lease& lease, OwnedPages pages) {
  CountPrivatePages(*lease.namespace_backptr_, pages.size());
  lease.pages_.insert(lease.pages_.end(), pages.ids().begin(), pages.ids().end());
  lease.tail_pages_.Append(std::move(pages));
}

// --- Publish -----------------------------------------------------------------------------------

void KVPrefixCache::Impl::Publish(Lease& lease, std::span<const TokenId> tokens) {
  const std::size_t num_full_pages = tokens.size() / NumTokens(1);
  LS_CHECK(num_full_pages <= lease.pages_.size(), "Publish got ", tokens.size(),
           " computed tokens for a lease of ", lease.pages_.size(), " pages");
  ReleaseResumedSnapshot(lease, /*is_used=*/true);
  if (lease.namespace_backptr_->IsDraining()) {  // all goes back to the pools with the lease
    ContinueDrain(*lease.namespace_backptr_);
    return;
  }
  const auto num_published = static_cast<std::size_t>(lease.num_published_pages_);
  LS_DCHECK(num_published == 0 || num_full_pages < num_published ||
                std::ranges::equal(tokens.subspan((num_published - 1) * NumTokens(1), NumTokens(1)),
                                   std::span(lease.pinned_node_->tokens).last(NumTokens(1))),
            "Publish got another sequence than the one published so far");
  const std::int32_t num_private_before = lease.tail_pages_.size() + lease.duplicate_pages_.size();
  if (num_full_pages > num_published) {
    PublishPages(lease, tokens.subspan(num_published * NumTokens(1),
                                       (num_full_pages - num_published) * NumTokens(1)));
  }
  const std::int32_t num_private = lease.tail_pages_.size() + lease.duplicate_pages_.size();
  const bool has_attached = AttachReservedSnapshot(lease);
  if (num_private < num_private_before || has_attached) NoteForWriteThrough(*lease.pinned_node_);
}

void KVPrefixCache::Impl::PublishPages(Lease& lease, std::span<const TokenId> tokens) {
  //   tokens = [ twins             | host only        | new                ]
  //              the tree keeps its  the tree takes     the tree gets nodes
  //              page, the lease     the lease's page   with the lease's
  //              its own                                pages
  //   A page in flight to the device ends it before the second part.
  Namespace& ns = *lease.namespace_backptr_;
  Node& from = *lease.pinned_node_;
  const MatchedPath path = Cover(ns.tree().Match(from, tokens), /*has_host_tier=*/false);
  const TierCoverage& device = path.On(Tier::kDevice);
  const std::int32_t num_twins = device.num_present - lease.num_published_pages_;
  if (num_twins > 0) {
    MovePin(lease, NodeEndingAt(*path.match.node, device.num_present));
    lease.duplicate_pages_.Append(lease.tail_pages_.TakeFront(num_twins));
    lease.num_published_pages_ += num_twins;
  }
  if (device.num_covered > device.num_present) return;
  if (path.match.num_pages > num_twins) {
    AdoptPages(lease, NodeEndingAt(*path.match.node, from.end_page() + path.match.num_pages));
  }
  const auto rest = tokens.subspan(NumTokens(path.match.num_pages));
  if (!rest.empty()) InsertBelowPin(lease, rest);
}

void KVPrefixCache::Impl::AdoptPages(Lease& lease, Node& end) {
  Namespace& ns = *lease.namespace_backptr_;
  for (Node* const node : PathBetween(*lease.pinned_node_, end)) {
    CountPrivatePages(ns, -node->num_pages);
    lease.num_published_pages_ += node->num_pages;
    GainPages(*node, Tier::kDevice, lease.tail_pages_.TakeFront(node->num_pages),
              /*in_flight=*/false);
  }
  MovePin(lease, end);
}

void KVPrefixCache::Impl::InsertBelowPin(Lease& lease, std::span<const TokenId> tokens) {
  Namespace& ns = *lease.namespace_backptr_;
  Node& parent = *lease.pinned_node_;
  const auto num_pages = static_cast<std::int32_t>(tokens.size() / NumTokens(1));
  OwnedPages pages = lease.tail_pages_.TakeFront(num_pages);
  CountPrivatePages(ns, -num_pages);
  lease.num_published_pages_ += num_pages;
  if (CanGrowInPlace(parent)) {  // a decoding request grows one edge, not a chain
    ns.tree().ExtendLeaf(parent, tokens);
    events_.EdgeChanged(parent);
    GainPages(parent, Tier::kDevice, std::move(pages), /*in_flight=*/false);
    return;
  }
  Node& child = ns.tree().AddChild(parent, tokens);
  events_.EdgeChanged(child);
  GainPages(child, Tier::kDevice, std::move(pages), /*in_flight=*/false);
  MovePin(lease, child);
}

bool KVPrefixCache::Impl::CanGrowInPlace(const Node& node) {
  // What stands at the end of the edge would move: the pin of another lease or of a transfer
  // (every transfer pins the device), a snapshot.
  if (node.IsRoot() || !node.children.IsEmpty() || node.On(Tier::kDevice).num_pins != 1) {
    return false;
  }
  return std::ranges::all_of(kTiers,
                             [&node](Tier tier) { return node.Snapshot(tier).pages.IsEmpty(); });
}

// --- The end -----------------------------------------------------------------------------------

void KVPrefixCache::Impl::ReleaseLease(Lease& lease) noexcept {
  Namespace& ns = *lease.namespace_backptr_;
  if (lease.loading_ != nullptr) lease.loading_->lease = nullptr;
  ReleaseResumedSnapshot(lease, /*is_used=*/true);
  lease.state_.working_slot = {};
  lease.state_.reserved_slot = {};
  CountPrivatePages(ns, -(lease.tail_pages_.size() + lease.duplicate_pages_.size()));
  lease.tail_pages_ = {};
  lease.duplicate_pages_ = {};
  // In use until now, on both tiers; what pins protected needed no age.
  Node& node = *lease.pinned_node_;
  const Epoch now = Tick();
  TouchPath(node, Tier::kDevice, now);
  if (HasHostTier()) TouchPath(node, Tier::kHost, now);
  PagePolicy(Tier::kDevice).Unpin(node);
  ns.RemoveLease();
  ContinueDrain(ns);
}

// --- Paths -------------------------------------------------------------------------------------

Node& KVPrefixCache::Impl::NodeEndingAt(Node& node, std::int32_t num_pages) {
  Node& found = NodeReaching(node, num_pages);
  if (found.end_page() == num_pages) return found;
  policies_.Unlist(found);
  Node& upper = found.namespace_backptr->tree().Split(found, num_pages - found.start_page);
  policies_.Refresh(found);
  policies_.Refresh(upper);  // a leaf of a tier that holds nothing of the lower half
  events_.EdgeChanged(upper);
  return upper;
}

KVPrefixCache::Impl::NodePath KVPrefixCache::Impl::PathBetween(const Node& from, Node& to) {
  NodePath path;
  for (Node* node = &to; node != &from; node = node->parent_backptr) path.push_back(node);
  std::ranges::reverse(path);
  return path;
}

void KVPrefixCache::Impl::MovePin(Lease& lease, Node& node) noexcept {
  Node& previous = *std::exchange(lease.pinned_node_, &node);
  PagePolicy(Tier::kDevice).Pin(node);
  PagePolicy(Tier::kDevice).Unpin(previous);
}

void KVPrefixCache::Impl::CountPrivatePages(Namespace& ns, std::int64_t delta) noexcept {
  ns.counts().private_pages += delta;
  num_private_pages_ += delta;
}

std::size_t KVPrefixCache::Impl::NumTokens(std::int32_t num_pages) const {
  return static_cast<std::size_t>(num_pages) * static_cast<std::size_t>(options_.page_size);
}

}  // namespace lora_serve
