"""The rows of `bench_lora` as Markdown: microseconds of both halves, and in brackets what is their floor.

python benchmarks/kernels/lora_table.py > benchmarks/results/lora_kernels_h100.md
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "results" / "lora_kernels.csv"
Row = dict[str, str]
_KEY = ("shape", "rows", "adapters", "lora_rank", "rows_in", "provider")


def newest_rows(file: Path) -> dict[tuple[str, ...], Row]:
    """By all that `_KEY` names: the row that was appended last."""
    with file.open(newline="", encoding="utf-8") as lines:
        return {tuple(row[name] for name in _KEY): row for row in csv.DictReader(lines)}


def values_of(rows: dict[tuple[str, ...], Row], column: str) -> list[str]:
    return sorted({row[column] for row in rows.values()}, key=int)


def decode_table(rows: dict[tuple[str, ...], Row]) -> Iterator[str]:
    """One square layer: a line for each number of rows and adapters, a column for each rank."""
    of_square = {key: row for key, row in rows.items() if row["shape"] == "square"}
    ranks = values_of(of_square, "lora_rank")
    yield from header(["rows", "adapters", *(f"rank {rank}" for rank in ranks)])
    for num_rows in values_of(of_square, "rows"):
        for adapters in values_of(of_square, "adapters"):
            cells = [of_square.get(("square", num_rows, adapters, rank, "cache", "ours")) for rank in ranks]
            if any(cells):
                yield line([num_rows, adapters, *(cell_of(row) for row in cells)])


def prefill_table(rows: dict[tuple[str, ...], Row]) -> Iterator[str]:
    """The packed layer of queries, keys and values: each half alone, and who else does both.

    "In" is where x and y come from.
    """
    of_prefill = {key: row for key, row in rows.items() if int(row["rows"]) > 128}
    names = {row["provider"]: None for row in of_prefill.values()}
    yield from header(["tokens", "adapters", "rank", "in", *names])
    for key in dict.fromkeys(key[:-1] for key in of_prefill):
        yield line([*key[1:], *(cell_of(of_prefill.get((*key, name))) for name in names)])


def commit_lines(rows: dict[tuple[str, ...], Row]) -> Iterator[str]:
    """Which sources each cell of the square layer was measured with; cells of two are not to be compared."""
    by_commit: dict[str, dict[str, dict[str, None]]] = {}
    for row in rows.values():
        if row["shape"] == "square" and row["provider"] == "ours":
            of_rank = by_commit.setdefault(row["commit"], {}).setdefault(row["lora_rank"], {})
            of_rank[row["rows"]] = None
    for commit, ranks in by_commit.items():
        cells = (f"rank {rank} at {', '.join(of_rank)} rows" for rank, of_rank in ranks.items())
        yield f"- {commit}: {'; '.join(cells)}"


def cell_of(row: Row | None) -> str:
    return f"{float(row['p50_us']):.1f} ({float(row['floor_us']):.1f})" if row else ""


def header(names: Sequence[str]) -> Iterator[str]:
    yield line(names)
    yield "|" + "---:|" * len(names)


def line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    rows = newest_rows(RESULTS)
    if not rows:
        sys.exit(f"{RESULTS} has no rows; run bench_lora.py on a GPU first")
    last = list(rows.values())[-1]
    print(f"Microseconds (floor), {last['machine']}, torch {last['torch']}, triton {last['triton']}.")
    print("\nShrink and expand on one layer of 4,096 by 4,096:\n")
    print(*decode_table(rows), "", "Commits of these cells:", "", *commit_lines(rows), sep="\n")
    print("\nPrefills on queries, keys and values (4,096 by 4,096 + 1,024 + 1,024):\n")
    print(*prefill_table(rows), sep="\n")


if __name__ == "__main__":
    main()
