"""The policy in training as an adapter that an engine of its own can load: written after every optimizer step."""

import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from mcit.data_prep.errors import InputError
from mcit.data_prep.schema import Sample
from mcit.eval.engines import Policy
from mcit.eval.lora import Factors, hash_adapter

from ..policy.adapters import rank, save_adapter
from ..policy.lineage import load_past, policy
from ..stage.entering import Entered


class Shipping:
    """Writes the policy to a folder named by its content, and keeps account of what that costs.

    Only LoRA factors are written, never a model: `B A` is not merged into anything. A LoRA that is trained as itself
    goes out as it is, one on top of others with theirs in front.
    """

    def __init__(self, entered: Entered, folder: Path):
        if not isinstance(entered.model, PeftModel):
            problem = f"ships a LoRA, and lineage {entered.stage.train.lineage} trains none"
            remedy = "Set it to transformers"
            raise InputError(problem, where="recipe", field="train.rft.rollout.engine", remedy=remedy)
        self.entered, self.folder = entered, folder
        self.past = load_past(entered.previous, entered.stage.train)
        own, train = entered.stage.train.lora.r, entered.stage.train
        self.rank = own if train.lineage in ("continue", "independent") else rank(self.past) + own
        self.step: int | None = None
        self.sent = self.bytes = 0
        self.seconds = 0.0

    def is_due(self, step: int) -> bool:
        """Whether the policy may differ from the one sent last: after `step` optimizer steps."""
        return step != self.step

    def write(self, step: int, is_main_process: bool = True) -> Policy | None:
        """The policy after `step` optimizer steps as a folder; all processes call it, and the first one has it."""
        start = time.monotonic()
        self.step = step
        adapter = policy(self.entered.model, self.past, self.entered.stage.train)
        dtype = getattr(torch, self.entered.before.dtype)  # which the engine would round to anyway
        adapter = {name: Factors(a.to(dtype), b.to(dtype), scaling) for name, (a, b, scaling) in adapter.items()}
        if not is_main_process:
            return None
        before = self.entered.before
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            made = Path(scratch) / "adapter"
            save_adapter(made, adapter, before.base, before.revision)
            digest = hash_adapter(made)
            target = self.folder / digest
            if not target.exists():
                made.rename(target)
        self.sent += 1
        self.bytes += sum(file.stat().st_size for file in target.iterdir())
        self.seconds += time.monotonic() - start
        update = {"kind": "adapter", "path": digest, "rank": rank(adapter), "hash": digest}
        return Policy(before.model_copy(update=update), self.folder)

    def forget(self, policy_hash: str) -> None:
        """Remove what was written of a policy that no engine needs any more."""
        shutil.rmtree(self.folder / policy_hash, ignore_errors=True)

    def report(self) -> dict[str, Any]:
        """How often the policy was sent, bytes and seconds each time."""
        per = max(self.sent, 1)
        return {"sent": self.sent, "bytes": self.bytes // per, "seconds": round(self.seconds / per, 4)}


def runs(samples: Sequence[Sample]) -> list[range]:
    """Where equal samples follow each other."""
    starts = [i for i, sample in enumerate(samples) if i == 0 or sample is not samples[i - 1]]
    return [range(start, end) for start, end in zip(starts, [*starts[1:], len(samples)], strict=True)]


def check_tokens(seen: Sequence[Sequence[int]], trained: Sequence[Sequence[int]], samples: Sequence[Sample]) -> None:
    """The prompts that an engine saw are those that are trained on, token by token, image tokens once."""
    for one, two, sample in zip(seen, trained, samples, strict=True):
        if list(one) != list(two):
            place = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
            raise RuntimeError(
                f"the engine read another prompt than is trained on, for sample {sample['id']} of {sample['task']}: "
                f"{len(one)} tokens and {len(two)}, which differ from place {place} on"
            )
