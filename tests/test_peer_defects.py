"""What published evaluation code gets wrong: by name, what ours says, and that the protocol says what theirs does.

The defects were seen in the code at the commits that `eval/protocols/` names, or reproduced with it.
"""

import math

import pytest

from mcit.data_prep.errors import InputError
from mcit.data_prep.extraction import extract
from mcit.data_prep.files import read_text
from mcit.eval.metrics import continual_metrics
from mcit.eval.scorers import SCORERS, get_scorer
from mcit.eval.scoring import aggregate, score_response


def sample(style, *references, **more):
    meta = {"options": more.pop("options", None)}
    return {"id": "s1", "references": list(references), "style": style, "reasoning": "none", "meta": meta, **more}


def ours(kind, response, *references, style="short", **more):
    return score_response(sample(style, *references, **more), response, SCORERS[kind])["score"]


def theirs(protocol, response, *references, style="short", **more):
    return score_response(sample(style, *references, **more), response, get_scorer(protocol))["score"]


# --- MLLM-CTBench ---------------------------------------------------------------------------------------------------


def test_ctbench_a_wrong_letter_is_right_because_answer_contains_it():
    assert theirs("ctbench:science", "<answer>C</answer>", "A") == 100
    assert ours("mcq", "<answer>C</answer>", "A", style="mcq") == 0
    assert extract("mcq", "<answer>C</answer>") == "C"
    assert SCORERS["mcq"].score("answer c answer", ["A"], sample("mcq", "A")) == 0


def test_ctbench_unanswered_questions_leave_the_denominator():
    rows = [score_response(sample("number", "3"), response, SCORERS["number"]) for response in ("3", "")]
    assert aggregate(rows)["score"] == 50  # theirs: 100 of the one that was answered


def test_ctbench_the_last_number_is_taken_for_the_answer():
    response = "The answer is 3. (see Figure 2)"
    assert theirs("ctbench:numglue", response, "3") == theirs("ctbench_v2:numglue", response, "3") == 0
    assert theirs("ctbench:numglue", response, "2") == 100
    assert SCORERS["number"].score(extract("number", response), ["3"], sample("number", "3")) == 100


def test_ctbench_an_unknown_task_is_scored_as_art():
    with pytest.raises(InputError, match="Did you mean ctbench:math"):
        get_scorer("ctbench:maths")
    with pytest.raises(InputError, match="Known: ctbench:numglue, ctbench:art"):
        get_scorer("ctbench:zzzzzzzzzzzz")


def test_ctbench_the_label_of_a_letter_is_never_found():
    assert theirs("ctbench:fomc", "C. neutral", "C") == theirs("ctbench:fomc", "C", "C") == 0
    assert theirs("ctbench:fomc", "It sounds hawkish, not dovish.", "hawkish") == 100
    assert ours("mcq", "C", "C", style="mcq") == 100


def test_ctbench_v2_an_article_is_a_letter():
    assert theirs("ctbench_v2:science", "It shows a dog, so C", "A") == 100
    assert extract("mcq", "It shows a dog, so C") == "C"


def test_ctbench_reasoning_is_not_cut_off_at_128_tokens():
    assert "max_new_tokens: 1024" in read_text("recipes/ctbench/stream.yaml")
    cut = score_response(sample("number", "3"), "3", SCORERS["number"], finished=False)
    assert cut["verdict"] == "wrong_format" and cut["score"] == 0


def test_ctbench_a_failed_evaluation_is_no_gap_to_average_around():
    with pytest.raises(InputError, match="nothing to average"):
        aggregate([])
    assert continual_metrics([[90.0, 0.0], [None, 80.0]])["MFN"] is None


# --- CoIN, SEFE, MCITlib --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["coin", "sefe"])
def test_coin_imagenet_an_empty_answer_is_right(family):
    for response in ("", "a", "tabby cat dog mat", "tab"):
        assert theirs(f"{family}:imagenet", response, "tabby cat") == 100
        assert ours("short", response, "tabby cat") == 0


@pytest.mark.parametrize("family", ["coin", "sefe"])
def test_coin_grounding_loses_the_first_and_the_last_character(family):
    box = "[0.90, 0.90, 0.97, 0.97]"
    assert theirs(f"{family}:grounding", box, box, style="bbox") == 0  # reads .90, .90, .97, .9: an empty box
    assert ours("bbox", box, box, style="bbox") == 100
    three = "[0.900, 0.900, 0.970, 0.970]"
    assert theirs(f"{family}:grounding", three, three, style="bbox") == 100


@pytest.mark.parametrize("task", ["vizwiz", "vqav2"])
def test_coin_soft_accuracy_is_exact_match_with_one_answer(task):
    people = ["red"] * 3 + ["dark red"] * 7
    assert theirs(f"coin:{task}", "RED", *people) == 100
    assert theirs(f"coin:{task}", "dark red", *people) == theirs(f"coin:{task}", "red.", *people) == 0
    assert ours("vqa_soft", "red.", *people) == pytest.approx(100 * (3 * 2 / 3 + 7) / 10)


def test_coin_scienceqa_takes_the_first_word_of_one_letter():
    response = "I see a dog, so B"
    assert theirs("coin:scienceqa", response, "B", style="mcq", options=list("wxyz")) == 0
    assert theirs("coin:scienceqa", "a dog", "A", style="mcq", options=list("wxyz")) == 100
    assert theirs("sefe:scienceqa", "a dog", "A", style="mcq", options=list("wxyz")) == 0
    assert extract("mcq", response, options=["cat", "bird", "fox", "ape"]) == "B"


def test_coin_a_grade_of_ten_is_read_as_one():
    assert theirs("coin:knowledge", "Score: 10", "x") == 10
    assert theirs("coin:knowledge", "10", "x") == 100
    assert extract("number", "Score: 10") == "10"


def test_coin_ocrvqa_unanswerable_is_wrong_where_it_is_the_answer():
    assert theirs("coin:ocrvqa", "Unanswerable", "Unanswerable") == 0
    assert ours("short", "Unanswerable", "Unanswerable") == 100


def test_mcitlib_no_is_in_unknown():
    assert theirs("mcitlib:med", "unknown", "no") == theirs("mcitlib:ad", "casino floor", "no") == 100
    assert ours("short", "unknown", "no") == ours("yes_no", "unknown", "no", style="yes_no") == 0


# --- Others ---------------------------------------------------------------------------------------------------------


def test_llmcl_a_misspelt_task_is_an_error_that_is_raised():
    for name in ("NUmGLUE-ds", "numbr"):
        with pytest.raises(InputError, match="unknown scorer"):
            get_scorer(name)


def test_lmms_eval_references_are_overwritten_in_place():
    references = ["The Cat."] * 10
    SCORERS["vqa_soft"].score("cat", references, sample("short", *references))
    get_scorer("coin:textvqa").score("cat", references, sample("short", *references))
    assert references == ["The Cat."] * 10


def test_mammoth_metrics_change_their_input():
    matrix = [[0.0, 0.0], [90.0, 10.0], [60.0, 80.0]]
    continual_metrics(matrix, row0=True)
    assert matrix == [[0.0, 0.0], [90.0, 10.0], [60.0, 80.0]]


# --- What a peer's defect costs nobody else -------------------------------------------------------------------------


def test_no_kind_gives_a_score_that_is_not_a_number():
    for scorer in SCORERS.values():
        for response in ("nan", "inf", "[nan, nan, nan, nan]", "1e999"):
            assert math.isfinite(scorer.score(response, ["3"], sample("short", "3")))
