"""schemathesis finds nothing in the server's own OpenAPI schema that the server does not keep to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_serve.demo.prompts import BASE_MODEL
from support.server_process import ServerProcess

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "missing_required_header",
    "unsupported_method",
    "allow_header_conformance",
)
SEED = 8
HOOKS_PATH = str(Path(__file__).parent)


@pytest.fixture(scope="module")
def server(clients_python, paths) -> Iterator[ServerProcess]:
    """A server of its own, whose adapters may go; the context is short, so that every answer is."""
    modules = [f"{name}={path}" for name, path in paths.adapters.items()]
    with ServerProcess(
        *(paths.model, "--served-model-name", BASE_MODEL, "--kv-memory-gb", "0.05"),
        *("--max-model-len", "64", "--max-answers-per-request", "8", "--lora-modules", *modules),
    ) as server:
        yield server
        with server.http() as http:
            assert http.get("/health").status_code == 200
            answer = http.post("/v1/completions", json={"model": "demo", "prompt": "a", "max_tokens": 1})
            assert answer.status_code == 200, answer.text


def run_schemathesis(server: ServerProcess, run_client, phases: str, num_examples: int) -> str:
    return run_client(
        *("-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "--no-color"),
        *("--phases", phases, "--checks", ",".join(CHECKS), "--max-examples", str(num_examples)),
        *("--seed", str(SEED), "--generation-database", "none", "--request-timeout", "30"),
        *("--continue-on-failure", "--no-shrink", "--warnings", "off"),
        SCHEMATHESIS_HOOKS="schemathesis_hooks",
        PYTHONPATH=HOOKS_PATH,
        timeout_s=1500,
    )


def test_made_up_requests_are_answered_as_the_schema_says(server, run_client) -> None:
    printed = run_schemathesis(server, run_client, "fuzzing", num_examples=40)
    assert "Tested: " in printed


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_boundary_values_and_many_made_up_requests_are_answered_as_the_schema_says(
    server, run_client
) -> None:
    printed = run_schemathesis(server, run_client, "coverage,fuzzing", num_examples=150)
    assert "Tested: " in printed
