"""From a sample's messages to the text a model reads: one place, used by training and by every engine."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from PIL import Image

from .errors import InputError
from .images import load_image
from .schema import Message


def to_chat(messages: Sequence[Message], n_images: int) -> list[dict[str, Any]]:
    """Messages with typed parts, as `apply_chat_template` wants them; the images come first in the first user turn.

    Raises `InputError` if there are images and no user turn.
    """
    chat: list[dict[str, Any]] = [
        {"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]} for turn in messages
    ]
    if n_images:
        first = next((turn for turn in chat if turn["role"] == "user"), None)
        if first is None:
            raise InputError("has images but no user turn to attach them to", field="prompt")
        first["content"] = [{"type": "image"} for _ in range(n_images)] + first["content"]
    return chat


def render_chat(
    processor: Any, messages: Sequence[Message], n_images: int, *, add_generation_prompt: bool = True
) -> str:
    """The text of a dialogue under the processor's chat template, image placeholders not yet expanded.

    Raises `InputError` if the template is missing or cannot take these messages. Some templates refuse a system turn,
    others drop it in silence: both are refused here.
    """
    if not getattr(processor, "chat_template", None):
        raise InputError("the base model's processor has no chat template", remedy="Use an instruction-tuned model")
    chat = to_chat(messages, n_images)
    try:
        text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        raise InputError(f"the chat template refuses these messages: {error}", field="prompt") from None
    for turn in messages:
        if turn["role"] == "system" and turn["content"].strip() not in text:
            raise InputError(
                "the base model's chat template has no system role",
                field="prompt",
                remedy="Put the instruction into the first user turn",
            )
    return text


def tokenizer_options(processor: Any, text: str) -> dict[str, bool]:
    """`{"add_special_tokens": …}` for a rendered text: no second BOS where the template wrote one already.

    The rule of `apply_chat_template(tokenize=True)`.
    """
    bos = processor.tokenizer.bos_token
    return {"add_special_tokens": not (bos and text.startswith(bos))}


@lru_cache(maxsize=16)
def open_image(path: Path | str) -> Image.Image:
    """`load_image`, with the last few kept decoded: questions on one image follow each other. Not to be changed."""
    return load_image(path)
