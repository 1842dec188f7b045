"""A policy that collapses is stopped, and the last one that was well is kept."""

import sys
from collections import deque
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from mcit.data_prep.errors import InputError

from ..training.parameters import trained_parameters
from .config import GuardConfig

_FORM = 0.5  # a rate of right forms that was never this high has not been lost
_STATE = ("best", "looks", "good", "kept", "collapse")  # of a guard, in a checkpoint


class Collapsed(InputError):
    """A policy collapsed before it was once known to be well."""


class Guard(TrainerCallback):
    """Judges each row of the log; at a collapse it puts the last good weights back and ends the training.

    A row tells of the policy before its step's update. So weights are known to be good when rows after them are: those
    kept at one look count from the next one on. Every process sees the same rows, and does the same.
    """

    alike = True  # so a checkpoint has it once

    def __init__(self, config: GuardConfig, model: nn.Module):
        self.config, self.model = config, model
        self.rows: deque[dict[str, float]] = deque(maxlen=config.window)
        self.best = 0.0  # rate of right forms, of any window
        self.looks = 0
        self.good: tuple[int, dict[str, torch.Tensor]] | None = None
        self.kept: tuple[int, dict[str, torch.Tensor]] | None = None
        self.collapse: dict[str, Any] | None = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.collapse or "kl_previous" not in (logs or {}):
            return
        self.rows.append(dict(logs))
        if len(self.rows) < self.config.window:
            return
        if reason := self._reason():
            self._stop(reason, state.global_step)
            control.should_training_stop = True
        else:
            self.best = max(self.best, self._mean("format_rate"))
            if self.looks % self.config.window == 0:
                self.good, self.kept = self.kept, (state.global_step, self._weights())
            self.looks += 1

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"rows": list(self.rows), **{name: getattr(self, name) for name in _STATE}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what `state_dict` gave."""
        self.rows.extend(state["rows"])
        for name in _STATE:
            setattr(self, name, state[name])

    def _reason(self) -> str | None:
        """What is wrong, if anything is."""
        limits, form = self.config, self._mean("format_rate")
        if limits.format is not None and self.best >= _FORM and form < limits.format * self.best:
            return f"{form:.0%} of the answers have the right form, after {self.best:.0%}"
        if limits.kl is not None and (kl := self._mean("kl_previous")) > limits.kl:
            return f"KL to the previous policy is {kl:.3g} nats a token"
        if limits.entropy is not None and (entropy := self._mean("entropy")) > limits.entropy:
            return f"entropy is {entropy:.3g} nats a token"
        return None

    def _mean(self, key: str) -> float:
        values = [row[key] for row in self.rows if row.get(key) is not None]
        return sum(values) / len(values) if values else 0.0

    def _weights(self) -> dict[str, torch.Tensor]:
        """A copy of what is trained, in main memory."""
        return {name: value.detach().to("cpu", copy=True) for name, value in trained_parameters(self.model).items()}

    @torch.no_grad()
    def _stop(self, reason: str, step: int) -> None:
        """Go back to the last good weights. Raises `Collapsed` if there are none."""
        if self.good is None:
            remedy = "Lower the learning rate, or raise beta"
            raise Collapsed(f"the policy collapsed by step {step}: {reason}", remedy=remedy)
        kept, weights = self.good
        for name, parameter in trained_parameters(self.model).items():
            parameter.copy_(weights[name])
        self.collapse = {"step": step, "reason": reason, "kept_step": kept}
        print(f"stopped at step {step}: {reason}; the policy of step {kept} is kept", file=sys.stderr, flush=True)
