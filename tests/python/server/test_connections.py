"""What connections take of the memory, and what is left of one that is closed."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import struct
import weakref
from http import HTTPStatus

import pytest
import uvicorn

from lora_serve.server.connections import RECEIVE_BYTES, ConnectionTable, make_protocol
from support.waiting import until

RESET_ON_CLOSE = struct.pack("ii", 1, 0)
REQUEST = b"GET / HTTP/1.1\r\nHost: server\r\n\r\n"
NUM_CLIENTS = 5
BODY_BYTES = 2**20


class RecordingTable(ConnectionTable):
    """Knows every connection that is still in memory."""

    def __init__(self) -> None:
        super().__init__(max_connections=100, header_timeout_s=60.0)
        self.in_memory: weakref.WeakSet[asyncio.Protocol] = weakref.WeakSet()
        self.num_lost = 0

    def add(self, connection: asyncio.Protocol, transport: asyncio.Transport) -> None:
        super().add(connection, transport)
        self.in_memory.add(connection)

    def remove(self, connection: asyncio.Protocol) -> None:
        super().remove(connection)
        self.num_lost += 1


async def answer(scope, receive, send):
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": HTTPStatus.NO_CONTENT, "headers": []})
    await send({"type": "http.response.body", "body": b""})


async def ask_and_close(address, *, is_reset):
    reader, writer = await asyncio.open_connection(*address)
    writer.write(REQUEST)
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 204")
    if is_reset:
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    writer.close()


@contextlib.asynccontextmanager
async def serving(protocol):
    """Yields the address of a server without an engine."""
    config = uvicorn.Config(answer, lifespan="off", log_config=None, http=protocol)
    server = uvicorn.Server(config)
    config.load()
    server.lifespan = config.lifespan_class(config)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        await server.startup(sockets=[listener])
        yield listener.getsockname()
        await server.shutdown(sockets=[listener])


@pytest.mark.parametrize("is_reset", [False, True])
def test_a_connection_that_its_client_closes_after_an_answer_is_forgotten_at_once(is_reset):
    table = RecordingTable()

    async def script():
        async with serving(make_protocol(table)) as address:
            for _ in range(NUM_CLIENTS):
                await ask_and_close(address, is_reset=is_reset)
            await until(lambda: table.num_lost == NUM_CLIENTS)
            await until(lambda: gc.collect() >= 0 and len(table.in_memory) == 0)

    asyncio.run(script())


def test_a_request_is_taken_from_its_socket_in_small_pieces():
    num_received = []

    class RecordingProtocol(make_protocol(RecordingTable())):
        def data_received(self, data):
            num_received.append(len(data))
            super().data_received(data)

    async def script():
        async with serving(RecordingProtocol) as address:
            reader, writer = await asyncio.open_connection(*address)
            writer.write(REQUEST[:-2] + b"Content-Length: %d\r\n\r\n" % BODY_BYTES + b"a" * BODY_BYTES)
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 204")
            writer.close()

    asyncio.run(script())
    assert sum(num_received) > BODY_BYTES
    assert max(num_received) <= RECEIVE_BYTES
