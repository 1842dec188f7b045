"""The mini stream: deterministic, disjoint, checkable."""

import hashlib
import json

import numpy as np
import pytest

from mcit.data_prep.mini import facts, rationales, tasks, world

PARTS = ("train", "validation", "test")


def _pixels(sample) -> str:
    return "".join(hashlib.sha256(np.asarray(image).tobytes()).hexdigest() for image in sample["images"])


@pytest.fixture(scope="module", params=rationales.TASKS)
def stream(request):
    return request.param, {part: list(getattr(tasks, request.param)(part)) for part in PARTS}


def test_parts_have_their_sizes_and_are_the_same_every_time(stream):
    name, parts = stream
    assert {part: len(samples) for part, samples in parts.items()} == tasks.SIZES[name]
    again = list(getattr(tasks, name)("test"))
    assert [(s["id"], s["references"], _pixels(s)) for s in again] == [
        (s["id"], s["references"], _pixels(s)) for s in parts["test"]
    ]


def test_no_program_and_no_picture_is_in_two_parts(stream):
    name, parts = stream
    if name == "digits":  # one program for all; what must not repeat is the handwriting
        keys = {part: {s["meta"]["image_id"] for s in samples} for part, samples in parts.items()}
    else:
        keys = {part: {json.dumps(s["meta"]["program"]) for s in samples} for part, samples in parts.items()}
        assert all(len(keys[part]) == len(parts[part]) for part in PARTS)
    assert not keys["train"] & keys["test"] and not keys["train"] & keys["validation"]
    assert not keys["test"] & keys["validation"]


def test_the_tuning_stream_shares_nothing_with_the_stream(stream):
    name, parts = stream
    tuning = [s for part in PARTS for s in getattr(tasks, f"tuning_{name}")(part)]
    key = (lambda s: s["meta"]["image_id"]) if name == "digits" else (lambda s: json.dumps(s["meta"]["program"]))
    assert not {key(s) for s in tuning} & {key(s) for samples in parts.values() for s in samples}


def test_answers_are_balanced(stream):
    name, parts = stream
    if name in ("grounding", "arithmetic"):
        return  # open answers
    answers = [s["references"][0] for s in parts["train"]]
    shares = {answer: answers.count(answer) / len(answers) for answer in set(answers)}
    assert max(shares.values()) < 1.35 / len(shares)


def test_every_gold_rationale_passes_its_own_check(stream):
    name, parts = stream
    for sample in parts["test"]:
        steps = rationales.check(name, sample["meta"]["program"], sample["meta"]["gold_think"])
        assert steps and all(step.ok for step in steps), (sample["meta"]["gold_think"], steps)


SCENE = [
    {"corner": "top left", "shape": "circle", "colour": "red", "x": 16, "y": 16, "radius": 8},
    {"corner": "bottom right", "shape": "square", "colour": "blue", "x": 48, "y": 48, "radius": 8},
]
CHART = [
    {"place": "first", "colour": "red", "height": 2, "box": [4, 44, 14, 60]},
    {"place": "second", "colour": "blue", "height": 5, "box": [25, 20, 35, 60]},
]


@pytest.mark.parametrize(
    ("task", "program", "rationale", "expected"),
    [
        ("digits", {"answer": "7"}, "The picture shows 1.", [("grounding", False)]),
        # Sees a shape that is not there, but counts what it named: wrong observation, right inference.
        (
            "counting",
            {"scene": SCENE},
            "At the top left there is a red circle. At the top right there is a red square. 2.",
            [("grounding", True), ("grounding", False), ("logic", True)],
        ),
        (
            "counting",
            {"scene": SCENE},
            "At the top left there is a red circle. 3.",
            [("grounding", True), ("logic", False)],
        ),
        (
            "spatial",
            {"scene": SCENE, "pair": ["red circle", "blue square"], "relation": "left of", "answer": "Yes"},
            "The red circle is at the top left. The blue square is at the bottom right. "
            "The first is at the right. The second is at the right.",
            [("grounding", True), ("grounding", True), ("logic", False), ("logic", True)],
        ),
        (
            "grounding",
            {"chart": CHART},
            "The first bar is 6. The second bar is 5. 6 is more than 5.",
            [("grounding", False), ("grounding", True), ("logic", True)],
        ),
        (
            "arithmetic",
            {"terms": [34, 8]},
            "4 + 8 = 13. 3 + 1 = 4. 43.",
            [("knowledge", False), ("knowledge", True), ("logic", True)],
        ),
        ("arithmetic", {"terms": [34, 8]}, "It is obvious.", [("unreadable", False)]),
        ("arithmetic", {"terms": [34, 8]}, "", []),
    ],
)
def test_the_checker_tells_what_is_wrong(task, program, rationale, expected):
    assert [(step.kind, step.ok) for step in rationales.check(task, program, rationale)] == expected


def test_every_rationale_of_arithmetic_ends_in_the_answer():
    for make in (tasks.arithmetic, tasks.tuning_arithmetic):
        for sample in make("test"):
            steps = rationales.check("arithmetic", sample["meta"]["program"], sample["meta"]["gold_think"])
            assert all(step.ok for step in steps) and steps[-1].text == f"{sample['references'][0]}."


def test_boxes_lie_in_the_picture_and_around_the_shape():
    rng = np.random.default_rng(0)
    for _ in range(50):
        item = world.make_scene(rng, 1)[0]
        x1, y1, x2, y2 = item.box
        assert 0 <= x1 < x2 <= world.SIZE and 0 <= y1 < y2 <= world.SIZE
        pixels = np.asarray(world.draw_scene(rng, [item])).astype(int)
        inked = pixels.max(axis=2) - pixels.min(axis=2) > 90  # the paper is pale
        rows, columns = np.where(inked.any(axis=1))[0], np.where(inked.any(axis=0))[0]
        assert abs(columns[0] - x1) <= 2 and abs(columns[-1] + 1 - x2) <= 2
        assert abs(rows[0] - y1) <= 2 and abs(rows[-1] + 1 - y2) <= 2


def test_pretraining_never_asks_what_the_stream_asks():
    rng = np.random.default_rng(0)
    asked = " ".join(
        facts.ask(rng, fact, *pair)[0]
        for source in facts.SOURCES
        for _ in range(50)
        for fact in source(rng)[1]
        for pair in facts.styles_of(fact)
    )
    for phrase in ("How many", "left of", "right of", "above", "below", "tallest", " + ", "digit"):
        assert phrase not in asked


def test_every_printable_character_is_an_output_of_pretraining():
    rng = np.random.default_rng(0)
    outputs = "".join(fact.answer for _ in range(2000) for fact in facts.echo_facts(rng)[1])
    assert {chr(code) for code in range(33, 127)} <= set(outputs)
