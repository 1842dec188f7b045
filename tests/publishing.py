"""What the tests of publishing share: a small finished run, and the `mcit` command against a Hub on the loopback."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from hub import WRITE, Hub
from PIL import Image
from random_model import RANDOM

from mcit.pipeline.recipe.loading import load_recipe
from mcit.pipeline.run.runner import perform_steps, start_run
from mcit.pipeline.run.step import Launch
from mcit.pipeline.run.terminal import Terminal

COLOURS = ("red", "green", "blue", "white")
QUESTION = "<image>\nWhich colour is it?\nAnswer the question using a single word or phrase."
_folder = tempfile.TemporaryDirectory(prefix="mcit-published-")  # goes when the test process ends
RECIPE = """
name: two
base_model: {{path: {base}, dtype: float32}}
stream:
{stream}
method: {{reglora: {{key_fraction: 0.5, weight: 1.0}}}}
train:
  lora: {{r: 2, alpha: 4, dropout: 0}}
  global_batch_size: 2
  sft: {{args: {{max_steps: 2, learning_rate: 0.01}}}}
eval: {{engine: transformers, max_new_tokens: 4, probes: 4}}
"""


def write_data(folder: Path, name: str, count: int = 8) -> None:
    """LLaVA JSON with one small picture a sample."""
    rows = []
    for number in range(count):
        colour = COLOURS[number % 4]
        Image.new("RGB", (28, 28 + number), colour).save(folder / f"{name}-{number}.png")
        turns = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": colour}]
        rows.append({"id": str(number), "image": f"{name}-{number}.png", "conversations": turns})
    (folder / f"{name}.json").write_text(json.dumps(rows))


def write_recipe_file(folder: Path, path: str, tasks: list[str], extra: str = "", base: Path = RANDOM) -> Path:
    """A recipe over tasks whose data are `clinic-<task>.json`, a name that is nobody's business."""
    for task in tasks:
        if not (folder / f"clinic-{task}.json").exists():
            write_data(folder, f"clinic-{task}")
    stream = "".join(f"  - {{name: {t}, train: clinic-{t}.json, test: 0.25, style: short}}\n" for t in tasks)
    (folder / path).write_text(RECIPE.format(base=base, stream=stream) + extra)
    return folder / path


def finish(recipe: Path, run: Path, *overrides: str) -> Path:
    """Do a whole run."""
    terminal = Terminal()
    current = start_run(load_recipe(recipe, overrides), run, Launch.named("single"), terminal)
    perform_steps(current, current.steps(), terminal)
    return run


def mcit(hub: Hub | None, home: Path, *arguments: str | Path, token: str | None = WRITE, **env: str) -> tuple[int, str]:
    """Run the command as a user would; returns its exit code and all that it said."""
    variables = os.environ | {"HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"} | env
    variables.pop("HF_TOKEN", None)
    if hub is not None:
        variables["HF_ENDPOINT"] = hub.endpoint
    if token is not None:
        variables["HF_TOKEN"] = token
    command = [sys.executable, "-c", "from mcit.pipeline.cli import main; main()", *map(str, arguments)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    return done.returncode, done.stdout + done.stderr


@cache
def _finished() -> Path:
    folder = Path(_folder.name)
    return finish(write_recipe_file(folder, "two.yaml", ["first", "second"]), folder / "run")


@pytest.fixture(scope="module")
def run() -> Iterator[Path]:
    """A run of two stages with RegLoRA, made once for all tests of a process; `two.yaml` and its data lie beside it."""
    before = dict(os.environ)
    os.environ |= {"MCIT_CACHE": str(Path(_folder.name) / "cache"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    yield _finished()
    os.environ.clear()
    os.environ.update(before)
