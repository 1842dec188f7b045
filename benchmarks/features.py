"""What `train.picture_cache` saves where every picture of a step is known already.

    python benchmarks/features.py OUT.json [--rounds 5]

Supervised tuning steps on the same eight questions, a picture each (`vqa_like.py`, `own`), over and over, with the
cache and without. So this is what a second epoch, or a replayed sample, gains; the first epoch gains nothing. Two
models: `tiny` is the embedded one, and `shaped` has random weights, its tower to its decoder as Qwen2.5-VL-3B's is
(0.22 times the weights). Seconds, turns and ratios as in `packing.py`.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from figures import figure
from packing import ARGS, RECIPE, TEXT, WARM
from random_vlm import TINY, build
from turns import Turns, apart_from_stdout, machine, take_turns
from vqa_like import KINDS, draw, write

from mcit.data_prep.files import write_json

SAMPLES = 8
MODELS = {"tiny": (16, 8), "shaped": (28, 1)}  # pixels of a token, and steps a turn
VISION = {"depth": 4, "hidden_size": 640, "intermediate_size": 1712, "num_heads": 10, "out_hidden_size": 896}
VISION |= {"fullatt_block_indexes": [3]}


def main() -> None:
    """Command line; `--path` is a process of one path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--path", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.path:
        train(options.out, *options.path)
        return
    rows = {}
    for model in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            rows[model] = measure(Path(folder), model, options.rounds)
    figures = [
        figure(
            f"SFT, all pictures remembered, {model} model", "each encoded again", seconds["cached"], seconds["plain"]
        )
        for model, seconds in rows.items()
    ]
    write_json(options.out, {**machine(), "seconds": rows, "figures": figures})
    print(*(f"{one['figure']}: {one['ratio']} ×" for one in figures), sep="\n")


def measure(folder: Path, model: str, rounds: int) -> dict[str, list[float]]:
    """Seconds a step in each round of both paths."""
    unit, each = MODELS[model]
    if model == "shaped":
        build(folder / "base", TEXT, VISION, torch.float32, {})
    write(folder, draw(KINDS["own"], SAMPLES), unit)
    args = ARGS.format(steps=WARM + rounds * each, at_once=SAMPLES)
    told = {"base": TINY if model == "tiny" else folder / "base", "phase": "sft", "batch": SAMPLES, "group": 2}
    commands = {}
    for path, room in (("plain", 0), ("cached", 1)):
        recipe = folder / f"{path}.yaml"
        text = RECIPE.format(**told, args=args, dtype="float32", packing="false")
        recipe.write_text(text.replace("checkpoint_every", f"picture_cache: {room}\n  checkpoint_every"))
        mcit = [sys.executable, "-m", "mcit.pipeline.cli", "prepare", str(recipe), "--run-dir", str(folder / path)]
        subprocess.run(mcit, check=True, cwd=folder, stdout=subprocess.DEVNULL)
        commands[path] = [sys.executable, __file__, str(folder / path), "--path", str(recipe), str(each)]
    return take_turns(commands, rounds, folder)


def train(run: Path, recipe: str, each: str) -> None:
    """The process of a path: a stage of `run`, turn by turn."""
    told = apart_from_stdout()
    from mcit.pipeline import sft
    from mcit.pipeline.recipe.loading import load_recipe
    from mcit.pipeline.stage.stage import run_stage

    def make(entered: Any) -> Any:
        trainer = sft.make_trainer(entered)
        trainer.add_callback(Turns(WARM, int(each), told))
        return trainer

    run_stage(load_recipe(recipe, []), 1, run, "sft", make)


if __name__ == "__main__":
    main()
