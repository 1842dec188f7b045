"""What `train.packing` is worth: samples a second of ours, packed and not, against TRL's own trainers.

    python benchmarks/packing.py OUT.json [--only tiny-shared small-grpo …] [--rounds 3]

Two models: `tiny` is the embedded one; `small` has random weights, the layers of Qwen2.5-0.5B, a quarter of their
number, a vocabulary that is to them what Qwen2.5-VL-3B's is to its own, and a small tower, so that the decoder and not
Python takes the time. Three settings, their lengths in `vqa_like.py`:

    shared   SFT, 5 questions on each picture, as VQAv2 has, 10 questions a step. Also TRL on the questions of a picture
             merged into one row of several turns, where a question sees those before it: another loss
    own      SFT, a picture for each question, lengths as in TextVQA at half its pictures' sides, 32 questions a step,
             8 at a time
    grpo     a GRPO step on 8 answers of 32 to 80 tokens to a prompt of some 220: a pass for the reference's
             log-probabilities, and the update. Answers are drawn at random, so nothing is generated; reading the
             prompt is in the time

On a CPU TRL computes log-probabilities of all tokens, on a GPU of those with a label; so do our stages everywhere.
`trl-labels` is TRL doing so, to tell that apart.

Same LoRA, samples in a batch and arguments for all, float32 on a CPU and bfloat16 on a GPU, no gradient checkpointing.
Each path is a process of its own, and they take turns; a ratio is the median of the rounds', the spread from the least
to the largest. Only ratios within one run mean anything. On a CPU seconds are those of the process: one thread
(OMP_NUM_THREADS=1).
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from figures import Figure, figure
from random_vlm import TINY, build
from turns import Turns, apart_from_stdout, machine, take_turns
from vqa_like import KINDS, draw, write

from mcit.data_prep.files import read_jsonl, write_json

# Qwen/Qwen2.5-0.5B, config.json, but for layers and vocabulary.
TEXT = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 6, "num_attention_heads": 14}
TEXT |= {"num_key_value_heads": 2, "max_position_embeddings": 4096, "vocab_size": 12000}
TEXT |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}}
VISION = {"depth": 2, "hidden_size": 256, "intermediate_size": 512, "num_heads": 4, "out_hidden_size": 896}
VISION |= {"fullatt_block_indexes": [1]}
MODELS = {"tiny": (16, 4), "small": (28, 1)}  # pixels of a token, and steps a turn
WARM = 1  # steps before the first turn
GROUP, ANSWERS = 8, (32, 81)  # answers to a prompt; from, and up to, how many tokens, the end among them


class Setting(NamedTuple):
    """What is trained on, and by whom."""

    title: str
    phase: str
    batch: int  # samples of a step, or answers
    at_once: int  # of these, in a forward pass
    pictures: int  # of a step
    paths: tuple[str, ...]
    target: float  # of packed against TRL


SETTINGS = {
    "shared": Setting(
        "5 questions a picture", "sft", 10, 10, 2, ("trl", "trl-labels", "trl-merged", "plain", "packed"), 3.0
    ),
    "own": Setting("a picture each", "sft", 32, 8, 32, ("trl", "trl-labels", "plain", "packed"), 1.3),
    "grpo": Setting("8 answers a prompt", "rft", GROUP, GROUP, 1, ("trl", "trl-labels", "plain", "packed"), 2.0),
}
AGAINST = {
    "trl": "TRL",
    "trl-labels": "TRL, labelled tokens alone scored",
    "trl-merged": "TRL, a picture's questions in one row (another loss)",
    "plain": "ours without packing",
}
RECIPE = """
name: packing
base_model: {{path: {base}, dtype: {dtype}, processor: {{min_pixels: 256, max_pixels: 1000000}}}}
stream: [{{name: questions, train: train.jsonl, test: test.jsonl, style: short, scorer: short}}]
train:
  paradigm: {phase}
  lineage: stack
  reference: previous
  lora: {{r: 64, alpha: 128, dropout: 0}}
  global_batch_size: {batch}
  packing: {packing}
  checkpoint_every: never
  sft: {{order: by_image, args: {{{args}}}}}
  rft:
    rewards: {{"rewards:noise": 1.0}}
    guard: null
    args: {{{args}, num_generations: {group}, generation_batch_size: {group}, beta: 0.04, max_completion_length: 128}}
"""
ARGS = (
    "learning_rate: 1.0e-5, max_steps: {steps}, logging_steps: 1, gradient_checkpointing: false, "
    "per_device_train_batch_size: {at_once}"
)


def main() -> None:
    """Command line; `--path` is a process of one path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    every = [f"{model}-{setting}" for model in MODELS for setting in SETTINGS]
    parser.add_argument("--only", nargs="+", choices=every, default=every, metavar="MODEL-SETTING")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--path", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.path:
        train(options.out, *options.path)
        return
    rows, figures = [], list[Figure]()
    for one in options.only:
        model, name = one.split("-")
        with tempfile.TemporaryDirectory() as folder:
            row = measure(Path(folder), model, name, options.rounds)
        rows.append(row)
        figures += compared(row)
        print_row(row)
    write_json(options.out, {**machine(), "rows": rows, "figures": figures})
    print(", ".join(f"{key} {value}" for key, value in machine().items()))


def measure(folder: Path, model: str, name: str, rounds: int) -> dict[str, Any]:
    """A setting with a model: seconds a step in each round of each path, and what they made of the same samples."""
    setting, (unit, each) = SETTINGS[name], MODELS[model]
    steps = WARM + rounds * each
    if model == "small":
        build(folder / "base", TEXT, VISION, torch.float32, {})
    write(folder, draw(KINDS[name], setting.pictures * steps), unit)
    told = {"base": TINY if model == "tiny" else folder / "base", "phase": setting.phase, "batch": setting.batch}
    told |= {"args": ARGS.format(steps=steps, at_once=setting.at_once), "group": GROUP}
    told |= {"dtype": "bfloat16" if torch.cuda.is_available() else "float32"}
    commands = {}
    for path in setting.paths:
        recipe = folder / f"{path}.yaml"
        recipe.write_text(RECIPE.format(**told, packing=str(path == "packed").lower()))
        if path == setting.paths[0]:
            mcit = [sys.executable, "-m", "mcit.pipeline.cli", "prepare", str(recipe), "--run-dir"]
            subprocess.run([*mcit, str(folder / "run")], check=True, cwd=folder, stdout=subprocess.DEVNULL)
        shutil.copytree(folder / "run", folder / path)
        command = [sys.executable, __file__, str(folder / path), "--path", str(recipe), path, str(each)]
        commands[path] = command
    seconds = take_turns(commands, rounds, folder)
    logs = {path: next((folder / path / "stages").glob("01-*/train_log.jsonl")) for path in setting.paths}
    tokens = {path: max(line.get("num_tokens", 0) for line in read_jsonl(log)) for path, log in logs.items()}
    return {
        "model": model,
        "setting": name,
        "samples": setting.batch,
        "steps": {"warm": WARM, "a turn": each},
        "seconds": {path: [round(one, 4) for one in taken] for path, taken in seconds.items()},
        "tokens": {path: round(count / steps) for path, count in tokens.items()},  # a step, padding left aside
        "loss": {path: read_jsonl(log)[0]["loss"] for path, log in logs.items()},  # of the first step
    }


def train(run: Path, recipe: str, path: str, each: str) -> None:
    """The process of a path: a stage of `run`, turn by turn."""
    told = apart_from_stdout()
    import peers

    from mcit.pipeline import rft, sft
    from mcit.pipeline.recipe.loading import load_recipe
    from mcit.pipeline.stage.stage import run_stage

    loaded = load_recipe(recipe, [])
    phase = loaded.stages[0].train.phases[0]
    by_trl: dict[tuple[str, str], Callable[[Any], Any]] = {
        ("sft", "trl"): peers.sft,
        ("sft", "trl-labels"): partial(peers.sft, made=peers.LabelsSFT),
        ("sft", "trl-merged"): partial(peers.sft, merged=True),
        ("rft", "trl"): peers.grpo,
        ("rft", "trl-labels"): partial(peers.grpo, made=peers.LabelsGRPO),
    }
    ours = sft.make_trainer if phase == "sft" else rft.make_trainer

    def make(entered: Any) -> Any:
        trainer = by_trl.get((phase, path), ours)(entered)
        if phase == "rft":
            trainer._generate_single_turn = drawn(trainer.processing_class.tokenizer.eos_token_id)
        trainer.add_callback(Turns(WARM, int(each), told))
        return trainer

    run_stage(loaded, 1, run, phase, make)


def drawn(end: int) -> Callable[..., Any]:
    """TRL's generation, made up: the same random answers, of random lengths, to whoever asks."""
    rng = np.random.default_rng(0)

    def answers(prompt_ids: list[list[int]], *_: Any) -> tuple[list[list[int]], None]:
        return [[*rng.integers(100, 600, rng.integers(*ANSWERS) - 1).tolist(), end] for _ in prompt_ids], None

    return answers


def compared(row: dict[str, Any]) -> list[Figure]:
    """The row's figures: packed against all others, ours without packing against TRL."""
    setting, seconds = SETTINGS[row["setting"]], row["seconds"]
    phase = {"sft": "SFT", "rft": "GRPO"}[setting.phase]
    name = f"{setting.title}, {row['model']} model"
    figures = [
        figure(
            f"{phase} packed, {name}",
            AGAINST[path],
            seconds["packed"],
            taken,
            setting.target if path == "trl" else None,
        )
        for path, taken in seconds.items()
        if path != "packed"
    ]
    return [*figures, figure(f"{phase} not packed, {name}", AGAINST["trl"], seconds["plain"], seconds["trl"])]


def print_row(row: dict[str, Any]) -> None:
    """A line a path."""
    for path, taken in row["seconds"].items():
        rate = row["samples"] / median(taken)
        line = f"{rate:.3g} samples/s ({min(taken):.3g} to {max(taken):.3g} s a step)"
        print(f"{row['model']}, {row['setting']}, {path}: {line}, {row['tokens'][path]} tokens", flush=True)


if __name__ == "__main__":
    main()
