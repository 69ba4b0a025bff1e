"""One large piece of host memory, page-locked for CUDA if asked. The one module here that needs torch."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from lora_serve.common.errors import InvalidArgumentError

_PAGE = 4096
_PORTABLE = 1  # cudaHostRegisterPortable: page-locked for every CUDA context


class HostSlab:
    """Memory that starts at a page.

    Registered with CUDA rather than allocated by torch's pinned allocator, which rounds up to a power of two
    and never gives memory back. (Whether a tensor `is_pinned` says nothing here: drivers differ in what they
    report of registered memory. Copies from it run at the same speed.)

    Parameters
    ----------
    num_bytes
        >= 0.
    is_pinned
        True: page-locked, so that all of it is really there from now on. False: the machine gives memory only
        as it is first used.
    contents, option
        What the memory is for and the option that sets its size, for the error's message.

    Raises
    ------
    InvalidArgumentError
        The machine does not give that much memory.
    """

    def __init__(self, num_bytes: int, *, is_pinned: bool, contents: str, option: str) -> None:
        try:
            memory = torch.empty(num_bytes + _PAGE, dtype=torch.uint8)
            start = -memory.data_ptr() % _PAGE
            self.tensor: Tensor = memory[start : start + num_bytes]
            self._is_registered = is_pinned and num_bytes > 0
            if self._is_registered:
                # First used by all cores: page by page in cudaHostRegister takes several times as long.
                self.tensor.zero_()
                runtime = _cuda_runtime()
                torch.cuda.check_error(runtime.cudaHostRegister(self.tensor.data_ptr(), num_bytes, _PORTABLE))
                # A slab that nobody closes: its addresses are given out again, and must not be locked then.
                self._unregister = weakref.finalize(self, _unregister, self.tensor.data_ptr())
                self._unregister.atexit = False
        except RuntimeError as error:
            raise InvalidArgumentError(
                f"{num_bytes} bytes of {'pinned ' * is_pinned}host memory for {contents} are more than this "
                f"machine gives ({error}); lower {option}"
            ) from error

    @property
    def is_page_locked(self) -> bool:
        """Whether CUDA copies from it without the calling thread's help."""
        return self._is_registered

    def close(self) -> None:
        """Undo the page-locking; the memory goes with the last tensor on it. No copy may be running."""
        if self._is_registered:
            self._is_registered = False
            self._unregister()
        self.tensor = torch.empty(0, dtype=torch.uint8)


def _unregister(address: int) -> None:
    torch.cuda.check_error(_cuda_runtime().cudaHostUnregister(address))


def _cuda_runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
