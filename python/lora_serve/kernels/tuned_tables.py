"""The launch parameters that were measured on one GPU each: the one reader of ``tuning/*.json``.

A file has the GPU's name under "gpu" and a list of rows for each kernel under the kernel's name. What a row
holds is its kernel's own: who asks brings the function that reads one. Several files may speak of one GPU.
Nothing is measured here, and nothing at start: a GPU without rows runs with the kernels' defaults.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

TUNING_FOLDER = Path(__file__).parent / "tuning"

Row = TypeVar("Row")


@cache
def current_gpu() -> str | None:
    """Name of the GPU that is current when this is first asked, None without one.

    One answer for the life of the process: what is chosen by it sizes memory that is used later.
    """
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def read_tuned_rows(
    gpu: str | None,
    kernel: str,
    read_row: Callable[[Mapping[str, Any]], Row],
    *,
    folder: Path | None = None,
) -> list[Row]:
    """Give the rows of one kernel that were measured on one GPU.

    Parameters
    ----------
    gpu
        The GPU's name as CUDA gives it; None = no GPU.
    kernel
        Name of the list in the files.
    read_row
        Makes a row of what the file holds. It may raise ``KeyError``, ``TypeError`` or ``ValueError``.
    folder
        Of the files; None = `TUNING_FOLDER`.

    Returns
    -------
    list
        In the order of the files' names and of the rows in each; empty where nothing was measured.

    Raises
    ------
    ValueError
        A file is not such a table, or a row of this GPU cannot be read. The message has file and row.

    Notes
    -----
    Reads the disk: keep what it gives.
    """
    rows: list[Row] = []
    if gpu is None:
        return rows
    for file in sorted((TUNING_FOLDER if folder is None else folder).glob("*.json")):
        table = read_table(file)
        if table["gpu"] != gpu:
            continue
        found = table.get(kernel, [])
        if not isinstance(found, list):
            raise ValueError(f"{file}: {kernel} is {type(found).__name__}, expected a list of rows")
        for index, row in enumerate(found):
            try:
                rows.append(read_row(row))
            except KeyError as error:
                raise ValueError(f"{file}: row {index} of {kernel} has no {error}") from error
            except (TypeError, ValueError) as error:
                raise ValueError(f"{file}: row {index} of {kernel}: {error}") from error
    return rows


def read_table(file: Path) -> dict[str, Any]:
    """Give all that one file holds.

    Raises
    ------
    ValueError
        It is no table with a GPU's name.
    """
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(table, dict) or not isinstance(table.get("gpu"), str):
        raise ValueError(f"{file}: expected a table with the GPU's name under 'gpu'")
    return table


def int_of(row: Mapping[str, Any], name: str, *, is_power_of_2: bool = False, at_least: int = 1) -> int:
    """Give one of a row's numbers.

    Parameters
    ----------
    row
        As it is in the file.
    name
        Of the number.
    is_power_of_2, at_least
        What it must be.

    Raises
    ------
    KeyError
        The row has no such entry.
    ValueError
        It is no integer, or not such a one.
    """
    number = row[name]
    is_good = type(number) is int and number >= at_least
    if not is_good or (is_power_of_2 and number & (number - 1)):
        kind = "a power of two" if is_power_of_2 else "an integer"
        raise ValueError(f"{name} is {number!r}, expected {kind} of at least {at_least}")
    return int(number)
