"""The command `lora-serve bench table`."""

from __future__ import annotations

import argparse
import fnmatch
import logging
import sys
import time
import uuid
from pathlib import Path

from lora_serve.cli.bench.report import TableFile, format_line, format_table
from lora_serve.cli.bench.rows import ROWS, Row
from lora_serve.cli.bench.session import Session, make_smallest
from lora_serve.common.errors import InvalidArgumentError

logger = logging.getLogger(__name__)


def main(args: argparse.Namespace) -> int:
    """Measure the chosen rows, and write the table after each of them.

    Returns
    -------
    int
        The exit status: 1 where a row failed.
    """
    rows = choose_rows(args.rows)
    if args.list:
        for row in rows:
            print(f"{row.name:32}{row.workload.describe()}; the engine has {row.needs.describe()}")
        return 0
    table = TableFile(Path(args.out))
    for path in args.merge:
        table.add_file(Path(path))
    failed: list[str] = []
    if args.merge_only:
        table.write(ROWS)
    else:
        failed = _measure(args, rows, table)
    print(format_table(ROWS, table.measured), end="")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def choose_rows(patterns: str | None) -> tuple[Row, ...]:
    """Give the rows whose names match one of the patterns, in the table's order.

    Parameters
    ----------
    patterns
        Names or shell patterns with commas between them; None = all rows.

    Raises
    ------
    InvalidArgumentError
        A pattern matches no row.
    """
    if patterns is None:
        return ROWS
    chosen: set[str] = set()
    for pattern in patterns.split(","):
        found = fnmatch.filter((row.name for row in ROWS), pattern.strip())
        if not found:
            raise InvalidArgumentError(f"--rows has {pattern!r}, which no row matches; --list names them")
        chosen.update(found)
    return tuple(row for row in ROWS if row.name in chosen)


def group_by_engine(rows: tuple[Row, ...]) -> list[Row]:
    """Give the rows in an order in which each engine is started once."""
    needs = list(dict.fromkeys(row.needs for row in rows))
    return sorted(rows, key=lambda row: needs.index(row.needs))


def _measure(args: argparse.Namespace, rows: tuple[Row, ...], table: TableFile) -> list[str]:
    """Measure rows one after the other; gives those that failed, which the others do not suffer from."""
    begin = time.monotonic()
    run = uuid.uuid4().hex
    failed = []
    with Session(args) as session:
        for row in group_by_engine(rows):
            if args.time_limit_s and time.monotonic() - begin > args.time_limit_s:
                print(f"{row.name}: left out, the time limit has passed", flush=True)
                continue
            workload = make_smallest(row.workload) if args.smallest else row.workload
            try:
                measured = session.measure(row.name, row.needs, workload)
            except Exception:
                logger.exception("row %s failed", row.name)
                failed.append(row.name)
                _drop_engine(session)
                continue
            table.add(row.name, {**measured, "run": run, "is_smallest": args.smallest})
            table.write(ROWS)
            print(format_line(row, table.measured), flush=True)
    return failed


def _drop_engine(session: Session) -> None:
    try:
        session.drop_engine()
    except Exception:  # It has failed before; what it could not give back, the next one will complain about.
        logger.exception("the engine did not close")
