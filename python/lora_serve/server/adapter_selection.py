"""Which adapter each prompt of a request runs under."""

from __future__ import annotations

from collections.abc import Sequence

from lora_serve.common.errors import InvalidArgumentError
from lora_serve.server.request_errors import ModelNotFoundError, RequestError


def check_adapter_name(name: str, served_model_name: str) -> None:
    """Require a name under which requests can reach an adapter.

    Parameters
    ----------
    name : str
        Not empty, no colon (it stands between base and adapter), no white space, no control characters.
    served_model_name : str
        The base model's name, which an adapter cannot take.

    Raises
    ------
    InvalidArgumentError
        The name breaks a rule.
    """
    if not name:
        raise InvalidArgumentError("lora_name is empty; give the adapter a name")
    if name == served_model_name:
        raise InvalidArgumentError(
            f"lora_name is {name!r}, which is the base model's name; choose another name for the adapter"
        )
    if ":" in name or " " in name or not name.isprintable():
        raise InvalidArgumentError(
            f"lora_name is {name!r} but must have no colon, white space or control characters; choose a name "
            "such as 'sql-v2'"
        )


def select_adapters(
    model: str, lora_path: str | Sequence[str | None] | None, num_prompts: int, served_model_name: str
) -> list[str | None]:
    """Give the adapter's name for each prompt, None for the base model.

    `model` is the base model's name, 'base:adapter' or an adapter's name; `lora_path` is an adapter's name,
    or a list with a name or None a prompt. Where both name an adapter they must name the same one.

    Parameters
    ----------
    model : str
        The request's field.
    lora_path : str, sequence of (str or None), or None
        The request's field.
    num_prompts : int
        Prompts of the request, at least 1.
    served_model_name : str
        The base model's name.

    Returns
    -------
    list of (str or None)
        One entry a prompt. Whether the names are loaded is the engine's to say.

    Raises
    ------
    RequestError
        Two choices contradict each other, a name is empty, or the list's length is not that of the prompts.
    ModelNotFoundError
        A name that no adapter can have.
    """
    of_model = _adapter_of_model(model, served_model_name)
    if lora_path is None:
        return [of_model] * num_prompts
    if isinstance(lora_path, str):
        names: list[str | None] = [lora_path] * num_prompts
    else:
        names = list(lora_path)
        if len(names) != num_prompts:
            raise RequestError(
                f"lora_path has {len(names)} entries but prompt has {num_prompts}; give one name or null for "
                "each prompt",
                param="lora_path",
                code="invalid_value",
            )
    for name in names:
        _check_selected(name, of_model, model)
    return names


def may_autoload(model: str, lora_path: str | Sequence[str | None] | None, served_model_name: str) -> bool:
    """Tell whether the adapter that a request chooses may be a path: in `lora_path`, or as 'base:path'."""
    return lora_path is not None or model.startswith(f"{served_model_name}:")


def _adapter_of_model(model: str, served_model_name: str) -> str | None:
    if model == served_model_name:
        return None
    prefix = f"{served_model_name}:"
    adapter = model.removeprefix(prefix)
    if not adapter:
        raise model_not_found(model, served_model_name)
    return adapter


def _check_selected(name: str | None, of_model: str | None, model: str) -> None:
    if name == "":
        raise RequestError(
            "lora_path is empty; name an adapter, or send null for the base model",
            param="lora_path",
            code="invalid_value",
        )
    if of_model is not None and name != of_model:
        raise RequestError(
            f"model is {model!r}, which chooses adapter {of_model!r}, but lora_path is {name!r}; choose the "
            "adapter in one of them",
            param="lora_path",
            code="invalid_value",
        )


def model_not_found(model: str, served_model_name: str) -> ModelNotFoundError:
    """Give the error for a `model` that does not serve."""
    base, _, adapter = model.partition(":")
    hint = ""
    if adapter and not adapter.startswith("//") and not model.startswith(f"{served_model_name}:"):
        hint = f"; the base model here is not {base!r}: send '{served_model_name}:{adapter}'"
    return ModelNotFoundError(
        f"model {model!r} does not exist: it is neither the base model {served_model_name!r} nor a loaded "
        f"adapter{hint}; GET /v1/models lists both, POST /v1/load_lora_adapter loads an adapter",
        param="model",
    )


def adapter_not_found(lora_path: str) -> ModelNotFoundError:
    """Give the error for a `lora_path` that is not loaded; the same for every path that is not loaded."""
    hint = ""
    if "/" in lora_path:
        hint = ", and is not loaded on first use (see --lora-autoload; the server's log says more)"
    return ModelNotFoundError(
        f"lora_path {lora_path!r} is not a loaded adapter{hint}; GET /v1/loras lists the adapters, POST "
        "/v1/load_lora_adapter loads one",
        param="lora_path",
    )
