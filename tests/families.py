"""A tiny random model of each family, made here: configuration, weights, tokenizer, processor, chat template.

All share the embedded model's tokenizer, with the family's own special tokens added. Every `save_<family>` writes a
folder that `AutoModelForImageTextToText` and `AutoProcessor` load, as `save_pretrained` leaves it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from random_model import PRETRAINED, RANDOM
from safetensors.torch import load_file, save_file

TURNS = (  # ChatML, the images of a turn as the family writes them
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VICUNA = (  # LLaVA-1.5's: roles in words, and no token that ends a turn
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
TEXT = {  # of every language model
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,  # the least that vLLM has on a CPU
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # so that answers differ from prompt to prompt
    "tie_word_embeddings": False,
    "bos_token_id": None,
}
PUBLISHED_TOWER = {"vision_tower.": "vision_tower.vision_model."}  # of CLIP and SigLIP
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.2,
}


def tokenizer(**specials: str) -> Any:
    """The embedded model's, with `specials` added and known to processors by their names."""
    plain = hf.AutoTokenizer.from_pretrained(PRETRAINED)
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=512,
        extra_special_tokens=specials,
    )


def text(tok: Any, **settings: Any) -> dict[str, Any]:
    ids = {"eos_token_id": tok.eos_token_id, "pad_token_id": tok.pad_token_id, "vocab_size": len(tok)}
    return TEXT | ids | settings


def save(folder: Path, config: Any, processor: Any, published: dict[str, str] | None = None) -> None:
    """`published`: beginnings of tensor names to write as the published checkpoints have them.

    transformers keeps what it was loaded from, but writes names of its own for a model that it has made.
    """
    torch.manual_seed(0)
    config.tie_word_embeddings = False
    model = hf.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():  # Gemma's projector begins at zero: it would see no image
            torch.nn.init.normal_(parameter, std=0.2)
    model.generation_config = hf.GenerationConfig(
        eos_token_id=processor.tokenizer.eos_token_id, pad_token_id=processor.tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    for new, old in (published or {}).items():
        tensors = {f"{old}{k.removeprefix(new)}" if k.startswith(new) else k: v for k, v in tensors.items()}
    save_file(tensors, weights, metadata={"format": "pt"})


def save_qwen2_5_vl(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in RANDOM.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())


def qwen3_vl(tok: Any) -> dict[str, Any]:
    ids = {
        f"{name}_token_id": tok.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in [
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        ]
    }
    rope = {"rope_type": "default", "rope_theta": 1e5, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 8}
    vision |= {"out_hidden_size": 64, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    return {"text_config": text(tok, rope_parameters=rope), "vision_config": vision, **ids}


def qwen3_vl_processor(tok: Any) -> Any:
    sizes = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}
    sizes |= {"size": {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}}
    return hf.Qwen3VLProcessor(
        image_processor=hf.Qwen2VLImageProcessor(**sizes),
        tokenizer=tok,
        video_processor=hf.Qwen3VLVideoProcessor(**sizes),
        chat_template=TURNS.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )


QWEN_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
}


def save_qwen3_vl(folder: Path) -> None:
    tok = tokenizer(**QWEN_TOKENS)
    save(folder, hf.Qwen3VLConfig(**qwen3_vl(tok)), qwen3_vl_processor(tok))


def save_qwen3_vl_moe(folder: Path) -> None:
    """Mixture of experts, each matrix as the published checkpoints have it: [experts, in, out]."""
    tok = tokenizer(**QWEN_TOKENS)
    settings = qwen3_vl(tok)
    settings["text_config"] |= {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
    }
    save(folder, hf.Qwen3VLMoeConfig(**settings), qwen3_vl_processor(tok))
    tensors = load_file(folder / "model.safetensors")
    tensors = {k: v.transpose(1, 2).contiguous() if ".experts." in k else v for k, v in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def save_llava(folder: Path) -> None:
    tok = tokenizer(image_token="<image>")
    config = hf.LlavaConfig(
        text_config=hf.LlamaConfig(**text(tok)),
        vision_config=hf.CLIPVisionConfig(**TOWER, image_size=32, patch_size=8, projection_dim=32),
        image_token_index=tok.image_token_id,
        image_seq_length=16,
    )
    save(folder, config, llava_processor(tok), PUBLISHED_TOWER)


def llava_processor(tok: Any) -> Any:
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    return hf.LlavaProcessor(
        image_processor=hf.CLIPImageProcessor(**size),
        tokenizer=tok,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VICUNA,
    )


def save_llava_mixtral(folder: Path) -> None:
    """LLaVA over a mixture of Mixtral's kind, which MoExtend's paper extends. Saved in the published layout."""
    tok = tokenizer(image_token="<image>")
    mixture = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 48}
    config = hf.LlavaConfig(
        text_config=hf.MixtralConfig(**text(tok, **mixture), architectures=["MixtralForCausalLM"]),
        vision_config=hf.CLIPVisionConfig(**TOWER, image_size=32, patch_size=8, projection_dim=32),
        image_token_index=tok.image_token_id,
        image_seq_length=16,
    )
    save(folder, config, llava_processor(tok), PUBLISHED_TOWER)


def save_internvl(folder: Path) -> None:
    tok = tokenizer(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>"
    )
    config = hf.InternVLConfig(
        vision_config=hf.InternVLVisionConfig(**TOWER, image_size=[32, 32], patch_size=[8, 8]),
        text_config=hf.Qwen2Config(**text(tok)),
        image_token_id=tok.context_image_token_id,
        image_seq_length=4,
    )
    size = {"size": {"height": 32, "width": 32}, "crop_to_patches": True, "min_patches": 1, "max_patches": 3}
    processor = hf.InternVLProcessor(
        image_processor=hf.GotOcr2ImageProcessor(**size),
        tokenizer=tok,
        video_processor=hf.InternVLVideoProcessor(size={"height": 32, "width": 32}),
        image_seq_length=4,
        chat_template=TURNS.replace("IMAGE", "<IMG_CONTEXT>\n"),
    )
    save(folder, config, processor)


def save_gemma3(folder: Path) -> None:
    tok = tokenizer(boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>")
    tok.add_tokens(["\n" * n for n in range(1, 5)])  # vLLM looks them up in a Gemma's vocabulary
    config = hf.Gemma3Config(
        text_config=hf.Gemma3TextConfig(**text(tok), layer_types=["sliding_attention", "full_attention"]),
        vision_config=hf.SiglipVisionConfig(**TOWER, image_size=32, patch_size=8),
        mm_tokens_per_image=4,
        initializer_range=0.2,
        boi_token_index=tok.boi_token_id,
        eoi_token_index=tok.eoi_token_id,
        image_token_index=tok.image_token_id,
    )
    processor = hf.Gemma3Processor(
        image_processor=hf.Gemma3ImageProcessor(size={"height": 32, "width": 32}),
        tokenizer=tok,
        image_seq_length=4,
        chat_template=TURNS.replace("IMAGE", "<start_of_image>"),
    )
    save(folder, config, processor, PUBLISHED_TOWER)


def save_idefics3(folder: Path) -> None:
    grid = {f"row_{i}_col_{j}": f"<row_{i}_col_{j}>" for i in range(1, 3) for j in range(1, 3)}
    tok = tokenizer(
        image_token="<image>",
        fake_image_token="<fake_token_around_image>",
        global_image_token="<global-img>",
        end_of_utterance_token="<end_of_utterance>",
        **grid,
    )
    config = hf.Idefics3Config(
        text_config=hf.LlamaConfig(**text(tok)),
        vision_config={**TOWER, "image_size": 32, "patch_size": 8},
        scale_factor=2,
        image_token_id=tok.image_token_id,
        pad_token_id=tok.pad_token_id,
    )
    size = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
    processor = hf.Idefics3Processor(
        image_processor=hf.Idefics3ImageProcessor(**size),
        tokenizer=tok,
        image_seq_len=4,
        chat_template=TURNS.replace("IMAGE", "<image>"),
    )
    save(folder, config, processor)


DENSE: dict[str, Callable[[Path], None]] = {
    "qwen2_5_vl": save_qwen2_5_vl,
    "qwen3_vl": save_qwen3_vl,
    "llava": save_llava,
    "internvl": save_internvl,
    "idefics3": save_idefics3,
    "gemma3": save_gemma3,
}
FAMILIES = DENSE | {"qwen3_vl_moe": save_qwen3_vl_moe}
