"""Does reinforcement tuning forget less than SFT, and what do KL, RIF and chains of thought change? On the mini stream.

    python benchmarks/rft_study.py OUT [--seeds 0 1 …]   every arm under every seed, five of them; again: it goes on
    python benchmarks/rft_study.py OUT --read            only the tables and the plot of what is there

An arm that learned less has less to forget. So what was lost of old tasks stands beside what was gained on new ones,
SFT is run at several lengths, and an arm is held against the SFT of its own seed that would have gained as much (on
the line between the two lengths around it). KL to the base is measured alike for all arms, and the tokens they
generated are counted; those of `rft` are about those of `rft-think-20`. Where reasoning was asked for, the programs
that made the questions check it sentence by sentence, and it has a gain and a loss of its own.
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mcit.data_prep.chat import open_image
from mcit.data_prep.files import read_json, read_jsonl, write_json
from mcit.data_prep.prepare import image_path, read_samples, read_task
from mcit.eval.ask import read_policies
from mcit.eval.config import EvalConfig
from mcit.eval.engines.base import Request, completed
from mcit.eval.engines.transformers import TransformersEngine
from mcit.eval.stats import mean_interval

SHORT_SFT = (10, 20, 40)  # optimizer steps of 8 samples; whole stages have 50 to 150
SHORT_RFT = 20  # of 64 answers; whole stages have 80
ARMS = {  # name: recipe of mini/, what is set in it
    f"{arm}{how}{f'-{steps}' if steps else ''}": (
        f"{arm}{how}",
        [f"train.{arm.removeprefix('rft-') if arm == 'rft-sft' else 'rft'}.args.max_steps={steps}"] if steps else [],
    )
    for how in ("", "-think")
    for arm, lengths in {
        "rft-sft": (*SHORT_SFT, None),
        "rft": (SHORT_RFT, None),
        "rft-nokl": (None,),
        "rft-rif": (None,),
        "joint": (None,),
    }.items()
    for steps in lengths
}
ASKED = 50  # test questions of each task for the KL


class Run(NamedTuple):
    """One arm under one seed. Scores are 0–100, means over tasks."""

    gain: float  # right after its stage, minus the base's
    lost: float  # of all tasks but the last, since then
    reasons_gain: float | None  # the same of reasoning, where it was asked for
    reasons_lost: float | None
    kl: float  # to the base, nats a token
    tokens: int  # generated while training


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", default=[*ARMS], choices=ARMS)
    parser.add_argument("--read", action="store_true", help="run nothing")
    options = parser.parse_args()
    if not options.read:
        for seed in options.seeds:
            for arm in options.arms:
                run(arm, seed, options.out / arm / f"seed-{seed}")
    found = {arm: {s: r for s in options.seeds if (r := read(options.out / arm / f"seed-{s}"))} for arm in ARMS}
    write_json(
        options.out / "rft_study.json",
        {arm: {seed: one._asdict() for seed, one in runs.items()} for arm, runs in found.items()},
    )
    print("\n".join(table(found)))
    plot(found, options.out / "rft_study.png")


def run(arm: str, seed: int, folder: Path) -> None:
    """Run one arm under one seed, unless it has been."""
    recipe, keys = ARMS[arm]
    command = [sys.executable, "-c", "from mcit.pipeline.cli import main; main()", "run", f"mini/{recipe}"]
    keys = [*keys, f"seed={seed}", "eval.cells=metrics", "eval.constrained=false"]
    subprocess.run([*command, *keys, "--run-dir", folder, "--launch", "fork"], check=True)
    if not (folder / "kl.json").exists():
        write_json(folder / "kl.json", {"nats_a_token": divergence(folder)})


@torch.inference_mode()
def divergence(folder: Path) -> float:
    """KL(last policy ‖ base) over the whole vocabulary, a mean over the tokens of that policy's greedy answers."""
    policy = read_policies(folder, [])[-1]
    engine = TransformersEngine([policy], EvalConfig())
    sums, tokens = 0.0, 0
    for file in sorted((folder / "predictions" / f"{policy.serving.stage:02d}").glob("*.jsonl")):
        task = read_task(folder / "data" / file.stem)
        samples = {sample["id"]: sample for sample in read_samples(folder / "data" / file.stem, "test")}
        for row in list(read_jsonl(file))[:ASKED]:
            sample = samples[row["id"]]
            images = [image_path(folder / "data" / file.stem, task, image) for image in sample["images"]]
            text, count = completed(engine.processor, Request(sample["prompt"], images, policy, row["response"]))
            inputs = engine.processor(text=[text], images=[[open_image(path) for path in images]], return_tensors="pt")
            new = engine.model(**inputs).logits[0, -count - 1 : -1].log_softmax(-1)
            with engine.model.disable_adapter():
                base = engine.model(**inputs).logits[0, -count - 1 : -1].log_softmax(-1)
            sums, tokens = sums + float((new.exp() * (new - base)).sum()), tokens + count
    engine.close()
    return sums / tokens


def read(folder: Path) -> Run | None:
    """The figures of a run, if it is done."""
    if not (folder / "kl.json").exists():
        return None
    results = read_json(folder / "results.json")
    reasons = results.get("reasoning")
    answers = gain_and_loss(results["matrix"], results)
    return Run(
        *answers,
        *(gain_and_loss(reasons["matrix"], results) if reasons else (None, None)),
        kl=read_json(folder / "kl.json")["nats_a_token"],
        tokens=sum(map(generated, folder.glob("stages/[0-9]*-*"))),
    )


def gain_and_loss(matrix: list[list[Any]], results: dict[str, Any]) -> tuple[float, float]:
    """Means over tasks of what a stage gained on its task, and of what was lost of it since (of all but the last)."""
    at = [results["learned"][task["name"]] for task in results["tasks"]]
    gains = [matrix[k][i] - matrix[0][i] for i, k in enumerate(at)]
    lost = [matrix[k][i] - matrix[-1][i] for i, k in enumerate(at) if k < len(matrix) - 1]
    return statistics.mean(gains), statistics.mean(lost)


def generated(stage: Path) -> int:
    """Tokens of the answers that a stage was trained on or tried: mean length times answers."""
    lengths = [row["completions/mean_length"] for row in log_of(stage) if "completions/mean_length" in row]
    if not lengths:
        return 0
    trained = read_json(stage / "trained.json")
    tried = 8 * trained["rif"]["samples"] if "rif" in trained else 0
    return round(statistics.mean(lengths) * (trained["steps"] * 64 + tried))


def log_of(stage: Path) -> Iterator[dict[str, Any]]:
    """The rows of a stage's log; none for the base."""
    return read_jsonl(stage / "train_log.jsonl") if (stage / "train_log.jsonl").exists() else iter(())


def table(found: dict[str, dict[int, Run]]) -> list[str]:
    """Every arm with 95 % intervals over seeds, and what SFT would have lost at the same gain."""
    lines = [
        "| arm | seeds | gained | lost | SFT loses less by | reasoning gained | lost | KL to base | tokens |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm, runs in found.items():
        if not runs:
            continue
        of, matches = list(runs.values()), (matched(found, arm, seed) for seed in runs if "sft" not in arm)
        against = [run.lost - sft for run, sft in zip(of, matches, strict=False) if sft is not None]
        cells = [shown([getattr(run, name) for run in of]) for name in Run._fields[:4]]
        cells.insert(2, shown(against) + (f" (of {len(against)})" if len(against) < len(of) and against else ""))
        kl, tokens = shown([run.kl for run in of], 2), f"{statistics.mean(run.tokens for run in of):,.0f}"
        lines.append(f"| {arm} | {len(of)} | {' | '.join(cells)} | {kl} | {tokens} |")
    return lines


def matched(found: dict[str, dict[int, Run]], arm: str, seed: int) -> float | None:
    """What SFT of the same kind and seed lost at the gain of `arm`; None where its lengths do not reach that gain."""
    gain, how = found[arm][seed].gain, "-think" if "-think" in arm else ""
    lengths = (f"rft-sft{how}{end}" for end in (*(f"-{steps}" for steps in SHORT_SFT), ""))
    points = sorted([(0.0, 0.0), *(found[name][seed][:2] for name in lengths if seed in found[name])])
    for (low, at_low), (high, at_high) in pairwise(points):
        if low <= gain <= high:
            return at_low + (at_high - at_low) * (gain - low) / max(high - low, 1e-9)
    return None


def shown(values: list[Any], digits: int = 1) -> str:
    """Mean and 95 % interval of independent runs."""
    if not values or values[0] is None:
        return ""
    found = mean_interval(values)
    half = "" if found["high"] is None else f" ± {found['high'] - found['mean']:.{digits}f}"
    return f"{found['mean']:.{digits}f}{half}"


def plot(found: dict[str, dict[int, Run]], path: Path) -> None:
    """What was lost against what was gained, a point each run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 5), sharey=True)
    for axes, how, title in zip(panels, (False, True), ("direct answers", "chains of thought"), strict=True):
        arms = [arm for arm in found if ("-think" in arm) is how]
        for number, arm in enumerate(arms):
            runs = found[arm].values()
            axes.scatter([run.gain for run in runs], [run.lost for run in runs], marker="osv^DP*X<"[number], label=arm)
        axes.set(title=title, xlabel="gained on a task in its own stage (points)", ylabel="lost of it since (points)")
        if any(found[arm] for arm in arms):
            axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
