"""Reads a PEFT adapter directory into host memory: validated, converted, in the layout that operators read.

Nothing is guessed. What does not fit exactly is refused, with every problem that can be found in one pass:
first the configuration, then the weights' header (keys, shapes, types, ranks), and only then the data.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_serve.kernels.lora_weights import LoRASliceWeights
from lora_serve.layers.linear import LoRATarget
from lora_serve.lora.adapter_files import WEIGHTS_FILE, AdapterFiles, TensorInfo
from lora_serve.lora.load_problems import LoadProblems
from lora_serve.lora.peft_config import CONFIG_FILE, PeftLoRAConfig, parse_peft_config
from lora_serve.lora.peft_keys import PeftTensorKey, layer_index, parse_peft_key

_FILE_DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class AdapterLimits:
    """What the engine accepts and how it stores it.

    Parameters
    ----------
    max_lora_rank
        Largest rank of any module, >= 1.
    dtype
        The model's dtype, to which weights are converted.
    """

    max_lora_rank: int
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class HostAdapter:
    """One adapter in host memory, ready to be installed.

    Parameters
    ----------
    path
        Real path of the directory that it was read from.
    modules
        Module path in the served model to weights: A [R, H] and B [R, O], contiguous, on the CPU, in the
        model's dtype. Only modules that the adapter has.
    content_digest
        Hex SHA-256 of what the adapter computes: modules, ranks, scalings and tensors as stored in the file.
        Equal content in another folder, or under another spelling of the keys, has the same digest.
    num_bytes
        Bytes of all tensors in the model's dtype.
    lora_rank
        The largest rank of its modules.
    """

    path: str
    modules: Mapping[str, LoRASliceWeights]
    content_digest: str
    num_bytes: int
    lora_rank: int

    @property
    def target_modules(self) -> tuple[str, ...]:
        """Last components of the module paths, sorted, each once: ``("k_proj", "q_proj")``."""
        return tuple(sorted({module.rsplit(".", 1)[-1] for module in self.modules}))


@dataclass(frozen=True)
class _ModuleSource:
    """Where one module's weights stand in the file, and how they are to be applied."""

    module: str
    key_a: str
    key_b: str
    lora_rank: int
    scaling: float


def read_peft_adapter(
    path: str,
    targets: Mapping[str, LoRATarget],
    limits: AdapterLimits,
    *,
    name: str | None = None,
    resolve: Callable[[str], str] = os.path.realpath,
) -> HostAdapter:
    """Read, validate and convert a PEFT directory.

    Parameters
    ----------
    path
        The directory that PEFT's ``save_pretrained`` wrote.
    targets
        Module paths of the model that may have an adapter.
    limits
        What is accepted, and the dtype to store.
    name
        How messages name the adapter; its path where None.
    resolve
        Gives the real path of a path, or raises where it leads outside what is allowed.

    Returns
    -------
    HostAdapter

    Raises
    ------
    InvalidArgumentError
        The adapter cannot be read or cannot be applied exactly as trained; lists file, key, found, expected.

    Notes
    -----
    Thread-safe; touches nothing but its arguments. Holds the file's bytes and the converted tensors at once.
    """
    problems = LoadProblems(name if name is not None else path)
    directory = resolve(path)
    files = AdapterFiles(directory, problems, resolve)
    config = parse_peft_config(files.read_config(), problems)
    header = files.read_header()
    sources = _match_modules(header, config, targets, problems)
    _check_ranks(sources, limits, problems)
    _check_tensors(sources, header, targets, problems)
    problems.raise_if_any()

    tensors = files.read_tensors(header)
    modules = {source.module: _convert(source, tensors, limits.dtype, problems) for source in sources}
    problems.raise_if_any()
    return HostAdapter(
        path=directory,
        modules=modules,
        content_digest=_content_digest(sources, tensors),
        num_bytes=sum(weights.num_bytes for weights in modules.values()),
        lora_rank=max(source.lora_rank for source in sources),
    )


def _match_modules(
    header: Mapping[str, TensorInfo],
    config: PeftLoRAConfig,
    targets: Mapping[str, LoRATarget],
    problems: LoadProblems,
) -> list[_ModuleSource]:
    """Pair up the halves of each module, in the order of module paths; note keys that cannot be applied."""
    halves: dict[str, dict[str, str]] = {}
    parsed: dict[str, PeftTensorKey] = {}
    unmatched: list[str] = []
    for key in sorted(header):
        tensor_key = parse_peft_key(key, targets)
        if isinstance(tensor_key, str):
            unmatched.append(f"key '{key}' is {tensor_key}")
            continue
        other = halves.setdefault(tensor_key.module, {}).setdefault(tensor_key.half, key)
        if other != key:
            problems.add_in_file(
                WEIGHTS_FILE,
                f"keys '{other}' and '{key}' are the same tensor of module '{tensor_key.module}'",
            )
        parsed[key] = tensor_key
    if not parsed:
        problems.add_in_file(
            WEIGHTS_FILE,
            f"none of its {len(header)} keys matches a module of the model; expected at least one: "
            "was it trained on another model?",
        )
    for text in unmatched:
        problems.add_in_file(WEIGHTS_FILE, text)

    sources = []
    for module, keys in sorted(halves.items()):
        for half in "AB":
            if half not in keys:
                found = next(iter(keys.values()))
                problems.add_in_file(
                    WEIGHTS_FILE, f"key '{found}' has no lora_{half} beside it; expected both"
                )
        if len(keys) == 2:
            trained = parsed[keys["A"]].trained_module
            why_not = config.why_not_targeted(trained, layer_index(module))
            if why_not is not None:
                problems.add_in_file(
                    WEIGHTS_FILE,
                    f"key '{keys['A']}' is not applied by PEFT, because {why_not} in {CONFIG_FILE}",
                )
            sources.append(
                _ModuleSource(
                    module, keys["A"], keys["B"], config.lora_rank(trained), config.scaling(trained)
                )
            )
    return sources


def _check_ranks(sources: Iterable[_ModuleSource], limits: AdapterLimits, problems: LoadProblems) -> None:
    lora_rank = max((source.lora_rank for source in sources), default=0)
    if lora_rank > limits.max_lora_rank:
        problems.add_sentence(
            f"has lora_rank {lora_rank} but max_lora_rank is {limits.max_lora_rank}; "
            f"start with --max-lora-rank {lora_rank}"
        )


def _check_tensors(
    sources: Iterable[_ModuleSource],
    header: Mapping[str, TensorInfo],
    targets: Mapping[str, LoRATarget],
    problems: LoadProblems,
) -> None:
    for source in sources:
        target = targets[source.module]
        expected_shapes = {
            source.key_a: (source.lora_rank, target.in_features),
            source.key_b: (target.out_features, source.lora_rank),
        }
        for key, expected in expected_shapes.items():
            info = header[key]
            if info.shape != expected:
                problems.add_in_file(
                    WEIGHTS_FILE,
                    f"key '{key}' has shape {list(info.shape)}, expected {list(expected)} (rank "
                    f"{source.lora_rank} by {CONFIG_FILE}, widths by the model): the adapter belongs to "
                    "another model, or its two files do not belong together",
                )
            if info.dtype not in _FILE_DTYPES:
                problems.add_in_file(
                    WEIGHTS_FILE,
                    f"key '{key}' has dtype {info.dtype}, expected one of {', '.join(_FILE_DTYPES)}",
                )


def _convert(
    source: _ModuleSource, tensors: Mapping[str, Tensor], dtype: torch.dtype, problems: LoadProblems
) -> LoRASliceWeights:
    halves = []
    for key in (source.key_a, source.key_b):
        stored = tensors[key]
        converted = stored.to(dtype)
        if not bool(torch.isfinite(stored).all()):
            problems.add_in_file(
                WEIGHTS_FILE, f"key '{key}' holds NaN or Inf, expected finite numbers: train again"
            )
        elif not bool(torch.isfinite(converted).all()):
            problems.add_in_file(
                WEIGHTS_FILE,
                f"key '{key}' holds values up to {float(stored.abs().max()):.3g}, which {dtype} cannot hold; "
                "serve the model in bfloat16 or float32",
            )
        halves.append(converted)
    weight_a, weight_b = halves[0].contiguous(), halves[1].t().contiguous()
    return LoRASliceWeights(weight_a, weight_b, source.scaling)


def _content_digest(sources: Iterable[_ModuleSource], tensors: Mapping[str, Tensor]) -> str:
    """Hash the modules in the order of their paths; every field has its length in front or a fixed one."""
    digest = hashlib.sha256(b"lora_serve adapter content 1")
    for source in sources:
        module = source.module.encode()
        digest.update(struct.pack("<Q", len(module)) + module)
        digest.update(struct.pack("<Qd", source.lora_rank, source.scaling))
        for key in (source.key_a, source.key_b):
            tensor = tensors[key].contiguous()
            dtype = str(tensor.dtype).encode()
            digest.update(struct.pack("<Q", len(dtype)) + dtype)
            digest.update(struct.pack("<QQ", *tensor.shape))
            digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()
