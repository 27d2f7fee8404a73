"""What goes wrong below a swapper: it says so, loses nothing, and goes on once that is mended."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import omnimem
from omnimem import AdvancedMemorySwapper, Error, _core

from .conftest import SOAK, data, run_clean

KIB, MIB = 1 << 10, 1 << 20
POINTS = _core._fault_points()
MOST = 400 if SOAK else 60
SIZE = 80 * KIB + 5
Opener = Callable[..., AdvancedMemorySwapper]


def register(swapper: AdvancedMemorySwapper, count: int, nbytes: int) -> dict[str, bytes]:
    """Blocks of noise, and what they hold."""
    contents = {f"b{i}": data(nbytes, i) for i in range(count)}
    for name, content in contents.items():
        swapper.register_memory_block(name, nbytes, data=content)
    return contents


def verify(swapper: AdvancedMemorySwapper, contents: dict[str, bytes]) -> None:
    swapper.store.check()
    assert sorted(swapper.blocks) == sorted(contents)
    for name, content in contents.items():
        assert memoryview(swapper.blocks[name]) == content, name
    swapper.store.check()


def trouble(swapper: AdvancedMemorySwapper) -> str | None:
    found = swapper.get_status()["swap_trouble"]
    assert found is None or isinstance(found, str)
    return found


def in_memory(swapper: AdvancedMemorySwapper) -> list[str]:
    return [name for name, block in swapper.blocks.items() if block.ptr]


# ---- no space ----


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system of 24 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting takes root")
    base = tmp_path_factory.mktemp("disk")
    image, point = base / "image", base / "mount"
    point.mkdir()
    with open(image, "wb") as file:
        file.truncate(24 * MIB)
    for command in (
        ["mkfs.ext4", "-q", "-F", "-m", "0", str(image)],
        ["mount", "-o", "loop", str(image), str(point)],
    ):
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError as error:
            pytest.skip(f"no {error.filename} here")
        if done.returncode:
            pytest.skip(f"{command[0]} does not work here: {done.stderr.strip()}")
    yield point
    subprocess.run(["umount", "-l", str(point)], check=True)


def free_bytes(directory: Path) -> int:
    state = os.statvfs(directory)
    return state.f_bavail * state.f_frsize


@contextlib.contextmanager
def hog(directory: Path, leave: int) -> Iterator[None]:
    """Somebody else takes the space, but for `leave` bytes."""
    path = directory / "hog"
    # What the file system needs for itself may be in the way.
    with open(path, "wb") as file, contextlib.suppress(OSError):
        os.posix_fallocate(file.fileno(), 0, free_bytes(directory) - leave)
    try:
        yield
    finally:
        path.unlink()


@pytest.mark.parametrize("left", [0, 3 * MIB])
def test_no_space(open_eager_swapper: Opener, small_disk: Path, left: int) -> None:
    swapper = open_eager_swapper(small_disk, max_swap_size="1GiB")
    assert swapper.max_swap_size < free_bytes(small_disk)
    contents = register(swapper, 16, 512 * KIB)
    with hog(small_disk, left):
        gone = swapper.perform_swapping()
        assert gone == 0 if left == 0 else 4 <= gone <= 6
        assert "No space left" in trouble(swapper)
        assert len(in_memory(swapper)) == 16 - gone
        # What it could not use is still there for others.
        assert free_bytes(small_disk) >= left - gone * 512 * KIB - 256 * KIB
        verify(swapper, contents)
        swapper.perform_swapping()
        verify(swapper, contents)
    assert swapper.perform_swapping() == 16
    assert trouble(swapper) is None
    assert in_memory(swapper) == []
    verify(swapper, contents)


def test_no_space_after_a_while(open_eager_swapper: Opener, small_disk: Path) -> None:
    """There is a swap file already, and it would have to grow."""
    swapper = open_eager_swapper(small_disk, max_swap_size="4MiB")
    contents = register(swapper, 6, 512 * KIB)
    assert swapper.perform_swapping() == 6
    swapper.max_swap_size = "1GiB"
    contents |= {"more": data(6 * MIB)}
    swapper.register_memory_block("more", 6 * MIB, data=contents["more"])
    with hog(small_disk, MIB):
        assert swapper.perform_swapping() == 0
        assert "No space left" in trouble(swapper)
        verify(swapper, contents)
    assert swapper.perform_swapping() == 7
    assert trouble(swapper) is None
    verify(swapper, contents)


FILE_SIZE = """
import os, resource, sys
import omnimem
MIB = 1 << 20
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
swapper = omnimem.AdvancedMemorySwapper(
    swap_threshold=0.0, host_limit="64MiB", max_swap_size="64MiB", io_backend=sys.argv[2],
    nvme_optimizer=omnimem.NVMeOptimizer("64KiB", sys.argv[1], allow_ram_file_system=True))
contents = {f"b{i}": os.urandom(MIB) for i in range(8)}
for name, content in contents.items():
    swapper.register_memory_block(name, MIB, data=content)
def verify():
    swapper.store.check()
    for name, content in contents.items():
        assert memoryview(swapper.blocks[name]) == content
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), hard))
print(swapper.perform_swapping(), swapper.get_status()["swap_trouble"])
verify()
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
print(swapper.perform_swapping(), swapper.get_status()["swap_trouble"])
verify()
swapper.cleanup()
"""


@pytest.mark.parametrize("limit", [1000, 3 * MIB])
def test_file_size_limit(tmp_path: Path, io_backend: str, limit: int) -> None:
    out = run_clean(FILE_SIZE, str(tmp_path), io_backend, str(limit)).splitlines()
    gone, why = out[0].split(" ", 1)
    assert int(gone) == limit // MIB
    assert "File too large" in why
    assert out[1] == "8 None"


def test_full_swap_area(open_eager_swapper: Opener) -> None:
    swapper = open_eager_swapper(max_swap_size="2MiB")
    contents = register(swapper, 8, 512 * KIB - 100)
    for _ in range(3):
        gone = swapper.perform_swapping()
        assert gone <= 4
        assert len(in_memory(swapper)) == 8 - gone
        assert "disk_limit" in trouble(swapper)
        verify(swapper, contents)
    swapper.max_swap_size = "16MiB"
    assert swapper.perform_swapping() == 8
    assert trouble(swapper) is None
    verify(swapper, contents)


# ---- the directory ----


def test_directory_removed(open_eager_swapper: Opener, tmp_path: Path) -> None:
    """The file has no name: it goes on working, and grows."""
    where = tmp_path / "deep" / "swap"
    swapper = open_eager_swapper(where)
    contents = register(swapper, 4, 512 * KIB)
    assert swapper.perform_swapping() == 4
    shutil.rmtree(tmp_path / "deep")
    verify(swapper, contents)
    contents |= {"more": data(3 * MIB)}
    swapper.register_memory_block("more", 3 * MIB, data=contents["more"])
    assert swapper.perform_swapping() == 5
    verify(swapper, contents)
    assert trouble(swapper) is None
    assert not where.exists()


def test_directory_removed_before_use(open_eager_swapper: Opener, tmp_path: Path) -> None:
    where = tmp_path / "swap"
    where.mkdir()
    swapper = open_eager_swapper(where)
    contents = register(swapper, 4, 512 * KIB)
    where.rmdir()
    assert swapper.perform_swapping() == 4  # it is made anew
    verify(swapper, contents)


@contextlib.contextmanager
def read_only(directory: Path) -> Iterator[None]:
    """For root too, whom no mode keeps out."""
    if os.geteuid() != 0:
        directory.chmod(0o500)
        try:
            yield
        finally:
            directory.chmod(0o700)
        return
    try:
        for options in (["--bind", str(directory)], ["-o", "remount,ro,bind"]):
            subprocess.run(
                ["mount", *options, str(directory)], check=True, capture_output=True, text=True
            )
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        subprocess.run(["umount", "-l", str(directory)], check=False, capture_output=True)
        pytest.skip(f"cannot make a directory read-only for root here: {error}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def test_directory_read_only_while_running(open_eager_swapper: Opener, tmp_path: Path) -> None:
    where = tmp_path / "swap"
    swapper = open_eager_swapper(where)
    contents = register(swapper, 4, 512 * KIB)
    assert swapper.perform_swapping() == 4
    with read_only(where):
        with pytest.raises(OSError):
            (where / "probe").touch()
        verify(swapper, contents)
        contents |= {"more": data(3 * MIB)}
        swapper.register_memory_block("more", 3 * MIB, data=contents["more"])
        assert swapper.perform_swapping() == 5
        verify(swapper, contents)


def test_directory_read_only_before_use(open_eager_swapper: Opener, tmp_path: Path) -> None:
    where = tmp_path / "swap"
    where.mkdir()
    swapper = open_eager_swapper(where)
    contents = register(swapper, 4, 512 * KIB)
    with read_only(where):
        assert swapper.perform_swapping() == 0
        why = trouble(swapper)
        assert why is not None
        assert str(where) in why
        assert "Read-only file system" in why or "Permission denied" in why
        verify(swapper, contents)
    assert swapper.perform_swapping() == 4
    assert trouble(swapper) is None
    verify(swapper, contents)


def test_directory_is_none(open_eager_swapper: Opener, tmp_path: Path) -> None:
    """A file lies where the directory should be made; another directory will do."""
    (tmp_path / "file").write_bytes(b"")
    swapper = open_eager_swapper(tmp_path / "file" / "swap")
    contents = register(swapper, 2, 512 * KIB)
    assert swapper.perform_swapping() == 0
    assert "Not a directory" in str(trouble(swapper))
    verify(swapper, contents)
    swapper.nvme_optimizer.swap_directory = tmp_path / "other"
    assert swapper.perform_swapping() == 2
    verify(swapper, contents)


# ---- errors of the disk ----


@pytest.mark.parametrize("nth", [1, 5, 11])
def test_write_error_midway(open_eager_swapper: Opener, nth: int) -> None:
    swapper = open_eager_swapper()
    contents = register(swapper, 12, 100 * KIB)
    _core._fault_arm("write", nth, True)
    gone = swapper.perform_swapping()
    assert gone < 12
    assert len(in_memory(swapper)) == 12 - gone
    assert "cannot write" in str(trouble(swapper))
    verify(swapper, contents)
    _core._fault_reset()
    assert swapper.perform_swapping() == 12
    assert trouble(swapper) is None
    verify(swapper, contents)


@pytest.mark.parametrize("nth", [1, 2])
def test_read_error_midway(open_eager_swapper: Opener, nth: int) -> None:
    """Of a block's two requests either fails, at an access, a view and a prefetch."""
    swapper = open_eager_swapper()
    contents = register(swapper, 4, 100 * KIB)
    assert swapper.perform_swapping() == 4
    uses: list[Callable[[str], object]] = [
        swapper.access_memory_block,
        lambda name: memoryview(swapper.blocks[name]),
        lambda name: swapper.prefetch([name]).wait(30),
    ]
    for name, use in zip(contents, uses, strict=False):
        _core._fault_arm("read", nth, True)
        with pytest.raises(omnimem.IOFailure, match=f"'{name}': cannot read") as caught:
            use(name)
        assert caught.value.errno == errno.EIO
        _core._fault_reset()
        assert swapper.blocks[name].is_swapped
        assert memoryview(swapper.blocks[name]) == contents[name]
    verify(swapper, contents)
    assert swapper.perform_swapping() == 4


@pytest.mark.parametrize("nth", range(1, 6))
@pytest.mark.parametrize("lasting", [False, True])
def test_short_transfers(open_eager_swapper: Opener, nth: int, lasting: bool) -> None:
    swapper = open_eager_swapper()
    contents = register(swapper, 6, 150 * KIB + 7)
    _core._fault_arm("short", nth, lasting)
    assert swapper.perform_swapping() == 6
    assert _core._fault_fired("short")
    assert trouble(swapper) is None
    _core._fault_arm("short", nth, lasting)
    verify(swapper, contents)
    assert _core._fault_fired("short")


# ---- the swap file, damaged ----


def swap_file(directory: Path) -> int:
    """A descriptor of the nameless file below a directory, opened anew for reading and writing."""
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            link = os.readlink(f"/proc/self/fd/{fd}")
            if link.startswith(f"{directory}/omnimem-") and ("#" in link or "(deleted)" in link):
                return os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    raise AssertionError(f"no swap file below {directory}")


def offset_of(block: omnimem.MemoryBlock) -> int:
    location = block.swap_location
    assert location is not None
    return int(location.removeprefix("swap file, byte "))


def mutate(rng: random.Random, image: bytes, at: int, size: int) -> tuple[int, bytes]:
    """Where to write what, in a block of `size` bytes at `at` or in its pages behind it."""
    kind = rng.randrange(6)
    start = at + rng.randrange((size + 4095) // 4096 * 4096)
    page = start // 4096 * 4096
    if kind == 0:  # a bit
        return start, bytes([image[start] ^ 1 << rng.randrange(8)])
    if kind == 1:  # a byte, maybe the same
        return start, rng.randbytes(1)
    if kind == 2:  # a run of noise
        return start, rng.randbytes(min(1 + rng.randrange(64), page + 4096 - start))
    if kind == 3:  # a sector that was never written
        return start // 512 * 512, bytes(512)
    if kind == 4:  # a page of another block, or the same
        other = rng.randrange(len(image) // 4096) * 4096
        return page, image[other : other + 4096]
    return at, image[at + 1 : at + size] + image[at : at + 1]  # all of it, one byte on


def test_mutations(open_eager_swapper: Opener, tmp_path: Path) -> None:
    """10,000 times: the right bytes or CorruptError, and nothing else."""
    rng = random.Random(20)
    blocks, rounds, size = 100, 100, 6000
    swapper = open_eager_swapper()
    swapper.store.group("swap", 0, "lru", False)  # nothing is fetched while the file is whole
    contents = register(swapper, blocks, size)
    assert swapper.perform_swapping() == blocks
    fd = swap_file(tmp_path / "swap")
    places = {name: offset_of(swapper.blocks[name]) for name in contents}
    image = os.pread(fd, blocks * 8192, 0)
    assert all(image[at : at + size] == contents[name] for name, at in places.items())
    refused = 0
    for _ in range(rounds):
        damaged = bytearray(image)
        for at in places.values():
            start, change = mutate(rng, image, at, size)
            damaged[start : start + len(change)] = change
        os.pwrite(fd, damaged, 0)
        spoiled = {n for n, at in places.items() if damaged[at : at + size] != contents[n]}
        seen = set()
        for name, content in contents.items():
            try:
                view = memoryview(swapper.blocks[name])
            except omnimem.CorruptError as error:
                seen.add(name)
                text = str(error)
            else:
                text = name
                assert view == content, name
                view.release()
            assert name in text
        assert seen == spoiled
        refused += len(seen)
        os.pwrite(fd, image, 0)
        assert swapper.perform_swapping() == blocks - len(spoiled)
        assert in_memory(swapper) == []
    os.close(fd)
    assert blocks * rounds // 2 < refused < blocks * rounds * 9 // 10
    verify(swapper, contents)


def test_exchanged_extents(open_eager_swapper: Opener, tmp_path: Path) -> None:
    swapper = open_eager_swapper()
    contents = register(swapper, 6, 100 * KIB)
    assert swapper.perform_swapping() == 6
    fd = swap_file(tmp_path / "swap")
    one, two = (offset_of(swapper.blocks[name]) for name in ("b1", "b4"))

    def exchange() -> None:
        first, second = (os.pread(fd, 100 * KIB, at) for at in (one, two))
        os.pwrite(fd, second, one)
        os.pwrite(fd, first, two)

    exchange()
    for name, content in contents.items():
        if name in ("b1", "b4"):
            with pytest.raises(omnimem.CorruptError, match=f"'{name}'.*differ"):
                swapper.access_memory_block(name)
            assert swapper.blocks[name].is_swapped
        else:
            assert memoryview(swapper.blocks[name]) == content
    swapper.store.check()
    exchange()
    os.close(fd)
    verify(swapper, contents)


# ---- the nth failure of every call ----


class Strip:
    """Leaves trailing zeros out."""

    def compress(self, plain: memoryview) -> bytes:
        return len(plain).to_bytes(8, "little") + bytes(plain).rstrip(b"\0")

    def decompress(self, packed: memoryview) -> bytes:
        return bytes(packed[8:]).ljust(int.from_bytes(packed[:8], "little"), b"\0")


def loose(seed: int) -> bytes:
    """Bytes that Strip makes shorter."""
    return data(SIZE // 2, seed).ljust(SIZE, b"\0")


def test_unregistered_while_it_is_encoded(open_eager_swapper: Opener) -> None:
    swapper = open_eager_swapper()

    class Forgetful(Strip):
        def compress(self, plain: memoryview) -> bytes:
            for name in [name for name, content in contents.items() if content == plain]:
                assert swapper.unregister_memory_block(name)
                del contents[name]
            return super().compress(plain)

    contents = {f"b{i}": loose(i) for i in range(3)}
    for name, content in contents.items():
        swapper.register_memory_block(name, SIZE, data=content)
    swapper.integrate_with_compression(Forgetful())
    assert swapper.perform_swapping() == 0
    assert list(swapper.blocks) == []
    swapper.register_memory_block("a", SIZE, data=loose(9))
    assert swapper.perform_swapping() == 1
    verify(swapper, {"a": loose(9)})


class World:
    """A swapper with blocks in every state, and what their bytes are."""

    def __init__(self, swapper: AdvancedMemorySwapper) -> None:
        self.swapper = swapper
        self.performed = False
        self.want: dict[str, bytes] = {}
        self.add("out", data(SIZE, 1))
        self.add("both", data(SIZE, 2))
        swapper.perform_swapping()
        self.add("encoded", loose(3))
        swapper.integrate_with_compression(Strip())
        swapper.perform_swapping()
        swapper._codec = None
        swapper.access_memory_block("both")
        self.add("in", data(SIZE, 4))
        self.add("taken", loose(5), take=True)
        swapper.register_memory_block("blank", SIZE)
        self.want["blank"] = bytes(SIZE)
        assert not self.swapper.blocks["out"].ptr
        assert not self.swapper.blocks["encoded"].ptr
        assert in_memory(self.swapper) == ["both", "in", "taken"]

    def add(self, name: str, content: bytes, take: bool = False) -> None:
        given = bytearray(content) if take else content
        self.swapper.register_memory_block(name, len(content), data=given, take=take)
        self.want[name] = content

    def verify(self) -> None:
        if self.performed and (left := in_memory(self.swapper)):
            assert trouble(self.swapper), left
        self.performed = False
        assert self.swapper.store.stats().leases == 0
        verify(self.swapper, self.want)


def register_copy(w: World) -> None:
    w.add("new", data(SIZE, 9))


def register_take(w: World) -> None:
    w.add("new", data(SIZE, 9), take=True)


def register_blank(w: World) -> None:
    w.swapper.register_memory_block("new", SIZE, pinned=True)
    w.want["new"] = bytes(SIZE)


def access(w: World) -> None:
    for name in ("in", "both"):
        assert w.swapper.access_memory_block(name) is not None
    assert w.swapper.access_memory_block("nobody") is None


def access_out(w: World) -> None:
    block = w.swapper.access_memory_block("out")
    assert block is not None
    assert block.ptr


def access_blank(w: World) -> None:
    block = w.swapper.access_memory_block("blank")
    assert block is not None
    assert block.ptr


def access_encoded(w: World) -> None:
    block = w.swapper.access_memory_block("encoded")
    assert block is not None
    assert block.ptr


def view_all(w: World) -> None:
    for name, content in w.want.items():
        assert memoryview(w.swapper.blocks[name]) == content, name


def write_all(w: World) -> None:
    for name in w.want:
        with memoryview(w.swapper.blocks[name]) as view:
            view[7] ^= 1
            w.want[name] = bytes(view)


def perform(w: World) -> None:
    w.swapper.perform_swapping()
    w.performed = True


def perform_encoded(w: World) -> None:
    w.swapper.integrate_with_compression(Strip())
    perform(w)


def prefetch(w: World) -> None:
    assert w.swapper.prefetch(["out", "in"]).wait(30)


def unregister(w: World) -> None:
    for name in ("out", "both", "encoded", "in", "taken", "blank"):
        if name in w.want:
            assert w.swapper.unregister_memory_block(name)
            del w.want[name]


def ask(w: World) -> None:
    assert w.swapper.get_status()["total_registered_blocks"] == len(w.want)
    assert w.swapper.analyze_access_patterns()
    assert w.swapper.get_access_pattern_priority("in") >= 0
    assert w.swapper.stats.total_swaps


OPERATIONS = (
    *(register_copy, register_take, register_blank, access, access_out, access_blank),
    *(access_encoded, view_all, write_all, perform, perform_encoded, prefetch, unregister, ask),
)


def attempt(operation: Callable[[World], None], world: World) -> str:
    """The error's text, "" when there was none."""
    try:
        operation(world)
    except (Error, MemoryError) as error:
        return str(error) or "an error without a text"
    return ""


@pytest.mark.soak
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("point", POINTS)
def test_nth_failure(
    open_eager_swapper: Opener, point: str, operation: Callable[[World], None]
) -> None:
    for nth in range(MOST):  # the 0th: it lasts
        world = World(open_eager_swapper())
        _core._fault_arm(point, max(nth, 1), nth == 0)
        failed = attempt(operation, world)
        fired = _core._fault_fired(point)
        _core._fault_reset()
        if failed and not fired:
            raise AssertionError(f"it failed, but not through the fault: {failed}")
        assert not (failed and nth and point in ("submit", "short")), "not tried again"
        assert failed != "an error without a text"
        world.verify()
        if failed:
            operation(world)
            world.verify()
        world.swapper.cleanup()
        if not fired:
            return
