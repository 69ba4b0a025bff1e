"""Every fault that `make soak` plants names one place in the sources, so that none goes stale unseen."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("script", "folder"),
    [
        ("mutate_cache", "csrc/kv_prefix_cache"),
        ("mutate_scheduler", "csrc/scheduler"),
        ("mutate_lora_kernels", "python/lora_serve/kernels"),
    ],
)
def test_each_planted_fault_names_one_place_and_changes_it(script, folder, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
    faults = importlib.import_module(script).FAULTS
    assert faults
    stale = [
        f"{number} {fault.file}: {fault.line!r}"
        for number, fault in enumerate(faults, 1)
        if (ROOT / folder / fault.file).read_text().count(fault.line) != 1 or fault.replacement == fault.line
    ]
    assert not stale, f"bring these of scripts/{script}.py up to date: {stale}"


def test_each_fault_of_the_kernels_names_a_file_of_tests(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
    faults = importlib.import_module("mutate_lora_kernels").FAULTS
    missing = {fault.tests for fault in faults if not (ROOT / "tests/python/kernels" / fault.tests).is_file()}
    assert not missing
