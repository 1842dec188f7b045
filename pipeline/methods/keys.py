"""Where earlier stages changed a layer most, and the mean of `|B A|` there, without `B A` ever being whole.

`B A`, [out, in], comes in *tiles*, some rows at a time. How often a position was among a stage's largest is its
*count*, a number of `bits` bits (1, 2 or 4). Counts are kept packed, uint8 [out, width]: byte j of a row holds those of
columns j, j + width, j + 2 width, …, the first one lowest, so that whole rows are unpacked by one shift.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Positions of a tile: on a CPU what its caches hold, elsewhere so many that starting kernels does not count.
_TILE = {"cpu": 1 << 21}
_LARGE_TILE = 1 << 24


def width(columns: int, bits: int) -> int:
    """Bytes of a packed row."""
    return -(-columns * bits // 8)


def pack(counts: Tensor, bits: int) -> Tensor:
    """Counts below 2^bits, uint8 [rows, columns], as uint8 [rows, width]."""
    packed = width(counts.shape[1], bits)
    padded = F.pad(counts, (0, 8 // bits * packed - counts.shape[1]))
    return (padded.view(-1, 8 // bits, packed) << _shifts(bits, counts.device)).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The counts, uint8 [rows, columns]."""
    fields = (packed.unsqueeze(1) >> _shifts(bits, packed.device)).bitwise_and_(2**bits - 1)
    return fields.flatten(1)[:, :columns]


def total(packed: Tensor, bits: int) -> int:
    """The sum of all counts."""
    of_byte = unpack(torch.arange(256, dtype=torch.uint8)[:, None], bits, 8 // bits).sum(1)
    return int(torch.bincount(packed.flatten(), minlength=256).cpu() @ of_byte)


@torch.no_grad()
def add_keys(packed: Tensor | None, a: Tensor, b: Tensor, fraction: float, bits: int) -> Tensor:
    """Count the `int(fraction * numel)` positions of largest `|b a|` once more; on the CPU.

    A count stays at 2^bits - 1 once it is there. Of equal positions the first ones, row by row, are taken, and zeros
    never. `a` is [r, in], `b` [out, r]; products are in float32.
    """
    a, b = a.float(), b.float()
    value, ties = _smallest_key(a, b, int(fraction * b.shape[0] * a.shape[1]))
    done = []
    for rows, tile in _tiles(a, b):
        keys = tile.abs_() > value
        first = (tile == value).flatten().nonzero()[:ties, 0]
        keys.view(-1)[first] = True
        ties -= len(first)
        counts = keys.to(torch.uint8)
        if packed is not None:
            counts += unpack(packed[rows].to(counts.device), bits, a.shape[1])
        done.append(pack(counts.clamp_(max=2**bits - 1), bits).cpu())
    return torch.cat(done)


class MeanAtKeys(torch.autograd.Function):
    """`sum(count * |b a|) / sum(count)` over a layer, a scalar, for `a` [r, in], `b` [out, r] and packed counts.

    At least in float32, whatever the factors are in. The backward pass makes the tiles anew instead of keeping any:
    gradients kept from the forward pass would be as large as all factors, more than the counts themselves. With
    G = count * sign(b a), they are `G a^T` for b and `b^T G` for a.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, packed: Tensor, bits: int, total: int) -> Tensor:
        ctx.save_for_backward(a, b, packed)
        ctx.bits, ctx.total = bits, total
        wide_a, wide_b = _wide(a), _wide(b)
        value = wide_a.new_zeros(())
        for rows, tile in _tiles(wide_a, wide_b):
            value += tile.abs_().mul_(unpack(packed[rows], bits, a.shape[1])).sum()
        return value / total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # type: ignore[override]
        a, b, packed = ctx.saved_tensors
        wide_a, wide_b = _wide(a), _wide(b)
        grad_a, grad_b = torch.zeros_like(wide_a), torch.empty_like(wide_b)
        for rows, tile in _tiles(wide_a, wide_b):
            tile.sign_().mul_(unpack(packed[rows], ctx.bits, a.shape[1]))
            grad_a.addmm_(wide_b[rows].T, tile)
            torch.mm(tile, wide_a.T, out=grad_b[rows])
        scale = grad / ctx.total
        return grad_a.mul_(scale).to(a.dtype), grad_b.mul_(scale).to(b.dtype), None, None, None


def _wide(factor: Tensor) -> Tensor:
    return factor.to(torch.promote_types(factor.dtype, torch.float32))


def _shifts(bits: int, device: torch.device) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=device)[:, None]


def _tiles(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """`b a` by rows: (which, their values)."""
    height = max(1, _TILE.get(a.device.type, _LARGE_TILE) // a.shape[1])
    for start in range(0, b.shape[0], height):
        rows = slice(start, start + height)
        with torch.autocast(a.device.type, enabled=False):
            tile = b[rows] @ a
        yield rows, tile


def _smallest_key(a: Tensor, b: Tensor, k: int) -> tuple[float, int]:
    """The k-th largest `|b a|` and how many positions of this very value are among the k largest: none if it is 0."""
    if k == 0:
        return math.inf, 0
    largest = b.new_empty(0)
    for _, tile in _tiles(a, b):
        values = tile.abs_().flatten()
        if len(largest) == k:
            values = values[values > largest.min()]
        largest = torch.cat([largest, values])
        largest = largest.topk(min(k, len(largest)), sorted=False).values
    value = largest.min().item()
    return value, int((largest == value).sum()) if value else 0
