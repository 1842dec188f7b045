"""What a GRPO step takes: TRL's own path, ours, and ours with vLLM, at answers of 16, 128 and 512 tokens.

    python benchmarks/rft_step.py OUT.json [--lengths 16 128 512] [--steps 6]

Answers are forced to their full length; rewards are drawn at random, so that every group differs. A step has 4 prompts
and 8 answers to each, of the counting task of the mini stream. `trl` is TRL's `GRPOTrainer` on the same batches, with
the disabled adapter for reference and KL to nothing else logged. Each path is a process of its own, in turns; the
figure is the median of the rounds, of each the median of the steps after the first two. Only the ratios within one run
mean anything.

Bytes: what is sent after an optimizer step, and what pushing the model (TRL's vLLM modes) would send.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from figures import Figure, figure

from mcit.data_prep.files import read_json, read_jsonl, write_json

PATHS = ("trl", "transformers", "vllm")
ROUNDS = 3
HERE = Path(__file__).resolve()
RFT = HERE.parents[1] / "pipeline" / "rft.py"


def main() -> None:
    """Command line; `--as-trl` is how the script starts a stage on TRL's own path."""
    if "--as-trl" in sys.argv:
        sys.argv.remove("--as-trl")
        stage_by_trl()
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--lengths", nargs="*", type=int, default=[16, 128, 512])
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        mcit("prepare", run, *settings("trl", 16, options.steps))
        rows, figures = [], list[Figure]()
        for length in options.lengths:
            taken: dict[str, list[float]] = {path: [] for path in PATHS}
            sent = 0
            for _ in range(ROUNDS):
                for path in PATHS:
                    steps, report = stage(run, path, length, options.steps)
                    taken[path].append(median(steps[2:]))
                    sent = report.get("rollouts", {}).get("bytes", sent)
            seconds = {path: round(median(rounds), 3) for path, rounds in taken.items()}
            rows.append({"length": length, "seconds": seconds, "bytes": sent})
            figures += [
                figure(f"GRPO step, generation by {path}, {length} tokens", "TRL", taken[path], taken["trl"])
                for path in PATHS[1:]
            ]
            print_row(rows[-1])
        base = Path(read_json(run / "stages" / "00-base" / "serving.json")["base"])
        model = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    write_json(options.out, {"cpus": os.cpu_count(), "rows": rows, "model_bytes": model, "figures": figures})
    print(f"sent a step: {rows[-1]['bytes']:,} bytes; the model: {model:,} bytes in bfloat16")


def print_row(row: dict[str, Any]) -> None:
    """One length, with ratios to TRL's own path."""
    seconds = row["seconds"]
    shown = ", ".join(f"{path} {value:.2f} s ({value / seconds['trl']:.2f} ×)" for path, value in seconds.items())
    print(f"{row['length']:4} tokens: {shown}", flush=True)


def settings(path: str, length: int, steps: int) -> list[str]:
    """The recipe's keys for a path."""
    floor = "min_tokens" if path == "vllm" else "min_new_tokens"
    args = f"max_steps: {steps}, max_completion_length: {length}, generation_kwargs: {{{floor}: {length}}}"
    args += ", logging_steps: 1, generation_batch_size: 32"
    return [
        "seed=0",
        "prepare.limit.train=64",
        "train.rft.global_batch_size=32",
        "train.rft.rewards={rewards:noise: 1.0}",
        "train.rft.guard=null",
        "train.rft.rollout.tolerance=100.0",  # where an end is forbidden, the engine's probabilities are other ones
        f"train.rft.rollout.engine={'vllm' if path == 'vllm' else 'transformers'}",
        *(f"train.rft.args.{one}" for one in split(args)),
    ]


def split(args: str) -> list[str]:
    """`a: 1, b: {c: 2}` as overrides."""
    parts, depth = [""], 0
    for character in args:
        depth += {"{": 1, "}": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip().replace(": ", "=", 1) for part in parts]


def stage(run: Path, path: str, length: int, steps: int) -> tuple[list[float], dict[str, Any]]:
    """Train stage 1 anew: seconds of each step, and what the stage says of itself."""
    script = [str(HERE), "--as-trl"] if path == "trl" else [str(RFT)]
    command = [sys.executable, *script, "--recipe", "mini/rft", "--stage", "1", "--run-dir", str(run)]
    folder = run / "stages" / "01-counting"
    shutil.rmtree(folder, ignore_errors=True)  # what one path has trained would be done for the next
    subprocess.run([*command, *settings(path, length, steps)], check=True, cwd=HERE.parent, stdout=subprocess.DEVNULL)
    log = read_jsonl(folder / "train_log.jsonl")
    return [row["step_time"] for row in log if "step_time" in row], read_json(folder / "trained.json")


def mcit(verb: str, run: Path, *overrides: str) -> None:
    """One command of mcit."""
    command = [sys.executable, "-m", "mcit.pipeline.cli", verb, "mini/rft", *overrides, "--run-dir", str(run)]
    subprocess.run(command, check=True, cwd=HERE.parent, stdout=subprocess.DEVNULL)


def stage_by_trl() -> None:
    """A stage by TRL's `GRPOTrainer` as it is."""
    import peers

    from mcit.pipeline.stage.stage import main

    main("rft", peers.grpo)


if __name__ == "__main__":
    main()
