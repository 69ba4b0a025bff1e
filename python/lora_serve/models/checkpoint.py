"""Filling a model's parameters from safetensors files, each exactly once and with nothing left over."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from lora_serve.common.errors import InvalidArgumentError
from lora_serve.models.config_fields import ConfigFields, read_json_object
from lora_serve.models.staged_copies import StagedCopies

_INDEX_NAME = "model.safetensors.index.json"
_SINGLE_NAME = "model.safetensors"
_EMBEDDING_NAME, _LOGITS_NAME = "model.embed_tokens.weight", "lm_head.weight"
# A buffer that old versions of transformers saved; it is computed from the configuration.
_HARMLESS_SUFFIX = ".rotary_emb.inv_freq"
_FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def find_checkpoint_files(directory: Path) -> list[Path]:
    """Give the safetensors files of a checkpoint directory.

    Returns
    -------
    list[Path]
        The shards that the index names, sorted; without an index the single file.

    Raises
    ------
    InvalidArgumentError
        There is neither, the index is broken, or a shard that it names is missing.
    """
    index_path = directory / _INDEX_NAME
    if not index_path.is_file():
        single = directory / _SINGLE_NAME
        if single.is_file():
            return [single]
        raise InvalidArgumentError(
            f"model directory {directory} has neither {_SINGLE_NAME} nor {_INDEX_NAME}; convert the weights "
            "to safetensors, or use --load-format dummy for random weights"
        )
    index = ConfigFields(str(index_path), read_json_object(index_path))
    weight_map: Any = index.content.get("weight_map")
    is_map = isinstance(weight_map, dict) and bool(weight_map)
    if not is_map or any(not isinstance(name, str) or "/" in name for name in weight_map.values()):
        index.refuse("weight_map", "an object from tensor names to names of files beside the index")
    files = [directory / name for name in sorted(set(weight_map.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise InvalidArgumentError(
            f"{index_path} names shards that are missing: {', '.join(missing)}; download the checkpoint again"
        )
    return files


class CheckpointLoader:
    """Copies tensors into parameters and keeps account of them.

    Parameters
    ----------
    parameters
        Tensor of the checkpoint to the (part of a) parameter that it fills.
    has_tied_embeddings
        ``lm_head.weight`` may occur beside the embedding, and must then equal it; or instead of it.
    show_progress
        True: a progress bar on stderr.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], *, has_tied_embeddings: bool, show_progress: bool = True
    ) -> None:
        self._parameters = parameters
        self._has_tied_embeddings = has_tied_embeddings
        self._show_progress = show_progress
        self._source_files: dict[str, Path] = {}
        device = next(iter(parameters.values())).device
        self._staged = StagedCopies(device) if device.type == "cuda" else None

    def load(self, files: list[Path]) -> None:
        """Fill all parameters.

        Parameters
        ----------
        files
            Safetensors files, read one after the other. They are mapped, not held in memory: the system may
            drop a page as soon as it is on the parameters' device.

        Raises
        ------
        InvalidArgumentError
            A file is truncated or not safetensors; a tensor is unexpected, occurs twice, or has a wrong shape
            or type; or a parameter is not filled. The parameters are then partly filled and not to be used.
        """
        total = sum(file.stat().st_size for file in files)
        # Where the bar is wanted, `disable` is left to tqdm, which reads TQDM_DISABLE from the environment.
        options = {} if self._show_progress else {"disable": True}
        with tqdm(total=total, unit="B", unit_scale=True, desc="Loading weights", **options) as bar:
            for file, after in zip(files, [*files[1:], None], strict=True):
                if after is not None:
                    _read_ahead(after)
                self._load_file(file, bar)
            bar.update(total - bar.n)  # the files' headers
        if self._staged is not None:
            self._staged.wait()
        self._check_complete(files)

    def _load_file(self, file: Path, bar: tqdm[Any]) -> None:
        try:
            with safe_open(file, framework="pt", device="cpu") as content:
                for name in content.keys():  # noqa: SIM118 - not a mapping
                    tensor = content.get_tensor(name)
                    self._fill(file, name, tensor)
                    bar.update(tensor.nbytes)
        except (SafetensorError, OSError) as error:
            raise InvalidArgumentError(
                f"{file} is truncated or not a safetensors file ({error}); download it again"
            ) from error

    def _fill(self, file: Path, name: str, tensor: Tensor) -> None:
        if name.endswith(_HARMLESS_SUFFIX):
            return
        if name in self._source_files:
            raise InvalidArgumentError(
                f"{file}: tensor {name!r} was loaded from {self._source_files[name].name} already; expected "
                "once in all files"
            )
        target = self._parameters.get(name)
        if name == _LOGITS_NAME and self._has_tied_embeddings:
            target = self._parameters[_EMBEDDING_NAME]
        if target is None:
            raise InvalidArgumentError(
                f"{file}: tensor {name!r} of shape {tuple(tensor.shape)} is unexpected: the model that "
                "config.json describes has no such parameter"
            )
        if tensor.shape != target.shape or tensor.dtype not in _FLOAT_DTYPES:
            raise InvalidArgumentError(
                f"{file}: tensor {name!r} has shape {tuple(tensor.shape)} and dtype {tensor.dtype}, expected "
                f"{tuple(target.shape)} of float32, bfloat16 or float16"
            )
        self._copy(file, name, tensor, target)
        self._source_files[name] = file

    def _copy(self, file: Path, name: str, tensor: Tensor, target: Tensor) -> None:
        twin = {_EMBEDDING_NAME: _LOGITS_NAME, _LOGITS_NAME: _EMBEDDING_NAME}.get(name)
        if self._has_tied_embeddings and twin in self._source_files:
            if not torch.equal(target, tensor.to(target)):
                raise InvalidArgumentError(
                    f"{file}: {name!r} differs from {twin!r} although config.json has tie_word_embeddings "
                    "true, expected equal tensors; set tie_word_embeddings to false if both are meant"
                )
            return
        with torch.no_grad():
            if self._staged is None:
                target.copy_(tensor)
            else:
                self._staged.copy(tensor, target)

    def _check_complete(self, files: list[Path]) -> None:
        filled = set(self._source_files)
        if self._has_tied_embeddings and _LOGITS_NAME in filled:
            filled.add(_EMBEDDING_NAME)
        missing = [name for name in self._parameters if name not in filled]
        if missing:
            shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise InvalidArgumentError(
                f"{files[0].parent}: {len(missing)} of {len(self._parameters)} tensors are missing from "
                f"{len(files)} safetensors file(s): {shown}; the checkpoint is incomplete or its config.json "
                "describes another model"
            )


def _read_ahead(file: Path) -> None:
    """Have the system read a file from the disk while another is copied."""
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError:
        return  # Said by the one who opens it next.
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(descriptor)


def fill_with_random_weights(parameters: Mapping[str, Tensor], seed: int) -> None:
    """Fill a model without files: matrices with scaled normal noise, vectors with ones (norms) or zeros.

    Parameters
    ----------
    parameters
        As for :class:`CheckpointLoader`; filled in their order, so that a seed gives the same weights.
    seed
        At least 0. The same seed gives other weights on another kind of device.

    Notes
    -----
    Drawn on the parameters' own device and in their dtype: nothing crosses the bus.
    """
    generator: torch.Generator | None = None
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith(".bias") else 1.0)
                continue
            if generator is None:
                generator = torch.Generator(parameter.device).manual_seed(seed)
            parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
