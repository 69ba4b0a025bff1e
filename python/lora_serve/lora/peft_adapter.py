"""Checks a PEFT adapter directory against the model: everything that can be known without the tensors' data.

Nothing is guessed. What does not fit exactly is refused, with every problem that can be found in one pass:
first the configuration, then the weights' header (keys, shapes, types, ranks). The data comes later
(:func:`lora_serve.lora.peft_reader.read_into`), when its room in memory is there.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

import torch

from lora_serve.layers.linear import LoRATarget
from lora_serve.lora.adapter_files import AdapterFiles, WeightsFile
from lora_serve.lora.adapter_layout import AdapterLayout
from lora_serve.lora.load_problems import LoadProblems
from lora_serve.lora.peft_config import PeftLoRAConfig, parse_peft_config
from lora_serve.lora.peft_modules import (
    AdapterLimits,
    LoRAPair,
    PeftModuleMatcher,
    check_ranks,
    check_tensors,
    lay_out_pairs,
)
from lora_serve.lora.safetensors_header import TensorInfo

MAX_REMEMBERED = 16
"""Different configurations and headers that a checker remembers."""
# What is remembered takes about seven times as much.
_MAX_REMEMBERED_HEADER_BYTES = 1 << 20


@dataclass(frozen=True, eq=False)
class CheckedAdapter:
    """An adapter whose configuration and header fit the model, and whose weights file is open.

    Owns the open file: close it, or use it in a ``with`` statement. It can be read any number of times, by
    one thread at a time.

    Parameters
    ----------
    path
        Real path of the directory.
    layout
        Of the block that the adapter fills.
    dtype
        The model's, of every matrix in the block.
    pairs
        What the file holds, in the order of module paths.
    header
        Every tensor of the file by key.
    weights
        The open weights file.
    name
        How messages name the adapter.
    """

    path: str
    layout: AdapterLayout
    dtype: torch.dtype
    pairs: tuple[LoRAPair, ...]
    header: Mapping[str, TensorInfo]
    weights: WeightsFile
    name: str

    def __enter__(self) -> CheckedAdapter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the weights file; closing it twice is nothing."""
        self.weights.close()


def check_peft_adapter(
    path: str,
    targets: Mapping[str, LoRATarget],
    limits: AdapterLimits,
    *,
    fused: Mapping[str, Sequence[str]] | None = None,
    name: str | None = None,
    resolve: Callable[[str], str] = os.path.realpath,
) -> CheckedAdapter:
    """Check the configuration and the header of a PEFT directory; reads no tensor.

    Parameters
    ----------
    path
        The directory that PEFT's ``save_pretrained`` wrote.
    targets
        Module paths of the model that may have an adapter.
    limits
        What is accepted, and the dtype to store.
    fused
        Path of a fused module (``...qkv_proj``) to the paths of its members, all of them targets, in the
        order of their rows, as ``DecoderModel.fused_lora_targets()`` gives them; None = there are none.
    name
        How messages name the adapter; its path where None.
    resolve
        Gives the real path of a path, or raises where it leads outside what is allowed.

    Returns
    -------
    CheckedAdapter
        Holds an open file: the caller closes it.

    Raises
    ------
    InvalidArgumentError
        The adapter cannot be read or cannot be applied exactly as trained; lists file, key, found, expected.

    Notes
    -----
    Thread-safe; touches nothing but its arguments. Lets other threads have the interpreter lock every
    fraction of a millisecond.
    """
    return PeftChecker(targets, limits, fused or {}).check(path, name=name, resolve=resolve)


@dataclass(frozen=True, eq=False)
class _Fit:
    """What a configuration and a header mean that fit the model; depends on nothing else."""

    pairs: tuple[LoRAPair, ...]
    header: Mapping[str, TensorInfo]
    layout: AdapterLayout


class PeftChecker:
    """Checks adapters for one model, as :func:`check_peft_adapter` does, and remembers what fitted.

    Adapters of one recipe have equal configurations and headers, and an adapter that is read again has those
    it had: then there is nothing to check. A check of all 252 modules of Qwen3-8B holds the interpreter lock
    for 8 ms in all; to read the two files' texts and find them among those remembered takes 0.1 ms.

    Owns: the last ``MAX_REMEMBERED`` fits. Thread-safe.

    Parameters
    ----------
    targets, limits, fused
        As in :func:`check_peft_adapter`.
    """

    def __init__(
        self,
        targets: Mapping[str, LoRATarget],
        limits: AdapterLimits,
        fused: Mapping[str, Sequence[str]],
    ) -> None:
        self._targets = dict(targets)
        self._limits = limits
        self._fused = dict(fused)
        self._lock = threading.Lock()
        self._fits: OrderedDict[tuple[PeftLoRAConfig, bytes, int], _Fit] = OrderedDict()

    def check(
        self, path: str, *, name: str | None = None, resolve: Callable[[str], str] = os.path.realpath
    ) -> CheckedAdapter:
        """Check one adapter; see :func:`check_peft_adapter`."""
        problems = LoadProblems(name if name is not None else path)
        directory = resolve(path)
        files = AdapterFiles(directory, problems, resolve)
        config = parse_peft_config(files.read_config(), problems)
        weights = files.open_weights()
        try:
            # Equal bytes in a file of another size are a broken file.
            key = (config, weights.read_header(), weights.num_bytes)
            fit = self._find(key)
            if fit is None:
                fit = self._fit(config, weights, problems)
                self._remember(key, fit)
            # Options that are refused are no part of the parsed configuration.
            problems.raise_if_any()
        except BaseException:
            weights.close()
            raise
        dtype = self._limits.dtype
        return CheckedAdapter(directory, fit.layout, dtype, fit.pairs, fit.header, weights, problems.adapter)

    def _fit(self, config: PeftLoRAConfig, weights: WeightsFile, problems: LoadProblems) -> _Fit:
        header = weights.parse_header()
        pairs = PeftModuleMatcher(config, self._targets, self._fused, problems).match(header)
        check_ranks(pairs, self._limits.max_lora_rank, problems)
        check_tensors(pairs, header, problems)
        problems.raise_if_any()
        return _Fit(tuple(pairs), header, lay_out_pairs(pairs, self._limits.dtype))

    def _find(self, key: tuple[PeftLoRAConfig, bytes, int]) -> _Fit | None:
        with self._lock:
            fit = self._fits.get(key)
            if fit is not None:
                self._fits.move_to_end(key)
        return fit

    def _remember(self, key: tuple[PeftLoRAConfig, bytes, int], fit: _Fit) -> None:
        _, header, _ = key
        if len(header) > _MAX_REMEMBERED_HEADER_BYTES:
            return
        with self._lock:
            self._fits[key] = fit
            if len(self._fits) > MAX_REMEMBERED:
                self._fits.popitem(last=False)
