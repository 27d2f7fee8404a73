"""The pipeline that `document_claims.py` measures, and what its child processes do with it.

Two multimodal models and a diffusion transformer: real architectures, widths as released and fewer
layers, about 1 GB of bfloat16 weights each, random, in folders that `save_pretrained` wrote. A
request is a picture and a text answered with a few tokens, or a few steps of denoising. It returns
the seconds of each step and a hash of every logit's, or latent's, bits. The n-th request to a model
is the same in every process.

Only child processes import this: torch is loaded here.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common import report, reset_peak, rotated, shards, tensors, weights

PICTURE = 448
KINDS = {"A": "qwen3-vl", "B": "gemma3", "C": "pixart"}
MEMORY_STAT = ("rss", "cache", "mapped_file", "swap")


@dataclass(frozen=True)
class Scale:
    """How large the models are and how long a request is."""

    layers: dict[str, int]
    """Decoder layers or transformer blocks of each model."""
    tower: int
    """Blocks of the vision towers."""
    vocabulary: int
    tokens: int
    """New tokens of a request to a multimodal model, the first one included."""
    steps: int
    """Denoising steps of a request to the diffusion transformer."""


SCALES = {
    "full": Scale({"A": 24, "B": 14, "C": 24}, 6, 32768, 6, 4),
    "quick": Scale({"A": 6, "B": 4, "C": 6}, 3, 4096, 4, 2),
}


# -- the three models ------------------------------------------------------------------------------


def _qwen3_vl(scale: Scale) -> Any:
    """Qwen3-VL: the text widths of Qwen3-0.6B, the vision tower of Qwen3-VL-2B."""
    from transformers import Qwen3VLConfig

    text = {
        "vocab_size": scale.vocabulary, "hidden_size": 1024, "intermediate_size": 3072,
        "num_hidden_layers": scale.layers["A"], "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 262144,
        "tie_word_embeddings": True, "dtype": "bfloat16",
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000000.0,
                            "mrope_interleaved": True, "mrope_section": [24, 20, 20]},
    }  # fmt: skip
    vision = {
        "depth": scale.tower, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16,
        "out_hidden_size": 1024, "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [0, 1, 2], "dtype": "bfloat16",
    }  # fmt: skip
    return Qwen3VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, dtype="bfloat16",
        image_token_id=5, video_token_id=6, vision_start_token_id=7, vision_end_token_id=8,
        architectures=["Qwen3VLForConditionalGeneration"],
    )  # fmt: skip


def _gemma3(scale: Scale) -> Any:
    """Gemma 3: the text widths of Gemma 3 1B, the SigLIP tower of the larger ones."""
    from transformers import Gemma3Config

    text = {
        "vocab_size": scale.vocabulary, "hidden_size": 1152, "intermediate_size": 6912,
        "num_hidden_layers": scale.layers["B"], "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512,
        "max_position_embeddings": 32768, "query_pre_attn_scalar": 256, "dtype": "bfloat16",
    }  # fmt: skip
    vision = {
        "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": scale.tower,
        "num_attention_heads": 16, "image_size": PICTURE, "patch_size": 14, "dtype": "bfloat16",
    }  # fmt: skip
    return Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=256, image_token_index=5,
        boi_token_index=7, eoi_token_index=8, dtype="bfloat16",
        architectures=["Gemma3ForConditionalGeneration"],
    )  # fmt: skip


def _pixart(scale: Scale) -> dict[str, Any]:
    """PixArt-Sigma's transformer for pictures of 256 pixels."""
    return {
        "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8,
        "num_layers": scale.layers["C"], "cross_attention_dim": 1152, "attention_bias": True,
        "sample_size": 32, "patch_size": 2, "caption_channels": 4096,
        "use_additional_conditions": False,
    }  # fmt: skip


def model_class(kind: str) -> Any:
    """The class of a model, by its letter."""
    if kind == "C":
        from diffusers import PixArtTransformer2DModel

        return PixArtTransformer2DModel
    import transformers

    return {"A": transformers.Qwen3VLForConditionalGeneration,
            "B": transformers.Gemma3ForConditionalGeneration}[kind]  # fmt: skip


def folder_of(root: Path, kind: str) -> Path:
    """Where the checkpoint of a model lies."""
    return root / KINDS[kind]


def make(root: Path, scale: Scale) -> None:
    """Write the three checkpoints, each once; a folder that has its config.json is whole."""
    for kind in KINDS:
        folder = folder_of(root, kind)
        if (folder / "config.json").exists():
            continue
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        former = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            if kind == "C":
                model = model_class(kind)(**_pixart(scale))
            else:
                model = model_class(kind)({"A": _qwen3_vl, "B": _gemma3}[kind](scale))
        finally:
            torch.set_default_dtype(former)
        draw = torch.Generator().manual_seed(ord(kind))
        with torch.no_grad():
            for name, param in model.named_parameters():
                usual = 1.0 if param.dim() < 2 and "norm" in name and "weight" in name else 0.0
                usual = 0.0 if kind == "B" and "vision" not in name else usual  # 1 + weight there
                spread = param.shape[-1] ** -0.5 if param.dim() > 1 else 0.02
                param.copy_(torch.randn(param.shape, generator=draw, dtype=torch.float32)
                            .mul_(spread).add_(usual))  # fmt: skip
        # Under the names of the modules: omnimem looks parameters up by them.
        own = {} if kind == "C" else {"save_original_format": False}
        model.save_pretrained(part, max_shard_size="300MB", **own)
        part.rename(folder)
        del model
        gc.collect()


# -- ways to load one ------------------------------------------------------------------------------


def mapped(root: Path, kind: str, **options: Any) -> Any:
    """As transformers and diffusers load it by themselves."""
    given = {"torch_dtype" if kind == "C" else "dtype": torch.bfloat16}
    return model_class(kind).from_pretrained(folder_of(root, kind), **given, **options).eval()


def resident(root: Path, kind: str) -> Any:
    """All weights in anonymous memory, and none of the files' page cache kept."""
    model = mapped(root, kind)
    for param in model.parameters():
        param.data = param.data.clone()
    gc.collect()
    for path in shards(folder_of(root, kind)):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return model


def skeleton(root: Path, kind: str) -> Any:
    """The model without its weights: parameters on the meta device, buffers filled."""
    from accelerate import init_empty_weights
    from safetensors import safe_open

    folder = folder_of(root, kind)
    former = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with init_empty_weights(include_buffers=False):
            cls = model_class(kind)
            if kind == "C":
                model = cls.from_config(cls.load_config(folder))
            else:
                model = cls(cls.config_class.from_pretrained(folder))
    finally:
        torch.set_default_dtype(former)
    if kind != "C":
        model.tie_weights()
    held = tensors(folder)
    for name, buffer in model.named_buffers():
        if name in held:
            with safe_open(held[name].file, "pt") as file:
                buffer.copy_(file.get_tensor(name))
    return model.eval()


# -- requests --------------------------------------------------------------------------------------


@dataclass
class Answer:
    """One request: seconds of each step, and a hash of all that came out."""

    steps: list[float]
    digest: str


def _hash(into: Any, tensor: torch.Tensor) -> None:
    into.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())


def _prompt(kind: str, turn: int) -> dict[str, torch.Tensor]:
    """A picture and 24 words, drawn anew for each turn."""
    draw = torch.Generator().manual_seed(1000 + turn)
    words = torch.randint(10, 1000, (24,), generator=draw).tolist()
    count = (PICTURE // 32) ** 2 if kind == "A" else 256
    ids = torch.tensor([[*words[:8], 7, *[5] * count, 8, *words[8:]]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind == "A":
        side = PICTURE // 16
        shape: tuple[int, ...] = (side * side, 3 * 2 * 16 * 16)
        inputs["image_grid_thw"] = torch.tensor([[1, side, side]])
        inputs["mm_token_type_ids"] = (ids == 5).long()
    else:
        shape = (1, 3, PICTURE, PICTURE)
        inputs["token_type_ids"] = (ids == 5).long()
    inputs["pixel_values"] = torch.randn(shape, generator=draw).to(torch.bfloat16)
    return inputs


def _speak(model: Any, kind: str, turn: int, count: int) -> Answer:
    """Prefill and decode greedily."""
    from transformers import DynamicCache

    inputs = _prompt(kind, turn)
    cache = DynamicCache(config=model.config)
    seen, times = hashlib.sha256(), []
    for _ in range(count):
        started = time.perf_counter()
        out = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1].argmax(-1)
        times.append(time.perf_counter() - started)
        _hash(seen, out.logits[:, -1])
        inputs = {"input_ids": token.view(1, 1)}
        kinds = "mm_token_type_ids" if kind == "A" else "token_type_ids"
        inputs[kinds] = torch.zeros(1, 1, dtype=torch.int64)
    return Answer(times, seen.hexdigest())


def _draw(model: Any, turn: int, count: int) -> Answer:
    """Denoise latents of a picture of 256 pixels, with 120 tokens of text."""
    from diffusers import DDIMScheduler

    noise = torch.Generator().manual_seed(1000 + turn)
    latents = torch.randn(1, 4, 32, 32, generator=noise).to(torch.bfloat16)
    text = torch.randn(1, 120, 4096, generator=noise).to(torch.bfloat16)
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(count)
    seen, times = hashlib.sha256(), []
    for moment in scheduler.timesteps:
        started = time.perf_counter()
        out = model(latents, encoder_hidden_states=text, timestep=moment[None],
                    added_cond_kwargs={"resolution": None, "aspect_ratio": None},
                    return_dict=False)[0]  # fmt: skip
        latents = scheduler.step(out.chunk(2, dim=1)[0], moment, latents).prev_sample
        times.append(time.perf_counter() - started)
        _hash(seen, latents)
    return Answer(times, seen.hexdigest())


def answer(model: Any, kind: str, turn: int, scale: Scale) -> Answer:
    """Serve the `turn`-th request to a model."""
    with torch.no_grad():
        if kind == "C":
            return _draw(model, turn, scale.steps)
        return _speak(model, kind, turn, scale.tokens)


# -- contenders ------------------------------------------------------------------------------------


@dataclass
class Pipeline:
    """The models of one contender, and how to end it."""

    models: dict[str, Any]
    facts: Callable[[], dict[str, Any]]
    close: Callable[[], None]


def _nothing() -> Any:
    return {}


def build(name: str, root: Path, budget: int, scratch: Path) -> Pipeline:
    """Load the three models the way of one contender; `budget` is bytes for all weights."""
    share = budget / sum(weights(folder_of(root, kind)) for kind in KINDS)
    if name in ("plain", "swap"):
        return Pipeline({kind: resident(root, kind) for kind in KINDS}, _nothing, _nothing)
    if name == "mmap":
        return Pipeline({kind: mapped(root, kind) for kind in KINDS}, _nothing, _nothing)
    if name == "accelerate":
        return _accelerate(root, share, scratch)
    if name == "omnimem-static":
        return _static(root, share)
    if name == "omnimem":
        return _managed(root, budget)
    raise ValueError(f"no contender {name!r}")


def _accelerate(root: Path, share: float, scratch: Path) -> Pipeline:
    """As much of each model as fits stays in memory, the rest is read when its module runs."""
    models, places = {}, {}
    for kind in KINDS:
        room = int(share * weights(folder_of(root, kind)))
        offload = scratch / f"offload-{kind}"
        models[kind] = mapped(root, kind, device_map="auto", max_memory={"cpu": room},
                              offload_folder=str(offload))  # fmt: skip
        found = [str(place) for place in models[kind].hf_device_map.values()]
        places[kind] = {place: found.count(place) for place in sorted(set(found))}
    return Pipeline(models, lambda: {"places": places}, _nothing)


def _static(root: Path, share: float) -> Pipeline:
    """Each model streams within its own fixed share of the budget."""
    import omnimem.torch

    models = {}
    for kind in KINDS:
        room = int(share * weights(folder_of(root, kind)))
        models[kind] = omnimem.torch.attach(skeleton(root, kind), folder_of(root, kind), room)

    def facts() -> dict[str, Any]:
        kept = ("bytes_read", "stall_seconds", "packed_bytes", "resident_bytes", "peak_bytes",
                "hits", "enters", "mispredicted")  # fmt: skip
        told = {}
        for kind, model in models.items():
            plan, stats = model.omnimem.plan(), model.omnimem.stats()
            told[kind] = {"compression": plan.compression, "reason": plan.reason,
                          **{key: stats[key] for key in kept}}  # fmt: skip
        return told

    def close() -> None:
        for model in models.values():
            model.omnimem.close()

    return Pipeline(models, facts, close)


def _managed(root: Path, budget: int) -> Pipeline:
    """One manager, one budget for all three."""
    import omnimem

    manager = omnimem.AdvancedMemoryManager(omnimem.AdvancedMemoryConfig(budget=budget))
    models = {kind: manager.attach(skeleton(root, kind), folder_of(root, kind)) for kind in KINDS}

    def facts() -> dict[str, Any]:
        return {kind: model.omnimem.stats() for kind, model in models.items()}

    return Pipeline(models, facts, manager.cleanup)


# -- what a child does -----------------------------------------------------------------------------


class Patience:
    """Ends the process with what it has when one request takes longer than `seconds`."""

    def __init__(self, seconds: float, result: dict[str, Any]) -> None:
        self.seconds = seconds
        self.result = result
        self.until: float | None = None
        threading.Thread(target=self._watch, daemon=True).start()

    def start(self, kind: str) -> None:
        """A request begins."""
        self.kind = kind
        self.until = time.monotonic() + self.seconds

    def stop(self) -> None:
        """It is answered."""
        self.until = None

    def _watch(self) -> None:
        while True:
            time.sleep(0.2)
            if self.until is not None and time.monotonic() > self.until:
                report({**self.result, "stopped": {"kind": self.kind, "after_s": self.seconds}})
                os._exit(0)


def own_memory(cgroup: str | None) -> dict[str, int]:
    """Bytes of this process and its cgroup: peaks since they were reset, and what is held now."""
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("VmHWM", "RssAnon", "RssFile", "VmSwap"):
            found[name] = int(value.split()[0]) * 1024
    if cgroup:
        found["cgroup_peak"] = int((Path(cgroup) / "memory.max_usage_in_bytes").read_text())
        for line in (Path(cgroup) / "memory.stat").read_text().splitlines():
            name, value = line.split()
            if name in MEMORY_STAT:
                found[f"cgroup_{name}"] = int(value)
    return found


def bytes_read() -> int:
    """Bytes that this process had the disk read, page faults and swap included."""
    text = Path("/proc/self/io").read_text()
    return int(text.split("read_bytes:")[1].split()[0])


def serve(args: argparse.Namespace) -> None:
    """Load the models, answer the schedule's requests, report."""
    with contextlib.suppress(ImportError):  # all that requests import, before the clock starts
        import diffusers  # noqa: F401
        import transformers  # noqa: F401
    scale = SCALES[args.scale]
    started = time.perf_counter()
    built = build(args.child, args.dir, args.budget_bytes, args.scratch)
    result: dict[str, Any] = {"load_s": time.perf_counter() - started, "requests": []}
    result["while_loading"] = own_memory(args.cgroup)
    reset_peak(args.cgroup)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM anew
    patience = Patience(args.patience, result)
    turns = dict.fromkeys(KINDS, 0)
    for kind in args.schedule:
        patience.start(kind)
        before, started = bytes_read(), time.perf_counter()
        done = answer(built.models[kind], kind, turns[kind], scale)
        seconds = time.perf_counter() - started
        patience.stop()
        turns[kind] += 1
        result["requests"].append({"kind": kind, "s": seconds, "read": bytes_read() - before,
                                   "steps": done.steps, "digest": done.digest})  # fmt: skip
    result["serving"] = own_memory(args.cgroup)
    result["facts"] = built.facts()
    built.close()
    report(result)


def latency(args: argparse.Namespace) -> None:
    """Plain and managed models in one process, request by request in turns."""
    scale = SCALES[args.scale]
    sides = {"plain": build("plain", args.dir, 0, args.scratch),
             "ours": build(args.contender, args.dir, args.budget_bytes,
                                    args.scratch)}  # fmt: skip
    steps: dict[str, dict[str, list[list[float]]]] = {
        side: {kind: [] for kind in KINDS} for side in sides
    }
    digests: dict[str, list[str]] = {side: [] for side in sides}
    for turn in range(args.repeats + 1):
        for kind in KINDS:
            for side in rotated(list(sides), turn):
                done = answer(sides[side].models[kind], kind, turn, scale)
                digests[side].append(done.digest)
                if turn:  # the first one warms up
                    steps[side][kind].append(done.steps)
    sides["ours"].close()
    report({"steps": steps, "identical": digests["plain"] == digests["ours"]})
