"""From a model's name to a model that is ready to run."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from lora_serve.common.errors import InvalidArgumentError
from lora_serve.models.checkpoint import CheckpointLoader, fill_with_random_weights, find_checkpoint_files
from lora_serve.models.config import read_model_config
from lora_serve.models.decoder import DecoderModel

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_CONFIG_PATTERNS = ["*.json", "*.txt", "*.jinja", "tokenizer.model"]
_WEIGHT_PATTERNS = ["model*.safetensors"]


def resolve_model_directory(model: str, *, needs_weights: bool = True) -> Path:
    """Give the local directory of a model; download it where it is a hub id.

    Parameters
    ----------
    model
        A directory, or a Hugging Face hub id such as ``Qwen/Qwen3-0.6B``. A directory of that name wins.
    needs_weights
        False: only configuration and tokenizer are downloaded.

    Raises
    ------
    InvalidArgumentError
        There is no such directory and it is no hub id, or the download failed.
    """
    directory = Path(model).expanduser()
    if model and directory.is_dir():
        return directory
    if directory.exists() or not _HUB_ID.fullmatch(model):
        found = "is a file" if directory.is_file() else "does not exist"
        raise InvalidArgumentError(
            f"model {model!r} {found}; give a Hugging Face checkpoint directory or a hub id like 'org/name'"
        )
    from huggingface_hub import snapshot_download

    patterns = _CONFIG_PATTERNS + (_WEIGHT_PATTERNS if needs_weights else [])
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except Exception as error:  # the library raises its own, httpx's and OSError, by version
        raise InvalidArgumentError(
            f"model {model!r} is neither a local directory nor could it be downloaded from the Hugging Face "
            f"hub ({type(error).__name__}: {error}); check the name, the network and HF_TOKEN"
        ) from error


def load_model(
    model: str,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    load_format: str = "auto",
    attention_backend: str = "torch",
    seed: int = 0,
    max_positions: int | None = None,
) -> DecoderModel:
    """Load a model.

    Parameters
    ----------
    model
        A checkpoint directory or a hub id.
    dtype
        'auto' (the checkpoint's), 'float32', 'bfloat16' or 'float16'.
    device
        A torch device.
    load_format
        'auto': safetensors. 'dummy': random weights from ``seed``; only config.json is read.
    attention_backend
        Name of the attention implementation.
    seed
        Of dummy weights, at least 0.
    max_positions
        Positions that a token may have; None = as many as the model has.

    Returns
    -------
    DecoderModel
        With all weights filled, on ``device``.

    Raises
    ------
    InvalidArgumentError
        The model is not found, not supported or broken, or an argument is none of the above.

    Notes
    -----
    Shows a progress bar on stderr; the environment variable ``TQDM_DISABLE=1`` switches it off.
    """
    if load_format not in ("auto", "dummy"):
        raise InvalidArgumentError(f"load_format is {load_format!r}, expected 'auto' or 'dummy'")
    try:
        target_device = torch.device(device)
    except RuntimeError as error:
        raise InvalidArgumentError(f"device is {device!r}, expected a torch device such as 'cpu'") from error
    directory = resolve_model_directory(model, needs_weights=load_format == "auto")
    config = read_model_config(directory, dtype)
    files = find_checkpoint_files(directory) if load_format == "auto" else []
    decoder = DecoderModel(
        config, device=target_device, attention_backend=attention_backend, max_positions=max_positions
    )
    parameters = decoder.checkpoint_tensors()
    if load_format == "dummy":
        fill_with_random_weights(parameters, seed)
    else:
        CheckpointLoader(parameters, has_tied_embeddings=config.has_tied_embeddings).load(files)
    return decoder
