"""omnimem plan on folders of diffusers: a model by itself, and pipelines of several."""

from __future__ import annotations

import importlib.util
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

from omnimem import checkpoint
from omnimem._plan_layout import layout_of_names
from omnimem._plan_parts import parts_of
from omnimem.cli import main

MODEL = "diffusion_pytorch_model"
BLOCK = 64 << 10
needs_diffusers = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("torch", "transformers", "diffusers"))),
    reason="needs torch, transformers and diffusers",
)


def run_plan(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(["plan", *words]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def plan_json(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    return json.loads(run_plan(capsys, *words, "--json"))


def error_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(["plan", *words]) == 1
    return capsys.readouterr().err


@pytest.fixture
def by_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where no library is installed that could build the models."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)


def write(place: Path, config: dict[str, Any], stem: str, shards: list[dict[str, int]]) -> Path:
    """A model's folder: for each file the sizes of its tensors; with an index for several."""
    place.mkdir(parents=True)
    (place / "config.json").write_text(json.dumps(config))
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        count = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        header, at = {}, 0
        for name, nbytes in tensors.items():
            places = [at, at + nbytes]
            header[name] = {"dtype": "BF16", "shape": [nbytes // 2], "data_offsets": places}
            weight_map[name] = f"{stem}{count}.safetensors"
            at += nbytes
        text = json.dumps(header).encode()
        with (place / f"{stem}{count}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + at)
    if len(shards) > 1:
        index = place / f"{stem}.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return place


def denoiser(place: Path, shards: int = 1) -> Path:
    """Eight blocks, an embedding, a projection, and one of pictures."""
    tensors = [("pos_embed.proj.weight", 4096), ("image_embedder.weight", BLOCK)]
    tensors += [(f"transformer_blocks.{n}.ff.weight", BLOCK) for n in range(8)]
    tensors += [("proj_out.weight", 4096), ("scale_shift_table", 64)]
    files = [dict(tensors[at::shards]) for at in range(shards)]
    return write(place, {"_class_name": "SomeTransformer2DModel"}, MODEL, files)


def pipeline(place: Path) -> Path:
    """An encoder, a denoiser, a decoder; a scheduler, a tokenizer, and a part that is left out."""
    layers = {f"encoder.block.{n}.layer.weight": 4 * BLOCK for n in range(4)}
    config = {"architectures": ["T5EncoderModel"], "model_type": "t5"}
    write(place / "text_encoder", config, "model", [{"shared.weight": BLOCK, **layers}])
    denoiser(place / "transformer", shards=2)
    halves = {f"{half}.conv_in.weight": BLOCK for half in ("encoder", "decoder")}
    write(place / "vae", {"_class_name": "AutoencoderKL"}, MODEL, [halves])
    write(place / "elsewhere", {"_class_name": "Unnamed"}, MODEL, [halves])
    for name in ("scheduler", "tokenizer"):
        (place / name).mkdir()
        (place / name / f"{name}_config.json").write_text("{}")
    index = {
        "_class_name": "SomePipeline",
        "_diffusers_version": "0.42.1",
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "SomeTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (place / "model_index.json").write_text(json.dumps(index))
    return place


# ---- plain files, no library ----


@pytest.mark.usefixtures("by_names")
@pytest.mark.parametrize("shards", [1, 3])
def test_a_model_by_itself(shards: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = denoiser(tmp_path / "a model", shards)
    words = [str(place), "--ram", str(6 * BLOCK), "--no-measure", "--read-rate", "1MB/s"]
    told = plan_json(capsys, *words)
    assert (told["model"], told["generates"]) == ("SomeTransformer2DModel", False)
    assert (told["files"], told["ordered_by"]) == (shards, "names")
    assert told["weight_bytes"] == 9 * BLOCK + 2 * 4096 + 64
    units = [unit["name"] for unit in told["plans"][0]["units"]]
    blocks = [f"transformer_blocks.{n}" for n in range(8)]
    assert [unit for unit in units if unit in ("pos_embed", *blocks)] == ["pos_embed", *blocks]
    assert {*units} - {*blocks} == {"", "pos_embed", "image_embedder", "proj_out"}
    plan = told["plans"][0]
    image = next(unit for unit in plan["units"] if unit["name"] == "image_embedder")
    assert image["streamed_bytes"] > 0  # in each pass, too
    assert plan["pass_bytes"] == plan["prefill_bytes"] > plan["stream_bytes"]
    assert plan["seconds_per_pass"] == pytest.approx(plan["pass_bytes"] / 1e6)
    out = run_plan(capsys, *words)
    assert "read per pass" in out
    assert "time per pass, at least" in out
    assert "prefill" not in out
    assert "token" not in out


@pytest.mark.usefixtures("by_names")
def test_a_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = pipeline(tmp_path / "a pipeline")
    budget = 14 * BLOCK  # less than the encoder, more than each of the others
    told = plan_json(capsys, str(place), "--ram", str(budget), "--no-measure")
    assert told["model"] == "SomePipeline"
    assert list(told["parts"]) == ["text_encoder", "transformer", "vae"]
    for name, part in told["parts"].items():
        alone = plan_json(
            capsys, str(place / name), "--ram", str(budget), "--no-measure", "--compression", "off"
        )
        assert {**part, "model_dir": ""} == {**alone, "model_dir": ""}
    parts = told["parts"].values()
    assert told["weight_bytes"] == sum(part["weight_bytes"] for part in parts)
    assert told["least_bytes"] == max(part["least_bytes"] for part in parts)
    reads = [part["plans"][0]["pass_bytes"] for part in parts]
    assert reads[0] > 0
    assert reads[1:] == [0, 0]


@pytest.mark.usefixtures("by_names")
def test_a_pipeline_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = pipeline(tmp_path / "a pipeline")
    out = run_plan(capsys, str(place), "--ram", "50%", "--ram", "100%", "--no-measure")
    assert out.startswith(
        "a pipeline: SomePipeline, 1.76 MiB of weights in text_encoder, then transformer, then vae"
    )
    heads = [line.partition(":")[0] for line in out.splitlines() if " of weights (" in line]
    assert heads == ["text_encoder", "transformer", "vae"]
    assert "KiB: the part in use may have all of it; the others give way" in out
    assert "1.76 MiB: all parts stay in memory." in out
    assert len(next(s for s in out.splitlines() if s.startswith("budget")).split()) == 5


@pytest.mark.usefixtures("by_names")
def test_auto_keeps_nothing_encoded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A manager does not; who asks for it is told what it would be."""
    words = [str(pipeline(tmp_path / "p")), "--ram", str(14 * BLOCK)]
    for part in plan_json(capsys, *words)["parts"].values():
        assert part["rates"]["decode"] == {}
        assert part["plans"][0]["packed_bytes"] == 0
    asked = plan_json(capsys, *words, "--no-measure", "--compression", "fast")
    assert asked["parts"]["text_encoder"]["plans"][0]["packed_bytes"] > 0


@pytest.mark.usefixtures("by_names")
def test_what_is_wrong_names_the_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = pipeline(tmp_path / "p")
    words = [str(place), "--ram", str(2 * BLOCK), "--no-measure"]
    assert error_of(capsys, *words).startswith("omnimem: text_encoder: a budget of 131072 bytes")
    (place / "vae" / f"{MODEL}.safetensors").unlink()
    assert f"{place / 'vae'}: holds neither" in error_of(capsys, *words)
    for name in ("text_encoder", "transformer", "vae"):
        shutil.rmtree(place / name)
    assert "names no part that has a config.json" in error_of(capsys, *words)
    (place / "model_index.json").write_text("[]")
    assert "model_index.json" in error_of(capsys, *words)


def test_names_lead_nowhere_else(tmp_path: Path) -> None:
    place = pipeline(tmp_path / "p")
    index = json.loads((place / "model_index.json").read_text())
    denoiser(tmp_path / "outside")
    named = ["diffusers", "SomeTransformer2DModel"]
    index |= {"../outside": named, "..": named, str(tmp_path / "outside"): named}
    (place / "model_index.json").write_text(json.dumps(index))
    assert list(parts_of(place).folders) == ["text_encoder", "transformer", "vae"]


# ---- what the libraries build ----


@needs_diffusers
@pytest.mark.parametrize(
    "name",
    [
        "FluxPipeline",
        "KandinskyPipeline",
        "PixArtAlphaPipeline",
        "StableAudioPipeline",
        "StableDiffusion3Pipeline",
        "StableDiffusionXLPipeline",
        "StableVideoDiffusionPipeline",
        "WanImageToVideoPipeline",
    ],
)
def test_the_order_is_that_of_diffusers(name: str, tmp_path: Path) -> None:
    """Which moves a pipeline's parts to a GPU in the order of their use."""
    import diffusers

    order = getattr(diffusers, name).model_cpu_offload_seq.split("->")
    for part in order:
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text("{}")
    (tmp_path / "model_index.json").write_text(json.dumps({p: ["x", "y"] for p in sorted(order)}))
    assert list(parts_of(tmp_path).folders) == order


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline as diffusers saves it, with random weights."""
    import diffusers
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.random.fork_rng():
        torch.manual_seed(3)
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
                num_attention_heads=4, bos_token_id=1, eos_token_id=2,
            )
        )  # fmt: skip
        unet = diffusers.UNet2DConditionModel(
            block_out_channels=(32, 64), layers_per_block=1, sample_size=8, norm_num_groups=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=8,
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=64,
        )  # fmt: skip
        vae = diffusers.AutoencoderKL(
            block_out_channels=(32, 64), latent_channels=4, norm_num_groups=8,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        )  # fmt: skip
        pipe = diffusers.StableDiffusionPipeline(
            vae, text, None, unet,
            diffusers.DDIMScheduler(steps_offset=1, clip_sample=False), None, None,
            requires_safety_checker=False,
        )  # fmt: skip
    place = tmp_path_factory.mktemp("pipelines") / "a pipeline"
    pipe.to(torch.bfloat16).save_pretrained(place, max_shard_size="200KB")
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, cross_attention_dim=32, caption_channels=32,
        num_layers=4, sample_size=8,
    )  # fmt: skip
    transformer.to(torch.bfloat16).save_pretrained(place / "by itself")
    return place


@needs_diffusers
def test_parts_as_they_are_built(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = plan_json(capsys, str(built), "--ram", "100%", "--no-measure")
    assert told["model"] == "StableDiffusionPipeline"
    assert {name: part["model"] for name, part in told["parts"].items()} == {
        "text_encoder": "CLIPTextModel",
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
    }
    for name, part in told["parts"].items():
        assert part["ordered_by"] == "model"
        with checkpoint.open(built / name) as files:
            by_names = layout_of_names(files, built / name).units
            assert part["weight_bytes"] == files.total_bytes
        assert {unit["name"] for unit in part["plans"][0]["units"]} == set(by_names)
    assert told["parts"]["unet"]["files"] > 1


@needs_diffusers
@pytest.mark.parametrize("part", ["unet", "vae", "by itself"])
def test_the_plan_is_that_of_attach(
    part: str, built: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import diffusers
    import torch

    import omnimem.torch

    place = built / part
    words = ["--ram", "95%", "--no-measure", "--compression", "off"]
    told = plan_json(capsys, str(place), *words)
    plan = told["plans"][0]
    assert plan["pass_bytes"] > 0
    model = getattr(diffusers, told["model"]).from_pretrained(place, torch_dtype=torch.bfloat16)
    omnimem.torch.attach(model, place, plan["budget_bytes"], compression=None)
    made = model.omnimem._plan
    model.omnimem.close()
    assert [unit["name"] for unit in plan["units"]] == [unit.name for unit in made.units]
    for key in ("resident_bytes", "ring_bytes", "stream_bytes", "prefill_bytes"):
        assert plan[key] == getattr(made, key)


@needs_diffusers
def test_a_class_that_diffusers_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = error_of(capsys, str(denoiser(tmp_path / "model")), "--ram", "1GiB", "--no-measure")
    assert "has no class 'SomeTransformer2DModel'" in text
