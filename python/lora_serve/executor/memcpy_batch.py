"""Many copies between host and device in one call of the CUDA driver.

A copy through torch takes the calling thread about 5 us; a step may order hundreds. torch has no call for
many, so the driver's own (`cuMemcpyBatchAsync`, since CUDA 12.8) is called through ctypes.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lora_serve.common.errors import InternalError

_IN_STREAM_ORDER = 1  # CU_MEMCPY_SRC_ACCESS_ORDER_STREAM: sources are read when the stream gets there
_Addresses = npt.NDArray[np.uint64]


class _Attributes(ctypes.Structure):
    """CUmemcpyAttributes; the places of both ends are left to the driver, which knows registered memory."""

    _fields_ = (
        ("source_access_order", ctypes.c_int),
        ("source_location", ctypes.c_int * 2),
        ("destination_location", ctypes.c_int * 2),
        ("flags", ctypes.c_uint),
    )


class MemcpyBatch:
    """The driver's call; made by `find`.

    Parameters
    ----------
    function
        `cuMemcpyBatchAsync` with the arguments of CUDA 12.8 (newer drivers keep it under this name).
    """

    def __init__(self, function: Any) -> None:
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        function.restype = ctypes.c_int
        # destinations, sources, sizes, count, attributes, their first copies, how many, failed copy, stream
        function.argtypes = [pointer, pointer, pointer, size, pointer, pointer, size, pointer, pointer]
        self._function = function
        self._attributes = _Attributes(source_access_order=_IN_STREAM_ORDER)
        self._first_copy = ctypes.c_size_t(0)
        self._failed_copy = ctypes.c_size_t(0)

    @classmethod
    def find(cls, device: torch.device) -> MemcpyBatch | None:
        """Give the call if this machine has it, and it copies from a CUDA device to the host and back."""
        try:
            # PyDLL keeps the interpreter lock: to get it back from a busy thread takes longer than the call.
            batch = cls(ctypes.PyDLL("libcuda.so.1").cuMemcpyBatchAsync)
            return batch if batch._copies_there_and_back(device) else None
        except (OSError, AttributeError, InternalError):
            return None

    def _copies_there_and_back(self, device: torch.device) -> bool:
        first = torch.arange(256, dtype=torch.uint8, device=device)
        on_host = torch.zeros(256, dtype=torch.uint8, pin_memory=True)
        last = torch.zeros_like(first)
        addresses = [np.array([one.data_ptr()], dtype=np.uint64) for one in (first, on_host, last)]
        size = np.array([256], dtype=np.uint64)
        with torch.cuda.device(device):
            stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream(device))
            self.submit(addresses[0], addresses[1], size, stream)
            self.submit(addresses[1], addresses[2], size, stream)
            stream.synchronize()
        return torch.equal(first, last)

    def submit(
        self, sources: _Addresses, destinations: _Addresses, sizes: _Addresses, stream: torch.cuda.Stream
    ) -> None:
        """Put copies on a stream, in no order among themselves.

        Parameters
        ----------
        sources, destinations, sizes : numpy.ndarray
            [N] uint64: addresses and bytes, contiguous; the arrays are not read after the return. One of both
            ends is on the current CUDA device, the other page-locked.
        stream : torch.cuda.Stream
            Not the default stream.

        Raises
        ------
        InternalError
            The driver refused; some of the copies may be on their way.
        """
        if len(sizes) == 0:
            return
        status = self._function(
            destinations.ctypes.data,
            sources.ctypes.data,
            sizes.ctypes.data,
            len(sizes),
            ctypes.addressof(self._attributes),
            ctypes.addressof(self._first_copy),
            1,
            ctypes.addressof(self._failed_copy),
            stream.cuda_stream,
        )
        if status != 0:
            raise InternalError(f"cuMemcpyBatchAsync of {len(sizes)} copies gives the error {status}")
