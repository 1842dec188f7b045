"""What the vision tower makes of pictures: of each picture of a batch once, or of each picture of a stage once."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from inspect import signature
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor, nn

from mcit.data_prep.errors import InputError

from .replay import backbone

Features = Callable[..., Any]  # a model's `get_image_features`


TOLD = {"pixel_values", "image_grid_thw", "image_sizes"}  # tensors that say of each picture something of its own


class Kind(NamedTuple):
    """What an output is like, apart from what is in it."""

    make: Callable[..., Any]
    stacked: bool  # one tensor for all pictures, not one for each
    device: torch.device

    @classmethod
    def of(cls, output: Any) -> "Kind":
        """That of an output."""
        tokens = output.pooler_output
        stacked = isinstance(tokens, Tensor)
        return cls(type(output), stacked, (tokens if stacked else tokens[0]).device)


class Made(NamedTuple):
    """What became of a picture."""

    tokens: Tensor  # [tokens, width]
    layers: tuple[Tensor, ...] = ()  # the same of earlier layers, where a model adds these to its decoder's

    @property
    def bytes(self) -> int:
        """What it takes in memory."""
        return sum(tensor.nbytes for tensor in (self.tokens, *self.layers))


def each_once(features: Features) -> Features:
    """`features`, but of pictures of equal pixels in a batch only one is encoded.

    Where a model cuts pictures into tiles, these are compared; where it drops some of them, all are encoded.
    """

    @wraps(features)
    def of(*args: Any, **kwargs: Any) -> Any:
        given, parts = _taken_apart(features, args, kwargs)
        first = first_equal(parts)
        chosen = sorted(set(first))
        if len(chosen) == len(parts) or (found := _encode(features, given, parts, chosen)) is None:
            return features(*args, **kwargs)
        kind, made = found
        return _joined(kind, [made[chosen.index(picture)] for picture in first])

    return of


def remember_pictures(model: nn.Module, room: float) -> None:
    """Have a model whose tower and projector are frozen encode a picture once as long as it is among those remembered:
    in main memory, up to `room` bytes, what was not asked for longest goes first.
    """
    whole = backbone(model)
    whole.get_image_features = remembered(whole.get_image_features, room)


def remembered(features: Features, room: float) -> Features:
    """`features` with a memory; see `remember_pictures`. A picture is known by a hash of its pixels, 128 bits.

    Raises `InputError` where a model does not say what became of which picture, or looks at more than pictures.
    """
    known = OrderedDict[Any, Made]()
    kinds = list[Kind]()
    taken = 0

    @wraps(features)
    def of(*args: Any, **kwargs: Any) -> Any:
        nonlocal taken
        given, parts = _taken_apart(features, args, kwargs)
        if more := [name for name, value in given.items() if isinstance(value, Tensor) and name not in TOLD]:
            raise _unknown(f"look at {more[0]}")
        keys = [(_hash(part), *_said_of(place, given)) for place, part in enumerate(parts)]
        new = [place for place, key in enumerate(keys) if key not in known and key not in keys[:place]]
        if new:
            if (found := _encode(features, given, parts, new)) is None:
                raise _unknown("cut pictures up by themselves")
            kinds[:] = [found[0]]
            for place, made in zip(new, found[1], strict=True):
                known[keys[place]] = kept = Made(_kept(made.tokens), tuple(map(_kept, made.layers)))
                taken += kept.bytes
        for key in keys:
            known.move_to_end(key)
        wanted = [known[key] for key in keys]
        while taken > room:
            taken -= known.popitem(last=False)[1].bytes
        return _joined(kinds[0], wanted)

    return of


def _unknown(what: str) -> InputError:
    problem = f"does not work for models that {what}"
    return InputError(problem, where="recipe", field="train.picture_cache", remedy="Leave it out")


def _hash(pixels: Tensor) -> bytes:
    return xxhash.xxh3_128_digest(pixels.cpu().contiguous().view(torch.uint8).numpy().data)


def _said_of(place: int, given: Mapping[str, Any]) -> list[Any]:
    """What else a model is told of one of its pictures: in how many patches it is cut, how large it was."""
    told = (given[name] for name in sorted(TOLD - {"pixel_values"}) if given.get(name) is not None)
    return [tuple(x[place].tolist()) for x in told]


def _kept(tensor: Tensor) -> Tensor:
    """A copy in main memory, which does not hold on to the whole batch that it is a part of."""
    return tensor.detach().to("cpu", copy=True)


def _taken_apart(features: Features, args: Any, kwargs: Any) -> tuple[dict[str, Any], Sequence[Tensor]]:
    """What `features` is given by name, and the pixels of each picture."""
    given = signature(features).bind(*args, **kwargs).arguments
    given |= given.pop("kwargs", {})
    pixels, grid = given["pixel_values"], given.get("image_grid_thw")  # [pictures, …]; with a grid [patches, …]
    return given, pixels.split([1] * len(pixels) if grid is None else grid.prod(-1).tolist())


def _encode(
    features: Features, given: Mapping[str, Any], parts: Sequence[Tensor], chosen: Sequence[int]
) -> tuple[Kind, list[Made]] | None:
    """What the output for those pictures alone is like, and what it holds of each; None where some were dropped."""
    fewer = {key: x[chosen] if isinstance(x, Tensor) and len(x) == len(parts) else x for key, x in given.items()}
    output = features(**(fewer | {"pixel_values": torch.cat([parts[picture] for picture in chosen])}))
    tokens = output.pooler_output
    if len(tokens) != len(chosen):
        return None
    counts = [len(one) for one in tokens]
    layers = [layer.split(counts) for layer in output.get("deepstack_features") or ()]  # each of [tokens of all, width]
    return Kind.of(output), [Made(one, tuple(layer[at] for layer in layers)) for at, one in enumerate(tokens)]


def _joined(kind: Kind, made: Sequence[Made]) -> Any:
    """An output of that kind, of these pictures."""
    tokens = [one.tokens.to(kind.device) for one in made]
    joined = kind.make(pooler_output=torch.stack(tokens) if kind.stacked else tokens)
    if made[0].layers:
        layers = zip(*(one.layers for one in made), strict=True)
        joined["deepstack_features"] = [torch.cat(list(layer)).to(kind.device) for layer in layers]
    return joined


def first_equal(parts: Sequence[Tensor]) -> list[int]:
    """Of each tensor the place of the first one that is the same."""
    sums = torch.stack([part.sum(dtype=torch.float64) for part in parts]).tolist()  # tells most of them apart
    first: list[int] = []
    for place, part in enumerate(parts):
        known = (i for i in range(place) if first[i] == i and sums[i] == sums[place] and torch.equal(parts[i], part))
        first.append(next(known, place))
    return first
