"""What clients may take of the server, at once and for how long."""

from __future__ import annotations

import resource
from dataclasses import dataclass

from lora_serve.common.errors import InvalidArgumentError
from lora_serve.common.field_checks import check_float

DEFAULT_HEADER_TIMEOUT_S = 30.0
DEFAULT_BODY_TIMEOUT_S = 120.0
MIN_TIMEOUT_S = 0.05
DEFAULT_MAX_CONNECTIONS = 16384
RESERVED_FILES = 256
"""Open files of the server beside connections: the engine's sockets, listeners, libraries, the log."""


@dataclass(frozen=True)
class ServerLimits:
    """Limits on clients.

    Parameters
    ----------
    max_concurrent_requests : int
        Most requests at once that ask for tokens, of all keys together; 0 = no limit.
    max_concurrent_requests_per_key : int
        The same, of one key.
    max_connections : int
        Most open connections; 0 = as many as the limit on open files leaves room for.
    header_timeout_s : float
        A connection that has not sent the headers of a request by then is closed.
    body_timeout_s : float
        A request whose body is not there by then, after its headers, fails.

    Raises
    ------
    InvalidArgumentError
        A number is negative, or a time too short.
    """

    max_concurrent_requests: int = 0
    max_concurrent_requests_per_key: int = 0
    max_connections: int = 0
    header_timeout_s: float = DEFAULT_HEADER_TIMEOUT_S
    body_timeout_s: float = DEFAULT_BODY_TIMEOUT_S

    def __post_init__(self) -> None:
        for name in ("max_concurrent_requests", "max_concurrent_requests_per_key", "max_connections"):
            if getattr(self, name) < 0:
                option = name.replace("_", "-")
                raise InvalidArgumentError(
                    f"--{option} is {getattr(self, name)} but must be at least 0; 0 = no limit of its own"
                )
        check_float("--header-timeout", self.header_timeout_s, MIN_TIMEOUT_S)
        check_float("--body-timeout", self.body_timeout_s, MIN_TIMEOUT_S)


@dataclass(frozen=True)
class ConnectionRoom:
    """How many connections a process can hold.

    Parameters
    ----------
    max_connections : int
        Open at once; beyond them idle ones are closed.
    backlog : int
        Accepted in one go, before any of them can be closed.
    """

    max_connections: int
    backlog: int


def make_room(max_connections: int) -> ConnectionRoom:
    """Raise this process's limit on open files as far as it may and is of use, and divide what there is.

    Parameters
    ----------
    max_connections : int
        As of ServerLimits.

    Raises
    ------
    InvalidArgumentError
        The limit on open files does not hold so many.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = (max_connections or DEFAULT_MAX_CONNECTIONS) + RESERVED_FILES + 2048
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    num_files = wanted if soft == resource.RLIM_INFINITY else min(soft, wanted)
    backlog = min(2048, max(16, num_files // 8))
    room = num_files - RESERVED_FILES - backlog
    if room < max(1, max_connections):
        raise InvalidArgumentError(
            f"--max-connections is {max_connections or 'not set'} but the limit on open files is "
            f"{num_files}, of which {RESERVED_FILES + backlog} are for other things; raise it (ulimit -n), "
            "or lower --max-connections"
        )
    return ConnectionRoom(max_connections or min(room, DEFAULT_MAX_CONNECTIONS), backlog)
