"""omnimem.cli: exit codes, one line for an error, synth, pack, run and demo."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import omnimem
from omnimem.cli import demo as demo_module
from omnimem.cli import main
from omnimem.cli._common import parse_budget, process_memory
from omnimem.errors import Error

needs_models = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("torch", "transformers", "PIL"))),
    reason="needs torch, transformers and pillow",
)
needs_stream = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("omnimem._core", "omnimem.torch"))),
    reason="needs the built core and the torch face",
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from omnimem import synth

    return synth.write("tiny", tmp_path_factory.mktemp("models") / "tiny")


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """Return what went to stderr, which must be one line, with nothing on stdout."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("omnimem: "), err
    assert err.count("\n") == 1, err
    return err


# ---- the command line itself ----


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert omnimem.__version__ in capsys.readouterr().out
    for words in (["--help"], ["run", "--help"], ["synth", "-h"], ["demo", "--help"],
                  ["pack", "-h"], ["unpack", "-h"], ["plan", "-h"], ["doctor", "-h"],
                  ["config", "-h"]):  # fmt: skip
        assert main(words) == 0
        assert "Usage: omnimem" in capsys.readouterr().out


def test_commands_are_told_in_the_order_of_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    told = capsys.readouterr().out.partition("Commands:\n")[2].splitlines()
    names = [line.split()[0] for line in told]
    assert names == ["run", "plan", "doctor", "pack", "unpack", "synth", "config", "demo"]


@pytest.mark.parametrize(
    "words",
    [
        ["walk"],
        ["doctor", "now"],
        ["plan", "x"],
        ["run"],
        ["run", "x"],
        ["run", "x", "--budget", "1GiB"],
        ["run", "x", "--budget", "1GiB", "--prompt", "p", "--max-new-tokens", "0"],
        ["run", "x", "--budget", "1GiB", "--prompt", "p", "--verify", "never"],
        ["run", "x", "--budget", "1GiB", "--prompt", "p", "--io-backend", "aio"],
        ["synth", "--preset", "3b", "x"],
        ["synth", "--preset", "tiny"],
        ["demo", "--preset", "tiny-llama"],
        ["pack", "x"],
        ["pack", "x", "y", "--coding", "zip"],
        ["pack", "x", "y", "--threads", "0"],
        ["unpack", "x"],
        ["unpack", "x", "y", "--coding", "fast"],
        ["--verbose"],
    ],
)
def test_wrong_usage_is_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Usage:" in err


def test_missing_folder_is_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(tmp_path / "gone"), "--budget", "1GiB", "--prompt", "x"]) == 1
    assert str(tmp_path / "gone") in error_line(capsys)
    assert main(["run", str(tmp_path), "--budget", "1GiB", "--prompt", "x"]) == 1
    assert "holds neither model.safetensors nor" in error_line(capsys)


def test_damaged_checkpoint_is_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    assert main(["run", str(tmp_path), "--budget", "1GiB", "--prompt", "x"]) == 1
    assert "over the format's limit" in error_line(capsys)


def test_bad_values_are_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    for budget in ("lots", "5 parsecs", "-1", "%", "0", "-5%"):
        assert main(["run", str(tmp_path), f"--budget={budget}", "--prompt", "x"]) == 1
        assert "budget=" in error_line(capsys)
    words = ["run", str(tmp_path), "--budget", "1GiB", "--prompt", "x", "--image", "gone.png"]
    assert main(words) == 1
    assert "gone.png: no such picture" in error_line(capsys)
    assert main(["demo", "--dir", str(tmp_path / "demo"), "--budget", "half"]) == 1
    assert "budget='half'" in error_line(capsys)
    assert not (tmp_path / "demo").exists()


def test_interrupt_is_130(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    def interrupt(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("omnimem.checkpoint.open", interrupt)
    assert main(["run", str(tmp_path), "--budget", "1GiB", "--prompt", "x"]) == 130
    assert capsys.readouterr().err.strip() == "omnimem: interrupted"


def test_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("transformers", "transformers.utils", "transformers.utils.logging"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["synth", "--preset", "tiny", str(tmp_path)]) == 1
    assert "pip install 'omnimem[transformers]'" in error_line(capsys)


def test_importing_needs_no_torch() -> None:
    code = (
        "import sys, omnimem.cli; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_module_entry() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "omnimem.cli", "run", "/gone", "--budget", "1", "--prompt", "x"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr == "omnimem: /gone: no such file or folder; give the path of a checkpoint\n"


def test_budgets() -> None:
    assert parse_budget("50%", 1000) == 500
    assert parse_budget(" 12.5 % ", 1000) == 125
    assert parse_budget("100%", 999) == 999
    assert parse_budget("2GiB", 1) == 2 << 30
    assert parse_budget("4096", 1) == 4096
    assert process_memory("VmHWM") >= process_memory("VmRSS") > 1 << 20
    with pytest.raises(OSError, match="no VmNothing"):
        process_memory("VmNothing")


# ---- synth ----


@needs_models
def test_synth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from omnimem import checkpoint

    place = tmp_path / "a" / "b"
    assert main(["synth", "--preset", "tiny", str(place)]) == 0
    assert str(place) in capsys.readouterr().out
    assert len(checkpoint.open(place)) > 100
    (place / "omnimem_synth.json").unlink()
    assert main(["synth", "--preset", "tiny", str(place)]) == 1
    assert "was not made here" in capsys.readouterr().err


# ---- pack and unpack ----


@needs_models
@pytest.mark.parametrize("words", [[], ["--coding", "fast"], ["--threads", "1"]])
def test_pack_and_unpack(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    small, again = tmp_path / "small", tmp_path / "again"
    assert main(["pack", str(tiny), str(small), *words]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{small}: 5.29 MiB in 3.")
    assert "times smaller" in out
    assert err == ""
    assert main(["unpack", str(small), str(again)]) == 0
    assert "SHA-256 as packed" in capsys.readouterr().out
    names = sorted(path.name for path in tiny.iterdir() if path.is_file())
    assert sorted(path.name for path in again.iterdir()) == names
    for name in names:
        assert (again / name).read_bytes() == (tiny / name).read_bytes()


@needs_models
def test_pack_refuses_in_one_line(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = tmp_path / "small"
    assert main(["pack", str(tmp_path / "gone"), str(small)]) == 1
    assert "gone: no such file or folder" in error_line(capsys)
    assert main(["unpack", str(tiny), str(small)]) == 1
    assert "nothing to unpack" in error_line(capsys)
    assert main(["pack", str(tiny), str(small)]) == 0
    capsys.readouterr()
    assert main(["pack", str(small), str(tmp_path / "smaller")]) == 1
    assert "is packed already" in error_line(capsys)
    assert main(["pack", str(tiny), str(small)]) == 1
    assert "is not empty" in error_line(capsys)
    assert not (tmp_path / "smaller").exists()


# ---- demo ----


def figures(**changes: Any) -> dict[str, Any]:
    return {
        "tokens": [1, 2],
        "logits_dtype": "torch.float32",
        "logits_shape": [2, 4],
        "idle_bytes": 1 << 20,
        "peak_bytes": 4 << 20,
        "load_seconds": 0.5,
        "first_seconds": 0.25,
        "token_seconds": None,
        "bytes_per_pass": 3 << 20,
        "planned_bytes_per_pass": 3 << 20,
        "io_backend": "threads",
        "io_reason": "asked for",
        **changes,
    }


@needs_models
@pytest.mark.parametrize(
    ("ours", "flipped", "code", "shown"),
    [
        ({}, False, 0, "identical tokens.*yes.*identical logits.*yes"),
        ({}, True, 1, "identical tokens.*yes.*identical logits.*NO"),
        ({"tokens": [1, 3]}, False, 1, "identical tokens.*NO.*identical logits.*yes"),
        ({"logits_shape": [1, 8]}, False, 1, "identical logits.*NO"),
        ({"logits_dtype": "torch.int32"}, False, 1, "identical logits.*NO"),
    ],
)
def test_demo_tells_differences(
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ours: dict[str, Any],
    flipped: bool,
    code: int,
    shown: str,
) -> None:
    """One bit, one token, a shape or a type that differs: exit code 1."""
    import re

    def fake(contender: str, folder: Path, picture: Path, budget: int, place: Path) -> Any:
        assert picture.stat().st_size > 1000
        raw = bytearray(b"logits of every step")
        if contender == "omnimem" and flipped:
            raw[7] ^= 1
        (place / f"{contender}.npy").write_bytes(raw)
        return figures(**(ours if contender == "omnimem" else {}))

    monkeypatch.setattr(demo_module, "run_worker", fake)
    assert main(["demo", "--dir", str(tiny), "--preset", "tiny"]) == code
    out = capsys.readouterr().out
    assert re.search(shown, out, re.DOTALL), out
    for text in ("bytes of weights", "peak memory", "3.00 MiB", "threads: asked for", "0.250 s"):
        assert text in out


@needs_models
def test_plain_worker(tiny: Path, tmp_path: Path) -> None:
    import numpy as np

    picture = tmp_path / "picture.png"
    demo_module.draw_picture(picture)
    result = demo_module.run_worker("plain", tiny, picture, 1, tmp_path)
    assert len(result["tokens"]) == demo_module.TOKENS
    assert len(set(result["tokens"])) > 1
    assert result["logits_shape"] == [demo_module.TOKENS, 4096]
    logits = np.load(tmp_path / "plain.npy").view(np.float32)
    assert logits.shape == (demo_module.TOKENS, 4096)
    assert logits.argmax(-1).tolist() == result["tokens"]
    assert result["peak_bytes"] > result["idle_bytes"] > 0


@needs_models
def test_failed_worker_is_one_line(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(Error, match=r"the plain run failed: FileNotFoundError: .*gone\.png"):
        demo_module.run_worker("plain", tiny, tmp_path / "gone.png", 1, tmp_path)


@needs_models
@needs_stream
def test_demo_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Makes the checkpoint, runs both, finds the same bits, keeps what it was told to keep."""
    words = ["demo", "--dir", str(tmp_path / "m"), "--preset", "tiny", "--budget", "60%", "--keep"]
    assert main(words) == 0, capsys.readouterr()
    out = capsys.readouterr().out
    assert "identical tokens" in out
    assert "NO" not in out
    kept = json.loads((tmp_path / "m" / "demo" / "omnimem.json").read_text())
    assert kept["io_backend"] in ("uring", "threads")
    plain, ours = (tmp_path / "m" / "demo" / f"{name}.npy" for name in ("plain", "omnimem"))
    assert plain.read_bytes() == ours.read_bytes()
    written = (tmp_path / "m" / "config.json").stat().st_mtime_ns
    assert main(words) == 0
    assert (tmp_path / "m" / "config.json").stat().st_mtime_ns == written


# ---- run ----


@needs_models
@needs_stream
@pytest.mark.parametrize("backend", ["auto", "threads"])
def test_run(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], backend: str) -> None:
    picture = tmp_path / "picture.png"
    demo_module.draw_picture(picture)
    words = ["run", str(tiny), "--budget", "60%", "--prompt", "What is it?", "--max-new-tokens"]
    assert main([*words, "5", "--image", str(picture), "--io-backend", backend]) == 0
    out, err = capsys.readouterr()
    assert out.strip()
    for text in ("peak memory", "bytes of weights", "bytes read per pass", "time to first token"):
        assert text in err
    assert main([*words, "1", "--verify", "first"]) == 0


@needs_models
@needs_stream
def test_run_below_the_floor_is_1(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(tiny), "--budget", "100KiB", "--prompt", "x"]) == 1
    assert "omnimem: " in capsys.readouterr().err


def test_text_appears_as_whole_characters(capsys: pytest.CaptureFixture[str]) -> None:
    from omnimem.cli.run import _TextWriter

    class Tokenizer:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return bytes(ids).decode("utf-8", "replace")

    writer = _TextWriter(Tokenizer())
    ids: list[int] = []
    shown = []
    for byte in "aé!".encode():
        ids.append(byte)
        writer.update(ids)
        shown.append(capsys.readouterr().out)
    assert shown == ["a", "", "é", "!"]
    writer.update([*ids, 0xFF])
    writer.finish()
    assert capsys.readouterr().out == "\ufffd\n"
