from __future__ import annotations

import gzip
import json

import pytest

from lora_serve.cli.bench.profile import find_gaps, gap_table, kernel_table, read_spans, summarize
from lora_serve.cli.bench.report import TableFile, format_line, format_table
from lora_serve.cli.bench.rows import ROWS

BY_NAME = {row.name: row for row in ROWS}


def entry(run="run-1", is_smallest=False, card="H100", **figures):
    return {
        "workload": "what was sent",
        "figures": figures,
        "steps": {
            "steps": 10,
            "ms_per_step": 6.5,
            "loop_p50_us": 100,
            "loop_p99_us": 200,
            "loop_max_us": 300,
        },
        "model": "qwen3-8b",
        "machine": {"card": card, "commit": "abc", "date": "2026-01-02T03:04:05+00:00"},
        "run": run,
        "is_smallest": is_smallest,
    }


def cells(text, row, figure):
    lines = text.splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith(f"| {row} |"))
    line = next(line for line in lines[begin:] if f"| {figure} |" in line)
    return [cell.strip() for cell in line.split("|")][4:-1]


def open_times(**values):
    names = ("ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms", "itl_max_ms", "e2e_p99_ms")
    return {name: values.get(name, 1.0) for name in names}


@pytest.mark.parametrize(("ours", "verdict"), [(4049.0, "no"), (4050.0, "yes")])
def test_speed_holds_its_gate_from_the_gate_on(ours, verdict):
    text = format_table(ROWS, {"base-32": entry(tokens_per_s=ours)})

    assert cells(text, "base-32", "tokens/s") == [
        *("3,971", "4,050", "4,300", f"{ours:,.0f}", "1.02", verdict),
    ]


@pytest.mark.parametrize(("ours", "verdict"), [(80.0, "yes"), (80.5, "no")])
def test_time_holds_its_gate_up_to_the_gate(ours, verdict):
    text = format_table(ROWS, {"open-64-zipf": entry(**open_times(ttft_p99_ms=ours))})

    assert cells(text, "open-64-zipf", "TTFT p99, ms")[-1] == verdict
    assert cells(text, "open-64-zipf", "TTFT p50, ms")[-1] == ""


@pytest.mark.parametrize(("ours", "verdict"), [(3970.0, "no"), (3985.0, "yes")])
def test_idle_is_judged_by_the_base_of_the_same_run(ours, verdict):
    measured = {"base-32": entry(tokens_per_s=4000.0), "idle-32": entry(tokens_per_s=ours)}

    text = format_table(ROWS, measured)

    assert cells(text, "idle-32", "tokens/s")[1:3] == ["3,980", "4,000"]
    assert f"({ours / 4000:.3f} of base)" in cells(text, "idle-32", "tokens/s")[3]
    assert cells(text, "idle-32", "tokens/s")[-1] == verdict


@pytest.mark.parametrize(
    ("row", "words"), [("open-64-zipf", "what was sent (vLLM: 720 requests)"), ("base-32", "what was sent")]
)
def test_rows_say_where_vllm_had_another_number_of_requests(row, words):
    text = format_table(ROWS, {row: entry(tokens_per_s=1.0, **open_times())})

    assert f"| {row} | {words} |" in text


def test_idle_is_not_judged_by_the_base_of_another_run():
    measured = {"base-32": entry("run-0", tokens_per_s=9000.0), "idle-32": entry(tokens_per_s=10.0)}

    assert cells(format_table(ROWS, measured), "idle-32", "tokens/s")[3:] == ["10", "0.00", ""]


def test_smallest_runs_are_compared_with_nothing():
    measured = {"base-32": entry(is_smallest=True, tokens_per_s=1.0)}

    assert cells(format_table(ROWS, measured), "base-32", "tokens/s")[-2:] == ["", ""]
    assert "vLLM" not in format_line(BY_NAME["base-32"], measured)


def test_machines_are_named_once_or_with_their_rows():
    measured = {"base-1": entry(tokens_per_s=1.0), "base-32": entry(tokens_per_s=1.0)}
    assert "Measured on: qwen3-8b; card H100, commit abc; 2026-01-02" in format_table(ROWS, measured)

    measured["base-32"] = entry(card="H200", tokens_per_s=1.0)

    text = format_table(ROWS, measured)
    assert "Measured in one run each:\n\n- base-1: qwen3-8b; card H100" in text
    assert "- base-32: qwen3-8b; card H200" in text

    measured["base-32"] = entry("run-2", tokens_per_s=1.0)

    assert format_table(ROWS, measured).count("card H100, commit abc; 2026-01-02") == 2


def test_rows_in_the_folder_stay_until_they_are_measured_again(tmp_path):
    first = TableFile(tmp_path)
    first.add("base-1", entry(tokens_per_s=1.0))
    first.add("base-32", entry(tokens_per_s=2.0))
    first.write(ROWS)

    second = TableFile(tmp_path)
    second.add("base-32", entry(tokens_per_s=3.0))
    second.write(ROWS)

    kept = json.loads((tmp_path / "table.json").read_text())
    assert {name: row["figures"]["tokens_per_s"] for name, row in kept.items()} == {
        "base-1": 1.0,
        "base-32": 3.0,
    }
    assert "| base-1 |" in (tmp_path / "table.md").read_text()


def test_tables_measured_elsewhere_are_merged(tmp_path):
    for name, row in (("one", "base-1"), ("other", "base-32")):
        part = TableFile(tmp_path / name)
        part.add(row, entry(tokens_per_s=1.0))
        part.write(ROWS)

    both = TableFile(tmp_path / "both")
    both.add_file(tmp_path / "one" / "table.json")
    both.add_file(tmp_path / "other" / "table.json")

    assert set(both.measured) == {"base-1", "base-32"}


def write_trace(path, events):
    with gzip.open(path, "wt", encoding="utf-8") as file:
        json.dump({"traceEvents": events}, file)
    return path


def event(name, begin, end, category="kernel"):
    return {"name": name, "cat": category, "ts": begin, "dur": end - begin}


def test_device_is_idle_only_where_no_stream_works(tmp_path):
    trace = write_trace(
        tmp_path / "t.json.gz",
        [
            event("late", 60, 100),
            event("long", 0, 40),
            event("inside", 10, 20),
            event("overlaps", 30, 50),
            event("on the host", 50, 60, "cpu_op"),
            {"name": "without a length", "cat": "kernel", "ts": 5},
            event("next", 102, 110),
        ],
    )

    spans = read_spans(trace, {"kernel"})

    assert [span.name for span in spans] == ["long", "inside", "overlaps", "late", "next"]
    assert [(one.name, other.name, gap) for one, other, gap in find_gaps(spans)] == [
        ("overlaps", "late", 10.0),
        ("late", "next", 2.0),
    ]
    assert summarize(spans) == {
        "span_ms": 0.11,
        "busy_share": round(98 / 110, 4),
        "idle_share": round(12 / 110, 4),
        "idle_share_in_long_gaps": round(10 / 110, 4),
    }


def test_tables_of_a_trace_add_up_by_name(tmp_path):
    trace = write_trace(tmp_path / "t.json.gz", [event("a", 0, 10), event("b", 12, 18), event("a", 20, 50)])
    spans = read_spans(trace, {"kernel"})

    kernels = [line.split() for line in kernel_table(spans).splitlines()[1:]]
    gaps = [line.split() for line in gap_table(spans).splitlines()[1:]]

    assert kernels == [["0.040", "2", "20.00", "30.00", "a"], ["0.006", "1", "6.00", "6.00", "b"]]
    assert [(line[0], line[1], "".join(line[4:])) for line in gaps] == [
        ("0.002", "1", "a->b"),
        ("0.002", "1", "b->a"),
    ]


def test_a_trace_without_device_work_has_no_shares():
    assert summarize([])["span_ms"] == 0.0
