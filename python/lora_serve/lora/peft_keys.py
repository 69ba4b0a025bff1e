"""What a tensor's key in a PEFT checkpoint says: which module, and which half of its LoRA pair."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

_LORA_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+)\.lora_(?P<half>[AB])(?:\.(?P<adapter>[^.]+))?\.weight"
)
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_NOT_SERVED = ("embed_tokens", "lm_head")


@dataclass(frozen=True)
class PeftTensorKey:
    """A key of one half of a LoRA pair.

    Parameters
    ----------
    trained_module
        Module path in the model that the adapter was trained on; the configuration's patterns mean this one.
    module
        Module path in the model that is served, one of its LoRA targets.
    half
        ``"A"`` or ``"B"``.
    """

    trained_module: str
    module: str
    half: str


def parse_peft_key(key: str, targets: Collection[str]) -> PeftTensorKey | str:
    """Parse a key and find the module that it belongs to.

    Parameters
    ----------
    key
        ``base_model.model.<module path>.lora_A.weight``; between ``lora_A`` and ``weight`` the name that the
        adapter had during training may stand. The module path is that of the causal language model, or of the
        bare decoder, which lacks the leading ``model.``.
    targets
        Module paths of the model that may have an adapter.

    Returns
    -------
    PeftTensorKey or str
        The parsed key, or in words why the tensor cannot be applied.
    """
    match = _LORA_KEY.fullmatch(key)
    if match is None:
        return _why_not_lora(key)
    trained_module = match["module"]
    for module in (trained_module, f"model.{trained_module}"):
        if module in targets:
            return PeftTensorKey(trained_module, module, match["half"])
    return _why_not_target(trained_module, targets)


def layer_index(module: str) -> int | None:
    """The decoder layer that a module path is in, or None where it is in none."""
    match = _LAYER.search(module)
    return None if match is None else int(match[1])


def _why_not_lora(key: str) -> str:
    if "lora_magnitude_vector" in key:
        return "a DoRA magnitude; expected plain LoRA: train with use_dora=false"
    if "lora_embedding_" in key:
        return "LoRA on an embedding, which is not supported yet: train without it in target_modules"
    if "modules_to_save" in key:
        return "a fully trained module; expected LoRA only: train without modules_to_save"
    if key.endswith(".bias"):
        return "a trained bias; expected none: train with bias='none' and lora_bias=false"
    if any(f"{name}." in key for name in _NOT_SERVED) and "lora_" not in key:
        return (
            "full embedding weights, as saved when tokens were added or embeddings trained; expected LoRA "
            "only: save with save_embedding_layers=False if the embeddings are unchanged"
        )
    return "an unknown key; expected base_model.model.<module path>.lora_A.weight or .lora_B.weight"


def _why_not_target(module: str, targets: Collection[str]) -> str:
    name = module.rsplit(".", 1)[-1]
    if name in _NOT_SERVED:
        return f"LoRA on {name}, which is not supported yet: train without it in target_modules"
    layer = layer_index(module)
    layers = {index for index in map(layer_index, targets) if index is not None}
    if layer is not None and layers and layer not in layers:
        return (
            f"for layer {layer}, but the model has layers 0 to {max(layers)}: it was trained on another model"
        )
    known = sorted({target.rsplit(".", 1)[-1] for target in targets})
    return (
        f"for module '{module}', which the model does not have; expected one of {', '.join(known)} in a layer"
    )
