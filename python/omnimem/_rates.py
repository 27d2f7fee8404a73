"""What this machine does with this checkpoint, measured in under a second before planning.

The disk reads a stretch of the checkpoint itself, without the page cache. A sample of its decoder
layers is encoded and decoded as a stream does it. Nothing is kept.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from omnimem import _core
from omnimem._plan_choice import Rates
from omnimem._plan_units import Tensor
from omnimem.config import StoreConfig
from omnimem.store import Store

MIB = 1 << 20
_READ = 192 * MIB
_PIECE = 8 * MIB
_SAMPLE = 32 * MIB
_COPIES = 4
"""Of the sample, for arithmetic: together they are in no cache of the processor."""
_TIMES = 5
_KEEP = {"fast": 2, "balanced": 3}


def measure(
    tensors: Sequence[Tensor],
    dtypes: Sequence[str],
    codings: Sequence[str],
    compute: Callable[[Store, Sequence[str], str], float],
    *,
    memory_bytes: int,
    io_backend: str = "auto",
) -> Rates:
    """Measure the disk, the codings and the model's arithmetic.

    Parameters
    ----------
    tensors : sequence of Tensor
        Those that decoding uses, in the order of the file.
    dtypes : sequence of str
        Of each.
    codings : sequence of str
        Those to measure: "fast", "balanced".
    compute : callable
        Takes a store, the names of blocks in it and their dtype: bytes per second that a decode
        pass goes through.
    memory_bytes : int
        What may be used for it; one tensor always is.
    io_backend : str
        As in `StoreConfig`.

    Returns
    -------
    Rates
        Bytes per second; medians of a few tries.
    """
    encoded_as = _coding_of(tensors)
    largest = max(tensor.nbytes for tensor in tensors)
    limit = 4 * max(_READ, largest)
    with Store(StoreConfig(host_limit=limit, disk_limit=0, io_backend=io_backend)) as store:
        read = _read_rate(store, tensors, min(_READ, memory_bytes // 2))
        name, dtype = _sample(store, tensors, dtypes)
        decode, share = {}, {}
        for coding in {*codings, *([encoded_as] if encoded_as else [])}:
            decode[coding], share[coding] = _decode_rate(store, name, coding)
        proof = _proof_rate(store, name)
        speed = compute(store, _copies(store, name, memory_bytes), dtype)
    return Rates(read, speed, decode, share, proof, encoded_as)


def _coding_of(tensors: Sequence[Tensor]) -> str | None:
    """How the file's bytes are encoded; None: they are not."""
    encoded = [tensor for tensor in tensors if tensor.encoded_nbytes]
    if not encoded:
        return None
    ranked = sorted(encoded, key=lambda tensor: tensor.nbytes)
    typical = ranked[len(ranked) * 3 // 4]  # small ones may be stored as they are
    with Path(typical.file).open("rb") as file:
        file.seek(typical.offset)
        coding = _core.coded_info(file.read(typical.length))[1]
    return coding if coding in _KEEP else None


def _read_rate(store: Store, tensors: Sequence[Tensor], most: int) -> float:
    """Read a stretch from the middle of the files, in pieces."""
    middle = len(tensors) // 3
    pieces: list[tuple[str, int, int]] = []
    taken = 0
    for tensor in (*tensors[middle:], *tensors[:middle]):
        for at in range(0, tensor.length, _PIECE):
            nbytes = min(_PIECE, tensor.length - at)
            if taken < most and nbytes >= min(MIB, tensor.length):
                pieces.append((tensor.file, tensor.offset + at, nbytes))
                taken += nbytes
    names = [f"read-{number}" for number in range(len(pieces))]
    for name, piece in zip(names, pieces, strict=True):
        store.add_file(name, *piece)
    before = store.stats()
    store.prefetch(names).wait()
    after = store.stats()
    for name in names:
        store.remove(name)
    busy = after.read_busy_seconds - before.read_busy_seconds
    return (after.read_bytes - before.read_bytes) / max(busy, 1e-9)


def _sample(store: Store, tensors: Sequence[Tensor], dtypes: Sequence[str]) -> tuple[str, str]:
    """A block of bytes as the model's large tensors have them, and its dtype."""
    ranked = sorted(zip(tensors, dtypes, strict=True), key=lambda pair: -pair[0].nbytes)
    median = ranked[len(ranked) // 4]
    mine = [tensor for tensor, dtype in ranked if dtype == median[1]]
    start = next(at for at, tensor in enumerate(mine) if tensor.nbytes <= median[0].nbytes)
    parts: list[bytes] = []
    taken = 0
    for number, tensor in enumerate(mine[start : start + 8]):
        name = f"part-{number}"
        decoded = None if tensor.encoded_nbytes is None else tensor.nbytes
        store.add_file(name, tensor.file, tensor.offset, tensor.length, decoded_nbytes=decoded)
        with store.lease(name) as lease:
            part = bytes(memoryview(lease)[: min(_SAMPLE // 4, _SAMPLE - taken)])
        store.remove(name)
        parts.append(part)
        taken += len(part)
        if taken >= _SAMPLE:
            break
    store.add("sample", b"".join(parts), group="rates")
    return "sample", median[1]


def _proof_rate(store: Store, name: str) -> float:
    """Bytes per second through a checksum: of a copy with one, and a copy without."""
    times = {True: [], False: []}  # type: dict[bool, list[float]]
    with store.lease(name) as lease:
        form = _core.encode(lease, coding="none")
        out = bytearray(len(memoryview(lease)))
    assert form is not None
    for check in (True, False) * _TIMES:
        started = time.perf_counter()
        _core.decode_into(form, out, check=check)
        times[check].append(time.perf_counter() - started)
    return len(out) / max(min(times[True]) - min(times[False]), 1e-6)


def _copies(store: Store, name: str, most: int) -> list[str]:
    """More blocks of the same bytes, within `most` bytes."""
    names = [name]
    with store.lease(name) as lease:
        sample = memoryview(lease)
        while len(names) < _COPIES and (len(names) + 1) * sample.nbytes <= most:
            names.append(f"{name}-{len(names)}")
            store.add(names[-1], sample)
    return names


def _decode_rate(store: Store, name: str, coding: str) -> tuple[float, float]:
    """Plain bytes per second, and the share of the size that is left (1: nothing is saved)."""
    nbytes = store.info(name).nbytes
    stream = _core.Stream(store, "rates", [("sample", [(name, _KEEP[coding])])])
    try:
        stream.load()
        packed = stream.stats()["packed_bytes"]
        if not packed:
            return 1.0, 1.0
        times = []
        for _ in range(_TIMES):
            held: list[int] = []
            started = time.perf_counter()
            stream.enter(0, held)
            times.append(time.perf_counter() - started)
            stream.bound(0)
            if stream.leave(0):
                stream.unbound(0)
    finally:
        stream.close()
    return nbytes / statistics.median(times), packed / nbytes
