#!/usr/bin/env python3
"""Plant single-line faults in the KV prefix cache, one at a time, and see the tests find each.

Every fault below is built in a copy of the sources and must make ``kv_prefix_cache_test`` fail.
Exit status 1 when one survives.

    scripts/mutate_cache.py                # all faults; several minutes
    scripts/mutate_cache.py --only 3 17    # some of them
    scripts/mutate_cache.py --list
"""

from __future__ import annotations

import sys

from planted_faults import Campaign, Fault, main

FAULTS = (
    # what the tiers hold
    Fault("cache_residency.cc", "++parent.On(tier).num_continuations;", ""),
    Fault("cache_residency.cc", "--parent.On(tier).num_continuations;", ""),
    Fault(
        "cache_residency.cc",
        "parent.On(tier).epoch = std::max(parent.On(tier).epoch, held.epoch);",
        "",
    ),
    Fault("cache_residency.cc", "held.num_in_flight = in_flight ? num_gained : 0;", ""),
    Fault("cache_residency.cc", "if (tier == Tier::kDevice) ForgetNote(node);", ""),
    Fault(
        "cache_residency.cc",
        "for (const Tier tier : kTiers) DropSnapshot(node, tier);  // its tokens are known no more",
        "",
    ),
    Fault(
        "cache_residency.cc",
        "if (was_over_quota != (ns.NumPagesOverQuota(tier) > 0)) policies_.RerankNamespace(ns);",
        "",
    ),
    Fault("cache_residency.cc", "num_listed -= kept.num_edge_pages;", ""),
    Fault(
        "cache_residency.cc",
        "Touch(DeepestNodeOn(tier, end), Component::kFullAttention, tier, epoch);",
        "Touch(end, Component::kFullAttention, tier, epoch);",
    ),
    # requests
    Fault("cache_leases.cc", "if (point.is_in_flight) return", "if (false) return"),
    Fault(
        "cache_leases.cc",
        "const std::int64_t num_slots = point.NeedsSnapshotCopy() ? 2 : 1;",
        "const std::int64_t num_slots = 1;",
    ),
    Fault("cache_leases.cc", "if (device.num_covered > device.num_present) return;", ""),
    Fault("cache_leases.cc", "|| node.On(Tier::kDevice).num_pins != 1)", ")"),
    Fault(
        "cache_leases.cc",
        "return node.Snapshot(tier).pages.IsEmpty();",
        "return tier == tier || node.IsRoot();",
    ),
    Fault("cache_leases.cc", "if (HasHostTier()) TouchPath(node, Tier::kHost, now);", ""),
    Fault(
        "cache_leases.cc",
        "policies_.Refresh(upper);  // a leaf of a tier that holds nothing of the lower half",
        "",
    ),
    Fault("cache_leases.cc", "if (lease.loading_ != nullptr) lease.loading_->lease = nullptr;", ""),
    Fault("cache_leases.cc", "hint.version = ns->version();", "hint.version = 1;"),
    # recurrent state
    Fault(
        "cache_state.cc",
        "state.reserved_page > lease.num_published_pages_",
        "state.reserved_page >= lease.num_published_pages_",
    ),
    Fault("cache_state.cc", "const Epoch now = Tick();", "const Epoch now = clock_;"),
    Fault("cache_state.cc", "- (keeps_listed ? 1 : 0)", ""),
    Fault("cache_state.cc", "> options_.max_snapshots_per_lease", "> options_.max_snapshots_per_lease + 1"),
    # copies
    Fault(
        "cache_transfers.cc",
        "if (host.num_covered > host.num_present) return WriteBackStart::kBlocked;",
        "",
    ),
    Fault("cache_transfers.cc", "std::max(0, transfer.begin_page - node->start_page)", "0"),
    Fault("cache_transfers.cc", "if (is_load_back) DropSnapshot(*node, Tier::kHost);", ""),
    Fault("cache_transfers.cc", "if (is_load_back && top != nullptr) DropHostSubtree(*top);", ""),
    Fault("cache_transfers.cc", "if (transfer.lease != nullptr) transfer.lease->loading_ = nullptr;", ""),
    Fault("cache_transfers.cc", "lease.pages_.resize(static_cast<std::size_t>(num_kept));", ""),
    Fault("cache_transfers.cc", "return tier == Tier::kDevice || transfer.num_pages() > 0;", "return true;"),
    Fault("cache_transfers.cc", "num_pages_being_written_back_ += num_pages;", ""),
    # which write-backs
    Fault(
        "cache_write_policy.cc",
        "for (Node* part = &node; part != nullptr; part = part->parent_backptr) ForgetNote(*part);",
        "ForgetNote(node);",
    ),
    Fault("cache_write_policy.cc", "if (host.num_covered > host.num_present) return true;", ""),
    Fault("cache_write_policy.cc", "held.num_pins > 0 || held.num_continuations > 1", "held.num_pins > 0"),
    Fault(
        "cache_write_policy.cc",
        "if (TryWriteBack(*leaf, HostRoom::kNotOfVictims) == WriteBackStart::kNoRoom) return;",
        "TryWriteBack(*leaf, HostRoom::kNotOfVictims);",
    ),
    # structure, policy, matching
    Fault(
        "radix_tree.cc",
        "upper.num_in_flight = std::max(0, upper.pages.size() - num_present);",
        "upper.num_in_flight = 0;",
    ),
    Fault("radix_tree.cc", "upper.epoch = lower.epoch;", ""),
    Fault(
        "eviction_policy.cc",
        ".is_unbacked = !Held(*leaf.item).is_listed_as_backed,",
        ".is_unbacked = true,",
    ),
    Fault(
        "eviction_policy.cc",
        "if (num_over_quota > 0) num_pages = std::min(num_pages, num_over_quota);",
        "",
    ),
    Fault("child_map.cc", "if (distance < ((next - index) & mask())) continue;", ""),
    Fault("child_map.cc", "if (distance < ((next - index) & mask())) continue;", "break;"),
    # pages on pinned paths
    Fault("pinned_paths.h", "if (IsOnCountedPath(node)) num_pages_ += delta;", ""),
    Fault("pinned_paths.cc", "++Held(*at).num_counted_children;", ""),
    Fault("pinned_paths.cc", "if (!Held(node).is_pin_counted) return;", "return;"),
    Fault("pinned_paths.cc", "if (Held(noted).is_pin_counted) continue;", ""),
    Fault("radix_tree.cc", "upper.num_counted_children = lower.IsOnCountedPath() ? 1 : 0;", ""),
    Fault("kv_prefix_cache_impl.cc", "policies_.Forget(ns.tree().root());", ""),
    Fault("leaf_list.h", "kAgeBucketEpochs = 64;", "kAgeBucketEpochs = 32;"),
    Fault(
        "matcher.cc",
        "if (node->Snapshot(tier).num_present() > 0)",
        "if (!node->Snapshot(tier).pages.IsEmpty())",
    ),
    # namespaces, events
    Fault("namespace.h", "&& num_transfers_ == 0;", ";"),
    Fault("kv_prefix_cache_impl.cc", "LogWholeNamespace(ns, KVEventKind::kRemoved);", ""),
    Fault(
        "event_log.cc",
        "events_.push_back(std::move(event));",
        "if (first_page == 0) events_.push_back(event);",
    ),
)

CAMPAIGN = Campaign(
    folder="csrc/kv_prefix_cache",
    target="kv_prefix_cache_test",
    script="scripts/mutate_cache.py",
    faults=FAULTS,
    environment={"LORA_SERVE_TEST_OPERATIONS": "30000"},
)

if __name__ == "__main__":
    sys.exit(main(CAMPAIGN, __doc__.splitlines()[0]))
