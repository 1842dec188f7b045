"""Reasoning beside answers: the losses of both on the same samples, and what the page says of them."""

from pathlib import Path
from typing import Any

import pytest
from judging import LEARNED, STAGES, make_stages, make_task, said, write_answers

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import read_jsonl
from mcit.data_prep.schema import Sample
from mcit.eval.gathering import assemble_results
from mcit.eval.judge.cells import judge_cells, judged_cells
from mcit.eval.metrics import continual_metrics
from mcit.eval.report.page import write_report
from mcit.eval.report.words import sentences
from mcit.eval.results import read_results, write_results

JUDGE = "test_reasoning:stated"
CELLS = [(0, "art"), (1, "art"), (2, "art"), (2, "sums")]


def stated(sample: Sample, think: str) -> dict[str, float]:
    """A program that takes the reasoning at its word: `logic grounding`."""
    return dict(zip(("logic", "grounding"), map(float, think.split()), strict=False))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Art: reasoning 100, 100, 50, 0 when learned; 100, 60, cut off, none at the end. Answers: 4 right, then 1 of 4."""
    make_stages(tmp_path)
    art, sums = make_task(tmp_path, "art", 4), make_task(tmp_path, "sums", 4, images=False)
    write_answers(tmp_path, 0, art, "no")
    learned = ["100 100", "100 100", "100 0", "0 0"]
    write_answers(tmp_path, 1, art, {s["id"]: said(think) for s, think in zip(art, learned, strict=True)})
    last = {"art-0": said("100 100"), "art-1": said("100 20", "no"), "art-2": "<think>100", "art-3": "no"}
    write_answers(tmp_path, 2, art, last, cut=["art-2"])
    write_answers(tmp_path, 2, sums, said("70"))
    judge_cells(judged_cells(tmp_path, CELLS, JUDGE), JUDGE, tmp_path / "cache", print)
    return tmp_path


def results(run: Path) -> Any:
    found: Any = assemble_results(run, name="r", seed=0, method={}, stages=STAGES, learned=LEARNED, judge=JUDGE)
    write_results(run, found)
    return found


def test_the_matrix_of_reasoning_has_the_metrics_of_answers(run: Path) -> None:
    found = results(run)
    art = [0, 62.5, pytest.approx((100 + 60 + 0) / 3)]  # the one that was cut off does not count
    assert [row[0] for row in found["reasoning"]["matrix"]] == art and found["reasoning"]["matrix"][2][1] == 70
    assert found["reasoning"]["n"] == [[4, None], [4, None], [3, 4]]
    assert found["reasoning"]["outcomes"][2][0] == {"judged": 2, "absent": 1, "cut": 1, "unreadable": 0, "refused": 0}
    assert found["reasoning"]["grounding"][2] == [60, None] and found["reasoning"]["knowledge"][2] == [None, None]
    expected = continual_metrics(found["reasoning"]["matrix"], [1, 2], row0=True)
    for name in ("MFT", "MFN", "BWT", "forgetting"):
        assert found["metrics"][f"reasoning_{name}"] == expected[name]
    assert read_results(run) == found


def test_losses_of_both_are_over_the_samples_whose_reasoning_has_two_scores(run: Path) -> None:
    lost = results(run)["reasoning"]["tasks"]["art"]  # art-2 is out
    assert lost["n"] == 3
    assert lost["reasoning"]["value"] == pytest.approx((0 + 40 + 0) / 3)
    assert lost["answer"]["value"] == pytest.approx((0 + 100 + 100) / 3)
    kept = (100 * 160 / 200, 100 * 100 / 300)
    assert (lost["reasoning_kept"]["value"], lost["answer_kept"]["value"]) == pytest.approx(kept)
    assert lost["difference"]["value"] == pytest.approx(kept[0] - kept[1])
    for part in ("reasoning", "answer", "difference"):
        assert lost[part]["low"] <= lost[part]["value"] <= lost[part]["high"] and lost[part]["low"] < lost[part]["high"]
    assert results(run)["reasoning"]["mean"]["difference"] == lost["difference"]  # one task of earlier stages


def test_of_what_was_never_learned_nothing_is_said_to_outlive(run: Path) -> None:
    """Reasoning at 0 when learned: its loss of 0 points is no sign that it lasts."""
    samples = read_jsonl(run / "data" / "art" / "test.jsonl")
    write_answers(run, 1, samples, said("0 0"))
    write_answers(run, 2, samples, said("0 0", "no"))
    judge_cells(judged_cells(run, CELLS, JUDGE), JUDGE, run / "cache", print)
    found = results(run)
    lost = found["reasoning"]["mean"]
    assert lost["reasoning"]["value"] == 0 and lost["answer"]["value"] == 100
    assert lost["reasoning_kept"] is None and lost["difference"] is None and lost["answer_kept"]["value"] == 0
    found["verdicts"] = [[None] * 2] * 3
    assert "of one of the two nothing had been learned" in " ".join(sentences(found))


def test_answers_count_above_chance_where_it_is_known(run: Path) -> None:
    """Three of four right by yes or no are 50 above chance, two of four are 0: nothing is left, though 50 are right."""
    samples = read_jsonl(run / "data" / "art" / "test.jsonl")
    for k, right in ((1, 3), (2, 2)):
        responses = {s["id"]: said("80 80", "yes" if i < right else "no") for i, s in enumerate(samples)}
        write_answers(run, k, samples, responses, chance=0.5)
    judge_cells(judged_cells(run, CELLS, JUDGE), JUDGE, run / "cache", print)
    lost = results(run)["reasoning"]["tasks"]["art"]
    assert lost["answer"]["value"] == 50 and lost["answer_kept"]["value"] == 0
    assert lost["reasoning_kept"]["value"] == 100 == lost["difference"]["value"]


def test_scores_of_answers_that_were_given_anew_do_not_count(run: Path) -> None:
    samples = make_task(run / "elsewhere", "art", 4)
    write_answers(run, 2, samples, said("10 10"))
    found = results(run)["reasoning"]
    assert found["matrix"][2] == [None, 70] and found["tasks"] == {} and found["mean"] is None


def test_the_page_shows_reasoning_beside_answers(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mcit.eval.report.page.read_answers", lambda path, result: {})  # needs whole samples
    verdicts = {"correct": 0.25, "wrong_content": 0.5, "wrong_format": 0.0, "wrong_both": 0.25}
    found = results(run)
    found["verdicts"] = [[verdicts if n else None for n in row] for row in found["n"]]
    write_results(run, found)
    page = write_report([run]).read_text()
    assert "Reasoning beside answers" in page and JUDGE in page
    assert "1 were cut off while reasoning (no score)" in page and "5 answers came without reasoning (0)" in page
    assert "lost 13.3 points of reasoning and 66.7 of answers" in page
    markdown = (run / "report" / "report.md").read_text()
    assert "| art | 13.3 [" in markdown and "| mean | 13.3 [" in markdown


@pytest.mark.parametrize(
    ("returned", "line"),
    [
        ({"logic": 101}, "art-0: logic: returned 101"),
        ({"style": 1}, "Scores of some of logic"),
        (None, "returned None"),
        (RuntimeError("no"), "RuntimeError: no"),
    ],
)
def test_a_program_that_returns_no_scores_is_named(
    run: Path, monkeypatch: pytest.MonkeyPatch, returned: Any, line: str
) -> None:
    def broken(sample: Sample, think: str) -> Any:
        if isinstance(returned, Exception):
            raise returned
        return returned

    monkeypatch.setattr("test_reasoning.stated", broken)
    with pytest.raises(InputError, match=line) as caught:
        judge_cells(judged_cells(run, [(1, "art")], JUDGE), JUDGE, run / "cache", print)
    assert JUDGE in str(caught.value)
