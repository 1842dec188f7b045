"""What published checkpoints' config.json say, as far as it decides which layers there are and what they are called."""

from typing import Any

import transformers as hf


def qwen2_5_vl(text: dict[str, int], tied: bool) -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    return hf.Qwen2_5_VLConfig(
        text_config={**text, "max_position_embeddings": 128000, "rope_parameters": rope, "tie_word_embeddings": tied},
        vision_config={
            **{"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14},
            **{"window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "out_hidden_size": text["hidden_size"]},
        },
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        tie_word_embeddings=tied,
    )


def qwen3_vl(kind: type, text: dict[str, Any], tower: dict[str, Any], tied: bool) -> Any:
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    common = {"vocab_size": 151936, "head_dim": 128, "max_position_embeddings": 262144, "tie_word_embeddings": tied}
    return kind(
        text_config={**text, **common, "rope_parameters": rope},
        vision_config={**tower, "num_heads": 16, "patch_size": 16, "out_hidden_size": text["hidden_size"]},
        architectures=[kind.__name__.replace("Config", "ForConditionalGeneration")],
        tie_word_embeddings=tied,
    )


def layers(number: int, hidden: int, inner: int, heads: int, kv: int, vocab: int = 151936) -> dict[str, int]:
    return {
        "num_hidden_layers": number,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
    }


def published() -> dict[str, Any]:
    """Configurations by the checkpoints' names on the Hub."""
    small_tower = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
    large_tower = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}
    experts = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True}
    return {
        "Qwen/Qwen2.5-VL-3B-Instruct": qwen2_5_vl(layers(36, 2048, 11008, 16, 2), tied=True),
        "Qwen/Qwen2.5-VL-7B-Instruct": qwen2_5_vl(layers(28, 3584, 18944, 28, 4, vocab=152064), tied=False),
        "Qwen/Qwen3-VL-4B-Instruct": qwen3_vl(hf.Qwen3VLConfig, layers(36, 2560, 9728, 32, 8), small_tower, tied=True),
        "Qwen/Qwen3-VL-8B-Instruct": qwen3_vl(
            hf.Qwen3VLConfig, layers(36, 4096, 12288, 32, 8), large_tower, tied=False
        ),
        "Qwen/Qwen3-VL-30B-A3B-Instruct": qwen3_vl(
            hf.Qwen3VLMoeConfig, layers(48, 2048, 6144, 32, 4) | experts, large_tower, tied=False
        ),
        "llava-hf/llava-1.5-7b-hf": hf.LlavaConfig(
            text_config=hf.LlamaConfig(**layers(32, 4096, 11008, 32, 32, vocab=32064), tie_word_embeddings=False),
            vision_config=hf.CLIPVisionConfig(
                **{"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
                **{"image_size": 336, "patch_size": 14, "projection_dim": 768},
            ),
            image_token_index=32000,
            architectures=["LlavaForConditionalGeneration"],
        ),
        "OpenGVLab/InternVL3-1B-hf": hf.InternVLConfig(
            text_config=hf.Qwen2Config(**layers(24, 896, 4864, 14, 2, vocab=151674), tie_word_embeddings=False),
            vision_config={
                **{"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
                **{"image_size": [448, 448], "patch_size": [14, 14]},
            },
            architectures=["InternVLForConditionalGeneration"],
        ),
    }
