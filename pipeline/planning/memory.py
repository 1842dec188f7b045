"""The memory that a run needs, from the model's shapes alone: it stands on the meta device, without weights.

Of one training process at its peak, in bytes, with n parameters in training, b bytes a number in the base's dtype, N
processes, T tokens in a micro-batch (its samples, each as long as the longest), L decoder layers of width h,
S = Σ (in + out) over the matrices of a layer that a token goes through (of a mixture, those of its k experts), and A
the same over those with LoRA and dropout:

    weights       parameters × b, under ZeRO-3 / N; a linear layer of the language model under nf4: 4.127 bits a
                  parameter, which is 4 + 8/64 + 32/(64·256) (QLoRA, arXiv 2305.14314, section 3, double quantization).
                  Under `full` those in training are in `trained`, and the frozen ones in float32
    trained       12 n: value and Adam's two moments in float32. ZeRO: b n, and (b + 16) n / N for a process's part of
                  gradients in the model's dtype, and of values, gradients and moments in float32
    gradients     4 n; where none are summed over micro-batches, those of a layer come as what was kept of it goes, and
                  what counts is by how much all of them are more than all that is kept
    past          under `stack`, the increments of earlier stages × b, on every process
    exchange      DDP: 4 n, copies of the gradients. ZeRO: a bucket of 5e8 gradients × b, and under ZeRO-3 up to 1e9 (or
                  all) parameters × b that are whole (the defaults of DeepSpeed 0.19)
    activations   with gradient checkpointing T L h b are kept, and T (2.25 S + 1.3 A) b are those of the layer that is
                  run again, with its gradients; without it T L (1.35 S + 0.9 A) b are kept, and T (0.8 S + 0.35 A) b
                  come on top
    cache         GRPO: keys and values of the completions that a process generates at once, when there are no
                  activations

The factors of S and A are from a trace that adds up what torch allocates (`benchmarks/memory.py --trace`). Logits are
no part of it: TRL 1.16 makes them in tiles of 4,096 tokens × 32,768 words. Nor are the pictures' pixels, the tower,
which keeps nothing while it is frozen, and what a projector or tower in training keeps. What methods hold they say
themselves (`Method.memory`). Libraries take some 0.5 GiB of a GPU beside all this, and its allocator leaves gaps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from mcit.eval.engines.settings import MAX_RANK, RANKS, SLOT_RANKS

from ..policy.lineage import target_names
from ..recipe.schema import ModelConfig, ModulesConfig, Recipe

NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Bytes of main memory beyond the formula: of thirteen stages of the embedded model (2 million parameters) 1.1 to
# 1.5e9, the middle one 1.3e9. What batches of changing lengths leave unused between them is in it.
LIBRARIES = 1.3e9
_BUCKET, _WHOLE = 500_000_000, 1_000_000_000  # DeepSpeed: reduce_bucket_size, stage3_max_live_parameters


class Shapes(NamedTuple):
    """What memory depends on of a model."""

    parameters: int
    linear: int  # of them, in linear layers of the language model, which are what nf4 quantises
    layers: int
    hidden: int
    per_layer: int  # Σ (in + out) over the matrices of one decoder layer that a token goes through
    cache: int  # numbers that a token leaves in the cache, over all layers
    context: int


@dataclass(frozen=True)
class Training:
    """What one process trains."""

    shapes: Shapes
    trained: int  # parameters
    width: int  # Σ (in + out) over all layers with LoRA; 0: there is none
    whole: bool = False  # whether the trained parameters are the model's own
    past_rank: int = 0  # of the increments beside the weights
    methods: float = 0  # bytes that methods hold
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    quantization: Literal["none", "nf4"] = "none"
    mode: str = "single"
    processes: int = 1
    samples: int = 1  # of a micro-batch
    tokens: int = 2048  # of a sample, images and answer included
    at_once: int = 0  # completions that the process generates at once
    accumulates: bool = True  # whether gradients are summed over several micro-batches
    checkpointing: bool = True
    dropout: bool = True
    pictures: float = 0.0  # bytes of main memory for what the tower made of them


class Memory(NamedTuple):
    """Bytes of one training process, by what takes them."""

    weights: float
    trained: float
    gradients: float
    past: float
    exchange: float
    methods: float
    activations: float  # or the cache, if it is larger

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


def training_memory(training: Training) -> Memory:
    """By the formula above."""
    one, shapes, n = training, training.shapes, training.trained
    b, sharded = _BYTES[one.dtype], one.mode in ("zero2", "zero3")
    weights = weight_bytes(shapes, one.dtype, one.quantization)
    if one.whole:
        weights = (shapes.parameters - n) * (b if sharded else 4)
    weights /= one.processes if one.mode == "zero3" else 1
    trained = n * (b + (b + 16) / one.processes) if sharded else 12.0 * n
    exchange = 4.0 * n if one.mode == "ddp" else 0.0
    if sharded:
        exchange = b * (_BUCKET + (min(shapes.parameters, _WHOLE) if one.mode == "zero3" else 0))
    in_batch = one.samples * one.tokens * b
    dropped = one.width / shapes.layers if one.dropout else 0
    kept: float
    if one.checkpointing:
        kept = in_batch * shapes.layers * shapes.hidden
        activations = kept + in_batch * (2.25 * shapes.per_layer + 1.3 * dropped)
    else:
        kept = in_batch * shapes.layers * (1.35 * shapes.per_layer + 0.9 * dropped)
        activations = kept + in_batch * (0.8 * shapes.per_layer + 0.35 * dropped)
    gradients = 0.0 if sharded else 4.0 * n - (0.0 if one.accumulates else min(kept, 4.0 * n))
    past, cache = one.past_rank * one.width * b, one.at_once * one.tokens * shapes.cache * b
    return Memory(weights, trained, gradients, past, exchange, one.methods, max(activations, cache))


def host_memory(training: Training, memory: Memory, on_gpu: bool) -> float:
    """Bytes of main memory that the process has at its peak.

    Libraries, remembered pictures, and the base, which is loaded there before it goes to a GPU; without one all of
    training is there. While weights are loaded in another dtype than they are stored in, what is stored comes on top.
    """
    weights = weight_bytes(training.shapes, training.dtype)
    return LIBRARIES + training.pictures + (weights if on_gpu else memory.total)


def engine_memory(recipe: Recipe, shapes: Shapes, width: int, ranks: Sequence[int], longest: int) -> EngineMemory:
    """vLLM with the adapters of stages of these `ranks`, on layers of this `width`.

    The base is in its own dtype, quantised in training or not. Adapters beyond those that fit vLLM's slots wait in the
    computer's memory, and those of too high a rank are merged into copies of the base.
    """
    b = _BYTES[recipe.base_model.dtype]
    length = min(recipe.eval.max_model_len or shapes.context, longest + recipe.eval.max_new_tokens)
    served = [rank for rank in ranks if rank <= MAX_RANK]
    slot = next(allowed for allowed in RANKS if allowed >= max(served, default=0))
    adapters = min(len(served), max(1, SLOT_RANKS // slot)) * slot * width * b
    return EngineMemory(shapes.parameters * b, adapters, length * shapes.cache * b)


def weight_bytes(shapes: Shapes, dtype: str, quantization: str = "none") -> float:
    """The base model as it is trained on."""
    quantised = shapes.linear if quantization == "nf4" else 0
    return (shapes.parameters - quantised) * _BYTES[dtype] + quantised * NF4_BITS / 8


def meta_model(base: ModelConfig) -> Any:
    """The base model without weights, from its configuration. Raises `InputError`."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(base.path, revision=base.revision, trust_remote_code=base.trust_remote_code)
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(
            config, dtype=getattr(torch, base.dtype), trust_remote_code=base.trust_remote_code
        )


def measure(model: Any) -> Shapes:
    """The shapes of a model that is there, if only on the meta device."""
    text = model.config.get_text_config()
    language = [model.get_submodule(name) for name in target_names(model, ModulesConfig())]
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Shapes(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        linear=sum(layer.weight.numel() for layer in language),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        per_layer=max(_passed(layer, text) for layer in model.get_decoder().layers),
        cache=2 * text.num_hidden_layers * heads * width,
        context=text.max_position_embeddings,
    )


def _passed(layer: nn.Module, text: Any) -> int:
    """Σ (in + out) over the matrices of a decoder layer that a token goes through: of experts, those it is sent to."""
    linear = [module for module in layer.modules() if isinstance(module, nn.Linear)]
    experts = [weight for weight in layer.parameters() if weight.ndim == 3]  # [experts, …, …]
    active = getattr(text, "num_experts_per_tok", None) or 1
    return sum(one.in_features + one.out_features for one in linear) + active * sum(
        sum(weight.shape[1:]) for weight in experts
    )
