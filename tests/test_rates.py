"""What is measured before a plan: real rates of real files, in little memory."""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from omnimem import Store, checkpoint, packed
from omnimem._plan_units import Tensor
from omnimem._rates import _read_rate, measure
from omnimem.config import StoreConfig

MIB = 1 << 20


def weights(nbytes: int, seed: int) -> bytes:
    """Gaussian bf16."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(nbytes // 2, dtype=np.float32) * 0.02).view(np.uint32)
    return (x >> 16).astype(np.uint16).tobytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rates")
    sizes = {f"layers.{i}.w": 2 * MIB for i in range(8)} | {"norm": 2000}
    ends = list(itertools.accumulate(sizes.values()))
    header = {
        name: {"dtype": "BF16", "shape": [nbytes // 2], "data_offsets": [end - nbytes, end]}
        for (name, nbytes), end in zip(sizes.items(), ends, strict=True)
    }
    text = json.dumps(header).encode()
    data = b"".join(weights(nbytes, seed) for seed, nbytes in enumerate(sizes.values()))
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    return folder


def tensors_of(folder: Path) -> list[Tensor]:
    with checkpoint.open(folder) as files:
        infos = [(name, files.info(name)) for name in files.names()]
    return [Tensor(n, i.file, i.offset, i.nbytes, i.encoded_nbytes) for n, i in infos]


def compute(store: Store, names: Sequence[str], dtype: str) -> float:
    assert isinstance(store.config, StoreConfig)
    assert dtype == "bfloat16"
    sizes = {store.info(name).nbytes for name in names}
    assert len(sizes) == 1
    assert sizes.pop() >= 2 * MIB
    return 123e9


def test_the_disk_is_measured_on_many_bytes_however_small_the_tensors(folder: Path) -> None:
    first = tensors_of(folder)[0]
    small = [Tensor(str(i), first.file, first.offset + i * 4096, 4096, None) for i in range(256)]
    with Store(StoreConfig(host_limit="16MiB", disk_limit=0)) as store:
        assert _read_rate(store, small, MIB // 2) > 0
        assert MIB // 2 <= store.stats().read_bytes <= MIB


@pytest.mark.parametrize("form", ["plain", "fast", "balanced"])
@pytest.mark.parametrize("memory", [64 * MIB, MIB])
def test_rates(folder: Path, tmp_path: Path, form: str, memory: int, io_backend: str) -> None:
    place = folder
    if form != "plain":
        place = tmp_path / "packed"
        packed.pack(folder, place, form)
    tensors = tensors_of(place)
    rates = measure(
        tensors,
        ["bfloat16"] * len(tensors),
        ["fast"],
        compute,
        memory_bytes=memory,
        io_backend=io_backend,
    )
    assert rates.encoded_as == (None if form == "plain" else form)
    assert set(rates.decode) == set(rates.share) == {"fast"} | ({form} - {"plain"})
    assert rates.compute == 123e9
    assert rates.read > 0
    for coding, share in rates.share.items():
        assert 0.6 < share < 0.75
        assert rates.decode[coding] > 0
