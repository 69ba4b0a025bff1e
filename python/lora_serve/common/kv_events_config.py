"""Where and how changes of the KV cache are published."""

from __future__ import annotations

import msgspec

from lora_serve.common.errors import InvalidArgumentError
from lora_serve.common.field_checks import check_bool, check_int, refuse

PUBLISHERS = ("zmq", "null")
EVENT_ENCODINGS = ("array", "map")
_MAX_COUNT = 2**31 - 1


class KVEventsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The JSON of `--kv-events-config`, with vLLM's field names; `event_encoding` is ours.

    Parameters
    ----------
    enable_kv_cache_events : bool
        Publish at all.
    publisher : {'zmq', 'null'} or None
        'null' = do not; None = 'zmq'.
    endpoint : str
        ZeroMQ address of the PUB socket: bound when it has a '*' or '::', or begins with ipc:// or inproc://,
        else connected to.
    replay_endpoint : str or None
        ZeroMQ address at which a ROUTER socket is bound that sends missed batches again; None = none.
    buffer_steps : int
        Newest batches that can be sent again, at least 1.
    hwm : int
        Batches that ZeroMQ keeps for a slow subscriber, at least 1; it loses newer ones.
    max_queue_size : int
        Batches that may wait for the publishing thread, at least 1; newer ones are dropped.
    topic : str
        The first frame of every message.
    event_encoding : {'array', 'map'}
        An event as an array of its fields, which every router decodes, or as a map, as vLLM's since 2026.

    Raises
    ------
    InvalidArgumentError
        A field has a wrong type or value.
    """

    enable_kv_cache_events: bool = False
    publisher: str | None = None
    endpoint: str = "tcp://*:5557"
    replay_endpoint: str | None = None
    buffer_steps: int = 10_000
    hwm: int = 100_000
    max_queue_size: int = 100_000
    topic: str = ""
    event_encoding: str = "array"

    def __post_init__(self) -> None:
        check_bool("enable_kv_cache_events", self.enable_kv_cache_events)
        if self.publisher is not None and self.publisher not in PUBLISHERS:
            refuse("publisher", self.publisher, f"one of {', '.join(PUBLISHERS)}")
        if not isinstance(self.endpoint, str) or "://" not in self.endpoint:
            refuse("endpoint", self.endpoint, "a ZeroMQ address such as tcp://*:5557")
        if self.replay_endpoint is not None and "://" not in str(self.replay_endpoint):
            refuse("replay_endpoint", self.replay_endpoint, "a ZeroMQ address such as tcp://*:5558")
        for field in ("buffer_steps", "hwm", "max_queue_size"):
            check_int(field, getattr(self, field), 1, _MAX_COUNT)
        if not isinstance(self.topic, str):
            refuse("topic", self.topic, "a string")
        if self.event_encoding not in EVENT_ENCODINGS:
            refuse("event_encoding", self.event_encoding, f"one of {', '.join(EVENT_ENCODINGS)}")

    @property
    def is_on(self) -> bool:
        """True when something is to be published."""
        return self.enable_kv_cache_events and self.publisher != "null"


def parse_kv_events_config(text: str) -> KVEventsConfig:
    """Read the JSON of `--kv-events-config`.

    Raises
    ------
    InvalidArgumentError
        It is no JSON object, or a field is unknown or wrong.
    """
    try:
        return msgspec.json.decode(text, type=KVEventsConfig)
    except msgspec.DecodeError as error:  # Checks of fields end here too.
        raise InvalidArgumentError(
            f"{error}; expected JSON such as "
            """'{"enable_kv_cache_events": true, "endpoint": "tcp://*:5557"}'"""
        ) from None
