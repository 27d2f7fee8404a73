"""omnimem plan: the very plan that load makes, from headers, and what it says about it."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

if not all(map(importlib.util.find_spec, ("torch", "transformers"))):
    pytest.skip("needs torch and transformers", allow_module_level=True)

import omnimem
import omnimem.torch
from omnimem import _plan_survey, checkpoint, packed
from omnimem._plan_layout import layout_of_names
from omnimem._plan_survey import Survey, fold, survey
from omnimem.cli import main
from omnimem.config import CacheConfig
from omnimem.plan import Rates

from .torch_models import (
    LARGE,
    PRESETS,
    SMALL_HEAD,
    budget,
    floor,
    folder,
)

ALL = (*PRESETS, SMALL_HEAD)
RATES = Rates(
    read=1e9,
    compute=20e9,
    decode={"fast": 8e9, "balanced": 3e9},
    share={"fast": 0.7, "balanced": 0.66},
)


@pytest.fixture
def fixed_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates that are the same each time, so that plans can be compared."""
    monkeypatch.setattr(_plan_survey, "measure_plan", lambda *_: RATES)
    monkeypatch.setattr(omnimem.torch, "measure_plan", lambda *_: RATES)


def run_plan(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()  # what making the models said
    assert main(["plan", *words]) == 0, capsys.readouterr().err
    out, err = capsys.readouterr()
    assert err == ""
    return out


def plan_json(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    return json.loads(run_plan(capsys, *words, "--json"))


def error_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(["plan", *words]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    return err


# ---- the same plan ----


@pytest.mark.parametrize("preset", ALL)
def test_names_tell_what_the_model_does(preset: str) -> None:
    where = folder(preset)
    with checkpoint.open(where) as files:
        by_names, by_model = layout_of_names(files, where), omnimem.torch.layout(files, where)
    assert list(by_names.units) == list(by_model.units)
    assert by_names.repeats == by_model.repeats
    for unit, tensors in by_model.units.items():
        assert set(by_names.units[unit]) == set(tensors)


@pytest.mark.parametrize("preset", ALL)
@pytest.mark.parametrize("compression", ["off", "fast", "balanced"])
@pytest.mark.usefixtures("fixed_rates")
def test_the_plan_is_that_of_load(
    preset: str, compression: str, capsys: pytest.CaptureFixture[str]
) -> None:
    mode = None if compression == "off" else compression
    budgets = [budget(preset, percent) for percent in ("floor", 40, 70, 100)]
    words = [word for nbytes in budgets for word in ("--ram", str(nbytes))]
    told = plan_json(capsys, str(folder(preset)), *words, "--compression", compression)
    found = survey(folder(preset), budgets, compression=mode)
    for nbytes, forecast, plan in zip(budgets, found.forecasts, told["plans"], strict=True):
        model = omnimem.torch.load(folder(preset), nbytes, compression=mode)
        made = model.omnimem._plan
        model.omnimem.close()
        assert forecast.plan == made
        assert plan["budget_bytes"] == nbytes
        for key in ("resident_bytes", "packed_bytes", "ring_bytes", "stream_bytes",
                    "prefill_bytes", "decode_bytes", "compression", "reason"):  # fmt: skip
            assert plan[key] == getattr(made, key)
        assert [unit["name"] for unit in plan["units"]] == [unit.name for unit in made.units]
    if compression != "off":
        assert any(plan["packed_bytes"] for plan in told["plans"])


@pytest.mark.usefixtures("fixed_rates")
def test_auto_decides_as_load_does() -> None:
    """A model that reads enough per token for the rates to be asked."""
    nbytes = budget(LARGE, 50)
    found = survey(folder(LARGE), [nbytes])
    model = omnimem.torch.load(folder(LARGE), nbytes)
    made = model.omnimem._plan
    model.omnimem.close()
    assert made.stream_bytes or made.packed_bytes
    assert "measured: disk 1.00 GB/s" in made.reason
    assert found.forecasts[0].plan == made
    assert found.forecasts[0].pass_seconds == made.seconds_per_pass


def test_real_rates(capsys: pytest.CaptureFixture[str]) -> None:
    told = plan_json(capsys, str(folder(LARGE)), "--ram", "50%")
    assert told["measured"] is True
    assert set(told["rates"]["decode"]) == {"fast", "balanced"}
    assert all(told["rates"][key] > 0 for key in ("read", "compute", "proof"))
    plan = told["plans"][0]
    assert plan["seconds_per_pass"] > 0
    assert plan["seconds_per_pass"] * told["rates"]["read"] >= 0.99 * plan["stream_bytes"]
    assert math.isclose(plan["prefill_read_seconds"] * told["rates"]["read"], plan["prefill_bytes"])


def test_a_packed_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = tmp_path / "small"
    packed.pack(folder("tiny-llama"), small, "fast")
    nbytes = budget("tiny-llama", 70)
    words = [str(small), "--ram", str(nbytes), "--no-measure"]
    told = plan_json(capsys, *words, "--compression", "fast")
    assert told["coding"] == "fast"
    assert 0.6 < told["file_bytes"] / told["weight_bytes"] < 0.8
    assert told["rates"]["share"]["fast"] == pytest.approx(
        told["file_bytes"] / told["weight_bytes"], rel=1e-3
    )  # known from the headers: nothing to assume
    assert not any("assumed" in note for note in told["notes"])
    told = plan_json(capsys, *words, "--compression", "off")
    model = omnimem.torch.load(small, nbytes, compression=None)
    assert told["plans"][0]["stream_bytes"] == model.omnimem._plan.stream_bytes
    model.omnimem.close()
    assert "packed (fast) in" in run_plan(capsys, *words)


# ---- what is not known ----


def test_without_measuring(capsys: pytest.CaptureFixture[str]) -> None:
    where = str(folder("tiny-qwen3"))
    words = [where, "--ram", str(budget("tiny-qwen3", 70)), "--no-measure"]
    told = plan_json(capsys, *words)
    assert (told["schema"], told["measured"], told["rates"]) == (1, False, None)
    assert told["plans"][0]["seconds_per_pass"] is None
    assert told["notes"] == ["nothing was measured; leave out --no-measure to know more"]
    out = run_plan(capsys, *words)
    assert "Nothing was measured" in out
    assert "time per token" not in out
    told = plan_json(capsys, *words, "--read-rate", "2MB/s")
    plan = told["plans"][0]
    assert (told["rates"]["read"], told["rates"]["compute"]) == (2e6, None)
    assert plan["seconds_per_pass"] == pytest.approx(plan["stream_bytes"] / 2e6)
    assert plan["prefill_read_seconds"] == pytest.approx(plan["prefill_bytes"] / 2e6)
    assert "at least" in run_plan(capsys, *words, "--read-rate", "2MB/s")


def test_the_ratio_is_assumed_until_something_is_measured(
    capsys: pytest.CaptureFixture[str],
) -> None:
    where = str(folder("tiny-llama"))
    words = [where, "--ram", str(budget("tiny-llama", 60)), "--no-measure", "--compression", "fast"]
    told = plan_json(capsys, *words)
    assert told["rates"]["share"] == {"fast": CacheConfig().compression_ratio}
    assert told["notes"][0].startswith("assumed: what is kept encoded takes 50 % of its size")
    more = plan_json(capsys, *words, "--compression-ratio", "0.9")
    assert more["rates"]["share"] == {"fast": 0.9}
    assert more["plans"][0]["stream_bytes"] > told["plans"][0]["stream_bytes"]


@pytest.mark.usefixtures("fixed_rates")
def test_a_given_rate_wins(capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(folder(LARGE)), "--ram", "50%", "--compression", "off"]
    told = plan_json(capsys, *words, "--read-rate", "10MB/s")
    assert told["rates"]["read"] == 1e7
    assert told["rates"]["compute"] == RATES.compute
    assert told["plans"][0]["seconds_per_pass"] == told["plans"][0]["stream_bytes"] / 1e7


@pytest.mark.parametrize("gone", ["torch", "transformers"])
def test_without_frameworks(
    gone: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nbytes = budget("tiny", 60)
    words = [str(folder("tiny")), "--ram", str(nbytes), "--compression", "off"]
    whole = plan_json(capsys, *words)
    real = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> Any:
        return None if name == gone else real(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    told = plan_json(capsys, *words)
    assert (whole["ordered_by"], told["ordered_by"]) == ("model", "names")
    assert told["notes"][0].startswith(f"{gone} is not installed: units are told by their names")
    assert (told["rates"]["compute"] is None) == (gone == "torch")
    assert told["plans"][0]["units"] == whole["plans"][0]["units"]
    assert ("at least" in run_plan(capsys, *words)) == (gone == "torch")


def test_headers_alone_need_no_torch(tmp_path: Path) -> None:
    """Nothing of torch is imported where it is not installed."""
    from .conftest import run_clean

    out = run_clean(
        "import sys, importlib.util as u\n"
        "real = u.find_spec\n"
        "u.find_spec = lambda name, package=None: "
        "None if name in ('torch', 'transformers') else real(name, package)\n"
        "from omnimem.cli import main\n"
        "code = main(sys.argv[1:])\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "sys.exit(code)",
        "plan", str(folder("tiny")), "--ram", "50%", "--ram", "100%",
    )  # fmt: skip
    assert "Torch is not installed" in out


# ---- what people see ----


def test_a_table_of_budgets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    out = run_plan(
        capsys, str(folder("tiny")), "--ram", "2MiB", "--ram", "60%", "--ram", "1GiB",
        "--no-measure", "--compression", "off",
    )  # fmt: skip
    assert out.startswith("tiny: Qwen3VLForConditionalGeneration, 5.28 MiB of weights (bfloat16)")
    head = next(line for line in out.splitlines() if line.startswith("budget"))
    assert head.split() == ["budget", "2.00", "MiB", "3.17", "MiB", "1.00", "GiB"]
    assert "streamed" not in out  # units are for one budget
    many = run_plan(capsys, str(folder("tiny")), *["--ram", "2MiB"] * 9, "--no-measure")
    assert len(re.findall(r"^budget", many, re.MULTILINE)) == 1
    monkeypatch.setenv("COLUMNS", "80")
    many = run_plan(capsys, str(folder("tiny")), *["--ram", "2MiB"] * 9, "--no-measure")
    assert len(re.findall(r"^budget", many, re.MULTILINE)) == 3
    heads = [line for line in many.splitlines() if line.startswith("budget")]
    assert sum(line.count("2.00 MiB") for line in heads) == 9
    assert "…" not in many
    assert f"The least budget is 1.77 MiB ({floor('tiny')} bytes)." in out


@pytest.mark.parametrize("columns", [80, 120])
def test_equal_layers_are_folded(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    out = run_plan(
        capsys, str(folder("tiny")), "--ram", str(budget("tiny", 60)),
        "--no-measure", "--compression", "off",
    )  # fmt: skip
    lines = out.splitlines()
    assert max(map(len, lines)) <= columns
    layers = next(line for line in lines if line.startswith("language_model.layers 0-7"))
    assert layers.split()[2:6] == ["8", "x", "384.62", "KiB"]
    assert sum(line.startswith("visual.blocks") for line in lines) == 1
    assert any(line.startswith("language_model.embed_tokens (x2)") for line in lines)


def test_folding() -> None:
    found: Survey = survey(folder("tiny"), [budget("tiny", 60)], compression=None, measure=False)
    plan = found.forecasts[0].plan
    rows = fold(plan)
    layers = next(row for row in rows if row.name.endswith("layers"))
    assert layers.numbers == tuple(range(8))
    kinds = (layers.resident, layers.packed, layers.streamed, layers.partly)
    assert sorted(number for kind in kinds for number in kind) == list(range(8))
    assert layers.resident
    assert layers.streamed
    by_name = {unit.name: unit for unit in plan.units}
    assert layers.partly
    for number in layers.partly:
        unit = by_name[f"{layers.name}.{number}"]
        assert 0 < unit.resident_bytes < unit.host_bytes
    for number in layers.streamed:
        assert by_name[f"{layers.name}.{number}"].resident_bytes == 0
    assert sum(row.nbytes * (len(row.numbers) or 1) for row in rows) == plan.weight_bytes


# ---- what is refused ----


def test_a_budget_below_the_least(capsys: pytest.CaptureFixture[str]) -> None:
    for more in ([], ["--ram", "1GiB"]):
        text = error_of(capsys, str(folder("tiny")), "--ram", "100KiB", *more)
        assert f"below the least, {floor('tiny')} bytes (1.77 MiB)" in text
    assert "--ram='lots'" in error_of(capsys, str(folder("tiny")), "--ram", "lots")


def write_tensors(place: Path, names: list[str]) -> None:
    place.mkdir(exist_ok=True)
    header = {
        name: {"dtype": "BF16", "shape": [4], "data_offsets": [8 * at, 8 * at + 8]}
        for at, name in enumerate(names)
    }
    text = json.dumps(header).encode()
    data = bytes(8 * len(names))
    (place / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_folders_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "model"
    words = [str(place), "--ram", "1GiB", "--no-measure"]
    assert "no such file or folder" in error_of(capsys, *words)
    write_tensors(place, ["model.embed_tokens.weight"])
    assert "has no config.json, which says what model" in error_of(capsys, *words)
    file = str(place / "model.safetensors")
    assert "name the model's folder" in error_of(capsys, file, *words[1:])
    (place / "config.json").write_text("{}")
    assert "Build it yourself, and give it to omnimem." in error_of(capsys, *words)
    (place / "config.json").write_text('{"model_type": "qwen3"}')
    assert "transformers has no class []" in error_of(capsys, *words)
    write_tensors(place, [])
    assert "holds no tensors" in error_of(capsys, *words)


def test_a_mixture_of_experts_is_refused_as_load_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tensors(tmp_path, ["model.layers.0.mlp.experts.0.up_proj.weight"])
    (tmp_path / "config.json").write_text('{"architectures": ["Qwen3MoeForCausalLM"]}')
    text = error_of(capsys, str(tmp_path), "--ram", "1GiB")
    with pytest.raises(ValueError, match="mixture of experts") as caught:
        omnimem.torch.load(tmp_path, "1GiB")
    assert text == f"omnimem: {caught.value}\n"


def test_a_checkpoint_that_lacks_parameters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder("tiny-llama"), tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    config["num_hidden_layers"] += 1
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    text = error_of(capsys, str(tmp_path / "model"), "--ram", "1GiB")
    assert "does not hold the model LlamaForCausalLM" in text


@pytest.mark.parametrize(
    "words",
    [
        ["x"],
        ["x", "--ram", "1GiB", "--read-rate", "fast"],
        ["x", "--ram", "1GiB", "--read-rate", "0"],
        ["x", "--ram", "1GiB", "--compression", "zip"],
        ["x", "--ram", "1GiB", "--compression-ratio", "0"],
    ],
)
def test_wrong_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 2
    assert "Usage: omnimem plan" in capsys.readouterr().err


def test_weights_are_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file whose data cannot be read: a hole that is larger than any memory."""
    place = tmp_path / "huge"
    shutil.copytree(folder("tiny-llama"), place)
    config = json.loads((place / "config.json").read_text())
    with checkpoint.open(folder("tiny-llama")) as files:
        shapes = {name: files.info(name).shape for name in files.names()}
    wide, config["vocab_size"] = 1 << 33, 1 << 33
    header, at = {}, 0
    for name, shape in shapes.items():
        shape = (wide, shape[1]) if "embed" in name or "lm_head" in name else shape
        end = at + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    for old in place.glob("model*"):
        old.unlink()
    with (place / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    (place / "config.json").write_text(json.dumps(config))
    told = plan_json(capsys, str(place), "--ram", "5TiB", "--no-measure", "--read-rate", "1GB/s")
    assert told["weight_bytes"] == at
