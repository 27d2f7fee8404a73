"""Model inputs from a prompt and a picture, the same ids as transformers' own processor makes.

``Qwen3VLProcessor`` needs torchvision for its video part, even when there is no video. This module
puts the tokenizer and the image processor for PIL together as it does, and always gives
``mm_token_type_ids`` with a picture: ``generate`` would use text positions without them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["load_tokenizer", "prepare"]


def load_tokenizer(model_dir: str | os.PathLike[str]) -> Any:
    """Load the tokenizer of a model folder, with the folder's chat template where it has one.

    Raises
    ------
    OSError, ValueError
        The folder holds no tokenizer that transformers can load.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(os.fspath(model_dir), local_files_only=True)
    template = Path(model_dir) / "chat_template.json"
    if not tokenizer.chat_template and template.is_file():
        tokenizer.chat_template = json.loads(template.read_text(encoding="utf-8"))["chat_template"]
    return tokenizer


def prepare(
    model_dir: str | os.PathLike[str], prompt: str, image: Any = None, *, tokenizer: Any = None
) -> dict[str, torch.Tensor]:
    """Turn one user message into what the model's ``generate`` takes.

    Parameters
    ----------
    model_dir : path-like
        Folder with the config, the tokenizer and, for pictures, ``preprocessor_config.json``.
    prompt : str
        What the user says. The chat template is applied where there is one.
    image : path-like or PIL.Image.Image or numpy.ndarray, optional
        A picture to put before the prompt.
    tokenizer : optional
        What ``load_tokenizer`` returned, to save loading it again.

    Returns
    -------
    dict of str to torch.Tensor
        ``input_ids`` and ``attention_mask`` (1, tokens). With a picture also
        ``mm_token_type_ids`` (1, tokens; 1 at image tokens), ``pixel_values`` (patches, values)
        and ``image_grid_thw`` (1, 3).

    Raises
    ------
    ValueError
        The model takes no pictures, has no chat template to place one, or the prompt itself holds
        image tokens.
    FileNotFoundError
        The picture or the model folder does not exist.
    """
    if tokenizer is None:
        tokenizer = load_tokenizer(model_dir)
    if image is None:
        text = _render(tokenizer, prompt, prompt)
        return _tokenize(tokenizer, text)
    config = json.loads((Path(model_dir) / "config.json").read_text(encoding="utf-8"))
    image_id = config.get("image_token_id")
    if "vision_config" not in config or image_id is None:
        raise ValueError(
            f"{model_dir}: a model of type {config.get('model_type')!r} takes no pictures; leave "
            "the image out"
        )
    if not tokenizer.chat_template:
        raise ValueError(
            f"{model_dir}: has no chat template, so there is no place for a picture; add "
            "chat_template.jinja to the folder"
        )
    vision = _process_image(model_dir, image)
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    text = _render(tokenizer, content, prompt)
    token = tokenizer.convert_ids_to_tokens(image_id)
    if text.count(token) != 1:
        raise ValueError(
            f"the text has {text.count(token)} places for a picture ({token}), the picture fills "
            f"one; take {token} out of the prompt"
        )
    text = text.replace(token, token * vision.pop("image_tokens"))
    inputs = _tokenize(tokenizer, text)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == image_id).to(inputs["input_ids"].dtype)
    return {**inputs, **vision}


def _render(tokenizer: Any, content: object, prompt: str) -> str:
    if not tokenizer.chat_template:
        return prompt
    messages = [{"role": "user", "content": content}]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text


def _tokenize(tokenizer: Any, text: str) -> dict[str, torch.Tensor]:
    made = tokenizer(
        [text],
        return_tensors="pt",
        return_token_type_ids=False,
        add_special_tokens=not tokenizer.chat_template,
    )
    return {name: made[name] for name in ("input_ids", "attention_mask")}


def _process_image(model_dir: str | os.PathLike[str], image: Any) -> dict[str, Any]:
    from PIL import Image
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil.from_pretrained(
        os.fspath(model_dir), local_files_only=True
    )
    if isinstance(image, str | os.PathLike):
        with Image.open(image) as opened:
            image = opened.convert("RGB")
    made = processor(images=[image], return_tensors="pt")
    grid = made["image_grid_thw"]
    return {
        "pixel_values": made["pixel_values"],
        "image_grid_thw": grid,
        "image_tokens": int(grid.prod()) // processor.merge_size**2,
    }
