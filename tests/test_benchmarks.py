"""What benchmark scripts compute beside what they time: their data, their figures, and the table of all of these."""

import subprocess
import sys
from collections import Counter
from pathlib import Path
from statistics import mean

import packing
import peers
import pytest
import table
from figures import figure
from PIL import Image
from training import make_samples
from vqa_like import KINDS, LEAST, Kind, draw, padding, write

from mcit.data_prep.files import read_json, read_jsonl, write_json


@pytest.mark.parametrize("name", KINDS)
def test_lengths_are_those_of_the_kind(name: str) -> None:
    kind = KINDS[name]
    rows = draw(kind, pictures=4000)
    assert rows == draw(kind, pictures=4000) != draw(kind, pictures=4000, seed=1)
    assert {*Counter(row.picture for row in rows).values()} == {kind.questions}
    words = [len(row.question.split()) for row in rows]
    assert mean(words) == pytest.approx(kind.words, rel=0.03) and min(words) == LEAST
    assert mean(len(row.answer.split()) for row in rows) == pytest.approx(kind.answer, rel=0.03)
    pictures = {row.picture: row.grid for row in rows}
    grids = Counter(pictures.values())
    assert sum(kind.grids.values()) == pytest.approx(1)
    for grid, share in kind.grids.items():
        assert grids[grid] / 4000 == pytest.approx(share, abs=0.03)


def test_a_picture_takes_the_tokens_of_its_grid(tmp_path: Path) -> None:
    rows = draw(KINDS["shared"], pictures=3)
    write(tmp_path, rows, unit=4)
    lines = read_jsonl(tmp_path / "train.jsonl")
    assert len(lines) == 15
    for line, row in zip(lines, rows, strict=True):
        with Image.open(tmp_path / line["images"][0]) as picture:
            assert picture.size == (4 * row.grid[0], 4 * row.grid[1])


def test_padding_is_what_is_left_of_the_longest() -> None:
    even = Kind({(2, 2): 0.5, (4, 2): 0.5}, questions=1, words=7.0, answer=1.0)
    assert padding(even, 2) == pytest.approx(1 - 6 / (0.75 * 8 + 0.25 * 4), abs=0.02)  # three of four pairs have 8
    assert padding(even, 1) == 0
    dealt = [padding(KINDS["own"], 8, batch) for batch in (None, 32, 64)]
    assert dealt == pytest.approx([0.16, 0.07, 0.03], abs=0.01)  # docs/performance.md


def test_questions_on_a_picture_become_turns_of_one_row() -> None:
    samples = make_samples("colour", 4)
    for sample, picture in zip(samples, "abab", strict=True):
        sample["images"], sample["prompt"][0]["content"] = [picture], f"{sample['id']}?"
    merged = peers.merge(samples)
    assert [row["images"] for row in merged] == [["a"], ["b"]]
    said = [turn["content"] for turn in [*merged[1]["prompt"], *merged[1]["completion"]]]
    answers = [sample["completion"][0]["content"] for sample in samples]
    assert said == ["colour-1?", answers[1], "colour-3?", answers[3]]
    assert len(samples[1]["completion"]) == 1  # which they were made of is as it was


def test_a_ratio_is_that_of_a_round() -> None:
    """A round in which the machine was slow is slow for both."""
    one = figure("ours", "theirs", ours=[1.0, 10.0, 2.0], theirs=[3.0, 20.0, 5.0], target=2.5)
    assert (one["ratio"], one["spread"], one["rounds"]) == (2.5, [2.0, 3.0], 3)


def test_packing_is_set_against_all_other_paths() -> None:
    row = {"setting": "shared", "model": "tiny"}
    row |= {"seconds": {"trl": [6.0], "trl-labels": [5.0], "trl-merged": [1.0], "plain": [4.0], "packed": [2.0]}}
    found = [(one["figure"], one["against"][:5], one["ratio"], one["target"]) for one in packing.compared(row)]
    name = "5 questions a picture, tiny model"
    assert found == [
        (f"SFT packed, {name}", "TRL", 3.0, 3.0),
        (f"SFT packed, {name}", "TRL, ", 2.5, None),
        (f"SFT packed, {name}", "TRL, ", 0.5, None),
        (f"SFT packed, {name}", "ours ", 2.0, None),
        (f"SFT not packed, {name}", "TRL", 1.5, None),
    ]


def test_the_table_says_what_is_met(tmp_path: Path) -> None:
    figures = [figure("a", "b", [1.0, 1.0], [3.0, 2.0], 2.5), figure("c", "d", [1.0], [0.5], 1.3)]
    write_json(tmp_path / "two.json", {"figures": [*figures, figure("e", "f", [2.0], [1.0])]})
    write_json(tmp_path / "one.json", {"rows": []})
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.table(table.read(tmp_path))]
    assert lines[0] == ["figure", "against", "ratio", "spread", "target", "met"]
    assert lines[2:] == [
        ["a", "b", "2.50 ×", "2.00 to 3.00", "2.5 ×", "yes"],
        ["c", "d", "0.50 ×", "once", "1.3 ×", "no"],
        ["e", "f", "0.50 ×", "once", "", ""],
    ]


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["shared", "grpo"])
def test_paths_take_turns_on_the_same_samples(setting: str, tmp_path: Path) -> None:
    """The embedded model, one round: a path that trained on something else would have other tokens and another loss."""
    out = tmp_path / "out.json"
    command = [sys.executable, packing.__file__, str(out), "--only", f"tiny-{setting}", "--rounds", "1"]
    subprocess.run(command, check=True, timeout=1500)
    [row] = read_json(out)["rows"]
    assert row["seconds"].keys() == {*packing.SETTINGS[setting].paths}
    assert all(len(rounds) == 1 and rounds[0] > 0 for rounds in row["seconds"].values())
    if setting == "shared":
        assert row["tokens"]["packed"] == row["tokens"]["plain"]
        assert row["tokens"]["trl"] - row["tokens"]["plain"] == row["samples"]  # TRL's rows end in a line break
        assert row["loss"]["packed"] == pytest.approx(row["loss"]["plain"], rel=1e-5)
    assert len(read_json(out)["figures"]) == len(row["seconds"])
