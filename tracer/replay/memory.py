"""Bytes of tensors in their storages, as NumPy sees them.

Nothing here comes from `merge`: where two implementations agree on which bytes a strided tensor has, both may be right.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from truedag.tracer.record.trace import Layout

Bytes: TypeAlias = NDArray[np.uint8]
Mask: TypeAlias = NDArray[np.bool_]  # one for each byte of a storage
StorageKey: TypeAlias = tuple[int, int]  # rank, and the storage's own number there

_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Ref:
    """A tensor as an operator had it: in which storage, of how many bytes and at which address, and where in it."""

    key: StorageKey
    storage_bytes: int
    address: int
    layout: Layout
    offset: int  # in bytes


def window(buffer: NDArray[Any], layout: Layout, offset: int) -> NDArray[Any]:
    """Return a tensor's elements in a storage that is given byte by byte; the last dimension is an element's bytes."""
    shape = (*layout.sizes, layout.itemsize)
    strides = (*(stride * layout.itemsize for stride in layout.strides), 1)
    start = offset if 0 not in layout.sizes else 0
    return np.lib.stride_tricks.as_strided(buffer[start:], shape, strides)


def mask_of(ref: Ref, storage_bytes: int) -> Mask:
    """Return which bytes of a storage of `storage_bytes` bytes the tensor has."""
    mask = np.zeros(storage_bytes, bool)
    window(mask, ref.layout, ref.offset)[...] = True
    return mask


def allocate(num_bytes: int, address: int) -> torch.UntypedStorage:
    """Return memory of bytes, aligned as memory at that address is: kernels may go by it."""
    if address % _ALIGNMENT == 0:
        return torch.empty(num_bytes, dtype=torch.uint8).untyped_storage()
    raw = np.empty(num_bytes + 2 * _ALIGNMENT, np.uint8)
    begin = (address - raw.ctypes.data) % _ALIGNMENT
    return torch.from_numpy(raw[begin : begin + num_bytes]).untyped_storage()


def tensor_in(storage: torch.UntypedStorage, layout: Layout, offset: int) -> torch.Tensor:
    """Return the tensor of that layout in a storage."""
    dtype: torch.dtype = getattr(torch, layout.dtype)
    tensor = torch.empty(0, dtype=dtype)
    tensor.set_(storage, offset // layout.itemsize, layout.sizes, layout.strides)
    return tensor


def memory_of(storage: torch.UntypedStorage) -> Bytes:
    """Return a storage's memory, to be filled before anything is done with it; the caller keeps the storage alive."""
    if storage.nbytes() == 0:
        return np.zeros(0, np.uint8)
    block = (ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr())  # numpy() would make it unresizable
    array: Bytes = np.ctypeslib.as_array(block)
    return array


def bytes_of(storage: torch.UntypedStorage) -> Bytes:
    """Return a storage's memory, not a copy; it cannot be resized any more."""
    array: Bytes = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
    return array
