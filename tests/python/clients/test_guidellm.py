"""guidellm, unchanged, puts a short load on the base model and on an adapter at the same time."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lora_serve.demo.prompts import BASE_MODEL
from server.metric_samples import Samples

NUM_REQUESTS = 8
PROMPT_TOKENS = 32
OUTPUT_TOKENS = 8
ADAPTER = "argon"


def test_every_request_of_a_load_run_is_answered_in_full(
    demo_server, run_client, paths, tmp_path: Path
) -> None:
    def num_finished() -> float:
        """Requests of the adapter that ran to their length, by the server's own count."""
        with demo_server.http() as http:
            samples = Samples.parse(http.get("/metrics").text)
        labels = {"adapter_name": ADAPTER, "finished_reason": "length"}
        return sum(value for _, value in samples.all("lora_serve:adapter_requests_total", **labels))

    num_before = num_finished()

    def run(name: str) -> dict[str, object]:
        out = tmp_path / f"{name}.json"
        run_client(
            *("-m", "guidellm", "run", "--disable-console"),
            *("--backend", f"kind=openai_http,target={demo_server.url},model={name}"),
            *("--profile", "kind=concurrent,streams=4"),
            *("--constraint", f"kind=max_requests,count={NUM_REQUESTS}"),
            *("--tokenizer", f"kind=huggingface_auto,model={paths.model}"),
            *("--data", f"kind=synthetic_text,prompt_tokens={PROMPT_TOKENS},output_tokens={OUTPUT_TOKENS}"),
            *("--output", f"kind=json,path={out}"),
            # Each of its processes takes seconds to start.
            GUIDELLM__MAX_WORKER_PROCESSES="1",
            # It leaves out of its report what comes this many seconds late: too short on a busy machine.
            GUIDELLM__MP_POLL_INTERVAL="2",
        )
        [benchmark] = json.loads(out.read_text())["benchmarks"]
        return benchmark

    with ThreadPoolExecutor() as pool:
        benchmarks = list(pool.map(run, (BASE_MODEL, ADAPTER)))

    for benchmark in benchmarks:
        made = benchmark["scheduler_metrics"]["requests_made"]
        assert (made["successful"], made["errored"], made["total"]) == (NUM_REQUESTS, 0, NUM_REQUESTS)
        assert len(benchmark["requests"]["successful"]) == NUM_REQUESTS
        for request in benchmark["requests"]["successful"]:
            assert request["output_metrics"]["text_tokens"] == OUTPUT_TOKENS
            assert request["input_metrics"]["text_tokens"] >= PROMPT_TOKENS
    # guidellm may ask for more than it counts, to see that the server is there.
    assert num_finished() - num_before >= NUM_REQUESTS
