"""Going on inside a stage: what a trainer's checkpoints hold, when they are written, and how they are taken up.

A stage that was stopped and goes on ends with the same weights, log and scores, to the bit where training itself is
deterministic. transformers' `Trainer` brings its counters and the data to where they were, and its own files of
optimizer, scheduler and random numbers are used. The rest is ours: of the weights only those in training are kept (the
others follow from what the stage enters with), the figures that are averaged until the next line of the log, and the
state of whoever has one (`Resumable.stateful`).
"""

import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from accelerate.utils import broadcast_object_list, send_to_device
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback

from ..run.preemption import SIGNALS, Preempted
from .checkpoints import Checkpoints, Manifest

if TYPE_CHECKING:
    from ..training.trainer import MethodLoss

WEIGHTS, PROGRESS, SCHEDULER, STATE = "weights.safetensors", "progress_{}.pt", "scheduler.pt", "trainer_state.json"
# What transformers and TRL count and average in attributes of their trainers, besides what their own checkpoints hold.
# Some belong to SFT, some to GRPO.
_COUNTERS = (
    *("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged", "current_flos"),
    *("_metrics", "_total_train_tokens", "_step", "_current_train_step_time", "entropy_coef", "_last_world_entropy"),
    *("_terms", "_logged_step", "places"),
)
_Mixin: Any = object  # so that what is transformers' is not looked for here


class Stateful(Protocol):
    """Whoever changes while a stage trains; its state is plain data and tensors."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Interval:
    """When checkpoints are due: after so many optimizer steps, or so many seconds; neither: only when asked to stop."""

    steps: int | None = None
    seconds: float | None = None

    @classmethod
    def of(cls, every: int | str) -> "Interval":
        """`train.checkpoint_every`: a number of steps, `90s`, `10m`, `2h` or `never`."""
        if isinstance(every, int):
            return cls(steps=every)
        if every == "never":
            return cls()
        return cls(seconds=int(every[:-1]) * {"s": 1, "m": 60, "h": 3600}[every[-1]])

    def is_due(self, steps: int, seconds: float) -> bool:
        """Whether one is, this long after the last."""
        return (self.steps is not None and steps >= self.steps) or (
            self.seconds is not None and seconds >= self.seconds
        )


class Resumable(_Mixin):  # type: ignore[misc]
    """A trainer that writes checkpoints into `checkpoints`, and takes one up once everything else has begun."""

    checkpoints: Checkpoints
    mode: str

    @property
    def stateful(self) -> dict[str, Stateful]:
        """Who has a state, by a name of its own."""
        return self.__dict__.setdefault("_stateful", {})

    def between_batches(self) -> bool:
        """Whether training can stop and go on here, after an optimizer step."""
        return True

    def last_checkpoint(self, notes: list[str]) -> Path | None:
        """The checkpoint to go on from, if there is one; all processes call this together.

        `notes`, of the first process, gets to know which it is, and which were not used.
        """
        found: list[Path | None] = [None]
        if self.accelerator.is_main_process:
            self.checkpoints.clear()
            found = [self.checkpoints.newest(self._unfit, notes.append)]
            notes += [f"went on after step {int(found[0].name)}"] if found[0] else []
            for note in notes:
                print(note, file=sys.stderr, flush=True)
        return broadcast_object_list(found)[0]

    def take_up(self, checkpoint: Path) -> None:
        """Bring everything to where it was, but for data, random numbers and `state`, which `Trainer` sees to."""
        if self.is_deepspeed_enabled:
            self.model_wrapped.load_checkpoint(str(checkpoint), load_module_strict=False)
        else:
            _fill(self.model, load_file(checkpoint / WEIGHTS))
        # Of several processes accelerate calls the CPU `cpu:0`, which `torch.load` refuses.
        if self.args.device.type == "cpu":
            self.args.__dict__["_setup_devices"] = torch.device("cpu")
        self._load_optimizer_and_scheduler(str(checkpoint))
        self._load_scaler(str(checkpoint))
        if self.state.epoch:  # accelerate does not reach a sampler below the batches that it skips, in many processes
            self.sampler.set_epoch(int(self.state.epoch))
        file = checkpoint / PROGRESS.format(self.accelerator.process_index)
        if not file.exists():  # fewer processes wrote it
            file = checkpoint / PROGRESS.format(0)
        # States go where they are kept, a generator's to the CPU; counters are added to what the device computes.
        progress = torch.load(file, map_location="cpu", weights_only=True)
        for name, value in send_to_device(progress["counters"], self.args.device).items():
            _restore(self, name, value)
        states = progress["stateful"]
        if any(_is_alike(one) and name not in states for name, one in self.stateful.items()):
            shared = torch.load(checkpoint / PROGRESS.format(0), map_location="cpu", weights_only=True)["stateful"]
            states = shared | states
        for name, state in states.items():
            self.stateful[name].load_state_dict(state)

    # --- what transformers calls --------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Nothing yet: methods look at the entering policy first (`take_up`)."""

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        train_dataloader.worker_init_fn = partial(_deaf, train_dataloader.worker_init_fn)
        return super()._prepare_for_training(max_steps, train_dataloader, None)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """All processes write their part; the first makes a checkpoint of it."""
        accelerator, step = self.accelerator, self.state.global_step
        folder = self.checkpoints.place(step)
        folder.mkdir(parents=True, exist_ok=True)
        self.store_flos()
        if self.is_deepspeed_enabled:
            self.model_wrapped.save_checkpoint(str(folder), exclude_frozen_parameters=True)
            if accelerator.is_main_process:
                torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER)
        else:
            if accelerator.is_main_process:
                save_file(_trained(self.model), folder / WEIGHTS)
            self._save_optimizer_and_scheduler(str(folder))
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))
        counters = {name: _plain(getattr(self, name)) for name in _COUNTERS if hasattr(self, name)}
        first = accelerator.is_main_process
        states = {name: one.state_dict() for name, one in self.stateful.items() if first or not _is_alike(one)}
        file = folder / PROGRESS.format(accelerator.process_index)
        torch.save({"counters": counters, "stateful": states}, file)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            self.state.save_to_json(str(folder / STATE))
            self.checkpoints.commit(step, self.mode, accelerator.num_processes)
        accelerator.wait_for_everyone()

    def _unfit(self, manifest: Manifest) -> str | None:
        """Why this trainer cannot take a checkpoint up. Without DeepSpeed, any number of processes can."""
        here = (self.mode, self.accelerator.num_processes)
        there = (manifest["mode"], manifest["processes"])
        if here == there or {here[0], there[0]} <= {"single", "ddp"}:
            return None
        return f"{there[1]} processes under {there[0]} wrote it, and this is {here[1]} under {here[0]}"


class Checkpointing(TrainerCallback):
    """Has checkpoints written when they are due and when the process was `asked` to stop, which it then does.

    The one to go on from is taken up when the callbacks before this one have begun. Processes agree after every step:
    a signal, or the time, need not reach them all during the same one.
    """

    def __init__(
        self, trainer: "MethodLoss", interval: Interval, asked: Callable[[], bool], checkpoint: Path | None = None
    ):
        self.trainer, self.interval, self.asked, self.checkpoint = trainer, interval, asked, checkpoint
        self.stopping, self.step, self.time = False, 0, time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.checkpoint:
            self.trainer.take_up(self.checkpoint)
        self.step, self.time = state.global_step, time.monotonic()
        self._agree(False)
        if self.stopping:
            raise Preempted(f"stopped before step {state.global_step + 1}; the same command goes on from here")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        due = self._agree(self.interval.is_due(state.global_step - self.step, time.monotonic() - self.time))
        if (due or self.stopping) and state.global_step < state.max_steps and self.trainer.between_batches():
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step, self.time = state.global_step, time.monotonic()
        if self.stopping:
            raise Preempted(f"stopped after step {state.global_step}; the same command goes on from here")

    def _agree(self, due: bool) -> bool:
        """Whether a checkpoint is due for any process, and, in `stopping`, whether any was asked to stop."""
        votes = torch.tensor([due, self.asked()], dtype=torch.float32)
        accelerator = self.trainer.accelerator
        if accelerator.num_processes > 1:
            votes = accelerator.reduce(votes.to(accelerator.device), "sum").cpu()
        self.stopping = self.stopping or bool(votes[1])
        return bool(votes[0])


def _deaf(start: Callable[[int], None] | None, worker: int) -> None:
    """A worker of the data loader leaves being asked to stop to the process that it works for."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if start is not None:
        start(worker)


def _trained(model: Any) -> dict[str, Tensor]:
    return {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


@torch.no_grad()
def _fill(model: Any, weights: dict[str, Tensor]) -> None:
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if parameters.keys() != weights.keys():
        raise RuntimeError("the checkpoint holds other weights than this stage trains: delete its folder")
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])


def _plain(value: Any) -> Any:
    """Counters as what a file holds: dictionaries without factories."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return list(value) if isinstance(value, list) else value


def _is_alike(one: Stateful) -> bool:
    """Whether a state is the same in all processes, so that the first one's is enough."""
    return bool(getattr(one, "alike", False))


def _restore(owner: Any, name: str, value: Any) -> None:
    """Set a counter; dictionaries are filled, since theirs may make what is missing."""
    current = getattr(owner, name, None)
    if not isinstance(current, dict):
        setattr(owner, name, value)
        return
    for key, inner in value.items():
        if isinstance(current.get(key), dict):
            current[key].update(inner)
        else:
            current[key] = inner
