"""Spares Triton's interpreter work that has no effect, which is more than half of its time.

- It replaces what `triton.language` has by its own functions before a launch, and again before every call of
  another function of the kernel, although the first time holds until the launch ends.
- It adds, subtracts and multiplies integers twice, the second time to check for overflow, and drops the
  outcome: the check asserts on the device, which the interpreter does with `debug` only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any


def make_interpreter_quick() -> None:
    """Change the interpreter of this process; may be called twice. Without triton there is nothing to do.

    An interpreter that does not undo its patches after a launch, as some versions, is left as it is.
    """
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    if not hasattr(interpreter, "_LangPatchScope"):
        return
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = replace(builder.options, sanitize_overflow=False)
    if not isinstance(interpreter._patch_lang, _PatchOnce):
        interpreter._patch_lang = _PatchOnce(interpreter._patch_lang)


class _PatchOnce:
    """Stands for the interpreter's `_patch_lang`: patches once a launch for the functions of each module.

    Parameters
    ----------
    patch : callable
        Takes a Python function, replaces what the `triton.language` of its module has, and gives an object
        whose `restore` undoes it.
    """

    def __init__(self, patch: Callable[[Any], Any]) -> None:
        self._patch = patch
        self._scopes: dict[int, Any] = {}  # by the id of a module's globals, in the order of their patches

    def __call__(self, function: Any) -> _PatchOnce:
        key = id(function.__globals__)
        if key not in self._scopes:
            self._scopes[key] = self._patch(function)
        return self

    def restore(self) -> None:
        """Undo all patches of the launch that ends, the last one first."""
        while self._scopes:
            self._scopes.popitem()[1].restore()
