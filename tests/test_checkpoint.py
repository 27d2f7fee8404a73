"""omnimem.checkpoint: strict headers, folders, units, and reading tensors in place."""

from __future__ import annotations

import json
import os
import random
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import omnimem.checkpoint as checkpoint
from omnimem._safetensors import DTYPES, HEADER_CAP
from omnimem.checkpoint import Unit, unit_names
from omnimem.errors import ClosedError, CorruptError, Error, FormatError


def pack(header: dict[str, Any] | bytes | str, data: bytes = b"") -> bytes:
    """Build a file from a header and its data."""
    if isinstance(header, dict):
        header = json.dumps(header)
    raw = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(raw)) + raw + data


def entry(dtype: str, shape: list[int], begin: int, end: int, **extra: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **extra}


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def small(path: Path, names: list[str]) -> Path:
    """Write a file of four-byte tensors with the given names."""
    header = {name: entry("F32", [1], 4 * at, 4 * at + 4) for at, name in enumerate(names)}
    return write(path, pack(header, os.urandom(4 * len(names))))


def folder(path: Path, shards: dict[str, list[str]], **weight_map: str) -> Path:
    path.mkdir(exist_ok=True)
    mapped = {name: shard for shard, names in shards.items() for name in names} | weight_map
    for shard, names in shards.items():
        small(path / shard, names)
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": mapped})
    )
    return path


# ---- single files ----


def test_reads_names_places_and_metadata(tmp_path: Path) -> None:
    content = pack(
        {
            "__metadata__": {"format": "pt"},
            "b": entry("F32", [2, 3], 8, 32),
            "a": entry("I64", [], 0, 8),
            "empty": entry("BF16", [0, 1 << 40], 8, 8),
        },
        bytes(32),
    )
    path = write(tmp_path / "x.safetensors", content)
    with checkpoint.open(path) as opened:
        assert opened.names() == ["a", "empty", "b"]
        info = opened.info("b")
        assert (info.dtype, info.shape, info.nbytes) == ("float32", (2, 3), 24)
        assert info.file == str(path)
        assert info.offset == len(content) - 24
        assert opened.info("a").shape == ()
        assert opened.metadata == {"format": "pt"}
        assert opened.total_bytes == 32
        assert "a" in opened
        assert len(opened) == 3
        with pytest.raises(KeyError, match="no tensor named 'zz'"):
            opened.info("zz")


def test_renamed(tmp_path: Path) -> None:
    with checkpoint.open(small(tmp_path / "a.safetensors", ["old", "more", "same"])) as files:
        with files.renamed({"same": "same", "old": "new", "none": "other"}) as mine:
            assert mine.names() == ["new", "same"]
            assert mine.info("new") == files.info("old")
            assert bytes(mine.read("new")) == bytes(files.read("old"))
            assert mine.files == files.files
            assert "old" not in mine
        with pytest.raises(ClosedError):
            mine.read("new")
        assert bytes(files.read("more"))


def test_agrees_with_safetensors_writer(tmp_path: Path) -> None:
    numpy_io = pytest.importorskip("safetensors.numpy")
    arrays = {
        "w": np.arange(12, dtype=np.float16).reshape(3, 4),
        "flag": np.array([True, False, True]),
        "scalar": np.array(7, dtype=np.int64),
        "z": np.arange(3, dtype=np.complex64),
    }
    path = tmp_path / "x.safetensors"
    numpy_io.save_file(arrays, path)
    raw = path.read_bytes()
    opened = checkpoint.open(path)
    for name, array in arrays.items():
        info = opened.info(name)
        assert info.dtype == array.dtype.name
        assert info.shape == array.shape
        assert raw[info.offset : info.offset + info.nbytes] == array.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_has_its_size(tmp_path: Path, dtype: str) -> None:
    assert len(DTYPES) == 22
    name, bits = DTYPES[dtype]
    nbytes = 24 * bits // 8
    path = write(tmp_path / "x", pack({"t": entry(dtype, [3, 8], 0, nbytes)}, bytes(nbytes)))
    info = checkpoint.open(path).info("t")
    assert (info.dtype, info.shape, info.nbytes) == (name, (3, 8), nbytes)
    write(path, pack({"t": entry(dtype, [3, 8], 0, nbytes + 1)}, bytes(nbytes + 1)))
    with pytest.raises(FormatError, match=f"needs {nbytes} bytes, data_offsets give {nbytes + 1}"):
        checkpoint.open(path)


def test_empty_header_padding_and_unknown_fields_are_legal(tmp_path: Path) -> None:
    assert checkpoint.open(write(tmp_path / "a", pack("{}"))).names() == []
    assert checkpoint.open(write(tmp_path / "b", pack("{}     "))).names() == []
    header = {"t": entry("U8", [1], 0, 1, note={"deep": [1.5, None]})}
    assert checkpoint.open(write(tmp_path / "c", pack(header, b"x"))).info("t").nbytes == 1


T = "t"
BAD: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "0 bytes, shorter than the 8"),
    "half a length": (b"\x10\0\0", "3 bytes, shorter than the 8"),
    "cap": (struct.pack("<Q", HEADER_CAP + 1) + b"{}", "over the format's limit of 100000000"),
    "1 TB header": (struct.pack("<Q", 1 << 40) + b"{}", "over the format's limit"),
    "huge length": (b"\xff" * 8 + b"{}", "over the format's limit"),
    "truncated header": (struct.pack("<Q", 100) + b"{}", "needs 100 bytes after the first 8"),
    "no header": (pack(b""), "does not begin with"),
    "array": (pack("[]"), "does not begin with"),
    "leading space": (pack("  {}"), "does not begin with"),
    "byte order mark": (pack(b"\xef\xbb\xbf{}"), "does not begin with"),
    "broken JSON": (pack('{"t":'), "not valid JSON"),
    "NUL padding": (pack(b"{}\0\0"), "not valid JSON"),
    "trailing text": (pack("{} {}"), "not valid JSON"),
    "NaN": (pack('{"t": NaN}'), "NaN is not JSON"),
    "deep nesting": (pack('{"t":' + "[" * 200_000 + "}"), "not valid JSON"),
    "not UTF-8": (pack(b'{"\xff": 1}'), "not UTF-8"),
    "lone surrogate": (
        pack(b'{"\\ud800": {"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'),
        "not valid Unicode",
    ),
    "duplicate name": (
        pack('{"t":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"t":1}'),
        "holds the name 't' twice",
    ),
    "duplicate field": (
        pack('{"t":{"dtype":"U8","dtype":"I8","shape":[0],"data_offsets":[0,0]}}'),
        "holds the name 'dtype' twice",
    ),
    "duplicate metadata": (
        pack('{"__metadata__":{},"__metadata__":{}}'),
        "holds the name '__metadata__' twice",
    ),
    "metadata list": (pack({"__metadata__": []}), "not an object of strings"),
    "metadata number": (pack({"__metadata__": {"a": 1}}), r"__metadata__\['a'\] is int"),
    "metadata null": (pack({"__metadata__": {"a": None}}), "is NoneType"),
    "entry is a list": (pack({T: []}), "described by list"),
    "no dtype": (pack({T: {"shape": [], "data_offsets": [0, 0]}}), "gives no dtype"),
    "no shape": (pack({T: {"dtype": "U8", "data_offsets": [0, 0]}}), "gives no shape"),
    "no offsets": (pack({T: {"dtype": "U8", "shape": []}}), "gives no data_offsets"),
    "unknown dtype": (pack({T: entry("I4", [0], 0, 0)}), "unknown dtype 'I4'"),
    "dtype in lower case": (pack({T: entry("f32", [0], 0, 0)}), "unknown dtype 'f32'"),
    "float dimension": (pack({T: entry("U8", [1.0], 0, 1)}, b"x"), "not a list of integers"),
    "negative dimension": (pack({T: entry("U8", [-1], 0, 0)}), "not a list of integers"),
    "huge dimension": (pack({T: entry("U8", [1 << 63], 0, 0)}), "not a list of integers"),
    "long dimension": (
        pack('{"t":{"dtype":"U8","shape":[' + "9" * 5000 + '],"data_offsets":[0,0]}}'),
        "not valid JSON",
    ),
    "one offset": (pack('{"t":{"dtype":"U8","shape":[0],"data_offsets":[0]}}'), "not a pair"),
    "three offsets": (pack('{"t":{"dtype":"U8","shape":[0],"data_offsets":[0,0,0]}}'), "not a p"),
    "float offset": (pack('{"t":{"dtype":"U8","shape":[0],"data_offsets":[0,0.0]}}'), "not a pair"),
    "negative offset": (pack({T: entry("U8", [0], -1, 0)}), "not a pair"),
    "backwards": (pack({T: entry("U8", [0], 2, 1)}, b"xx"), "begins at byte 2 of the data, after"),
    "beyond the end": (pack({T: entry("U8", [5], 0, 5)}, b"xxxx"), "of which the file has 4"),
    "lying shape": (pack({T: entry("F32", [2], 0, 4)}, b"xxxx"), "needs 8 bytes, .* give 4"),
    "element overflow": (pack({T: entry("U8", [1 << 32, 1 << 32], 0, 0)}), "elements or more"),
    "overflow before zero": (
        pack({T: entry("U8", [1 << 40, 1 << 40, 0], 0, 0)}),
        "elements or more",
    ),
    "bit overflow": (pack({T: entry("F64", [1 << 58], 0, 0)}), "bits or more"),
    "half a byte": (pack({T: entry("F4", [3], 0, 1)}, b"x"), "12 bits, not whole bytes"),
    "six bits": (pack({T: entry("F6_E2M3", [1], 0, 1)}, b"x"), "6 bits, not whole bytes"),
    "overlap": (
        pack({"a": entry("U8", [3], 0, 3), "b": entry("U8", [2], 2, 4)}, b"xxxx"),
        "'b' .* overlaps tensor 'a'",
    ),
    "same bytes twice": (
        pack({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 0, 4)}, b"xxxx"),
        "overlaps",
    ),
    "hole": (
        pack({"a": entry("U8", [1], 0, 1), "b": entry("U8", [2], 2, 4)}, b"xxxx"),
        "'b' .* leaves a hole after tensor 'a'",
    ),
    "hole at the start": (pack({"a": entry("U8", [1], 1, 2)}, b"xx"), "hole after the header"),
    "bytes at the end": (pack({"a": entry("U8", [1], 0, 1)}, b"xx"), "1 bytes follow the last"),
    "data without tensors": (pack("{}", b"xx"), "2 bytes follow"),
}
for literal in ("true", '"1"', "null", "1e3", "[1]"):
    BAD[f"dimension {literal}"] = (
        pack(f'{{"t":{{"dtype":"U8","shape":[{literal}],"data_offsets":[0,1]}}}}', b"x"),
        "not a list of integers",
    )
    BAD[f"offset {literal}"] = (
        pack(f'{{"t":{{"dtype":"U8","shape":[1],"data_offsets":[0,{literal}]}}}}', b"x"),
        "not a pair of integers",
    )


@pytest.mark.parametrize("case", BAD)
def test_bad_file_is_refused_by_name(tmp_path: Path, case: str) -> None:
    content, message = BAD[case]
    path = write(tmp_path / "bad.safetensors", content)
    with pytest.raises(FormatError, match=message) as caught:
        checkpoint.open(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 2000


def test_big_lie_costs_nothing(tmp_path: Path) -> None:
    """A header of 90 MB in a sparse file is refused without parsing tensors out of zeros."""
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 90_000_000))
        file.truncate(1 << 40)
    started = time.monotonic()
    with pytest.raises(FormatError, match="does not begin with"):
        checkpoint.open(path)
    assert time.monotonic() - started < 10


def test_random_damage_raises_only_named_errors(tmp_path: Path) -> None:
    """Whatever bytes change, open succeeds or raises FormatError."""
    good = pack({"a": entry("BF16", [2, 2], 0, 8), "b": entry("F4", [4], 8, 10)}, bytes(range(10)))
    dice = random.Random(7)
    path = tmp_path / "fuzz"
    for _ in range(2000):
        content = bytearray(good)
        for _ in range(dice.randint(1, 4)):
            content[dice.randrange(len(content))] = dice.randrange(256)
        if dice.random() < 0.3:
            del content[dice.randrange(len(content)) :]
        path.write_bytes(content)
        try:
            opened = checkpoint.open(path)
        except FormatError:
            continue
        assert all(i.offset + i.nbytes <= len(content) for i in map(opened.info, opened.names()))


# ---- folders ----


def test_folder_with_one_file(tmp_path: Path) -> None:
    small(tmp_path / "model.safetensors", ["a", "b"])
    assert checkpoint.open(tmp_path).names() == ["a", "b"]
    assert checkpoint.open(str(tmp_path)).total_bytes == 8


def test_folder_with_shards_is_ordered_by_file_then_offset(tmp_path: Path) -> None:
    place = folder(tmp_path, {"m-2.safetensors": ["c", "d"], "m-1.safetensors": ["z", "b"]})
    opened = checkpoint.open(place)
    assert opened.names() == ["z", "b", "c", "d"]
    assert opened.info("d").file == str(place / "m-2.safetensors")
    assert opened.files == [str(place / "m-1.safetensors"), str(place / "m-2.safetensors")]


def test_symlinks_are_followed(tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    small(blobs / "abc", ["a"])
    snapshot = tmp_path / "snapshot"
    folder(snapshot, {"m.safetensors": ["a"]})
    (snapshot / "m.safetensors").unlink()
    (snapshot / "m.safetensors").symlink_to("../blobs/abc")
    assert checkpoint.open(snapshot).names() == ["a"]


def test_folders_of_diffusers(tmp_path: Path) -> None:
    stem = "diffusion_pytorch_model"
    (tmp_path / "one").mkdir()
    small(tmp_path / "one" / f"{stem}.safetensors", ["a"])
    assert checkpoint.open(tmp_path / "one").names() == ["a"]
    two = folder(
        tmp_path / "two", {"1.safetensors": ["a"], "2.safetensors": ["b"]}, c="2.safetensors"
    )
    index = (two / "model.safetensors.index.json").rename(two / f"{stem}.safetensors.index.json")
    with pytest.raises(FormatError, match=rf"'c', which {index.name} places there"):
        checkpoint.open(two)
    small(two / "2.safetensors", ["b", "c"])
    assert checkpoint.open(two).names() == ["a", "b", "c"]


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"holds neither model.safetensors nor"):
        checkpoint.open(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        checkpoint.open(tmp_path / "gone")
    if Path("/dev/null").exists():
        with pytest.raises(FormatError, match="not a regular file"):
            checkpoint.open("/dev/null")


def test_missing_shard_is_named(tmp_path: Path) -> None:
    place = folder(tmp_path, {"m-1": ["a"], "m-2": ["b"]})
    (place / "m-2").unlink()
    with pytest.raises(FormatError, match="1 of 2 shards are missing: m-2"):
        checkpoint.open(place)


@pytest.mark.parametrize("shard", ["../out", "/etc/passwd", "a/../../out", "", 3, None])
def test_shard_names_stay_in_the_folder(tmp_path: Path, shard: Any) -> None:
    small(tmp_path / "out", ["t"])
    place = folder(tmp_path / "model", {"m": ["a"]}, t=shard)
    with pytest.raises(FormatError, match=r"outside the folder|not a file name"):
        checkpoint.open(place)


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    place = folder(tmp_path / "a", {"m-1": ["a"], "m-2": ["b"]}, c="m-2")
    with pytest.raises(FormatError, match="m-2: has no tensor 'c'"):
        checkpoint.open(place)
    place = folder(tmp_path / "b", {"m-1": ["a", "z"], "m-2": ["b"]}, a="m-2")
    with pytest.raises(FormatError, match=r"m-1: holds tensor 'a', which .* places in m-2"):
        checkpoint.open(place)
    place = folder(tmp_path / "c", {"m-1": ["a"], "m-2": ["b"]})
    small(place / "m-2", ["b", "extra"])
    with pytest.raises(FormatError, match="tensor 'extra' is not in"):
        checkpoint.open(place)
    place = folder(tmp_path / "d", {"m-1": ["a"], "m-2": ["b"]})
    small(place / "m-2", ["b", "a"])
    with pytest.raises(FormatError, match=r"m-2: tensor 'a' is in .*m-1 too"):
        checkpoint.open(place)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a"']
)
def test_bad_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(FormatError, match="index"):
        checkpoint.open(tmp_path)
    text = '{"weight_map": {"a": "m-1", "a": "m-2"}}'
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(FormatError, match="'a' twice"):
        checkpoint.open(tmp_path)


def test_bad_shard_is_named(tmp_path: Path) -> None:
    place = folder(tmp_path, {"m-1": ["a"], "m-2": ["b"]})
    os.truncate(place / "m-2", (place / "m-2").stat().st_size - 1)
    with pytest.raises(FormatError, match=r"m-2: tensor 'b': ends at byte 4 .* has 3"):
        checkpoint.open(place)


def test_change_after_open_is_seen(tmp_path: Path) -> None:
    path = small(tmp_path / "x", ["a", "b"])
    opened = checkpoint.open(path)
    opened.check_unchanged()
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(CorruptError, match="changed since the checkpoint was opened"):
        opened.check_unchanged()
    with pytest.raises(CorruptError):
        opened.read("a")
    path.unlink()
    with pytest.raises(CorruptError, match="cannot be found any more"):
        opened.check_unchanged(str(path))


# ---- units ----


def test_unit_names_of_qwen3_vl() -> None:
    expected = {
        "lm_head.weight": "lm_head",
        "model.language_model.embed_tokens.weight": "model.language_model.embed_tokens",
        "model.language_model.layers.3.mlp.up_proj.weight": "model.language_model.layers.3",
        "model.language_model.layers.11.input_layernorm.weight": "model.language_model.layers.11",
        "model.language_model.norm.weight": "model.language_model.norm",
        "model.visual.blocks.0.attn.qkv.bias": "model.visual.blocks.0",
        "model.visual.deepstack_merger_list.2.norm.weight": "model.visual.deepstack_merger_list.2",
        "model.visual.merger.linear_fc1.weight": "model.visual.merger",
        "model.visual.merger.norm.bias": "model.visual.merger",
        "model.visual.patch_embed.proj.bias": "model.visual.patch_embed",
        "model.visual.pos_embed.weight": "model.visual.pos_embed",
    }
    assert unit_names(expected) == expected


def test_unit_names_of_other_shapes() -> None:
    assert unit_names(["0.weight", "1.bias"]) == {"0.weight": "0", "1.bias": "1"}
    assert unit_names(["a.b.c.weight"]) == {"a.b.c.weight": "a"}
    assert unit_names(["scale", "layers.0.w"]) == {"scale": "", "layers.0.w": "layers.0"}
    assert unit_names(["v.cls", "v.blocks.0.w"])["v.cls"] == "v"
    assert unit_names(["h.0.attn.1.w"]) == {"h.0.attn.1.w": "h.0"}
    assert unit_names(["layer2x.w.v"]) == {"layer2x.w.v": "layer2x"}


def test_units_straddle_shards_and_keep_file_order(tmp_path: Path) -> None:
    place = folder(
        tmp_path,
        {"m-1": ["m.embed.w", "m.layers.0.a", "m.layers.1.a"], "m-2": ["m.layers.1.b", "m.norm.w"]},
    )
    assert checkpoint.open(place).units() == [
        Unit("m.embed", ("m.embed.w",)),
        Unit("m.layers.0", ("m.layers.0.a",)),
        Unit("m.layers.1", ("m.layers.1.a", "m.layers.1.b")),
        Unit("m.norm", ("m.norm.w",)),
    ]


# ---- reading ----


@pytest.fixture
def core() -> None:
    pytest.importorskip("omnimem._core", reason="needs the built core")


@pytest.mark.usefixtures("core")
def test_read_gives_the_bytes(tmp_path: Path) -> None:
    data = os.urandom(24 + 6 + 6 + 8)
    header = {
        "f": entry("F32", [2, 3], 0, 24),
        "four": entry("F4", [3, 4], 24, 30),
        "six": entry("F6_E2M3", [8], 30, 36),
        "odd": entry("F4", [1, 4, 4], 36, 44),
        "none": entry("F32", [0, 4], 44, 44),
    }
    path = write(tmp_path / "x", pack(header, data))
    opened = checkpoint.open(path)
    first = np.from_dlpack(opened.read("f"))
    assert first.shape == (2, 3)
    assert first.tobytes() == data[:24]
    for name, shape in {"four": (3, 2), "six": (6,), "odd": (1, 4, 2), "none": (0, 4)}.items():
        array = np.from_dlpack(opened.read(name))
        assert array.shape == shape, name
        info = opened.info(name)
        assert array.tobytes() == path.read_bytes()[info.offset : info.offset + info.nbytes]
    with opened.read("f") as lease:
        assert bytes(memoryview(lease)) == data[:24]
    assert np.from_dlpack(opened.read("f")).tobytes() == data[:24]
    with pytest.raises(KeyError):
        opened.read("zz")
    opened.close()
    opened.close()
    assert first.tobytes() == data[:24]
    with pytest.raises(ClosedError):
        opened.read("f")


@pytest.mark.usefixtures("core")
def test_read_gives_the_memory_back(tmp_path: Path) -> None:
    size = 8 << 20
    header = {f"t{at}": entry("U8", [size], at * size, (at + 1) * size) for at in range(4)}
    path = tmp_path / "x"
    path.write_bytes(pack(header, os.urandom(4 * size)))
    with checkpoint.open(path) as opened:
        for _ in range(30):
            for name in opened.names():
                with opened.read(name) as lease:
                    assert memoryview(lease).nbytes == size


@pytest.mark.usefixtures("core")
def test_threads_may_read_the_same_tensor(tmp_path: Path) -> None:
    data = os.urandom(1 << 20)
    path = write(tmp_path / "x", pack({"t": entry("U8", [1 << 20], 0, 1 << 20)}, data))
    with checkpoint.open(path) as opened, ThreadPoolExecutor(4) as pool:
        arrays = list(pool.map(lambda _: np.from_dlpack(opened.read("t")), range(3)))
    assert all(array.tobytes() == data for array in arrays)


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_takes_every_dtype(tmp_path: Path, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    name, bits = DTYPES[dtype]
    data = bytes(at % 2 for at in range(24 * bits // 8))
    path = write(tmp_path / "x", pack({"t": entry(dtype, [3, 8], 0, len(data))}, data))
    with checkpoint.open(path) as opened:
        tensor = torch.from_dlpack(opened.read("t"))
    assert bytes(tensor.contiguous().view(torch.uint8).numpy()) == data
    if bits >= 8:
        assert str(tensor.dtype) == f"torch.{name}"
        assert tensor.shape == (3, 8)


def test_errors_are_omnimem_errors() -> None:
    assert issubclass(FormatError, Error)
    assert issubclass(FormatError, ValueError)
