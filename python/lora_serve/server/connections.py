"""Connections that send nothing, or never end what they send: how many there may be, and for how long."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

_TOO_MANY = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
)
RECEIVE_BYTES = 16 * 1024
"""Most that is taken from a socket at once; a longer body comes in pieces."""


class ConnectionTable:
    """The open connections of a server: those that wait for a request, the longest waiting one first.

    Parameters
    ----------
    max_connections : int
        Beyond so many, the one that has waited longest is closed for a newcomer; where all are busy, the
        newcomer.
    header_timeout_s : float
        How long a connection may be open, or a request's headers on their way, before the headers are there.
    """

    def __init__(self, max_connections: int, header_timeout_s: float) -> None:
        self.header_timeout_s = header_timeout_s
        self._max_connections = max_connections
        self._num_connections = 0
        self._idle: OrderedDict[asyncio.Protocol, asyncio.Transport] = OrderedDict()

    def add(self, connection: asyncio.Protocol, transport: asyncio.Transport) -> None:
        """Take a new connection, at the cost of another one if need be."""
        self._num_connections += 1
        if self._num_connections > self._max_connections:
            if not self._idle:
                transport.write(_TOO_MANY)
                transport.close()
                return
            _, oldest = self._idle.popitem(last=False)
            self.close(oldest)
        self._idle[connection] = transport

    def close(self, transport: asyncio.Transport) -> None:
        """Close a connection; one whose client does not read the end of an answer is not waited for long."""
        transport.close()
        if transport.get_write_buffer_size() > 0:
            asyncio.get_running_loop().call_later(self.header_timeout_s, transport.abort)

    def note(self, connection: asyncio.Protocol, transport: asyncio.Transport, *, is_busy: bool) -> None:
        """Say whether a request of a connection is being answered."""
        if is_busy:
            self._idle.pop(connection, None)
        elif connection not in self._idle and not transport.is_closing():
            self._idle[connection] = transport

    def remove(self, connection: asyncio.Protocol) -> None:
        """Forget a connection that is closed."""
        self._num_connections -= 1
        self._idle.pop(connection, None)


def make_protocol(table: ConnectionTable) -> type[asyncio.Protocol]:
    """Give uvicorn's protocol for HTTP/1.1, with the table's limits; uvicorn itself has neither of them.

    Uvicorn closes a kept-alive connection that stays silent, but one whose first request never comes, or
    never ends its headers, stays open for ever; and so does one that goes on sending a body which was
    refused.
    """

    class GuardedProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
        """One connection."""

        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            # asyncio's own 256 KiB, which is what recv allocates for each request, however short, and then
            # cuts down: under load that leaves holes which nothing fits, and the heap grows for long.
            transport.max_size = RECEIVE_BYTES  # type: ignore[attr-defined]
            table.add(self, transport)
            self._set_deadline()

        def connection_lost(self, exc: Exception | None) -> None:
            table.remove(self)
            self._clear_deadline()
            super().connection_lost(exc)
            # Uvicorn does so only where the client closed in order: one that resets its connection, as some
            # health checks do, would keep all of it in memory until the keep-alive time is over.
            self._unset_keepalive_if_required()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._note()
            if self._is_busy:
                self._clear_deadline()
            elif self._deadline is None:
                self._set_deadline()

        def on_response_complete(self) -> None:
            super().on_response_complete()  # May begin the next request, if that one has arrived already.
            self._note()

        @property
        def _is_busy(self) -> bool:
            cycle: Any = self.cycle
            return cycle is not None and not cycle.response_complete

        def _note(self) -> None:
            table.note(self, self.transport, is_busy=self._is_busy)

        def _set_deadline(self) -> None:
            self._deadline = asyncio.get_running_loop().call_later(table.header_timeout_s, self._end)

        def _clear_deadline(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _end(self) -> None:
            self._deadline = None
            if not self._is_busy:
                table.close(self.transport)

    return GuardedProtocol
