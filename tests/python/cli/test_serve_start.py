"""Starts that fail, in a process of their own: a clear line, exit status 1, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from lora_serve.testing.adapters import make_random_adapter
from lora_serve.testing.bad_adapters import BAD_ADAPTERS
from support.tiny_checkpoint import make_tiny_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_checkpoint(tmp_path_factory.mktemp("start") / "model")


def command(*arguments):
    serve = [sys.executable, "-m", "lora_serve.cli.main", "serve", "--device", "cpu"]
    return [*serve, *map(str, arguments), "--port", "0"]


def environment():
    paths = os.pathsep.join(path for path in sys.path if path)
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}


def run(*arguments):
    done = subprocess.run(
        command(*arguments), env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    return done


def test_missing_model_is_named(tmp_path):
    done = run(tmp_path / "nothing")
    assert done.returncode == 1
    assert "lora-serve: error: " in done.stderr
    assert str(tmp_path / "nothing") in done.stderr


def test_refused_adapter_is_named_with_the_reason(model, tmp_path):
    bad = make_random_adapter(tmp_path / "bad", model)
    BAD_ADAPTERS["dora"].corrupt(bad)
    done = run(model, "--lora-modules", f"broken={bad}")
    assert done.returncode == 1
    assert "adapter 'broken' cannot be loaded" in done.stderr
    assert "DoRA" in done.stderr
    assert "serving" not in done.stdout


def test_signal_while_starting_ends_both_processes(model):
    process = subprocess.Popen(
        command(model),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not (engines := children_of(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engines
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in printed
    assert not any(is_running(pid) for pid in engines)


def children_of(pid):
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return [int(child) for child in file.read().split()]
    except FileNotFoundError:
        return []


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
