"""Gold rationales of the mini stream, and an exact checker for any rationale: every sentence against the program.

A rationale is a row of sentences in fixed forms. Each sentence that can be read is one step of a kind, after the
rubrics of MLLM-CTBench: `grounding` (what the picture shows), `knowledge` (what is true anyway, here sums), `logic`
(whether the conclusion follows from the steps before it, right or wrong). A sentence in no known form is unreadable.

The forms are those of the sentences that pretraining teaches (`facts.py`), or at least made of their words: what the
embedded model has never said in its life it does not learn to say in a few hundred steps (docs/judging.md).
"""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import InputError
from ..schema import Sample
from . import world

TASKS = ("digits", "counting", "spatial", "grounding", "arithmetic")
RELATIONS = {"left of": "left", "right of": "right", "above": "top", "below": "bottom"}
Program = dict[str, Any]
Kind = Literal["grounding", "knowledge", "logic", "unreadable"]


@dataclass(frozen=True)
class Step:
    """One sentence of a rationale: what kind of claim it makes, and whether it holds."""

    text: str
    kind: Kind
    ok: bool


def place(corner: str, relation: str) -> str:
    """The part of a corner that a relation is about: its row (`top`, `bottom`) or its column (`left`, `right`)."""
    row, column = corner.split()
    return column if relation in ("left of", "right of") else row


def holds(first: str, relation: str, second: str) -> bool:
    """Whether a thing in corner `first` stands in `relation` to one in corner `second`."""
    return place(first, relation) == RELATIONS[relation] != place(second, relation)


def explain(task: str, program: Program) -> str:
    """The gold rationale of a program of `task`."""
    if task == "digits":
        return f"The picture shows {program['answer']}."
    if task == "counting":
        seen = [f"At the {s['corner']} there is a {s['colour']} {s['shape']}." for s in program["scene"]]
        return f"{' '.join(seen)} {len(seen)}."
    if task == "spatial":
        corners = {f"{s['colour']} {s['shape']}": s["corner"] for s in program["scene"]}
        seen = [f"The {thing} is at the {corners[thing]}." for thing in program["pair"]]
        first, second = (place(corners[thing], program["relation"]) for thing in program["pair"])
        return f"{' '.join(seen)} The first is at the {first}. The second is at the {second}."
    if task == "grounding":
        seen = [f"The {bar['place']} bar is {bar['height']}." for bar in program["chart"]]
        tallest, next_to_it = sorted((bar["height"] for bar in program["chart"]), reverse=True)[:2]
        return f"{' '.join(seen)} {tallest} is more than {next_to_it}."
    a, b = max(program["terms"]), min(program["terms"])
    ones, carried = a % 10 + b, (a % 10 + b) // 10
    return f"{a % 10} + {b} = {ones}. {a // 10} + {carried} = {a // 10 + carried}. {a + b}."


def check(task: str, program: Program, rationale: str) -> list[Step]:
    """Check each sentence of `rationale` against the program. An empty rationale has no steps.

    A conclusion is checked against what the rationale itself said before, not against the truth: a wrong observation
    with a right inference is wrong in `grounding` and right in `logic`.
    """
    sentences = [s.strip() for s in re.findall(r"[^.]+\.?", rationale) if s.strip(" .")]
    checker = {
        "digits": _check_digits,
        "counting": _check_counting,
        "spatial": _check_spatial,
        "grounding": _check_grounding,
        "arithmetic": _check_arithmetic,
    }[task]
    return checker(program, sentences)


def rate(sample: Sample, rationale: str) -> dict[str, float]:
    """Scores 0–100 of a rationale to a sample of the mini stream, in each dimension that its task has: a judge that
    never errs, `eval.judge: mcit.data_prep.mini.rationales:rate`.

    Of a dimension, 100 · (steps of it that hold) / max(steps of it in the gold rationale, steps of it that were said +
    unreadable sentences): what is wrong, what is missing and what is babble all count against it.
    """
    program = (sample.get("meta") or {}).get("program")
    if not isinstance(program, dict):
        raise InputError("is no sample of the mini stream: it has no program", field=f"sample {sample['id']}")
    task = _task_of(program)
    steps = check(task, program, rationale)
    wanted = Counter(step.kind for step in check(task, program, explain(task, program)))
    said, holding = Counter(step.kind for step in steps), Counter(step.kind for step in steps if step.ok)
    return {
        kind: 100 * holding[kind] / max(count, said[kind] + said["unreadable"])
        for kind in ("logic", "grounding", "knowledge")
        if (count := wanted[kind])
    }


def _task_of(program: Program) -> str:
    """The task that made a program, whatever a recipe calls it."""
    keys = {"relation": "spatial", "scene": "counting", "chart": "grounding", "terms": "arithmetic"}
    return next((task for key, task in keys.items() if key in program), "digits")


def _read(pattern: str, sentence: str) -> tuple[str, ...] | None:
    found = re.fullmatch(pattern + r"\.?", sentence)
    return found.groups() if found else None


def _check_digits(program: Program, sentences: list[str]) -> list[Step]:
    steps = []
    for sentence in sentences:
        found = _read(r"The picture shows (\d)", sentence)
        right = found is not None and found[0] == str(program["answer"])
        steps.append(Step(sentence, "grounding" if found else "unreadable", right))
    return steps


def _check_counting(program: Program, sentences: list[str]) -> list[Step]:
    there = {(shape["corner"], f"{shape['colour']} {shape['shape']}") for shape in program["scene"]}
    named: list[str] = []
    steps = []
    for sentence in sentences:
        if found := _read(r"At the (\w+ \w+) there is a (\w+ \w+)", sentence):
            steps.append(Step(sentence, "grounding", found in there and found[0] not in named))
            named.append(found[0])
        elif found := _read(r"(\d+)", sentence):
            steps.append(Step(sentence, "logic", int(found[0]) == len(named)))
        else:
            steps.append(Step(sentence, "unreadable", False))
    return steps


def _check_spatial(program: Program, sentences: list[str]) -> list[Step]:
    corners = {f"{s['colour']} {s['shape']}": s["corner"] for s in program["scene"]}
    said: list[str] = []
    steps = []
    for sentence in sentences:
        if found := _read(r"The (\w+ \w+) is at the (\w+ \w+)", sentence):
            steps.append(Step(sentence, "grounding", corners.get(found[0]) == found[1]))
            said.append(found[1])
        elif found := _read(r"The (first|second) is at the (left|right|top|bottom)", sentence):
            which = 0 if found[0] == "first" else 1
            follows = which < len(said) and said[which] in world.CORNERS
            steps.append(Step(sentence, "logic", follows and place(said[which], program["relation"]) == found[1]))
        else:
            steps.append(Step(sentence, "unreadable", False))
    return steps


def _check_grounding(program: Program, sentences: list[str]) -> list[Step]:
    heights = {bar["place"]: bar["height"] for bar in program["chart"]}
    said: dict[str, int] = {}
    steps = []
    for sentence in sentences:
        if found := _read(r"The (\w+) bar is (\d+)", sentence):
            steps.append(Step(sentence, "grounding", heights.get(found[0]) == int(found[1])))
            said[found[0]] = int(found[1])
        elif found := _read(r"(\d+) is more than (\d+)", sentence):
            highest = sorted(said.values(), reverse=True)[:2]
            steps.append(Step(sentence, "logic", [*map(int, found)] == highest))
        else:
            steps.append(Step(sentence, "unreadable", False))
    return steps


def _check_arithmetic(program: Program, sentences: list[str]) -> list[Step]:
    results: list[int] = []
    steps = []
    for sentence in sentences:
        if found := _read(r"(\d+) \+ (\d+) = (\d+)", sentence):
            steps.append(Step(sentence, "knowledge", int(found[0]) + int(found[1]) == int(found[2])))
            results.append(int(found[2]))
        elif found := _read(r"(\d+)", sentence):
            follows = len(results) == 2 and int(found[0]) == 10 * results[1] + results[0] % 10
            steps.append(Step(sentence, "logic", follows))
        else:
            steps.append(Step(sentence, "unreadable", False))
    return steps
