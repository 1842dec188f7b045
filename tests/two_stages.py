"""What the tests of invariants train: two stages with a method, each way once, and what there is to see of them.

Stage 1 is supervised tuning; stage 2 goes on in the lineages and paradigms that the method names.
"""

import gc
import hashlib
import json
import pickle
import random
import signal
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import save_qwen3_vl_moe
from safetensors.torch import load_file
from training import largest_gap, make_run, make_samples, uneven
from transformers import TrainerCallback

import mcit.pipeline.rft as rft
import mcit.pipeline.sft as sft
import mcit.pipeline.stage.stage as stage_script
from mcit.data_prep.files import read_json, read_jsonl
from mcit.pipeline.methods import METHODS, Method
from mcit.pipeline.methods.previous import Previous
from mcit.pipeline.recipe.loading import load_recipe
from mcit.pipeline.run.preemption import Preempted
from mcit.pipeline.training.collator import Collator
from mcit.pipeline.training.replay import backbone

# Where a method's defaults are not for a tiny model and a learning rate of 0.2.
SETTINGS: dict[str, dict[str, Any]] = {
    "der": {"buffer": 8, "per_batch": 3, "weight": 0.1, "label_weight": 0.5},
    "ewc": {"weight": 0.1, "samples": 8},
    "fpf": {"times": 2, "steps": 2, "buffer": 8, "per_batch": 3},
    "gere": {"per_batch": 3, "weight": 1},
    "ilora": {"buffer": 8, "per_batch": 3, "decay": 0.5},
    "interference": {"per_batch": 3},
    "l2": {"weight": 0.1},
    "l2p": {"pool": 4, "length": 2, "top": 2},
    "moelora": {"experts": 2},
    "mas": {"weight": 0.01, "samples": 8},
    "moextend": {"experts": 2, "layers": [1]},
    "olora": {"weight": 0.01},
    "refresh": {"step": 1e-2, "samples": 8},
    "reglora": {"weight": 100},
    "replay": {"buffer": 8, "per_batch": 3},
}
MIXTURE = tempfile.TemporaryDirectory(prefix="mcit-mixture-")

RECIPE = """
train:
  lora: {r: 4, alpha: 8, dropout: 0}
  global_batch_size: 16
  sft: {args: {learning_rate: 0.2, lr_scheduler_type: constant, optim: sgd, logging_steps: 1, num_train_epochs: 2,
               gradient_checkpointing: false}}
  rft: {rewards: {"rewarding:spread": 1, accuracy: 0, format: 0},  # no answer of a random base is ever right
        args: {learning_rate: 0.2, lr_scheduler_type: constant, optim: sgd, logging_steps: 1, max_steps: 3, beta: 0.1,
               num_generations: 4, max_completion_length: 6, temperature: 0.5, gradient_checkpointing: false}}
"""
STAGES = ("01-colour", "02-again")
# Stage 1 leaves weights well away from where they began.
FAR = ("train.sft.args.optim=adamw_torch", "train.sft.args.learning_rate=1e-2", "train.sft.args.max_steps=5")

Section = Mapping[str, Mapping[str, Any]]


def section(name: str, neutral: bool = False) -> Section:
    return {name: METHODS[name].neutral if neutral else SETTINGS.get(name, {})}


def acts(name: str) -> bool:
    """Whether a method has a hand in training itself, not only in what is trained on or what is made of the result."""
    hooks = ("enter", "build", "loss", "replay", "begin", "callbacks")
    return any(getattr(METHODS[name], hook) is not getattr(Method, hook) for hook in hooks)


def home(name: str) -> str:
    """The lineage in which what a method keeps of stage 1 says most about what stage 2 trains."""
    lineages = METHODS[name].lineages
    return "continue" if "continue" in lineages else lineages[0]


@dataclass
class Trained:
    """A stage as it was and as training left it."""

    folder: Path
    trainable: set[str]  # names of parameters
    changed: set[str]  # of parameters and buffers
    weights: dict[str, torch.Tensor]  # as they are in the end: of what is trainable or has changed
    rest: str  # a digest of all others
    randomness: bytes  # the states of all generators at the end
    states: dict[str, dict[str, torch.Tensor]]  # of the methods, before they were saved
    held: dict[str, int]  # bytes of the tensors that methods had as training ended
    length: float  # tokens of a sample, on average
    passed: dict[bool, int]  # tokens that went through the model, with gradients and without


class Stages:
    """Trains both stages with `method: section`; `overrides` are those of stage 2, and `stop` has it stopped."""

    def __init__(self, folder: Callable[[str], Path]):
        self.folder = folder
        self.run = folder("prepared")
        samples = {"colour": make_samples("colour", 32), "again": uneven("again", 20, 1)}
        anchors = {"pictures": make_samples("pictures", 5), "sentences": uneven("sentences", 6, 0)}
        self.recipe = make_run(self.run, samples, RECIPE, anchors=anchors)
        self.done: dict[tuple[str, ...], Trained] = {}
        gc.freeze()  # a trainer collects garbage when it begins; to look through all that was imported takes long

    def __call__(self, section: Section, lineage: str, paradigm: str, *overrides: str, stop: bool = False) -> Any:
        """(stage 1, stage 2)"""
        one, key = self.first(section, lineage), (json.dumps(section), lineage, paradigm, *overrides)
        if stop:
            return one, self._stopped(self.after(one), section, lineage, paradigm, *overrides)
        if key not in self.done:
            self.done[key] = self._train(self.after(one), 2, section, lineage, paradigm, *overrides)
        return one, self.done[key]

    def first(self, section: Section, lineage: str) -> Trained:
        """Stage 1. That of adapters is the same in all lineages but in its name: of one that the methods have.

        Unless what they keep of it depends on the lineage.
        """
        allowed = [METHODS[name].lineages for name in section]
        of_adapters = ("stack", "fold", "continue", "independent")
        shared = next((one for one in of_adapters if all(one in has for has in allowed)), "full")
        own = lineage if lineage == "full" or "refresh" in section else shared
        key = (json.dumps(section), own)
        if key not in self.done:
            run = self.folder("first")
            link(self.run, run, "00-base")
            self.done[key] = self._train(run, 1, section, own, "sft", *FAR)
        return self.done[key]

    def after(self, one: Trained, run: Path | None = None) -> Path:
        """A run of its own in which stage 1 is done."""
        run = run or self.folder("second")
        link(one.folder.parents[1], run, "00-base", "01-colour")
        return run

    def _stopped(self, run: Path, section: Section, lineage: str, paradigm: str, *overrides: str) -> Trained:
        """The second stage, stopped by a signal after its steps (under GRPO where a generation batch ends)."""
        every = (section, lineage, paradigm, *overrides)
        for step in (1, 3) if paradigm == "sft" else (1, 5):
            with pytest.raises(Preempted, match="stopped after step"):
                self._train(run, 2, *every, stop_after=step)
        return self._train(run, 2, *every)

    def _train(
        self,
        run: Path,
        k: int,
        section: Section,
        lineage: str,
        paradigm: Any,
        *overrides: str,
        stop_after: int | None = None,
    ) -> Trained:
        kept: dict[str, Any] = {"states": {}}
        save, make_trainer = stage_script.save_state, {"sft": sft, "rft": rft}[paradigm].make_trainer

        class Look(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
                if state.global_step == stop_after:
                    signal.raise_signal(signal.SIGTERM)

            def on_train_end(self, *args: Any, model: Any, **_: Any) -> None:
                kept.update(look(kept.pop("before"), model))
                kept.update(held={method.name: held(method) for method in kept.pop("methods")})

        def make(entered: Any) -> Any:
            trainer = make_trainer(entered)
            trainer.add_callback(Look)
            kept.update(before=snapshot(entered.model), methods=entered.methods, passed={True: 0, False: 0})
            tokens = Collator(entered.processor, [], 1000).collate(entered.samples)["attention_mask"].sum()
            kept.update(length=int(tokens) / len(entered.samples))

            def count(_: Any, __: Any, inputs: Mapping[str, Any]) -> None:
                if (mask := inputs.get("attention_mask")) is not None and mask.ndim == 2:  # not of packed rows
                    kept["passed"][torch.is_grad_enabled()] += int(mask.sum())

            backbone(entered.model).register_forward_pre_hook(count, with_kwargs=True)
            return trainer

        def keep(folder: Path, name: str, state: dict[str, torch.Tensor]) -> None:
            kept["states"][name] = state
            save(folder, name, state)

        recipe = load_recipe(self.recipe, [*keys(section, lineage, paradigm), *overrides])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stage_script, "save_state", keep)
            stage_script.run_stage(recipe, k, run, paradigm, make)
        generators = (torch.get_rng_state().numpy(), random.getstate(), np.random.get_state())
        return Trained(folder=run / "stages" / STAGES[k - 1], randomness=pickle.dumps(generators), **kept)


def keys(section: Section, lineage: str, paradigm: str) -> list[str]:
    """What a recipe says of a stage."""
    resolved = [f"method={json.dumps(section)}", f"train.lineage={lineage}", f"train.paradigm={paradigm}"]
    resolved += ["train.modules.language=full"] if lineage == "full" else []
    extended = section.get("moextend", {}).get("experts", 0) > 0
    return [*resolved, f"base_model.path={mixture()}"] if extended else resolved


@cache
def mixture() -> str:
    """The folder of a tiny mixture of experts, which goes when the test process ends."""
    save_qwen3_vl_moe(Path(MIXTURE.name))
    return MIXTURE.name


def link(run: Path, to: Path, *stages: str) -> None:
    """A run of its own with the data and some stages of another."""
    (to / "stages").mkdir(parents=True)
    (to / "data").symlink_to(run / "data")
    for name in stages:
        (to / "stages" / name).symlink_to(run / "stages" / name)


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def look(before: Mapping[str, torch.Tensor], model: torch.nn.Module) -> dict[str, Any]:
    """What `Trained` says of a model, of what it was before."""
    after = snapshot(model)
    assert before.keys() == after.keys()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    rest = hashlib.sha256()
    for name in sorted(after.keys() - trainable - changed):
        rest.update(name.encode() + after[name].cpu().numpy().tobytes())
    weights = {name: after[name] for name in sorted(trainable | changed)}
    return {"trainable": trainable, "changed": changed, "weights": weights, "rest": rest.hexdigest()}


def held(value: Any, known: dict[int, int] | None = None) -> int:
    """Bytes of the tensors of a method, in its attributes and what they list."""
    known = {} if known is None else known
    if isinstance(value, torch.Tensor):
        known[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    if isinstance(value, (Method, Previous)):
        value = vars(value)
    for one in value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ():
        held(one, known)
    return sum(known.values())


def same(one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def same_model(one: Trained, two: Trained) -> bool:
    """To the bit, and all of it."""
    return one.rest == two.rest and same(one.weights, two.weights)


def untimed(folder: Path) -> list[dict[str, Any]]:
    """A stage's log, without how long things took."""
    rows = read_jsonl(folder / "train_log.jsonl")
    timed = ("step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second")
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]


def assert_same_stage(one: Path, two: Path) -> None:
    """Up to the order of summation: weights, losses, and the number of trained parameters."""
    parts = [path.relative_to(one) for path in one.glob("*/*model.safetensors")]  # adapter and delta, or a merged model
    assert parts and files(one) == files(two)
    for config in one.glob("*/*config.json"):
        assert config.read_bytes() == (two / config.relative_to(one)).read_bytes()
    for part in parts:
        assert largest_gap(*(load_file(folder / part) for folder in (one, two))) < 1e-5
    assert_same_losses(one, two, "loss")
    summaries = [read_json(folder / "trained.json") for folder in (one, two)]
    assert summaries[0]["trained_parameters"] == summaries[1]["trained_parameters"]


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def assert_same_losses(one: Path, two: Path, *keys: str) -> None:
    logs = [read_jsonl(folder / "train_log.jsonl")[:-1] for folder in (one, two)]
    terms = {key for key in logs[0][0] if key.endswith("_loss")}
    for key in (*keys, *terms):
        assert [row[key] for row in logs[0]] == pytest.approx([row[key] for row in logs[1]], rel=1e-3, abs=1e-6), key
