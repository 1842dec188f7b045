"""What the training tests share: the tiny model, its processor, and prepared tasks made by hand."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from random_model import RANDOM as TINY
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback

import mcit.recipes
from mcit.data_prep.files import hash_rows, read_json, write_json, write_jsonl
from mcit.data_prep.schema import Config, Sample
from mcit.eval.lora import Adapter, Factors
from mcit.eval.serving import Serving, write_serving
from mcit.pipeline.methods import Method, StepView
from mcit.pipeline.run.lengths import write_lengths

COLOURS = ("red", "green", "blue", "white")


def tiny_model() -> Any:
    """A fresh copy of the tiny vision-language model."""
    return AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.float32)


@cache
def tiny_processor() -> Any:
    return AutoProcessor.from_pretrained(TINY)


def random_adapter(model: Any, names: Sequence[str], r: int, seed: int, scaling: float = 1.0) -> Adapter:
    """An adapter that visibly changes the model."""
    generator = torch.Generator().manual_seed(seed)
    adapter = {}
    for name in names:
        rows, columns = model.get_submodule(name).weight.shape
        a, b = torch.randn(r, columns, generator=generator), torch.randn(rows, r, generator=generator)
        adapter[name] = Factors(a * 0.1, b * 0.1, scaling)
    return adapter


def make_samples(task: str, n: int, *, images: int = 1, seed: int = 0) -> list[Sample]:
    """Colour questions; their image paths are those that `write_task` fills."""
    rng = random.Random(seed)
    samples: list[Sample] = []
    for i in range(n):
        colour = rng.choice(COLOURS)
        question = "Which colour is it?" if images else f"Repeat: {colour}."
        prompt = f"{question}\nAnswer the question using a single word or phrase."
        samples.append(
            {
                "id": f"{task}-{i}",
                "task": task,
                "images": [f"images/{colour}-{j}.png" for j in range(images)],
                "prompt": [{"role": "user", "content": prompt}],
                "completion": [{"role": "assistant", "content": colour}],
                "references": [colour],
                "style": "short",
                "reasoning": "none",
            }
        )
    return samples


def uneven(task: str, n: int, images: int) -> list[Sample]:
    """Answers of very different lengths: only a loss over all tokens of the global batch weighs them evenly."""
    samples = make_samples(task, n, images=images)
    for i, sample in enumerate(samples):
        sample["completion"] = [{"role": "assistant", "content": " ".join(COLOURS[: 1 + i % 4] * (1 + i % 3))}]
    return samples


def write_images(folder: Path) -> None:
    (folder / "images").mkdir(parents=True)
    for colour in COLOURS:
        for j in range(2):
            Image.new("RGB", (32, 32 + 16 * j), colour).save(folder / "images" / f"{colour}-{j}.png")


def write_task(folder: Path, samples: list[Sample]) -> None:
    """A prepared task as the data preparation leaves it."""
    write_images(folder)
    write_jsonl(folder / "train.jsonl", samples)
    write_jsonl(folder / "test.jsonl", samples[:2])
    task = {
        "name": samples[0]["task"],
        "style": "short",
        "reasoning": "none",
        "scorer": "short",
        "reward": "same",
        "image_root": ".",
        "counts": {"train": len(samples), "validation": 0, "test": 2},
        "notes": [],
        "hash": "0",
        "train_hash": hash_rows(samples),
        "test_hash": "0",
    }
    write_json(folder / "task.json", task)


def make_run(
    run: Path,
    tasks: dict[str, list[Sample]],
    recipe: str,
    model: Path = TINY,
    anchors: dict[str, list[Sample]] = {},  # noqa: B006
) -> Path:
    """A run folder as `mcit prepare` leaves it; returns the recipe's path. `recipe` is YAML below name and model."""
    lengths = dict[str, dict[str, int]]()
    for name, samples in {**tasks, **anchors}.items():
        write_task(run / "data" / name, samples)
        lengths[name] = {sample["id"]: len(str(sample["completion"])) for sample in samples}  # as uneven as tokens are
    write_lengths(run, lengths)
    base = run / "stages" / "00-base"
    base.mkdir(parents=True)
    serving = Serving(stage=0, name="base", kind="base", base=str(model), dtype="float32", base_hash="b", hash="b")
    write_serving(base, serving)
    stream = "".join(f"  - {{name: {name}, train: {name}.json}}\n" for name in tasks)
    path = run / "recipe-under-test.yaml"
    general = "".join(f"  - {{name: {name}, train: {name}.json}}\n" for name in anchors)
    head = f"name: test\nbase_model: {{path: {model}, dtype: float32}}\n" + ("anchors:\n" + general if anchors else "")
    path.write_text(f"{head}stream:\n{stream}{recipe}")
    return path


def launch(
    run: Path,
    recipe: Path,
    mode: str,
    processes: int,
    *overrides: str,
    stage: int = 2,
    script: str = "sft",
    fails: bool = False,
) -> str:
    """Train a stage as a user would start it alone: by path, through accelerate. What it said."""
    root = Path(mcit.recipes.__file__).parents[1]
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", str(root / "recipes" / "accelerate" / f"{mode}.yaml")),
        *("--num_processes", str(processes), str(root / "pipeline" / f"{script}.py")),
        *("--recipe", str(recipe), "--stage", str(stage), "--run-dir", str(run), *overrides),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=800
    )
    assert bool(done.returncode) == fails, done.stderr[-4000:]
    return done.stdout + done.stderr


def largest_gap(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    assert one.keys() == two.keys()
    return max((one[key] - two[key]).abs().max().item() for key in one)


def assert_same_curves(one: Path, other: Path) -> None:
    """Two runs' second stages were looked at after the same steps, with the same outcome."""
    curves, others = (read_json(run / "stages" / "02-words" / "during.json") for run in (one, other))
    assert curves["steps"] == others["steps"] and len(curves["steps"]) > 3
    for task, scores in curves["tasks"].items():
        assert scores["exact"] == others["tasks"][task]["exact"]
        assert scores["logprob"] == pytest.approx(others["tasks"][task]["logprob"], abs=1e-3)


class MeanLength(Method):
    """A term of the kind that `StepView.share` is for: a mean over samples (of answer tokens; it moves nothing)."""

    name, paper, category, keeps = "training:MeanLength", "none", "regularisation", "nothing"

    def loss(self, view: StepView) -> torch.Tensor | None:
        own = view.inputs["labels"][: len(view.inputs["labels"]) - view.replayed]
        return view.share * (own != -100).sum(1).float().mean()


class StopConfig(Config):
    """`method: {"training:Stop": {…}}`."""

    step: int
    unless: str  # this file exists


class Stop(Method):
    """Asks its second process to stop after a step, once."""

    name, paper, category, keeps = "training:Stop", "none", "regularisation", "nothing"
    Config = StopConfig

    def callbacks(self) -> list[TrainerCallback]:
        step, once = self.config.step, Path(self.config.unless)

        class Raise(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
                if state.global_step == step and args.process_index == 1 and not once.exists():
                    once.touch()
                    signal.raise_signal(signal.SIGTERM)

        return [Raise()]


class Growing(Method):
    """A term that grows with each step, by a count that nobody but the method keeps."""

    name, paper, category, keeps = "training:Growing", "none", "regularisation", "nothing"
    count = 0

    def loss(self, view: StepView) -> torch.Tensor | None:
        self.count += 1
        return self.count * sum(p.square().sum() for p in view.model.parameters() if p.requires_grad)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]
