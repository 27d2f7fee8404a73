"""`_core.encode` and `decode`: the same bytes come back, and damaged ones never pass for whole."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omnimem import CorruptError, _core

KIB = 1024
PART = 256 * KIB
CODINGS = ("auto", "fast", "balanced")
PATHS = ("plain", "avx2", "avx512")
# Types whose elements the codec takes apart, and what it makes smaller by at least
LEAST = {
    "bfloat16": (1.41, 1.48),
    "float16": (1.11, 1.15),
    "float32": (1.16, 1.18),
    "float8_e4m3fn": (1.05, 1.1),
    "float8_e5m2": (1.25, 1.3),
}


@pytest.fixture(autouse=True)
def any_path() -> Iterator[None]:
    yield
    assert _core._codec_use("auto")


def weights(dtype: str, nbytes: int, seed: int = 0) -> bytes:
    """Bytes of normally distributed elements, the last one perhaps in part."""
    values = np.random.default_rng(seed).normal(0, 0.02, nbytes).astype(np.float32)
    if dtype == "float32":
        return values.tobytes()[:nbytes]
    if dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()[:nbytes]
    half = values.astype(np.float16).view(np.uint16)
    if dtype == "float16":
        return half.tobytes()[:nbytes]
    if dtype == "float8_e5m2":
        return (half >> 8).astype(np.uint8).tobytes()[:nbytes]
    return ((half >> 8 & 128) | (half >> 7 & 127)).astype(np.uint8).tobytes()[:nbytes]


def check(plain: Any, dtype: str | None, coding: str) -> bytes | None:
    """Encode by every path; the bytes are the same, and so is what they are decoded to."""
    expected = bytes(plain)
    results = []
    for path in PATHS:
        if _core._codec_use(path):
            coded = _core.encode(plain, dtype, coding)
            results.append(coded)
            if coded is not None:
                assert len(coded) <= 0.95 * len(expected)
                assert _core.decode(coded) == expected
                kind = "balanced" if coding == "balanced" else "fast"
                assert _core.coded_info(coded) == (len(expected), kind)
    assert all(result == results[0] for result in results)
    return results[0]


@pytest.mark.parametrize("dtype", LEAST)
@pytest.mark.parametrize("coding", CODINGS)
def test_ratios(dtype: str, coding: str) -> None:
    plain = weights(dtype, 3 * PART + 12346)
    for hint in (dtype, None):
        coded = check(plain, hint, coding)
        assert coded is not None
        assert len(plain) / len(coded) >= LEAST[dtype][coding == "balanced"]


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from([*LEAST, "uint8", "int64", None]),
    made=st.sampled_from([*LEAST, "noise", "zeros"]),
    nbytes=st.integers(0, 3 * PART) | st.sampled_from([PART - 1, PART, PART + 1, 2 * PART]),
    coding=st.sampled_from(CODINGS),
    odd=st.binary(max_size=64),
    place=st.floats(0, 1),
    offset=st.integers(0, 63),
    seed=st.integers(0, 2**32 - 1),
)
def test_round_trips(
    dtype: str | None,
    made: str,
    nbytes: int,
    coding: str,
    odd: bytes,
    place: float,
    offset: int,
    seed: int,
) -> None:
    """Any bytes, whatever they are said to be, at any address, with others among them."""
    if made == "noise":
        plain = bytearray(np.random.default_rng(seed).bytes(nbytes))
    elif made == "zeros":
        plain = bytearray(nbytes)
    else:
        plain = bytearray(weights(made, nbytes, seed))
    at = int(place * nbytes)
    plain[at : at + len(odd)] = odd
    moved = memoryview(bytearray(offset) + plain)[offset:]
    check(moved, dtype, coding)


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("what", [bytes(8 * PART), b"", b"a", np.random.default_rng(1).bytes(PART)])
def test_what_is_worth_it(what: bytes, coding: str) -> None:
    coded = check(what, "bfloat16", coding)
    assert (coded is not None) == (len(what) > PART)


def test_the_type_of_a_tensor_is_known() -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.randn(300, 700).mul(0.02).to(torch.bfloat16)
    coded = _core.encode(tensor)
    plain = tensor.view(torch.uint8).numpy().tobytes()
    assert coded == _core.encode(plain, "bfloat16")
    assert _core.decode(coded) == plain
    strided = tensor.t()
    assert _core.decode(_core.encode(strided)) == (
        strided.contiguous().view(torch.uint8).numpy().tobytes()
    )


def test_buffers_of_the_caller() -> None:
    plain = weights("bfloat16", PART + 99)
    room = bytearray(_core.encode_bound(len(plain)) + 5)
    size = _core.encode_into(plain, room, dtype="bfloat16", coding="balanced")
    assert bytes(room[:size]) == _core.encode(plain, "bfloat16", "balanced")
    for checked in (True, False):
        out = bytearray(len(plain))
        _core.decode_into(memoryview(room)[:size], out, check=checked)
        assert out == plain
        for wrong in (len(plain) - 1, len(plain) + 1):
            with pytest.raises(CorruptError, match=f"{wrong} are wanted"):
                _core.decode_into(memoryview(room)[:size], bytearray(wrong), check=checked)
    assert _core.encode_into(np.random.default_rng(1).bytes(PART), room) == 0
    for less in (0, 100, size - 1, len(plain) // 2):  # what does not fit is not made
        assert _core.encode_into(plain, bytearray(less), dtype="bfloat16", coding="balanced") == 0
    with pytest.raises(ValueError, match="room for 100"):
        _core.encode_into(plain, bytearray(100), coding="none")
    with pytest.raises(BufferError):
        _core.encode_into(plain, bytes(room))


def test_refused() -> None:
    with pytest.raises(ValueError, match="coding 'zip' is unknown"):
        _core.encode(b"", coding="zip")
    with pytest.raises(ValueError, match="dtype 'half' is unknown"):
        _core.encode(b"", "half")
    with pytest.raises(ValueError, match="no path 'sse'"):
        _core._codec_use("sse")
    with pytest.raises(TypeError):
        _core.encode(3)  # type: ignore[arg-type]
    for wrong in (b"", b"abc", bytes(1000), weights("bfloat16", 1000)):
        with pytest.raises(CorruptError):
            _core.decode(wrong)
        with pytest.raises(CorruptError):
            _core.coded_info(wrong)


def test_stored() -> None:
    """Coding "none": bytes that nothing makes smaller, and no bytes at all."""
    for plain in (b"", b"x", bytes(range(256)) * 3000, weights("bfloat16", PART)):
        coded = _core.encode(plain, "bfloat16", "none")
        assert coded is not None
        assert len(coded) == _core.encode_bound(len(plain))
        assert _core.coded_info(coded) == (len(plain), "none")
        assert _core.decode(coded) == plain
        _core._coded_compare(coded, plain)


def test_frames_follow_each_other() -> None:
    parts = [weights("bfloat16", PART + 2, 1), b"", weights("bfloat16", 2 * PART, 2), b"end"]
    codings = ["fast", "none", "balanced", "none"]
    frames = [_core.encode(p, "bfloat16", c) for p, c in zip(parts, codings, strict=True)]
    coded = b"".join(frame or b"" for frame in frames)
    plain = b"".join(parts)
    assert _core.coded_info(coded) == (len(plain), "balanced")
    assert _core.decode(coded) == plain
    for wrong in (coded + b"\0", coded[:-1], coded[len(frames[0] or b"") - 1 :]):
        with pytest.raises(CorruptError):
            _core.coded_info(wrong)
        with pytest.raises(CorruptError):
            _core.decode(wrong)
    first = frames[0] or b""
    _core.decode_into(first, bytearray(len(parts[0])), check=False)
    with pytest.raises(CorruptError, match="the first frame has"):
        _core.decode_into(coded, bytearray(len(parts[0])), check=False)


def test_compare() -> None:
    plain = weights("bfloat16", 6 * PART)
    for coding in ("none", "fast", "balanced"):
        coded = _core.encode(plain, "bfloat16", coding) or b""
        _core._coded_compare(coded, plain)
        for at in (0, 4 * PART - 1, len(plain) - 1):
            other = bytearray(plain)
            other[at] ^= 1
            with pytest.raises(CorruptError, match="others are decoded"):
                _core._coded_compare(coded, other)
        with pytest.raises(CorruptError, match="plain ones, not"):
            _core._coded_compare(coded, plain[:-1])
        with pytest.raises(CorruptError, match="plain ones, not"):
            _core._coded_compare(coded + coded, plain)


@pytest.mark.parametrize("coding", ["fast", "balanced"])
def test_damage(coding: str) -> None:
    """An error, or the same bytes where padding was hit."""
    plain = weights("bfloat16", PART + 4096)
    coded = _core.encode(plain, "bfloat16", coding)
    assert coded is not None
    random = np.random.default_rng(7)
    wrong = 0
    for _ in range(500):
        bad = bytearray(coded)
        match random.integers(4):
            case 0:
                bad[random.integers(len(bad))] ^= 1 << random.integers(8)
            case 1:
                del bad[random.integers(len(bad)) :]
            case 2:
                bad += random.bytes(random.integers(1, 100))
            case _:
                at, start = random.integers(len(bad), size=2)
                bad[at : at + 64] = bad[start : start + 64]
        try:
            assert _core.decode(bad) == plain
        except CorruptError:
            wrong += 1
    assert wrong > 450


def test_no_memory() -> None:
    plain = weights("bfloat16", PART)
    coded = _core.encode(plain, "bfloat16", "balanced")
    assert coded is not None
    for nth in range(1, 4):
        for work in (lambda: _core.encode(plain, "bfloat16", "balanced"),
                     lambda: _core.decode(coded)):  # fmt: skip
            _core._fault_arm("alloc", nth)
            try:
                with pytest.raises(MemoryError):
                    work()
            finally:
                _core._fault_reset()
    assert _core.decode(coded) == plain


def test_threads() -> None:
    """Each call has its own scratch, and none waits for another's."""
    failed: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for turn in range(6):
                dtype = list(LEAST)[(seed + turn) % len(LEAST)]
                plain = weights(dtype, PART + 1000 * seed + turn, seed)
                coded = _core.encode(plain, dtype, CODINGS[turn % 3])
                assert coded is not None
                assert _core.decode(coded) == plain
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
