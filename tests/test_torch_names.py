"""Checkpoints whose tensors are not named as the module's parameters: transformers renames them."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from omnimem import checkpoint
from omnimem._plan_survey import survey

from .torch_models import assert_idle, omnimem, our_threads, root, same_bits, torch, transformers

safetensors = pytest.importorskip("safetensors.torch")

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 320,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SIGLIP = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
PICTURE = 300
"""The token that stands for a part of a picture."""


def _gemma3() -> Any:
    vision = {**SIGLIP, "model_type": "siglip_vision_model"}
    return transformers.Gemma3Config(
        text_config={**TEXT, "sliding_window": 16},
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_id=PICTURE,
    )


def _llava() -> Any:
    vision = {**SIGLIP, "model_type": "clip_vision_model", "projection_dim": 32}
    return transformers.LlavaConfig(
        text_config={**TEXT, "model_type": "llama"},
        vision_config=vision,
        image_token_id=PICTURE,
        vision_feature_layer=-1,
    )


def _paligemma() -> Any:
    return transformers.PaliGemmaConfig(
        text_config={**TEXT, "model_type": "gemma"},
        vision_config={**SIGLIP, "model_type": "siglip_vision_model", "projection_dim": 64},
        image_token_id=PICTURE,
        projection_dim=64,
        hidden_size=64,
    )


def _qwen(config: Any, **vision: Any) -> Any:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3]}
    return config(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config={"depth": 2, "num_heads": 2, **vision},
        image_token_id=PICTURE,
        vision_start_token_id=301,
        vision_end_token_id=302,
    )


def _qwen2_5_vl() -> Any:
    return _qwen(
        transformers.Qwen2_5_VLConfig,
        hidden_size=32,
        intermediate_size=64,
        out_hidden_size=64,
        fullatt_block_indexes=[1],
    )


def _qwen2_vl() -> Any:
    return _qwen(transformers.Qwen2VLConfig, embed_dim=32, hidden_size=64)


def _qwen3_vl() -> Any:
    return _qwen(
        transformers.Qwen3VLConfig,
        hidden_size=32,
        intermediate_size=64,
        out_hidden_size=64,
        deepstack_visual_indexes=[0],
    )


def _mllama() -> Any:
    return transformers.MllamaConfig(
        text_config={
            **TEXT,
            "vocab_size": 320,
            "cross_attention_layers": [1],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
            "vision_output_dim": 64,
            "intermediate_layers_indices": [0],
            "max_num_tiles": 1,
            "supported_aspect_ratios": [[1, 1]],
        },
        image_token_index=PICTURE,
    )


def _make(kind: str, config: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return getattr(transformers, kind)(config).to(torch.bfloat16).eval()


FAMILIES: dict[str, tuple[Callable[[], Any], str]] = {
    "Gemma3ForConditionalGeneration": (_gemma3, "language_model.model.layers.0"),
    "LlavaForConditionalGeneration": (_llava, "language_model.model.layers.0"),
    "PaliGemmaForConditionalGeneration": (_paligemma, "language_model.model.layers.0"),
    "Qwen2_5_VLForConditionalGeneration": (_qwen2_5_vl, "model.layers.0"),
    "Qwen2VLForConditionalGeneration": (_qwen2_vl, "model.layers.0"),
    "Qwen3VLForConditionalGeneration": (_qwen3_vl, "model.language_model.layers.0"),
    "MllamaForConditionalGeneration": (_mllama, "language_model.model.layers.0"),
}
"""How each is made, and where the file has its first layer."""


@functools.cache
def saved(kind: str) -> Path:
    """As transformers writes it unasked, which is with the old names."""
    place = root() / "names" / kind
    _make(kind, FAMILIES[kind][0]()).save_pretrained(place)
    return place


def inputs(kind: str) -> dict[str, Any]:
    ids = [1, 5, 9, PICTURE, PICTURE, PICTURE, PICTURE, 11, 12]
    more: dict[str, Any] = {}
    torch.manual_seed(3)
    if kind.startswith("Qwen"):
        ids = [1, 5, 301, PICTURE, 302, 11]
        patch = 3 * 2 * (16 if "3" in kind else 14) ** 2
        more["pixel_values"] = torch.randn(4, patch).to(torch.bfloat16)
        more["image_grid_thw"] = torch.tensor([[1, 2, 2]])
        more["mm_token_type_ids"] = torch.tensor([[int(one == PICTURE) for one in ids]])
    elif kind.startswith("Mllama"):
        more["pixel_values"] = torch.randn(1, 1, 1, 3, 28, 28).to(torch.bfloat16)
        more["aspect_ratio_ids"] = torch.ones(1, 1, dtype=torch.long)
        more["aspect_ratio_mask"] = torch.ones(1, 1, 1, dtype=torch.long)
        ids[3:7] = [PICTURE, 6, 7, 8]
    else:
        more["pixel_values"] = torch.randn(1, 3, 28, 28).to(torch.bfloat16)
        if kind.startswith(("Gemma3", "Pali")):
            more["token_type_ids"] = torch.tensor([[int(one == PICTURE) for one in ids]])
    return {"input_ids": torch.tensor([ids]), **more}


def run(model: Any, given: dict[str, Any]) -> Any:
    with torch.no_grad():
        out = model(**given)[0]
    assert out.isfinite().all()
    return out


def plain(kind: str, where: Path) -> Any:
    return getattr(transformers, kind).from_pretrained(where, dtype="auto").eval()


def least(where: Path) -> int:
    with pytest.raises(omnimem.LimitError) as caught:
        omnimem.torch.load(where, 4096)
    return int(caught.value.need)


def rewrite(where: Path, to: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a checkpoint whose tensors are changed."""
    to.mkdir()
    tensors = safetensors.load_file(where / "model.safetensors")
    change(tensors)
    safetensors.save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    (to / "config.json").write_text((where / "config.json").read_text())
    return to


def names_of(where: Path) -> list[str]:
    with checkpoint.open(where) as files:
        return files.names()


BY = ("load", "attach", "managed")


@contextlib.contextmanager
def served(by: str, model: Any, where: Path, budget: int) -> Iterator[Any]:
    """The weights from a checkpoint, within a budget."""
    if by == "managed":
        config = omnimem.AdvancedMemoryConfig(budget="64MiB", enable_monitoring=False)
        with omnimem.AdvancedMemoryManager(config) as manager:
            yield manager.attach(model, where, room=budget)
        return
    if by == "load":
        model = omnimem.torch.load(where, budget)
    else:
        assert omnimem.torch.attach(model, where, budget) is model
    yield model
    assert_idle(model)
    model.omnimem.close()


def error_of(by: str, model: Any, where: Path) -> Exception:
    """It is refused, and nothing has changed."""
    before = [(id(p), p.data_ptr()) for p in model.parameters()]
    with pytest.raises((ValueError, omnimem.Error)) as caught, served(by, model, where, 1 << 20):
        raise AssertionError("not refused")
    assert [(id(p), p.data_ptr()) for p in model.parameters()] == before
    assert not hasattr(model, "omnimem")
    assert our_threads() == []
    return caught.value


# -- renamed


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("kind", FAMILIES)
def test_the_same_bits(kind: str, by: str) -> None:
    where = saved(kind)
    assert any(name.startswith(f"{FAMILIES[kind][1]}.") for name in names_of(where))
    model, given = plain(kind, where), inputs(kind)
    want = run(model, given)
    for param in model.parameters() if by != "load" else ():
        param.data = torch.zeros_like(param)  # nothing is left of what transformers read
    with served(by, model, where, least(where)) as streaming:
        assert same_bits(run(streaming, given), want)
        assert same_bits(run(streaming, given), want)


@pytest.mark.parametrize(
    "kind", ["Gemma3ForConditionalGeneration", "LlavaForConditionalGeneration"]
)
def test_a_level_that_is_gone(kind: str, tmp_path: Path) -> None:
    """Older files have one more name inside the vision tower."""

    def older(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.startswith("vision_tower.")]:
            tensors[name.replace(".", ".vision_model.", 1)] = tensors.pop(name)

    where = rewrite(saved(kind), tmp_path / "model", older)
    want = run(plain(kind, where), inputs(kind))
    assert same_bits(want, run(plain(kind, saved(kind)), inputs(kind)))
    with served("attach", plain(kind, where), where, least(where)) as model:
        assert same_bits(run(model, inputs(kind)), want)


class Scaled(torch.nn.Module):
    """Its parameter is called as transformers' rules for old files expect no parameter to be."""

    def __init__(self) -> None:
        super().__init__()
        self.weight_g = torch.nn.Parameter(torch.rand(64))

    def forward(self, x: Any) -> Any:
        return x * self.weight_g


class Own(transformers.PreTrainedModel):
    config_class = transformers.LlamaConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.first, self.scaled = torch.nn.Linear(64, 64), Scaled()
        self.post_init()

    def forward(self, x: Any) -> Any:
        return (self.scaled(self.first(x)),)


def test_a_name_that_a_rule_would_spoil(tmp_path: Path) -> None:
    Own(transformers.LlamaConfig(**TEXT)).save_pretrained(
        tmp_path / "model", save_original_format=False
    )
    assert "scaled.weight_g" in names_of(tmp_path / "model")
    model, given = Own.from_pretrained(tmp_path / "model"), {"x": torch.ones(2, 64)}
    want = run(model, given)
    model.scaled.weight_g.data = torch.zeros(64)
    with served("managed", model, tmp_path / "model", 1 << 20):
        assert same_bits(run(model, given), want)


# -- with and without a head

IDS = {"input_ids": torch.tensor([[1, 5, 9, 11]])}


def llama(tied: bool, kind: str = "LlamaForCausalLM") -> Any:
    return _make(kind, transformers.LlamaConfig(**TEXT, tie_word_embeddings=tied))


@pytest.mark.parametrize("by", ["attach", "managed"])
def test_a_head_on_a_bare_model(by: str, tmp_path: Path) -> None:
    where = tmp_path / "model"
    llama(True, "LlamaModel").save_pretrained(where)
    assert "layers.0.mlp.up_proj.weight" in names_of(where)
    model = plain("LlamaForCausalLM", where)
    want = run(model, IDS)
    with served(by, model, where, least(where)):
        assert same_bits(run(model, IDS), want)
    untied = llama(False)
    error = error_of(by, untied, where)
    assert isinstance(error, omnimem.FormatError)
    assert "lacks 1 parameters of the model: lm_head.weight" in str(error)


@pytest.mark.parametrize("by", ["attach", "managed"])
def test_a_bare_model_of_one_with_a_head(by: str, tmp_path: Path) -> None:
    where = tmp_path / "model"
    llama(False).save_pretrained(where)
    model = plain("LlamaModel", where)
    want = run(model, IDS)
    with served(by, model, where, least(where)):
        assert same_bits(run(model, IDS), want)


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("stored", ["embedding", "head", "both"])
def test_a_tied_head(stored: str, by: str, tmp_path: Path) -> None:
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"

    def change(tensors: dict[str, Any]) -> None:
        assert head not in tensors
        if stored != "embedding":
            tensors[head] = tensors[embedding].clone()
        if stored == "head":
            del tensors[embedding]

    llama(True).save_pretrained(tmp_path / "saved")
    where = rewrite(tmp_path / "saved", tmp_path / "model", change)
    model = plain("LlamaForCausalLM", where)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    want = run(model, IDS)
    with served(by, model, where, least(where)) as streaming:
        assert same_bits(run(streaming, IDS), want)


def test_a_head_that_is_not_tied_yet(tmp_path: Path) -> None:
    llama(True).save_pretrained(tmp_path / "model")
    model = llama(True)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    error = error_of("attach", model, tmp_path / "model")
    assert "lm_head.weight" in str(error)
    assert "model.tie_weights()" in str(error)


PLAIN = """
import sys
import torch
import safetensors.torch
import omnimem

where = sys.argv[1]
torch.manual_seed(1)
model = torch.nn.ModuleDict({"a": torch.nn.Linear(64, 64), "b": torch.nn.Linear(64, 64)})
model["b"].weight = model["a"].weight
tensors = {"b.weight": model["a"].weight, "a.bias": model["a"].bias, "b.bias": model["b"].bias}
safetensors.torch.save_file(tensors | {"more": torch.ones(3)}, where)
x = torch.ones(2, 64)
want = model["b"](model["a"](x))
config = omnimem.AdvancedMemoryConfig(budget="64MiB", enable_monitoring=False)
with omnimem.AdvancedMemoryManager(config) as manager:
    manager.attach(model, where)
    assert torch.equal(model["b"](model["a"](x)), want)
assert "transformers" not in sys.modules
print("right")
"""


def test_a_module_of_torch_alone(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(tmp_path / "weights.safetensors")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout == "right\n", done.stderr


# -- refused

GEMMA = "Gemma3ForConditionalGeneration"
OLD = "language_model.model.layers.0.mlp.up_proj.weight"
OWN = "model.language_model.layers.0.mlp.up_proj.weight"


def _missing(tensors: dict[str, Any]) -> None:
    tensors["language_model.model.layers.0.mlp.another.weight"] = tensors.pop(OLD)


def _other_shape(tensors: dict[str, Any]) -> None:
    tensors[OLD] = tensors[OLD].T.contiguous()


def _other_dtype(tensors: dict[str, Any]) -> None:
    tensors[OLD] = tensors[OLD].to(torch.float16)


MISFITS: dict[str, tuple[Callable[[dict[str, Any]], None], type[Exception], str]] = {
    "missing": (
        _missing,
        omnimem.FormatError,
        f"lacks 1 parameters of the model: {re.escape(OWN)}; of its tensors 1 are no .*another",
    ),
    "shape": (
        _other_shape,
        omnimem.FormatError,
        rf"{re.escape(OWN)} \({re.escape(OLD)}\) has shape \(64, 128\) .* \(128, 64\) in the model",
    ),
    "dtype": (
        _other_dtype,
        ValueError,
        rf"{re.escape(OWN)} \({re.escape(OLD)}\) is float16 .*bfloat16.*cast",
    ),
}


@pytest.mark.parametrize("by", ["attach", "managed"])
@pytest.mark.parametrize("how", MISFITS)
def test_a_checkpoint_that_does_not_fit(how: str, by: str, tmp_path: Path) -> None:
    change, kind, text = MISFITS[how]
    where = rewrite(saved(GEMMA), tmp_path / "model", change)
    error = error_of(by, plain(GEMMA, saved(GEMMA)), where)
    assert isinstance(error, kind)
    assert re.search(text, str(error)), error


@pytest.mark.parametrize("by", BY)
def test_what_the_model_has_no_use_for(by: str, tmp_path: Path) -> None:
    where = rewrite(
        saved(GEMMA), tmp_path / "model", lambda held: held.update(more=torch.ones(4096))
    )
    want = run(plain(GEMMA, saved(GEMMA)), inputs(GEMMA))
    with served(by, plain(GEMMA, saved(GEMMA)), where, least(where)) as model:
        assert same_bits(run(model, inputs(GEMMA)), want)


def fused(where: Path) -> Any:
    """A model whose query, key and value are one tensor in its checkpoint."""
    sizes = {name: size for name, size in TEXT.items() if name != "num_key_value_heads"}
    model = _make("NomicBertModel", transformers.NomicBertConfig(**sizes))
    model.save_pretrained(where)
    return model


def test_what_transformers_computes(tmp_path: Path) -> None:
    """The error names the tensor and the call that helps, which does help."""
    kind, where = "NomicBertModel", tmp_path / "it's fused"
    model = fused(where)
    want = run(plain(kind, where), IDS)
    errors = [str(error_of(by, model, where)) for by in BY]
    with pytest.raises(ValueError, match="Wqkv") as caught:
        survey(where, [1 << 20])
    assert {str(caught.value), *errors} == {errors[0]}
    assert "encoder.layers.0.attn.Wqkv.weight is no parameter of NomicBertModel" in errors[0]
    assert "layers.0.self_attn.q_proj.weight of it" in errors[0]
    assert "Chunk(dim=0)" in errors[0]
    advice = re.search(r"NomicBertModel\.from_pretrained\(.*\.save_pretrained\(.*\)", errors[0])
    assert advice is not None
    place = tmp_path / "own"
    exec(advice[0], {"NomicBertModel": transformers.NomicBertModel, "NEW_FOLDER": place})
    for by in BY:
        with served(by, plain(kind, where), place, least(place)) as served_model:
            assert same_bits(run(served_model, IDS), want)


def test_nothing_is_computed_before_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused(tmp_path / "model")

    def chunk(*_: Any, **__: Any) -> Any:
        raise AssertionError("computed")

    monkeypatch.setattr(transformers.core_model_loading.Chunk, "convert", chunk)
    with pytest.raises(ValueError, match="Wqkv"):
        omnimem.torch.load(tmp_path / "model", "1MiB")


@pytest.mark.parametrize("by", [*BY, "survey"])
def test_quantised(by: str, tmp_path: Path) -> None:
    def quantise(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if "_proj" in name]:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.ones(1, 1)

    model = llama(False)
    model.save_pretrained(tmp_path / "plain")
    where = rewrite(tmp_path / "plain", tmp_path / "model", quantise)
    config = json.loads((where / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (where / "config.json").write_text(json.dumps(config))
    if by == "survey":
        with pytest.raises(ValueError, match="quantised") as caught:
            survey(where, [1 << 20])
        text = str(caught.value)
    else:
        text = str(error_of(by, model, where))
    assert "quantised (fp8)" in text
    assert re.search(r"layers\.0\.\S*_proj\.weight is float8_e4m3fn, and would have to be", text)
    pytest.importorskip("accelerate", reason="transformers loads quantised models with accelerate")
    transformers.LlamaForCausalLM.from_pretrained(where, dtype=torch.bfloat16).save_pretrained(
        tmp_path / "own", save_original_format=False
    )
    own = plain("LlamaForCausalLM", tmp_path / "own")
    want = run(own, IDS)
    with served("attach", own, tmp_path / "own", least(tmp_path / "own")):
        assert same_bits(run(own, IDS), want)


# -- told ahead


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_plan_is_the_same_under_either_names(kind: str, tmp_path: Path) -> None:
    model = plain(kind, saved(kind))
    model.save_pretrained(tmp_path / "own", save_original_format=False)
    own = {name for name, _ in model.named_parameters()}
    assert own <= set(names_of(tmp_path / "own"))
    plans = []
    for where in (saved(kind), tmp_path / "own"):
        found = survey(where, [1 << 20], compression=None, measure=False)
        assert found.ordered_by == "model"
        assert found.weight_bytes == sum(p.nbytes for p in model.parameters())
        assert found.dtypes == {"bfloat16": found.weight_bytes}
        assert found.least_bytes == least(where)
        plan = found.forecasts[0].plan
        assert {tensor.name for unit in plan.units for tensor in unit.tensors} == own
        plans.append([(unit.name, unit.nbytes, unit.repeats) for unit in plan.units])
    assert plans[0] == plans[1]
