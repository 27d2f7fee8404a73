"""What a directory lies on: written /sys and /proc trees, real directories, the probe's rules."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import omnimem
from omnimem import _storage
from omnimem._storage import free_bytes, ram_file_system, storage_kind


class Kernel:
    """A /sys and /proc of one's own, and a directory `place` that its disks hold."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root / "kernel"
        self.place = root / "place"
        self.place.mkdir()
        for folder in ("sys/dev/block", "sys/class/block", "dev", "proc/self"):
            (self.root / folder).mkdir(parents=True)
        self.number = (8, 1)
        self.lines: list[str] = []
        monkeypatch.setattr(_storage, "_device_of", lambda _: self.number)

    def disk(self, name: str, number: str, flag: str = "0", under: Path | None = None) -> Path:
        """A disk, or a partition of the disk `under`."""
        folder = (under or self.root / "sys/devices") / name
        folder.mkdir(parents=True)
        if under:
            (folder / "partition").write_text("1\n")
        else:
            (folder / "queue").mkdir()
            (folder / "queue/rotational").write_text(f"{flag}\n")
        (self.root / "sys/dev/block" / number).symlink_to(folder)
        (self.root / "sys/class/block" / name).symlink_to(folder)
        return folder

    def mapped(self, name: str, number: str, *slaves: Path, flag: str = "0") -> Path:
        folder = self.disk(name, number, flag)
        (folder / "slaves").mkdir()
        for slave in slaves:
            (folder / "slaves" / slave.name).symlink_to(slave)
        return folder

    def mount(self, point: Path | str, kind: str, source: str = "none", options: str = "") -> None:
        blanks = str(point).replace(" ", "\\040")
        tail = f"{kind} {source} rw{options}"
        self.lines.append(f"30 1 0:40 / {blanks} rw,relatime shared:1 - {tail}\n")
        (self.root / "proc/self/mountinfo").write_text("".join(self.lines))

    def kind(self, gbps: float | Exception, monkeypatch: pytest.MonkeyPatch) -> tuple[str, object]:
        def probe(place: Path) -> float:
            assert place == self.place
            if isinstance(gbps, Exception):
                raise gbps
            return gbps

        monkeypatch.setattr(_storage, "_probe", probe)
        found = storage_kind(self.place, str(self.root))
        assert found.read_gbps == (0.0 if isinstance(gbps, Exception) else gbps)
        assert found.reason
        return found.kind, found.rotational


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("flag", "gbps", "kind", "rotational"),
    [
        ("1", 0.15, "hdd", True),
        ("1", 0.45, "ssd", True),  # a virtual disk: nothing that spins is as fast
        ("1", 2.5, "nvme", True),
        ("0", 0.15, "ssd", False),
        ("0", 0.5, "ssd", False),
        ("0", 0.7, "nvme", False),
        ("", 0.15, "hdd", None),
        ("", 0.5, "ssd", None),
        ("", 3.0, "nvme", None),
    ],
)
def test_flag_and_probe(
    kernel: Kernel,
    monkeypatch: pytest.MonkeyPatch,
    flag: str,
    gbps: float,
    kind: str,
    rotational: bool | None,
) -> None:
    kernel.disk("sda1", "8:1", under=kernel.disk("sda", "8:0", flag))
    assert kernel.kind(gbps, monkeypatch) == (kind, rotational)


def test_nvme_by_name_needs_no_rate(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel.number = (259, 2)
    kernel.disk("nvme0n1p2", "259:2", under=kernel.disk("nvme0n1", "259:0"))
    assert kernel.kind(0.1, monkeypatch) == ("nvme", False)
    assert kernel.kind(OSError(28, "full"), monkeypatch) == ("nvme", False)


@pytest.mark.parametrize(("flag", "kind"), [("0", "ssd"), ("1", "hdd")], ids=["flash", "spinning"])
def test_the_flag_decides_where_the_probe_fails(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, flag: str, kind: str
) -> None:
    kernel.disk("sda1", "8:1", under=kernel.disk("sda", "8:0", flag))
    assert kernel.kind(omnimem.DiskFullError("no room"), monkeypatch)[0] == kind
    assert "no room" in storage_kind(kernel.place, str(kernel.root)).reason


def test_mapped_devices_are_what_lies_below(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel.number = (253, 1)
    first = kernel.disk("nvme0n1", "259:0")
    second = kernel.disk("nvme1n1", "259:1")
    md = kernel.mapped("md0", "9:0", kernel.disk("nvme0n1p1", "259:3", under=first), second)
    kernel.mapped("dm-1", "253:1", md)
    assert kernel.kind(0.1, monkeypatch) == ("nvme", False)

    kernel.number = (253, 2)
    kernel.mapped("dm-2", "253:2", first, kernel.disk("sda", "8:0", "1"))
    assert kernel.kind(0.1, monkeypatch) == ("hdd", True)


def test_anonymous_numbers_ask_the_mount(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel.number = (0, 40)
    assert kernel.kind(0.1, monkeypatch) == ("hdd", None)  # no mountinfo at all
    kernel.disk("dm-0", "253:0", "1")
    (kernel.root / "dev/mapper").mkdir()
    (kernel.root / "dev/dm-0").touch()
    (kernel.root / "dev/mapper/home").symlink_to("../dm-0")
    kernel.mount("/", "btrfs", "/dev/mapper/other")
    kernel.mount(kernel.place, "btrfs", "/dev/mapper/home")
    assert kernel.kind(0.1, monkeypatch) == ("hdd", True)
    kernel.mount(kernel.place, "nfs4", "server:/export")  # on top of it
    assert kernel.kind(0.4, monkeypatch) == ("ssd", None)


def test_an_overlay_is_what_its_upper_directory_is(kernel: Kernel, tmp_path: Path) -> None:
    upper = tmp_path / "upper"
    kernel.mount(kernel.place, "overlay", "overlay", f",lowerdir=/a:/b,upperdir={upper}")
    assert ram_file_system(kernel.place, str(kernel.root)) is None
    upper.mkdir()
    kernel.mount(upper, "tmpfs", "tmpfs")
    assert ram_file_system(kernel.place, str(kernel.root)) == "tmpfs"


def test_ram_file_systems(kernel: Kernel) -> None:
    def found(place: Path) -> str | None:
        return ram_file_system(place, str(kernel.root))

    kernel.mount("/", "ext4", "/dev/sda1")
    assert found(kernel.place / "not" / "there") is None
    blank = kernel.place / "a b"
    blank.mkdir()
    kernel.mount(blank, "ramfs")
    assert found(blank) == found(blank / "not" / "there") == "ramfs"
    (kernel.place / "a b c").mkdir()
    assert found(kernel.place / "a b c") is None  # a name that begins alike is not inside
    (kernel.place / "link").symlink_to(blank)
    assert found(kernel.place / "link" / "x") == "ramfs"
    kernel.mount(blank, "xfs", "/dev/sdb1")
    assert found(blank) is None


def test_a_mountinfo_that_says_nothing(kernel: Kernel) -> None:
    assert ram_file_system(kernel.place, str(kernel.root)) is None
    (kernel.root / "proc/self/mountinfo").write_text("\nnonsense\n1 2 - ext4\n")
    assert ram_file_system(kernel.place, str(kernel.root)) is None


def test_real_memory_and_disk(tmp_path: Path) -> None:
    if ram_file_system("/dev/shm") is None:
        pytest.skip("no tmpfs at /dev/shm")
    assert ram_file_system("/dev/shm/not/there") == "tmpfs"
    assert ram_file_system("/proc") is None


def test_the_real_probe(tmp_path: Path) -> None:
    found = storage_kind(tmp_path / "not" / "there")
    assert found.kind in ("nvme", "ssd", "hdd")
    assert found.read_gbps > 0 or "the probe failed" in found.reason
    assert list(tmp_path.iterdir()) == []  # it leaves nothing behind
    with pytest.raises(AttributeError):
        found.kind = "hdd"  # type: ignore[misc]


def test_a_directory_that_takes_no_file() -> None:
    found = storage_kind("/proc/self")
    assert (found.kind, found.rotational, found.read_gbps) == ("hdd", None, 0.0)
    assert "the probe failed" in found.reason


def test_a_slow_disk_ends_the_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    added: list[int] = []

    class Watched(omnimem.Store):
        def add(self, name: str, data: bytes) -> None:
            added.append(len(data))
            super().add(name, data)

    monkeypatch.setattr(_storage, "Store", Watched)
    monkeypatch.setattr(_storage, "PROBE_SECONDS", 0.0)
    assert storage_kind(tmp_path).read_gbps > 0
    assert added == [1 << 20]
    monkeypatch.setattr(_storage, "PROBE_SECONDS", 600.0)
    storage_kind(tmp_path)
    assert sum(added[1:]) == 32 << 20


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise omnimem.DiskFullError(28, "no room for it")

    monkeypatch.setattr(omnimem.Store, "add", full)
    assert "no room for it" in storage_kind(tmp_path).reason


def test_files_that_only_the_page_cache_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = _storage.fcntl.fcntl

    def refuse(file: object, command: int, value: int = 0) -> int:
        if value & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(file, command, value)  # type: ignore[call-overload,no-any-return]

    monkeypatch.setattr(_storage.fcntl, "fcntl", refuse)
    found = storage_kind(tmp_path)
    assert found.read_gbps == 0.0
    assert "O_DIRECT" in found.reason


def test_free_bytes(tmp_path: Path) -> None:
    state = os.statvfs(tmp_path)
    assert 0 < free_bytes(tmp_path / "not" / "there") <= state.f_blocks * state.f_frsize
    with pytest.raises(TypeError):
        free_bytes(None)  # type: ignore[arg-type]


def test_the_default_directory_is_no_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/shm")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _storage.default_directory() == f"{tmp_path}/.cache/omnimem"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _storage.default_directory() == f"{tmp_path}/omnimem"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/dev/shm")
    assert _storage.default_directory() == "/var/tmp"
