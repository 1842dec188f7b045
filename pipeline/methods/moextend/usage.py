"""How experts are used, and in which layers that shifts most when only the routers are tuned: MoExtend's extender.

MoExtend's release counts the k *least* likely experts of a token (an ascending sort); here it is those it is sent to.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor

Batch = Mapping[str, Tensor]  # of the collator
LEARNING_RATE = 1e-3  # of routers, constant, without weight decay: MoExtend (code)


@torch.no_grad()
def usage(model: Any, blocks: Mapping[int, Any], batches: Iterable[Batch]) -> dict[int, Tensor]:
    """Of each layer, the share of tokens that each expert got: [experts], float64 on the CPU, summing to 1.

    A token counts once for each of its k experts, padding not at all.
    """
    counts = {layer: torch.zeros(block.experts.num_experts, dtype=torch.float64) for layer, block in blocks.items()}
    with contextlib.ExitStack() as hooks:
        real: Tensor
        for layer, block in blocks.items():

            def count(_: Any, __: Any, routed: tuple[Tensor, ...], into: Tensor = counts[layer]) -> None:
                chosen = routed[-1][real].flatten().cpu()  # routed: logits, weights, and the experts of each token
                into += torch.bincount(chosen, minlength=len(into))

            hooks.callback(block.gate.register_forward_hook(count).remove)
        for batch in batches:
            real = batch["attention_mask"].bool().flatten().to(model.device)
            model(**_inputs(model, batch), logits_to_keep=1)
    return {layer: into / into.sum() for layer, into in counts.items()}


def shifted_usage(
    model: Any, blocks: Mapping[int, Any], batches: Sequence[Batch], steps: int
) -> dict[int, tuple[Tensor, Tensor]]:
    """Each layer's usage before and after `steps` steps in which its router, and all others, learn the task.

    A step sees one batch. The routers are as before afterwards, to the bit.
    """
    before = usage(model, blocks, batches)
    with _tuned(model, [block.gate.weight for block in blocks.values()], islice(cycle(batches), steps)):
        after = usage(model, blocks, batches)
    return {layer: (before[layer], after[layer]) for layer in blocks}


def shift(before: Tensor, after: Tensor) -> float:
    """The standard deviation over a layer's experts (n − 1) of the change of their usage. MoExtend (code)."""
    return float((after - before).std())


def most_shifted(shifts: Mapping[int, float], share: float) -> list[int]:
    """The layers of the largest shifts, a `share` of all rounded down but at least one, in their order in the model."""
    ranked = sorted(shifts, key=lambda layer: (-shifts[layer], layer))
    return sorted(ranked[: max(1, int(share * len(ranked)))])


def most_used(used: Tensor, k: int) -> list[int]:
    """The `k` experts used most, [experts], of equals the first; where there are fewer, from the start again."""
    ranked = used.argsort(descending=True, stable=True).tolist()
    return list(islice(cycle(ranked), k))


def least_used(used: Tensor, k: int) -> list[int]:
    """The `k` experts used least, in the same way."""
    return most_used(-used, k)


@contextlib.contextmanager
def _tuned(model: Any, routers: Sequence[torch.nn.Parameter], batches: Iterable[Batch]) -> Iterator[None]:
    """The model with its routers trained on `batches`, and nothing else; as it was on leaving."""
    kept = [router.detach().clone() for router in routers]
    for router in routers:
        router.requires_grad_(True)
    optimizer = torch.optim.AdamW(routers, lr=LEARNING_RATE, weight_decay=0.0)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    for batch in batches:
        model(**_inputs(model, batch), labels=batch["labels"].to(model.device)).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.eval()
    model.gradient_checkpointing_disable()
    try:
        yield
    finally:
        with torch.no_grad():
            for router, weight in zip(routers, kept, strict=True):
                router.copy_(weight).requires_grad_(False)


def _inputs(model: Any, batch: Batch) -> dict[str, Any]:
    return {key: value.to(model.device) for key, value in batch.items() if key != "labels"} | {"use_cache": False}
