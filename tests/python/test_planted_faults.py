"""Every fault that `make soak` plants names one place in the sources, so that none goes stale unseen."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _scripts_can_be_imported(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")


@pytest.fixture
def planted_faults() -> ModuleType:
    return importlib.import_module("planted_faults")


@pytest.mark.parametrize(
    ("script", "folder"),
    [
        ("mutate_cache", "csrc/kv_prefix_cache"),
        ("mutate_scheduler", "csrc/scheduler"),
        ("mutate_lora_kernels", "python/lora_serve/kernels"),
    ],
)
def test_each_planted_fault_names_one_place_and_changes_it(planted_faults, script, folder):
    faults = importlib.import_module(script).FAULTS
    assert faults
    for fault in faults:
        planted_faults.read_source(ROOT / folder, fault, f"scripts/{script}.py")
        assert fault.replacement != fault.line


def test_each_fault_of_the_kernels_names_a_file_of_tests():
    faults = importlib.import_module("mutate_lora_kernels").FAULTS
    missing = {fault.tests for fault in faults if not (ROOT / "tests/python/kernels" / fault.tests).is_file()}
    assert not missing
