"""The models that ``synth`` can make: configs of real architectures, real and small."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """One model that ``write`` can make."""

    model: str
    """Class in transformers."""
    text: dict[str, Any]
    """Arguments of the text config, or of the whole config for a text-only model."""
    vision: dict[str, Any] | None
    """Arguments of the vision config; None: text only."""
    tied: bool
    """Whether the head is the embedding."""
    shard_bytes: int
    """Largest shard."""


def _vl(
    sizes: tuple[int, int, int, int, int, int],
    vision: tuple[int, int, int, list[int]],
    *,
    tied: bool,
    vocabulary: int = 151936,
    shard_bytes: int = 5 * 10**9,
    sections: tuple[int, int, int] = (24, 20, 20),
    vision_heads: int = 16,
    positions: int = 2304,
) -> Preset:
    """Build a Qwen3-VL preset; sizes are hidden, layers, intermediate, heads, KV heads, head."""
    hidden, layers, intermediate, heads, kv_heads, head = sizes
    depth, vision_hidden, vision_intermediate, deepstack = vision
    text = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head,
        "max_position_embeddings": 262144,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5000000.0,
            "mrope_interleaved": True,
            "mrope_section": list(sections),
        },
    }
    tower = {
        "depth": depth,
        "hidden_size": vision_hidden,
        "intermediate_size": vision_intermediate,
        "num_heads": vision_heads,
        "out_hidden_size": hidden,
        "num_position_embeddings": positions,
        "deepstack_visual_indexes": deepstack,
    }
    return Preset("Qwen3VLForConditionalGeneration", text, tower, tied, shard_bytes)


_TINY_TEXT = {
    "vocab_size": 4096,
    "hidden_size": 128,
    "num_hidden_layers": 8,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
}

PRESETS: dict[str, Preset] = {
    "tiny": _vl(
        (128, 8, 384, 4, 2, 32),
        (4, 64, 192, [0, 1, 2]),
        tied=True,
        vocabulary=4096,
        shard_bytes=1_500_000,
        sections=(6, 5, 5),
        vision_heads=4,
        positions=64,
    ),
    "1gb": _vl(
        (2048, 6, 6144, 16, 8, 128),
        (4, 1024, 4096, [0, 1, 2]),
        tied=True,
        vocabulary=20480,
        shard_bytes=300 * 10**6,
    ),
    "2b": _vl((2048, 28, 6144, 16, 8, 128), (24, 1024, 4096, [5, 11, 17]), tied=True),
    "4b": _vl((2560, 36, 9728, 32, 8, 128), (24, 1024, 4096, [5, 11, 17]), tied=True),
    "8b": _vl((4096, 36, 12288, 32, 8, 128), (27, 1152, 4304, [8, 16, 24]), tied=False),
    "tiny-qwen3": Preset("Qwen3ForCausalLM", _TINY_TEXT, None, True, 1_500_000),
    "tiny-llama": Preset("LlamaForCausalLM", _TINY_TEXT, None, False, 5 * 10**9),
}
"""By name. The shapes of 2b, 4b and 8b are those of the released models; 1gb is the 2b with fewer
layers and a smaller vocabulary; the tiny ones are for tests."""
