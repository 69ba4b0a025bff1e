"""From a new process to the first token of a request, and what each stage of it takes.

The process does what the engine's own does: it imports, makes the engine (model with random weights, adapter
memory, profiling run, KV pages, kernels, CUDA graphs), and answers one prompt. Stages are read from its log.
`first` is the first process on this machine: it may have to compile kernels; the others find them compiled.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

PROMPT_TOKENS = 128
_STAGE = re.compile(r": (?P<stage>[\w -]+?) (?:ready|done)? ?in (?P<seconds>\d+\.\d) s(?:, which take .*)?$")


def answer_one_prompt(model: Path, *, is_dummy: bool) -> None:
    """In the new process: start, answer, end. The last line says when the token was there."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    from lora_serve.common.stage_log import log_stage

    logger = logging.getLogger("bench_start_up")
    with log_stage(logger, "modules"):
        import torch

        from lora_serve.cli.bench.bench_engine import BenchEngine
        from lora_serve.cli.bench.workloads import ClosedBatch
        from lora_serve.common.config import EngineConfig
    config = EngineConfig(
        model=str(model),
        device="cuda" if torch.cuda.is_available() else "cpu",
        load_format="dummy" if is_dummy else "auto",
        kv_memory_gb=None if is_dummy else 2**-6,
    )
    with log_stage(logger, "engine"):
        engine = BenchEngine(config, [])
    workload = ClosedBatch(num_requests=1, num_prompt_tokens=PROMPT_TOKENS, num_output_tokens=1)
    with log_stage(logger, "first token"):
        engine.core.add_request(engine.requests.make(workload, [], seed=0)[0])
        while not engine.step():
            pass
    print("ANSWERED", flush=True)
    engine.close()


def time_start(model: Path, *, is_dummy: bool) -> tuple[float, dict[str, float]]:
    """Seconds from the start of a process to its first token, and of each stage.

    Raises
    ------
    RuntimeError
        The process failed.
    """
    command = [sys.executable, __file__, "--child", str(model), *(["--dummy"] if is_dummy else [])]
    begin = time.perf_counter()
    with tempfile.TemporaryFile("w+") as log:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process:
            assert process.stdout is not None
            lines = iter(process.stdout.readline, "")
            answered_s = next((time.perf_counter() - begin for line in lines if line == "ANSWERED\n"), None)
        log.seek(0)
        text = log.read()
    sys.stderr.write(text)
    if answered_s is None:
        raise RuntimeError(f"the process ended with status {process.returncode} before its first token")
    found = (_STAGE.search(line) for line in text.splitlines())
    return answered_s, {match["stage"]: float(match["seconds"]) for match in found if match}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smallest", action="store_true", help="a tiny model, one process; no rows")
    parser.add_argument("--model-shape", default="qwen3-8b", metavar="NAME")
    parser.add_argument("--processes", type=int, default=2, metavar="N")
    parser.add_argument("--json", metavar="FILE", help="write the rows there as well")
    parser.add_argument("--dry-run", action="store_true", help="append no rows; then no git is needed")
    parser.add_argument("--child", metavar="MODEL", help=argparse.SUPPRESS)
    parser.add_argument("--dummy", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        answer_one_prompt(Path(options.child), is_dummy=options.dummy)
        return 0
    # Not in the child: what is imported here would be missing from its times.
    from lora_serve.models.shapes import write_model_shape
    from lora_serve.testing.models import make_random_model

    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        if options.smallest:
            import torch

            dtype = "bfloat16" if torch.cuda.is_available() else "float32"  # As FlashInfer wants it.
            make_random_model(folder, "Qwen3ForCausalLM", dtype=dtype)
        else:
            write_model_shape(options.model_shape, Path(folder))
        for index in range(1 if options.smallest else options.processes):
            answered_s, stages = time_start(Path(folder), is_dummy=not options.smallest)
            row: dict[str, object] = {
                "workload": "tiny model" if options.smallest else options.model_shape,
                "process": "first" if index == 0 else "later",
                "to_first_token_s": round(answered_s, 1),
                "stages_s": json.dumps(stages),
            }
            print(*(f"{key}={value}" for key, value in row.items()), flush=True)
            rows.append(row)
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1), encoding="utf-8")
    if not (options.smallest or options.dry_run):
        from result_file import append_rows

        print(f"appended to {append_rows('start_up', rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
