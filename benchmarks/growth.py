"""What a stage costs late in a long stream: seconds a step, memory, and what it leaves, against an early one.

    python benchmarks/growth.py OUT [--tasks 16] [--steps 40] [--ways stack continue reglora gere]

A stream of equal tasks (counting, under as many names) is run once for each way. All stages take the same steps on as
many samples, so that whatever changes from stage to stage comes of the past: a longer LoRA beside the weights under
`stack`, states of methods. Steps are in seconds of the process on a CPU, which other work mostly leaves alone, and of
the clock on a GPU. Evaluation asks every task after every stage, in one engine; its cost is said an answer, by the
clock. Minutes for each way; a way that is done is not run again.
"""

import argparse
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from mcit.data_prep.files import read_json, write_json

# What is added to the recipe: lineage, methods.
WAYS = {
    "stack": ("stack", "{}"),
    "continue": ("continue", "{}"),
    "reglora": ("stack", "{reglora: {}}"),
    "gere": ("stack", "{gere: {per_batch: 2}}"),
}
RECIPE = """
extends: mini/stream
name: growth-{way}
stream:
{tasks}
prepare: {{limit: {{train: {samples}, test: 20}}}}
train:
  lineage: {lineage}
  lora: {{r: 4, alpha: 8}}
  sft: {{args: {{max_steps: {steps}, logging_steps: 10}}}}
method: {method}
eval: {{constrained: false, general: []}}
"""
TASK = '  - {{name: task{k:02d}, train: "mcit.data_prep.mini.tasks:counting", style: mcq, scorer: mcq}}'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tasks", type=int, default=16)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    ways = {way: run(way, options) for way in options.ways}
    machine = platform.processor() or platform.machine()
    write_json(options.out / "growth.json", {"machine": machine, "steps": options.steps, "ways": ways})
    print("\n".join(table(ways)))


def run(way: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run a way, unless it has been, and say what each of its stages took."""
    lineage, method = WAYS[way]
    tasks = "\n".join(TASK.format(k=k) for k in range(1, options.tasks + 1))
    recipe, folder = options.out / f"{way}.yaml", options.out / way
    recipe.write_text(
        RECIPE.format(
            way=way, tasks=tasks, lineage=lineage, method=method, steps=options.steps, samples=8 * options.steps
        )
    )
    command = [sys.executable, "-c", "from mcit.pipeline.cli import main; main()"]
    unanswered = os.environ | {"MCIT_CACHE": str(options.out / f"{way}-cache")}
    subprocess.run([*command, "run", recipe, "--run-dir", folder, "--launch", "fork"], env=unanswered, check=True)
    answers = sum(read_json(path)["n"] for path in folder.glob("predictions/[0-9]*/*.done.json"))
    evaluation = read_json(folder / "steps" / "evaluate.json")["seconds"]
    stages = [of_stage(marker.parent) for marker in sorted(folder.glob("stages/[0-9]*-*/trained.json"))]
    return {"stages": stages, "answers": answers, "evaluation": evaluation}


def of_stage(folder: Path) -> dict[str, float]:
    """Seconds a step, peak of main memory in MB, and kB of what the stage has left, of it the methods' states."""
    trained = read_json(folder / "trained.json")
    kept, states = (
        sum(file.stat().st_size for part in parts for file in (folder / part).glob("**/*") if file.is_file())
        for parts in (("adapter", "delta", "method"), ("method",))
    )
    cost = trained["cost"]
    step = 3600 * (cost["gpu_hours"] or cost["processor_hours"]) / cost["steps"]
    return {"step": step, "memory": cost["peak_host_bytes"] / 1e6, "kept": kept / 1e3, "states": states / 1e3}


def table(ways: dict[str, dict[str, Any]]) -> list[str]:
    """Every doubling of the stream as a row."""
    lines = [
        "| way | stage | ms a step | against stage 2 | peak of main memory, MB | left, kB | of it states |",
        "|---|---|---|---|---|---|---|",
    ]
    for way, found in ways.items():
        stages = found["stages"]
        for k in (2**n for n in range(1, len(stages).bit_length())):
            one, against = stages[k - 1], stages[k - 1]["step"] / stages[1]["step"]
            cells = (f"{one[what]:.0f}" for what in ("memory", "kept", "states"))
            lines.append(f"| {way} | {k} | {1000 * one['step']:.1f} | {against:.2f} | {' | '.join(cells)} |")
        each = 1000 * found["evaluation"] / found["answers"]
        lines.append(f"| {way} | evaluation | {each:.1f} an answer, of {found['answers']:,} | | | | |")
    return lines


if __name__ == "__main__":
    main()
