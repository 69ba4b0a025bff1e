"""Server-sent events, and what happens to them when the client goes away or the engine fails."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from http import HTTPStatus
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from lora_serve.common.errors import LoraServeError
from lora_serve.engine.request_stream import RequestStream
from lora_serve.server.context import ServerContext, context_of
from lora_serve.server.disconnect import cancel_and_wait, run_while_connected, wait_for_disconnect
from lora_serve.server.error_handlers import translate_error
from lora_serve.server.generation import close_all
from lora_serve.server.protocol.base import ResponseModel

logger = logging.getLogger(__name__)


class Answer(Protocol):
    """The answer to one request, whose prompts the engine has accepted."""

    @property
    def streams(self) -> Sequence[RequestStream]:
        """What the answer is made of."""

    async def whole(self) -> ResponseModel:
        """Wait for the end and give everything in one body."""

    def chunks(self) -> AsyncIterator[ResponseModel]:
        """Give the answer piece by piece."""


async def answer_request(request: Request, answer: Answer, *, is_stream: bool) -> Response:
    """Send an answer, whole or as a stream; the engine's streams are closed in every case.

    Raises
    ------
    LoraServeError
        The engine could not finish a whole answer. Of a stream the status is sent by then: there it becomes
        an event.
    starlette.requests.ClientDisconnect
        The client went away before the whole answer was there.
    """
    if is_stream:
        events = as_events(answer.chunks(), context_of(request))
        return EventStreamResponse(events, answer.streams)
    body = await run_while_connected(request, answer.whole())
    return Response(body.to_json(), media_type="application/json")


async def as_events(
    chunks: AsyncIterator[ResponseModel], context: ServerContext
) -> AsyncGenerator[str, None]:
    """Give chunks as server-sent events, '[DONE]' last; an error becomes an event, as the status is sent.

    Yields
    ------
    str
        One event with its empty line.
    """
    try:
        async for chunk in chunks:
            yield f"data: {chunk.to_json()}\n\n"
    except Exception as error:
        _, body = translate_stream_error(error, context)
        yield f"data: {json.dumps(body)}\n\n"
    yield "data: [DONE]\n\n"


def translate_stream_error(error: Exception, context: ServerContext) -> tuple[int, dict[str, Any]]:
    """Give the status and body of an error that ends a stream, and write it to the log."""
    status, body = translate_error(error, context.shutdown, context.caller)
    level = logging.ERROR if status == HTTPStatus.INTERNAL_SERVER_ERROR else logging.INFO
    trace = None if isinstance(error, LoraServeError) else error
    logger.log(level, "a stream failed: %s", error, exc_info=trace)
    return status, body


class EventStreamResponse(Response):
    """Sends events as they come, and closes the engine's streams whenever and however the sending ends.

    Starlette's own streaming response leaves its iterator suspended when the client goes away before the
    first event; then nobody would abort the requests.

    Parameters
    ----------
    events : async generator of str
        From `as_events`.
    streams : sequence of RequestStream
        What the events are made of.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None], streams: Sequence[RequestStream]) -> None:
        self.status_code = 200
        self.background = None
        self._events = events
        self._streams = streams
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the events end or the client goes away."""
        sender = asyncio.ensure_future(self._send_events(send))
        watcher = asyncio.ensure_future(wait_for_disconnect(receive))
        try:
            await asyncio.wait({sender, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if sender.done():
                sender.result()
            else:
                logger.info("%s: the client went away in mid-stream", scope["path"])
        finally:
            await cancel_and_wait(sender, watcher)
            await self._events.aclose()
            await close_all(self._streams)

    async def _send_events(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self._events:
            await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
