"""Work that ends when its client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.types import Receive

T = TypeVar("T")


async def wait_for_disconnect(receive: Receive) -> None:
    """Return once the client has gone; the request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def run_while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Give the result of `work`, or cancel it when the client goes away first.

    Parameters
    ----------
    request : Request
        Whose body has been read.
    work : coroutine
        Cleans up after itself when it is cancelled.

    Raises
    ------
    starlette.requests.ClientDisconnect
        The client went away; `work` has been cancelled and has ended.
    """
    worker = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(wait_for_disconnect(request.receive))
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not worker.done():
            raise ClientDisconnect
        return worker.result()
    finally:
        await cancel_and_wait(worker, watcher)


async def cancel_and_wait(*tasks: asyncio.Future[Any]) -> None:
    """Cancel what still runs and return when all have ended; their errors are not raised."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
