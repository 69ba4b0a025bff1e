"""Bodies of the endpoints that load, unload and list adapters and models."""

from __future__ import annotations

from typing import Literal

from lora_serve.server.protocol.base import RequestModel, ResponseModel


class LoadAdapterRequest(RequestModel):
    """Load an adapter under a name.

    Parameters
    ----------
    lora_name : str
        Not empty; no colon, white space or control characters; not the base model's name.
    lora_path : str
        A PEFT directory on the server; or a repository of the Hugging Face hub, or a reference for a plug-in,
        where the server was started to allow them.
    load_inplace : bool or None
        Replace what the name has when its content differs, instead of answering 409.
    pinned : bool or None
        Keep the adapter on the device.
    weight : float or None
        Its share of the steps beside other adapters, in (0, 1000]; 1 when it is not given.
    """

    lora_name: str
    lora_path: str
    load_inplace: bool | None = None
    pinned: bool | None = None
    weight: float | None = None


class UnloadAdapterRequest(RequestModel):
    """Unload an adapter.

    Parameters
    ----------
    lora_name : str
        The adapter's name.
    force : bool or None
        Abort its running requests instead of letting them end.
    """

    lora_name: str
    force: bool | None = None


class LoadAdapterResponse(ResponseModel):
    """What serves under the name from now on."""

    message: str
    lora_name: str
    adapter_id: int
    already_loaded: bool


class UnloadAdapterResponse(ResponseModel):
    """The adapter is gone: its pages and memory are free."""

    message: str
    lora_name: str


class ModelCard(ResponseModel):
    """A name that `model` may be: the base model (parent null), or an adapter."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["lora_serve"]
    root: str
    parent: str | None
    max_model_len: int


class ModelList(ResponseModel):
    """Every name that serves."""

    object: Literal["list"]
    data: list[ModelCard]
