"""Who sends a request, and what they may do and see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_serve.common.errors import LoraServeError

if TYPE_CHECKING:
    from fastapi import Request
    from starlette.types import Scope

_SCOPE_KEY = "lora_serve.caller"


class PermissionDeniedError(LoraServeError):
    """The key that the request shows may not do this, whatever the request names (HTTP 403)."""


@dataclass(frozen=True)
class Caller:
    """Who sends a request.

    Parameters
    ----------
    name : str
        For the log; the key's name, never the key.
    group : str or None
        Whose cached prefixes it shares; None = those of everybody without a group.
    adapters : frozenset of str or None
        The only adapters that exist for it, beside the base model; None = all.
    may_load : bool
        It may load and unload adapters.
    """

    name: str
    group: str | None = None
    adapters: frozenset[str] | None = None
    may_load: bool = True

    @property
    def sees_everything(self) -> bool:
        """True for the operator's own keys: engine totals, all adapters, metrics. False for a tenant's."""
        return self.group is None and self.adapters is None

    def knows(self, adapter_name: str) -> bool:
        """True when the adapter exists for this caller, as far as its key is concerned."""
        return self.adapters is None or adapter_name in self.adapters

    def require_may_load(self) -> None:
        """Raise PermissionDeniedError unless it may load and unload."""
        if not self.may_load:
            raise PermissionDeniedError(
                "this API key may not load or unload adapters; use the operator's admin key"
            )

    def require_sees_everything(self) -> None:
        """Raise PermissionDeniedError unless it may see what all callers do together."""
        if not self.sees_everything:
            raise PermissionDeniedError("this API key may not see what others do; use an operator's key")


ANYBODY = Caller(name="anybody")
"""Whoever asks a server that wants no key."""
STRANGER = Caller(name="stranger", group="stranger", adapters=frozenset(), may_load=False)
"""Whoever has shown no key to a server that wants one; only probes of its health answer it."""


def set_caller(scope: Scope, caller: Caller) -> None:
    """Note who sends the request of an ASGI scope."""
    scope[_SCOPE_KEY] = caller


def caller_of_scope(scope: Scope) -> Caller:
    """Give who sends the request of an ASGI scope."""
    caller = scope.get(_SCOPE_KEY, STRANGER)
    assert isinstance(caller, Caller)
    return caller


def caller_of(request: Request) -> Caller:
    """Give who sends a request."""
    return caller_of_scope(request.scope)


def may_see_everything(request: Request) -> bool:
    """Say whether a request may see engine totals, all adapters and metrics; a tenant's may not."""
    return caller_of(request).sees_everything
