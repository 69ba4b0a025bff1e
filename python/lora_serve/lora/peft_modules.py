"""Pairs up the tensors of a checkpoint with the modules of the model, and checks that they fit exactly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from lora_serve.layers.linear import LoRAKind, LoRATarget
from lora_serve.lora.adapter_files import WEIGHTS_FILE
from lora_serve.lora.adapter_layout import AdapterLayout, ModuleSize, lay_out
from lora_serve.lora.interpreter_lock import sharing_lock
from lora_serve.lora.load_problems import LoadProblems
from lora_serve.lora.peft_config import CONFIG_FILE, PeftLoRAConfig
from lora_serve.lora.peft_keys import PeftKeyParser, PeftTensorKey, layer_index
from lora_serve.lora.safetensors_header import TensorInfo

FILE_DTYPES = ("F32", "F16", "BF16")


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


@dataclass(frozen=True)
class LoRAPair:
    """One A and one B of the file, and the modules that they belong to.

    Parameters
    ----------
    key_a, key_b
        Keys in the file.
    members
        Paths of the modules in the served model: one, or several where they were trained as one fused module.
    widths
        O of each member: B's rows in the file belong to the members in this order.
    in_features
        H, or V for an embedding.
    lora_rank, scaling
        Of every member.
    is_embedding
        True: A is a look-up, so that the file has it the other way round than a block.
    """

    key_a: str
    key_b: str
    members: tuple[str, ...]
    widths: tuple[int, ...]
    in_features: int
    lora_rank: int
    scaling: float
    is_embedding: bool

    def expected_shapes(self) -> dict[str, tuple[int, int]]:
        """Shapes in the file by key: [R, H] and [O, R], O the sum of the members' widths."""
        return {
            self.key_a: (self.lora_rank, self.in_features),
            self.key_b: (sum(self.widths), self.lora_rank),
        }


class PeftModuleMatcher:
    """Matches the keys of one checkpoint with the modules of the model.

    Parameters
    ----------
    config
        What the adapter's configuration says.
    targets
        Module paths of the model that may have an adapter.
    fused
        Path of a fused module to the paths of its members, all of them targets, in the order of their rows.
    problems
        Receives every tensor that cannot be applied.
    """

    def __init__(
        self,
        config: PeftLoRAConfig,
        targets: Mapping[str, LoRATarget],
        fused: Mapping[str, Sequence[str]],
        problems: LoadProblems,
    ) -> None:
        self._config = config
        self._targets = targets
        self._fused = fused
        self._problems = problems
        self._parser = PeftKeyParser(targets, fused)
        self._parsed: dict[str, PeftTensorKey] = {}

    def match(self, header: Mapping[str, TensorInfo]) -> list[LoRAPair]:
        """Give the pairs of a checkpoint in the order of their modules' paths.

        Parameters
        ----------
        header
            Every tensor of the file, by key.
        """
        halves = self._pair_up(header)
        pairs = [
            self._make_pair(module, keys["A"], keys["B"])
            for module, keys in sharing_lock(sorted(halves.items()))
            if self._is_whole(keys)
        ]
        self._check_members(pairs)
        return pairs

    def _pair_up(self, header: Mapping[str, TensorInfo]) -> dict[str, dict[str, str]]:
        """Keys by module and half; notes keys that cannot be applied."""
        halves: dict[str, dict[str, str]] = {}
        base_weights: list[tuple[str, str]] = []
        unmatched: list[str] = []
        for key in sharing_lock(sorted(header)):
            module = self._parser.parse_base_weight(key)
            if module is not None:
                base_weights.append((module, key))
                continue
            parsed = self._parser.parse(key)
            why = parsed if isinstance(parsed, str) else self._why_not_of_kind(parsed)
            if isinstance(parsed, str) or why is not None:
                unmatched.append(f"key '{key}' is {why}")
                continue
            other = halves.setdefault(parsed.module, {}).setdefault(parsed.half, key)
            if other != key:
                self._problems.add_in_file(
                    WEIGHTS_FILE,
                    f"keys '{other}' and '{key}' are the same tensor of module '{parsed.module}'",
                )
            self._parsed[key] = parsed
        if not halves:
            self._problems.add_in_file(
                WEIGHTS_FILE,
                f"none of its {len(header)} keys matches a module of the model; expected at least one: "
                "was it trained on another model?",
            )
        for text in unmatched:
            self._problems.add_in_file(WEIGHTS_FILE, text)
        for module, key in base_weights:
            self._check_base_weight(key, header[key], module, module in halves)
        return halves

    def _why_not_of_kind(self, key: PeftTensorKey) -> str | None:
        is_embedding = key.module in self._targets and (self._targets[key.module].kind is LoRAKind.EMBEDDING)
        if is_embedding == key.is_embedding:
            return None
        found, expected = ("lora_embedding_", "lora_") if key.is_embedding else ("lora_", "lora_embedding_")
        return f"{found}{key.half} of module '{key.module}', expected {expected}{key.half}"

    def _check_base_weight(self, key: str, info: TensorInfo, module: str, has_lora: bool) -> None:
        """Accept the frozen weights that PEFT saves beside LoRA on an embedding, if no token was added."""
        target = self._targets[module]
        # Both matrices of the model are [V, hidden size]; a look-up maps from V, the logits to V.
        shape = (target.in_features, target.out_features)
        expected = shape if target.kind is LoRAKind.EMBEDDING else shape[::-1]
        if not has_lora or info.shape != expected:
            self._problems.add_in_file(
                WEIGHTS_FILE,
                f"key '{key}' holds full embedding weights of shape {list(info.shape)}, expected them only "
                f"beside LoRA on '{module}', frozen, of the model's shape {list(expected)}: train without "
                "adding tokens",
            )

    def _is_whole(self, keys: Mapping[str, str]) -> bool:
        for half in "AB":
            if half not in keys:
                found = next(iter(keys.values()))
                missing = "lora_embedding_" if self._parsed[found].is_embedding else "lora_"
                self._problems.add_in_file(
                    WEIGHTS_FILE, f"key '{found}' has no {missing}{half} beside it; expected both"
                )
        return len(keys) == 2

    def _make_pair(self, module: str, key_a: str, key_b: str) -> LoRAPair:
        trained = self._parsed[key_a].trained_module
        why_not = self._config.why_not_targeted(trained, layer_index(module))
        if why_not is not None:
            self._problems.add_in_file(
                WEIGHTS_FILE, f"key '{key_a}' is not applied by PEFT, because {why_not} in {CONFIG_FILE}"
            )
        members = (module,) if module in self._targets else tuple(self._fused[module])
        return LoRAPair(
            key_a=key_a,
            key_b=key_b,
            members=members,
            widths=tuple(self._targets[member].out_features for member in members),
            in_features=self._targets[members[0]].in_features,
            lora_rank=self._config.lora_rank(trained),
            scaling=self._config.scaling(trained),
            is_embedding=self._targets[members[0]].kind is LoRAKind.EMBEDDING,
        )

    def _check_members(self, pairs: Iterable[LoRAPair]) -> None:
        taken: dict[str, LoRAPair] = {}
        for pair in pairs:
            for member in pair.members:
                other = taken.setdefault(member, pair)
                if other is not pair:
                    self._problems.add_in_file(
                        WEIGHTS_FILE,
                        f"keys '{other.key_a}' and '{pair.key_a}' both apply to module '{member}'; expected "
                        "the fused module or its parts, not both",
                    )


def check_ranks(pairs: Iterable[LoRAPair], max_lora_rank: int, problems: LoadProblems) -> None:
    """Note it where a rank is above the limit, with what to do."""
    lora_rank = max((pair.lora_rank for pair in pairs), default=0)
    if lora_rank > max_lora_rank:
        problems.add_sentence(
            f"has lora_rank {lora_rank} but max_lora_rank is {max_lora_rank}; "
            f"start with --max-lora-rank {lora_rank}"
        )


def check_tensors(
    pairs: Iterable[LoRAPair], header: Mapping[str, TensorInfo], problems: LoadProblems
) -> None:
    """Note every tensor whose shape or type is not exactly what its module needs."""
    for pair in sharing_lock(pairs):
        for key, expected in pair.expected_shapes().items():
            info = header[key]
            if info.shape != expected:
                problems.add_in_file(
                    WEIGHTS_FILE,
                    f"key '{key}' has shape {list(info.shape)}, expected {list(expected)} (rank "
                    f"{pair.lora_rank} by {CONFIG_FILE}, widths by the model): the adapter belongs to "
                    "another model, or its two files do not belong together",
                )
            if info.dtype not in FILE_DTYPES:
                problems.add_in_file(
                    WEIGHTS_FILE,
                    f"key '{key}' has dtype {info.dtype}, expected one of {', '.join(FILE_DTYPES)}",
                )


def lay_out_pairs(pairs: Iterable[LoRAPair], dtype: torch.dtype) -> AdapterLayout:
    """The layout of an adapter's block.

    Parameters
    ----------
    pairs
        Every pair of the adapter.
    dtype
        The model's.
    """
    return lay_out(
        ModuleSize(
            module=member,
            lora_rank=pair.lora_rank,
            scaling=pair.scaling,
            num_a_bytes=pair.lora_rank * pair.in_features * dtype.itemsize,
            num_b_bytes=pair.lora_rank * width * dtype.itemsize,
            shared_a=pair.key_a if len(pair.members) > 1 else None,
        )
        for pair in sharing_lock(pairs)
        for member, width in zip(pair.members, pair.widths, strict=True)
    )
