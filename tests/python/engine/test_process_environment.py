"""The variables that the engine's process starts with."""

from __future__ import annotations

import os

import pytest

from lora_serve.engine.process_handle import make_environment


def test_engine_threads_sleep_and_leave_a_core_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))
    environment = make_environment()
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"
    assert environment["OMP_NUM_THREADS"] == "7"

    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0})
    assert make_environment()["OMP_NUM_THREADS"] == "1"

    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    environment = make_environment()
    assert (environment["OMP_WAIT_POLICY"], environment["OMP_NUM_THREADS"]) == ("ACTIVE", "3")
