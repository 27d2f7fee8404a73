"""Settings: defaults, checks, files, variables, who wins, and what errors say."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import omnimem
from omnimem import (
    AdvancedMemoryConfig,
    CacheConfig,
    MemoryConfig,
    MonitorConfig,
    OffloadConfig,
    StoreConfig,
)
from omnimem.advanced_config import MIRRORS, PARTS
from omnimem.cli import main
from omnimem.config import format_share

GIB = 1 << 30


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of whoever runs the tests are not those of the tests."""
    for cls in (AdvancedMemoryConfig, StoreConfig, *PARTS.values()):
        for field in dataclasses.fields(cls):  # type: ignore[arg-type]
            monkeypatch.delenv(cls.variable(field.name), raising=False)


@pytest.fixture
def toml(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "a folder" / "omnimem.toml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return path

    return write


# ---- defaults and checks ----


def test_defaults_are_those_of_the_document() -> None:
    config = AdvancedMemoryConfig()
    assert config.enable_memory_pools
    assert config.pool_sizes == {"cpu": 8 * GIB, "cuda": 16 * GIB}
    assert config.enable_weight_cache
    assert config.cache_size_gb == 4.0
    assert not config.cache_compression
    assert config.enable_auto_offload
    assert (config.offload_threshold, config.restore_threshold) == (0.8, 0.6)
    assert config.enable_monitoring
    assert config.monitoring_interval == 1.0
    assert config.alert_thresholds == {"warning": 0.75, "critical": 0.9}
    assert config.budget is None
    assert config.memory == MemoryConfig()
    assert config.cache == CacheConfig()
    assert config.offload == OffloadConfig()
    assert config.monitor == MonitorConfig()


def test_flat_fields_make_the_parts() -> None:
    config = AdvancedMemoryConfig(
        pool_sizes={"cpu": "1GiB"},
        cache_size_gb=2,
        cache_compression=True,
        offload_threshold=0.9,
        monitoring_interval=0.5,
        budget="2GiB",
    )
    assert config.memory.pool_sizes == {"cpu": GIB} == config.pool_sizes
    assert config.cache.max_size == 2 * GIB
    assert config.cache.enable_compression
    assert config.offload == OffloadConfig(offload_threshold=0.9)
    assert config.monitor.monitoring_interval == 0.5
    assert config.budget == 2 * GIB


def test_parts_show_in_the_flat_fields() -> None:
    config = AdvancedMemoryConfig(
        offload=OffloadConfig(restore_threshold=0.3), cache=CacheConfig(compression="fast")
    )
    assert config.restore_threshold == 0.3
    assert config.cache_compression
    for flat, (part, field) in MIRRORS.items():
        assert getattr(config, flat) == getattr(getattr(config, part), field)


def test_a_flat_field_may_repeat_its_part() -> None:
    part = MemoryConfig(pool_sizes={"cpu": GIB})
    assert AdvancedMemoryConfig(pool_sizes={"cpu": "1GiB"}, memory=part).memory is part
    with pytest.raises(ValueError, match=r"offload_threshold=0\.9 .*offload_threshold=0\.8"):
        AdvancedMemoryConfig(offload_threshold=0.9, offload=OffloadConfig())


@pytest.mark.parametrize(
    ("cls", "fields", "said"),
    [
        (OffloadConfig, {"offload_threshold": 0.5}, ["restore_threshold=0.6", "threshold=0.5"]),
        (OffloadConfig, {"restore_threshold": 0.8}, ["restore_threshold=0.8", "threshold=0.8"]),
        (OffloadConfig, {"offload_threshold": 1.1}, ["offload_threshold=1.1"]),
        (OffloadConfig, {"restore_threshold": 0.0}, ["restore_threshold=0.0"]),
        (OffloadConfig, {"offload_threshold": float("nan")}, ["offload_threshold=nan"]),
        (OffloadConfig, {"min_offload_interval": -1}, ["min_offload_interval=-1"]),
        (OffloadConfig, {"usage_window": 0}, ["usage_window=0"]),
        (MonitorConfig, {"monitoring_interval": 0.0}, ["monitoring_interval=0.0"]),
        (MonitorConfig, {"monitoring_interval": float("inf")}, ["monitoring_interval=inf"]),
        (MonitorConfig, {"history_size": 0}, ["history_size=0"]),
        (MonitorConfig, {"alert_thresholds": {"warning": 0.5}}, ["'critical'"]),
        (
            MonitorConfig,
            {"alert_thresholds": {"warning": 0.9, "critical": 0.8}},
            ["warning=0.9", "critical=0.8"],
        ),
        (MonitorConfig, {"alert_thresholds": {"warning": 0.5, "critical": 2}}, ["critical", "2"]),
        (AdvancedMemoryConfig, {"budget": 4096}, ["budget=4096", "1048576"]),
        (AdvancedMemoryConfig, {"cache_size_gb": -1}, ["cache_size_gb=-1"]),
        (AdvancedMemoryConfig, {"restore_threshold": 0.9}, ["restore_threshold=0.9", "=0.8"]),
    ],
)
def test_wrong_values(cls: Any, fields: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        cls(**fields)
    for text in said:
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("cls", "fields"),
    [
        (OffloadConfig, {"enable_auto_offload": 1}),
        (OffloadConfig, {"offload_threshold": "0.8"}),
        (MonitorConfig, {"enable_monitoring": None}),
        (MonitorConfig, {"monitoring_interval": "1"}),
        (AdvancedMemoryConfig, {"enable_weight_cache": "yes"}),
        (AdvancedMemoryConfig, {"offload": MonitorConfig()}),
        (AdvancedMemoryConfig, {"budget": 1.5}),
    ],
)
def test_wrong_types(cls: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=next(iter(fields))):
        cls(**fields)


@pytest.mark.parametrize("cls", [AdvancedMemoryConfig, *PARTS.values(), StoreConfig])
def test_frozen_and_copied(cls: Any) -> None:
    config = cls()
    field = dataclasses.fields(config)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, field, None)
    assert pickle.loads(pickle.dumps(config)) == config == copy.deepcopy(config)


def test_tables_are_read_only() -> None:
    shares = {"warning": 0.5, "critical": 0.6}
    config = AdvancedMemoryConfig(alert_thresholds=shares)
    shares["warning"] = 0.1
    assert config.monitor.alert_thresholds["warning"] == 0.5
    with pytest.raises(TypeError):
        config.alert_thresholds["warning"] = 0.1  # type: ignore[index]


# ---- variables ----


def test_from_env(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {
        "OFFLOAD_THRESHOLD": "0.5",
        "RESTORE_THRESHOLD": "0.4",
        "POOL_SIZES": "cpu=8GiB, cuda=1GiB",
        "ALERT_THRESHOLDS": "warning=0.7,critical=0.8",
        "ENABLE_MONITORING": "off",
        "HISTORY_SIZE": "7",
        "CACHE_SIZE_GB": "0.5",
        "CACHE_COMPRESSION": "yes",
        "CACHE_POLICY": "clock",
        "BUDGET": "3GiB",
    }.items():
        monkeypatch.setenv(f"OMNIMEM_{name}", text)
    config = AdvancedMemoryConfig.from_env()
    assert (config.offload_threshold, config.restore_threshold) == (0.5, 0.4)
    assert config.pool_sizes == {"cpu": 8 * GIB, "cuda": GIB}
    assert config.monitor == MonitorConfig(
        enable_monitoring=False,
        history_size=7,
        alert_thresholds={"warning": 0.7, "critical": 0.8},
    )
    assert config.cache == CacheConfig(max_size_gb=0.5, enable_compression=True, policy="clock")
    assert config.budget == 3 * GIB
    assert OffloadConfig.from_env() == config.offload
    assert CacheConfig.from_env() == config.cache
    assert MemoryConfig.from_env() == config.memory
    assert MonitorConfig.from_env() == config.monitor


def test_every_setting_has_a_variable_of_its_own() -> None:
    names = [
        cls.variable(field.name)
        for cls in (StoreConfig, *PARTS.values())
        for field in dataclasses.fields(cls)  # type: ignore[arg-type]
    ]
    names += [AdvancedMemoryConfig.variable(name) for name in ("budget", "enable_weight_cache")]
    assert len(names) == len(set(names))


def test_overrides_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNIMEM_OFFLOAD_THRESHOLD", "0.9")
    monkeypatch.setenv("OMNIMEM_USAGE_WINDOW", "5")
    config = AdvancedMemoryConfig.from_env(offload_threshold=0.7)
    assert (config.offload_threshold, config.offload.usage_window) == (0.7, 5)
    assert AdvancedMemoryConfig.from_env(offload=OffloadConfig()).offload == OffloadConfig()
    assert OffloadConfig.from_env(offload_threshold=0.7).offload_threshold == 0.7
    with pytest.raises(ValueError, match=r"^offload_threshold=0\.8 differs"):
        AdvancedMemoryConfig.from_env(offload_threshold=0.8, offload=OffloadConfig.from_env())


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("OMNIMEM_OFFLOAD_THRESHOLD", "a lot"),
        ("OMNIMEM_OFFLOAD_THRESHOLD", "0.5"),
        ("OMNIMEM_OFFLOAD_THRESHOLD", "7"),
        ("OMNIMEM_ENABLE_AUTO_OFFLOAD", "perhaps"),
        ("OMNIMEM_HISTORY_SIZE", "1.5"),
        ("OMNIMEM_POOL_SIZES", "8GiB"),
        ("OMNIMEM_POOL_SIZES", "cpu=1GiB,cpu=2GiB"),
        ("OMNIMEM_POOL_SIZES", "tpu=1GiB"),
        ("OMNIMEM_ALERT_THRESHOLDS", "warning=0.5"),
        ("OMNIMEM_ALERT_THRESHOLDS", "warning=low,critical=high"),
        ("OMNIMEM_BUDGET", "huge"),
        ("OMNIMEM_CACHE_POLICY", "random"),
    ],
)
def test_errors_name_the_variable(
    variable: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, text)
    with pytest.raises(ValueError) as caught:
        AdvancedMemoryConfig.from_env()
    assert f"{variable}={text!r}" in str(caught.value)


# ---- files ----


def test_from_file(toml: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = toml(
        """
budget = "2GiB"
offload_threshold = 0.7
pool_sizes = { cpu = "1GiB" }
enable_weight_cache = false
[cache]
policy = "adaptive"
[offload]
usage_window = 60
min_offload_interval = 3.5
"""
    )
    config = AdvancedMemoryConfig.from_file(path)
    assert config.budget == 2 * GIB
    assert config.pool_sizes == {"cpu": GIB}
    assert not config.enable_weight_cache
    assert config.cache.policy == "adaptive"
    assert config.offload == OffloadConfig(
        offload_threshold=0.7, usage_window=60, min_offload_interval=3.5
    )
    monkeypatch.setenv("OMNIMEM_USAGE_WINDOW", "61")
    monkeypatch.setenv("OMNIMEM_MIN_OFFLOAD_INTERVAL", "4.5")
    config = AdvancedMemoryConfig.from_file(path, restore_threshold=0.2)
    assert config.offload == OffloadConfig(
        offload_threshold=0.7, restore_threshold=0.2, usage_window=61, min_offload_interval=4.5
    )


def test_the_environment_mends_a_file(
    toml: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = toml("offload_threshold = 0.5")
    with pytest.raises(ValueError, match=r"omnimem\.toml: offload_threshold=0\.5: restore"):
        AdvancedMemoryConfig.from_file(path)
    monkeypatch.setenv("OMNIMEM_RESTORE_THRESHOLD", "0.4")
    assert AdvancedMemoryConfig.from_file(path).restore_threshold == 0.4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ofload_threshold = 0.7", ["'ofload_threshold'", "'offload_threshold'"]),
        ("[offload]\nusage_windows = 3", ["[offload]", "'usage_windows'", "'usage_window'"]),
        ("[monitors]\nhistory_size = 3", ["'monitors'", "'monitor'"]),
        ("qqqq = 1", ["'qqqq'", "budget"]),
        ("offload = 3", ["offload=3", "[offload]"]),
        ("[cache]\npolicy = 'random'", ["cache.policy='random'", "one of"]),
        ("budget = 'huge'", ["budget='huge'"]),
        ("cache_size_gb = 'big'", ["cache_size_gb='big'", "max_size_gb"]),
        (
            "offload_threshold = 0.7\n[offload]\noffload_threshold = 0.8",
            ["offload.offload_threshold=0.8", "offload_threshold=0.7"],
        ),
        ("offload_threshold 0.7", ["no TOML"]),
    ],
)
def test_errors_name_the_file_and_the_key(
    text: str, said: list[str], toml: Callable[[str], Path]
) -> None:
    path = toml(text)
    with pytest.raises(ValueError) as caught:
        AdvancedMemoryConfig.from_file(path)
    for part in (str(path), *said):
        assert part in str(caught.value)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        AdvancedMemoryConfig.from_file(tmp_path / "none.toml")


# ---- omnimem config ----


def test_command_tells_the_sources(
    toml: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = toml("offload_threshold = 0.7\n[memory]\npool_sizes = { cpu = '1GiB' }")
    monkeypatch.setenv("OMNIMEM_USAGE_WINDOW", "60")
    monkeypatch.setenv("OMNIMEM_VERIFY", "first")
    assert main(["config", "--file", str(path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["offload.offload_threshold"] == {
        "value": 0.7,
        "source": f"file {path}",
        "variable": "OMNIMEM_OFFLOAD_THRESHOLD",
    }
    assert told["memory.pool_sizes"]["value"] == {"cpu": GIB}
    assert told["offload.usage_window"]["value"] == 60.0
    assert told["offload.usage_window"]["source"] == "environment variable OMNIMEM_USAGE_WINDOW"
    assert told["store.verify"]["source"] == "environment variable OMNIMEM_VERIFY"
    assert told["budget"] == {"value": None, "source": "default", "variable": "OMNIMEM_BUDGET"}
    fields = sum(len(dataclasses.fields(part)) for part in (StoreConfig, *PARTS.values()))  # type: ignore[arg-type]
    assert len(told) == fields + 2

    assert main(["config", "--file", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(told)
    [line] = [line for line in lines if line.startswith("memory.pool_sizes ")]
    assert "cpu=1.00 GiB" in line
    assert line.endswith(f"  file {path}")


def test_command_tells_what_is_wrong(
    toml: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = toml("offload_treshold = 0.7")
    assert main(["config", "--file", str(path)]) == 1
    assert "did you mean 'offload_threshold'?" in capsys.readouterr().err


def test_names() -> None:
    for name in ("AdvancedMemoryConfig", "MonitorConfig", "OffloadConfig"):
        assert name in omnimem.__all__


@pytest.mark.parametrize(
    ("share", "decimals", "text"), [(0.0321, 1, "3.2 %"), (1, 1, "100.0 %"), (0.0321, 0, "3 %")]
)
def test_a_share_for_people(share: float, decimals: int, text: str) -> None:
    assert format_share(share, decimals) == text
