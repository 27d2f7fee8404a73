"""The pressure monitor: levels from real and written numbers, thresholds, the trend."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest

import omnimem
from omnimem import MemoryPressureLevel, MemoryPressureMonitor, _core

CGROUPS = Path("/sys/fs/cgroup/memory")
GIB = 1 << 30


def with_memory(monkeypatch: pytest.MonkeyPatch, *usages: float) -> None:
    numbers = iter(usages)
    monkeypatch.setattr(
        _core, "memory", lambda: (GIB, GIB - int(next(numbers) * GIB), "system"), raising=True
    )


def test_real_numbers() -> None:
    level, usage = MemoryPressureMonitor().get_ram_pressure()
    assert isinstance(level, MemoryPressureLevel)
    assert 0.0 < usage < 1.0
    total, available, source = _core.memory()
    assert available <= total <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert source == "system" or source.startswith("cgroup /")


def with_gpus(monkeypatch: pytest.MonkeyPatch, *free: int, started: bool = True) -> None:
    """A torch that sees GPUs of 1 GiB with so much free."""
    cuda = types.SimpleNamespace(
        is_initialized=lambda: started,
        device_count=lambda: len(free),
        mem_get_info=lambda device: (free[device], GIB),
    )
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda))


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = MemoryPressureMonitor()
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert monitor.get_gpu_pressure() == (MemoryPressureLevel.LOW, 0.0)
    with_gpus(monkeypatch, 0, started=False)
    assert monitor.get_gpu_pressure() == (MemoryPressureLevel.LOW, 0.0)
    with_gpus(monkeypatch, GIB // 2, GIB // 8)
    assert monitor.get_gpu_pressure() == (MemoryPressureLevel.HIGH, 0.875)
    with_memory(monkeypatch, 0.5)
    assert monitor.get_overall_pressure() == (MemoryPressureLevel.HIGH, 0.875)


def test_levels_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    with_memory(monkeypatch, 0.2, 0.75, 0.88, 0.97, 0.81, 0.2)
    monitor = MemoryPressureMonitor()
    levels = [monitor.get_ram_pressure()[0].value for _ in range(6)]
    assert levels == ["low", "medium", "high", "critical", "high", "low"]


def test_thresholds_take_effect_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with_memory(monkeypatch, 0.65, 0.65, 0.65)
    monitor = MemoryPressureMonitor()
    assert monitor.ram_thresholds == (0.7, 0.85, 0.95)
    assert monitor.get_ram_pressure()[0] is MemoryPressureLevel.LOW
    monitor.ram_thresholds = (0.6, 0.8, 0.9)
    assert monitor.ram_thresholds == (0.6, 0.8, 0.9)
    assert monitor.gpu_thresholds == (0.7, 0.85, 0.95)
    assert monitor.get_ram_pressure()[0] is MemoryPressureLevel.MEDIUM
    assert monitor.get_overall_pressure() == (
        MemoryPressureLevel.MEDIUM,
        pytest.approx(0.65, abs=1e-6),
    )


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ((0.6, 0.8), ValueError),
        ((0.6, 0.8, 0.9, 0.95), ValueError),
        ((0.8, 0.6, 0.9), ValueError),
        ((0.6, 0.6, 0.9), ValueError),
        ((0.0, 0.6, 0.9), ValueError),
        ((0.6, 0.8, 1.5), ValueError),
        ((float("nan"), 0.8, 0.9), ValueError),
        (("a", 0.8, 0.9), TypeError),
        (0.5, TypeError),
    ],
)
def test_wrong_thresholds(value: Any, error: type[Exception]) -> None:
    monitor = MemoryPressureMonitor()
    with pytest.raises(error):
        monitor.ram_thresholds = value
    with pytest.raises(error):
        monitor.gpu_thresholds = value
    with pytest.raises(error):
        MemoryPressureMonitor(value)
    assert monitor.ram_thresholds == monitor.gpu_thresholds == (0.7, 0.85, 0.95)


def test_trend(monkeypatch: pytest.MonkeyPatch) -> None:
    with_memory(monkeypatch, 0.2, 0.4, 0.6, 0.6)
    monitor = MemoryPressureMonitor()
    assert monitor.get_pressure_trend() == "stable"
    for _ in range(3):
        monitor.get_ram_pressure()
    assert monitor.get_pressure_trend() == "increasing"


def test_threads() -> None:
    monitor = MemoryPressureMonitor()

    def ask() -> None:
        for _ in range(300):
            monitor.get_overall_pressure()
            monitor.ram_thresholds = (0.5, 0.6, 0.7)
            monitor.get_pressure_trend()

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert monitor.ram_thresholds == (0.5, 0.6, 0.7)


def test_unbuilt() -> None:
    empty = _core.Pressure.__new__(_core.Pressure)
    with pytest.raises(RuntimeError):
        empty.feed(0.5)
    with pytest.raises(RuntimeError):
        _ = empty.thresholds
    with pytest.raises(OSError, match="meminfo"):
        _core.memory("/nowhere")


@pytest.mark.skipif(
    not os.access(CGROUPS / "memory.limit_in_bytes", os.W_OK), reason="no cgroup v1 to write"
)
def test_in_a_real_cgroup() -> None:
    """A process that fills its cgroup is told, however much the machine has."""
    group = CGROUPS / f"omnimem-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(256 << 20))
        code = (
            "import omnimem\n"
            "m = omnimem.MemoryPressureMonitor()\n"
            "print(m.get_ram_pressure()[0].value)\n"
            "held = bytearray(b'x') * (212 << 20)\n"
            "print(m.get_ram_pressure()[0].value, omnimem._core.memory()[2])\n"
        )
        enter = f'echo $$ > "{group}/cgroup.procs" && exec "$@"'
        done = subprocess.run(
            ["/bin/sh", "-c", enter, "sh", sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        before, after = done.stdout.splitlines()
        assert before == "low"
        level, source = after.split(" ", 1)
        assert level in ("high", "critical")
        assert source == f"cgroup {group}"
    finally:
        group.rmdir()


def test_public_names() -> None:
    assert {"MemoryPressureLevel", "MemoryPressureMonitor"} <= set(omnimem.__all__)
    assert [level.value for level in MemoryPressureLevel] == ["low", "medium", "high", "critical"]
