"""Does reinforcement tuning forget less than SFT, and what do KL, RIF and chains of thought change? On the mini stream.

python benchmarks/rft_study.py --seeds 5 OUT            all arms under all seeds; again: it goes on
python benchmarks/rft_study.py --seeds 5 OUT --read     only the table and the plot of what is there

An arm that learned less has less to forget. So the table has the gain on new tasks beside what was lost of old ones,
with KL to the base and the tokens that were generated, and the plot has one against the other.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

ARMS = tuple(f"{arm}{how}" for how in ("", "-think") for arm in ("rft-sft", "rft", "rft-nokl", "rft-rif", "joint"))
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # Student, two-sided


class Run(NamedTuple):
    """One arm under one seed. Scores are 0–100."""

    gain: float  # mean over tasks of score right after its stage minus score of the base
    forgotten: float  # mean over all tasks but the last of what was lost since
    kl: float | None  # to the base, nats a token, at the end of the last stage; SFT has no rollouts to measure it on
    tokens: int  # generated
    cut: float | None  # share of answers cut off


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--arms", nargs="*", default=ARMS, choices=ARMS)
    parser.add_argument("--read", action="store_true", help="run nothing")
    options = parser.parse_args()
    if not options.read:
        for arm in options.arms:
            sweep = f"sweep={{seed: {list(range(options.seeds))}}}"
            command = [sys.executable, "-m", "mcit.pipeline.cli", "run", f"mini/{arm}", sweep]
            subprocess.run([*command, "--run-dir", str(options.out / arm)], check=True)
    found = {arm: [read(run) for run in sorted((options.out / arm).glob("seed-*"))] for arm in options.arms}
    found = {arm: runs for arm, runs in found.items() if runs}
    for arm, runs in found.items():
        kls = [run.kl for run in runs if run.kl is not None]
        print(
            f"{arm:16} gain {interval([run.gain for run in runs]):>14}  forgotten "
            f"{interval([run.forgotten for run in runs]):>14}  KL to base {interval(kls) if kls else '-':>14}  "
            f"tokens {statistics.mean(run.tokens for run in runs):>10,.0f}  {len(runs)} seeds"
        )
    if found:
        plot(found, options.out / "rft_study.png")


def read(run: Path) -> Run:
    """The figures of a finished run."""
    results = json.loads((run / "results.json").read_text())
    matrix, learned, tasks = results["matrix"], results["learned"], results["tasks"]
    at = [learned[task["name"]] for task in tasks]
    gains = [matrix[k][i] - matrix[0][i] for i, k in enumerate(at)]
    lost = [matrix[k][i] - matrix[-1][i] for i, k in enumerate(at) if k < len(matrix) - 1]
    logs = [lines(folder / "train_log.jsonl") for folder in sorted((run / "stages").glob("[0-9]*")) if trained(folder)]
    rows = [row for log in logs for row in log if "reward" in row]
    tokens = sum(answered(folder) for folder in sorted((run / "stages").glob("[0-9]*")) if trained(folder))
    cut = [row["completions/clipped_ratio"] for row in rows]
    return Run(
        gain=statistics.mean(gains),
        forgotten=statistics.mean(lost),
        kl=rows[-1]["kl_base"] if rows else None,
        tokens=tokens,
        cut=statistics.mean(cut) if cut else None,
    )


def trained(stage: Path) -> bool:
    """Whether a stage's folder is of a stage that was trained."""
    return (stage / "train_log.jsonl").exists()


def answered(stage: Path) -> int:
    """Tokens that were generated in a stage: mean length times answers, over the rows of its log."""
    log = [row for row in lines(stage / "train_log.jsonl") if "completions/mean_length" in row]
    steps = json.loads((stage / "trained.json").read_text())["steps"]
    mean = statistics.mean(row["completions/mean_length"] for row in log) if log else 0
    return round(mean * steps * 64)  # completions a step, of mini/rft


def lines(file: Path) -> list[dict[str, Any]]:
    """A JSONL file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def interval(values: list[float]) -> str:
    """Mean and 95 % interval of independent runs."""
    if len(values) < 2:
        return f"{values[0]:.2f}"
    half = T95.get(len(values), 1.96) * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.2f} ± {half:.2f}"


def plot(found: dict[str, list[Run]], path: Path) -> None:
    """Forgetting against gain, a point each run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 5))
    for number, (arm, runs) in enumerate(found.items()):
        marker, colour = "ox"[arm.endswith("-think")], f"C{number % (len(ARMS) // 2)}"
        axes.scatter([run.gain for run in runs], [run.forgotten for run in runs], marker=marker, c=colour, label=arm)
    axes.set_xlabel("gained on a task in its own stage (points)")
    axes.set_ylabel("lost of it since (points)")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
