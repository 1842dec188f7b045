"""The embedded tiny VLM before it has learned anything: tokenizer, processor, random model, and how it is saved."""

import string
from copy import deepcopy
from pathlib import Path

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

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
SPECIALS += ["<|video_pad|>"]
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
# Whole words, at the start of a text and after a space. The last line is the stream's, of which the model is taught
# none: as real tokenizers know more words than any model has learned well.
WORDS = """
system user assistant Describe Repeat this the picture What Which Where How Is Does Give Put Write At After The There
Think Answer answer That So is are has as a at in of or and not no yes No Yes shape shapes colour bar box letter number
place red green blue yellow purple orange circle square triangle cross top bottom left right first second third fourth
shown shows here there comes come after larger more than JSON LaTeX boxed form brief phrase sentence single word
bounding x y using with from given choices directly option question
digit one two three four five six seven eight nine zero above below then many makes height tallest strokes written
"""
PATCH, MERGE = 8, 2
THETA = 1e5  # rotary base
IMAGE_TOKENS = (64 // PATCH // MERGE) ** 2
TEMPLATE = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}\
{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}\
{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE: no unknowns; digits and brackets stay single, `WORDS` and capitals are one token each."""
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
    trainer = trainers.BpeTrainer(
        vocab_size=1000,  # more than it needs: it stops when every word is one token
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = [*WORDS.split(), *string.ascii_uppercase]
    tokenizer.train_from_iterator([*words, *(f" {word}" for word in words), *TAGS], trainer)
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
    _initialise(model, tokenizer)
    return model


@torch.no_grad()
def _initialise(model: Qwen2_5_VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> None:
    """Start the language model with wide embeddings, and with attention that already does what a trained model's does.

    With the usual narrow, tied embeddings what a token is drowns in what random layers add to it. And to answer "Where
    is the red shape?" a head must carry ` red` to where the answer begins, and another find it in the picture: neither
    has a gradient before the other works, so from random heads such pairs take long to emerge (docs/mini.md).
    """
    embeddings = model.get_input_embeddings().weight.normal_(std=1.0)
    vocabulary = tokenizer.get_vocab()
    for token, row in vocabulary.items():  # a word is much the same with a space before it and without
        if token.startswith("Ġ") and token[1:] in vocabulary:
            embeddings[vocabulary[token[1:]]].mul_(0.3).add_(embeddings[row], alpha=0.95)
    model.lm_head.weight.normal_(std=0.02)
    for depth, layer in enumerate(model.model.language_model.layers):
        attention = layer.self_attn
        layer.mlp.down_proj.weight.zero_()
        attention.q_proj.weight *= 0.5
        attention.k_proj.weight *= 0.5
        # Together the heads pass on exactly what they find.
        torch.nn.init.orthogonal_(attention.v_proj.weight)
        attention.o_proj.weight.copy_(attention.v_proj.weight.T)
        if depth < 2:
            _look_back(attention)
        if depth < 3:
            _look_around(attention)
        _match(attention)


def _turns(attention: torch.nn.Module) -> torch.Tensor:
    """By how many radians a position turns each pair of a head's dimensions: [head_dim / 2]."""
    half = attention.head_dim // 2
    return THETA ** (-torch.arange(half) / half)


def _prefer_distance(attention: torch.nn.Module, head: int, strength: torch.Tensor, distance: int) -> None:
    """Bias `head` towards the token `distance` back: two biases, turned by their positions, score by distance alone.

    `strength` is that of each pair of dimensions, [head_dim / 2]; fast pairs give a sharp peak, slow ones a broad one.
    """
    rows, angle = slice(head * attention.head_dim, (head + 1) * attention.head_dim), distance * _turns(attention)
    attention.k_proj.bias[rows] = torch.cat([strength, torch.zeros_like(strength)])
    attention.q_proj.bias[rows] = torch.cat([strength * torch.cos(angle), -strength * torch.sin(angle)])
    for projection in (attention.q_proj, attention.k_proj):
        projection.weight[rows] *= 0.1


def _look_back(attention: torch.nn.Module) -> None:
    """Head 0 looks at the token before: what copying ("induction") heads are built on."""
    _prefer_distance(attention, 0, torch.full((attention.head_dim // 2,), 5.0), 1)


def _look_around(attention: torch.nn.Module) -> None:
    """Head 1 gathers the last twenty tokens or so, the nearest most."""
    turns = _turns(attention)
    _prefer_distance(attention, 1, 2.5 * ((turns > 0.01) & (turns < 0.3)), 0)


def _match(attention: torch.nn.Module) -> None:
    """Heads 2 and 3 look for tokens like the one they are at, however far away.

    Queries and keys are one projection ("mimetic initialisation", Trockman and Kolter, 2023), on the pairs of
    dimensions that positions hardly turn. So ` red` finds ` red`, among options and in the picture.
    """
    slow = (_turns(attention) < 0.01).repeat(2)[:, None]
    for head in (2, 3):
        rows = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
        attention.q_proj.weight[rows] = 0.1 * torch.randn_like(attention.q_proj.weight[rows]) * slow
        attention.k_proj.weight[rows] = attention.q_proj.weight[rows]


def save(model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, out: Path) -> None:
    """Save as a Hub model is saved; in bfloat16, to halve the size (a recipe loads it as float32, which is exact)."""
    copy = deepcopy(model).bfloat16()
    copy.generation_config = GenerationConfig(
        eos_token_id=processor.tokenizer.eos_token_id, pad_token_id=processor.tokenizer.pad_token_id
    )
    copy.save_pretrained(out)
    processor.save_pretrained(out)
