"""omnimem.synth: folders that transformers loads, the same bytes for the same seed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from omnimem import checkpoint, synth  # noqa: E402
from omnimem.errors import DiskFullError  # noqa: E402


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synth.write("tiny", tmp_path_factory.mktemp("models") / "tiny")


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize("preset", ["tiny", "tiny-qwen3", "tiny-llama"])
def test_transformers_takes_every_key(tmp_path: Path, preset: str) -> None:
    folder = synth.write(preset, tmp_path / preset)
    assert synth.is_complete(folder, preset)
    model_class = getattr(transformers, synth.PRESETS[preset].model)
    model, report = model_class.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(report.values()), report
    assert model.dtype == torch.bfloat16
    assert model.config.tie_word_embeddings is synth.PRESETS[preset].tied
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        logits = model(input_ids=ids).logits.float()
    assert torch.isfinite(logits).all()
    assert logits.std() > 0.3
    assert len(set(logits.argmax(-1)[0].tolist())) > 1
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "What is in this image? déjà vu, 日本 <|im_end|>\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_special_ids_match_the_config(tiny: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(tiny)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    for token, field in {
        "<|image_pad|>": "image_token_id",
        "<|video_pad|>": "video_token_id",
        "<|vision_start|>": "vision_start_token_id",
        "<|vision_end|>": "vision_end_token_id",
    }.items():
        number = getattr(config, field)
        assert tokenizer.convert_tokens_to_ids(token) == number < config.text_config.vocab_size
        assert tokenizer(f"a{token}b").input_ids.count(number) == 1
    generation = transformers.GenerationConfig.from_pretrained(tiny)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in generation.eos_token_id
    assert tokenizer.eos_token_id in generation.eos_token_id


def test_large_vocabularies_have_the_real_ids(tmp_path: Path) -> None:
    from omnimem._synth_text import special_ids, write_tokenizer

    assert special_ids(151936)["<|image_pad|>"] == 151655
    assert special_ids(151936)["<|vision_start|>"] == 151652
    write_tokenizer(tmp_path, 151936)
    tokenizer = transformers.Qwen2Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") == 151644
    assert tokenizer.decode(tokenizer("one picture").input_ids) == "one picture"
    assert len(tokenizer) == 151643 + 14


def test_shards_are_laid_out_as_real_ones(tiny: Path) -> None:
    opened = checkpoint.open(tiny)
    assert len(opened.files) > 2
    index = json.loads((tiny / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == opened.total_bytes
    assert "lm_head.weight" not in opened
    homes = {
        unit.name: {opened.info(name).file for name in unit.tensors} for unit in opened.units()
    }
    assert any(len(files) > 1 for files in homes.values()), "no unit straddles two shards"
    assert sum(name.startswith("model.language_model.layers.") for name in homes) >= 6
    assert sum(name.startswith("model.visual.blocks.") for name in homes) >= 3
    by_file: dict[str, list[str]] = {}
    for name in opened.names():
        by_file.setdefault(opened.info(name).file, []).append(name)
    assert all(names == sorted(names) for names in by_file.values())


def test_same_seed_same_bytes_and_no_tensor_twice(tiny: Path, tmp_path: Path) -> None:
    assert weights(synth.write("tiny", tmp_path / "again")) == weights(tiny)
    assert weights(synth.write("tiny", tmp_path / "other", seed=1)) != weights(tiny)
    assert synth.is_complete(tmp_path / "other", "tiny", 1)
    assert not synth.is_complete(tmp_path / "other", "tiny", 0)
    opened = checkpoint.open(tiny)
    seen: dict[bytes, str] = {}
    for name in opened.names():
        info = opened.info(name)
        data = Path(info.file).read_bytes()[info.offset : info.offset + info.nbytes]
        assert data not in seen, (name, seen.get(data))
        seen[data] = name


def test_values_are_normal() -> None:
    bits = synth._draw((0, 1, 2), 1 << 18, 0.0, 0.5).astype(np.uint32) << 16
    values = bits.view(np.float32)
    assert abs(values.mean()) < 0.01
    assert values.std() == pytest.approx(0.5, rel=0.02)
    exact = torch.tensor(synth._standard() * 0.5, dtype=torch.float32).to(torch.bfloat16)
    assert (synth._quantiles(0.0, 0.5) == exact.view(torch.uint16).numpy()).all()
    assert len(synth._draw((0, 1, 3), 5, 0.0, 1.0)) == 5


def test_one_shard_has_no_index_and_rewriting_leaves_no_rest(tmp_path: Path) -> None:
    folder = synth.write("tiny", tmp_path)
    assert (folder / "model.safetensors.index.json").exists()
    synth.write("tiny", tmp_path, max_shard_bytes=1 << 30)
    assert list(weights(folder)) == ["model.safetensors"]
    assert not (folder / "model.safetensors.index.json").exists()
    assert synth.is_complete(folder, "tiny")
    os.truncate(folder / "model.safetensors", 100)
    assert not synth.is_complete(folder, "tiny")
    assert not synth.is_complete(tmp_path / "gone", "tiny")


def test_progress_counts_all_bytes(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    folder = synth.write(
        "tiny-llama", tmp_path, progress=lambda done, all: seen.append((done, all))
    )
    total = checkpoint.open(folder).total_bytes
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="preset='3b' must be one of tiny, 1gb"):
        synth.write("3b", tmp_path)
    with pytest.raises(ValueError, match="max_shard_bytes=0"):
        synth.write("tiny", tmp_path, max_shard_bytes=0)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="not made here"):
        synth.write("tiny", tmp_path)
    assert (tmp_path / "config.json").read_text() == "{}"
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(synth.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DiskFullError, match=r"needs .* bytes, the file system has 1000 free"):
        synth.write("tiny", tmp_path / "full")


def test_an_interrupted_write_is_not_complete(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise Stop

    with pytest.raises(Stop):
        synth.write("tiny", tmp_path, progress=stop)
    assert not synth.is_complete(tmp_path, "tiny")
    assert synth.is_complete(synth.write("tiny", tmp_path), "tiny")
    assert not list(tmp_path.glob("*.partial"))


def test_importing_needs_no_torch() -> None:
    code = "import sys, omnimem.synth; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("preset", "billions"), [("1gb", 0.499), ("2b", 2.128), ("4b", 4.438), ("8b", 8.767)]
)
def test_large_presets_have_the_published_size(preset: str, billions: float) -> None:
    _, shapes = synth._build(synth.PRESETS[preset])
    count = sum(int(np.prod(shape)) for shape in shapes.values())
    assert count / 1e9 == pytest.approx(billions, abs=0.001)
