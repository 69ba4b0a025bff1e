"""Reads ``adapter_config.json`` strictly: every option is understood, known to be irrelevant, or refused.

PEFT grows options that change the arithmetic (DoRA, activated LoRA, block-diagonal LoRA, ...). An adapter
that uses one of them and is run as plain LoRA answers wrongly without a word, so the default for an option
that is not listed here is to refuse the adapter.

Source: names and meaning of the options, and the precedence of ``rank_pattern``/``alpha_pattern``, are those
of Hugging Face PEFT (checked against 0.21). Different here: options without effect at inference are skipped
instead of instantiated, patterns that could take for ever to match are refused, ``r`` and ``lora_alpha`` have
no defaults.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from lora_serve.lora.load_problems import LoadProblems
from lora_serve.lora.peft_patterns import ModulePattern, compile_patterns, first_match

CONFIG_FILE = "adapter_config.json"

# Nothing here changes what an adapter computes at inference: book-keeping, training, and choice of modules,
# for which the tensors in the file are the truth.
_IRRELEVANT = frozenset(
    (
        *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"),
        *("corda_config", "eva_config", "loftq_config", "lora_dropout", "lora_ga_config", "runtime_config"),
        *("layers_pattern", "megatron_core", "qalora_group_size", "task_type"),
    )
)
_UNDERSTOOD = frozenset(
    (
        *("alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "peft_type", "r", "rank_pattern"),
        *("ensure_weight_tying", "exclude_modules", "layers_to_transform", "target_modules", "use_rslora"),
    )
)
# Off when absent, null, false, zero or empty.
_REFUSED_UNLESS_EMPTY = {
    "use_dora": "DoRA is not plain LoRA; train with use_dora=false, or merge the adapter into the base model",
    "modules_to_save": "fully trained modules cannot be served beside the base model; train without them",
    "lora_bias": "LoRA bias is not supported; train with lora_bias=false",
    "layer_replication": "it makes another model than the one served; train without it",
    "target_parameters": "LoRA on bare parameters is not supported; train with target_modules only",
    "megatron_config": "Megatron layers are not supported; train with Hugging Face layers",
    "use_qalora": "QALoRA pools its input, which is not plain LoRA; train with use_qalora=false",
    "fan_in_fan_out": "the adapter was made for transposed (Conv1D) layers; this model's layers are linear",
}
# An empty list or object already switches these on in PEFT.
_REFUSED_UNLESS_NULL = {
    "trainable_token_indices": "trained tokens are not supported; train without them",
    "alora_invocation_tokens": "activated LoRA (aLoRA) is not supported; train plain LoRA",
    "use_bdlora": "block-diagonal LoRA is not supported; train plain LoRA",
    "arrow_config": "Arrow routing is not supported; serve its adapters one by one",
    "kasa_config": "KaSA is not plain LoRA; train plain LoRA",
    "monteclora_config": "MonteCLoRA is not supported; train plain LoRA",
    "velora_config": "VeLoRA is not supported; train plain LoRA",
}
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class PeftLoRAConfig:
    """What ``adapter_config.json`` says about the arithmetic of an adapter.

    Parameters
    ----------
    r
        Default rank, >= 1.
    lora_alpha
        Default alpha, finite.
    use_rslora
        True: scaling is ``lora_alpha / sqrt(rank)``; False: ``lora_alpha / rank``.
    rank_pattern, alpha_pattern
        Per-module overrides in the file's order; the first that matches counts.
    target_modules
        Names that the adapter was trained on (suffixes of module paths), or None where the file gives a
        regular expression, ``all-linear`` or nothing.
    exclude_modules
        Suffixes that the adapter was not trained on; empty where the file gives a regular expression.
    layers_to_transform
        Decoder layers that the adapter was trained on; None = all.
    ensure_weight_tying
        True: PEFT trains ``lm_head`` together with ``embed_tokens`` where the model ties them, and then names
        only the latter in ``target_modules``.
    """

    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: tuple[ModulePattern, ...]
    alpha_pattern: tuple[ModulePattern, ...]
    target_modules: tuple[str, ...] | None
    exclude_modules: tuple[str, ...]
    layers_to_transform: tuple[int, ...] | None
    ensure_weight_tying: bool = False

    def lora_rank(self, module: str) -> int:
        """Rank of a module, by its path in the model that the adapter was trained on."""
        return int(first_match(self.rank_pattern, module, self.r))

    def scaling(self, module: str) -> float:
        """Scaling of a module: its alpha over its rank, or over the rank's square root with rsLoRA."""
        alpha = first_match(self.alpha_pattern, module, self.lora_alpha)
        rank = self.lora_rank(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def why_not_targeted(self, module: str, layer: int | None) -> str | None:
        """Why PEFT would leave this module alone, or None where it would apply the adapter to it.

        Parameters
        ----------
        module
            Module path in the model that the adapter was trained on.
        layer
            The decoder layer that the module is in; None where it is in none.
        """
        if _is_named(module, self.exclude_modules):
            return f"exclude_modules {list(self.exclude_modules)} names it"
        if self.target_modules is None or module in self.target_modules:
            return None
        if not _is_named(module, self.target_modules) and not self._is_tied(module):
            return f"target_modules {list(self.target_modules)} does not name it"
        if self.layers_to_transform is not None and layer not in self.layers_to_transform:
            return f"layers_to_transform {list(self.layers_to_transform)} does not hold its layer"
        return None

    def _is_tied(self, module: str) -> bool:
        names = self.target_modules or ()
        is_head = self.ensure_weight_tying and _is_named(module, ("lm_head",))
        return is_head and any(_is_named(name, ("embed_tokens",)) for name in names)


def parse_peft_config(data: bytes, problems: LoadProblems) -> PeftLoRAConfig:
    """Parse the bytes of ``adapter_config.json``.

    Parameters
    ----------
    data
        The file's content.
    problems
        Receives every option that cannot be applied exactly. The result is good for finding further
        problems, not for use, where it received any.

    Returns
    -------
    PeftLoRAConfig

    Raises
    ------
    InvalidArgumentError
        The file is not a JSON object, ``peft_type`` is not LORA, or a rank or alpha cannot be read: checks
        of the weights would have nothing to compare with.
    """
    try:
        raw = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        problems.fail(f"{CONFIG_FILE}: not valid JSON ({error}); save the adapter again")
    if not isinstance(raw, dict):
        problems.fail(f"{CONFIG_FILE}: expected a JSON object, found {_shown(raw)}")
    if raw.get("peft_type") != "LORA":
        problems.fail(
            f"{CONFIG_FILE}: peft_type is {_shown(raw.get('peft_type'))}, expected 'LORA'; "
            "other PEFT methods are not supported"
        )
    _refuse_unsupported(raw, problems)
    return PeftLoRAConfig(
        r=_read_rank(raw, problems),
        lora_alpha=_read_alpha(raw, problems),
        use_rslora=_read_bool(raw, "use_rslora", problems),
        rank_pattern=compile_patterns("rank_pattern", raw.get("rank_pattern"), problems, CONFIG_FILE),
        alpha_pattern=compile_patterns("alpha_pattern", raw.get("alpha_pattern"), problems, CONFIG_FILE),
        target_modules=_read_names(raw, "target_modules", problems),
        exclude_modules=_read_names(raw, "exclude_modules", problems) or (),
        layers_to_transform=_read_layers(raw, problems),
        ensure_weight_tying=_read_bool(raw, "ensure_weight_tying", problems),
    )


def _refuse_unsupported(raw: dict[str, Any], problems: LoadProblems) -> None:
    for field, value in raw.items():
        if field in _REFUSED_UNLESS_NULL:
            if value is not None and value is not False:
                _refuse(problems, field, value, "null", _REFUSED_UNLESS_NULL[field])
        elif field in _REFUSED_UNLESS_EMPTY:
            if value:
                _refuse(problems, field, value, "false or empty", _REFUSED_UNLESS_EMPTY[field])
        elif field not in _IRRELEVANT and field not in _UNDERSTOOD and value:
            _refuse(problems, field, value, "no such option", "unknown option, it may change the result")
    if raw.get("bias", "none") != "none":
        _refuse(
            problems,
            "bias",
            raw["bias"],
            "'none'",
            "trained biases are not supported; train with bias='none'",
        )
    _check_init(raw.get("init_lora_weights"), problems)


def _check_init(value: object, problems: LoadProblems) -> None:
    """Refuse initialisations that also change the base weights: the file alone is then not the adapter."""
    if value in _PLAIN_INITS:
        return
    if isinstance(value, str) and value.lower().startswith(_BASE_CHANGING_INITS):
        advice = (
            "it changes the base weights, which are shared here; turn it into plain LoRA with PEFT's "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    else:
        advice = "unknown initialisation, it may change the base weights"
    _refuse(problems, "init_lora_weights", value, "an initialisation of A and B only", advice)


def _refuse(problems: LoadProblems, field: str, value: object, expected: str, advice: str) -> None:
    problems.add_in_file(CONFIG_FILE, f"{field} is {_shown(value)}, expected {expected}: {advice}")


def _read_rank(raw: dict[str, Any], problems: LoadProblems) -> int:
    value = raw.get("r")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        problems.fail(f"{CONFIG_FILE}: r is {_shown(value)}, expected a whole number from 1; save it again")
    return value


def _read_alpha(raw: dict[str, Any], problems: LoadProblems) -> float:
    value = raw.get("lora_alpha")
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not _is_finite(value):
        problems.fail(
            f"{CONFIG_FILE}: lora_alpha is {_shown(value)}, expected a finite number; save it again"
        )
    return float(value)


def _read_bool(raw: dict[str, Any], field: str, problems: LoadProblems) -> bool:
    value = raw.get(field, False)
    if isinstance(value, bool):
        return value
    if value is not None:
        _refuse(problems, field, value, "true or false", "save the adapter again")
    return False


def _read_names(raw: dict[str, Any], field: str, problems: LoadProblems) -> tuple[str, ...] | None:
    value = raw.get(field)
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return tuple(sorted(value))
    # A regular expression is not evaluated: it may be hostile, and the tensors in the file say as much.
    if value is not None and not isinstance(value, str):
        _refuse(problems, field, value, "a list of names or a string", "save the adapter again")
    return None


def _read_layers(raw: dict[str, Any], problems: LoadProblems) -> tuple[int, ...] | None:
    value = raw.get("layers_to_transform")
    layers = [value] if isinstance(value, int) else value
    if layers is None or layers == []:
        return None
    if isinstance(layers, list) and all(isinstance(x, int) and not isinstance(x, bool) for x in layers):
        return tuple(sorted(layers))
    _refuse(problems, "layers_to_transform", value, "whole numbers", "save the adapter again")
    return None


def _is_named(module: str, names: tuple[str, ...]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the range of a double
        return False


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
