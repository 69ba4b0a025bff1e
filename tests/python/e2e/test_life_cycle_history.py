"""What judges the life-cycle fuzz tells possible histories of a name from impossible ones."""

from __future__ import annotations

from typing import Any

import pytest

from support.life_cycle.history import Call, NameHistory


def call(kind: str, begin: float, end: float, adapter_id: int | None = None, **fields: Any) -> Call:
    return Call(kind=kind, begin=begin, end=end, adapter_id=adapter_id, **fields)


def loads(adapter_id: int, begin: float, end: float, content: str = "x", **fields: Any) -> Call:
    return call("loaded", begin, end, adapter_id, contents=frozenset({content}), **fields)


FIRST = loads(1, 0, 1)
LIVE = loads(1, 0, 1, is_live=True)
POSSIBLE = {
    "served after a load": [FIRST, call("served", 2, 3, 1)],
    "missing during a load": [FIRST, call("missing", 0.5, 3)],
    "old one served during a replacement": [
        FIRST,
        loads(2, 2, 3, "y", inplace=True),
        call("served", 2.5, 5, 1),
    ],
    "other content without the flag": [FIRST, call("conflict", 2, 3, contents=frozenset("y"))],
    "unload of a pending load": [call("unloaded", 2, 3), call("cancelled", 1, 4)],
    "unpinned by the same content": [
        loads(1, 0, 1, pinned=True),
        call("already", 1.5, 1.8, 1, contents=frozenset("x")),
        call("listed", 2, 3, 1, pinned=False),
    ],
    "two callers of one load": [FIRST, loads(1, 0.5, 1)],
}
IMPOSSIBLE = {
    "missing after a load": [FIRST, call("missing", 2, 3)],
    "replaced without the flag": [FIRST, loads(2, 2, 3, "y")],
    "replaced by the same content": [FIRST, loads(2, 2, 3, inplace=True)],
    "old one served after a replacement": [
        FIRST,
        loads(2, 2, 3, "y", inplace=True),
        call("served", 4, 5, 1),
    ],
    "conflict with the same content": [FIRST, call("conflict", 2, 3, contents=frozenset("x"))],
    "served after an unload": [FIRST, call("unloaded", 2, 3), call("served", 4, 5, 1)],
    "unload of nothing": [call("unloaded", 2, 3)],
    "cancelled without an unload": [call("cancelled", 2, 3)],
    "cancelled by an unload that is over": [FIRST, call("unloaded", 2, 3), call("cancelled", 4, 5)],
    "pinned and listed otherwise": [loads(1, 0, 1, pinned=True), call("listed", 2, 3, 1, pinned=False)],
    "already loaded with other content": [FIRST, call("already", 2, 3, 1, contents=frozenset("y"))],
    "number that went back": [loads(2, 0, 1), call("unloaded", 2, 3), loads(1, 4, 5)],
    "broken although nothing was written": [LIVE, call("broken", 2, 3)],
}


@pytest.mark.parametrize("name", POSSIBLE)
def test_possible_history_has_no_problem(name: str) -> None:
    assert NameHistory(POSSIBLE[name], {}).find_problem() is None


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_impossible_history_is_described(name: str) -> None:
    problem = NameHistory(IMPOSSIBLE[name], {}).find_problem()
    assert problem is not None
    assert "no order" in problem


def test_an_adapter_may_go_once_its_folder_was_written() -> None:
    calls = [LIVE, call("broken", 2, 3), call("missing", 4, 5)]
    assert NameHistory(calls, {}, [(1.5, 1.6)]).find_problem() is None
    assert NameHistory(calls, {}, [(3.5, 3.6)]).find_problem() is not None
