"""How long things take, from runs that were measured: with the same base model, on the machine that did them.

    training    seconds of a stage = start + work × pace / processes
    answers     seconds of an evaluation = start + answers × pace

The work of SFT is tokens, those included that fill up a batch; of rows that are packed, tokens alone; that of GRPO
completions. What methods have the model do beside it counts by its share of what a token of training takes
(`extra_tokens`). `pace` is the time that training itself took over its work
(`train_runtime`, times the processes), `start` what a stage took beyond it, on average. Of answers, `pace` is the
median over cells of seconds an answer, `start` what is left of their sum. That n processes are n times as fast is
assumed.
"""

import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import read_json, read_jsonl
from mcit.eval.serving import read_serving

from ..methods import Method, expand, get_method
from .outlook import Passes

# Without a measurement: the share of a card's peak at which the shape of Qwen2.5-VL-3B trained on an H100 (989 TFLOPS
# in bfloat16): 6 × 3.75 billion parameters × 4,720 tokens in 1.15 s (benchmarks/real_size.json).
UTILISATION = 0.09
Section = Mapping[str, Mapping[str, Any] | None]  # `method:` of a recipe


class Pace(NamedTuple):
    """Seconds."""

    start: float  # of a stage, or of an evaluation
    each: float  # a token, a completion, or an answer; of one process
    measured: int  # stages, or cells, that it is from
    passes: bool = True  # whether what methods do beside training is still to be added

    def seconds(self, units: float, processes: int = 1) -> float:
        """What `units` take."""
        return self.start + self.each * units / processes


def extra_tokens(passes: Passes, checkpointing: bool, filled: float = 1.0) -> float:
    """What a method does, in tokens of training; batches have `filled` times as many places as tokens.

    Of a token of training, the passes forward and backward take as long each, as does running each layer again where
    gradients are checkpointed.
    """
    return filled * (passes.forward / (3 if checkpointing else 2) + passes.gradients) + passes.products


def measured_training(
    runs: Iterable[Path], base_hash: str, phase: str, methods: Section, packing: bool = False
) -> Pace | None:
    """The pace of a phase in earlier runs that had no other, packed or not; None if none was measured.

    Of RFT, a unit is a completion.

    From runs with the same methods; else from those whose methods train and do nothing beside it.
    """
    same, plain = [], []
    for folder in _stages(runs, base_hash):
        inputs = read_json(folder / "done.json")["inputs"]
        if inputs["train"]["paradigm"] == phase and inputs["train"].get("packing", False) == packing:
            if _beside(inputs.get("method", {})) == _beside(expand(methods)):
                same.append(folder)
            elif _only_train(inputs.get("method", {})):
                plain.append(folder)
    found = _training_pace(same, phase) if same else _training_pace(plain, phase)
    return found and found._replace(passes=not same)


def _training_pace(folders: Iterable[Path], phase: str) -> Pace | None:
    starts, times, units = [], 0.0, 0.0
    for folder in folders:
        marker, log = read_json(folder / "done.json"), read_jsonl(folder / "train_log.jsonl")
        trained, train = marker["trained"], marker["inputs"]["train"]
        runtime = next((row["train_runtime"] for row in reversed(log) if "train_runtime" in row), None)
        if phase == "sft":
            unit = "num_tokens" if train.get("packing") else "num_places"
            done = next((row[unit] for row in reversed(log) if unit in row), None)
        else:
            done = trained["steps"] * (train["rft"]["global_batch_size"] or train["global_batch_size"])
        if runtime is not None and done:
            starts.append(marker["seconds"] - runtime)
            times, units = times + runtime * trained.get("processes", 1), units + done
    return Pace(statistics.mean(starts), times / units, len(starts)) if starts else None


def _beside(methods: Section) -> dict[str, Any]:
    """The methods but ASD, which is at work before training."""
    return {name: settings for name, settings in methods.items() if name != "asd"}


def _only_train(methods: Section) -> bool:
    """Whether none of the methods has the model do anything beside training."""
    try:
        return all(get_method(name).passes is Method.passes for name in methods)
    except InputError:  # a method of somebody's own, which is not there any more
        return False


def measured_answers(runs: Iterable[Path], base_hash: str) -> Pace | None:
    """The pace of evaluation in earlier runs."""
    cells, whole, evaluations = [], 0.0, 0
    for run in runs:
        found = sorted((run / "predictions").glob("[0-9]*/*.done.json")) if _is_of(run, base_hash) else []
        markers = [marker for marker in map(read_json, found) if marker["n"]]
        if markers:
            cells += [(marker["seconds"], marker["n"]) for marker in markers]
            step = run / "steps" / "evaluate.json"  # with what comes before the first answer
            inside = sum(marker["seconds"] for marker in markers)
            whole += max(inside, read_json(step)["seconds"] if step.exists() else 0.0)
            evaluations += 1
    if not cells:
        return None
    each = statistics.median(seconds / n for seconds, n in cells)
    return Pace(max(0.0, whole - each * sum(n for _, n in cells)) / evaluations, each, len(cells))


def assumed_training(parameters: int, tflops: float, checkpointing: bool) -> Pace:
    """Without a measurement: 2 operations a parameter and token forward, 2 backward, 2 for a layer that runs again."""
    operations = parameters * (6 if checkpointing else 4)
    return Pace(0.0, operations / (tflops * 1e12 * UTILISATION), 0)


def _stages(runs: Iterable[Path], base_hash: str) -> Iterable[Path]:
    for run in runs:
        if _is_of(run, base_hash):
            for marker in sorted((run / "stages").glob("[0-9]*-*/trained.json")):
                if (marker.parent / "done.json").exists() and (marker.parent / "train_log.jsonl").exists():
                    yield marker.parent


def _is_of(run: Path, base_hash: str) -> bool:
    folder = run / "stages" / "00-base"
    return (folder / "serving.json").exists() and read_serving(folder).base_hash == base_hash
