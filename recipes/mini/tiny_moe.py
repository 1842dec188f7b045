"""A tiny Qwen3-VL-MoE with random weights, for the recipe `mini/moe`; it is made in a second and knows nothing.

python recipes/mini/tiny_moe.py OUT
"""

import argparse
from pathlib import Path

import torch
from tiny import SPECIALS, TEMPLATE, build_tokenizer
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from mcit.pipeline.methods.moextend.models import blocks_of, save

NAMES = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
NAMES |= {"vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>"}


def build_processor() -> Qwen3VLProcessor:
    """Qwen3-VL's own processor over the embedded model's tokenizer: a 64×64 picture is 16 tokens."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer().backend_tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=1024,
        extra_special_tokens=NAMES,
    )
    sizes = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}
    sizes |= {"size": {"shortest_edge": 16 * 16, "longest_edge": 256 * 256}}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**sizes),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(**sizes),
        chat_template=TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Qwen3VLMoeForConditionalGeneration:
    """Four layers of eight experts, two of them a token; 1.7 million parameters, float32."""
    torch.manual_seed(seed)
    rope = {"rope_type": "default", "rope_theta": 1e5, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIALS}
    config = Qwen3VLMoeConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 32,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 96,
            "max_position_embeddings": 1024,
            "rope_parameters": rope,
            "initializer_range": 0.06,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": 2,
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_heads": 3,
            "patch_size": 8,
            "out_hidden_size": 128,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
            "initializer_range": 0.06,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    model = Qwen3VLMoeForConditionalGeneration(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    processor = build_processor()
    model = build_model(processor.tokenizer, arguments.seed)
    print(f"{model.num_parameters():,} parameters")
    save(model, processor, blocks_of(model, "all"), arguments.out)


if __name__ == "__main__":
    main()
