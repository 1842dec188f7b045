"""Memory and disk that a run needs, from the model's shapes alone: it stands on the meta device, without weights.

Of one training process, in bytes, with b bytes a number in the base's dtype, T tokens in a micro-batch (its samples,
each as long as the longest), S = Σ (in + out) over the linear layers of a decoder layer, h its width, L their number:

    weights       parameters × b; a linear layer of the language model under nf4: 4.127 bits a parameter, which is
                  4 + 8/64 + 32/(64·256) (QLoRA, arXiv 2305.14314, section 3, double quantization)
    trained       parameters of the LoRA × 16: weight, gradient and Adam's two moments in float32
    past          under `stack`, the increments of earlier stages × b
    activations   with gradient checkpointing L·T·h·b (what is kept of each layer) + 2·T·S·b (one layer, run again, and
                  its gradients); without it L·T·S·b + T·S·b
    logits        of 256 tokens at a time × vocabulary × 8; RFT: of a micro-batch's completions × vocabulary × (b + 4)
    cache         RFT: keys and values of the completions that a process generates at once

ZeRO-2 and ZeRO-3 share out Adam's moments and gradients, ZeRO-3 the weights too. What a method adds (its state,
replayed samples' states) is not in it, nor are the libraries, some 0.5 GiB on a GPU.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..policy.lineage import target_names
from ..recipe.schema import ModelConfig, ModulesConfig, Recipe
from .work import StageWork

NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_LOGITS_AT_ONCE = 256  # TRL 1.16 makes logits of as many tokens at a time
_ADAM = 16  # bytes of a trained parameter: weight, gradient, two moments, float32
_SAVED = 4  # bytes of a saved factor: float32


class Shapes(NamedTuple):
    """What memory depends on of a model and the layers that get LoRA."""

    parameters: int
    linear: int  # of them, in linear layers of the language model, which are what nf4 quantises
    adapted: int  # Σ (in + out) over the layers that get LoRA
    layers: int
    hidden: int
    per_layer: int  # Σ (in + out) over the linear layers of one decoder layer
    vocabulary: int
    cache: int  # numbers that a token leaves in the cache, over all layers
    context: int


class Memory(NamedTuple):
    """Bytes of one training process, by what takes them."""

    weights: float
    trained: float
    past: float
    activations: float
    logits: float
    cache: float

    @property
    def total(self) -> float:
        return sum(self)


class EngineMemory(NamedTuple):
    """Bytes of vLLM with adapters, at the least: with a cache for one sequence as long as may be."""

    weights: float
    adapters: float
    cache: float

    @property
    def total(self) -> float:
        return sum(self)


def shapes_of(base: ModelConfig, modules: ModulesConfig) -> Shapes:
    """The shapes of a model, from its configuration. Raises `InputError`."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(base.path, revision=base.revision, trust_remote_code=base.trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, trust_remote_code=base.trust_remote_code)
    return measure(model, modules)


def measure(model: Any, modules: ModulesConfig) -> Shapes:
    """The shapes of a model that is there, if only on the meta device."""
    text = model.config.get_text_config()
    language = _sizes(model, target_names(model, ModulesConfig()))
    adapted = _sizes(model, target_names(model, modules))
    first = re.compile(r"(^|\.)layers\.0\.")
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Shapes(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        linear=sum(rows * columns for rows, columns in language.values()),
        adapted=sum(rows + columns for rows, columns in adapted.values()),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        per_layer=sum(rows + columns for name, (rows, columns) in language.items() if first.search(name)),
        vocabulary=text.vocab_size,
        cache=2 * text.num_hidden_layers * heads * width,
        context=text.max_position_embeddings,
    )


def weight_bytes(shapes: Shapes, base: ModelConfig) -> float:
    """The base model as it is trained on."""
    quantised = shapes.linear if base.quantization == "nf4" else 0
    return (shapes.parameters - quantised) * _BYTES[base.dtype] + quantised * NF4_BITS / 8


def training_memory(
    recipe: Recipe, k: int, shapes: Shapes, work: StageWork, processes: int, mode: str, past_rank: int = 0
) -> Memory:
    """One process that trains stage `k`; `past_rank` is the rank with which the run begins (`start_from`)."""
    base, train = recipe.base_model, recipe.stages[k - 1].train
    b = _BYTES[base.dtype]
    args = (train.sft if train.paradigm == "sft" else train.rft).args
    trained = train.lora.r * shapes.adapted
    past = past_rank + sum(stage.train.lora.r for stage in recipe.stages[: k - 1]) if train.lineage == "stack" else 0
    tokens = work.micro_batch * (work.longest + work.completion)
    if args.get("gradient_checkpointing", True):  # TRL's default
        activations = tokens * b * (shapes.layers * shapes.hidden + 2 * shapes.per_layer)
    else:
        activations = tokens * b * shapes.per_layer * (shapes.layers + 1)
    if train.paradigm == "sft":
        logits, cache = min(tokens, _LOGITS_AT_ONCE) * shapes.vocabulary * 8, 0
    else:
        logits = work.micro_batch * work.completion * shapes.vocabulary * (b + 4)
        at_once = -(-(args.get("generation_batch_size") or train.global_batch_size) // processes)
        cache = at_once * (work.longest + work.completion) * shapes.cache * b
    weights, trained_bytes = weight_bytes(shapes, base), float(trained * _ADAM)
    if mode in ("zero2", "zero3"):
        trained_bytes = trained * (_ADAM - 12 + 12 / processes)
    if mode == "zero3":
        weights /= processes
    return Memory(weights, trained_bytes, past * shapes.adapted * b, activations, logits, cache)


def engine_memory(recipe: Recipe, shapes: Shapes, ranks: Sequence[int], longest: int) -> EngineMemory:
    """vLLM with the adapters of all stages: the base in its own dtype, quantised in training or not."""
    b = _BYTES[recipe.base_model.dtype]
    length = min(recipe.eval.max_model_len or shapes.context, longest + recipe.eval.max_new_tokens)
    adapters = max(ranks, default=0) * len(ranks) * shapes.adapted * b
    return EngineMemory(shapes.parameters * b, adapters, length * shapes.cache * b)


def policy_ranks(recipe: Recipe, past_rank: int = 0) -> list[int]:
    """The rank of the adapter that each stage leaves on the untouched base."""
    ranks: list[int] = []
    before = past_rank
    for stage in recipe.stages:
        adds = stage.train.lineage in ("stack", "fold")
        before = stage.train.lora.r + (before if adds else 0)
        ranks.append(before)
    return ranks


def disk(recipe: Recipe, shapes: Shapes, past_rank: int = 0) -> int:
    """Bytes of the adapters that a run leaves: each stage's policy and its increment, in float32."""
    ranks, total = policy_ranks(recipe, past_rank), 0
    for stage, rank in zip(recipe.stages, ranks, strict=True):
        goes_on = stage.train.lineage == "continue" and (stage.k > 1 or past_rank)
        increment = stage.train.lora.r * (2 if goes_on else 1)  # what a LoRA that trains on adds is a difference
        total += (rank + increment) * shapes.adapted * _SAVED
    return total


def _sizes(model: Any, names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """(out, in) of linear layers."""
    modules: dict[str, nn.Linear] = {name: model.get_submodule(name) for name in names}
    return {name: (linear.out_features, linear.in_features) for name, linear in modules.items()}
