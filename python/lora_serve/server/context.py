"""What the routes of one server share."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field, replace

from fastapi import Request

from lora_serve.engine.engine_client import AsyncEngineClient
from lora_serve.server.autoload import AdapterAutoloader
from lora_serve.server.caller import STRANGER, Caller, caller_of
from lora_serve.server.caller_client import CallerClient
from lora_serve.server.lifecycle import Lifecycle
from lora_serve.server.metrics.server_metrics import ServerMetrics
from lora_serve.server.settings import ServerSettings


@dataclass
class Shutdown:
    """Whether the server ends what still runs, with the engine.

    Attributes
    ----------
    has_begun : bool
        Set just before the engine is closed; its errors mean no more than that from then on.
    """

    has_begun: bool = False


@dataclass(frozen=True)
class ServerContext:
    """The engine and the settings of one server.

    Parameters
    ----------
    client : AsyncEngineClient
        A started client.
    settings : ServerSettings
        The server's settings.
    metrics : ServerMetrics
        What /metrics shows.
    started_at : int
        Unix time in seconds.
    shutdown : Shutdown
        Set by whoever closes the client while requests run.
    lifecycle : Lifecycle
        Where the server is in its life.
    autoloader : AdapterAutoloader or None
        Loads adapters on first use; None = that is off.
    caller : Caller
        Who sent the request that the context is for.
    """

    client: AsyncEngineClient
    settings: ServerSettings
    metrics: ServerMetrics
    started_at: int = field(default_factory=lambda: int(time.time()))
    shutdown: Shutdown = field(default_factory=Shutdown)
    lifecycle: Lifecycle = field(default_factory=Lifecycle)
    autoloader: AdapterAutoloader | None = None
    caller: Caller = STRANGER

    def narrowed_to(self, caller: Caller) -> ServerContext:
        """Give the context with a client that does for this caller what its key allows, and no more."""
        if caller.sees_everything and caller.may_load:
            return replace(self, caller=caller)
        # A path outside the key's adapters must not be tried: how that fails tells what is there.
        autoloader = self.autoloader if caller.adapters is None else None
        client = CallerClient(self.client, caller)
        return replace(self, client=client, autoloader=autoloader, caller=caller)


def context_of(request: Request) -> ServerContext:
    """Give the context of the application that serves `request`, narrowed to whoever sent it."""
    context = request.app.state.context
    assert isinstance(context, ServerContext)
    return context.narrowed_to(caller_of(request))


@dataclass(frozen=True)
class AnswerHeader:
    """What every body of one answer repeats.

    Parameters
    ----------
    answer_id : str
        Unique, with the prefix that OpenAI gives the kind of answer.
    created : int
        Unix time in seconds.
    model : str
        As the request named it.
    """

    answer_id: str
    created: int
    model: str

    @classmethod
    def make(cls, prefix: str, model: str, request_id: str | None = None) -> AnswerHeader:
        """Give a new answer's header, with the client's id of the request where there is one."""
        answer_id = f"{prefix}-{request_id or uuid.uuid4().hex}"
        return cls(answer_id=answer_id, created=int(time.time()), model=model)
