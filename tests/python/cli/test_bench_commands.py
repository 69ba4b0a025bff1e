from __future__ import annotations

import gc
import gzip
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from cli.bench_setup import make_model, run_bench
from lora_serve.cli.bench import session, table
from lora_serve.cli.bench.bench_engine import BenchEngine
from lora_serve.cli.bench.generated_adapters import GeneratedAdapters
from lora_serve.cli.main import main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("bench") / "model")


@pytest.fixture(autouse=True)
def _interpreter_as_before():
    """The bench sets up its process for itself alone."""
    thresholds, interval = gc.get_threshold(), sys.getswitchinterval()
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)
    sys.setswitchinterval(interval)


@pytest.fixture
def started(monkeypatch):
    """The configurations of the engines that were started."""
    configs = []

    class Noted(BenchEngine):
        def __init__(self, config, adapters):
            configs.append(config)
            super().__init__(config, adapters)

    monkeypatch.setattr(session, "BenchEngine", Noted)
    return configs


def read_table(folder):
    return json.loads((folder / "table.json").read_text())


def test_generated_adapters_fit_the_model_and_have_contents_of_their_own(model, tmp_path, capsys):
    adapters = GeneratedAdapters(tmp_path, str(model), "auto")
    digests = set()
    for path in adapters.paths(5, 3):
        assert main(["adapter", "check", str(path), "--model", str(model), "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["num_bytes"] == adapters.num_bytes(5)
        assert report["lora_rank"] == 5
        assert len(report["modules"]) == 7 * 2
        digests.add(report["content_digest"])
    assert len(digests) == 3
    assert adapters.paths(5, 2) == adapters.paths(5, 3)[:2]


def test_throughput_counts_output_tokens_and_uses_the_adapters(model, capsys, started):
    arguments = ("--num-requests", 5, "--input-len", 9, "--output-len", 6, "--adapter-rank", 4)
    assert run_bench("throughput", model, *arguments, "--num-adapters", 2, "--num-idle-adapters", 1) == 0

    found = json.loads(capsys.readouterr().out)

    figures, steps = found["figures"], found["steps"]
    assert figures["tokens_per_s"] * figures["took_ms"] / 1e3 == pytest.approx(5 * 6, rel=0.01)
    assert figures["tokens_per_s"] == max(found["runs"])
    assert 0 < figures["first_token_ms"] < figures["took_ms"]
    assert (steps["prefill_tokens"], steps["steps"]) == (5 * 9, 6)
    assert steps["adapters_per_step"] == 2
    assert started[0].enable_prefix_caching is False


def test_one_output_token_counts_prompt_tokens_and_idle_adapters_are_in_no_step(model, capsys):
    arguments = ("--num-requests", 4, "--input-len", 20, "--output-len", 1, "--num-idle-adapters", 2)
    assert run_bench("throughput", model, *arguments) == 0

    found = json.loads(capsys.readouterr().out)

    figures = found["figures"]
    assert figures["tokens_per_s"] * figures["took_ms"] / 1e3 == pytest.approx(4 * 20, rel=0.01)
    assert found["steps"]["adapters_per_step"] == 0
    assert found["engine"] == "2 adapters of rank 16"


def test_serve_answers_every_request_over_adapters_that_do_not_all_fit(model, capsys):
    arguments = ("--num-requests", 40, "--input-len", 8, "--output-len", 4, "--rate", 400)
    places = ("--num-adapters", 6, "--num-device-adapters", 2, "--num-host-adapters", 3, "--max-loras", 2)
    assert run_bench("serve", model, *arguments, *places, "--popularity", "uniform") == 0

    found = json.loads(capsys.readouterr().out)

    figures, steps = found["figures"], found["steps"]
    for kind in ("ttft", "itl", "e2e"):
        assert 0 < figures[f"{kind}_p50_ms"] <= figures[f"{kind}_p99_ms"] <= figures[f"{kind}_max_ms"]
    assert figures["ttft_max_ms"] <= figures["e2e_max_ms"]
    assert steps["prefill_tokens"] >= 40 * 8
    assert steps["loads_to_device"] >= 4
    assert steps["adapters_per_step"] <= 2
    assert figures["output_tokens_per_s"] == pytest.approx(4 * figures["completed_per_s"], rel=0.01)


def test_table_starts_an_engine_for_rows_that_ask_the_same(model, tmp_path, started, capsys):
    rows = "base-1,base-prefill,idle-1,8xr64-32"
    assert run_bench("table", model, "--rows", rows, "--out", tmp_path, "--smallest") == 0

    assert [(config.max_loras, config.max_lora_rank) for config in started] == [(1, 16), (8, 64)]
    assert list(read_table(tmp_path)) == rows.split(",")
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[:4]] == rows.split(",")
    assert (tmp_path / "table.md").read_text().splitlines() == lines[4:]


def test_places_on_the_device_hold_so_many_adapters(model, tmp_path, started):
    row = "open-64-uniform-8places-host16"
    assert run_bench("table", model, "--rows", row, "--out", tmp_path, "--smallest") == 0

    one = GeneratedAdapters(tmp_path, str(model), "auto").num_bytes(16)
    assert int(started[0].lora_memory_gb * 2**30) // one == 8
    assert int(started[0].lora_host_memory_gb * 2**30) // one == 16
    assert started[0].max_loras == 8


def test_engine_options_win_over_those_of_the_rows(model, tmp_path, started):
    options = (
        "--max-loras",
        3,
        "--max-num-batched-tokens",
        64,
        "--no-async-scheduling",
        "--lora-memory-gb",
        0.5,
    )
    assert run_bench("table", model, "--rows", "idle-1", "--out", tmp_path, "--smallest", *options) == 0

    config = started[0]
    assert (config.max_loras, config.max_num_batched_tokens, config.lora_memory_gb) == (3, 64, 0.5)
    assert not config.async_scheduling


def test_a_row_that_fails_costs_no_other_row(model, tmp_path, monkeypatch, capsys):
    measure = session.run_open_loop

    def fail(*_):
        raise RuntimeError("planted")

    monkeypatch.setattr(session, "run_open_loop", fail)
    rows = "base-1,open-8-uniform,8xr16-1"
    assert run_bench("table", model, "--rows", rows, "--out", tmp_path, "--smallest") == 1
    assert set(read_table(tmp_path)) == {"base-1", "8xr16-1"}
    assert "failed: open-8-uniform" in capsys.readouterr().err

    monkeypatch.setattr(session, "run_open_loop", measure)
    assert run_bench("table", model, "--rows", "open-8-uniform", "--out", tmp_path, "--smallest") == 0
    assert set(read_table(tmp_path)) == {"base-1", "8xr16-1", "open-8-uniform"}


def test_rows_before_an_interruption_are_kept(model, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "run_open_loop", interrupt)
    arguments = ("--rows", "base-1,open-8-uniform", "--out", tmp_path, "--smallest")
    assert run_bench("table", model, *arguments) == 130

    assert set(read_table(tmp_path)) == {"base-1"}
    assert "| base-1 |" in (tmp_path / "table.md").read_text()


def test_rows_that_would_begin_after_the_time_limit_are_left_out(model, tmp_path, monkeypatch, capsys):
    measure = session.Session.measure

    def slow(self, name, *others):
        now[0] += 10.0
        return measure(self, name, *others)

    now = [0.0]
    monkeypatch.setattr(session.Session, "measure", slow)
    monkeypatch.setattr(table, "time", SimpleNamespace(monotonic=lambda: now[0]))
    arguments = ("--rows", "base-*", "--out", tmp_path, "--smallest", "--time-limit-s", 15)
    assert run_bench("table", model, *arguments) == 0

    assert set(read_table(tmp_path)) == {"base-1", "base-32"}
    assert "base-128: left out" in capsys.readouterr().out


def test_profile_writes_a_trace_and_tables(model, tmp_path):
    out, profile = tmp_path / "out", tmp_path / "profile"
    arguments = ("--rows", "base-32,base-prefill", "--smallest", "--profile", profile)
    assert run_bench("table", model, *arguments, "--out", out) == 0

    for name in ("base-32", "base-prefill"):
        found = read_table(out)[name]["profile"]
        assert found["steps"] > 0
        assert 0 < found["busy_share"] <= 1
        assert (profile / found["trace"]).stat().st_size
        text = (profile / f"{name}.txt").read_text()
        assert "aten::mm" in text
        assert "idle between" in text


@pytest.mark.gpu
def test_cuda_is_chosen_and_traced_where_there_is_a_card(tmp_path):
    model = make_model(tmp_path / "model", head_dim=64, dtype="bfloat16")
    out, profile = tmp_path / "out", tmp_path / "profile"
    rows = ("--rows", "base-32,base-prefill,8xr64-32,open-8-uniform", "--smallest", "--profile", profile)
    assert run_bench("table", model, *rows, "--out", out, device=None) == 0

    for name, row in read_table(out).items():
        assert row["machine"]["card"] == torch.cuda.get_device_name()
        assert row["config"]["device"] == "cuda"
        assert row["config"]["max_num_batched_tokens"] == (2048 if name.startswith("open") else 16384)
        assert 0 < row["profile"]["busy_share"] <= 1
        assert "kernel" in gzip.decompress((profile / row["profile"]["trace"]).read_bytes()).decode()


def test_rows_are_listed_without_a_model(capsys):
    assert main(["bench", "table", "--list", "--rows", "base-1"]) == 0

    assert "base-1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--model-shape qwen3-8b"),
        (("--model-shape", "gpt-7"), "model shape is 'gpt-7'"),
    ],
)
def test_wrong_options_are_told(arguments, words, capsys):
    assert main(["bench", "throughput", *arguments]) == 1

    assert words in capsys.readouterr().err


def test_bench_takes_no_adapters_but_its_own(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "throughput", "--model-shape", "qwen3-0.6b", "--lora-modules", "a=/b"])

    assert "unrecognized arguments: --lora-modules" in capsys.readouterr().err


def test_help_shows_what_the_bench_chooses_for_itself(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "throughput", "--help"])

    text = " ".join(capsys.readouterr().out.split())
    assert "tokens of one step (default: 2048; of closed batches on CUDA 16384)" in text
    assert "distinct adapters in one step (default: as many adapters as fit the device)" in text
    assert "requests that may run at once (default: 128)" in text


def test_bench_runs_without_the_packages_of_the_server(model, tmp_path):
    program = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("fastapi", "uvicorn", "starlette", "pydantic", "httpx", "openai"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
from lora_serve.cli.main import main
sys.exit(main(["bench", "table", "--model", {str(model)!r}, "--device", "cpu", "--num-device-pages", "64",
    "--rows", "base-1", "--smallest", "--out", {str(tmp_path)!r}]))
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )

    assert result.returncode == 0, result.stderr
    assert set(read_table(tmp_path)) == {"base-1"}
