"""How a caller of the Python interface names an adapter."""

from __future__ import annotations

from dataclasses import dataclass

from lora_serve.common.field_checks import check_text


@dataclass(frozen=True)
class LoRARequest:
    """An adapter by name and, when it may not be loaded yet, by path.

    Parameters
    ----------
    lora_name : str
        The adapter's name in the engine, not empty.
    lora_path : str or None
        A PEFT directory, or a reference to one, as `LLM.load_lora_adapter` takes it. With a path the adapter
        is loaded at its first use; if the name is loaded already with other content, the use is refused.
        None: the name must have been loaded before.

    Raises
    ------
    InvalidArgumentError
        Name or path is not a string, is empty, or is not valid Unicode.
    """

    lora_name: str
    lora_path: str | None = None

    def __post_init__(self) -> None:
        check_text("lora_name", self.lora_name)
        if self.lora_path is not None:
            check_text("lora_path", self.lora_path)
