"""The envelopes in which the engine process and its client speak: msgpack over one pair of sockets."""

from __future__ import annotations

import msgspec

from lora_serve.common.config import EngineConfig
from lora_serve.engine.messages import (
    AdmissionResult,
    EngineOutput,
    EngineRequest,
    LoadAdapterResult,
    ModelInfo,
    UnloadAdapterResult,
    WireError,
)
from lora_serve.engine.status import AdapterInfo, EngineStats

# --- Client to engine -------------------------------------------------------------------------------------


class Start(msgspec.Struct, frozen=True, tag=True):
    """The first message: what to run."""

    config: EngineConfig


class AddRequests(msgspec.Struct, frozen=True, tag=True):
    """Accept all of these requests, which name the same adapter, or none. Answered by AdmissionResult."""

    call_id: int
    requests: list[EngineRequest]


class AbortRequests(msgspec.Struct, frozen=True, tag=True):
    """Nobody waits for these requests any more. Not answered; unknown ids are normal."""

    request_ids: list[int]


class LoadAdapter(msgspec.Struct, frozen=True, tag=True):
    """Answered by LoadAdapterResult when the adapter is ready to serve."""

    call_id: int
    name: str
    path: str
    load_inplace: bool
    pinned: bool
    weight: float


class UnloadAdapter(msgspec.Struct, frozen=True, tag=True):
    """Answered by UnloadAdapterResult when nothing of the adapter is left."""

    call_id: int
    name: str
    force: bool


class GetAdapters(msgspec.Struct, frozen=True, tag=True):
    """Answered by a list of AdapterInfo."""

    call_id: int


class GetStats(msgspec.Struct, frozen=True, tag=True):
    """Answered by EngineStats."""

    call_id: int


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """End the process; live requests end with an error."""


ClientMessage = (
    Start | AddRequests | AbortRequests | LoadAdapter | UnloadAdapter | GetAdapters | GetStats | Shutdown
)
"""What the engine process gets; it reads them in the order in which they were sent."""

# --- Engine to client -------------------------------------------------------------------------------------


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The answer to Start."""

    info: ModelInfo


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The engine could not start, or has stopped; the process ends after this message."""

    error: WireError


class Outputs(msgspec.Struct, frozen=True, tag=True):
    """What a step gave."""

    outputs: list[EngineOutput]


class Admitted(msgspec.Struct, frozen=True, tag=True):
    """Answers AddRequests."""

    call_id: int
    result: AdmissionResult


class AdapterLoaded(msgspec.Struct, frozen=True, tag=True):
    """Answers LoadAdapter."""

    call_id: int
    result: LoadAdapterResult


class AdapterUnloaded(msgspec.Struct, frozen=True, tag=True):
    """Answers UnloadAdapter."""

    call_id: int
    result: UnloadAdapterResult


class AdapterRetired(msgspec.Struct, frozen=True, tag=True):
    """A name that stood for this generation does not serve any more, though nobody has unloaded it.

    Its weights could not be brought back. No answer to anything.
    """

    adapter_id: int


class Adapters(msgspec.Struct, frozen=True, tag=True):
    """Answers GetAdapters."""

    call_id: int
    result: list[AdapterInfo]


class Stats(msgspec.Struct, frozen=True, tag=True):
    """Answers GetStats."""

    call_id: int
    result: EngineStats


class CallFailed(msgspec.Struct, frozen=True, tag=True):
    """Answers any call that did not succeed."""

    call_id: int
    error: WireError


EngineMessage = (
    Ready
    | Failed
    | Outputs
    | Admitted
    | AdapterLoaded
    | AdapterUnloaded
    | AdapterRetired
    | Adapters
    | Stats
    | CallFailed
)
"""What the client gets. A reply to a call and what comes of it later keep their order."""


def encode(message: ClientMessage | EngineMessage) -> bytes:
    """Give the bytes of a message."""
    return msgspec.msgpack.encode(message)
