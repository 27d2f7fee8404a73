"""omnimem.processor: the same inputs as transformers' own processor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")

from omnimem import synth  # noqa: E402
from omnimem.processor import load_tokenizer, prepare  # noqa: E402


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synth.write("tiny", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "gradient.png"
    image = Image.linear_gradient("L").resize((448, 448))
    Image.merge("RGB", (image, image.rotate(90), image.rotate(180))).save(path)
    return path


def test_with_a_picture(tiny: Path, picture: Path) -> None:
    inputs = prepare(tiny, "What do you see?", picture)
    assert set(inputs) == {
        "input_ids",
        "attention_mask",
        "mm_token_type_ids",
        "pixel_values",
        "image_grid_thw",
    }
    config = json.loads((tiny / "config.json").read_text())
    assert inputs["image_grid_thw"].tolist() == [[1, 28, 28]]
    assert inputs["pixel_values"].shape == (784, 3 * 2 * 16 * 16)
    assert torch.isfinite(inputs["pixel_values"]).all()
    marked = inputs["input_ids"][0] == config["image_token_id"]
    assert int(marked.sum()) == 28 * 28 // 4
    assert inputs["mm_token_type_ids"].tolist() == [marked.int().tolist()]
    ids = inputs["input_ids"][0].tolist()
    first = ids.index(config["image_token_id"])
    assert ids[first - 1] == config["vision_start_token_id"]
    assert ids[first + 196] == config["vision_end_token_id"]
    text = load_tokenizer(tiny).decode([i for i in ids if i != config["image_token_id"]])
    assert text == (
        "<|im_start|>user\n<|vision_start|><|vision_end|>What do you see?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("size", [(448, 448), (640, 300), (100, 900)])
def test_same_as_the_real_processor(tiny: Path, size: tuple[int, int]) -> None:
    """The real class, its missing video part apart, must give the same tensors."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

    class NoVideo(Qwen3VLProcessor):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return ["image_processor", "tokenizer"]

        def __init__(self, image_processor: object, tokenizer: object) -> None:
            for name, value in {
                "image_processor": image_processor,
                "tokenizer": tokenizer,
                "image_token": "<|image_pad|>",
                "video_token": "<|video_pad|>",
                "image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"),
                "video_token_id": tokenizer.convert_tokens_to_ids("<|video_pad|>"),
                "chat_template": tokenizer.chat_template,
            }.items():
                setattr(self, name, value)

    tokenizer = load_tokenizer(tiny)
    real = NoVideo(Qwen2VLImageProcessorPil.from_pretrained(tiny), tokenizer)
    image = Image.effect_noise(size, 90).convert("RGB")
    content = [{"type": "image"}, {"type": "text", "text": "Describe the picture, déjà vu?"}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    expected = real(text=[text], images=[image], return_tensors="pt")
    got = prepare(tiny, "Describe the picture, déjà vu?", image)
    assert set(expected) == set(got)
    for name, value in got.items():
        assert torch.equal(torch.as_tensor(expected[name]).to(value.dtype), value), name


def test_kinds_of_pictures(tiny: Path, picture: Path, tmp_path: Path) -> None:
    import numpy as np

    image = Image.open(picture)
    by_path = prepare(tiny, "x", str(picture))["pixel_values"]
    assert torch.equal(by_path, prepare(tiny, "x", image)["pixel_values"])
    assert torch.equal(by_path, prepare(tiny, "x", np.asarray(image))["pixel_values"])
    image.convert("L").save(tmp_path / "grey.png")
    assert prepare(tiny, "x", tmp_path / "grey.png")["pixel_values"].shape == by_path.shape
    image.convert("RGBA").save(tmp_path / "alpha.png")
    assert torch.equal(by_path, prepare(tiny, "x", tmp_path / "alpha.png")["pixel_values"])


def test_text_only(tiny: Path, tmp_path: Path) -> None:
    inputs = prepare(tiny, "Hello")
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert inputs["attention_mask"].all()
    (tmp_path / "llama").mkdir()
    folder = synth.write("tiny-llama", tmp_path / "llama")
    tokenizer = load_tokenizer(folder)
    text = tokenizer.decode(prepare(folder, "Hello", tokenizer=tokenizer)["input_ids"][0])
    assert text == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    (folder / "chat_template.jinja").rename(folder / "kept")
    assert load_tokenizer(folder).decode(prepare(folder, "Hello")["input_ids"][0]) == "Hello"
    template = (folder / "kept").read_text()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert load_tokenizer(folder).decode(prepare(folder, "Hello")["input_ids"][0]) == text


def test_refusals(tiny: Path, picture: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 places for a picture"):
        prepare(tiny, "look at <|image_pad|>", picture)
    with pytest.raises(FileNotFoundError):
        prepare(tiny, "x", tmp_path / "gone.png")
    folder = synth.write("tiny-qwen3", tmp_path / "text")
    with pytest.raises(ValueError, match="'qwen3' takes no pictures"):
        prepare(folder, "x", picture)


def test_the_model_takes_it(tiny: Path, picture: Path) -> None:
    model = transformers.Qwen3VLForConditionalGeneration.from_pretrained(tiny, dtype="auto")
    inputs = prepare(tiny, "What do you see?", picture)
    made = model.generate(
        **inputs,
        max_new_tokens=3,
        min_new_tokens=3,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert made.sequences.shape[1] == inputs["input_ids"].shape[1] + 3
    logits = torch.stack(made.logits).float()
    assert torch.isfinite(logits).all()
    blank = prepare(tiny, "What do you see?", Image.new("RGB", (448, 448)))
    other = model.generate(
        **blank, max_new_tokens=1, output_logits=True, return_dict_in_generate=True
    )
    assert not torch.equal(other.logits[0], made.logits[0]), "the picture makes no difference"
