#!/usr/bin/env python3
"""Plant single-line faults in the KV prefix cache, one at a time, and see the tests find each.

A test suite that passes says little until it has been seen to fail. Every fault below is built in
a copy of the sources and must make ``kv_prefix_cache_test`` fail. Exit status 1 when one survives.

    scripts/mutate_cache.py                # all faults; several minutes
    scripts/mutate_cache.py --only 3 17    # some of them
    scripts/mutate_cache.py --list
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("csrc", "tests/cpp", "benchmarks/scheduler_sim", "CMakeLists.txt", "CMakePresets.json")
CACHE = Path("csrc/kv_prefix_cache")
TARGET = "kv_prefix_cache_test"


@dataclass(frozen=True)
class Fault:
    """One line of one file, and what it is replaced by."""

    file: str
    line: str
    replacement: str


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
    Fault("cache_write_policy.cc", "if (TryWriteBack(*leaf) == WriteBackStart::kNoRoom) return;", ""),
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


def build(tree: Path, cmake: str) -> subprocess.CompletedProcess[str]:
    """Bring the test program in ``tree`` up to date."""
    return subprocess.run(
        [cmake, "--build", str(tree / "build"), "--target", TARGET, "-j", str(os.cpu_count() or 1)],
        capture_output=True,
        text=True,
        check=False,
    )


def run_tests(tree: Path, num_operations: int, timeout_s: float) -> str:
    """Return what failed first; empty when all tests passed."""
    environment = {**os.environ, "LORA_SERVE_TEST_OPERATIONS": str(num_operations)}
    command = [str(tree / "build/tests/cpp" / TARGET), "--gtest_fail_fast", "--gtest_brief=1"]
    try:
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return f"did not end within {timeout_s:.0f} s"
    if result.returncode == 0:
        return ""
    lines = [line for line in result.stdout.splitlines() if line.startswith("[  FAILED  ]")]
    return lines[0].removeprefix("[  FAILED  ] ") if lines else f"exit status {result.returncode}"


def check_fault(tree: Path, cmake: str, fault: Fault, arguments: argparse.Namespace) -> str:
    """Plant the fault, build, test, repair; return the name of the test that failed, or ''."""
    path = tree / CACHE / fault.file
    source = path.read_text()
    if source.count(fault.line) != 1:
        raise SystemExit(
            f"{fault.file}: found {source.count(fault.line)} places that read {fault.line!r}, "
            "expected 1; bring the fault in scripts/mutate_cache.py up to date"
        )
    path.write_text(source.replace(fault.line, fault.replacement))
    try:
        built = build(tree, cmake)
        if built.returncode != 0:
            raise SystemExit(f"{fault.file}: {fault.replacement!r} does not compile:\n{built.stdout[-3000:]}")
        return run_tests(tree, arguments.operations, arguments.timeout)
    finally:
        path.write_text(source)


def main() -> int:
    """Check all faults and print one line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print the faults and stop")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of the faults to check")
    parser.add_argument("--operations", type=int, default=30_000, help="of each random test")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one run of the tests")
    parser.add_argument("--tree", type=Path, default=ROOT / "build/mutants", help="where to build")
    parser.add_argument("--cmake", default=shutil.which("cmake") or str(ROOT / ".venv/bin/cmake"))
    arguments = parser.parse_args()
    numbers = arguments.only or range(1, len(FAULTS) + 1)
    if arguments.list:
        for number in numbers:
            fault = FAULTS[number - 1]
            print(f"{number:3} {fault.file}: {fault.line} -> {fault.replacement or 'nothing'}")
        return 0

    tree: Path = arguments.tree
    for name in SOURCES:
        source, copy = ROOT / name, tree / name
        if source.is_dir():
            shutil.rmtree(copy, ignore_errors=True)
            # With new times: what an earlier run built of its last fault must not pass for up to date.
            shutil.copytree(source, copy, copy_function=shutil.copy)
        else:
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, copy)
    # A fault may leave a variable unused: that is not what is to be found.
    lists = tree / "CMakeLists.txt"
    lists.write_text(lists.read_text().replace(" -Werror", ""))
    options = ["-DLORA_SERVE_BUILD_TESTS=ON", "-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-O1"]
    subprocess.run(
        [arguments.cmake, "-S", str(tree), "-B", str(tree / "build"), *options],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    if build(tree, arguments.cmake).returncode != 0 or run_tests(
        tree, arguments.operations, arguments.timeout
    ):
        raise SystemExit("the tests do not build and pass without a fault; nothing can be learned")

    survivors = []
    for number in numbers:
        start = time.monotonic()
        killer = check_fault(tree, arguments.cmake, FAULTS[number - 1], arguments)
        verdict = f"killed by {killer}" if killer else "SURVIVED"
        print(
            f"{number:3} {FAULTS[number - 1].file}: {verdict} ({time.monotonic() - start:.0f} s)", flush=True
        )
        if not killer:
            survivors.append(number)
    print(f"{len(numbers) - len(survivors)} of {len(numbers)} faults killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
