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
        output, made = found
        return _joined(output, [made[chosen.index(picture)] for picture in first])

    return of


def remember_pictures(model: nn.Module, room: float) -> None:
    """Have a model whose tower and projector are frozen encode a picture once as long as it is among those remembered:
    in main memory, up to `room` bytes, what was not asked for longest goes first.
    """
    whole = backbone(model)
    whole.get_image_features = remembered(whole.get_image_features, room)


def remembered(features: Features, room: float) -> Features:
    """`features` with a memory; see `remember_pictures`. A picture is known by a hash of its pixels, 128 bits.

    Raises `InputError` where a model does not say what became of which picture.
    """
    known = OrderedDict[Any, Made]()
    outputs: list[Any] = []  # one, to make others like it
    taken = 0

    @wraps(features)
    def of(*args: Any, **kwargs: Any) -> Any:
        nonlocal taken
        given, parts = _taken_apart(features, args, kwargs)
        keys = [(_hash(part), *_said_of(place, given, len(parts))) for place, part in enumerate(parts)]
        new = [place for place, key in enumerate(keys) if key not in known and key not in keys[:place]]
        if new:
            if (found := _encode(features, given, parts, new)) is None:
                problem, field = "does not work for models that cut pictures up by themselves", "train.picture_cache"
                raise InputError(problem, where="recipe", field=field, remedy="Leave it out")
            outputs[:] = [found[0]]
            for place, made in zip(new, found[1], strict=True):
                known[keys[place]] = kept = Made(_kept(made.tokens), tuple(map(_kept, made.layers)))
                taken += kept.bytes
        for key in keys:
            known.move_to_end(key)
        wanted = [known[key] for key in keys]
        while taken > room:
            taken -= known.popitem(last=False)[1].bytes
        return _joined(outputs[0], wanted)

    return of


def _hash(pixels: Tensor) -> bytes:
    return xxhash.xxh3_128_digest(pixels.cpu().contiguous().view(torch.uint8).numpy().data)


def _said_of(place: int, given: Mapping[str, Any], pictures: int) -> list[Any]:
    """What else a model is told of one of its pictures: in how many patches it is cut, how large it was."""
    told = (value for name, value in given.items() if name != "pixel_values")
    return [tuple(x[place].tolist()) for x in told if isinstance(x, Tensor) and x.ndim == 2 and len(x) == pictures]


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
) -> tuple[Any, list[Made]] | None:
    """The output for those pictures alone, and what it holds of each; None where a model drops some of them."""
    fewer = {key: x[chosen] if isinstance(x, Tensor) and len(x) == len(parts) else x for key, x in given.items()}
    output = features(**(fewer | {"pixel_values": torch.cat([parts[picture] for picture in chosen])}))
    tokens = output.pooler_output
    if len(tokens) != len(chosen):
        return None
    counts = [len(one) for one in tokens]
    layers = [layer.split(counts) for layer in output.get("deepstack_features") or ()]  # each of [tokens of all, width]
    return output, [Made(one, tuple(layer[at] for layer in layers)) for at, one in enumerate(tokens)]


def _joined(output: Any, made: Sequence[Made]) -> Any:
    """An output like `output`, of these pictures."""
    like = output.pooler_output
    device = (like if isinstance(like, Tensor) else like[0]).device
    tokens = [one.tokens.to(device) for one in made]
    joined = type(output)(pooler_output=torch.stack(tokens) if isinstance(like, Tensor) else tokens)
    if output.get("deepstack_features"):
        joined["deepstack_features"] = [
            torch.cat(list(layer)).to(device) for layer in zip(*(one.layers for one in made), strict=True)
        ]
    return joined


def first_equal(parts: Sequence[Tensor]) -> list[int]:
    """Of each tensor the place of the first one that is the same."""
    sums = torch.stack([part.sum(dtype=torch.float64) for part in parts]).tolist()  # tells most of them apart
    first: list[int] = []
    for place, part in enumerate(parts):
        known = (i for i in range(place) if first[i] == i and sums[i] == sums[place] and torch.equal(parts[i], part))
        first.append(next(known, place))
    return first
