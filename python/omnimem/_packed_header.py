"""Packed shards: safetensors files whose tensors are encoded forms, with the original header kept.

A packed shard is a safetensors file. Under each tensor's name it has the tensor's encoded form as
U8, in the order of the original's offsets; a tensor of 0 bytes has none, 0 bytes long.
``__metadata__`` holds:

omnimem.packed
    "1", the version of this format.
omnimem.coding
    "balanced" or "fast": how the forms were made. Each says by itself how; those that would not
    have become smaller hold the bytes as they are.
omnimem.header
    The text of the original's header, padding included: types, shapes, offsets, metadata.
omnimem.sha256
    Of the whole original file, in hexadecimal.

So the original can be made again, byte for byte, and proven. The kept header is checked like any
other, and what it says of each tensor against the form that is there. Data is never read here.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

from ._safetensors import (
    HEADER_CAP,
    FileIdentity,
    Header,
    TensorInfo,
    parse_header,
    read_header,
)
from .errors import FormatError

VERSION = "1"
CODINGS = ("balanced", "fast")

_VERSION_KEY = "omnimem.packed"
_CODING_KEY = "omnimem.coding"
_HEADER_KEY = "omnimem.header"
_HASH_KEY = "omnimem.sha256"
_HASH = re.compile(r"[0-9a-f]{64}")
_ALIGN = 4096
"""The data begin at a multiple of this. (Forms are multiples of 64 long, so each lies on one.)"""
_MOST_PER_BYTE = 4096
"""Plain bytes that one byte of a form can stand for; a bound that the codec never reaches."""


@dataclass(frozen=True)
class Packing:
    """What a packed shard says of its original."""

    original: Header
    """Its header; the tensors' places are those in the original file."""
    coding: str
    """How its tensors were encoded: one of ``CODINGS``."""
    sha256: str
    """Of the whole original file."""


@dataclass(frozen=True)
class Shard:
    """One file of a checkpoint."""

    tensors: dict[str, TensorInfo]
    """In file order. Of a packed one: type, shape and size of the original, place of the form."""
    metadata: dict[str, str]
    """``__metadata__``; of a packed one, the original's."""
    header: Header
    """As it is in this file."""
    identity: FileIdentity
    """This file."""
    packing: Packing | None
    """None: the file is not packed."""


def read_shard(path: Path) -> Shard:
    """Read and check the header of a safetensors file, packed or not.

    Parameters
    ----------
    path : Path
        The file; symlinks are followed.

    Raises
    ------
    FormatError
        The file breaks a rule of the format, or of this one.
    OSError
        The file cannot be opened or read.
    """
    header, identity = read_header(path)
    if _VERSION_KEY not in header.metadata:
        return Shard(header.tensors, header.metadata, header, identity, None)
    packing = _check_packing(header.metadata, path)
    original = packing.original
    tensors = _match(header.tensors, original.tensors, path)
    return Shard(tensors, original.metadata, header, identity, packing)


def largest_form(nbytes: int) -> int:
    """Return a bound of an encoded form's length."""
    return nbytes + nbytes // 1024 + 256


def header_room(original: Header, coding: str, path: Path) -> int:
    """Return the bytes that the header of a packed shard takes at most, its length included.

    The data may begin there before the forms' lengths are known; see ``build_header``.

    Raises
    ------
    FormatError
        It would be longer than the format allows.
    """
    forms = {name: largest_form(info.nbytes) for name, info in original.tensors.items()}
    room = 8 + len(_text(original, coding, "0" * 64, forms))
    room += -room % _ALIGN
    if room - 8 > HEADER_CAP:
        raise FormatError(
            f"{path}: its header of {len(original.raw)} bytes would take up to {room - 8} in a "
            f"packed file, over the format's limit of {HEADER_CAP}; leave this one as it is"
        )
    return room


def build_header(
    original: Header, coding: str, sha256: str, forms: dict[str, int], room: int
) -> bytes:
    """Return the beginning of a packed shard, `room` bytes long.

    Parameters
    ----------
    original : Header
        Of the file that is packed.
    coding : str
        One of ``CODINGS``.
    sha256 : str
        Of that file, in hexadecimal.
    forms : dict of str to int
        The length of each tensor's form, in the order of the original's tensors.
    room : int
        What ``header_room`` returned.
    """
    text = _text(original, coding, sha256, forms)
    return (room - 8).to_bytes(8, "little") + text.ljust(room - 8, b" ")


def _text(original: Header, coding: str, sha256: str, forms: dict[str, int]) -> bytes:
    entries: dict[str, object] = {
        "__metadata__": {
            _VERSION_KEY: VERSION,
            _CODING_KEY: coding,
            _HASH_KEY: sha256,
            _HEADER_KEY: original.raw.decode("utf-8"),
        }
    }
    begin = 0
    for name, length in forms.items():
        end = begin + length
        entries[name] = {"dtype": "U8", "shape": [length], "data_offsets": [begin, end]}
        begin = end
    return json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode("utf-8")


def _check_packing(metadata: dict[str, str], path: Path) -> Packing:
    version = metadata[_VERSION_KEY]
    if version != VERSION:
        raise FormatError(
            f"{path}: packed in version {version!r:.40} of the format, this omnimem reads version "
            f"{VERSION!r}; unpack it with the omnimem that packed it, or install a newer one"
        )
    for key in (_CODING_KEY, _HEADER_KEY, _HASH_KEY):
        if key not in metadata:
            raise FormatError(
                f"{path}: is packed, and its header has no {key}; it is damaged, pack the "
                "original again"
            )
    coding, sha256 = metadata[_CODING_KEY], metadata[_HASH_KEY]
    if coding not in CODINGS:
        raise FormatError(
            f"{path}: {_CODING_KEY} is {coding!r:.40}, known are {', '.join(CODINGS)}; pack the "
            "original again"
        )
    if not _HASH.fullmatch(sha256):
        raise FormatError(
            f"{path}: {_HASH_KEY} is {sha256!r:.80}, not 64 hexadecimal digits; pack the original "
            "again"
        )
    try:
        raw = metadata[_HEADER_KEY].encode("utf-8")
    except UnicodeEncodeError:
        raise FormatError(f"{path}: {_HEADER_KEY} is not valid Unicode; pack it again") from None
    if len(raw) > HEADER_CAP:
        raise FormatError(
            f"{path}: {_HEADER_KEY} is {len(raw)} bytes, over the format's limit of {HEADER_CAP}; "
            "pack the original again"
        )
    original = parse_header(raw, path, None, "kept header")
    if _VERSION_KEY in original.metadata:
        raise FormatError(f"{path}: was packed twice; pack the original again")
    return Packing(original, coding, sha256)


def _match(
    forms: dict[str, TensorInfo], tensors: dict[str, TensorInfo], path: Path
) -> dict[str, TensorInfo]:
    """Say of each tensor where its form lies, in file order."""
    for name in tensors:
        if name not in forms:
            raise FormatError(
                f"{path}: has no encoded form of tensor {name!r}, which the kept header names; "
                "pack the original again"
            )
    for name in forms:
        if name not in tensors:
            raise FormatError(
                f"{path}: holds {name!r}, which the kept header does not name; pack the original "
                "again"
            )
    order = [name for name, form in forms.items() if form.nbytes]
    for at, name in enumerate(name for name, info in tensors.items() if info.nbytes):
        if at >= len(order) or order[at] != name:
            raise FormatError(
                f"{path}: the encoded form of tensor {name!r} does not lie in the order of the "
                "kept header; pack the original again"
            )
    return {name: _place(name, form, tensors[name], path) for name, form in forms.items()}


def _place(name: str, form: TensorInfo, info: TensorInfo, path: Path) -> TensorInfo:
    if form.dtype != "uint8" or len(form.shape) != 1:
        raise FormatError(
            f"{path}: tensor {name!r}: its encoded form is {form.dtype} of {len(form.shape)} "
            "dimensions, not a row of U8; pack the original again"
        )
    least = -(-info.nbytes // _MOST_PER_BYTE)
    most = largest_form(info.nbytes) if info.nbytes else 0
    if not least <= form.nbytes <= most:
        raise FormatError(
            f"{path}: tensor {name!r}: an encoded form of {form.nbytes} bytes cannot be of "
            f"{info.nbytes} plain ones, as the kept header says; pack the original again"
        )
    return replace(info, offset=form.offset, encoded_nbytes=form.nbytes)
