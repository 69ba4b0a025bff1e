"""Starts an engine and serves it over HTTP until a signal ends it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass

import uvicorn

from lora_serve.common.config import EngineConfig
from lora_serve.common.errors import InvalidArgumentError, LoraServeError
from lora_serve.engine.engine_client import AsyncEngineClient
from lora_serve.server.adapter_folder import AdapterFolder
from lora_serve.server.adapter_selection import check_adapter_name
from lora_serve.server.app import create_app
from lora_serve.server.parsing.reasoning import check_reasoning_tokens
from lora_serve.server.settings import AdapterFolderSettings, ServerSettings

GRACEFUL_SHUTDOWN_S = 5
"""Running requests get so long to end after the first signal; then the engine ends them."""
LAST_ANSWERS_S = 1
"""Their last bytes get so long to be sent; then what still runs is cancelled."""
KEEP_ALIVE_S = 75
"""Longer than clients keep idle connections, so that none is closed just as it is used again."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class AdapterModule:
    """An adapter that is loaded before the server answers.

    Parameters
    ----------
    name : str
        The adapter's name.
    path : str
        Its PEFT directory, or where else it is to be had.
    """

    name: str
    path: str


@dataclass(frozen=True)
class Launch:
    """What one server process runs.

    Parameters
    ----------
    config : EngineConfig
        The engine.
    settings : ServerSettings
        The HTTP server.
    adapters : sequence of AdapterModule
        Loaded in this order before the server answers.
    host : str
        Address to listen on.
    port : int
        TCP port; 0 = a free one.
    announce : callable
        Called with the server's URL when it answers.
    adapter_folder : AdapterFolderSettings or None
        A folder whose subfolders are adapters, for as long as the server runs.
    """

    config: EngineConfig
    settings: ServerSettings
    adapters: Sequence[AdapterModule]
    host: str
    port: int
    announce: Callable[[str], None]
    adapter_folder: AdapterFolderSettings | None = None


def serve(launch: Launch) -> bool:
    """Serve until SIGINT or SIGTERM.

    Parameters
    ----------
    launch : Launch
        What to run.

    Returns
    -------
    bool
        True when the server has answered requests; False when a signal came while it was starting.

    Raises
    ------
    InvalidArgumentError
        The address cannot be listened on, an adapter's name breaks a rule, or the engine refuses its
        configuration, its model or an adapter.
    LoraServeError
        The engine could not start.
    """
    for adapter in launch.adapters:
        check_adapter_name(adapter.name, launch.settings.served_model_name)
    # Before the model is loaded: a port that is taken shows at once. It refuses connections until it listens.
    with _bind(launch.host, launch.port) as listener:
        return asyncio.run(_serve(launch, listener))


def _bind(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:
        raise InvalidArgumentError(f"--port is {port} but must be in [0, 65535]; 0 takes a free one")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:
        raise InvalidArgumentError(
            f"cannot listen on {host} port {port}: {error}; choose another --host or --port"
        ) from None
    return listener


class _Server(uvicorn.Server):
    """Leaves signals to `_serve`: uvicorn would raise them again before the engine could be closed.

    Parameters
    ----------
    config : uvicorn.Config
        With a graceful shutdown that is longer than GRACEFUL_SHUTDOWN_S.
    on_ready : callable
        Called when the server answers.
    end_engine : callable
        Called when running requests have ended or have had their time; fails those that wait for the engine.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        *,
        on_ready: Callable[[], None],
        end_engine: Callable[[], Awaitable[None]],
    ) -> None:
        super().__init__(config)
        self._on_ready = on_ready
        self._end_engine = end_engine

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.ensure_future(super().shutdown(sockets=sockets))
        await asyncio.wait({ending}, timeout=GRACEFUL_SHUTDOWN_S)
        await self._end_engine()
        await ending
        if self.server_state.tasks:  # uvicorn has cancelled them and does not wait for them.
            await asyncio.wait(set(self.server_state.tasks), timeout=LAST_ANSWERS_S)


async def _serve(launch: Launch, listener: socket.socket) -> bool:
    client = AsyncEngineClient(launch.config)
    app = create_app(client, launch.settings)
    folder = None if launch.adapter_folder is None else AdapterFolder(client, launch.adapter_folder)

    async def end_engine() -> None:
        app.state.context.shutdown.has_begun = True
        if folder is not None:
            await folder.close()
        await client.close()

    server = _Server(
        uvicorn.Config(
            app,
            lifespan="off",
            log_level="warning",
            access_log=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=GRACEFUL_SHUTDOWN_S + LAST_ANSWERS_S,
        ),
        on_ready=lambda: launch.announce(_url(listener)),
        end_engine=end_engine,
    )
    starting = asyncio.ensure_future(_start_engine(client, launch, folder))

    def on_signal(number: int) -> None:
        starting.cancel()  # Changes nothing once the engine has started.
        server.handle_exit(number, None)

    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, on_signal, number)
    try:
        await asyncio.wait({starting})
        if starting.cancelled():
            return False
        starting.result()
        await server.serve(sockets=[listener])
        return server.started
    finally:
        if folder is not None:
            await folder.close()
        await client.close()
        for number in _SIGNALS:
            loop.remove_signal_handler(number)


async def _start_engine(client: AsyncEngineClient, launch: Launch, folder: AdapterFolder | None) -> None:
    if folder is not None:
        await folder.look()
    await client.start()
    if launch.settings.reasoning_parser is not None:
        check_reasoning_tokens(launch.settings.reasoning_parser, client.tokenizer)
    for adapter in launch.adapters:
        try:
            await client.load_lora_adapter(adapter.name, adapter.path)
        except LoraServeError as error:
            raise type(error)(f"adapter {adapter.name!r} cannot be loaded: {error}") from error
    if folder is not None:
        await folder.start()


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
