"""What the HTTP server itself needs to know; the engine has its own configuration."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from lora_serve.common.errors import InvalidArgumentError
from lora_serve.common.field_checks import check_float, check_int
from lora_serve.server.api_keys import ApiKeys, KeyEntry
from lora_serve.server.limits import ServerLimits

DEFAULT_MAX_BODY_BYTES = 32 * 1024 * 1024
DEFAULT_MAX_ANSWERS_PER_REQUEST = 1024
DEFAULT_METRICS_MAX_ADAPTERS = 100
DEFAULT_ADAPTER_FOLDER_POLL_SECONDS = 2.0
MIN_ADAPTER_FOLDER_POLL_SECONDS = 0.01
TOOL_PARSERS = ("auto", "hermes", "llama3_json")
REASONING_PARSERS = ("qwen3",)
DEFAULT_MAX_AUTOLOADED_ADAPTERS = 64
DEFAULT_DRAIN_TIMEOUT_S = 25.0
"""Running requests get so long to end after the first signal; then the engine ends them.

With what the end itself takes it fits into the 30 s that Kubernetes gives by default, so that whatever is cut
off is still told.
"""


@dataclass(frozen=True)
class AutoloadSettings:
    """Which adapters are loaded when a request first names them, and how many stay.

    Parameters
    ----------
    max_adapters : int
        So many of them are loaded at once, at least 1; the least recently used ones make way.
    allow_local : bool
        They may come from folders of this machine; the engine holds them to its allowed roots.
    allow_hub : bool
        They may be repositories of the Hugging Face hub.

    Raises
    ------
    InvalidArgumentError
        The number is below 1.
    """

    max_adapters: int = DEFAULT_MAX_AUTOLOADED_ADAPTERS
    allow_local: bool = False
    allow_hub: bool = False

    def __post_init__(self) -> None:
        check_int("--lora-autoload-max", self.max_adapters, 1)


@dataclass(frozen=True)
class ServerSettings:
    """Settings of the HTTP server.

    Parameters
    ----------
    served_model_name : str
        The base model's name in requests and answers; without control characters.
    model_path : str
        The base model's path or hub id, shown as `root` in /v1/models.
    api_keys : tuple of str
        Bearer keys of which a request must show one; empty = no key is asked for.
    admin_api_keys : tuple of str
        Bearer keys that may do everything; with one, other keys may not load and unload adapters.
    key_entries : tuple of KeyEntry
        More keys, with restrictions.
    limits : ServerLimits
        What clients may take of the server at once, and for how long.
    otlp_traces_endpoint : str or None
        URL of an OpenTelemetry collector that gets a span of each request.
    max_body_bytes : int
        Longest accepted request body in bytes.
    max_answers_per_request : int
        Most answers (prompts times n) that one HTTP request may ask for.
    autoload : AutoloadSettings or None
        How adapters are loaded on first use; None = they are not.
    metrics_max_adapters : int
        Most adapters whose requests have series of their own in /metrics; those of others are added up.
    tool_call_parser : str
        How the model writes tool calls: 'auto' (as its chat template shows them) or a name of TOOL_PARSERS.
    reasoning_parser : str or None
        How the model writes its reasoning, one of REASONING_PARSERS; None = reasoning is content.
    operator_page : bool
        GET / gives the operator page.
    tokenizer_info : bool
        GET /tokenizer_info gives the tokenizer's settings, its chat template among them.

    Raises
    ------
    InvalidArgumentError
        The name or a key is empty or unprintable, or a limit is below 1 (`metrics_max_adapters`: below 0).
    """

    served_model_name: str
    model_path: str
    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES
    max_answers_per_request: int = DEFAULT_MAX_ANSWERS_PER_REQUEST
    autoload: AutoloadSettings | None = None
    metrics_max_adapters: int = DEFAULT_METRICS_MAX_ADAPTERS
    tool_call_parser: str = "auto"
    reasoning_parser: str | None = None
    operator_page: bool = True
    tokenizer_info: bool = False
    admin_api_keys: tuple[str, ...] = ()
    key_entries: tuple[KeyEntry, ...] = ()
    limits: ServerLimits = field(default_factory=ServerLimits)
    otlp_traces_endpoint: str | None = None

    @property
    def keys(self) -> ApiKeys:
        """All keys, and whose they are."""
        return ApiKeys(full=self.api_keys, admin=self.admin_api_keys, entries=self.key_entries)

    def __post_init__(self) -> None:
        if not self.served_model_name or not self.served_model_name.isprintable():
            raise InvalidArgumentError(
                f"served_model_name is {self.served_model_name!r} but must be a non-empty printable name; "
                "set --served-model-name"
            )
        _ = self.keys  # Refuses bad ones.
        if self.max_body_bytes < 1:
            raise InvalidArgumentError(f"max_body_bytes is {self.max_body_bytes} but must be at least 1")
        if self.max_answers_per_request < 1:
            raise InvalidArgumentError(
                f"max_answers_per_request is {self.max_answers_per_request} but must be at least 1; set "
                "--max-answers-per-request"
            )
        if self.metrics_max_adapters < 0:
            raise InvalidArgumentError(
                f"metrics_max_adapters is {self.metrics_max_adapters} but must be at least 0; set "
                "--metrics-max-adapters"
            )
        if self.tool_call_parser not in TOOL_PARSERS:
            raise InvalidArgumentError(
                f"--tool-call-parser is {self.tool_call_parser!r} but must be one of "
                f"{', '.join(TOOL_PARSERS)}"
            )
        if self.reasoning_parser not in (None, *REASONING_PARSERS):
            raise InvalidArgumentError(
                f"--reasoning-parser is {self.reasoning_parser!r} but must be one of "
                f"{', '.join(REASONING_PARSERS)}"
            )


@dataclass(frozen=True)
class AdapterFolderSettings:
    """Which folder is watched, and how.

    Parameters
    ----------
    path : str
        An existing folder; each subfolder is an adapter of its name.
    served_model_name : str
        The base model's name, which no adapter can have.
    poll_seconds : float
        Between two looks at the folder, at least MIN_ADAPTER_FOLDER_POLL_SECONDS.
    allowed_roots : sequence of str or None
        Folders that adapters may come from; the folder must be in one of them. None = any.

    Raises
    ------
    InvalidArgumentError
        The path is no folder or outside the allowed roots, or the time is too short.
    """

    path: str
    served_model_name: str
    poll_seconds: float = DEFAULT_ADAPTER_FOLDER_POLL_SECONDS
    allowed_roots: Sequence[str] | None = None

    def __post_init__(self) -> None:
        check_float("--lora-dir-poll-seconds", self.poll_seconds, MIN_ADAPTER_FOLDER_POLL_SECONDS)
        if not os.path.isdir(self.path):
            raise InvalidArgumentError(f"--lora-dir is {self.path!r} but must be an existing folder")
        from lora_serve.lora.allowed_roots import AllowedRoots

        try:
            AllowedRoots(self.allowed_roots).resolve(self.path)
        except InvalidArgumentError as error:
            raise InvalidArgumentError(f"--lora-dir cannot be used: {error}") from None
