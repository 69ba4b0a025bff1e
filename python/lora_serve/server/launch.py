"""Starts an engine and serves it over HTTP until a signal ends it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import math
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field

import uvicorn

from lora_serve.common.config import EngineConfig
from lora_serve.common.errors import InvalidArgumentError, LoraServeError
from lora_serve.common.field_checks import check_float
from lora_serve.engine.engine_client import AsyncEngineClient, LoadedAdapter
from lora_serve.server.adapter_folder import AdapterFolder
from lora_serve.server.adapter_selection import check_adapter_name
from lora_serve.server.app import create_app
from lora_serve.server.autoload import AdapterAutoloader
from lora_serve.server.connections import ConnectionTable, make_protocol
from lora_serve.server.engine_supervisor import EngineSupervisor, RestartSettings
from lora_serve.server.lifecycle import Lifecycle
from lora_serve.server.limits import make_room
from lora_serve.server.parsing.reasoning import check_reasoning_tokens
from lora_serve.server.settings import DEFAULT_DRAIN_TIMEOUT_S, AdapterFolderSettings, ServerSettings

GRACEFUL_SHUTDOWN_S = 0.5
"""After that time, connections whose last answer has been given get so long to be closed."""
LAST_ANSWERS_S = 1
"""Their last bytes get so long to be sent; then what still runs is cancelled."""
KEEP_ALIVE_S = 75
"""Longer than clients keep idle connections, so that none is closed just as it is used again."""
logger = logging.getLogger(__name__)
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
    restart : RestartSettings
        Whether the engine is started again when its process has ended.
    drain_timeout_s : float
        How long running requests get to end after a signal; a second signal ends them at once.
    """

    config: EngineConfig
    settings: ServerSettings
    adapters: Sequence[AdapterModule]
    host: str
    port: int
    announce: Callable[[str], None]
    adapter_folder: AdapterFolderSettings | None = None
    restart: RestartSettings = field(default_factory=RestartSettings)
    drain_timeout_s: float = DEFAULT_DRAIN_TIMEOUT_S

    def __post_init__(self) -> None:
        check_float("--drain-timeout", self.drain_timeout_s, 0.0)


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
        leave_torch_out()
        return asyncio.run(_serve(launch, listener))


def leave_torch_out() -> None:
    """Have this process do without torch, as if it were not installed.

    Tokenizers use nothing of it, but transformers imports it wherever it is installed, which takes seconds of
    the start and 350 MB, and has no option against that. Where torch has been imported before, nothing
    changes. The engine is a process of its own, which has torch.
    """
    if "torch" not in sys.modules:
        # What cannot be imported is None there. Transformers would warn that torch is not installed.
        sys.modules["torch"] = None  # type: ignore[assignment]
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


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
    lifecycle : Lifecycle
        Told when the server drains.
    drain_timeout_s : float
        How long requests get to end then.
    on_ready : callable
        Called when the server answers.
    end_engine : callable
        Called when running requests have ended or have had their time; fails those that wait for the engine.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        *,
        lifecycle: Lifecycle,
        drain_timeout_s: float,
        on_ready: Callable[[], None],
        end_engine: Callable[[], Awaitable[None]],
    ) -> None:
        super().__init__(config)
        self._lifecycle = lifecycle
        self._drain_timeout_s = drain_timeout_s
        self._draining: asyncio.Task[None] | None = None
        self._on_ready = on_ready
        self._end_engine = end_engine

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def take_signal(self, number: int) -> None:
        """Drain at the first signal, while newcomers are still told so; end at the second."""
        if self.started and self._draining is None:
            self._lifecycle.begin_drain()
            self._draining = asyncio.ensure_future(self._drain())
            return
        if self._draining is not None:
            self._draining.cancel()
        self.handle_exit(number, None)

    async def _drain(self) -> None:
        try:
            await asyncio.wait_for(self._lifecycle.wait_until_idle(), self._drain_timeout_s)
        except asyncio.TimeoutError:
            logger.warning("requests still run %g s after the signal; they are ended", self._drain_timeout_s)
        self.should_exit = True

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
    limits = launch.settings.limits
    room = make_room(limits.max_connections)
    client = AsyncEngineClient(launch.config)
    app = create_app(client, launch.settings)
    lifecycle: Lifecycle = app.state.context.lifecycle
    engine = _SupervisedEngine(client, launch, lifecycle, app.state.context.autoloader)

    async def end_engine() -> None:
        app.state.context.shutdown.has_begun = True
        await engine.close()

    server = _Server(
        uvicorn.Config(
            app,
            lifespan="off",
            log_config=None,  # Its lines go where ours go, and look like them.
            log_level="warning",
            access_log=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=math.ceil(GRACEFUL_SHUTDOWN_S + LAST_ANSWERS_S),
            http=make_protocol(ConnectionTable(room.max_connections, limits.header_timeout_s)),
            backlog=room.backlog,
        ),
        lifecycle=lifecycle,
        drain_timeout_s=launch.drain_timeout_s,
        on_ready=lambda: launch.announce(_url(listener)),
        end_engine=end_engine,
    )
    starting = asyncio.ensure_future(engine.start())

    def on_signal(number: int) -> None:
        starting.cancel()  # Changes nothing once the engine has started.
        server.take_signal(number)

    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, on_signal, number)
    try:
        await asyncio.wait({starting})
        if starting.cancelled():
            return False
        starting.result()
        _settle_interpreter()
        await server.serve(sockets=[listener])
        return server.started
    finally:
        await engine.close()
        for number in _SIGNALS:
            loop.remove_signal_handler(number)


def _settle_interpreter() -> None:
    """Leave what is there now, most of it modules, out of garbage collections from now on.

    A full one visits every object, during which no stream moves. Without this it happens again and again, and
    takes a seventh of the CPU time of requests. What requests make is collected as before.
    """
    gc.collect()
    gc.freeze()


class _SupervisedEngine:
    """The engine of a server with its adapters and its watched folder, started again when it has ended.

    Parameters
    ----------
    client : AsyncEngineClient
        Not started; this object starts and closes it.
    launch : Launch
        What to run.
    lifecycle : Lifecycle
        Told of restarts.
    autoloader : AdapterAutoloader or None
        What loads adapters on first use.
    """

    def __init__(
        self,
        client: AsyncEngineClient,
        launch: Launch,
        lifecycle: Lifecycle,
        autoloader: AdapterAutoloader | None,
    ) -> None:
        self._client = client
        self._launch = launch
        self._autoloader = autoloader
        folder = launch.adapter_folder
        self._folder = None if folder is None else AdapterFolder(client, folder)
        self._supervisor = EngineSupervisor(
            client,
            lifecycle,
            launch.restart,
            is_ours=self._is_ours,
            forget=self._forget,
            reload=self._watch_again,
        )

    async def start(self) -> None:
        if self._folder is not None:
            await self._folder.look()
        await self._client.start()
        if self._launch.settings.reasoning_parser is not None:
            check_reasoning_tokens(self._launch.settings.reasoning_parser, self._client.tokenizer)
        for adapter in self._launch.adapters:
            try:
                await self._client.load_lora_adapter(adapter.name, adapter.path)
            except LoraServeError as error:
                raise type(error)(f"adapter {adapter.name!r} cannot be loaded: {error}") from error
        if self._folder is not None:
            await self._folder.start()
        self._supervisor.start()

    async def close(self) -> None:
        await self._supervisor.close()
        if self._folder is not None:
            await self._folder.close()
        await self._client.close()

    def _is_ours(self, adapter: LoadedAdapter) -> bool:
        """Not those of the folder, nor those loaded on first use: they are loaded again by who owns them."""
        if self._autoloader is not None and self._autoloader.owns(adapter.name):
            return False
        settings = self._launch.adapter_folder
        return settings is None or adapter.path != os.path.join(os.path.abspath(settings.path), adapter.name)

    async def _forget(self) -> None:
        """Forget what the folder and first uses had loaded: it was lost with the engine."""
        if self._autoloader is not None:
            self._autoloader.forget_all()
        if self._folder is not None:
            await self._folder.forget_engine()

    async def _watch_again(self) -> None:
        if self._folder is not None:
            await self._folder.start_again()


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
