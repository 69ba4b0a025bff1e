"""How a caller of the Python interface names an adapter."""

from __future__ import annotations

from dataclasses import dataclass

from lora_serve.common.errors import InvalidArgumentError


@dataclass(frozen=True)
class LoRARequest:
    """An adapter by name and, when it may not be loaded yet, by path.

    Parameters
    ----------
    lora_name : str
        The adapter's name in the engine, not empty.
    lora_path : str or None
        A PEFT directory. With a path the adapter is loaded at its first use; if the name is loaded already
        with other content, the use is refused. None: the name must have been loaded before.

    Raises
    ------
    InvalidArgumentError
        The name is empty, or name or path is not a string.
    """

    lora_name: str
    lora_path: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.lora_name, str) or not self.lora_name:
            raise InvalidArgumentError(
                f"lora_name is {self.lora_name!r} but must be a non-empty string; use None for the base model"
            )
        if self.lora_path is not None and not isinstance(self.lora_path, str):
            raise InvalidArgumentError(f"lora_path is {self.lora_path!r} but must be a string or None")
