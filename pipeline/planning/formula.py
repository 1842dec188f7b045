"""The GPU memory that training a stage takes, worked out from a model's shapes. Bytes of one GPU.

`python benchmarks/memory.py` prints the tables of docs/cluster.md; `tests/test_memory_formula.py` holds the formula
against what was measured.
"""

from dataclasses import dataclass
from typing import Any

from ..run.disk import Shapes

GIB = 2**30


@dataclass(frozen=True)
class Training:
    """What trains, and how it is shared out."""

    model: Any  # of which only shapes are looked at
    shapes: Shapes  # of the layers with LoRA
    rank: int
    past_rank: int = 0  # of the stages before, under lineage `stack`
    mode: str = "single"
    processes: int = 1
    samples: int = 1  # of a micro-batch
    tokens: int = 2048  # of a sample, images included
    answer: int = 0  # of those, generated: RFT


def gpu_bytes(training: Training) -> dict[str, float]:
    """What takes the memory of one GPU at its peak, by part; their sum is the peak.

    Frozen weights are in the model's dtype, and shared out under ZeRO-3. Of a weight in training there are its float32
    value, its gradient and AdamW's two moments; ZeRO shares the last three out, with float32 copies of its own. With
    gradient checkpointing what stays of a layer is its input, and one layer at a time is computed again:
    per token about 12 vectors of its width and 6 of its inner width (ours, from the operations of a gated MLP and its
    gradients). In RFT the logits of the answers come on top; while it generates there are no activations but the keys
    and values of all layers.
    """
    text, parts = training.model.config.get_text_config(), dict[str, float]()
    weights = list(training.model.parameters())
    item = weights[0].element_size()
    frozen = sum(weight.numel() * weight.element_size() for weight in weights)
    parts["frozen weights"] = frozen / (training.processes if training.mode == "zero3" else 1)
    width = sum(rows + columns for rows, columns in training.shapes.values())
    parts["past of the lineage"] = training.past_rank * width * item
    trained, sharded = training.rank * width, training.mode in ("zero2", "zero3")
    parts["weights in training"] = 16.0 * trained
    if sharded:
        parts["weights in training"] = trained * (4 + 4 + 16 / training.processes)
    in_batch = training.samples * training.tokens
    inner = getattr(text, "num_experts_per_tok", None)
    inner = inner * text.moe_intermediate_size if inner else text.intermediate_size
    layers = text.num_hidden_layers
    activations = in_batch * item * (layers * text.hidden_size + 12 * text.hidden_size + 6 * inner)
    logits = training.samples * training.answer * text.vocab_size * item
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cache = in_batch * 2 * layers * text.num_key_value_heads * head * item if training.answer else 0
    parts["activations"] = max(activations + logits, cache)
    if training.mode == "zero3":  # the layer at work, and the next one, are whole
        whole = max(sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in _layers(training.model))
        parts["activations"] += 2 * whole
    parts["CUDA and fragments"] = 0.5 * GIB + 0.05 * sum(parts.values())
    return parts


def _layers(model: Any) -> Any:
    return model.get_decoder().layers
