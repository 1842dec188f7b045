"""The models that MoExtend knows: where their experts are, how a dense one gets some, and how the result is written."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mcit.data_prep.errors import InputError
from mcit.eval.serving import save_processor

from .experts import count

if TYPE_CHECKING:
    from transformers import PreTrainedModel

UPCYCLED = "qwen3_vl"  # the dense family that has a mixture of the same architecture, qwen3_vl_moe
TOP_K = 2  # of an upcycled layer: with one expert a token, its weight is 1 whatever the router says, and no row learns


def blocks_of(model: "PreTrainedModel", layers: Any) -> dict[int, Any]:
    """The mixture-of-experts blocks of a model's language model, by layer; everything is frozen.

    A mixture's own, all of them. In a dense Qwen3-VL the MLP of each of `layers` becomes a mixture of one expert, which
    computes the same. Modifies `model`. Raises `InputError` for every other model, and for `layers`
    (`MoExtendConfig.layers`) that it does not have.
    """
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextSparseMoeBlock

    model.requires_grad_(False)
    decoder: Any = model.get_decoder()
    if is_upcycled(model):
        _upcycle(model, _dense_layers(decoder, layers))
    known = (Qwen3VLMoeTextSparseMoeBlock, MixtralSparseMoeBlock)
    blocks = {i: layer.mlp for i, layer in enumerate(decoder.layers) if isinstance(getattr(layer, "mlp", None), known)}
    if not blocks:
        raise InputError(
            f"{type(model).__name__} over {type(decoder).__name__} is none of the models that MoExtend knows",
            where="recipe",
            field="method.moextend",
            remedy="It extends Qwen3-VL-MoE, models with a Mixtral inside, and dense Qwen3-VL",
        )
    if isinstance(layers, list) and not set(layers) <= set(blocks):
        raise _no_layer(min(set(layers) - set(blocks)), "experts")
    # TRL would add a loss that spreads tokens evenly over all experts, counting only the old ones.
    model.config.get_text_config().router_aux_loss_coef = 0.0
    return blocks


def is_upcycled(model: "PreTrainedModel") -> bool:
    """Whether the mixture is ours: the model as it was loaded was dense."""
    return bool(model.config.model_type == UPCYCLED)


def expert_bytes(model: "PreTrainedModel", layers: Any) -> dict[int, int]:
    """What one more expert takes with its router row, by layer that gets one; of `model`, only shapes are looked at."""
    decoder: Any = model.get_decoder()
    found: dict[int, int] = {}
    for layer in _dense_layers(decoder, layers) if is_upcycled(model) else range(len(decoder.layers)):
        mlp = decoder.layers[layer].mlp
        experts = getattr(mlp, "experts", None)
        if experts is None and not is_upcycled(model):
            continue  # a dense layer of a mixture
        parameters = [parameter[:1] for parameter in experts.parameters()] if experts is not None else mlp.parameters()
        row = decoder.config.hidden_size * next(mlp.parameters()).element_size()
        found[layer] = row + sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    return found


def save(model: "PreTrainedModel", processor: Any, blocks: dict[int, Any], folder: Path) -> None:
    """Write an extended model, nothing in training any more, as published checkpoints are, for transformers and vLLM.

    Experts of Qwen3-VL-MoE are written [experts, in, out]: vLLM reads no others. Spoils `model`, to spare a copy.
    """
    config: Any = _mixture_config(model, list(blocks)) if is_upcycled(model) else model.config
    text = config.get_text_config()
    text.num_local_experts = count(next(iter(blocks.values())))
    if config.model_type == "qwen3_vl_moe":
        text.norm_topk_prob = True  # what its router does whatever this says; vLLM's asks
        for block in blocks.values():
            for name, parameter in block.experts.named_parameters():
                setattr(block.experts, name, nn.Parameter(parameter.detach().transpose(1, 2).contiguous(), False))
    model.save_pretrained(folder)
    config.save_pretrained(folder)
    save_processor(processor, folder)


def _dense_layers(decoder: Any, layers: Any) -> list[int]:
    """The layers of a dense model that become mixtures. Raises `InputError`."""
    everywhere = list(range(len(decoder.layers)))
    if isinstance(layers, float):
        raise InputError(
            "is a share, and a dense model has no routers whose usage could shift",
            where="recipe",
            field="method.moextend.layers",
            remedy="Set it to all, or list the layers",
        )
    if layers != "all" and not set(layers) <= set(everywhere):
        raise _no_layer(max(layers), "MLP")
    return everywhere if layers == "all" else sorted(set(layers))


def _no_layer(layer: int, what: str) -> InputError:
    return InputError(f"the model has no layer {layer} with {what}", where="recipe", field="method.moextend.layers")


def _upcycle(model: "PreTrainedModel", layers: Sequence[int]) -> None:
    """Make the MLP of each of `layers` the one expert of a mixture. Its router row is zero: only differences count."""
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextSparseMoeBlock

    text = _mixture_config(model, layers).get_text_config()
    decoder: Any = model.get_decoder()
    for layer in layers:
        mlp = decoder.layers[layer].mlp
        gate, up, down = (part.weight.detach() for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        with torch.device("meta"):
            block = Qwen3VLMoeTextSparseMoeBlock(text)
        block.experts.gate_up_proj = nn.Parameter(torch.cat([gate, up])[None], requires_grad=False)
        block.experts.down_proj = nn.Parameter(down[None], requires_grad=False)
        block.gate.weight = nn.Parameter(gate.new_zeros(1, gate.shape[1]), requires_grad=False)
        decoder.layers[layer].mlp = block


def _mixture_config(model: "PreTrainedModel", layers: Sequence[int]) -> Any:
    """The configuration of a dense Qwen3-VL whose `layers` are mixtures of one expert."""
    from transformers import Qwen3VLMoeConfig

    dense = model.config.to_dict()
    text = {key: value for key, value in dense["text_config"].items() if key != "model_type"}
    vision = {key: value for key, value in dense["vision_config"].items() if key != "model_type"}
    text |= {
        "num_experts": 1,
        "num_experts_per_tok": TOP_K,
        "moe_intermediate_size": text["intermediate_size"],
        "mlp_only_layers": [i for i in range(text["num_hidden_layers"]) if i not in layers],
        "tie_word_embeddings": dense["tie_word_embeddings"],  # vLLM looks for it here
    }
    kept = {key: value for key, value in dense.items() if key not in ("model_type", "text_config", "vision_config")}
    kept |= {"architectures": ["Qwen3VLMoeForConditionalGeneration"], "text_config": text, "vision_config": vision}
    config = Qwen3VLMoeConfig(**kept)
    config._experts_implementation = "grouped_mm"  # transformers' own choice for a model it loads
    return config
