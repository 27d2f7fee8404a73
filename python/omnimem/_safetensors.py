"""The safetensors header: read, checked as strictly as the format demands, never trusted.

A file is an 8-byte little-endian length, a JSON header of that length and the data. Everything
is checked before a byte of data is read or reserved: the length against the cap and the file, the
JSON against duplicate names, each tensor's size against its shape and type, and the offsets, which
must tile the data exactly to the file's end. The data itself is never read here.
"""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from .errors import FormatError

HEADER_CAP = 100_000_000
"""Largest header, in bytes, that the format allows."""

SIZE_LIMIT = 1 << 63
"""Counts and sizes at or above this are refused: no file or address space holds them."""

DTYPES: dict[str, tuple[str, int]] = {
    "BOOL": ("bool", 8),
    "F4": ("float4_e2m1fn_x2", 4),
    "F6_E2M3": ("float6_e2m3fn", 6),
    "F6_E3M2": ("float6_e3m2fn", 6),
    "U8": ("uint8", 8),
    "I8": ("int8", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "I16": ("int16", 16),
    "U16": ("uint16", 16),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "I32": ("int32", 32),
    "U32": ("uint32", 32),
    "F32": ("float32", 32),
    "C64": ("complex64", 64),
    "F64": ("float64", 64),
    "I64": ("int64", 64),
    "U64": ("uint64", 64),
}
"""Header name of every type: its NumPy or torch name and its bits an element."""


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies in a checkpoint."""

    dtype: str
    """Element type as NumPy and torch spell it: "bfloat16", "float8_e4m3fn", "uint8"."""
    shape: tuple[int, ...]
    """Shape as in the header. float4_e2m1fn_x2 counts single elements here, two to a byte."""
    file: str
    """Path of the file that holds the bytes."""
    offset: int
    """First byte, counted from the start of the file."""
    nbytes: int
    """Length in bytes."""
    encoded_nbytes: int | None = None
    """Length in the file of its encoded form; None: its bytes are there as they are."""


@dataclass(frozen=True)
class FileIdentity:
    """What tells that a file is still the one whose header was read."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileIdentity:
        """Take the identity from a stat result."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class _DuplicateName(ValueError):
    """A JSON object that holds a name twice; the argument is the name."""


def parse_json(raw: bytes, path: Path, what: str) -> dict[str, Any]:
    """Parse a JSON object that must be UTF-8, hold no name twice and no NaN or Infinity.

    Parameters
    ----------
    raw : bytes
        The text.
    path : Path
        The file it came from, for messages.
    what : str
        What the text is, for messages: "header", "index".

    Raises
    ------
    FormatError
        The text is not such an object.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(items)
        if len(made) != len(items):
            seen: set[str] = set()
            for name, _ in items:
                if name in seen:
                    raise _DuplicateName(name)
                seen.add(name)
        return made

    def constant(word: str) -> NoReturn:
        raise ValueError(f"{word} is not JSON")

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant)
    except _DuplicateName as error:
        raise FormatError(
            f"{path}: the {what} holds the name {error.args[0]!r} twice, so one of the two would "
            "be lost; write the file again"
        ) from None
    except UnicodeDecodeError as error:
        raise FormatError(
            f"{path}: the {what} is not UTF-8 (byte {error.start}); the file is damaged or is not "
            "a checkpoint, fetch it again"
        ) from None
    except (ValueError, RecursionError) as error:
        raise FormatError(
            f"{path}: the {what} is not valid JSON ({error}); the file is damaged or is not a "
            "checkpoint, fetch it again"
        ) from None
    if not isinstance(value, dict):
        raise FormatError(f"{path}: the {what} is a JSON {type(value).__name__}, not an object")
    return value


@dataclass(frozen=True)
class Header:
    """The checked header of one safetensors file."""

    raw: bytes
    """Its text, padding included, as it is in the file after the 8 bytes of its length."""
    tensors: dict[str, TensorInfo]
    """In file order."""
    metadata: dict[str, str]
    """Its ``__metadata__``; empty where there is none."""
    size: int
    """Bytes of the whole file."""


def read_header(path: Path) -> tuple[Header, FileIdentity]:
    """Read and check the header of one safetensors file.

    Parameters
    ----------
    path : Path
        The file; symlinks are followed.

    Returns
    -------
    header : Header
        What it says.
    identity : FileIdentity
        The file whose header this is.

    Raises
    ------
    FormatError
        The file breaks a rule of the format.
    OSError
        The file cannot be opened or read.
    """
    with path.open("rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise FormatError(f"{path}: not a regular file; name a .safetensors file or a folder")
        raw = _read_header_bytes(file.fileno(), path, status.st_size)
    return parse_header(raw, path, status.st_size), FileIdentity.of(status)


def parse_header(raw: bytes, path: Path, size: int | None, what: str = "header") -> Header:
    """Check the text of a header.

    Parameters
    ----------
    raw : bytes
        The text, of at most ``HEADER_CAP`` bytes.
    path : Path
        The file that it describes, for messages and for the tensors' place.
    size : int, optional
        Bytes of that file; None: it is as long as the header says.
    what : str
        What the text is, for messages.

    Raises
    ------
    FormatError
        The text breaks a rule of the format, or the file has another size.
    """
    if raw[:1] != b"{":
        raise FormatError(
            f"{path}: the {what} does not begin with '{{' (it begins with {raw[:1]!r}); this is "
            "not a safetensors file"
        )
    start = 8 + len(raw)
    entries = parse_json(raw, path, what)
    metadata = _check_metadata(entries.pop("__metadata__", None), path)
    tensors = {
        name: _check_tensor(name, entry, path, start, size) for name, entry in entries.items()
    }
    if size is None:
        size = max((info.offset + info.nbytes for info in tensors.values()), default=start)
    return Header(raw, _check_tiling(tensors, path, start, size), metadata, size)


def _read_header_bytes(descriptor: int, path: Path, size: int) -> bytes:
    if size < 8:
        raise FormatError(
            f"{path}: {size} bytes, shorter than the 8 that hold the header's length; the file is "
            "cut off or is not a safetensors file, fetch it again"
        )
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if length > HEADER_CAP:
        raise FormatError(
            f"{path}: the header says it is {length} bytes long, over the format's limit of "
            f"{HEADER_CAP}; the file is damaged or is not a safetensors file, fetch it again"
        )
    if length > size - 8:
        raise FormatError(
            f"{path}: the header needs {length} bytes after the first 8, the file has "
            f"{size - 8}; the file is cut off, fetch it again"
        )
    parts, position = [], 8
    while position < 8 + length:
        part = os.pread(descriptor, 8 + length - position, position)
        if not part:
            raise FormatError(
                f"{path}: ended at byte {position} while its header was read; it shrank, fetch "
                "it again"
            )
        parts.append(part)
        position += len(part)
    return b"".join(parts)


def _check_metadata(metadata: object, path: Path) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, dict):
        raise FormatError(
            f"{path}: __metadata__ is {type(metadata).__name__}, not an object of strings"
        )
    for name, value in metadata.items():
        if not isinstance(value, str):
            raise FormatError(
                f"{path}: __metadata__[{name!r}] is {type(value).__name__}, the format allows "
                "strings only; write the file again"
            )
    return metadata


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < SIZE_LIMIT


def _check_tensor(name: str, entry: object, path: Path, start: int, size: int | None) -> TensorInfo:
    where = f"{path}: tensor {name!r}"
    if not name.isascii():
        try:
            name.encode("utf-8")
        except UnicodeEncodeError:
            raise FormatError(f"{where}: the name is not valid Unicode; rename it") from None
    if not isinstance(entry, dict):
        raise FormatError(f"{where}: described by {type(entry).__name__}, not by an object")
    for field in ("dtype", "shape", "data_offsets"):
        if field not in entry:
            raise FormatError(f"{where}: the header gives no {field}; write the file again")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FormatError(f"{where}: unknown dtype {dtype!r}; known are {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not all(_is_count(dim) for dim in shape):
        raise FormatError(
            f"{where}: shape {_short(shape)} is not a list of integers from 0 to 2**63 - 1"
        )
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(_is_count(offset) for offset in offsets)
    ):
        raise FormatError(
            f"{where}: data_offsets {_short(offsets)} is not a pair of integers from 0 to 2**63 - 1"
        )
    begin, end = offsets
    if begin > end:
        raise FormatError(f"{where}: begins at byte {begin} of the data, after its end at {end}")
    if size is not None and end > size - start:
        raise FormatError(
            f"{where}: ends at byte {end} of the data, of which the file has {size - start}; the "
            "file is cut off, fetch it again"
        )
    nbytes = _byte_size(where, shape, dtype)
    if nbytes != end - begin:
        raise FormatError(
            f"{where}: shape {_short(shape)} of {dtype} needs {nbytes} bytes, data_offsets give "
            f"{end - begin}; the header is wrong, fetch the file again"
        )
    return TensorInfo(DTYPES[dtype][0], tuple(shape), os.fspath(path), start + begin, nbytes)


def _byte_size(where: str, shape: list[int], dtype: str) -> int:
    count = 1
    for dim in shape:
        count *= dim
        if count >= SIZE_LIMIT:
            raise FormatError(f"{where}: shape {_short(shape)} has 2**63 elements or more")
    bits = count * DTYPES[dtype][1]
    if bits >= SIZE_LIMIT:
        raise FormatError(f"{where}: shape {_short(shape)} of {dtype} needs 2**63 bits or more")
    if bits % 8:
        raise FormatError(
            f"{where}: {count} elements of {dtype} are {bits} bits, not whole bytes; pad the tensor"
        )
    return bits // 8


def _check_tiling(
    tensors: dict[str, TensorInfo], path: Path, start: int, size: int
) -> dict[str, TensorInfo]:
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
    position, previous = start, "the header"
    for name, info in ordered.items():
        if info.offset != position:
            fault = "overlaps" if info.offset < position else "leaves a hole after"
            raise FormatError(
                f"{path}: tensor {name!r} begins at byte {info.offset} of the file and {fault} "
                f"{previous}, which ends at {position}; fetch the file again"
            )
        position, previous = info.offset + info.nbytes, f"tensor {name!r}"
    if position != size:
        raise FormatError(
            f"{path}: {size - position} bytes follow the last tensor, which ends at byte "
            f"{position} of {size}; no tensor owns them, fetch the file again"
        )
    return ordered


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:197] + "..."
