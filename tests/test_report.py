"""The report page: right in words and figures, safe, and readable in a real browser."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import write_json, write_jsonl
from mcit.eval.report import old_task_verdicts, summary_sentences, write_report

EVIL = '<script>document.title="stolen"</script><img src=x onerror="document.title=\'stolen\'">'


def _shares(correct=0.0, wrong_format=0.0, wrong_content=0.0, wrong_both=0.0):
    return {
        "correct": correct,
        "wrong_format": wrong_format,
        "wrong_content": wrong_content,
        "wrong_both": wrong_both,
    }


def _results() -> dict:
    return {
        "schema_version": 1,
        "name": "two-tasks",
        "seed": 0,
        "method": {},
        "tasks": [
            {"name": "digits", "style": "short", "scorer": "short", "n": 2},
            {"name": "counting", "style": "mcq", "scorer": "mcq", "n": 2},
        ],
        "stages": [
            {"k": 0, "name": "base", "tasks": []},
            {"k": 1, "name": "digits", "tasks": ["digits"]},
            {"k": 2, "name": "counting", "tasks": ["counting"]},
        ],
        "learned": {"digits": 1, "counting": 2},
        "matrix": [[10.0, 25.0], [90.0, None], [30.0, 80.0]],
        "row0": True,
        "stderr": [[1.0, 2.0], [1.5, None], [3.25, 2.0]],
        "n": [[2, 2], [2, None], [2, 2]],
        "verdicts": [
            [_shares(correct=0.1, wrong_content=0.9), _shares(correct=0.25, wrong_content=0.75)],
            [_shares(correct=0.9, wrong_content=0.1), None],
            [
                _shares(correct=0.3, wrong_format=0.4, wrong_content=0.1, wrong_both=0.2),
                _shares(correct=0.8, wrong_content=0.2),
            ],
        ],
        "metrics": {"MFT": 85.0, "MFN": 55.0, "MAA": 72.5, "BWT": -60.0, "forgetting": 60.0, "FWT": None},
        "hashes": {"recipe": "ab" * 32},
        "versions": {"torch": "2.13.0"},
        "seconds": {},
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    results = _results()
    write_json(tmp_path / "results.json", results)
    for task in results["tasks"]:
        folder = tmp_path / "data" / task["name"]
        (folder / "images").mkdir(parents=True)
        Image.new("RGB", (64, 64), (200, 30, 30)).save(folder / "images" / "0.png")
        write_json(folder / "task.json", {"image_root": "."})
        samples = [
            {
                "id": f"{task['name']}-{i}",
                "images": ["images/0.png"],
                "prompt": [{"role": "user", "content": f"{EVIL}?"}],
            }
            for i in range(2)
        ]
        write_jsonl(folder / "test.jsonl", samples)
        for stage in (0, 1, 2):
            rows = [
                {
                    "id": s["id"],
                    "response": EVIL,
                    "references": ["7"],
                    "verdict": "correct" if stage == 1 else "wrong_both",
                }
                for s in samples
            ]
            write_jsonl(tmp_path / "predictions" / f"{stage:02d}" / f"{task['name']}.jsonl", rows)
    return tmp_path


def test_the_summary_says_what_was_forgotten_when_and_how():
    words = " ".join(summary_sentences(_results()))
    assert "85.0" in words and "55.0" in words
    assert "Forgot most: digits, from 90.0 to 30.0; the largest step of it came with stage 2 (counting)" in words
    assert "70 % of the final answers are wrong: 40 % only in form, 10 % only in content, 20 % in both" in words
    assert "foreign answer style" in words


def test_the_summary_does_not_blame_style_when_knowledge_went():
    results = _results()
    results["verdicts"][2][0] = _shares(correct=0.3, wrong_content=0.7)
    words = " ".join(summary_sentences(results))
    assert "knowledge, not style" in words and "foreign answer style" not in words


def test_old_tasks_are_those_learned_before_the_last_stage():
    assert old_task_verdicts(_results()) == _shares(correct=0.3, wrong_format=0.4, wrong_content=0.1, wrong_both=0.2)
    single = _results()
    single["learned"] = {"digits": 2, "counting": 2}
    assert old_task_verdicts(single) is None


def test_nothing_a_model_said_reaches_the_page_as_markup(run):
    page = write_report([run]).read_text()
    assert "<script>document" not in page and "onerror=" not in page.replace("\\u003c", "<").split("<script>")[0]
    answers = json.loads(re.search(r"const runs = (.*);\n", page)[1])
    assert answers[0]["tasks"]["digits"][0]["answers"][0]["response"] == EVIL
    assert not re.search(r'(src|href)="https?:', page), "the page must not need the network"


def test_matrix_cells_show_score_and_error_and_gaps(run):
    page = write_report([run]).read_text()
    assert "30.0<small> ±3.2</small>" in page or "30.0<small> ±3.3</small>" in page
    assert page.count('class="learned"') == 2
    assert ">–</td>" in page


def estimate(value: float) -> dict:
    return {"value": value, "low": value - 1, "high": value + 1}


def with_everything() -> dict:
    """Results of a run in which all that can be asked was asked."""
    parts = {"loss": estimate(60.0), "essential": estimate(12.5), "superficial": estimate(47.5)}
    split = {"n": 2, **parts, "recoverable": 40.0}
    column = [[50.0, None], [80.0, None], [61.0, None]]
    return _results() | {
        "forgetting": {"tasks": {"digits": split}, "mean": split, "left_out": {"captions": "why <not>"}},
        "images": {"true": column, "swapped": [[12.0, None]] * 3, "blank": [[7.0, None]] * 3, "n": [[2, None]] * 3},
        "general": {
            "tasks": [{"name": "facts"}],
            "matrix": [[91.5], [None], [33.0]],
            "mean": [91.5, None, 33.0],
            "f1": [None, None, 41.2],
            "mean_nll": [0.25, None, 3.5],
        },
    }


def test_what_was_asked_beside_the_matrix_is_shown(run, tmp_path):
    write_json(run / "results.json", with_everything())
    page = write_report([run]).read_text()
    assert "12.5 [11.5, 13.5]" in page and "47.5 [46.5, 48.5]" in page and "40.0 %" in page
    assert "not split: why &lt;not&gt;" in page
    assert "91.5" in page and "41.2" in page and "3.50" in page
    assert "61 · 12 · 7" in page
    words = " ".join(summary_sentences(with_everything()))
    assert "they lost 60.0 points: 12.5 are essential" in words and "47.5 are superficial" in words
    assert "foreign answer style" not in words and "knowledge, not style" not in words
    other = tmp_path / "plain"
    write_json(other / "results.json", _results())
    for task in ("digits", "counting"):
        shutil.copytree(run / "data" / task, other / "data" / task)
        shutil.copytree(run / "predictions", other / "predictions", dirs_exist_ok=True)
    assert "12.5 [11.5, 13.5]" in write_report([other, run], tmp_path / "both").read_text()


def test_several_runs_stand_side_by_side(run, tmp_path):
    page = write_report([run, run], tmp_path / "both").read_text()
    assert page.count('<table class="matrix">') == 2
    assert (tmp_path / "both" / "matrix.png").stat().st_size > 5000


def test_a_run_without_results_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"results\.json: no results yet"):
        write_report([tmp_path])


@pytest.mark.system
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Debian's chromium; .ci/run installs it")
def test_the_page_works_in_a_real_browser(run, tmp_path):
    page = write_report([run])
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'chromium'}"]
    dom = subprocess.run(
        ["chromium", *flags, "--virtual-time-budget=2000", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    assert "<title>two-tasks</title>" in dom, "a response ran as a script"
    assert dom.count('class="answer"') == 2, "the browser of answers is not filled in"
    assert "&lt;script&gt;document.title" in dom
