"""The demo server, and other people's clients as commands of an environment of their own."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lora_serve.demo.paths import DemoPaths, demo_paths
from lora_serve.demo.prompts import BASE_MODEL
from support.server_process import ServerProcess

CLIENTS_PYTHON = Path(__file__).parents[3] / ".venv-clients" / "bin" / "python"
CLIENT_TIMEOUT_S = 120.0
# Nothing outside this machine is asked, and no proxy for the loopback interface.
OFFLINE = {
    "DO_NOT_TRACK": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "LANGSMITH_TRACING": "false",
    "NO_PROXY": "*",
    "TRANSFORMERS_OFFLINE": "1",
    "no_proxy": "*",
}

RunClient = Callable[..., str]
"""Runs Python of the clients' environment with the given arguments; gives what it printed."""


@pytest.fixture(scope="session")
def clients_python() -> Path:
    """The clients' Python; where `make` has not made it, their tests have nothing to run."""
    if not CLIENTS_PYTHON.exists():
        reason = f"{CLIENTS_PYTHON} is missing; make it with 'make setup-clients'"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return CLIENTS_PYTHON


@pytest.fixture(scope="session")
def paths() -> DemoPaths:
    return demo_paths()


@pytest.fixture(scope="session")
def demo_server(clients_python: Path, paths: DemoPaths) -> Iterator[ServerProcess]:
    """The demo: its model and its four adapters; its tokenizer tells its settings."""
    modules = [f"{name}={path}" for name, path in paths.adapters.items()]
    with ServerProcess(
        *(paths.model, "--served-model-name", BASE_MODEL, "--kv-memory-gb", "0.25"),
        "--enable-tokenizer-info-endpoint",
        *("--lora-modules", *modules),
    ) as server:
        yield server


@pytest.fixture
def client_environment(tmp_path: Path) -> dict[str, str]:
    """What a client sees of ours: neither packages nor keys nor caches."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "LANG", "LORA_SERVE_", "OPENAI_", "PYTHON", "SCHEMATHESIS_"))
    }
    home = tmp_path / "home"
    home.mkdir()
    return {**kept, **OFFLINE, "HOME": str(home), "HF_HOME": str(home / "huggingface")}


@pytest.fixture
def run_client(clients_python: Path, client_environment: dict[str, str], tmp_path: Path) -> RunClient:
    """Runs a client to its end; a status other than 0 fails the test with what was printed."""

    def run(*arguments: str | Path, timeout_s: float = CLIENT_TIMEOUT_S, **environment: str) -> str:
        done = subprocess.run(
            [clients_python, *map(str, arguments)],
            cwd=tmp_path,
            env={**client_environment, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, f"{arguments} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
        return done.stdout

    return run
