"""What the vision tower makes of pictures: of each picture of a batch once, however often it is in there."""

from collections.abc import Callable, Sequence
from functools import wraps
from inspect import signature
from typing import Any

import torch
from torch import Tensor


def each_once(features: Callable[..., Any]) -> Callable[..., Any]:
    """A model's `get_image_features` that encodes pictures of equal pixels once.

    Where a model cuts pictures into tiles, these are compared; where it drops some of them, all are encoded.
    """

    @wraps(features)
    def of(*args: Any, **kwargs: Any) -> Any:
        given = signature(features).bind(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        pixels, grid = given["pixel_values"], given.get("image_grid_thw")  # [pictures, …]; with a grid [patches, …]
        parts = pixels.split([1] * len(pixels) if grid is None else grid.prod(-1).tolist())
        first = first_equal(parts)
        chosen = sorted(set(first))
        if len(chosen) == len(parts):
            return features(*args, **kwargs)
        fewer = {key: x[chosen] if isinstance(x, Tensor) and len(x) == len(parts) else x for key, x in given.items()}
        output = features(**(fewer | {"pixel_values": torch.cat([parts[picture] for picture in chosen])}))
        made = output.pooler_output
        if len(made) != len(chosen):
            return features(*args, **kwargs)
        order = [chosen.index(picture) for picture in first]
        output.pooler_output = made[order] if isinstance(made, Tensor) else [made[place] for place in order]
        if layers := output.get("deepstack_features"):  # of each layer the tokens of all pictures, [tokens, width]
            tokens = [len(one) for one in made]
            output["deepstack_features"] = [torch.cat([x.split(tokens)[place] for place in order]) for x in layers]
        return output

    return of


def first_equal(parts: Sequence[Tensor]) -> list[int]:
    """Of each tensor the place of the first one that is the same."""
    sums = torch.stack([part.sum(dtype=torch.float64) for part in parts]).tolist()  # tells most of them apart
    first: list[int] = []
    for place, part in enumerate(parts):
        known = (i for i in range(place) if first[i] == i and sums[i] == sums[place] and torch.equal(parts[i], part))
        first.append(next(known, place))
    return first
