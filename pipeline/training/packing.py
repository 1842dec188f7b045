"""Rows of a batch that begin alike are read as one: what they share once, and each one's rest beside the others'.

A *tree* is made of such rows: their common beginning, as a rule the picture, and behind it a *branch* for each, which
sees the beginning and itself alone. A packed row holds as many trees as fit; ordinary packing is that of trees of one.

The decoder alone sees any of it. Embeddings and positions are picked from the rows of the batch as the model made them,
and the last hidden states are put back into these. So whoever makes a loss of them, TRL or a method, has rows as ever;
loss and gradients are what they are without packing, up to the order of summation (dropout draws other numbers). A
picture that a batch has several times is encoded once.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from mcit.data_prep.errors import InputError

from .pictures import each_once
from .replay import backbone, unwrapped

PACKING = "packing"  # what a batch calls its `Packing`
NONE = -1  # the branch of what is shared, the tree of what only fills a row up
ATTENTION = ("sdpa", "eager", "flex_attention")  # those that take any mask


@dataclass(frozen=True)
class Packing:
    """Where the tokens of a batch, [rows, length], lie in fewer rows, [packed, size]."""

    picked: Tensor  # [packed, size]: which token of the flattened batch lies there
    tree: Tensor  # [packed, size]: the tree that it is of
    branch: Tensor  # [packed, size]: the branch that it is of
    places: Tensor  # [rows, length]: where in the flattened packed rows a token lies; padding lies anywhere

    def to(self, device: torch.device) -> "Packing":
        """The same on another device."""
        tensors = (self.picked, self.tree, self.branch, self.places)
        return Packing(*(tensor.to(device, non_blocking=True) for tensor in tensors))

    def sees(self, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Whether a token looks at another one of its row; indices that broadcast, as transformers wants it."""
        branch, tree = self.branch, self.tree
        on_its_way = (branch[row, key] == NONE) | (branch[row, key] == branch[row, query])
        return on_its_way & (tree[row, key] == tree[row, query]) & (key <= query)

    def mask(self, config: Any, like: Tensor) -> Any:
        """What a decoder's attention takes for a mask, for embeddings as `like`, [packed, size, width]."""
        rows, size = self.picked.shape
        make = ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation]
        options = {"allow_is_causal_skip": False, "dtype": like.dtype, "device": like.device}
        return make(batch_size=rows, q_length=size, kv_length=size, mask_function=self.sees, **options)


class _Tree(NamedTuple):
    rows: list[int]  # of the batch
    shared: int  # columns of the batch, padding included
    tokens: int


def pack(ids: Tensor, mask: Tensor, alike: Sequence[Hashable], width: int) -> Packing:
    """The cheapest packing of a batch for a decoder of hidden size `width`; `ids` and `mask` are [rows, length].

    Rows may make a tree where `alike` is equal, which says that their pictures are the same. A packed row is as long as
    the longest tree: attention takes a row as a whole, so longer ones cost more, and for the same reason several
    smaller trees that repeat what is shared may be better than one.
    """
    groups = [[row for row, key in enumerate(alike) if key == one] for one in dict.fromkeys(alike)]
    ways, most = list[list[list[_Tree]]](), 1
    while most < 2 * max(map(len, groups)):
        parts = [group[start : start + most] for group in groups for start in range(0, len(group), most)]
        ways.append(_fill([_tree(part, ids, mask) for part in parts]))
        most *= 2
    return _laid_out(min(ways, key=lambda rows: _cost(rows, width)), mask.bool())


def _tree(rows: list[int], ids: Tensor, mask: Tensor) -> _Tree:
    same = ((ids[rows] == ids[rows[0]]) & (mask[rows] == mask[rows[0]])).all(0)
    shared = int(same.long().cumprod(0).sum())
    return _Tree(rows, shared, int(mask[rows[0], :shared].sum() + mask[rows, shared:].sum()))


def _fill(trees: list[_Tree]) -> list[list[_Tree]]:
    """Rows of trees, none longer than the longest tree: each goes into the first row with room, long ones first."""
    size = max(tree.tokens for tree in trees)
    rows: list[list[_Tree]] = []
    for tree in sorted(trees, key=lambda tree: -tree.tokens):
        with_room = (row for row in rows if sum(one.tokens for one in row) + tree.tokens <= size)
        if (row := next(with_room, None)) is None:
            rows.append(row := [])
        row.append(tree)
    return rows


def _cost(rows: list[list[_Tree]], width: int) -> int:
    """What rows cost a decoder layer: its some 12 width² weights twice a token, attention 4 width a token and place."""
    size = max(tree.tokens for row in rows for tree in row)
    return len(rows) * size * (6 * width + size)


def _laid_out(rows: list[list[_Tree]], mask: Tensor) -> Packing:
    token = torch.arange(mask.numel()).view_as(mask)  # of each token, the one that stands for it
    own = torch.arange(len(mask))[:, None].expand_as(mask)  # the row
    kept, tree, branch = mask.clone(), own.clone(), own.clone()
    for one in (one for row in rows for one in row):
        head, *rest = one.rows
        tree[one.rows] = head
        branch[one.rows, : one.shared] = NONE
        kept[rest, : one.shared] = False
        token[rest, : one.shared] = token[head, : one.shared].clone()
    lines = [[number for one in row for number in one.rows] for row in rows]
    picked, tree, branch = (
        pad_sequence([field[line][kept[line]] for line in lines], True, fill)
        for field, fill in ((token, 0), (tree, NONE), (branch, NONE))
    )
    places = torch.zeros(mask.numel(), dtype=torch.long)
    places[picked[tree != NONE]] = (tree != NONE).flatten().nonzero()[:, 0]
    return Packing(picked, tree, branch, places[token])


def read_packed(model: nn.Module) -> int:
    """Have `model` take batches with a `packing`; the hidden size of its decoder, for which they are to be packed.

    Raises `InputError` where attention cannot keep trees apart.
    """
    whole, decoder = backbone(model), unwrapped(model).get_decoder()
    _check_attention(decoder.config)
    at_hand: list[Packing] = []  # of the pass that runs

    def take(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        at_hand[:] = [packing] if (packing := kwargs.pop(PACKING, None)) else []
        return args, kwargs

    def pick(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if at_hand:
            at_hand[:] = [packing] = [at_hand[0].to(kwargs["inputs_embeds"].device)]
            kwargs |= _picked(kwargs, packing.picked)
            kwargs["attention_mask"] = packing.mask(decoder.config, kwargs["inputs_embeds"])
        return args, kwargs

    def put_back(module: Any, args: Any, output: Any) -> Any:
        if at_hand:
            output.last_hidden_state = output.last_hidden_state.flatten(0, 1)[at_hand.pop().places]
        return output

    whole.register_forward_pre_hook(take, with_kwargs=True)
    decoder.register_forward_pre_hook(pick, with_kwargs=True)
    decoder.register_forward_hook(put_back)
    whole.get_image_features = each_once(whole.get_image_features)
    return decoder.config.hidden_size


def _picked(kwargs: dict[str, Any], picked: Tensor) -> dict[str, Any]:
    """What a decoder is given of a batch's tokens, for those that are `picked`."""
    rows = kwargs["inputs_embeds"]  # [rows, length, width]
    positions = kwargs.get("position_ids")  # [rows, length], or several of these, one for each direction
    if positions is None:
        positions = torch.arange(rows.shape[1], device=rows.device)[None]
    positions = positions.expand(*positions.shape[:-2], *rows.shape[:2])
    fields = {"inputs_embeds": rows.flatten(0, 1)[picked], "position_ids": positions.flatten(-2)[..., picked]}
    if (seen := kwargs.get("visual_pos_masks")) is not None:  # [rows, length]: Qwen3-VL adds to these tokens later on
        number, chosen = seen.flatten().cumsum(0) - 1, seen.flatten()[picked]
        fields["visual_pos_masks"] = chosen
        fields["deepstack_visual_embeds"] = [one[number[picked[chosen]]] for one in kwargs["deepstack_visual_embeds"]]
    return fields


def _check_attention(config: Any) -> None:
    name, layers = config._attn_implementation, set(getattr(config, "layer_types", None) or ["full_attention"])
    if name not in ATTENTION:
        problem, remedy = f"does not work with attention by {name}", f"Use {', '.join(ATTENTION)}"
    elif layers != {"full_attention"} or getattr(config, "sliding_window", None):
        problem, remedy = (
            f"does not work for {config.model_type}, whose layers do not all see a whole row",
            "Leave it out",
        )
    else:
        return
    raise InputError(problem, where="recipe", field="train.packing", remedy=remedy)
