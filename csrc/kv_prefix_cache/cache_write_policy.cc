#include <utility>

#include "kv_prefix_cache/kv_prefix_cache_impl.h"

// Which paths are written back when nobody asked for them (WritePolicy).

namespace lora_serve {

void KVPrefixCache::Impl::PlanWriteBacks() {
  if (!HasHostTier()) return;
  switch (options_.write_policy) {
    case WritePolicy::kOff:
      return;
    case WritePolicy::kWriteThrough:
      return WriteThroughNotes();
    case WritePolicy::kWriteBack:
      return WriteBackAhead();
  }
}

// --- Write through -----------------------------------------------------------------------------

void KVPrefixCache::Impl::NoteForWriteThrough(Node& node) {
  if (!HasHostTier() || options_.write_policy != WritePolicy::kWriteThrough) return;
  // One note for the whole path: its copy covers every shorter one.
  for (Node* part = &node; part != nullptr; part = part->parent_backptr) ForgetNote(*part);
  node.write_back_note = next_note_++;
  notes_.emplace(node.write_back_note, &node);
}

void KVPrefixCache::Impl::ForgetNote(Node& node) noexcept {
  const std::int64_t note = std::exchange(node.write_back_note, 0);
  if (note != 0) notes_.erase(note);
}

void KVPrefixCache::Impl::WriteThroughNotes() {
  const std::vector<std::pair<std::int64_t, Node*>> notes(notes_.begin(), notes_.end());
  for (const auto& [note, node] : notes) {
    // A path on which a copy is under way waits for its end; what finds no room is given up.
    if (TryWriteBack(*node) != WriteBackStart::kBlocked) ForgetNote(*node);
  }
}

// --- Write back ahead of need ------------------------------------------------------------------

void KVPrefixCache::Impl::WriteBackAhead() {
  // Counts the pages that eviction could take next without losing anything, and writes back the
  // leaves among them that the host lacks: a page that is being copied is not free yet, so the
  // copies must start before the room is needed.
  std::int64_t num_safe_pages = Pool(Component::kFullAttention, Tier::kDevice).num_free_pages() +
                                num_pages_being_written_back_;
  NodePath chosen;
  if (num_safe_pages >= options_.write_back_watermark_pages) return;
  PagePolicy(Tier::kDevice).ForEachVictim([&](Node& leaf) {
    if (num_safe_pages >= options_.write_back_watermark_pages) return false;
    if (leaf.On(Tier::kDevice).is_listed_as_backed) {
      num_safe_pages += CountRunPages(leaf);
      return true;
    }
    const MatchedPath path = CoverPathTo(leaf);
    const TierCoverage& host = path.On(Tier::kHost);
    if (host.num_covered > host.num_present) return true;
    num_safe_pages += path.On(Tier::kDevice).num_present - host.num_covered;
    chosen.push_back(&leaf);
    return true;
  });
  // Not in place of copies that count already, or of those that would be chosen next: a host that
  // holds fewer pages than the watermark asks for would be written for ever.
  for (Node* const leaf : chosen) {
    if (TryWriteBack(*leaf, HostRoom::kNotOfVictims) == WriteBackStart::kNoRoom) return;
  }
}

std::int64_t KVPrefixCache::Impl::CountRunPages(const Node& leaf) const {
  std::int64_t num_pages = leaf.On(Tier::kDevice).pages.size();
  for (const Node* node = leaf.parent_backptr; !node->IsRoot(); node = node->parent_backptr) {
    const Residency& held = node->On(Tier::kDevice);
    if (held.num_pins > 0 || held.num_continuations > 1) break;
    num_pages += held.pages.size();
  }
  return num_pages;
}

}  // namespace lora_serve
