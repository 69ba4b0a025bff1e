"""Loaded by schemathesis: most of what it makes up is sent to a model that serves."""

from __future__ import annotations

from typing import Any

import schemathesis

MODELS = ("demo", "argon", "demo:bastion", "nobody")


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """Replace names of models that nobody serves, except in one of four bodies."""
    if isinstance(body, dict) and isinstance(body.get("model"), str):
        body["model"] = MODELS[len(repr(body)) % len(MODELS)]
    return body
