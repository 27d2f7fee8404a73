"""Blocks that a user's compression manager encodes: smaller on disk, and never lost."""

from __future__ import annotations

import bz2
import logging
import threading
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import omnimem
from omnimem import AdvancedMemorySwapper, CompressionManager, _core

from .conftest import data
from .memory import Memory
from .swappers import KIB, MIB, Opener, Zlib, content, fill, group_of, read, settle, swap_all

SIZE = 256 * KIB


def soft(name: str, size: int = SIZE) -> bytes:
    """Bytes that are easily encoded, and other ones for each name."""
    return (data(64, int(name[1:])) * (size // 64 + 1))[:size]


def fill_soft(swapper: AdvancedMemorySwapper, count: int, first: int = 0) -> list[str]:
    names = [f"s{i}" for i in range(first, first + count)]
    for name in names:
        swapper.register_memory_block(name, SIZE, data=soft(name))
    return names


class Bz2(Zlib):
    def compress(self, plain: Any, /) -> bytes:
        self.packed += 1
        return bz2.compress(plain, 1)

    def decompress(self, packed: Any, /) -> bytes:
        self.unpacked += 1
        return bz2.decompress(packed)


class Views(Zlib):
    """Takes and gives other buffers than bytes."""

    def compress(self, plain: Any, /) -> Any:
        assert memoryview(plain).readonly
        return memoryview(bytearray(super().compress(plain)))

    def decompress(self, packed: Any, /) -> Any:
        return np.frombuffer(super().decompress(packed), np.uint8)


class Custom:
    """Runs of one byte, as many as a block has."""

    def compress(self, plain: Any, /) -> bytes:
        whole = bytes(plain)
        runs = [whole[i : i + 1] for i in range(0, len(whole), KIB)]
        return len(whole).to_bytes(8, "little") + b"".join(runs)

    def decompress(self, packed: Any, /) -> bytes:
        whole = bytes(packed)
        size = int.from_bytes(whole[:8], "little")
        return b"".join(bytes([byte]) * KIB for byte in whole[8:])[:size]


def _fails(*_: Any) -> Any:
    raise ArithmeticError("out of order")


class Switched(Zlib):
    """Works until `compress` or `decompress` is replaced."""

    on_compress: Callable[[Any], Any] | None = None
    on_decompress: Callable[[Any], Any] | None = None

    def compress(self, plain: Any, /) -> Any:
        return self.on_compress(plain) if self.on_compress else super().compress(plain)

    def decompress(self, packed: Any, /) -> Any:
        return self.on_decompress(packed) if self.on_decompress else super().decompress(packed)


# -- managers that work


@pytest.mark.parametrize("manager", [Zlib, Bz2, Views])
def test_a_manager(swapper: AdvancedMemorySwapper, manager: type[Zlib]) -> None:
    codec = manager()
    assert isinstance(codec, CompressionManager)
    swapper.integrate_with_compression(codec)
    names = fill_soft(swapper, 6)
    for turn in range(3):
        assert swap_all(swapper) == 6
        group = group_of(swapper)
        assert (group.swapped, group.host_bytes) == (6, 0)
        assert 0 < group.disk_bytes <= 6 * 16 * KIB
        assert all(swapper.blocks[name].is_swapped for name in names)
        assert [read(swapper, name) for name in names] == [soft(name) for name in names]
        assert codec.packed == 6 * (turn + 1) or turn
    swapper.store.check()
    assert swapper.get_status()["swap_trouble"] is None


def test_a_lossless_one_of_our_own(swapper: AdvancedMemorySwapper) -> None:
    swapper.integrate_with_compression(Custom())
    runs = b"".join(bytes([i % 251]) * KIB for i in range(500)) + b"\7"
    swapper.register_memory_block("runs", len(runs), data=runs)
    swapper.register_memory_block("noise", 100 * KIB, data=data(100 * KIB))
    assert swap_all(swapper) == 2
    assert swapper.blocks["runs"].swap_location == "encoded"
    assert swapper.blocks["noise"].swap_location != "encoded"
    assert read(swapper, "runs") == runs
    assert read(swapper, "noise") == data(100 * KIB)


def test_less_is_written(open_swapper: Opener) -> None:
    written = []
    for codec in (None, Zlib()):
        swapper = open_swapper(nvme_optimizer=None)
        if codec is not None:
            swapper.integrate_with_compression(codec)
        fill_soft(swapper, 8)
        assert swap_all(swapper) == 8
        written.append(swapper.nvme_optimizer.get_swap_stats()["written_bytes"])
        assert swapper.stats.total_swapped_bytes == written[-1]
    assert written[0] == 8 * SIZE
    assert written[1] <= written[0] // 16


def test_a_swap_area_too_small_for_the_plain_bytes(open_swapper: Opener) -> None:
    swapper = open_swapper(max_swap_size=MIB)
    swapper.integrate_with_compression(Zlib())
    names = fill_soft(swapper, 20)
    assert swap_all(swapper) == 20
    assert swapper.store.stats().disk.mapped_bytes <= MIB
    assert [read(swapper, name) for name in names] == [soft(name) for name in names]


@pytest.mark.parametrize(
    "look",
    [
        lambda swapper, name: bytes(memoryview(swapper.blocks[name])),
        lambda swapper, name: np.from_dlpack(swapper.blocks[name]).tobytes(),
        lambda swapper, name: np.asarray(swapper.blocks[name]).tobytes(),
        lambda swapper, name: bytes(swapper.store.lease(name)),
        lambda swapper, name: bytes(swapper.store.lease(name, write=True)),
        lambda swapper, name: bytes(memoryview(swapper.access_memory_block(name))),
    ],
    ids=["memoryview", "dlpack", "asarray", "lease", "lease to write", "access"],
)
def test_every_way_in_decodes(swapper: AdvancedMemorySwapper, look: Callable[..., bytes]) -> None:
    swapper.integrate_with_compression(Zlib())
    names = fill_soft(swapper, 3)
    assert swap_all(swapper) == 3
    for name in names:
        assert swapper.blocks[name].swap_location == "encoded"
        assert look(swapper, name) == soft(name)
        assert not swapper.blocks[name].is_swapped


def test_dtype_and_shape_come_back(swapper: AdvancedMemorySwapper) -> None:
    swapper.integrate_with_compression(Zlib())
    given = np.arange(4096, dtype=np.float64).reshape(64, 64) // 100
    swapper.register_memory_block("a", given.nbytes, data=given)
    assert swap_all(swapper) == 1
    assert swapper.blocks["a"].swap_location == "encoded"
    back = np.from_dlpack(swapper.blocks["a"])
    assert (back.dtype, back.shape) == (given.dtype, given.shape)
    assert np.array_equal(back, given)


def test_what_is_written_is_encoded_anew(swapper: AdvancedMemorySwapper) -> None:
    swapper.integrate_with_compression(Zlib())
    (name,) = fill_soft(swapper, 1)
    expected = bytearray(soft(name))
    for turn in range(4):
        with memoryview(swapper.blocks[name]) as view:
            view[turn] = expected[turn] = 99 + turn
            assert swap_all(swapper) == 0
        assert swap_all(swapper) == 1
        assert read(swapper, name) == expected


def test_prefetch(swapper: AdvancedMemorySwapper) -> None:
    """It decodes nothing: that is for the thread that wants the bytes."""
    codec = Zlib()
    swapper.integrate_with_compression(codec)
    names = fill_soft(swapper, 4)
    assert swap_all(swapper) == 4
    unpacked = codec.unpacked
    swapper.prefetch(names).wait(30)
    assert codec.unpacked == unpacked
    assert [read(swapper, name) for name in names] == [soft(name) for name in names]


def test_one_manager_after_the_other(swapper: AdvancedMemorySwapper) -> None:
    """Each block is decoded by the one that encoded it."""
    first, second = Zlib(), Bz2()
    swapper.integrate_with_compression(first)
    names = fill_soft(swapper, 3)
    assert swap_all(swapper) == 3
    swapper.integrate_with_compression(second)
    names += fill_soft(swapper, 3, first=3)
    assert swap_all(swapper) == 3
    assert (first.packed, second.packed) == (3, 3)
    unpacked = (first.unpacked, second.unpacked)
    assert [read(swapper, name) for name in names] == [soft(name) for name in names]
    assert (first.unpacked, second.unpacked) == (unpacked[0] + 3, unpacked[1] + 3)
    swapper.integrate_with_compression(first)
    assert swap_all(swapper) == 6
    assert [read(swapper, name) for name in names] == [soft(name) for name in names]


def test_unregister_and_cleanup(swapper: AdvancedMemorySwapper) -> None:
    swapper.integrate_with_compression(Zlib())
    names = fill_soft(swapper, 4)
    assert swap_all(swapper) == 4
    view = memoryview(swapper.blocks["s0"])
    for name in names[:2]:
        swapper.unregister_memory_block(name)
    settle(swapper)
    assert list(swapper.blocks) == names[2:]
    swapper.store.check()
    swapper.cleanup()
    assert view == soft("s0")


def test_only_until_usage_is_below(swapper: AdvancedMemorySwapper, memory: Memory) -> None:
    """The memory that the encoded bytes took is not counted: it goes when they are written."""
    codec = Zlib()
    swapper.integrate_with_compression(codec)
    names = fill_soft(swapper, 16)
    memory.swapper, memory.total, swapper.swap_threshold = swapper, 32 * SIZE, 0.375
    assert swapper.perform_swapping() == 5
    assert not swapper.should_swap()
    assert codec.packed == 5
    assert swapper.perform_swapping() == 0
    assert [read(swapper, name) for name in names] == [soft(name) for name in names]


# -- omnimem's own


def bfloat16(seed: int, size: int = SIZE) -> bytes:
    values = np.random.default_rng(seed).normal(0, 0.02, size // 2).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()


def test_our_own(swapper: AdvancedMemorySwapper) -> None:
    """Weights become smaller, what does not goes plain, and all comes back."""
    swapper.integrate_with_compression(None)
    swapper.integrate_with_compression()
    given = {f"w{i}": bfloat16(i) for i in range(5)}
    for name, plain in given.items():
        swapper.register_memory_block(name, SIZE, data=plain)
    given["noise"] = data(SIZE)
    swapper.register_memory_block("noise", SIZE, data=given["noise"])
    for _ in range(3):
        assert swap_all(swapper) == 6
        assert group_of(swapper).disk_bytes <= SIZE + 5 * SIZE / 1.35
        for name in given:
            encoded = swapper.blocks[name].swap_location == "encoded"
            assert encoded == name.startswith("w")
        assert {name: read(swapper, name) for name in given} == given
        swapper.store.check()


def test_our_own_is_told_the_dtype(swapper: AdvancedMemorySwapper) -> None:
    torch = pytest.importorskip("torch")
    swapper.integrate_with_compression(None)
    tensor = torch.randn(256, 512).mul(0.02).to(torch.bfloat16)
    swapper.register_memory_block("w", tensor.nbytes, data=tensor)
    assert swap_all(swapper) == 1
    assert swapper.blocks["w"].swap_location == "encoded"
    back = torch.from_dlpack(swapper.access_memory_block("w"))
    assert back.dtype == tensor.dtype
    assert torch.equal(back, tensor)


def test_our_own_after_another(swapper: AdvancedMemorySwapper) -> None:
    swapper.integrate_with_compression(Zlib())
    (soft_name,) = fill_soft(swapper, 1)
    assert swap_all(swapper) == 1
    swapper.integrate_with_compression(None)
    swapper.register_memory_block("w", SIZE, data=bfloat16(1))
    assert swap_all(swapper) == 1
    assert read(swapper, soft_name) == soft(soft_name)
    assert read(swapper, "w") == bfloat16(1)


def test_our_own_without_memory(
    swapper: AdvancedMemorySwapper, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def fail(*_: Any, **__: Any) -> bytes:
        raise MemoryError("no room")

    swapper.integrate_with_compression(None)
    swapper.register_memory_block("w", SIZE, data=bfloat16(1))
    monkeypatch.setattr(_core, "encode", fail)
    assert swap_all(swapper) == 1
    assert "stored plain" in caplog.text
    assert swapper.blocks["w"].swap_location != "encoded"
    assert read(swapper, "w") == bfloat16(1)


# -- managers that do not


@pytest.mark.parametrize(
    "compress",
    [
        _fails,
        lambda plain: "text",
        lambda plain: None,
        lambda plain: 7,
        lambda plain: [1, 2],
        lambda plain: b"",
        lambda plain: bytes(plain[: SIZE // 2]),
        lambda plain: zlib.compress(bytes(SIZE)),
        lambda plain: bytes(plain),
        lambda plain: bytes(plain) * 2,
        lambda plain: memoryview(bytes(100))[::2],
        lambda plain: plain[: SIZE // 2],
    ],
)
def test_compress_is_wrong(
    swapper: AdvancedMemorySwapper, caplog: pytest.LogCaptureFixture, compress: Any
) -> None:
    """The block is stored plain, and nothing is lost."""
    manager = Switched()
    manager.on_compress = compress
    swapper.integrate_with_compression(manager)
    names = fill_soft(swapper, 3)
    with caplog.at_level(logging.WARNING, "omnimem"):
        assert swap_all(swapper) == 3
    assert bool(caplog.records) or len(compress(bytes(SIZE))) >= SIZE
    assert all(block.is_swapped for block in swapper.blocks.values())
    assert group_of(swapper).disk_bytes == 3 * SIZE
    swapper.store.check()
    assert [read(swapper, name) for name in names] == [soft(name) for name in names]
    manager.on_compress = None
    memoryview(swapper.blocks["s0"])[0] ^= 1
    assert swap_all(swapper) == 3
    assert read(swapper, "s0")[1:] == soft("s0")[1:]


@pytest.mark.parametrize("method", ["on_compress", "on_decompress"])
def test_a_kept_traceback_keeps_no_block(
    swapper: AdvancedMemorySwapper, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    def fail(given: Any) -> Any:
        part = memoryview(given)[: SIZE // 2]
        raise ValueError(f"cannot do {len(part)} bytes")

    manager = Switched()
    setattr(manager, method, fail)
    if method == "on_decompress":
        manager.on_compress = lambda plain: plain[: SIZE // 2]
    swapper.integrate_with_compression(manager)
    names = fill_soft(swapper, 3)
    assert swap_all(swapper) == 3
    assert "cannot do" in caplog.text
    assert [read(swapper, name) for name in names] == [soft(name) for name in names]


@pytest.mark.parametrize(
    "decompress",
    [
        _fails,
        lambda packed: "text",
        lambda packed: None,
        lambda packed: b"",
        lambda packed: bytes(SIZE),
        lambda packed: zlib.decompress(packed)[:-1],
        lambda packed: zlib.decompress(packed) + b"x",
        lambda packed: zlib.decompress(packed)[::-1],
    ],
)
def test_decompress_is_wrong_from_the_start(
    swapper: AdvancedMemorySwapper, caplog: pytest.LogCaptureFixture, decompress: Any
) -> None:
    """What it makes is tried before the plain bytes go."""
    manager = Switched()
    manager.on_decompress = decompress
    swapper.integrate_with_compression(manager)
    names = fill_soft(swapper, 3)
    with caplog.at_level(logging.WARNING, "omnimem"):
        assert swap_all(swapper) == 3
    assert "Switched" in caplog.text
    assert [swapper.blocks[name].swap_location == "encoded" for name in names] == [False] * 3
    assert [read(swapper, name) for name in names] == [soft(name) for name in names]


@pytest.mark.parametrize(
    "decompress",
    [
        _fails,
        lambda packed: "text",
        lambda packed: None,
        lambda packed: b"",
        lambda packed: bytes(SIZE),
        lambda packed: zlib.decompress(packed)[:-1],
        lambda packed: zlib.decompress(packed) + b"x",
        lambda packed: zlib.decompress(packed)[::-1],
    ],
)
def test_decompress_is_wrong_later(swapper: AdvancedMemorySwapper, decompress: Any) -> None:
    """The encoded bytes are kept until somebody decodes them right."""
    manager = Switched()
    swapper.integrate_with_compression(manager)
    (name,) = fill_soft(swapper, 1)
    assert swap_all(swapper) == 1
    block = swapper.blocks[name]
    manager.on_decompress = decompress
    for look in (
        lambda: swapper.access_memory_block(name),
        lambda: memoryview(block),
        lambda: block.__dlpack__(),
        lambda: swapper.store.lease(name),
    ):
        with pytest.raises(omnimem.Error, match=name):
            look()
        swapper.store.check()
        assert block.is_swapped
    assert swap_all(swapper) == 0
    manager.on_decompress = None
    assert read(swapper, name) == soft(name)
    assert swap_all(swapper) == 1
    assert read(swapper, name) == soft(name)


def test_a_manager_that_is_interrupted(swapper: AdvancedMemorySwapper) -> None:
    def interrupt(_: Any) -> Any:
        raise KeyboardInterrupt

    manager = Switched()
    swapper.integrate_with_compression(manager)
    names = fill_soft(swapper, 3)
    manager.on_compress = interrupt
    with pytest.raises(KeyboardInterrupt):
        swap_all(swapper)
    manager.on_compress = None
    assert swap_all(swapper) == 3
    manager.on_decompress = interrupt
    with pytest.raises(KeyboardInterrupt):
        swapper.access_memory_block("s0")
    manager.on_decompress = None
    assert [read(swapper, name) for name in names] == [soft(name) for name in names]
    assert group_of(swapper).leases == 0


def test_little_saved_is_not_worth_it(swapper: AdvancedMemorySwapper) -> None:
    """At least 5 % have to be saved."""
    manager = Switched()
    swapper.integrate_with_compression(manager)
    swapper.register_memory_block("much", 100_000, data=data(90_000) + bytes(10_000))
    swapper.register_memory_block("little", 100_000, data=data(97_000) + bytes(3_000))
    assert swap_all(swapper) == 2
    assert swapper.blocks["much"].swap_location == "encoded"
    assert swapper.blocks["little"].swap_location != "encoded"
    assert read(swapper, "much") == data(90_000) + bytes(10_000)
    assert read(swapper, "little") == data(97_000) + bytes(3_000)


def test_a_failed_write(swapper: AdvancedMemorySwapper) -> None:
    """What could not be written stays in memory, encoded."""
    swapper.integrate_with_compression(Zlib())
    names = fill_soft(swapper, 5)
    _core._fault_arm("write", 1, True)
    swap_all(swapper)
    _core._fault_reset()
    assert "cannot write" in swapper.get_status()["swap_trouble"]
    assert group_of(swapper).disk_bytes == 0
    swapper.store.check()
    assert [read(swapper, name) for name in names] == [soft(name) for name in names]
    assert swap_all(swapper) == 5
    assert swapper.get_status()["swap_trouble"] is None
    assert [read(swapper, name) for name in names] == [soft(name) for name in names]


def test_a_failed_write_of_what_is_not_encoded(swapper: AdvancedMemorySwapper) -> None:
    swapper.integrate_with_compression(Zlib())
    names = fill(swapper, 5)
    _core._fault_arm("write", 3, True)
    gone = swap_all(swapper)
    _core._fault_reset()
    assert gone == group_of(swapper).swapped < 5
    assert swapper.get_status()["swap_trouble"]
    assert [read(swapper, name) for name in names] == [content(name) for name in names]
    assert swap_all(swapper) == 5
    assert [read(swapper, name) for name in names] == [content(name) for name in names]


def test_what_is_no_manager(swapper: AdvancedMemorySwapper) -> None:
    class Half:
        def compress(self, plain: Any, /) -> bytes:
            return bytes(plain)

    for wrong in (3, Half()):
        with pytest.raises(TypeError, match="compress"):
            swapper.integrate_with_compression(wrong)  # type: ignore[arg-type]
    assert fill(swapper, 1) == ["b0"]
    assert swap_all(swapper) == 1
    assert read(swapper, "b0") == content("b0")


# -- threads


def test_only_the_calling_thread_encodes(open_swapper: Opener) -> None:
    """What the store moves out by itself goes plain."""
    swapper = open_swapper(host_limit="2MiB")
    codec = Zlib()
    swapper.integrate_with_compression(codec)
    names = fill_soft(swapper, 32)
    assert group_of(swapper).swapped >= 24
    assert [read(swapper, name) for name in names] == [soft(name) for name in names]
    assert (codec.packed, codec.unpacked) == (0, 0)
    assert swap_all(swapper) >= 1
    assert codec.packed >= 1
    assert [read(swapper, name) for name in names] == [soft(name) for name in names]
    assert codec.threads == {threading.get_ident()}
    seen: list[set[int]] = []

    def elsewhere() -> None:
        swap_all(swapper)
        codec.threads = set()
        for name in names:
            assert read(swapper, name) == soft(name)
        swap_all(swapper)
        seen.append(codec.threads | {threading.get_ident()})

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [codec.threads]
    assert threading.get_ident() not in codec.threads


def test_many_threads_decode(swapper: AdvancedMemorySwapper) -> None:
    swapper.integrate_with_compression(Zlib())
    names = fill_soft(swapper, 8)
    wrong: list[str] = []

    def look(turns: int) -> None:
        for turn in range(turns):
            for name in names:
                if read(swapper, name) != soft(name):
                    wrong.append(name)
            if turn % 3 == 0:
                swap_all(swapper)

    threads = [threading.Thread(target=look, args=(9,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    swapper.store.check()
