"""A whole matrix by our one engine, and by the ways that others take: cells an hour, start-up shown apart.

    python benchmarks/matrix_eval.py RUN OUT [--samples 50] [--timed-cells 6] [--ways ours engine-per-cell …]

RUN is a finished run, of which nothing is changed: its policies and test sets are linked to from OUT. Every way answers
the same questions of the same cells, one process after the other, with nothing of an earlier one to use:

    ours               one vLLM engine for all cells, adapters proved live first, scores and files written
    engine-per-stage   a process and a vLLM engine with one adapter for each stage
    engine-per-cell    the same for each cell
    batched            transformers `generate` in batches of 32, a process for each stage
    batch-1            transformers `generate`, a question at a time, a process for each cell: CoIN's, SEFE's, MCITlib's

Ours does more: the proof that adapters act, scores, files. `--samples N` asks the first N samples of each task only;
start-up then weighs more than it would. `--timed-cells N` runs so many processes of the ways that start one for each
cell, spread over the matrix, and scales their times up. Both are said in the table and in `OUT/matrix_eval.json`.
A quiet machine is needed.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from figures import Figure, figure

from mcit.data_prep.files import hash_json, read_json, read_jsonl, write_json, write_jsonl
from mcit.data_prep.prepare import image_path, read_samples, read_task
from mcit.eval.config import EvalConfig
from mcit.eval.engines.base import Request, read_policy

Cell = tuple[int, str]
# Of each way: the engine, the size of its batches, and what a process answers.
WAYS = {
    "ours": ("auto", 32, "matrix"),
    "engine-per-stage": ("vllm", 32, "stage"),
    "engine-per-cell": ("vllm", 32, "cell"),
    "batched": ("transformers", 32, "stage"),
    "batch-1": ("transformers", 1, "cell"),
}
TARGETS = {"engine-per-cell": 10.0, "batch-1": 10.0}  # times faster than what peers do


def main() -> None:
    """Command line; `--worker` is a process of one way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--samples", type=int, help="of each task; default: all")
    parser.add_argument("--timed-cells", type=int, help="processes run of the ways that have one a cell; default: all")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS])
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(answer(options.out, **json.loads(options.worker))))
        return
    copy, cells = link_run(options.run, options.out / "run", options.samples)
    results = {way: time_way(way, cells, options.run, copy, options.timed_cells) for way in options.ways}
    counts = sorted({len(found) for way in results.values() for found in way["answers"].values()})
    facts = {
        "cells": len(cells),
        "samples of a cell": counts,
        "only the first samples": options.samples is not None,
        "machine": f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} CPU threads",
        "load average at the end": [round(load, 1) for load in os.getloadavg()],
        "ways": {
            way: {key: value for key, value in found.items() if key != "answers"} for way, found in results.items()
        },
        "same answers as the first way": same_answers(results),
        "figures": compared({way: found["seconds"] for way, found in results.items()}),
    }
    write_json(options.out / "matrix_eval.json", facts)
    print(table(facts))


def link_run(run: Path, copy: Path, samples: int | None) -> tuple[Path, list[Cell]]:
    """A run folder with links to the policies of `run` and its test sets, cut to `samples`; and all of its cells."""
    policies = [read_policy(folder.parent) for folder in sorted((run / "stages").glob("*/serving.json"))]
    for policy in policies:
        folder = copy / "stages" / policy.folder.name
        write_json(folder / "serving.json", policy.serving.model_dump())
        if policy.serving.path and not (folder / policy.serving.path).exists():
            (folder / policy.serving.path).symlink_to((policy.folder / policy.serving.path).resolve())
    tasks = sorted(folder.parent.name for folder in (run / "data").glob("*/task.json"))
    for name in tasks:
        source, folder = (run / "data" / name).resolve(), copy / "data" / name
        task, rows = read_task(source), list(read_samples(source, "test"))[:samples]
        write_jsonl(folder / "test.jsonl", rows)
        root = str(image_path(source, task, "").resolve())
        changed = {
            "image_root": root,
            "counts": {"test": len(rows)},
            "test_hash": hash_json([task["test_hash"], samples]),
        }
        write_json(folder / "task.json", {**task, **changed})
    return copy, [(policy.serving.stage, task) for policy in policies for task in tasks]


def time_way(way: str, cells: Sequence[Cell], run: Path, copy: Path, timed_cells: int | None) -> dict[str, Any]:
    """Wall-clock seconds of a way over all cells, of them those spent on answering, and the answers."""
    engine, batch_size, unit = WAYS[way]
    groups: dict[Any, list[Cell]] = {}
    for cell in cells:
        groups.setdefault({"matrix": 0, "stage": cell[0], "cell": cell}[unit], []).append(cell)
    jobs = list(groups.values())
    if timed_cells and unit == "cell":
        jobs = [jobs[round(i * (len(jobs) - 1) / max(1, timed_cells - 1))] for i in range(min(timed_cells, len(jobs)))]
    given = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8")).get("eval") or {}
    known = {key: given[key] for key in ("max_new_tokens", "max_model_len") if given.get(key)}
    config = EvalConfig.model_validate({**known, "engine": engine, "batch_size": batch_size, "constrained": False})
    wall = answering = 0.0
    answers: dict[str, list[str]] = {}
    engines: set[str] = set()  # ours may have fallen back to transformers
    for number, job in enumerate(jobs, 1):
        work = {"way": way, "cells": job, "config": config.model_dump()}
        command = [sys.executable, __file__, str(run), str(copy), "--worker", json.dumps(work)]
        cache = copy.parent / f"cache-{way}-{number}"  # an empty one: nobody may find another's answers
        env = os.environ | {"MCIT_CACHE": str(cache)}
        start = time.monotonic()
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True)
        seconds, found = time.monotonic() - start, json.loads(done.stdout.splitlines()[-1])
        wall, answering = wall + seconds, answering + found["answering"]
        answers |= found["answers"]
        engines |= {*found["engines"]}
        print(f"{way}: process {number} of {len(jobs)}, {seconds:.1f} s", file=sys.stderr, flush=True)
    scale = len(cells) / len(answers)
    return {
        "engines": sorted(engines),
        "processes": len(groups),
        "processes timed": len(jobs),
        "seconds": round(wall * scale, 1),
        "seconds of start-up": round((wall - answering) * scale, 1),
        "cells an hour": round(3600 * len(answers) / wall, 1),
        "cells an hour once started": round(3600 * len(answers) / answering, 1),
        "answers": answers,
    }


def answer(copy: Path, way: str, cells: list[Cell], config: dict[str, Any]) -> dict[str, Any]:
    """What one process does: the responses of each cell, and the seconds from the first question to the last answer."""
    settings, pairs = EvalConfig.model_validate(config), [(stage, task) for stage, task in cells]
    return as_we_do(copy, pairs, settings) if way == "ours" else as_others_do(copy, pairs, settings)


def as_we_do(copy: Path, cells: Sequence[Cell], config: EvalConfig) -> dict[str, Any]:
    """The evaluation of a run, from nothing: unproved adapters, no answers."""
    from mcit.eval import evaluate

    for stale in [*copy.glob("stages/*/liveness.json"), *copy.glob("predictions/*/*")]:
        stale.unlink()
    ask, spent = evaluate._answer, 0.0

    def timed(*given: Any) -> None:
        nonlocal spent
        start = time.monotonic()
        ask(*given)
        spent += time.monotonic() - start

    evaluate._answer = timed
    evaluate.evaluate_cells(copy, cells, config)
    rows = {cell: read_jsonl(copy / "predictions" / f"{cell[0]:02d}" / f"{cell[1]}.jsonl") for cell in cells}
    engines = {read_json(marker)["engine"] for marker in copy.glob("predictions/*/*.done.json")}
    return {
        "answering": spent,
        "engines": sorted(engines),
        "answers": {f"{k} {task}": [row["response"] for row in found] for (k, task), found in rows.items()},
    }


def as_others_do(copy: Path, cells: Sequence[Cell], config: EvalConfig) -> dict[str, Any]:
    """One policy in an engine of its own, task after task."""
    from mcit.eval.engines import generate, make_engine

    policy = read_policy(next((copy / "stages").glob(f"{cells[0][0]:02d}-*")))
    requests = {}
    for k, name in cells:
        folder = copy / "data" / name
        task, samples = read_task(folder), read_samples(folder, "test")
        images = [[image_path(folder, task, image) for image in sample["images"]] for sample in samples]
        requests[f"{k} {name}"] = [
            Request(s["prompt"], shown, policy) for s, shown in zip(samples, images, strict=True)
        ]
    largest = max(len(request.images) for asked in requests.values() for request in asked)
    engine = make_engine([policy], config, largest)
    start = time.monotonic()
    answers = {
        name: [given.text for given in generate(engine, asked, config.max_new_tokens)]
        for name, asked in requests.items()
    }
    seconds = time.monotonic() - start
    engine.close()
    return {"answering": seconds, "engines": [engine.name], "answers": answers}


def compared(seconds: dict[str, float]) -> list[Figure]:
    """Ours against the other ways, each of which was run once."""
    others = (way for way in seconds if way != "ours" and "ours" in seconds)
    return [figure("a whole matrix", way, [seconds["ours"]], [seconds[way]], TARGETS.get(way)) for way in others]


def same_answers(results: dict[str, Any]) -> dict[str, float]:
    """The share of answers that each way has in common with the first one, of those that both gave."""
    first, *others = results
    shares = {}
    for way in others:
        pairs = [
            (ours, theirs)
            for name, found in results[way]["answers"].items()
            if name in results[first]["answers"]
            for ours, theirs in zip(results[first]["answers"][name], found, strict=True)
        ]
        if pairs:
            shares[way] = round(sum(a == b for a, b in pairs) / len(pairs), 4)
    return shares


def table(facts: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        f"{facts['cells']} cells of {' or '.join(map(str, facts['samples of a cell']))} questions"
        f"{' (the first of each task)' if facts['only the first samples'] else ''}; {facts['machine']}.",
        "",
        "| way | processes | seconds | of them start-up | cells an hour | once started | ours is faster by |",
        "|---|---|---|---|---|---|---|",
    ]
    ours = facts["ways"].get("ours")
    for way, found in facts["ways"].items():
        timed = found["processes timed"]
        processes = f"{found['processes']}" if timed == found["processes"] else f"{found['processes']}, {timed} timed"
        faster = f"{found['seconds'] / ours['seconds']:.1f}" if ours and way != "ours" else ""
        lines.append(
            f"| {way} | {processes} | {found['seconds']} | {found['seconds of start-up']} | {found['cells an hour']} | "
            f"{found['cells an hour once started']} | {faster} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
