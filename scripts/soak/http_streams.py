"""Streams of a server, read as clients of every kind read them."""

from __future__ import annotations

import asyncio
import json
import random
import socket
from dataclasses import dataclass, field
from typing import Any

import aiohttp

STREAM_TIMEOUT_S = 120.0
"""Silence after which an answer counts as lost."""
_RECEIVE_BUFFER_BYTES = 4096


@dataclass(frozen=True)
class Manner:
    """How a client reads.

    Parameters
    ----------
    leaves_after
        It goes away after so many events, without a word; None = it stays to the end.
    pause_s
        It waits so long after each KiB; 0 = it reads what comes.
    """

    leaves_after: int | None = None
    pause_s: float = 0.0


PATIENT = Manner()


@dataclass
class Heard:
    """What a client has read of an answer.

    Parameters
    ----------
    status
        Of HTTP; 0 = none came.
    text
        All pieces, joined.
    ids, fingerprints
        All answer ids and `system_fingerprint`s of its events, which should be one each.
    finish_reason
        None = none was given.
    is_done
        The last event, '[DONE]', has come.
    error
        The body of a refusal or of an error event, or why the connection broke; empty = none.
    has_left
        The client went away.
    """

    status: int = 0
    text: str = ""
    ids: set[str] = field(default_factory=set)
    fingerprints: set[str] = field(default_factory=set)
    num_events: int = 0
    finish_reason: str | None = None
    is_done: bool = False
    error: str = ""
    has_left: bool = False

    def take(self, event: bytes) -> None:
        """Read one event."""
        data = event.removeprefix(b"data: ")
        self.num_events += 1
        if self.is_done or data == event:
            self.error = f"not an event, or one after the last: {event[:200]!r}"
            return
        if data == b"[DONE]":
            self.is_done = True
            return
        chunk = json.loads(data)
        if "error" in chunk:
            self.error = str(chunk["error"])
            return
        self.ids.add(chunk["id"])
        self.fingerprints.add(chunk["system_fingerprint"])
        for choice in chunk["choices"]:
            if self.finish_reason is not None:
                self.error = f"a piece after the end: {event[:200]!r}"
            self.text += choice["delta"].get("content", "") if "delta" in choice else choice["text"]
            self.finish_reason = choice["finish_reason"] or self.finish_reason


class StreamReader:
    """Sends requests on connections of their own two kinds: ordinary ones, and some with little room.

    Parameters
    ----------
    url
        The server's.
    num_streams
        Most at once.
    """

    def __init__(self, url: str, num_streams: int) -> None:
        timeout = aiohttp.ClientTimeout(total=None, sock_read=STREAM_TIMEOUT_S)
        self._sessions = [
            aiohttp.ClientSession(
                url,
                connector=aiohttp.TCPConnector(limit=num_streams, socket_factory=factory),
                timeout=timeout,
                read_bufsize=buffer_bytes,
            )
            for factory, buffer_bytes in ((_make_socket, 2**16), (_make_small_socket, 1024))
        ]

    async def read(self, path: str, body: dict[str, Any], manner: Manner) -> Heard:
        """Ask, and read in this manner; errors of the connection are noted, not raised."""
        heard = Heard()
        session = self._sessions[manner.pause_s > 0]
        try:
            async with session.post(path, json=body) as response:
                heard.status = response.status
                if response.status != 200:
                    heard.error = await response.text()
                    return heard
                await _read_events(response, manner, heard)
                if heard.has_left:
                    response.close()
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            heard.error = f"{type(error).__name__}: {error}"
        return heard

    async def close(self) -> None:
        """Close all connections."""
        for session in self._sessions:
            await session.close()


async def _read_events(response: aiohttp.ClientResponse, manner: Manner, heard: Heard) -> None:
    rest = b""
    if manner.leaves_after == 0:
        heard.has_left = True
        return
    while data := await (response.content.read(1024) if manner.pause_s else response.content.readany()):
        *events, rest = (rest + data).split(b"\n\n")
        for event in events:
            heard.take(event)
            if heard.num_events == manner.leaves_after and not heard.is_done:
                heard.has_left = True
                return
        if manner.pause_s:
            await asyncio.sleep(manner.pause_s)
    if rest:
        heard.error = f"the answer ends within an event: {rest[:200]!r}"


def choose_manner(choices: random.Random) -> Manner:
    """One of six goes away, one of eight reads slowly."""
    kind = choices.random()
    if kind < 1 / 6:
        return Manner(leaves_after=choices.randrange(30))
    if kind < 1 / 6 + 1 / 8:
        return Manner(pause_s=choices.uniform(0.02, 0.3))
    return PATIENT


def _make_socket(address: Any) -> socket.socket:
    family, kind, protocol, _, _ = address
    return socket.socket(family, kind, protocol)


def _make_small_socket(address: Any) -> socket.socket:
    made = _make_socket(address)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER_BYTES)
    return made
