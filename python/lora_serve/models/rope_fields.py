"""The rope fields of a config.json, in the layouts of transformers 4 and 5.

transformers 4 wrote ``rope_theta`` beside ``rope_scaling`` (null, or a dict with ``type`` or ``rope_type``);
transformers 5 writes one dict ``rope_parameters``. Where both occur ``rope_scaling`` wins, and a dict's own
``rope_theta`` wins over the one beside it, as transformers reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lora_serve.layers.rotary import RopeParameters, rope_types
from lora_serve.models.config_fields import ConfigFields

_COMMON_FIELDS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_FIELDS_BY_TYPE = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
}


def read_rope_parameters(config: ConfigFields, max_position_embeddings: int) -> RopeParameters:
    """Read and check the rope fields.

    Parameters
    ----------
    config
        The whole config.json.
    max_position_embeddings
        The model's context in tokens; stands in for ``original_max_position_embeddings``.

    Raises
    ------
    InvalidArgumentError
        An unknown rope type or field, a value out of range, or a head that is turned only in part.
    """
    rope = _rope_fields(config)
    rope_type = _rope_type(rope)
    _check_known(rope, rope_type)
    for fields in (config, rope):
        if fields.content.get("partial_rotary_factor") not in (None, 1, 1.0):
            fields.refuse("partial_rotary_factor", "1.0: this decoder turns whole heads")
    theta = rope.number("rope_theta", config.number("rope_theta", 10000.0))
    if rope_type == "default":
        return RopeParameters(rope_theta=theta)
    factor = rope.number("factor")
    if factor < 1:
        rope.refuse("factor", "a number of at least 1")
    if rope_type in _SCALED_READERS:
        original = config.optional_positive_int("original_max_position_embeddings")
        if original is None:
            original = rope.positive_int("original_max_position_embeddings", max_position_embeddings)
        return _SCALED_READERS[rope_type](rope, theta, factor, original)
    return RopeParameters(rope_type, theta, factor)


def _rope_fields(config: ConfigFields) -> ConfigFields:
    for name in ("rope_scaling", "rope_parameters"):
        value: Any = config.content.get(name)
        if value:
            if not isinstance(value, dict):
                config.refuse(name, "null or an object")
            return ConfigFields(f"{config.subject}: {name}", value)
    return ConfigFields(f"{config.subject}: rope_parameters", {})


def _rope_type(rope: ConfigFields) -> str:
    legacy, modern = rope.content.get("type"), rope.content.get("rope_type")
    if legacy is not None and modern is not None and legacy != modern:
        rope.refuse("type", f"the same as rope_type, which is {modern!r}")
    rope_type = modern or legacy or "default"
    if rope_type not in rope_types():
        rope.refuse("rope_type" if modern else "type", f"one of {', '.join(rope_types())}")
    return str(rope_type)


def _check_known(rope: ConfigFields, rope_type: str) -> None:
    known = _COMMON_FIELDS | _FIELDS_BY_TYPE[rope_type]
    for field in rope.content:
        if field not in known:
            rope.refuse(field, f"only fields of rope type {rope_type!r}: {', '.join(sorted(known))}")


def _read_llama3(rope: ConfigFields, theta: float, factor: float, original: int) -> RopeParameters:
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if high <= low:
        rope.refuse("high_freq_factor", f"more than low_freq_factor, which is {low}")
    return RopeParameters("llama3", theta, factor, original, low_freq_factor=low, high_freq_factor=high)


def _read_yarn(rope: ConfigFields, theta: float, factor: float, original: int) -> RopeParameters:
    beta_fast, beta_slow = rope.number("beta_fast", 32.0), rope.number("beta_slow", 1.0)
    if beta_fast < beta_slow:
        rope.refuse("beta_fast", f"at least beta_slow, which is {beta_slow}")
    return RopeParameters(
        "yarn",
        theta,
        factor,
        original,
        attention_factor=rope.optional_number("attention_factor"),
        mscale=rope.optional_number("mscale"),
        mscale_all_dim=rope.optional_number("mscale_all_dim"),
        beta_fast=beta_fast,
        beta_slow=beta_slow,
        truncate=rope.flag("truncate", True),
    )


_SCALED_READERS: dict[str, Callable[[ConfigFields, float, float, int], RopeParameters]] = {
    "llama3": _read_llama3,
    "yarn": _read_yarn,
}
