"""How small does the codec make weights, how fast, beside memcpy and general compressors?

GB/s of plain bytes, by the time that the process takes of one core, and the ratio, for blocks of
weights of several types, by each coding and each kind of instructions. What is decoded is compared
with what went in every time. Needs neither root nor a model. Peers that are not installed are left
out.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import mmap
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import (
    GB,
    BenchError,
    console,
    fmt,
    machine_facts,
    median,
    private_memory,
    rotated,
    show_table,
    write_json,
)

COLUMNS = 4096
MIB = 1 << 20
PATHS = ("plain", "avx2", "avx512")


# -- what is encoded -------------------------------------------------------------------------------


def weights(nbytes: int, size: int, *, plain: bool = False) -> Any:
    """Rows of float32, standard deviation 0.02, enough for `nbytes` with `size` bytes an element.

    Real weights have rows of different scale and a few columns of outliers; `plain` ones do not.
    """
    import numpy as np

    random = np.random.default_rng(1)
    values = random.standard_normal((nbytes // size // COLUMNS, COLUMNS), np.float32) * 0.02
    if not plain:
        values *= np.exp(0.35 * random.standard_normal((len(values), 1), np.float32))
        values[:, random.random(COLUMNS) < 0.004] *= 8
    return values


def dataset(name: str, nbytes: int) -> tuple[bytes, str]:
    """The bytes of a set, and the dtype of its elements."""
    import torch

    if name == "random":
        return os.urandom(nbytes), "bfloat16"
    kinds = {
        "bf16": torch.bfloat16,
        "bf16 as initialised": torch.bfloat16,
        "fp16": torch.float16,
        "fp32": torch.float32,
        "fp32 born as bf16": torch.bfloat16,
        "fp8 e4m3": torch.float8_e4m3fn,
        "fp8 e5m2": torch.float8_e5m2,
    }
    kind = kinds[name]
    size = 4 if name.startswith("fp32") else kind.itemsize
    made = torch.from_numpy(weights(nbytes, size, plain=name.endswith("initialised")))
    if kind.itemsize == 1:  # scaled by row, as checkpoints are
        made *= torch.finfo(kind).max / made.abs().amax(dim=1, keepdim=True)
    made = made.to(kind)
    if size == 4:
        kind, made = torch.float32, made.to(torch.float32)
    return made.view(torch.uint8).numpy().tobytes(), str(kind).removeprefix("torch.")


def bound(plain: bytes, dtype: str) -> float:
    """The ratio of a perfect code for each byte by itself, signs moved to the lowest bit."""
    import numpy as np

    size = {"bfloat16": 2, "float16": 2, "float32": 4}.get(dtype, 1)
    if size == 4:
        whole = np.frombuffer(plain, np.uint32)
        high = (whole >> 16).astype(np.uint16)
        planes = [whole & 255, whole >> 8 & 255]
    else:
        high = np.frombuffer(plain, f"u{size}")
        planes = []
    bits = 8 * high.itemsize
    turned = high << 1 | high >> (bits - 1)
    planes += [turned >> shift & 255 for shift in range(0, bits, 8)]
    total = 0.0
    for plane in planes:
        share = np.bincount(plane, minlength=256) / plane.size
        share = share[share > 0]
        total -= float((share * np.log2(share)).sum())
    return 8 * size / total if total else float("inf")


# -- who encodes -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """`encode(plain) -> coded`, and `decode(coded, out)`, which may return the bytes instead.

    `ready` runs before each round, untimed.
    """

    encode: Callable[[Any], Any]
    decode: Callable[[Any, Any], Any]
    ready: Callable[[], object] = lambda: None


def ours(dtype: str, room: int) -> Iterator[tuple[str, Contender]]:
    """omnimem by each coding and each path that the processor has."""
    from omnimem import _core

    scratch = aligned(room)

    def encoder(coding: str) -> Callable[[Any], Any]:
        def encode(plain: Any) -> Any:
            size = _core.encode_into(plain, scratch, dtype, coding)
            return scratch[:size] if size else None

        return encode

    def decode(coded: Any, out: Any) -> None:
        _core.decode_into(coded, out)

    def decode_unchecked(coded: Any, out: Any) -> None:
        _core.decode_into(coded, out, check=False)

    for coding in ("fast", "balanced"):
        for path in PATHS:
            if not _core._codec_use(path):
                continue

            def ready(path: str = path) -> object:
                return _core._codec_use(path)

            yield (
                f"omnimem {coding}, {path}",
                Contender(encoder(coding), decode_unchecked, ready),
            )
        yield (
            f"omnimem {coding}, with the checksum",
            Contender(encoder(coding), decode, lambda: _core._codec_use("auto")),
        )


def memcpy() -> Contender:
    """A copy each way: the rate of memory, by what NumPy copies with."""
    import numpy as np

    def copy(coded: Any, out: Any) -> None:
        np.copyto(np.frombuffer(out, np.uint8), np.frombuffer(coded, np.uint8))

    scratch = aligned(64 * MIB)

    def encode(plain: Any) -> Any:
        part = scratch[: len(plain)]
        copy(plain, part)
        return part

    return Contender(encode, copy)


def peers(dtype: str) -> Iterator[tuple[str, Contender]]:
    """Other compressors, as far as they are installed; those that shuffle are told the size."""
    size = {"bfloat16": 2, "float16": 2, "float32": 4}.get(dtype, 1)
    if zstandard := optional("zstandard"):
        for level in (1, 3):
            packer, unpacker = zstandard.ZstdCompressor(level), zstandard.ZstdDecompressor()
            yield (
                f"zstd {level}",
                Contender(packer.compress, lambda coded, out, u=unpacker: u.decompress(coded)),
            )
    if lz4 := optional("lz4.block"):
        yield "lz4", Contender(lz4.compress, lambda coded, out: lz4.decompress(coded))
    if blosc2 := optional("blosc2"):
        for codec, filters in (("LZ4", "BITSHUFFLE"), ("ZSTD", "SHUFFLE")):
            options = {
                "typesize": size,
                "nthreads": 1,
                "clevel": 5 if codec == "LZ4" else 1,
                "codec": blosc2.Codec[codec],
                "filters": [blosc2.Filter[filters]],
                "filters_meta": [0],
            }
            yield (
                f"blosc2 {filters.lower()} + {codec.lower()}",
                Contender(
                    lambda plain, options=options: blosc2.compress2(plain, **options),
                    lambda coded, out: blosc2.decompress2(coded, dst=out, nthreads=1),
                ),
            )
    known = {"bfloat16": "bfloat16", "float16": "float16", "float32": "float32"}
    if (zipnn := optional("zipnn")) and dtype in known:
        packer = zipnn.ZipNN(bytearray_dtype=known[dtype], threads=1)
        yield (
            "ZipNN",
            Contender(
                lambda plain: packer.compress(bytearray(plain)),
                lambda coded, out: packer.decompress(coded),
            ),
        )


def optional(name: str) -> Any:
    """A module, or None where it is not installed or does not load."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # a peer may fail in any way
        console.print(f"without {name}: {error}")
        return None


def aligned(nbytes: int) -> memoryview:
    """Populated private memory on huge pages where there are any, aligned to them."""
    huge = 2 * MIB
    memory = private_memory(nbytes + huge)
    memory.madvise(mmap.MADV_HUGEPAGE)
    shift = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % huge
    view = memoryview(memory)[shift : shift + nbytes]
    view[:] = bytes(nbytes)
    return view


def keep_freed_memory() -> None:
    """Have malloc keep what is freed: peers that return fresh bytes are not charged for pages."""
    libc = ctypes.CDLL(None)
    trim_threshold, mmap_threshold = -1, -3
    libc.mallopt(trim_threshold, 1 << 30)
    libc.mallopt(mmap_threshold, 1 << 30)


# -- measuring -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """One contender's round over all blocks of a set."""

    ratio: float
    encode: float  # GB/s
    decode: float


def run(contender: Contender, plain: memoryview, block: int, out: memoryview) -> Result:
    """Encode and decode all blocks; each decoded one is compared. BenchError when it differs.

    Encoded blocks are kept elsewhere in between, so that decoding finds them in no cache, and
    what it writes is as cold.
    """
    contender.ready()
    seconds = [0.0, 0.0]
    coded: list[Any] = []
    for at in range(0, len(plain), block):
        began = time.process_time()
        made = contender.encode(plain[at : at + block])
        seconds[0] += time.process_time() - began
        coded.append(None if made is None else bytes(made))
    for number, made in enumerate(coded):
        place = slice(number * block, (number + 1) * block)
        began = time.process_time()
        if made is None:  # stored as it is
            out[place] = plain[place]
            back = None
        else:
            back = contender.decode(made, out[place])
        seconds[1] += time.process_time() - began
        if (out[place] if back is None or isinstance(back, int) else back) != plain[place]:
            raise BenchError("what was decoded is not what was encoded")
    size = sum(block if made is None else len(made) for made in coded)
    return Result(len(plain) / size, len(plain) / seconds[0] / GB, len(plain) / seconds[1] / GB)


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """All contenders on one set, in turns, and the table."""
    nbytes, block = args.mib * MIB, args.block * MIB
    data, dtype = dataset(name, nbytes)
    plain, out = aligned(nbytes), aligned(nbytes)
    plain[:] = data
    from omnimem import _core

    contenders = {"memcpy": memcpy(), **dict(ours(dtype, _core.encode_bound(block)))}
    if not args.ours:
        contenders |= dict(peers(dtype))
    results: dict[str, list[Result]] = {}
    for number in range(args.rounds):
        for label in rotated(list(contenders), number):
            results.setdefault(label, []).append(run(contenders[label], plain, block, out))
    limit = bound(data, dtype)
    rows = [
        [
            label,
            fmt(median(result.ratio for result in results[label]), 3),
            fmt(median(result.encode for result in results[label])),
            fmt(median(result.decode for result in results[label])),
        ]
        for label in contenders
    ]
    show_table(
        f"{name}: {args.mib} MiB by {args.block}, bound {limit:.3f} ({args.rounds} rounds)",
        ["codec", "ratio", "encode GB/s", "decode GB/s"],
        rows,
        markdown=args.markdown,
    )
    return {
        "set": name,
        "dtype": dtype,
        "bound": limit,
        "results": {label: [vars(result) for result in runs] for label, runs in results.items()},
    }


SETS = ("bf16", "bf16 as initialised", "fp16", "fp32", "fp32 born as bf16", "fp8 e4m3", "fp8 e5m2",
        "random")  # fmt: skip


def main() -> int:
    """Measure each set and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mib", type=int, default=64, help="of each set")
    parser.add_argument("--block", type=int, default=4, help="MiB that are encoded at a time")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--ours", action="store_true", help="without peers")
    parser.add_argument("--cpu", type=int, help="the core to stay on; by default the last one")
    parser.add_argument("--json", type=Path, help="write every number and the machine's facts")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    args = parser.parse_args()
    try:
        importlib.import_module("omnimem._core")
    except ImportError as error:
        raise BenchError(f"omnimem is not built: {error}") from error
    if args.mib % args.block:
        raise BenchError(f"{args.mib} MiB are no whole blocks of {args.block}")
    keep_freed_memory()
    import torch

    torch.set_num_threads(1)
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(allowed) if args.cpu is None else args.cpu})
    measured = [measure(name, args) for name in args.sets]
    write_json(args.json, {"benchmark": "codec", "machine": machine_facts(), "sets": measured})
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchError as problem:
        console.print(f"[red]{problem}[/red]")
        sys.exit(1)
