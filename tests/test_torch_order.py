"""The declared order of units is the order of execution, so that no pass reads a byte twice."""

from __future__ import annotations

import time
from typing import Any

import pytest

from omnimem._units import execution_order, unit_names

from .torch_models import PRESETS, budget, floor, folder, forward, omnimem, torch, transformers

VISION = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
TEXT = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
SIGLIP = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


def small(kind: str) -> tuple[Any, dict[str, Any]]:
    """A model of that type with random weights, and a prompt with a picture for it."""
    picture, ids = 100, [3, *[100] * 4, 5]
    inputs: dict[str, Any] = {
        "pixel_values": torch.zeros(16, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }
    if kind == "qwen3_vl":
        vision = {
            **VISION,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "patch_size": 14,
            "deepstack_visual_indexes": [2, 0],
        }
        config = transformers.Qwen3VLConfig(
            text_config={**TEXT, **ROPE}, vision_config=vision, image_token_id=picture
        )
        made = transformers.Qwen3VLForConditionalGeneration(config)
    elif kind == "qwen2_5_vl":
        config = transformers.Qwen2_5_VLConfig(
            text_config={**TEXT, **ROPE},
            vision_config={**VISION, "out_hidden_size": 32, "fullatt_block_indexes": [1]},
            image_token_id=picture,
        )
        made = transformers.Qwen2_5_VLForConditionalGeneration(config)
    elif kind == "qwen2_vl":
        vision = {"depth": 3, "embed_dim": 32, "num_heads": 2, "hidden_size": 32, "mlp_ratio": 2}
        config = transformers.Qwen2VLConfig(
            text_config={**TEXT, **ROPE}, vision_config=vision, image_token_id=picture
        )
        made = transformers.Qwen2VLForConditionalGeneration(config)
    elif kind == "llava":
        config = transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**TEXT),
            vision_config=transformers.CLIPVisionConfig(**SIGLIP),
            image_token_index=picture,
        )
        made = transformers.LlavaForConditionalGeneration(config)
        inputs, ids = {"pixel_values": torch.zeros(1, 3, 32, 32)}, [3, *[100] * 16, 5]
    else:
        config = transformers.Gemma3Config(
            text_config={**TEXT, "model_type": "gemma3_text"},
            vision_config={**SIGLIP, "model_type": "siglip_vision_model"},
            mm_tokens_per_image=4,
            image_token_index=picture,
        )
        made = transformers.Gemma3ForConditionalGeneration(config)
        inputs = {"pixel_values": torch.zeros(1, 3, 32, 32)}
    inputs["input_ids"] = torch.tensor([ids])
    if kind != "llava":
        key = "token_type_ids" if kind == "gemma3" else "mm_token_type_ids"
        inputs[key] = (inputs["input_ids"] == picture).int()
    return made.eval(), inputs


@pytest.mark.parametrize("kind", ["qwen3_vl", "qwen2_5_vl", "qwen2_vl", "llava", "gemma3"])
def test_order_of_known_models(kind: str) -> None:
    model, inputs = small(kind)
    params = dict(model.named_parameters())
    declared = execution_order(unit_names(params).values(), model.config)
    assert sorted(declared) == sorted(set(unit_names(params).values()))
    ran: list[str] = []
    for name in declared:
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    with torch.no_grad():
        model(**inputs, use_cache=False)
    assert any("vis" in name for name in ran)
    assert [name for name in declared if name in ran] == list(dict.fromkeys(ran))


def test_order_of_unknown_models() -> None:
    names = ["visual.blocks.0", "visual.deepstack_merger_list.0", "embed_tokens", "layers.0"]
    for config in (None, object(), transformers.LlamaConfig(**TEXT)):
        assert execution_order([*names, "layers.0"], config) == names


def test_order_survives_a_config_that_is_wrong() -> None:
    names = ["visual.blocks.0", "visual.merger"]
    for indexes in ([7], [0, 1], []):
        config = transformers.Qwen3VLConfig(vision_config={"deepstack_visual_indexes": indexes})
        assert execution_order(names, config) == names
        assert execution_order([*names, "visual.deepstack_merger_list.0"], config)[0] == names[0]


def quiet_read_bytes(store: Any) -> int:
    """Bytes read so far, once nothing is in flight."""
    now, then = store.stats().read_bytes, -1
    while now != then:
        time.sleep(0.03)
        now, then = store.stats().read_bytes, now
    return int(now)


def bytes_ahead(model: Any) -> int:
    """Bytes of the first units of the next pass that are in memory already."""
    stream, ahead = model.omnimem, 0
    for unit in stream.plan().units:
        for index, run in enumerate(unit.runs):
            if run.resident:
                continue
            before = stream._store.stats().read_bytes
            stream._store.lease(f"{stream._units.group}/{unit.name}#{index}").release()
            if stream._store.stats().read_bytes != before:
                return ahead
            ahead += run.host_bytes
    return ahead


@pytest.mark.parametrize("percent", ["floor", 50, 75])
@pytest.mark.parametrize("preset", PRESETS)
def test_first_pass_reads_each_byte_once(preset: str, percent: int | str, io_backend: str) -> None:
    nbytes = floor(preset) if percent == "floor" else budget(preset, percent)
    model = omnimem.torch.load(folder(preset), nbytes, io_backend=io_backend)
    plan, store = model.omnimem.plan(), model.omnimem._store
    before = quiet_read_bytes(store)
    forward(model, preset)
    read, ahead = quiet_read_bytes(store) - before, bytes_ahead(model)
    assert ahead <= plan.ring_bytes
    assert plan.prefill_bytes <= read - ahead <= 1.05 * plan.prefill_bytes
    model.omnimem.close()
