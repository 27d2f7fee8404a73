"""DLPack in ctypes, to read capsules and to forge others."""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable
from typing import Any

READ_ONLY, IS_COPIED, SUBBYTE_PADDED = 1, 2, 4


class Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Versioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", DELETER),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    )


class Legacy(ctypes.Structure):
    _fields_ = (("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", DELETER))


api = ctypes.pythonapi
api.PyCapsule_New.restype = ctypes.py_object
api.PyCapsule_New.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
api.PyCapsule_GetPointer.restype = ctypes.c_void_p
api.PyCapsule_GetPointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
api.PyCapsule_GetName.restype = ctypes.c_char_p
api.PyCapsule_GetName.argtypes = (ctypes.py_object,)
api.PyCapsule_SetName.argtypes = (ctypes.py_object, ctypes.c_void_p)


def opened(capsule: object) -> Versioned | Legacy:
    name = name_of(capsule)
    kind = Versioned if name == b"dltensor_versioned" else Legacy
    managed = kind.from_address(api.PyCapsule_GetPointer(capsule, name))
    managed.keeper = capsule  # as long as anything of it is looked at
    return managed


def name_of(capsule: object) -> bytes:
    return bytes(api.PyCapsule_GetName(capsule))


_strdup = ctypes.CDLL(None).strdup
_strdup.restype = ctypes.c_void_p
# Capsules do not own their names, and may outlive every Python object.
_USED = {name: _strdup(b"used_" + name) for name in (b"dltensor", b"dltensor_versioned")}


def consumed(capsule: object) -> tuple[int, int]:
    """As a consumer in C does: takes the tensor; the addresses of its deleter and of itself."""
    pointer = api.PyCapsule_GetPointer(capsule, name_of(capsule))
    deleter = ctypes.cast(opened(capsule).deleter, ctypes.c_void_p).value
    assert deleter is not None
    api.PyCapsule_SetName(capsule, _USED[name_of(capsule)])
    return deleter, pointer


class Forged:
    """A producer whose capsule says what a test wants, and that counts its deleter's calls."""

    NAMES = (b"dltensor", b"dltensor_versioned")

    def __init__(
        self,
        content: bytes,
        shape: tuple[int, ...] | None,
        strides: tuple[int, ...] | None = None,
        *,
        dtype: tuple[int, int, int] = (1, 8, 1),
        versioned: bool = True,
        name: bytes | None = None,
        on_delete: Callable[[], object] | None = None,
        **fields: Any,
    ) -> None:
        self.deleted = 0
        self.threads: list[int] = []  # that called the deleter
        self.on_delete = on_delete
        self.bytes = ctypes.create_string_buffer(content, max(len(content), 1))
        self.legacy_only = not versioned
        tensor = Tensor(data=ctypes.addressof(self.bytes), device_type=1)
        tensor.code, tensor.bits, tensor.lanes = dtype
        if shape is not None:
            self.shape = (ctypes.c_int64 * max(len(shape), 1))(*shape)
            tensor.ndim = len(shape)
            tensor.shape = self.shape
        if strides is not None:
            self.strides = (ctypes.c_int64 * max(len(strides), 1))(*strides)
            tensor.strides = self.strides
        for key in ("data", "device_type", "device_id", "ndim", "byte_offset"):
            if key in fields:
                setattr(tensor, key, fields.pop(key))
        self.deleter = DELETER(self._delete)
        kind = Versioned if versioned else Legacy
        self.managed = kind(tensor=tensor, deleter=self.deleter)
        if versioned:
            self.managed.major, self.managed.minor = 1, 0
        for key, value in fields.items():
            setattr(self.managed, key, value)
        self.name = name or self.NAMES[versioned]
        self.capsule = api.PyCapsule_New(ctypes.addressof(self.managed), self.name, None)

    def _delete(self, _: int) -> None:
        self.deleted += 1
        self.threads.append(threading.get_ident())
        if self.on_delete is not None:
            self.on_delete()

    def __dlpack__(self, **keywords: Any) -> object:
        if self.legacy_only and keywords:
            raise TypeError("__dlpack__() takes no keywords")
        return self.capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)


def elements(
    content: bytes, size: int, shape: tuple[int, ...], strides: tuple[int, ...], offset: int
) -> bytes:
    """What lies at each place of a strided array, in C order; strides in elements."""
    out = bytearray()
    for place in itertools.product(*map(range, shape)):
        at = offset + size * sum(p * s for p, s in zip(place, strides, strict=True))
        out += content[at : at + size]
    return bytes(out)
