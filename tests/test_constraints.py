"""The forms that answers are held to: they allow what a style asks for, and bound what may repeat."""

import re
from pathlib import Path
from typing import Any

import pytest

from mcit.data_prep.choices import MOST
from mcit.data_prep.files import read_json, write_json
from mcit.data_prep.prepare import prepare_task, read_task
from mcit.data_prep.schema import PrepareConfig, TaskConfig
from mcit.data_prep.styles import parse, split_reasoning
from mcit.eval.constraints import constraint_of, why_unconstrained


def sample(style: str, options: list[str] | None = None, reasoning: str = "none") -> Any:
    return {"style": style, "reasoning": reasoning, "meta": {"options": options} if options else {}}


CASES = [
    ("mcq", ["red", "blue"], None, ["A", "B"], ["C", "a", "red", "A.", "", "AB"]),
    ("yes_no", None, None, ["Yes", "no"], ["YES", "Yes.", "maybe", ""]),
    ("label", ["hawkish", "dovish"], None, ["hawkish", "dovish"], ["neutral", "A"]),
    ("label", None, ["up", "down"], ["up"], ["sideways"]),
    ("short", None, ["7", "C++ (new)", "a|b"], ["7", "C++ (new)", "a|b"], ["a", "b", "C", "77", "The answer is 7."]),
    ("number", None, None, ["7", "-3.25", "1,000,000", "$5", "12%", "0.5"], ["seven", "1,00", "7 apples", "", " 7"]),
    (
        "bbox",
        None,
        None,
        ["[0.1, 0.25, 0.5, 1]", "[10,20,300,400]"],
        ["[1, 2, 3]", "0.1, 0.2, 0.3, 0.4", "[ 1, 2, 3, 4]"],
    ),
]


@pytest.mark.parametrize(("style", "options", "choices", "good", "bad"), CASES)
def test_a_form_allows_what_its_style_asks_for_and_nothing_else(style, options, choices, good, bad) -> None:
    form = constraint_of(sample(style, options), choices)
    assert form is not None
    for answer in good:
        assert re.fullmatch(form.pattern, answer), answer
        assert parse(style, answer, options=options).format_ok
    for answer in bad:
        assert not re.fullmatch(form.pattern, answer), answer
    assert all(re.fullmatch(form.pattern, choice) for choice in form.choices)
    assert bool(form.choices) == (style not in ("number", "bbox"))


@pytest.mark.parametrize(
    ("style", "answer"), [("number", "1" * 40), ("number", "0." + "3" * 40), ("bbox", "[0.1, 0.2,   ")]
)
def test_nothing_may_repeat_for_ever(style, answer) -> None:
    """Every prefix that a pattern allows is short: a policy that repeats itself comes to an end."""
    form = constraint_of(sample(style), None)
    assert form is not None and not re.search(r"[*+]", form.pattern.replace(r"\[", "")), "an unbounded repetition"
    assert not re.fullmatch(form.pattern, answer)


def test_thinking_is_free_and_the_answer_after_it_is_not() -> None:
    form = constraint_of(sample("number", reasoning="think"), None)
    assert form is not None
    for response in (
        "<think>7 < 8, so\nit is 8.</think><answer>8</answer>",
        "<think>\nIf a << b then 8</think>\n<answer>8</answer>",
    ):
        assert re.fullmatch(form.pattern, response), response
        assert split_reasoning(response, "think")[2]
    for response in (
        "8",
        "<think></think><answer>8</answer>",
        "<think> \n</think><answer>8</answer>",
        "<think>x</think><answer>The answer is 8.</answer>",
        "<think>x</think><answer>7</answer> or <answer>8</answer>",
        "<think>x <think>y</think><answer>8</answer>",
        "<think>x <answer>7</answer></think><answer>8</answer>",
    ):
        assert not re.fullmatch(form.pattern, response), response
        assert not split_reasoning(response, "think")[2] or "The answer" in response


@pytest.mark.parametrize("style", ["brief", "detailed", "caption", "latex", "short", "mcq", "label"])
def test_what_has_no_form_has_none_and_says_why(style) -> None:
    assert constraint_of(sample(style), None) is None
    assert why_unconstrained(style)


# --- Closed sets, found when a task is prepared ----------------------------------------------------------------------


def prepared(folder: Path, train: list[str], test: list[str], **fields: Any) -> Any:
    for part, answers in (("train", train), ("test", test)):
        rows = [{"prompt": f"{part} question {i}?", "completion": answer} for i, answer in enumerate(answers)]
        write_json(folder / f"{part}.json", rows)
    task = TaskConfig(name="words", train="train.json", test="test.json", **fields)
    done = prepare_task(task, PrepareConfig(), seed=0, asd=None, base_dir=folder, cache=folder / "cache")
    return read_task(done)


def test_few_answers_that_come_again_and_again_are_a_closed_set(tmp_path) -> None:
    task = prepared(tmp_path, ["red", "green"] * 10, ["green", "red"], style="short")
    assert task["choices"] == ["green", "red"]
    assert "the answers are a closed set of 2: green, red" in task["notes"]


@pytest.mark.parametrize(
    ("train", "test"),
    [
        (["red", "green"] * 9, ["red"]),  # each comes nine times
        (["red", "green"] * 10, ["red", "blue"]),  # the test part accepts what is never trained
        (["red"] * 20, ["red"]),  # no choice
        ([f"word {i}" for i in range(MOST + 1)] * 10, ["word 1"]),  # a vocabulary
    ],
)
def test_other_answers_are_no_closed_set(tmp_path, train, test) -> None:
    assert prepared(tmp_path, train, test, style="short")["choices"] is None


def test_sentences_are_no_closed_set(tmp_path) -> None:
    assert prepared(tmp_path, ["It is red.", "It is green."] * 10, ["It is red."], style="brief")["choices"] is None


def test_digits_of_the_mini_stream_are_a_closed_set(tmp_path) -> None:
    task = TaskConfig(name="digits", train="mcit.data_prep.mini.tasks:digits", style="short")
    prepare = PrepareConfig.model_validate({"limit": {"train": 200, "test": 20}})
    folder = prepare_task(task, prepare, seed=0, asd=None, base_dir=tmp_path, cache=tmp_path / "cache")
    assert read_json(folder / "task.json")["choices"] == list("0123456789")
