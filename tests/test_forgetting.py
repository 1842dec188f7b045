"""Superficial and essential forgetting on answers made by hand: each figure is worked out beside the test."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mcit.data_prep.files import write_jsonl
from mcit.eval.forgetting import above_chance, forgetting_metrics, knowledge, shown_and_known, split_forgetting
from mcit.eval.stats import RESAMPLES, clustered_stderr, resampled_means

HALF = 0.5


def row(free: str, held: bool, chance: float = HALF, number: int = 0, image: Any = None) -> dict[str, Any]:
    """A row of a predictions file. `free`: right, wrong, or in a foreign form (whose content is right or not)."""
    verdict = {"right": "correct", "wrong": "wrong_content", "foreign": "wrong_format", "lost": "wrong_both"}[free]
    return {
        "id": f"q{number}",
        "score": 100.0 if free == "right" else 0.0,
        "format_ok": free in ("right", "wrong"),
        "verdict": verdict,
        "constrained_score": 100.0 if held else 0.0,
        "chance": chance,
        "image_id": image,
    }


def sheet(*groups: tuple[int, str, bool], chance: float = HALF) -> list[dict[str, Any]]:
    """Rows by groups of (how many, free answer, constrained answer right)."""
    kinds = [(free, held) for count, free, held in groups for _ in range(count)]
    return [row(free, held, chance, number) for number, (free, held) in enumerate(kinds)]


def split(folder: Path, then: list[dict[str, Any]], now: list[dict[str, Any]]) -> Any:
    for stage, rows in ((1, then), (2, now)):
        write_jsonl(folder / "predictions" / f"{stage:02d}" / "task.jsonl", rows)
    return split_forgetting(folder, {"task": (1, 2)}, {})["tasks"]["task"]


def values(found: Any) -> tuple[float, float, float]:
    return tuple(round(found[part]["value"], 6) for part in ("loss", "essential", "superficial"))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("score", "chance", "expected"),
    [(100, 0.25, 100), (0, 0.25, -100 / 3), (25, 0.25, 0), (50, 0.5, 0), (0, 0.5, -100), (70, 0, 70), (62.5, 0.25, 50)],
)
def test_chance_correction(score, chance, expected) -> None:
    assert above_chance(score, chance) == pytest.approx(expected)


def test_guessing_among_four_options_is_worth_nothing_on_average() -> None:
    rng = np.random.default_rng(0)
    guesses = [above_chance(100.0 * (rng.integers(4) == 0), 0.25) for _ in range(40_000)]
    assert abs(np.mean(guesses)) < 2


def test_a_foreign_form_is_no_answer_and_not_a_wrong_guess() -> None:
    assert shown_and_known(row("foreign", True)) == (0, 100)
    assert shown_and_known(row("wrong", False)) == (-100, -100)
    assert shown_and_known(row("right", False)) == (100, -100)


def test_a_mean_below_chance_is_nothing_and_not_less() -> None:
    """One of four right: (100 − 3 · 100) / 4 = −50."""
    assert knowledge(sheet((1, "right", True), (3, "wrong", False))) == (0, 0)
    assert knowledge(sheet((3, "right", True), (1, "wrong", False))) == (50, 50)


def test_a_lost_form_is_superficial(tmp_path) -> None:
    """Shown: 100 → 0, no answer has the form. Known: 100 → 100."""
    found = split(tmp_path, sheet((20, "right", True)), sheet((20, "foreign", True)))
    assert values(found) == (100, 0, 100) and found["recoverable"] == 100 and found["n"] == 20


def test_lost_knowledge_in_the_right_form_is_essential(tmp_path) -> None:
    """Half of the answers to yes/no questions are right by chance, so nothing is known: 100 → 0 both ways."""
    found = split(tmp_path, sheet((20, "right", True)), sheet((10, "right", True), (10, "wrong", False)))
    assert values(found) == (100, 100, 0) and found["recoverable"] == 0


def test_lost_knowledge_behind_a_foreign_form_is_essential(tmp_path) -> None:
    """Counting format errors would call it superficial: no answer has the form, but what is held to it is a guess."""
    found = split(tmp_path, sheet((20, "right", True)), sheet((10, "lost", True), (10, "lost", False)))
    assert values(found) == (100, 100, 0)


def test_half_of_the_answers_in_a_foreign_form_lose_half(tmp_path) -> None:
    """Shown: (10 · 100 + 10 · 0) / 20 = 50. Uncorrected for chance the loss is 50 too; known: nothing is lost."""
    found = split(tmp_path, sheet((20, "right", True)), sheet((10, "right", True), (10, "foreign", True)))
    assert values(found) == (50, 0, 50) and found["recoverable"] == 50


def test_of_an_open_form_the_loss_is_that_of_the_matrix(tmp_path) -> None:
    """Without chance: 80 → 30 in the matrix. Constrained 90 → 60, so 30 is essential and 20 superficial."""
    then = sheet((16, "right", True), (2, "foreign", True), (2, "wrong", False), chance=0)
    now = sheet((6, "right", True), (6, "foreign", True), (8, "lost", False), chance=0)
    found = split(tmp_path, then, now)
    assert values(found) == (50, 30, 20) and found["recoverable"] == 30


def test_what_is_gained_back_is_negative(tmp_path) -> None:
    found = split(
        tmp_path, sheet((10, "right", True), (10, "wrong", False), chance=0), sheet((20, "right", True), chance=0)
    )
    assert values(found) == (-50, -50, 0)


def test_the_parts_add_up_to_the_loss_whatever_the_answers(tmp_path) -> None:
    rng = np.random.default_rng(1)
    sheets = [
        [
            row(
                str(rng.choice(["right", "wrong", "foreign", "lost"])),
                bool(rng.random() < p),
                0.25,
                i,
                f"image {i // 3}",
            )
            for i in range(60)
        ]
        for p in (0.9, 0.5)
    ]
    found = split(tmp_path, *sheets)
    loss, essential, superficial = values(found)
    assert loss == pytest.approx(essential + superficial, abs=1e-5)
    for part in ("loss", "essential", "superficial"):
        assert found[part]["low"] <= found[part]["value"] <= found[part]["high"]


def test_rows_without_a_form_are_left_out(tmp_path) -> None:
    then, now = sheet((10, "right", True)), sheet((10, "foreign", True))
    for rows in (then, now):
        rows[0] |= {"chance": None, "constrained_score": None}
    assert split(tmp_path, then, now)["n"] == 9


def test_one_image_gives_no_interval(tmp_path) -> None:
    rows = [row("right", True, 0, i, "the only image") for i in range(5)]
    assert split(tmp_path, rows, rows)["loss"] == {"value": 0, "low": None, "high": None}


def test_the_mean_over_tasks_weighs_them_the_same(tmp_path) -> None:
    sheets = {
        "big": (sheet((40, "right", True)), sheet((40, "foreign", True))),
        "small": (sheet((4, "right", True)),) * 2,
    }
    for task, pair in sheets.items():
        for stage, rows in enumerate(pair, 1):
            write_jsonl(tmp_path / "predictions" / f"{stage:02d}" / f"{task}.jsonl", rows)
    found = split_forgetting(tmp_path, {"big": (1, 2), "small": (1, 2)}, {"captions": "why"})
    assert found["mean"] is not None and values(found["mean"]) == (50, 0, 50)
    assert found["left_out"] == {"captions": "why"}
    assert forgetting_metrics(found) == {"superficial": 50, "essential": 0, "recoverable": 50}


def test_with_no_task_to_split_the_metrics_are_undefined(tmp_path) -> None:
    found = split_forgetting(tmp_path, {}, {"captions": "why"})
    assert forgetting_metrics(found) == {"superficial": None, "essential": None, "recoverable": None}


def test_resampled_means_spread_as_the_clustered_error_says() -> None:
    """Their standard deviation is √((G − 1) / G) of the cluster-robust error; of G = 40 images that is 99 %."""
    rng = np.random.default_rng(2)
    images = [f"image {i // 3}" for i in range(120)]
    values = np.repeat(rng.normal(50, 20, 40), 3) + rng.normal(0, 5, 120)
    drawn = resampled_means(np.column_stack([values, -values]), images)
    assert drawn.shape == (RESAMPLES, 2) and np.allclose(drawn[:, 0], -drawn[:, 1])
    error = clustered_stderr(values.tolist(), images)
    assert error is not None and drawn[:, 0].std() == pytest.approx(error, rel=0.05)
    assert not np.array_equal(drawn, resampled_means(np.column_stack([values, -values]), images, seed=1))
