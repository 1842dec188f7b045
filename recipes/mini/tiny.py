"""The embedded tiny VLM before it has learned anything: tokenizer, processor, random model, and how it is saved."""

from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from mcit.data_prep.mini import facts

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
SPECIALS += ["<|video_pad|>"]
PATCH, MERGE = 8, 2
THETA = 1e5  # rotary base
IMAGE_TOKENS = (64 // PATCH // MERGE) ** 2
TEMPLATE = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}\
{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}\
{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def build_tokenizer(rng: np.random.Generator) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 640 tokens, learned from the facts: no unknowns; digits and brackets stay single."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(r"</?(?:think|answer)>|\d|[\[\]{}<>\"\\,.:]| ?[A-Za-z]+|\s+|[^\sA-Za-z\d]"), "isolated"
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    corpus = []
    for source in facts.SOURCES:
        if source is facts.echo_facts:
            continue  # random strings must stay single characters
        for _ in range(400):
            for fact in source(rng)[1]:
                for style, reasoning in facts.styles_of(fact):
                    corpus += facts.ask(rng, fact, style, reasoning)[:2]
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    # Not Qwen2TokenizerFast: it replaces the pre-tokenizer by Qwen's own when it is loaded again.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        bos_token=None,
        additional_special_tokens=SPECIALS[1:],
        model_max_length=1024,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLProcessor:
    """Qwen2.5-VL's own processor, with 8-pixel patches: a 64×64 picture is 16 tokens."""
    sizes = {
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": 16 * 16, "longest_edge": 256 * 256},
    }
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**sizes),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**sizes),
        chat_template=TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """The tiny Qwen2.5-VL with random weights, float32."""
    torch.manual_seed(seed)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIALS}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 1024,
            "rope_parameters": {"rope_type": "default", "rope_theta": THETA, "mrope_section": [4, 6, 6]},
            "initializer_range": 0.06,  # the usual 0.02 is for wide models: here it stalls for thousands of steps
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": 3,
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_heads": 3,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "window_size": 64,
            "out_hidden_size": 128,
            "fullatt_block_indexes": [0, 1, 2],
            "initializer_range": 0.06,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    config._attn_implementation = "eager"  # quicker than SDPA at 192 tokens on a CPU
    model = Qwen2_5_VLForConditionalGeneration(config)
    _initialise(model)
    return model


@torch.no_grad()
def _initialise(model: Qwen2_5_VLForConditionalGeneration) -> None:
    """The language model as nanochat starts its own: wide embeddings, and layers that add nothing yet.

    With the usual narrow, tied embeddings what a token is drowns in what random layers add to it, and matching one
    word with another takes ten times as long to emerge.
    """
    model.get_input_embeddings().weight.normal_(std=1.0)
    model.lm_head.weight.normal_(std=0.02)
    for layer in model.model.language_model.layers:
        layer.self_attn.q_proj.weight *= 0.5
        layer.self_attn.k_proj.weight *= 0.5
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    for layer in model.model.language_model.layers[:2]:
        _look_back(layer.self_attn)


@torch.no_grad()
def _look_back(attention: torch.nn.Module, strength: float = 5.0) -> None:
    """Start the first head out looking at the token before, by its biases alone.

    The score of two biases under rotary positions depends on the distance only; these peak at distance one. Heads that
    look one back are what copying ("induction") heads are built on, and the slowest part of them to emerge.
    """
    half = attention.head_dim // 2
    angle = THETA ** (-torch.arange(half) / half)  # of one position, per pair of dimensions
    head = slice(0, 2 * half)
    attention.k_proj.bias[head] = torch.cat([torch.full((half,), strength), torch.zeros(half)])
    attention.q_proj.bias[head] = strength * torch.cat([torch.cos(angle), -torch.sin(angle)])
    for projection in (attention.q_proj, attention.k_proj):
        projection.weight[head] *= 0.1


def save(model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, out: Path) -> None:
    """Save as a Hub model is saved; in bfloat16, to halve the size (a recipe loads it as float32, which is exact)."""
    copy = deepcopy(model).bfloat16()
    copy.generation_config = GenerationConfig(
        eos_token_id=processor.tokenizer.eos_token_id, pad_token_id=processor.tokenizer.pad_token_id
    )
    copy.save_pretrained(out)
    processor.save_pretrained(out)
