"""Decides whether what was answered about one adapter name can have happened in some order.

Every call has begun and ended at some time; what it did to the name, it did at one moment between. A history
is possible when there is an order of those moments in which each answer is what the life cycle says (see the
table in the engine's README). Source: the linearizability test of Wing and Gong, with Lowe's memory of states
that were tried.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

UNKNOWN = "?"
"""Stands for a content that nobody has seen."""
FOREVER = float("inf")


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call about a name, and its answer.

    Parameters
    ----------
    kind
        What was asked and answered:

        - ``loaded``, ``already``: a load gave generation `adapter_id`, new or as it was.
        - ``conflict``: a load was refused because the name serves other content.
        - ``cancelled``: a load was ended by an unload.
        - ``refused``: a load changed nothing, because it has no room beside the pinned.
        - ``broken_load``: a load changed nothing, because its folder changed under it.
        - ``unloaded``, ``not_found``: of an unload.
        - ``served``, ``missing``: a request ran under `adapter_id`, or the name stood for nothing.
        - ``broken``: a request failed because its adapter could not be read again.
        - ``listed``: a list showed `adapter_id` serving, None = nothing, and whether it is `pinned`.
    begin, end
        In seconds.
    adapter_id
        See `kind`.
    contents
        Of a load: digests of which its folder held one, at each moment of the call.
    inplace, pinned
        Of a load, as asked; `pinned` of a list, as shown.
    is_live
        Of a load: its folder is the one that is written now and then.
    """

    kind: str
    begin: float
    end: float
    adapter_id: int | None = None
    contents: frozenset[str] = frozenset()
    inplace: bool = False
    pinned: bool = False
    is_live: bool = False


class State(NamedTuple):
    """What a name stands for.

    `adapter_id` is None for nothing. `unload` is the unload that was the last thing to happen, but for loads
    that it cancelled. `owes` is True when that unload must have cancelled one, because nothing was serving.
    """

    adapter_id: int | None = None
    newest: int = 0
    pinned: bool = False
    unload: int | None = None
    owes: bool = False


@dataclass
class NameHistory:
    """Everything that was answered about one name.

    Parameters
    ----------
    calls
        In any order.
    content_of
        Digest of each generation that somebody saw.
    writes
        When the name's changing folder was written: begin and end of each.
    """

    calls: Sequence[Call]
    content_of: dict[int, str]
    writes: Sequence[tuple[float, float]] = ()

    def find_problem(self) -> str | None:
        """None for a possible history, else what cannot be explained."""
        calls = sorted(self.calls, key=lambda call: call.begin)
        self._begin_of = {c.adapter_id: c.begin for c in calls if c.kind == "loaded" and c.is_live}
        self._loaded = {c.adapter_id: c.contents for c in calls if c.kind == "loaded"}
        # A node is a state and the calls that have happened: all before `first`, and those in `ahead`.
        start = (0, frozenset[int](), State())
        seen, stack = {start}, [start]
        farthest = start
        while stack:
            node = stack.pop()
            first, _, state = node
            if first > farthest[0]:
                farthest = node
            if first == len(calls) and not state.owes:
                return None
            for following in self._following(calls, *node):
                if following not in seen:
                    seen.add(following)
                    stack.append(following)
        return self._describe(calls, *farthest)

    def _following(
        self, calls: Sequence[Call], first: int, ahead: frozenset[int], state: State
    ) -> Iterator[tuple[int, frozenset[int], State]]:
        deadline = FOREVER
        for index in range(first, len(calls)):
            call = calls[index]
            if call.begin > deadline:
                break  # Something that has not happened ended before this began.
            if index in ahead:
                continue
            deadline = min(deadline, call.end)
            for changed in self._apply(calls, index, state):
                happened, new_first = ahead | {index}, first
                while new_first in happened:
                    happened -= {new_first}
                    new_first += 1
                yield new_first, happened, changed

    def _apply(self, calls: Sequence[Call], index: int, state: State) -> Iterator[State]:
        call = calls[index]
        if call.kind == "cancelled":
            if state.unload is not None and call.begin < calls[state.unload].end:
                yield state._replace(owes=False)
            return
        if state.owes:
            return
        yield from self._apply_to(call, index, state._replace(unload=None))
        if state.adapter_id is not None and self._may_vanish(state.adapter_id, call.end):
            gone = State(newest=state.newest)
            yield from self._apply_to(call, index, gone)

    def _apply_to(self, call: Call, index: int, state: State) -> Iterator[State]:
        serving = state.adapter_id
        match call.kind:
            case "loaded":
                assert call.adapter_id is not None
                if serving == call.adapter_id and state.pinned == call.pinned and self._fits(serving, call):
                    yield state  # A load that waited, and was answered to all who had asked the same.
                is_allowed = serving is None or (call.inplace and self._differs(call.adapter_id, serving))
                if is_allowed and call.adapter_id > state.newest and self._fits(call.adapter_id, call):
                    yield State(call.adapter_id, call.adapter_id, call.pinned)
            case "already":
                if serving is not None and serving == call.adapter_id and self._fits(serving, call):
                    yield state._replace(pinned=call.pinned)
            case "conflict":
                if serving is not None and not call.inplace and self._may_conflict(serving, call):
                    yield state
            case "refused":
                yield state
            case "broken_load":
                if call.is_live and self._was_written(call.begin, call.end):
                    yield state
            case "unloaded":
                yield State(newest=state.newest, unload=index, owes=serving is None)
            case "not_found" | "missing":
                if serving is None:
                    yield state
            case "served":
                if serving is not None and serving == call.adapter_id:
                    yield state
            case "broken":
                if serving is not None and self._may_vanish(serving, call.end):
                    yield state
            case "listed":
                is_same = serving == call.adapter_id
                if is_same and (serving is None or state.pinned == call.pinned):
                    yield state
            case _:
                raise AssertionError(call)

    def _may_vanish(self, adapter_id: int, until: float) -> bool:
        """Whether the folder that the generation was read from may have been found changed by then."""
        return self._was_written(self._begin_of.get(adapter_id, FOREVER), until)

    def _was_written(self, begin: float, end: float) -> bool:
        return any(begin < written and write < end for write, written in self.writes)

    def _digest(self, adapter_id: int) -> str:
        loaded = self._loaded.get(adapter_id, frozenset())
        alone = next(iter(loaded)) if len(loaded) == 1 else UNKNOWN
        return self.content_of.get(adapter_id, alone)

    def _fits(self, adapter_id: int, call: Call) -> bool:
        return self._digest(adapter_id) in {UNKNOWN, *call.contents}

    def _differs(self, one: int, other: int) -> bool:
        digests = self._digest(one), self._digest(other)
        return UNKNOWN in digests or digests[0] != digests[1]

    def _may_conflict(self, serving: int, call: Call) -> bool:
        digest = self._digest(serving)
        return digest == UNKNOWN or bool(call.contents - {digest})

    def _describe(
        self, calls: Sequence[Call], first: int, ahead: frozenset[int], state: State, num_shown: int = 14
    ) -> str:
        lines = [f"no order of these explains all answers; up to the marked one, {state} does"]
        for index in range(max(0, first - num_shown), min(len(calls), first + num_shown)):
            mark = ">>" if index == first else " +" if index < first or index in ahead else "  "
            call = calls[index]
            content = self._digest(call.adapter_id) if call.adapter_id is not None else ""
            lines.append(
                f"{mark} {call.begin:9.4f} to {call.end:9.4f} {call.kind} {call.adapter_id or ''} {content}"
                f" inplace={call.inplace} pinned={call.pinned} contents={sorted(call.contents)}"
            )
        return "\n".join(lines)
