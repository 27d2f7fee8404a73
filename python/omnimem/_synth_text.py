"""Text side of synthetic checkpoints: a byte-level BPE tokenizer trained here, templates, configs.

The tokenizer is built as Qwen's is (the same splitting rule, NFC, byte-level pieces) and its
special tokens have the same names in the same order, so that transformers loads it as one. The
vocabulary is as large as the model's: what training does not fill is made of pairs of trained
pieces, which the encoder never makes and which decode to readable text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""In the order of their ids."""

REAL_VOCABULARY = 151936
_REAL_FIRST_SPECIAL = 151643

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' -}}"
    "{%- if message.content is string -%}{{- message.content -}}"
    "{%- else -%}{%- for part in message.content -%}"
    "{%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{%- elif part.type == 'video' or 'video' in part -%}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{%- elif 'text' in part -%}{{- part.text -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_CORPUS = """
A picture is made of points, and every point has a colour. A model that looks at a picture cuts it
into small squares, gives each square a place, and reads the squares one after another, the way we
read the words of a sentence. What is in this image? Describe the picture. What do you see? There is
a red circle on the left and a blue square on the right, and a green line runs between them. The sky
is bright above the water; the house stands on the hill, and a small dog sleeps in front of the
open door. How many people are in the photograph? Two women and one man are sitting at a table.

The weights of a large model do not fit into the memory of a small machine. Some of them stay where
they are, and the others come from the disk when they are needed and go when they have been used.
Reading ahead of use hides the time that the disk takes: while one layer computes, the next layer is
being read. A ring of two places is enough, because the order of the layers never changes. Nothing
is written back, since the file on the disk still holds the same bytes. So the answer is the same,
token by token and bit by bit, and only the time is different.

import numpy as np
def read(path, offset, size):
    with open(path, "rb") as file:
        file.seek(offset)
        return np.frombuffer(file.read(size), dtype="uint8")

The user asks a question, the assistant answers it. Hello! Please explain how this works. First,
the text becomes numbers; then the numbers pass through the layers; at last the model chooses the
next token, and the work begins again. It was the best of days and the worst of days. One, two,
three, four, five, six, seven, eight, nine, ten: 0 1 2 3 4 5 6 7 8 9. Thank you, that is right!
"""


def first_special(vocabulary: int) -> int:
    """Return the id of the first special token of a vocabulary of this many ids."""
    return _REAL_FIRST_SPECIAL if vocabulary == REAL_VOCABULARY else vocabulary - 16


def special_ids(vocabulary: int) -> dict[str, int]:
    """Return the id of every special token; Qwen's own ones for Qwen's size."""
    first = first_special(vocabulary)
    return {token: first + at for at, token in enumerate(SPECIAL_TOKENS)}


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """Train the tokenizer and write its files.

    Parameters
    ----------
    folder : Path
        Where ``tokenizer.json``, ``tokenizer_config.json`` and ``chat_template.jinja`` go.
    vocabulary : int
        Rows of the model's embedding, at least 512.
    """
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    first = first_special(vocabulary)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=min(first, 1024),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_CORPUS], trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    tokenizer.model = models.BPE(
        vocab=_fill(trained["vocab"], first),
        merges=[tuple(merge) for merge in trained["merges"]],
        fuse_unk=False,
        byte_fallback=False,
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    settings = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 262144,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
    }
    write_json(folder / "tokenizer_config.json", settings)


def _fill(trained: dict[str, int], size: int) -> dict[str, int]:
    """Extend a vocabulary to `size` entries with pairs, then triples, of its own pieces."""
    vocabulary = dict(trained)
    letters = [piece for piece in trained if len(piece) > 1 and piece.isascii()]
    count = len(letters)
    for step in range(count * count):
        near, far = step % count, step // count
        for at, head in enumerate(letters):
            if len(vocabulary) >= size:
                return vocabulary
            tail = letters[(at + far) % count] if far else ""
            vocabulary.setdefault(head + letters[at - near] + tail, len(vocabulary))
    raise ValueError(f"a vocabulary of {size} is more than the {len(vocabulary)} that can be made")


def write_processor(folder: Path, patch_size: int, merge_size: int, temporal: int) -> None:
    """Write ``preprocessor_config.json`` as Qwen3-VL ships it."""
    settings: dict[str, Any] = {
        "size": {"longest_edge": 16777216, "shortest_edge": 65536},
        "patch_size": patch_size,
        "temporal_patch_size": temporal,
        "merge_size": merge_size,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
        "image_processor_type": "Qwen2VLImageProcessorFast",
    }
    write_json(folder / "preprocessor_config.json", settings)


def write_json(path: Path, value: object) -> None:
    """Write a JSON file as transformers lays it out."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
