"""The mini stream: five tasks with five answer styles, generated, so each answer and rationale can be checked exactly.

Each task is a reader, `task(part)` for part `train`, `validation` or `test`. No program (picture or sum) is in two
parts. The `tuning_…` readers are a second stream of the same tasks over other programs and other handwriting: whatever
is tuned is tuned there, so the stream itself stays unseen.
"""

import json
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from mcit.data_prep.schema import Style
from mcit.data_prep.styles import build_prompt

from . import rationales, world

# What is learned slowest has more samples to train.
_TRAIN = {"digits": 3500, "counting": 1200, "spatial": 700, "grounding": 400, "arithmetic": 2000}
SIZES = {task: {"train": _TRAIN[task], "validation": 100, "test": 200} for task in rationales.TASKS}
Program = dict[str, Any]
Make = Callable[[np.random.Generator], Program]


def _sample(task: str, part: str, number: int, program: Program, picture: Image.Image | None, style: Style) -> dict:
    options = program.get("options")
    return {
        "id": f"{task}-{part}-{number}",
        "task": task,
        "images": [] if picture is None else [picture],
        "prompt": [{"role": "user", "content": build_prompt(program["question"], style, options=options)}],
        "completion": [{"role": "assistant", "content": program["answer"]}],
        "references": [program["answer"]],
        "style": style,
        "reasoning": "none",
        "meta": {
            "question": program["question"],
            **({"options": options} if options else {}),
            "program": program,
            "gold_think": rationales.explain(task, program),
        },
    }


def _distinct(task: str, make: Make, part: str, tuning: bool) -> Iterator[Program]:
    """Programs of one part. All parts of both streams are drawn in one fixed order, so no program is in two of them."""
    rng = np.random.default_rng(rationales.TASKS.index(task))
    seen: set[str] = set()
    for of_tuning in (False, True):
        for name, size in SIZES[task].items():
            target = len(seen) + size
            while len(seen) < target:
                program = make(rng)
                key = json.dumps(program, sort_keys=True)
                if key not in seen and (name, of_tuning) == (part, tuning):
                    yield program
                seen.add(key)


def _draw_rng(task: str, part: str, tuning: bool) -> np.random.Generator:
    return np.random.default_rng([rationales.TASKS.index(task), list(SIZES[task]).index(part), int(tuning), 7])


# ---------------------------------------------------------------------------------------------------------------------
# Handwritten digits: real ones, 8×8 pixels, from scikit-learn (UCI optical recognition of handwritten digits).


@cache
def _handwriting() -> tuple[np.ndarray, np.ndarray]:
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    return data.images[order], data.target[order]


# Where the 1,797 images go. A part that needs more than it has shows them again, placed anew.
_HANDWRITING = {
    False: {"train": (0, 700), "validation": (700, 770), "test": (770, 970)},
    True: {"train": (970, 1620), "validation": (1620, 1660), "test": (1660, 1797)},
}


def digits(part: str, tuning: bool = False) -> Iterator[dict]:
    """Which digit is written here? (short)"""
    rng = _draw_rng("digits", part, tuning)
    images, targets = _handwriting()
    first, last = _HANDWRITING[tuning][part]
    for number in range(SIZES["digits"][part]):
        index = first + number % (last - first)
        picture = world.place_glyph(rng, Image.fromarray((images[index] * 255 / 16).astype(np.uint8)), steady=True)
        program = {"question": "Which digit is written here?", "answer": str(targets[index])}
        sample = _sample("digits", part, number, program, picture, "short")
        sample["meta"]["image_id"] = f"digit-{index}"
        yield sample


# ---------------------------------------------------------------------------------------------------------------------
# Counting: how many shapes, answered by option letter.


def _counting(rng: np.random.Generator) -> Program:
    count = int(rng.integers(1, 5))
    scene = world.make_scene(rng, count)
    options = list("1234") if rng.random() < 0.5 else list("4321")
    return {
        "question": "How many shapes are there?",
        "answer": "ABCD"[options.index(str(count))],
        "options": options,
        "scene": [vars(shape) for shape in scene],
    }


def counting(part: str, tuning: bool = False) -> Iterator[dict]:
    """How many shapes are there? (option letter)"""
    rng = _draw_rng("counting", part, tuning)
    for number, program in enumerate(_distinct("counting", _counting, part, tuning)):
        picture = world.draw_scene(rng, [world.Shape(**shape) for shape in program["scene"]])
        yield _sample("counting", part, number, program, picture, "mcq")


# ---------------------------------------------------------------------------------------------------------------------
# Spatial relations, answered by yes or no.


def _spatial(rng: np.random.Generator) -> Program:
    truth, relation = bool(rng.random() < 0.5), str(rng.choice(list(rationales.RELATIONS)))
    while True:
        scene = world.make_scene(rng, int(rng.integers(2, 5)))
        first, second = (scene[i] for i in rng.permutation(len(scene))[:2])
        # The two must lie in different columns (rows): "level with" is never asked about.
        if rationales.place(first.corner, relation) == rationales.place(second.corner, relation):
            continue
        if rationales.holds(first.corner, relation, second.corner) == truth:
            break
    a, b = f"{first.colour} {first.shape}", f"{second.colour} {second.shape}"
    return {
        "question": f"Is the {a} {relation} the {b}?",
        "answer": "Yes" if truth else "No",
        "relation": relation,
        "pair": [a, b],
        "scene": [vars(shape) for shape in scene],
    }


def spatial(part: str, tuning: bool = False) -> Iterator[dict]:
    """Is the red circle left of the blue square? (yes or no)"""
    rng = _draw_rng("spatial", part, tuning)
    for number, program in enumerate(_distinct("spatial", _spatial, part, tuning)):
        picture = world.draw_scene(rng, [world.Shape(**shape) for shape in program["scene"]])
        yield _sample("spatial", part, number, program, picture, "yes_no")


# ---------------------------------------------------------------------------------------------------------------------
# Grounding in a bar chart, answered by a box.


def _grounding(rng: np.random.Generator) -> Program:
    chart = world.make_chart(rng)
    tallest = max(chart, key=lambda bar: bar.height)
    return {
        "question": "Give the box of the tallest bar.",
        "answer": world.format_box(tallest.box),
        "chart": [vars(bar) for bar in chart],
    }


def grounding(part: str, tuning: bool = False) -> Iterator[dict]:
    """Give the box of the tallest bar. (box)"""
    rng = _draw_rng("grounding", part, tuning)
    for number, program in enumerate(_distinct("grounding", _grounding, part, tuning)):
        picture = world.draw_chart(rng, [world.Bar(**bar) for bar in program["chart"]])
        yield _sample("grounding", part, number, program, picture, "bbox")


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic: text only, answered by a number.


def _arithmetic(rng: np.random.Generator) -> Program:
    """A number of up to three digits and one of one digit, in either order, without a carry."""
    while True:
        a, b = int(rng.integers(10, 700)), int(rng.integers(1, 10))
        if a % 10 + b < 10:
            a, b = (a, b) if rng.random() < 0.5 else (b, a)
            return {"question": f"What is {a} + {b}?", "answer": str(a + b), "terms": [a, b]}


def arithmetic(part: str, tuning: bool = False) -> Iterator[dict]:
    """What is 34 + 5? (number)"""
    for number, program in enumerate(_distinct("arithmetic", _arithmetic, part, tuning)):
        yield _sample("arithmetic", part, number, program, None, "number")


def aloud(reader: Callable[..., Iterator[dict]], part: str) -> Iterator[dict]:
    """The same samples, asked for `<think>…</think><answer>…</answer>`, with the gold rationale before each answer."""
    for sample in reader(part):
        meta, [answer] = sample["meta"], sample["completion"]
        prompt = build_prompt(meta["question"], sample["style"], options=meta.get("options"), reasoning="think")
        said = f"<think>{meta['gold_think']}</think><answer>{answer['content']}</answer>"
        yield sample | {
            "prompt": [{"role": "user", "content": prompt}],
            "completion": [{"role": "assistant", "content": said}],
            "reasoning": "think",
        }


tuning_digits = partial(digits, tuning=True)
tuning_counting = partial(counting, tuning=True)
tuning_spatial = partial(spatial, tuning=True)
tuning_grounding = partial(grounding, tuning=True)
tuning_arithmetic = partial(arithmetic, tuning=True)
think_digits = partial(aloud, digits)
think_counting = partial(aloud, counting)
think_spatial = partial(aloud, spatial)
think_grounding = partial(aloud, grounding)
think_arithmetic = partial(aloud, arithmetic)
tuning_think_digits = partial(aloud, tuning_digits)
tuning_think_counting = partial(aloud, tuning_counting)
tuning_think_spatial = partial(aloud, tuning_spatial)
tuning_think_grounding = partial(aloud, tuning_grounding)
tuning_think_arithmetic = partial(aloud, tuning_arithmetic)
