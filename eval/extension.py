"""Policies that are the untouched base with modules of a method's own in it, which transformers alone runs.

A folder holds `config.json`, `{"kind": …, settings}`, and `model.safetensors`. Training makes the modules by the same
code as evaluation: `extend` puts them into a model, `save_extension` writes what they hold.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import read_json, write_json

IGNORED = -100  # the label of what is not predicted
CONFIG, WEIGHTS = "config.json", "model.safetensors"


class MixtureLinear(nn.Linear):
    """A linear layer with LoRA experts, all of which act on every token, weighted by a router (CoIN's MoELoRA).

        y = W x + bias + scaling · Σ_e softmax(router x)_e B_e A_e x

    The experts lie side by side in `a` [experts · rank, in] and `b` [out, experts · rank], so that they cost what one
    LoRA of their ranks together does; `router` is [experts, in].
    """

    def __init__(self, linear: nn.Linear, a: Tensor, b: Tensor, router: Tensor, scaling: float):
        nn.Module.__init__(self)  # not nn.Linear's: it would allocate and initialise
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.a, self.b, self.router = nn.Parameter(a), nn.Parameter(b), nn.Parameter(router)
        self.scaling = scaling
        self.dropout: nn.Module = nn.Identity()

    def forward(self, input: Tensor) -> Tensor:
        own = input.to(self.a.dtype)
        shares = F.linear(own, self.router).float().softmax(-1).to(own.dtype)  # [..., experts]
        inner = F.linear(self.dropout(own), self.a).unflatten(-1, (len(self.router), -1))
        added = F.linear((inner * shares[..., None]).flatten(-2), self.b)
        return super().forward(input) + (self.scaling * added).to(input.dtype)


class PromptPool(nn.Module):
    """Prompts that a question picks by its likeness to their keys, put before its embeddings (L2P).

    The query is the mean of the question's input embeddings, those of its images included; the `top` prompts with the
    keys of the largest cosine are taken. Where an answer follows the question, a model must be told by `labels`, which
    are not -100 there: what is to be predicted has no say. `keys` [pool, units], `prompts` [pool, length, units].
    """

    def __init__(self, keys: Tensor, prompts: Tensor, top: int):
        super().__init__()
        self.keys, self.prompts, self.top = nn.Parameter(keys), nn.Parameter(prompts), top
        self.likeness: Tensor | None = None  # of the last pass, [rows]: the mean cosine of the keys that were taken
        self.count = top * prompts.shape[1]  # of the vectors that are prepended
        self.answers: Tensor | None = None  # of the pass that begins, [rows, tokens]: which are no part of the question

    def forward(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """Prompts [rows, top · length, units] for embeddings [rows, tokens, units] whose `mask` is not zero."""
        if self.answers is not None:
            mask, self.answers = mask * ~self.answers, None
        weights = mask[..., None].to(embeddings.dtype)
        query = (embeddings.detach() * weights).sum(1) / weights.sum(1)
        cosines = F.normalize(query.float(), dim=-1) @ F.normalize(self.keys.float(), dim=-1).T
        best, chosen = cosines.topk(self.top, dim=-1)
        self.likeness = best.mean(-1)
        return self.prompts[chosen].flatten(1, 2).to(embeddings.dtype)

    def attach(self, model: Any) -> None:
        """Have the decoder of `model` prepend prompts to what it embeds; their places are taken off what it returns."""
        state: dict[str, Any] = {}

        def told(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            labels = kwargs.get("labels")
            self.answers = None if labels is None else labels != IGNORED

        def before(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            inputs = kwargs.get("inputs_embeds")
            if inputs is None:
                inputs = module.get_input_embeddings()(kwargs.pop("input_ids"))
            cache, mask, places = (kwargs.get(key) for key in ("past_key_values", "attention_mask", "position_ids"))
            seen = cache.get_seq_length() if cache is not None else 0
            state["first"] = seen == 0
            if mask is None:
                mask = inputs.new_ones(len(inputs), inputs.shape[1] + max(0, seen - self.count), dtype=torch.long)
            if state["first"]:
                prompts = self(inputs, mask)
                inputs = torch.cat([prompts, inputs], dim=1)
            if places is not None and state["first"]:
                prefix = torch.arange(self.count, device=places.device).expand(*places.shape[:-1], -1)
                state["places"] = torch.cat([prefix, places + self.count], dim=-1)
            elif places is not None:  # as models count on from the cache, its prompts would count twice in some
                state["places"] = state["places"][..., -1:] + 1 + torch.arange(places.shape[-1], device=places.device)
            if places is not None:
                kwargs["position_ids"] = state["places"]
            kwargs["attention_mask"] = torch.cat([mask.new_ones(len(mask), self.count), mask], dim=1)
            return args, kwargs | {"inputs_embeds": inputs}

        def after(module: Any, args: Any, output: Any) -> Any:
            if state["first"]:
                output.last_hidden_state = output.last_hidden_state[:, self.count :]
            return output

        model.register_forward_pre_hook(told, with_kwargs=True)
        model.get_decoder().register_forward_pre_hook(before, with_kwargs=True)
        model.get_decoder().register_forward_hook(after)


def add_mixtures(model: nn.Module, tensors: Mapping[str, Tensor], scaling: float) -> dict[str, MixtureLinear]:
    """Put experts into the layers that `tensors` name (`<layer>.a`, `.b`, `.router`); the layers by name."""
    added = {}
    for name in sorted({key.rpartition(".")[0] for key in tensors}):
        linear: Any = model.get_submodule(name)
        a, b, router = (tensors[f"{name}.{part}"] for part in ("a", "b", "router"))
        added[name] = MixtureLinear(linear, a, b, router, scaling).to(linear.weight.device)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, added[name])
    return added


def add_prompts(model: Any, tensors: Mapping[str, Tensor], top: int) -> PromptPool:
    """Put a pool of prompts before the language model."""
    decoder = model.get_decoder()
    decoder.prompt_pool = PromptPool(tensors["keys"], tensors["prompts"], top)
    decoder.prompt_pool.attach(model)
    return decoder.prompt_pool


def save_extension(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write what `extend` reads."""
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in sorted(tensors.items())}, folder / WEIGHTS)
    write_json(folder / CONFIG, dict(config))


def extend(model: Any, folder: Path) -> None:
    """Put a policy's modules into the untouched base, in its dtype. Raises `InputError` for a kind that is unknown."""
    config = read_json(folder / CONFIG)
    tensors = {name: tensor.to(model.dtype) for name, tensor in load_file(folder / WEIGHTS).items()}
    if config.get("kind") == "mixture":
        add_mixtures(model, tensors, config["scaling"])
    elif config.get("kind") == "prompts":
        add_prompts(model, tensors, config["top"])
    else:
        problem = f"is of an unknown kind, {config.get('kind')!r}"
        raise InputError(problem, where=folder / CONFIG, field="kind", remedy="Train the stage again")
