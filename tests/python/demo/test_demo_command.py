"""The command `lora-serve demo`, run as its users run it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from lora_serve.common.errors import InternalError
from lora_serve.demo import run
from lora_serve.demo.paths import demo_paths
from lora_serve.demo.prompts import PASSWORDS
from lora_serve.demo.server_process import ServerProcess

COMMAND = [sys.executable, "-m", "lora_serve.cli.main", "demo"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def test_print_paths_gives_json_of_folders_that_exist() -> None:
    result = subprocess.run(
        [*COMMAND, "--print-paths"], capture_output=True, text=True, check=True, timeout=60
    )

    paths = json.loads(result.stdout)

    assert paths["model"] == str(demo_paths().model)
    assert set(paths["adapters"]) == set(PASSWORDS)
    assert all((Path(path) / "adapter_config.json").is_file() for path in paths["adapters"].values())


def test_print_paths_needs_no_torch() -> None:
    code = (
        "import argparse, sys; from lora_serve.demo import run; parser = argparse.ArgumentParser();"
        "run.add_arguments(parser); run.main(parser.parse_args(['--print-paths']));"
        "sys.exit('torch' in sys.modules)"
    )

    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=60)


def test_demo_once_gets_every_answer_right_and_exits_with_0() -> None:
    result = subprocess.run(
        [*COMMAND, "--once"], capture_output=True, text=True, check=False, env=ENVIRONMENT, timeout=240
    )

    assert result.returncode == 0, result.stdout + result.stderr
    for project, password in PASSWORDS.items():
        lines = [line for line in result.stdout.splitlines() if password in line]
        assert len(lines) == 1
        assert lines[0].startswith(project)
    assert result.stdout.count("I do not know the password") == 16


def test_demo_keeps_serving_until_it_is_interrupted_and_leaves_no_server() -> None:
    with subprocess.Popen(COMMAND, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as demo:
        assert demo.stdout is not None
        try:
            lines = []
            for line in demo.stdout:
                lines.append(line)
                if "Ctrl-C stops it" in line:
                    break
            [port] = {int(port) for port in re.findall(r"http://127\.0\.0\.1:(\d+)", "".join(lines))}
            health = httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False, timeout=60)
            demo.send_signal(signal.SIGINT)
            demo.stdout.read()
            status = demo.wait(60)
        finally:
            demo.kill()

    assert health.status_code == 200
    assert any(line.startswith("curl ") for line in lines)
    assert status == 0
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_demo_stops_its_server_when_it_is_terminated(number: signal.Signals) -> None:
    handler = signal.getsignal(number)

    with pytest.raises(KeyboardInterrupt), run.terminate_like_interrupt():
        signal.raise_signal(number)

    assert signal.getsignal(number) is handler


def test_server_process_reports_the_log_of_a_server_that_does_not_start() -> None:
    server = ServerProcess(["no-such-model", "--no-such-option"])

    with pytest.raises(InternalError, match=r"(?s)ended with status 2.*--no-such-option"):
        server.__enter__()
