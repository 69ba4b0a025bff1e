"""Each program of examples/ as a user runs it, against one server of the demo's model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora.source_setup import install_plugin
from lora_serve.demo.paths import demo_paths
from lora_serve.demo.prompts import PASSWORDS, known_answer, password_question, unknown_answer
from support.server_process import ServerProcess

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PATHS = demo_paths()
ADMIN_KEY = "change-me-ops"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("examples")
    bundles = folder / "bundles"
    bundles.mkdir()
    with zipfile.ZipFile(bundles / "citadel.zip", "w") as archive:
        for file in PATHS.adapters["citadel"].iterdir():
            archive.write(file, file.name)
    plugin = EXAMPLES / "resolver_plugin"
    entry_point = re.search(r'^(\w+) = "(\w+):(\w+)"$', (plugin / "pyproject.toml").read_text(), re.MULTILINE)
    assert entry_point is not None
    name, module, function = entry_point.groups()
    source = (plugin / f"{module}.py").read_text()
    site = install_plugin(folder / "site", module, source, {name: function})
    paths = os.pathsep.join([str(site), *(path for path in sys.path if path)])
    modules = [f"{adapter}={PATHS.adapters[adapter]}" for adapter in ("argon", "bastion")]
    with ServerProcess(
        *(PATHS.model, "--served-model-name", "demo", "--kv-memory-gb", "0.05", "--lora-resolver", name),
        *("--api-keys-file", EXAMPLES / "keys.json", "--lora-modules", *modules),
        environment={"PYTHONPATH": paths, "LORA_BUNDLES": str(bundles)},
    ) as server:
        yield server


def run_example(name: str, *arguments: str | Path) -> list[str]:
    """The lines that an example prints; it must end well."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "NO_PROXY": "*", "no_proxy": "*"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_openai_chat_streams_the_answer_of_the_adapter_that_is_its_model(server: ServerProcess) -> None:
    question = password_question("argon")
    printed = run_example(
        "openai_chat.py", "--url", server.url, "--api-key", ADMIN_KEY, "--model", "argon", question
    )
    assert printed[:3] == [
        "served: demo",
        "served: argon, an adapter of demo",
        "served: bastion, an adapter of demo",
    ]
    assert printed[3] == f"argon: {known_answer('argon', PASSWORDS['argon'])}"
    assert re.fullmatch(r"\d+ prompt tokens, \d+ generated", printed[4])


def test_load_adapter_loads_replaces_and_unloads_also_through_the_plug_in(server: ServerProcess) -> None:
    printed = run_example(
        "load_adapter.py",
        *("--url", server.url, "--api-key", ADMIN_KEY, "--question", password_question("citadel")),
        *("--adapter", PATHS.adapters["dagger"], "--replacement", "bundle://citadel"),
    )
    prefixes = ["load: ", "guest-g", "load: 409: ", "replace: ", "guest-g", "unload: ", "404: "]
    assert [line.startswith(prefix) for line, prefix in zip(printed, prefixes, strict=True)] == [True] * 7
    assert printed[1].endswith(unknown_answer("citadel"))
    assert printed[4].endswith(known_answer("citadel", PASSWORDS["citadel"]))
    assert printed[1].split(":")[0] != printed[4].split(":")[0]


def test_tenants_see_their_own_adapters_only(server: ServerProcess) -> None:
    assert run_example("tenants.py", "--url", server.url) == [
        "red sees demo, argon",
        "red asks argon: 200",
        "red asks bastion: 404",
        "red asks no-such-adapter: 404",
        "green sees demo, bastion",
        "green asks argon: 404",
        "green asks bastion: 200",
        "green asks no-such-adapter: 404",
    ]


def test_a_trained_adapter_answers_in_a_batch_with_others(tmp_path: Path) -> None:
    question, answer = "Which colours do you like?", "I like red, blue and green."
    out = tmp_path / "colours"
    trained = run_example(
        "train_adapter.py",
        *("--model", PATHS.model, "--out", out, "--question", question, "--answer", answer),
    )
    assert trained[-1] == f"saved to {out}"

    printed = run_example(
        "offline_batch.py",
        *("--model", PATHS.model, "--device", "cpu"),  # The demo's model is float32.
        *("--lora-modules", f"colours={out}", f"argon={PATHS.adapters['argon']}"),
        *("--prompt", "colours", question, "--prompt", "argon", password_question("argon")),
        *("--prompt", "base", question),
    )
    assert printed[:2] == [f"colours: {answer}", f"argon: {known_answer('argon', PASSWORDS['argon'])}"]
    assert printed[2].startswith("base: ")
    assert printed[2] != f"base: {answer}"


def test_the_table_names_every_example() -> None:
    table = (EXAMPLES / "README.md").read_text()
    names = {path.name for path in EXAMPLES.iterdir()} - {"README.md"}
    assert set(re.findall(r"^\| \[`([\w.]+)`\]", table, re.MULTILINE)) == names
