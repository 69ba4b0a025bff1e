"""Bodies of the endpoints that load, unload and list adapters and models."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator

from lora_serve.server.protocol.base import RequestModel, ResponseModel, refuse_unless


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
    lora_id : None
        SGLang's servers number adapters themselves; only null is accepted.
    is_3d_lora_weight : bool or None
        vLLM's, of mixture-of-experts adapters; only what asks for nothing.
    """

    lora_name: str
    lora_path: str
    load_inplace: bool | None = None
    pinned: bool | None = None
    weight: float | None = None
    lora_id: None = None
    is_3d_lora_weight: Annotated[
        bool | None,
        AfterValidator(refuse_unless(False, because="adapters of experts are not served; remove the field")),
    ] = None


class UnloadAdapterRequest(RequestModel):
    """Unload an adapter.

    Parameters
    ----------
    lora_name : str
        The adapter's name.
    force : bool or None
        Abort its running requests instead of letting them end.
    lora_id, lora_int_id : None
        Numbers by which SGLang and vLLM know adapters; only null is accepted.
    """

    lora_name: str
    force: bool | None = None
    lora_id: None = None
    lora_int_id: None = None


class LoadAdapterResponse(ResponseModel):
    """What serves under the name from now on; vLLM's clients read the status, SGLang's the last three fields.

    Parameters
    ----------
    loaded_adapters : dict from str to str
        Every name that serves, with its path; only in answers of the endpoint without /v1, which is SGLang's.
    """

    message: str
    lora_name: str
    adapter_id: int
    already_loaded: bool
    success: Literal[True]
    error_message: None
    loaded_adapters: dict[str, str] | None = None


class UnloadAdapterResponse(ResponseModel):
    """The adapter is gone: its pages and memory are free. The last three fields are as of a load."""

    message: str
    lora_name: str
    success: Literal[True]
    error_message: None
    loaded_adapters: dict[str, str] | None = None


class LoraSource(RequestModel):
    """Where an adapter comes from.

    Parameters
    ----------
    uri : str
        As `lora_path` of LoadAdapterRequest, or file:///path.
    """

    uri: str


class LoadLoraRequest(RequestModel):
    """Load an adapter under a name, in Dynamo's form.

    Parameters
    ----------
    lora_name : str
        As of LoadAdapterRequest.
    source : LoraSource
        Where it comes from.
    """

    lora_name: str
    source: LoraSource


class LoraResponse(ResponseModel):
    """An adapter was loaded or unloaded, in Dynamo's form; `lora_id` is its generation."""

    status: Literal["success"]
    message: str
    lora_name: str
    lora_id: int


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
