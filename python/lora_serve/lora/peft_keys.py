"""What a tensor's key in a PEFT checkpoint says: which module, and which half of its LoRA pair.

Spellings that are understood, all for the same tensor:

- ``base_model.model.<module path>.lora_A.weight``, as PEFT's ``save_pretrained`` writes it;
- with the adapter's name during training after ``lora_A``, as in a raw state dict;
- without ``base_model.model.``, as other trainers write it;
- with the module path of the bare decoder, which lacks the leading ``model.``;
- with the module path inside a multimodal model: ``language_model.`` before or after ``model.``.

Embeddings have ``lora_embedding_A`` in the place of ``lora_A.weight``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

_LORA_KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\."
    r"(?:lora_(?P<half>[AB])(?:\.[^.]+)?\.weight|lora_embedding_(?P<embedding_half>[AB])(?:\.[^.]+)?)"
)
_BASE_WEIGHT = re.compile(
    r"(?:base_model\.model\.)?(?P<module>(?:.+\.)?(?:embed_tokens|lm_head))\.base_layer\.weight"
)
_LANGUAGE_MODEL = re.compile(r"(?:model\.)?language_model\.")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_EMBEDDINGS = ("embed_tokens", "lm_head")


@dataclass(frozen=True)
class PeftTensorKey:
    """A key of one half of a LoRA pair.

    Parameters
    ----------
    trained_module
        Module path in the model that the adapter was trained on; the configuration's patterns mean this one.
    module
        Module path in the model that is served: one of its LoRA targets, or one of its fused modules.
    half
        ``"A"`` or ``"B"``.
    is_embedding
        True: a look-up's matrices, which PEFT stores the other way round (``lora_embedding_A``).
    """

    trained_module: str
    module: str
    half: str
    is_embedding: bool = False


class PeftKeyParser:
    """Finds the module that a key belongs to.

    Parameters
    ----------
    targets
        Module paths of the model that may have an adapter.
    fused
        Paths of fused modules that a checkpoint may have in the place of several targets.
    """

    def __init__(self, targets: Collection[str], fused: Mapping[str, Sequence[str]]) -> None:
        self._targets = targets
        self._fused = fused
        indices = (layer_index(target) for target in targets)
        self._layers = {index for index in indices if index is not None}

    def parse(self, key: str) -> PeftTensorKey | str:
        """Parse a key.

        Returns
        -------
        PeftTensorKey or str
            The parsed key, or in words why the tensor cannot be applied.
        """
        match = _LORA_KEY.fullmatch(key)
        if match is None:
            return _why_not_lora(key)
        trained_module, half = match["module"], match["half"] or match["embedding_half"]
        module = self._find(trained_module)
        if module is None:
            return self._why_not_target(trained_module)
        return PeftTensorKey(trained_module, module, half, match["half"] is None)

    def parse_base_weight(self, key: str) -> str | None:
        """The module whose base weights a key holds, None for every other key.

        PEFT saves the base weights of an embedding or of ``lm_head`` beside the LoRA pair that was trained on
        it, also where they are unchanged.
        """
        match = _BASE_WEIGHT.fullmatch(key)
        return None if match is None else self._find(match["module"])

    def _find(self, trained_module: str) -> str | None:
        for module in _possible_paths(trained_module):
            if module in self._targets or module in self._fused:
                return module
        return None

    def _why_not_target(self, module: str) -> str:
        name = module.rsplit(".", 1)[-1]
        if name in _EMBEDDINGS:
            return (
                f"LoRA on {name}, which is not supported for this model: train without it in target_modules"
            )
        layer = layer_index(module)
        if layer is not None and self._layers and layer not in self._layers:
            return (
                f"for layer {layer}, but the model has layers 0 to {max(self._layers)}: it was trained on "
                "another model"
            )
        known = {target.rsplit(".", 1)[-1] for target in self._targets}
        return (
            f"for module '{module}', which the model does not have; expected one of "
            f"{', '.join(sorted(known))} at its place in the model"
        )


def layer_index(module: str) -> int | None:
    """The decoder layer that a module path is in, or None where it is in none."""
    match = _LAYER.search(module)
    return None if match is None else int(match[1])


def _possible_paths(trained_module: str) -> Iterator[str]:
    """Yield paths in the served model that a path in the trained one may stand for."""
    yield trained_module
    yield f"model.{trained_module}"
    match = _LANGUAGE_MODEL.match(trained_module)
    if match is not None:
        inner = trained_module[match.end() :]
        yield inner
        yield f"model.{inner}"


def _why_not_lora(key: str) -> str:
    if "lora_magnitude_vector" in key:
        return "a DoRA magnitude; expected plain LoRA: train with use_dora=false"
    if "modules_to_save" in key:
        return "a fully trained module; expected LoRA only: train without modules_to_save"
    if key.endswith(".bias"):
        return "a trained bias; expected none: train with bias='none' and lora_bias=false"
    if any(f"{name}." in key for name in _EMBEDDINGS) and "lora_" not in key:
        return (
            "full embedding weights, as saved when tokens were added or embeddings trained; expected LoRA "
            "only: save with save_embedding_layers=False if the embeddings are unchanged"
        )
    return "an unknown key; expected base_model.model.<module path>.lora_A.weight or .lora_B.weight"
