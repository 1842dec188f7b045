"""A Qwen2.5-VL of any size with random weights, which learn nothing but cost what real ones do."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoProcessor, GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import mcit.recipes

TINY = Path(mcit.recipes.__file__).parent / "mini" / "tiny_vlm"
PATCH, MERGE = 14, 2  # Qwen2.5-VL's: a token is 28 × 28 pixels


def build(
    folder: Path,
    text: Mapping[str, Any],
    vision: Mapping[str, Any],
    dtype: torch.dtype,
    processor: Mapping[str, Any],
    ends: float = 0.0,
) -> None:
    """Write the model and the embedded model's processor, with `processor` set in it, to `folder`.

    `text` and `vision` are keys of the configuration. The vocabulary is the embedded model's, or, with a larger
    `vocab_size`, filled up with words that no text contains, so that every token that is sampled is one. The last
    tokens of it, a share `ends`, end an answer.
    """
    processing = AutoProcessor.from_pretrained(TINY, patch_size=PATCH, **processor)
    tokenizer = processing.tokenizer
    size = text.get("vocab_size", len(tokenizer))
    if size > len(tokenizer):
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        vocabulary = state["model"]["vocab"]
        known = {token["id"] for token in state["added_tokens"]} | set(vocabulary.values())
        vocabulary |= {f"w{number}": number for number in range(size) if number not in known}
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    tiny = Qwen2_5_VLConfig.from_pretrained(TINY)
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    config = Qwen2_5_VLConfig(
        text_config={**text, "vocab_size": size, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id},
        vision_config={"patch_size": PATCH, "spatial_merge_size": MERGE, **vision},
        tie_word_embeddings=True,
        **{name: getattr(tiny, name) for name in names},
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype)
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id, *range(size - int(ends * size), size)],
        pad_token_id=tokenizer.pad_token_id,
    )
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    model.save_pretrained(folder)
    processing.save_pretrained(folder)
