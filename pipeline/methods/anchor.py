"""The hidden states of a fixed policy on fixed samples, in one file that says whose they are.

`<hash of the provenance>.safetensors` holds `offsets` int64 [samples + 1] into the rows of `rows`, one a token: packed
states of 2 bits, uint8 [tokens, units / 4], with `thresholds.images` and `thresholds.text` float32 [2, units], or whole
hidden states [tokens, units] as the model gave them. Images shift the statistics of all tokens around them, so samples
with images have thresholds of their own.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import atomic_open, hash_json

from ..training.replay import Replayed
from .keys import pack
from .ternary import Moments, states

KINDS = ("text", "images")  # by whether a sample has images
Look = Callable[[], Iterator[Replayed]]  # every sample once, of which this process sees its part


class Anchor:
    """An open file of states; rows are read as needed. Raises `InputError` for one that is broken or another's."""

    def __init__(self, path: Path, provenance: Mapping[str, Any]):
        self.path = path
        try:
            self.file = safe_open(path, framework="pt")
            if json.loads((self.file.metadata() or {})["provenance"]) != provenance:
                raise ValueError("its provenance is not what its name says")
            self.offsets: list[int] = self.file.get_tensor("offsets").tolist()
            self.rows = self.file.get_slice("rows")
            names = [name for name in self.file.keys() if name.startswith("thresholds.")]
            self.thresholds = {name.partition(".")[2]: self.file.get_tensor(name) for name in names}
        except (SafetensorError, KeyError, ValueError) as error:
            raise InputError(
                f"is no file of states ({error})", where=path, remedy="Delete it: it is made anew"
            ) from None

    def of(self, sample: int, tokens: int) -> Tensor:
        """The rows of a sample, [tokens, …], on the CPU. Raises `InputError` if it has another number of tokens now."""
        start, end = self.offsets[sample : sample + 2]
        if end - start != tokens:
            problem = f"a sample had {end - start} tokens when its states were kept, and has {tokens} now"
            raise InputError(problem, where=self.path, remedy="Delete the file: it is made anew")
        rows: Tensor = self.rows[start:end]
        return rows


def anchor_path(folder: Path, provenance: Mapping[str, Any]) -> Path:
    """Where the states of this provenance are."""
    return folder / f"{hash_json(provenance)[:32]}.safetensors"


def write_anchor(
    path: Path,
    provenance: Mapping[str, Any],
    look: Look,
    kinds: Sequence[str],
    *,
    units: int,
    accelerator: Any,
    work: Path,
) -> None:
    """Write the file; all processes call this together. `kinds` has the kind of each sample.

    With `sigmas` in the provenance states are packed, and `look` is gone through twice: first for the thresholds, so
    that no hidden state ever has to be kept. Each process leaves its part in the folder `work`; the first joins them.
    """
    sigmas = provenance.get("sigmas")
    thresholds = {} if sigmas is None else _thresholds(look, kinds, units, sigmas, accelerator)
    part: dict[str, Tensor] = {}
    for sample, hidden in _samples(look):
        kept = hidden if sigmas is None else pack(states(hidden, thresholds[kinds[sample]]), 2)
        part[str(sample)] = kept.cpu().contiguous()
    work.mkdir(parents=True, exist_ok=True)
    parts = [work / f"{path.stem}.{process}" for process in range(accelerator.num_processes)]
    save_file(part, parts[accelerator.process_index])
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _join(path, provenance, parts, {kind: values.cpu() for kind, values in thresholds.items()})
    accelerator.wait_for_everyone()


def _samples(look: Look) -> Iterator[tuple[int, Tensor]]:
    """Each sample with its hidden states [tokens, units]."""
    for seen in look():
        for sample, tokens, hidden in zip(seen.samples, seen.tokens, seen.hidden, strict=True):
            yield sample, hidden[:tokens]


def _thresholds(look: Look, kinds: Sequence[str], units: int, sigmas: float, accelerator: Any) -> dict[str, Tensor]:
    """By kind, over the samples of all processes."""
    found = {kind: Moments.of(torch.zeros(0, units, device=accelerator.device)) for kind in KINDS}
    for sample, hidden in _samples(look):
        found[kinds[sample]] += Moments.of(hidden)
    mine = torch.stack([found[kind].packed() for kind in KINDS])
    everyone = accelerator.gather(mine).view(-1, *mine.shape)
    merged = dict.fromkeys(KINDS, Moments.of(mine.new_zeros(0, units)))
    for process in everyone:
        for kind, packed in zip(KINDS, process, strict=True):
            merged[kind] += Moments.unpacked(packed)
    return {kind: moments.thresholds(sigmas) for kind, moments in merged.items() if moments.count}


def _join(path: Path, provenance: Mapping[str, Any], parts: Sequence[Path], thresholds: Mapping[str, Tensor]) -> None:
    found: dict[int, Tensor] = {}
    for part in parts:
        with safe_open(part, framework="pt") as file:
            found |= {int(sample): file.get_tensor(sample) for sample in file.keys()}
    rows = [found[sample] for sample in sorted(found)]
    offsets = torch.tensor([0, *map(len, rows)]).cumsum(0)
    tensors = {"rows": torch.cat(rows), "offsets": offsets, **{f"thresholds.{k}": v for k, v in thresholds.items()}}
    with atomic_open(path, "wb") as out:
        out.write(save(tensors, metadata={"provenance": json.dumps(provenance, sort_keys=True)}))
    for part in parts:
        part.unlink()
