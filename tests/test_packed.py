"""omnimem.packed: what was packed comes back byte for byte, reads the same, no damage passes."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import omnimem
from omnimem import _core, _output, _packed_header, checkpoint, packed
from omnimem._safetensors import DTYPES, HEADER_CAP
from omnimem.errors import CorruptError, DiskFullError, Error, FormatError

from .conftest import PACKAGE_DIR

Tensor = tuple[str, str, list[int]]  # name, dtype, shape


def nbytes_of(dtype: str, shape: list[int]) -> int:
    return int(np.prod(shape, dtype=np.int64)) * DTYPES[dtype][1] // 8


def values(nbytes: int, seed: int) -> bytes:
    """Bytes of bfloat16 weights, the last perhaps in part."""
    drawn = np.random.default_rng(seed).normal(0, 0.02, nbytes // 2 + 1).astype(np.float32)
    return (drawn.view(np.uint32) >> 16).astype(np.uint16).tobytes()[:nbytes]


def lay_out(tensors: list[Tensor], **metadata: str) -> dict[str, Any]:
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name, dtype, shape in tensors:
        end = at + nbytes_of(dtype, shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    return header


def write(path: Path, header: dict[str, Any] | str, seed: int = 0) -> Path:
    """Write a file of weights under a header, given as it is to be in the file or to be dumped."""
    raw = (header if isinstance(header, str) else json.dumps(header)).encode()
    entries = json.loads(raw)
    ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + values(max(ends, default=0), seed))
    return path


WEIGHTS: list[Tensor] = [
    ("norm.weight", "BF16", [64]),
    ("layer.weight", "BF16", [300, 500]),
    ("layer.bias", "F32", []),
    ("nothing", "F16", [0, 7]),
    ("big", "BF16", [3, 1000, 97]),
    ("odd", "U8", [12345]),
]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder of one file, a config and a folder below."""
    folder = tmp_path / "model"
    (folder / "more" / "still").mkdir(parents=True)
    write(folder / "model.safetensors", lay_out(WEIGHTS, format="pt"))
    (folder / "config.json").write_text("{}")
    (folder / "more" / "still" / "notes.txt").write_bytes(os.urandom(100))
    return folder


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A folder of three shards and an index; headers with odd whitespace, names and order."""
    folder = tmp_path / "sharded"
    (folder / "below").mkdir(parents=True)
    plain = json.dumps(lay_out(WEIGHTS[:3]))
    strange = lay_out([('ünï "quoted" \\ \u2028', "BF16", [5000]), ("b", "I64", [77])], a="\n\t")
    turned = {name: strange[name] for name in reversed(strange)}
    shards = {
        "m-1.safetensors": "{ \n" + plain[1:] + " " * 13,
        "below/m-2.safetensors": json.dumps(turned, ensure_ascii=False, indent=3),
        "m-3.safetensors": json.dumps(lay_out(WEIGHTS[3:])),
    }
    where = {}
    for seed, (name, header) in enumerate(shards.items()):
        write(folder / name, header, seed)
        where |= {tensor: name for tensor in json.loads(header) if tensor != "__metadata__"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "config.json").write_text("{}")
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def packed_header(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a file, and the data behind it."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), content[start:]


def put_header(path: Path, header: dict[str, Any] | bytes, data: bytes) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def read_all(path: Path) -> dict[str, bytes]:
    with checkpoint.open(path) as opened:
        return {name: bytes(memoryview(opened.read(name))) for name in opened.names()}


# ---- there and back ----


@pytest.mark.parametrize("coding", ["balanced", "fast"])
def test_round_trip_of_a_folder(model: Path, tmp_path: Path, coding: str) -> None:
    steps: list[tuple[int, int]] = []
    done = packed.pack(model, tmp_path / "p", coding, lambda *step: steps.append(step))
    assert steps[-1][0] == steps[-1][1]
    assert steps == sorted(steps)
    files = tree(tmp_path / "p")
    assert set(files) == set(tree(model))
    assert files["more/still/notes.txt"] == tree(model)["more/still/notes.txt"]
    assert done.files == 1
    assert done.plain_bytes == len(tree(model)["model.safetensors"])
    assert done.packed_bytes == len(files["model.safetensors"]) < done.plain_bytes / 1.3
    assert done.ratio == done.plain_bytes / done.packed_bytes
    again = packed.unpack(tmp_path / "p", tmp_path / "u")
    assert tree(tmp_path / "u") == tree(model)
    assert (again.plain_bytes, again.packed_bytes) == (done.plain_bytes, done.packed_bytes)


def test_round_trip_of_shards(sharded: Path, tmp_path: Path) -> None:
    packed.pack(sharded, tmp_path / "p")
    assert read_all(tmp_path / "p") == read_all(sharded)
    with checkpoint.open(sharded) as one, checkpoint.open(tmp_path / "p") as other:
        assert one.names() == other.names()
        assert one.metadata == other.metadata
        assert one.total_bytes == other.total_bytes
        assert one.units() == other.units()
    assert packed.unpack(tmp_path / "p", tmp_path / "u").files == 3
    assert tree(tmp_path / "u") == tree(sharded)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_reads_the_same(tmp_path: Path, dtype: str) -> None:
    shapes = [[], [0], [1], [2], [5, 0, 3], [4, 8], [9, 8], [40_000], [3, 100_008]]
    tensors = [
        (f"t{at}", dtype, shape)
        for at, shape in enumerate(shapes)
        if np.prod(shape, dtype=int) * DTYPES[dtype][1] % 8 == 0
    ]
    source = write(tmp_path / "x.safetensors", lay_out(tensors))
    packed.pack(source, tmp_path / "p", threads=1)
    assert read_all(tmp_path / "p" / source.name) == read_all(source)
    with checkpoint.open(source) as one, checkpoint.open(tmp_path / "p" / source.name) as other:
        for name in one.names():
            a, b = one.info(name), other.info(name)
            assert (a.dtype, a.shape, a.nbytes) == (b.dtype, b.shape, b.nbytes)
            assert a.encoded_nbytes is None
            assert b.encoded_nbytes is not None
            assert bool(b.encoded_nbytes) == bool(b.nbytes)
            assert one.read(name).__dlpack_device__() == other.read(name).__dlpack_device__()
            assert (one.read(name).dtype, one.read(name).shape) == (
                other.read(name).dtype,
                other.read(name).shape,
            )
    packed.unpack(tmp_path / "p" / source.name, tmp_path / "u")
    assert tree(tmp_path / "u") == {source.name: source.read_bytes()}


@pytest.mark.parametrize("header", ["{}", "{}      ", '{"__metadata__":{"é":"\\ud800 \\u0041"}}'])
def test_a_file_of_no_tensors(tmp_path: Path, header: str) -> None:
    source = write(tmp_path / "x.safetensors", header)
    packed.pack(source, tmp_path / "p")
    packed.unpack(tmp_path / "p" / source.name, tmp_path / "u")
    assert tree(tmp_path / "u") == {source.name: source.read_bytes()}
    with checkpoint.open(tmp_path / "p" / source.name) as opened:
        assert opened.metadata == json.loads(header).get("__metadata__", {})


def test_many_tensors_go_through_a_small_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of sizes that differ: never more at work than may be, and nothing waits for ever."""
    dice = random.Random(5)
    tensors = [(f"t{at}", "BF16", [dice.choice([1, 30, 9000, 200_000])]) for at in range(200)]
    source = write(tmp_path / "x.safetensors", lay_out(tensors))
    added = done = most = 0
    real = checkpoint.add_tensor

    def add_tensor(store: omnimem.Store, name: str, info: checkpoint.TensorInfo) -> None:
        nonlocal added, most
        added += info.nbytes
        most = max(most, added - done)
        real(store, name, info)

    def progress(now: int, total: int) -> None:
        nonlocal done
        done = now

    monkeypatch.setattr(checkpoint, "add_tensor", add_tensor)
    monkeypatch.setattr(packed, "_WINDOW", 300_000)
    monkeypatch.setattr(packed, "_SLACK", 8 << 20)
    packed.pack(source, tmp_path / "p", progress=progress, threads=3)
    assert 400_000 < most <= 300_000 + 400_000
    monkeypatch.setattr(packed, "_AHEAD", 5)
    packed.unpack(tmp_path / "p" / source.name, tmp_path / "u", threads=3)
    assert tree(tmp_path / "u") == {source.name: source.read_bytes()}


def test_any_tool_can_read_the_header(model: Path, tmp_path: Path) -> None:
    """A packed file is a safetensors file, with the hash that sha256sum gives of the original."""
    safetensors = pytest.importorskip("safetensors")
    packed.pack(model, tmp_path / "p")
    path = tmp_path / "p" / "model.safetensors"
    with safetensors.safe_open(path, "np") as file:
        assert set(file.keys()) == {name for name, _, _ in WEIGHTS}
        metadata = file.metadata()
        form = file.get_tensor("layer.weight")
    content = (model / "model.safetensors").read_bytes()
    assert metadata["omnimem.sha256"] == hashlib.sha256(content).hexdigest()
    assert metadata["omnimem.packed"] == "1"
    assert metadata["omnimem.coding"] == "balanced"
    assert _core.decode(form) == read_all(model)["layer.weight"]
    header, _ = packed_header(path)
    forms = [entry for name, entry in header.items() if name != "__metadata__"]
    assert [entry["data_offsets"][0] for entry in forms] == sorted(
        entry["data_offsets"][0] for entry in forms
    )
    with checkpoint.open(path) as opened:
        assert all(opened.info(name).offset % 64 == 0 for name in opened.names())


def test_mixed_shards(sharded: Path, tmp_path: Path) -> None:
    """Some shards packed, some not: read all the same, and unpacked where there is something to."""
    packed.pack(sharded, tmp_path / "p")
    mixed = tmp_path / "p" / "m-1.safetensors"
    mixed.write_bytes((sharded / "m-1.safetensors").read_bytes())
    assert read_all(tmp_path / "p") == read_all(sharded)
    with pytest.raises(ValueError, match=r"m-2\.safetensors: is packed already"):
        packed.pack(tmp_path / "p", tmp_path / "pp")
    assert packed.unpack(tmp_path / "p", tmp_path / "u").files == 2
    assert tree(tmp_path / "u") == tree(sharded)


def test_links_are_followed(model: Path, tmp_path: Path) -> None:
    """As in a cache of the hub: the files are links to others; what is written is files."""
    blobs = tmp_path / "blobs"
    (model / "more").rename(blobs)
    (model / "model.safetensors").rename(blobs / "f00")
    (model / "model.safetensors").symlink_to("../blobs/f00")
    (model / "more").symlink_to("../blobs")
    packed.pack(model, tmp_path / "p")
    assert not any(path.is_symlink() for path in (tmp_path / "p").rglob("*"))
    assert read_all(tmp_path / "p") == read_all(model)
    assert (tmp_path / "p" / "more" / "still" / "notes.txt").is_file()
    (blobs / "loop").symlink_to("../model")
    with pytest.raises(ValueError, match="a link to a folder that holds it"):
        packed.pack(model, tmp_path / "q")
    (blobs / "loop").unlink()
    (model / "gone").symlink_to("nowhere")
    with pytest.raises(ValueError, match="gone: is no regular file"):
        packed.pack(model, tmp_path / "q")
    assert not (tmp_path / "q").exists()


# ---- refusals ----


def test_wrong_arguments(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="coding='zip' must be one of balanced, fast"):
        packed.pack(model, tmp_path / "p", "zip")
    with pytest.raises(ValueError, match="threads=0"):
        packed.pack(model, tmp_path / "p", threads=0)
    assert not (tmp_path / "p").exists()
    with pytest.raises(FileNotFoundError):
        packed.pack(tmp_path / "gone", tmp_path / "p")
    with pytest.raises(ValueError, match="nothing to unpack; `omnimem pack`"):
        packed.unpack(model, tmp_path / "p")
    packed.pack(model, tmp_path / "p")
    with pytest.raises(ValueError, match="is packed already; `omnimem unpack`"):
        packed.pack(tmp_path / "p", tmp_path / "q")
    with pytest.raises(ValueError, match=r"p: is not empty.*name another folder"):
        packed.pack(model, tmp_path / "p")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        packed.pack(model, tmp_path / "file")
    for inside in (model, model / "p", model / "more" / ".." / "p"):
        with pytest.raises(ValueError, match=r"lies in .*, which is copied"):
            packed.pack(model, inside)
    assert not (model / "p").exists()
    assert not (tmp_path / "q").exists()


def test_an_empty_folder_is_taken_and_kept(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(_output.OutputFile, "sync", _raise(OSError(errno.EIO, "broken")))
        with pytest.raises(OSError, match="broken"):
            packed.pack(model, tmp_path / "p")
    assert list((tmp_path / "p").iterdir()) == []
    packed.pack(model, tmp_path / "p")
    assert read_all(tmp_path / "p") == read_all(model)


def _raise(error: BaseException) -> Callable[..., Any]:
    def fail(*_: object) -> None:
        raise error

    return fail


def test_a_header_too_long_for_the_format(tmp_path: Path) -> None:
    """Near the format's limit, a kept header does not fit: nothing is written."""
    raw = '{"__metadata__":{"a":"' + '\\"' * (HEADER_CAP // 4) + '"}}'
    assert len(raw) < HEADER_CAP
    source = tmp_path / "x.safetensors"
    source.write_bytes(struct.pack("<Q", len(raw)) + raw.encode())
    with pytest.raises(FormatError, match="over the format's limit of 100000000; leave this one"):
        packed.pack(source, tmp_path / "p")
    assert not (tmp_path / "p").exists()


# ---- damage ----


@pytest.fixture
def form_file(model: Path, tmp_path: Path) -> Path:
    packed.pack(model, tmp_path / "p")
    return tmp_path / "p" / "model.safetensors"


@pytest.mark.parametrize("name", [name for name, _, shape in WEIGHTS if 0 not in shape])
def test_a_flipped_bit_is_found_by_name(form_file: Path, tmp_path: Path, name: str) -> None:
    good = read_all(form_file)
    info = checkpoint.open(form_file).info(name)
    assert info.encoded_nbytes
    content = form_file.read_bytes()
    dice = random.Random(name)
    failed = 0
    for at in (0, 30, 41, *dice.sample(range(info.encoded_nbytes), 5)):
        damaged = bytearray(content)
        damaged[info.offset + at] ^= 1 << dice.randrange(8)
        form_file.write_bytes(damaged)
        said = {}
        with checkpoint.open(form_file) as opened:
            for other in opened.names():
                try:
                    assert bytes(memoryview(opened.read(other))) == good[other]
                except CorruptError as error:
                    said[other] = str(error)
        assert all(other == name and f"'{name}'" in text for other, text in said.items())
        failed += len(said)
        if at == 0:
            with pytest.raises(CorruptError, match=f"'{name}'"):
                packed.unpack(form_file, tmp_path / "u")
            assert not (tmp_path / "u").exists()
    assert failed >= 3


def test_a_file_cut_off(form_file: Path) -> None:
    content = form_file.read_bytes()
    for length in (0, 7, 100, len(content) // 2, len(content) - 1):
        form_file.write_bytes(content[:length])
        with pytest.raises(FormatError):
            checkpoint.open(form_file)
    form_file.write_bytes(content + b"\0")
    with pytest.raises(FormatError, match="1 bytes follow the last tensor"):
        checkpoint.open(form_file)


def test_swapped_forms(tmp_path: Path) -> None:
    """By their places in the header: at opening. By their bytes: at reading, or when unpacked."""
    source = write(
        tmp_path / "model.safetensors",
        lay_out([("a", "BF16", [40]), ("b", "BF16", [40]), ("c", "BF16", [50])]),
    )
    packed.pack(source, tmp_path / "p")
    path = tmp_path / "p" / "model.safetensors"
    header, data = packed_header(path)
    forms = {name: data[slice(*header[name]["data_offsets"])] for name in "abc"}
    assert len(forms["a"]) == len(forms["b"]) == len(forms["c"])
    swapped = dict(header)
    swapped["a"], swapped["b"] = header["b"], header["a"]
    put_header(path, swapped, data)
    with pytest.raises(FormatError, match="'a' does not lie in the order of the kept header"):
        checkpoint.open(path)
    put_header(path, header, forms["a"] + forms["c"] + forms["b"])
    with checkpoint.open(path) as opened:
        for name in "bc":
            with pytest.raises(CorruptError, match=f"'{name}'.* another number of plain bytes"):
                opened.read(name)
    put_header(path, header, forms["b"] + forms["a"] + forms["c"])
    with pytest.raises(CorruptError, match="to another file than was packed"):
        packed.unpack(path, tmp_path / "u")
    assert not (tmp_path / "u").exists()


def changed_original(change: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    def apply(header: dict[str, Any]) -> None:
        original = json.loads(header["__metadata__"]["omnimem.header"])
        change(original)
        header["__metadata__"]["omnimem.header"] = json.dumps(original)

    return apply


def meta(**values: Any) -> Callable[[dict[str, Any]], None]:
    def apply(header: dict[str, Any]) -> None:
        for key, value in values.items():
            header["__metadata__"][f"omnimem.{key}"] = value

    return apply


def without(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda header: header["__metadata__"].pop(f"omnimem.{key}")


def grown(original: dict[str, Any]) -> None:
    """The tensor that comes last is said to be absurdly large."""
    begin = original["odd"]["data_offsets"][0]
    original["odd"] |= {"shape": [1 << 50], "data_offsets": [begin, begin + (1 << 50)]}


def renamed(original: dict[str, Any]) -> None:
    original["other"] = original.pop("big")


FORGED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "version": (meta(packed="2"), "packed in version '2' .* reads version '1'"),
    "no version": (meta(packed=""), "packed in version ''"),
    "coding": (meta(coding="zip"), "omnimem.coding is 'zip', known are balanced, fast"),
    "hash": (meta(sha256="0" * 63), "not 64 hexadecimal digits"),
    "upper hash": (meta(sha256="A" * 64), "not 64 hexadecimal digits"),
    "no coding": (without("coding"), "its header has no omnimem.coding"),
    "no header": (without("header"), "its header has no omnimem.header"),
    "no hash": (without("sha256"), "its header has no omnimem.sha256"),
    "empty header": (meta(header=""), "the kept header does not begin with"),
    "list": (meta(header="[]"), "the kept header does not begin with"),
    "broken": (meta(header="{"), "the kept header is not valid JSON"),
    "surrogate": (meta(header='{"\ud800": 1}'), "omnimem.header is not valid Unicode"),
    "twice": (meta(header='{"a": 1, "a": 1}'), "the kept header holds the name 'a' twice"),
    "nothing": (meta(header="{}"), "the kept header does not name"),
    "hole": (changed_original(lambda o: o.pop("norm.weight")), "leaves a hole after the header"),
    "missing": (changed_original(lambda o: o.pop("nothing")), "holds 'nothing', which the kept"),
    "renamed": (changed_original(renamed), "no encoded form of tensor 'other'"),
    "absurd": (
        changed_original(grown),
        "'odd': an encoded form of .* cannot be of 1125899906842624",
    ),
    "dtype": (
        changed_original(lambda o: o["odd"].__setitem__("dtype", "I4")),
        "unknown dtype 'I4'",
    ),
    "lying shape": (
        changed_original(lambda o: o["odd"].__setitem__("shape", [12344])),
        "needs 12344 bytes, data_offsets give 12345",
    ),
    "packed twice": (
        changed_original(lambda o: o["__metadata__"].__setitem__("omnimem.packed", "1")),
        "was packed twice",
    ),
    "form of no bytes": (
        lambda h: h["nothing"].update(shape=[8, 0]),
        "'nothing': its encoded form is uint8 of 2 dimensions",
    ),
    "typed form": (lambda h: h["nothing"].update(dtype="I8"), "its encoded form is int8 of 1"),
}


@pytest.mark.parametrize("case", FORGED)
def test_forged_headers(form_file: Path, case: str) -> None:
    change, message = FORGED[case]
    header, data = packed_header(form_file)
    change(header)
    put_header(form_file, header, data)
    with pytest.raises(FormatError, match=message) as caught:
        checkpoint.open(form_file)
    assert str(form_file) in str(caught.value)
    assert len(str(caught.value)) < 2000


def test_sizes_that_no_form_has(form_file: Path) -> None:
    """Bytes added to a form, or a form of nothing for something."""
    header, data = packed_header(form_file)
    begin, end = header["odd"]["data_offsets"]
    header["odd"].update(shape=[end - begin + 4096], data_offsets=[begin, end + 4096])
    put_header(form_file, header, data + bytes(4096))
    with pytest.raises(FormatError, match=r"'odd': an encoded form of .* cannot be of 12345"):
        checkpoint.open(form_file)
    header["odd"].update(shape=[0], data_offsets=[begin, begin])
    put_header(form_file, header, data[:begin])
    with pytest.raises(FormatError, match=r"'odd' does not lie in the order|form of 0 bytes"):
        checkpoint.open(form_file)


def test_a_kept_header_that_lies_is_found_when_read(form_file: Path, tmp_path: Path) -> None:
    """Sizes moved from one tensor to the next: the forms know better."""

    def move(original: dict[str, Any]) -> None:
        at, end = original["big"]["data_offsets"]
        last = original["odd"]["data_offsets"][1]
        original["big"].update(dtype="U8", shape=[end - 4 - at], data_offsets=[at, end - 4])
        original["odd"].update(shape=[last - end + 4], data_offsets=[end - 4, last])

    header, data = packed_header(form_file)
    changed_original(move)(header)
    put_header(form_file, header, data)
    with checkpoint.open(form_file) as opened:
        for name in ("big", "odd"):
            with pytest.raises(CorruptError, match=f"'{name}'"):
                opened.read(name)
        opened.read("layer.weight")
    with pytest.raises(CorruptError, match="'big'"):
        packed.unpack(form_file, tmp_path / "u")


def test_mutated_headers_never_pass_for_others(form_file: Path) -> None:
    """Whatever changes in the header: it is refused, or says what is true of what is there."""
    good = read_all(form_file)
    content = form_file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    text = content[8:start].rstrip(b" ")
    dice = random.Random(11)
    words = [b"0", b"9", b"-1", b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"null", b"1e3",
             b"U8", b"BF16", b"\\ud800", b"\xff", b"omnimem.packed", b"99999999999999"]  # fmt: skip
    refused = opened_count = 0
    for _ in range(1500):
        raw = bytearray(text)
        for _ in range(dice.choice([1, 1, 1, 2, 5])):
            at = dice.randrange(len(raw))
            match dice.randrange(4):
                case 0:
                    raw[at] ^= 1 << dice.randrange(8)
                case 1:
                    raw[at : at + dice.randrange(1, 4)] = dice.choice(words)
                case 2:
                    del raw[at : at + dice.randrange(1, 30)]
                case _:
                    other = dice.randrange(len(raw))
                    raw[at:at] = raw[other : other + dice.randrange(1, 60)]
        put_header(form_file, bytes(raw), content[start:])
        try:
            with checkpoint.open(form_file) as opened:
                opened_count += 1
                for name in dice.sample(opened.names(), 2):
                    try:
                        made = bytes(memoryview(opened.read(name)))
                    except CorruptError:
                        continue
                    form = opened.info(name).encoded_nbytes
                    assert form is None or made == good.get(name, made)
        except FormatError:
            refused += 1
    assert refused > 500
    assert opened_count > 10


# ---- trouble ----


def test_a_full_disk(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any write: said with the next step, and nothing is left."""
    real = os.write
    left = 0

    def write(descriptor: int, data: Any) -> int:
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data)

    packed.pack(sharded, tmp_path / "whole")
    monkeypatch.setattr(os, "write", write)
    for work, source in ((packed.pack, sharded), (packed.unpack, tmp_path / "whole")):
        for nth in itertools.count(1):
            left, said = nth, None
            try:
                work(source, tmp_path / "new" / "out")
            except DiskFullError as error:
                said = error
            if said is None:
                break
            assert said.errno == errno.ENOSPC
            assert "make room, or name a folder on another file system" in str(said)
            assert not (tmp_path / "new").exists()
        assert nth > 5
        assert read_all(tmp_path / "new" / "out") == read_all(sharded)
        (tmp_path / "new").rename(tmp_path / f"new-{work.__name__}")


def test_what_encodes_wrongly_is_never_kept(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = _core.encode

    def encode(data: Any, dtype: str | None = None, coding: str = "auto") -> bytes | None:
        return real(bytearray(memoryview(data))[::-1], dtype, coding)

    monkeypatch.setattr(_core, "encode", encode)
    with pytest.raises(CorruptError, match="others are decoded than were encoded"):
        packed.pack(model, tmp_path / "p")
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("last", [False, True])
def test_a_file_that_changes_meanwhile(model: Path, tmp_path: Path, last: bool) -> None:
    """While it is read, and after its last byte was read."""
    shard = model / "model.safetensors"
    tensors = sum(nbytes_of(dtype, shape) for _, dtype, shape in WEIGHTS)

    def touch(done: int, total: int) -> None:
        if done <= tensors and (done == tensors or not last):
            os.utime(shard, ns=(1, done + 1))

    with pytest.raises(CorruptError, match="changed"):
        packed.pack(model, tmp_path / "p", progress=touch)
    assert not (tmp_path / "p").exists()


@pytest.mark.filterwarnings("ignore:omnimem uses threads:RuntimeWarning")
def test_a_failed_allocation(model: Path, tmp_path: Path) -> None:
    """An error and nothing left, or all of it, as when what was read ahead is read on demand."""
    failed, fired, nth = 0, 1, 0
    while fired:
        nth += 1 + nth // 10
        _core._fault_arm("alloc", nth)
        try:
            packed.pack(model, tmp_path / f"p{nth}")
        except (MemoryError, Error):
            failed += 1
            assert not (tmp_path / f"p{nth}").exists()
        fired = _core._fault_fired("alloc")
        _core._fault_reset()
        if (tmp_path / f"p{nth}").exists():
            assert read_all(tmp_path / f"p{nth}") == read_all(model)
    assert failed > 10


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    """Wherever it comes: the exit code says so, and there is no folder, or a whole one."""
    tensors = [(f"t{at}", "BF16", [400_000]) for at in range(60)]
    source = tmp_path / "model"
    source.mkdir()
    write(source / "model.safetensors", lay_out(tensors))
    (source / "config.json").write_text("{}")
    command = [sys.executable, "-m", "omnimem.cli", "pack", str(source), str(tmp_path / "p")]
    path = os.pathsep.join([str(PACKAGE_DIR), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    codes = set()
    for wait in (0.0, 0.02, 0.05, 0.1, 0.2):
        child = subprocess.Popen(
            command, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}
        )
        deadline = time.monotonic() + 60
        while child.poll() is None and not (tmp_path / "p").exists():
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(wait)
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=60)
        codes.add(child.returncode)
        if child.returncode == 0:
            assert read_all(tmp_path / "p") == read_all(source)
            for file in (tmp_path / "p").iterdir():
                file.unlink()
            (tmp_path / "p").rmdir()
        else:
            assert child.returncode == 130, said
            assert not (tmp_path / "p").exists()
    assert 130 in codes


def test_a_file_system_without_direct_writes(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused when it is asked for, or by the first write."""
    packed.pack(sharded, tmp_path / "p")
    whole = tree(tmp_path / "p")
    get = fcntl.fcntl

    def set_flags(descriptor: int, what: int, flags: int = 0) -> int:
        if what == fcntl.F_SETFL and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no")
        return get(descriptor, what, flags)

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "fcntl", set_flags)
        packed.pack(sharded, tmp_path / "q")
    assert tree(tmp_path / "q") == whole
    real, refused = os.write, []

    def write(descriptor: int, data: Any) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(len(data))
            raise OSError(errno.EINVAL, "no")
        return real(descriptor, data[:5000])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        patch.setattr(_output, "_PIECE", 8192)
        packed.pack(sharded, tmp_path / "r")
    assert tree(tmp_path / "r") == whole
    assert refused
    monkeypatch.setattr(_output, "_PIECE", 8192)
    packed.pack(sharded, tmp_path / "s")
    assert tree(tmp_path / "s") == whole


def test_bound_of_a_form() -> None:
    for nbytes in (1, 63, 64, 65, 1 << 18, (1 << 18) + 1, 123 << 20):
        assert _core.encode_bound(nbytes) <= _packed_header.largest_form(nbytes)
