"""What `support.quick_interpreter` spares Triton's interpreter changes nothing but its time."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from lora_serve.kernels._triton import jit, tl
from support.quick_interpreter import make_interpreter_quick

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted beside a GPU")


@jit
def plus_one(x):
    return x + 1


@jit
def count_kernel(out, num_calls: tl.constexpr):
    total = tl.zeros((4,), dtype=tl.int32)  # A function of triton's own, in another module.
    for _ in range(num_calls):
        total = plus_one(total)
    tl.store(out + tl.arange(0, 4), total)


def launch(num_calls):
    out = torch.full((4,), -1, dtype=torch.int32)
    count_kernel[(1,)](out, num_calls=num_calls)
    return out.tolist()


def contents(module):
    """What kernels see of the language."""
    return {**vars(module), **{f"tensor.{name}": value for name, value in vars(module.tensor).items()}}


def test_launches_leave_the_language_as_it_was():
    launch(1)  # The first launch writes some attributes that are inherited into the class itself.
    before = [contents(module) for module in (tl, tl.core)]
    assert launch(3) == launch(3) == [3] * 4
    assert [contents(module) for module in (tl, tl.core)] == before


def test_a_launch_that_fails_leaves_the_language_as_it_was():
    launch(1)
    before = [contents(module) for module in (tl, tl.core)]
    with pytest.raises(Exception, match="NoneType"):
        count_kernel[(1,)](None, num_calls=2)
    assert [contents(module) for module in (tl, tl.core)] == before
    assert launch(2) == [2] * 4


def test_the_language_is_replaced_once_a_launch_for_each_module(monkeypatch):
    from triton.runtime import interpreter

    make_interpreter_quick()  # Again: nothing is wrapped twice.
    patched = []
    patch = interpreter._patch_lang._patch

    def record_and_patch(function):
        patched.append(function.__module__)
        return patch(function)

    monkeypatch.setattr(interpreter._patch_lang, "_patch", record_and_patch)
    launch(5)
    assert sorted(patched) == sorted(set(patched))
    assert {__name__, "triton.language.standard"} <= set(patched)
