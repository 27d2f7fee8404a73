"""Small models for the tests of the torch face: checkpoints, plain transformers, what it says."""

from __future__ import annotations

import atexit
import copy
import functools
import os
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any, NamedTuple

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import omnimem  # noqa: E402
import omnimem.torch  # noqa: E402
from omnimem import checkpoint, synth  # noqa: E402
from omnimem.processor import prepare  # noqa: E402

PAGE = 4096
PRESETS = ("tiny", "tiny-qwen3", "tiny-llama")
SMALL_HEAD = "small-head"
"""Qwen3 with a tied embedding that is smaller than a layer, so that it streams too."""
LARGE = "large"
"""The same with 120 MB in 24 layers, so that its memory shows in what the process holds."""
_OWN = {
    SMALL_HEAD: {},
    LARGE: {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 24},
}


class Said(NamedTuple):
    """What a model generated."""

    tokens: Any
    logits: tuple[Any, ...]


@functools.cache
def root() -> Path:
    path = Path(tempfile.mkdtemp(prefix="omnimem-test-models-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@functools.cache
def folder(preset: str) -> Path:
    """The checkpoint, made once a process; copy it before changing it."""
    place = root() / preset
    if preset in _OWN:
        config = transformers.Qwen3Config(
            **{**synth.PRESETS["tiny-qwen3"].text, "vocab_size": 512, **_OWN[preset]},
            tie_word_embeddings=True,
            dtype="bfloat16",
        )
        with torch.random.fork_rng():
            torch.manual_seed(5)
            transformers.Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(place)
    else:
        synth.write(preset, place)
    return place


@functools.cache
def plain(preset: str) -> Any:
    """Plain transformers; for reading only."""
    where = folder(preset)
    name = transformers.AutoConfig.from_pretrained(where).architectures[0]
    return getattr(transformers, name).from_pretrained(where, dtype="auto").eval()


@functools.cache
def weight_bytes(preset: str) -> int:
    with checkpoint.open(folder(preset)) as files:
        return files.total_bytes


@functools.cache
def floor(preset: str) -> int:
    """The least budget, as the error tells it."""
    with pytest.raises(omnimem.LimitError) as caught:
        omnimem.torch.load(folder(preset), 4096)
    return caught.value.need


def budget(preset: str, percent: int | str) -> int:
    """A share of the weights, or the least where that is more."""
    if percent == "floor":
        return floor(preset)
    return max(weight_bytes(preset) * int(percent) // 100, floor(preset))


def half(preset: str, where: Path | None = None, **options: Any) -> Any:
    """Loaded with half of its weights in memory, from a copy of its checkpoint if told so."""
    return omnimem.torch.load(where or folder(preset), budget(preset, 50), **options)


def fresh(preset: str) -> Any:
    """Plain transformers, for any use."""
    return copy.deepcopy(plain(preset))


def on_meta(preset: str) -> Any:
    """Built without memory for its parameters, as for `attach`; its buffers are filled."""
    known = plain(preset)
    with torch.device("meta"):
        model = type(known)(known.config).to(torch.bfloat16).eval()
    model.tie_weights()
    for name, buffer in known.named_buffers():
        owner, _, last = name.rpartition(".")
        model.get_submodule(owner).register_buffer(last, buffer.clone(), persistent=False)
    model.generation_config = known.generation_config
    return model


@functools.cache
def inputs(preset: str, prompt: str = "What is this?") -> dict[str, Any]:
    if preset == "tiny":
        from PIL import Image

        picture = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
        return prepare(folder(preset), prompt, picture)
    ids = torch.tensor([[11 + ord(char) for char in prompt]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def generate(model: Any, preset: str, count: int = 5, prompt: str = "What is this?") -> Said:
    with torch.no_grad():
        done = model.generate(
            **inputs(preset, prompt),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return Said(done.sequences, done.logits)


def forward(model: Any, preset: str, prompt: str = "What is this?") -> Any:
    with torch.no_grad():
        return model(**inputs(preset, prompt), use_cache=False).logits


@functools.cache
def expected(preset: str, count: int = 5, prompt: str = "What is this?") -> Said:
    return generate(plain(preset), preset, count, prompt)


@functools.cache
def expected_logits(preset: str, prompt: str = "What is this?") -> Any:
    return forward(plain(preset), preset, prompt)


def bits(tensor: Any) -> Any:
    """The raw bits, so that NaN equals NaN and 0 differs from -0."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(kinds[tensor.element_size()])


def same_bits(a: Any, b: Any) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def assert_right(model: Any, preset: str, count: int = 5, prompt: str = "What is this?") -> None:
    """It generates what plain transformers does, bit by bit."""
    want, got = expected(preset, count, prompt), generate(model, preset, count, prompt)
    assert torch.equal(want.tokens, got.tokens)
    assert len(want.logits) == len(got.logits) == count
    assert all(same_bits(a, b) for a, b in zip(want.logits, got.logits, strict=True))


def layers(model: Any) -> Any:
    """The decoder layers."""
    inner = model.model
    return getattr(inner, "language_model", inner).layers


def streamed(model: Any) -> list[tuple[str, Any]]:
    """Parameters that are not in memory between passes, by name."""
    names = {
        tensor.name
        for unit in model.omnimem.plan().units
        for run in unit.runs
        if not run.resident
        for tensor in run.tensors
    }
    return [(name, param) for name, param in model.named_parameters() if name in names]


def is_unset(param: Any) -> bool:
    """One NaN expanded to the shape, and no more memory than that."""
    return param.untyped_storage().nbytes() == param.element_size() and bool(param.isnan().all())


def assert_idle(model: Any) -> None:
    """No unit is loaded; the store is sound."""
    loaded = [name for name, param in streamed(model) if not is_unset(param)]
    assert loaded == []
    model.omnimem._store.check()


def our_threads() -> list[str]:
    """Names of threads that omnimem started and that still run."""
    names = [thread.name for thread in threading.enumerate()]
    for task in os.listdir("/proc/self/task"):
        try:
            names.append(Path(f"/proc/self/task/{task}/comm").read_text().strip())
        except OSError:
            continue  # it ended meanwhile
    return [name for name in names if name.startswith("omnimem")]
