"""Verdicts and cells."""

import math
import random
import statistics
import time

import pytest

from mcit.data_prep.errors import InputError
from mcit.data_prep.schema import Style
from mcit.data_prep.styles import STYLES, default_scorer
from mcit.eval.scorers import SCORERS
from mcit.eval.scoring import VERDICTS, aggregate, score_bare, score_response
from mcit.eval.stats import clustered_stderr


def make_sample(style: Style, *references, reasoning="none", **meta):
    return {
        "id": "s1",
        "task": "t",
        "images": [],
        "prompt": [],
        "completion": [],
        "references": list(references),
        "style": style,
        "reasoning": reasoning,
        "meta": meta,
    }


def judge(style: Style, reference, response, *, kind=None, finished=True, reasoning="none", **meta):
    sample = make_sample(style, reference, reasoning=reasoning, **meta)
    return score_response(sample, response, SCORERS[kind or default_scorer(style)], finished)


# --- Verdicts -------------------------------------------------------------------------------------------------------

OPTIONS = ["two", "three", "four"]
BOX = "[0.10, 0.20, 0.30, 0.40]"
CASES = [
    # style, reference, response, verdict
    ("short", "All you can eat", "all you can eat", "correct"),  # a sentence to look at, and a title
    ("short", "The World Is Flat", "The world is flat", "correct"),
    ("short", "e", "E", "correct"),
    ("short", "red", "E", "wrong_both"),
    ("number", "0.5", "50%", "correct"),
    ("number", "0.75", "3/4", "wrong_format"),
    ("mcq", "B", "B", "correct"),
    ("mcq", "B", "(b).", "correct"),
    ("mcq", "B", "C", "wrong_content"),
    ("mcq", "B", "three", "wrong_format"),
    ("mcq", "B", "The answer is B.", "wrong_format"),
    ("mcq", "B", "B. three", "wrong_format"),
    ("mcq", "B", "<answer>B</answer>", "wrong_format"),
    ("mcq", "A", "<answer>C</answer>", "wrong_both"),  # CTBench finds "a" in "answer c answer"
    ("mcq", "A", "answer c answer", "wrong_both"),
    ("mcq", "A", "E", "wrong_both"),  # no such option
    ("mcq", "A", "", "wrong_both"),
    ("yes_no", "yes", "Yes.", "correct"),
    ("yes_no", "yes", "no", "wrong_content"),
    ("yes_no", "yes", "Yes, there is a dog.", "wrong_format"),
    ("yes_no", "no", "It is unknown.", "wrong_both"),
    ("short", "The World Is Flat", "The World Is Flat", "correct"),  # reads as a sentence, and is the title
    ("short", "B. 12 Elm Street", "B. 12 Elm Street", "correct"),
    ("short", "red", "It's red.", "wrong_format"),
    (
        "latex",
        r"f=\left\{\begin{array}{l}x\end{array}\right.",
        r"f=\left\{\begin{array}{l}x\end{array}\right.",
        "correct",
    ),
    ("number", "3", "3", "correct"),
    ("number", "1000", "1,000", "correct"),
    ("number", "3", "4", "wrong_content"),
    ("number", "3", "The answer is 3. (see Figure 2)", "wrong_format"),  # CTBench reads 2
    ("number", "3", "three", "wrong_format"),
    ("number", "3", "none", "wrong_both"),
    ("short", "7", "7", "correct"),
    ("short", "7", "8", "wrong_content"),
    ("short", "7", "No", "wrong_both"),  # the form of another style
    ("short", "7", "B", "wrong_both"),
    ("short", "yes", "no", "wrong_content"),
    ("short", "S", "B", "wrong_content"),  # letters are asked for
    ("short", "7", "The digit is 7.", "wrong_format"),
    ("short", "7", r"\boxed{7}", "wrong_format"),  # passes for a phrase, but is not the right one
    ("short", r"\boxed{7}", r"\boxed{7}", "correct"),  # whatever the style-free reading makes of it
    ("short", "7", "", "wrong_both"),  # ImageNet's scorer in CoIN takes it for right
    ("short", "Málaga", "Ma\u0301laga.", "correct"),
    ("bbox", BOX, BOX, "correct"),
    ("bbox", BOX, "[0.50, 0.60, 0.70, 0.80]", "wrong_content"),
    ("bbox", BOX, "The box is 0.10, 0.20, 0.30, 0.40", "wrong_format"),
    ("bbox", "[0.12, 0.33, 0.55, 0.97]", "[0.12, 0.33, 0.55, 0.97]", "correct"),
    ("bbox", BOX, "top left", "wrong_both"),
    ("brief", "A dog runs on grass.", "A dog runs on grass.", "correct"),
    ("brief", "A dog runs on grass.", "No idea at all.", "wrong_content"),
    ("brief", "A dog runs on grass.", "", "wrong_both"),
    ("brief", "3", r"I wonder if \boxed{3} is right", "wrong_content"),  # free text is read as it is
    ("caption", "A dog runs on grass.", "A dog runs on grass.", "correct"),
]


@pytest.mark.parametrize(("style", "reference", "response", "verdict"), CASES)
def test_verdict(style, reference, response, verdict):
    result = judge(style, reference, response, options=OPTIONS if style == "mcq" else None)
    assert result["verdict"] == verdict
    assert (result["score"] > 99) == (verdict == "correct")  # METEOR never reaches 100
    assert result["score"] == 0 or result["format_ok"]


def test_an_answer_that_was_cut_off_has_no_form():
    assert judge("brief", "A dog runs on grass", "A dog runs on", finished=False)["verdict"] == "wrong_format"
    assert judge("detailed", "A dog runs on grass", "What a", finished=False)["verdict"] == "wrong_both"
    assert judge("number", "12", "12", finished=False)["verdict"] == "wrong_format"
    assert judge("number", "12", "12", finished=False)["score"] == 0


THOUGHT = "Two and one make three."


@pytest.mark.parametrize(
    ("response", "verdict", "think"),
    [
        (f"<think>{THOUGHT}</think><answer>3</answer>", "correct", THOUGHT),
        (f"<think>{THOUGHT}</think>\n<answer>4</answer>", "wrong_content", THOUGHT),
        (f"<think>{THOUGHT}</think> 3", "wrong_format", THOUGHT),
        ("3", "wrong_format", None),
        ("<answer>3</answer>", "wrong_format", None),
        (f"<think>{THOUGHT}</think><answer>The answer is 3.</answer>", "wrong_format", THOUGHT),
        (f"<think>{THOUGHT} It is 3", "wrong_both", f"{THOUGHT} It is 3"),  # cut off while thinking: 3 is no answer
        (f"<think>{THOUGHT}</think><answer>3", "wrong_format", THOUGHT),
        ("<think></think><answer>3</answer>", "wrong_format", None),
    ],
)
def test_reasoning_is_part_of_the_form_and_not_of_the_answer(response, verdict, think):
    result = judge("number", "3", response, reasoning="think")
    assert (result["verdict"], result["think"]) == (verdict, think)


def test_tags_nobody_asked_for_are_a_wrong_form():
    result = judge("number", "3", f"<think>{THOUGHT}</think><answer>3</answer>")
    assert (result["verdict"], result["think"], result["parsed"]) == ("wrong_format", THOUGHT, "3")


def test_correct_is_exactly_what_reaches_right_from():
    rng = random.Random(0)
    pieces = [
        "A",
        "(B)",
        "yes",
        "no",
        "3",
        "-1,000",
        "%",
        "[0, 0, 1, 1]",
        "0.5",
        ",",
        ".",
        "\n",
        "\\frac",
        "{",
        "$",
        "a",
    ]
    pieces += ["<think>", "</think>", "<answer>", "</answer>", "The answer is", "two dogs", "é", "**"]
    kinds = [kind for kind in SCORERS if kind != "math"]
    for _ in range(3000):
        style, kind = rng.choice(STYLES), rng.choice(kinds)
        reference, response = (" ".join(rng.choices(pieces, k=rng.randint(1, 5))) for _ in range(2))
        response = rng.choice([response, reference, f"The answer is {reference}.", f"<answer>{reference}</answer>"])
        finished, reasoning = rng.random() < 0.8, rng.choice(["none", "think"])
        result = judge(
            style, reference, response, kind=kind, finished=finished, reasoning=reasoning, options=["a", "b"]
        )
        right = result["score"] >= SCORERS[kind].right_from
        assert right == (result["verdict"] == "correct")
        assert not right or result["content_ok"]
        assert result["verdict"] == VERDICTS[result["format_ok"], result["content_ok"]]
        assert result["format_ok"] or result["score"] == 0
        assert 0 <= result["score"] <= 100


def test_a_sample_without_references_cannot_be_scored():
    with pytest.raises(InputError, match="sample s1"):
        score_response(make_sample("short"), "x", SCORERS["short"])


@pytest.mark.parametrize("unit", ["a ", "1", "(a", "[", "<think>", "<answer>", "answer is ", "yes no ", "x. ", "$"])
def test_ten_megabytes_of_one_thing_are_scored_in_time(unit):
    flood = unit * (10_000_000 // len(unit))
    for style in ("short", "number", "bbox", "brief"):
        start = time.process_time()
        assert judge(style, "[1, 2, 3, 4] no", flood)["verdict"] != "correct"
        assert time.process_time() - start < 5


def test_the_end_of_a_long_answer_is_read():
    thinking = "Let me count. " * 20_000
    assert judge("number", "3", f"<think>{thinking}</think><answer>3</answer>", reasoning="think")["score"] == 100
    assert judge("number", "3", f"{thinking}The answer is 3.")["verdict"] == "wrong_format"


# --- Cells ----------------------------------------------------------------------------------------------------------


def test_clustered_stderr_with_one_row_a_cluster_is_the_plain_one():
    rng = random.Random(1)
    for n in (2, 3, 50):
        values = [rng.uniform(0, 100) for _ in range(n)]
        assert clustered_stderr(values, range(n)) == pytest.approx(statistics.stdev(values) / math.sqrt(n))


def test_clustered_stderr_by_hand():
    # mean 50; residuals of image a: +50 +50, of image b: -50 -50; sqrt(2/1 · (100² + 100²)) / 4
    assert clustered_stderr([100, 100, 0, 0], "aabb") == pytest.approx(50)
    assert clustered_stderr([100, 0, 100, 0], "aabb") == 0  # the images do not differ
    assert clustered_stderr([100, 0], "aa") is None
    assert clustered_stderr([100], "a") is None


def test_clustered_stderr_of_copies_is_that_of_the_originals():
    values = [0.0, 100, 100, 40, 7]
    assert clustered_stderr(values * 3, list(range(5)) * 3) == pytest.approx(clustered_stderr(values, range(5)))


def row(score, verdict="correct", image=None):
    return {"id": "1", "score": score, "verdict": verdict, "image_id": image}


def test_aggregate():
    rows = [row(100, image="a"), row(100, image="a"), row(0, "wrong_format", "b"), row(0, "wrong_both", "b")]
    assert aggregate(rows) == {
        "n": 4,
        "score": 50,
        "stderr": pytest.approx(50),
        "verdicts": {"correct": 0.5, "wrong_content": 0, "wrong_format": 0.25, "wrong_both": 0.25},
    }


def test_rows_without_an_image_are_clusters_of_their_own():
    alone = [{"score": 100, "verdict": "correct"}, {"score": 0, "verdict": "wrong_both"}] * 2
    assert aggregate(alone)["stderr"] == pytest.approx(statistics.stdev([100, 0, 100, 0]) / 2)


def test_unanswered_questions_stay_in_the_denominator():
    """CTBench: one of two answered → accuracy 1.0."""
    rows = [judge("number", "3", response) for response in ("3", "")]
    assert aggregate(rows)["score"] == 50


def test_a_set_whose_score_is_no_mean_is_scored_as_a_whole():
    scorer = SCORERS["bleu"]
    rows = [
        {"references": [reference], **judge("caption", reference, response, kind="bleu", finished=finished)}
        for reference, response, finished in (
            ("the cat sat on the mat", "the cat sat on the mat", True),
            ("a dog runs", "a dog", True),
            ("a red bus", "a red bus", False),
        )
    ]
    cell = aggregate(rows, scorer)
    answers = ["the cat sat on the mat", "a dog", ""]  # what was cut off has no form, and counts as nothing
    assert cell["score"] == pytest.approx(scorer.pooled(answers, [row["references"] for row in rows]))
    assert cell["stderr"] is None and cell["verdicts"]["wrong_format"] == pytest.approx(1 / 3)


def test_nothing_to_aggregate_is_an_error():
    with pytest.raises(InputError):
        aggregate([])


def test_a_title_that_reads_as_a_sentence_is_right_when_no_form_was_asked_for():
    for reference, response in (("The World Is Flat", "The world is flat."), ("All you can eat", "all you can eat")):
        assert score_bare(make_sample("short", reference), response, SCORERS["short"])[1] == 100
    assert score_bare(make_sample("short", "7"), "The digit is 7.", SCORERS["short"])[1] == 100
