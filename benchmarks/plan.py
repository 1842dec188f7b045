"""`mcit plan` against what came of it, on another stream than the one that times were taken from.

    python benchmarks/plan.py OUT [--samples 240 400] [--test 40] [--with lwf]

Runs two tasks of the mini stream with few samples, plans the other three with more of them by what the first run
measured, runs those too, and prints both side by side. On a machine with nothing else to do: minutes.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mcit.data_prep.files import read_json, read_jsonl, write_json
from mcit.pipeline.planning.plan import Machine, Plan, plan
from mcit.pipeline.recipe.loading import load_recipe
from mcit.pipeline.run.step import Launch

RECIPE = """
extends: mini/stream
name: {name}
stream: [{tasks}]
prepare: {{limit: {{train: {train}, test: {test}}}}}
eval: {{engine: transformers, general: []}}
"""
TASKS = {"measured": "digits, counting", "planned": "spatial, grounding, arithmetic"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--samples", type=int, nargs=2, default=[240, 400], help="of a task, in either run")
    parser.add_argument("--test", type=int, default=40)
    parser.add_argument("--with", dest="methods", action="append", default=[], help="a method of the planned run")
    options = parser.parse_args()
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    recipes = {}
    for (name, tasks), train in zip(TASKS.items(), options.samples, strict=True):
        recipes[name] = out / f"{name}.yaml"
        recipes[name].write_text(RECIPE.format(name=name, tasks=tasks, train=train, test=options.test))
    run("measured", recipes["measured"], out)
    recipe = load_recipe(str(recipes["planned"]), (), options.methods)
    found = plan(recipe, Machine(Launch.named("single"), None, None), [out / "measured"])
    run("planned", recipes["planned"], out, *(f"--with={method}" for method in options.methods))
    rows = [{"what": what, "planned": said, "measured": took} for what, said, took in compared(found, out / "planned")]
    write_json(out / "plan.json", {"samples": options.samples, "methods": options.methods, "rows": rows})
    print("| | planned | measured | gap |\n|---|---|---|---|")
    for row in rows:
        said, took = row["planned"], row["measured"]
        print(f"| {row['what']} | {said:,.6g} | {took:,.6g} | {100 * (said / took - 1):+.1f} % |")


def run(name: str, recipe: Path, out: Path, *options: str) -> None:
    """`mcit run`, unless it is done."""
    command = [sys.executable, "-c", "from mcit.pipeline.cli import main; main()"]
    subprocess.run([*command, "run", recipe, "--run-dir", out / name, *options], check=True)


def compared(found: Plan, folder: Path) -> Iterator[tuple[str, float, float]]:
    """What was planned and what was measured, one figure after the other."""
    stages = sorted((folder / "stages").glob("[0-9]*-*/trained.json"))
    for row, path in zip(found["stages"], stages, strict=True):
        trained, marker = read_json(path), read_json(path.with_name("done.json"))
        tokens = next(
            line["num_tokens"]
            for line in reversed(read_jsonl(path.with_name("train_log.jsonl")))
            if "num_tokens" in line
        )
        name = row["name"]
        yield f"{name}: steps", row["steps"], trained["steps"]
        yield f"{name}: tokens", row["tokens"], tokens
        yield f"{name}: seconds", row["seconds"] or 0, marker["seconds"]
        yield f"{name}: main memory, MB", row["host_memory"] / 1e6, trained["cost"]["peak_host_bytes"] / 1e6
    answers = [read_json(path) for path in sorted((folder / "predictions").glob("[0-9]*/*.done.json"))]
    yield "answers", found["answers"], sum(cell["n"] for cell in answers)
    evaluation = read_json(folder / "steps" / "evaluate.json")["seconds"]
    yield "evaluation: seconds", found["answer_seconds"] or 0, evaluation
    seconds = sum(read_json(path.with_name("done.json"))["seconds"] for path in stages)
    yield "seconds in all", found["seconds"] or 0, seconds + evaluation
    yield "disk, kB", found["disk"]["stages"] / 1e3, size(folder, stages) / 1e3


def size(folder: Path, stages: list[Path]) -> int:
    """Bytes of what stages have left: all but logs and the base."""
    files: list[Any] = [file for path in stages for file in path.parent.glob("*/*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


if __name__ == "__main__":
    main()
