"""A whole stream, trained and evaluated: by `mcit run`, and by a process for every step of it, as peers' scripts do it.

    python benchmarks/stream.py OUT [KEY=VALUE…] [--recipe mini/sequential] [--timed-cells 10]

    ours     `mcit run` from an empty cache: data made and checked, every stage trained, the whole matrix in one engine,
             scores, metrics, report
    peers    for each task a process that loads the base and the adapter so far, trains it by TRL's SFTTrainer on the
             same samples, batches and arguments, and saves it; then, for each policy and task, a process that answers
             a question at a time (`matrix_eval.py`: `batch-1`), or, set against that, one for each policy that answers
             in batches of 32 (`batched`)

One adapter goes through all stages in both (`train.lineage=continue`), and nothing is asked a second time under
constraints, so that both do the same work. Data is not made anew for the peers, and nothing is scored by them. A quiet
machine is needed.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from figures import figure
from matrix_eval import link_run, time_way

from mcit.data_prep.files import read_json, write_json

TARGET = 3.0  # times faster than the sum of what peers do


def main() -> None:
    """Command line; `--worker` is a process that trains a stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("keys", nargs="*", default=[], help="of the recipe, to change")
    parser.add_argument("--recipe", default="mini/sequential")
    parser.add_argument("--timed-cells", type=int, help="processes run of the way that has one a cell; default: all")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        train(**json.loads(options.worker))
        return
    run = options.out / "run"
    seconds = {"ours": ours([options.recipe, *options.keys], run, options.out / "cache")}
    training = [peers_stage(run, k, options.out / "peers") for k in range(1, 1 + len(stages(run)))]
    copy, cells = link_run(run, options.out / "cells", None)
    answering = {way: time_way(way, cells, run, copy, options.timed_cells) for way in ("batch-1", "batched")}
    seconds |= {way: round(sum(training) + found["seconds"], 1) for way, found in answering.items()}
    steps = {step: read_json(run / "steps" / f"{step}.json")["seconds"] for step in ("evaluate", "report")}
    facts = {
        "machine": f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} CPU threads",
        "load average at the end": [round(load, 1) for load in os.getloadavg()],
        "seconds": seconds,
        "of ours": {"training": round(sum(map(trained_in, stages(run))), 1), **steps},
        "of peers'": {
            "training": [round(one, 1) for one in training],
            **{way: found["seconds"] for way, found in answering.items()},
        },
        "figures": [
            figure("a whole stream", f"TRL a stage, {way}", [seconds["ours"]], [seconds[way]], target)
            for way, target in (("batch-1", TARGET), ("batched", None))
        ],
    }
    write_json(options.out / "stream.json", facts)
    print(json.dumps(facts, indent=1))


def ours(recipe: list[str], run: Path, cache: Path) -> float:
    """The seconds of `mcit run` on a recipe and what is changed in it."""
    launch = "single" if torch.cuda.is_available() else "fork"
    command = [
        sys.executable,
        "-c",
        "from mcit.pipeline.cli import main; main()",
        "run",
        *recipe,
        "--run-dir",
        run,
        "--launch",
        launch,
    ]
    start = time.monotonic()
    keys = ["train.lineage=continue", "eval.constrained=false"]
    subprocess.run([*command, *keys], env=os.environ | {"MCIT_CACHE": str(cache)}, check=True)
    return round(time.monotonic() - start, 1)


def stages(run: Path) -> list[Path]:
    """The folders of a run's stages, the base left out."""
    return [marker.parent for marker in sorted(run.glob("stages/[0-9]*-*/trained.json"))]


def trained_in(stage: Path) -> float:
    """The seconds of a stage, its process and all."""
    return float(read_json(stage / "done.json")["seconds"])


def peers_stage(run: Path, k: int, out: Path) -> float:
    """The seconds of a process that trains stage k as peers do."""
    recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    work = {
        "base": recipe["base_model"]["path"],
        "lora": str(stages(run)[0] / "adapter"),  # its settings alone
        "previous": str(out / f"{k - 1}") if k > 1 else None,
        "data": str(run / "data" / stages(run)[k - 1].name.split("-", 1)[1]),
        "out": str(out / f"{k}"),
        "size": recipe["train"]["global_batch_size"],
        "given": recipe["train"]["sft"]["args"],
    }
    start = time.monotonic()
    subprocess.run([sys.executable, __file__, str(out), "--worker", json.dumps(work)], check=True)
    return time.monotonic() - start


def train(base: str, lora: str, previous: str | None, data: str, out: str, size: int, given: dict[str, Any]) -> None:
    """One stage with transformers, PEFT and TRL alone."""
    from datasets import Dataset
    from peft import LoraConfig, PeftModel
    from rows import conversations
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from trl import SFTConfig, SFTTrainer

    from mcit.data_prep.prepare import image_path, read_samples, read_task

    task, samples = read_task(data), list(read_samples(data, "train"))
    pictured = bool(samples[0]["images"])
    for sample in samples:
        sample["images"] = [str(image_path(data, task, name)) for name in sample["images"]]
    texts = [{name: sample[name] for name in ("prompt", "completion")} for sample in samples]
    model = AutoModelForImageTextToText.from_pretrained(base, dtype="float32")
    config = LoraConfig.from_pretrained(lora)
    config.inference_mode = False  # as it was saved
    if previous:
        model = PeftModel.from_pretrained(model, previous, is_trainable=True)
    arguments = SFTConfig(
        output_dir=out,
        per_device_train_batch_size=size,
        max_length=None,
        remove_unused_columns=False,
        save_strategy="no",
        report_to=[],
        bf16=False,
        **given,
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        peft_config=None if previous else config,
        train_dataset=conversations(samples) if pictured else Dataset.from_list(texts),
        processing_class=AutoProcessor.from_pretrained(base),
    )
    trainer.train()
    trainer.save_model(out)


if __name__ == "__main__":
    main()
