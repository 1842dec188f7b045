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
from mcit.eval.report.answers import choose
from mcit.eval.report.heatmaps import loss_heatmaps
from mcit.eval.report.page import write_report
from mcit.eval.report.words import difference_sentence, headline, old_task_verdicts, sentences

EVIL = '<script>document.title="stolen"</script><img src=x onerror="document.title=\'stolen\'">'


def estimate(value: float) -> dict:
    return {"value": value, "low": value - 1, "high": value + 1}


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


def test_the_headline_says_which_task_was_forgotten_and_when():
    assert headline(_results()) == "Forgot most: digits, from 90.0 to 30.0, mostly after stage 2 (counting)."


@pytest.mark.parametrize(
    "essential, superficial, nature",
    [(5.0, 55.0, "mostly form: ASD is made for that"), (50.0, 10.0, "mostly knowledge"), (30.0, 30.0, "alike")],
)
def test_the_headline_says_whether_it_was_form_or_knowledge(essential, superficial, nature):
    split = {"loss": estimate(60.0), "essential": estimate(essential), "superficial": estimate(superficial)}
    assert nature in headline(_results() | {"forgetting": {"tasks": {"digits": split}}})


def test_nothing_lost_is_said_too():
    kept = _results() | {"matrix": [[10.0, 25.0], [90.0, None], [95.0, 80.0]]}
    assert headline(kept) == "No task lost anything by the last stage."


@pytest.mark.parametrize(
    ("matrix", "words"),
    [
        ([[10.0, 25.0], [None, None], [None, None]], "No task has been learned and scored yet."),
        ([[10.0, 25.0], [90.0, None], [None, 80.0]], "No task has been scored again since it was learned."),
        ([[10.0, 25.0], [90.0, None], [None, None]], "No task has been scored again since it was learned."),
    ],
)
def test_a_run_that_cannot_tell_yet_claims_nothing(matrix, words):
    assert headline(_results() | {"matrix": matrix}) == words


def test_the_words_say_how_the_old_answers_are_wrong():
    words = " ".join(sentences(_results()))
    assert "85.0" in words and "55.0" in words
    assert "70 % of the final answers are wrong: 40 % only in form, 10 % only in content, 20 % in both" in words
    assert "foreign answer style" in words


def test_the_words_do_not_blame_style_when_knowledge_went():
    results = _results()
    results["verdicts"][2][0] = _shares(correct=0.3, wrong_content=0.7)
    words = " ".join(sentences(results))
    assert "knowledge, not style" in words and "foreign answer style" not in words


def test_the_words_name_no_loss_where_nothing_was_lost():
    results = _results() | {"matrix": [[10.0, 25.0], [30.0, None], [30.0, 80.0]]}
    results["verdicts"][2][0] = _shares(correct=0.3, wrong_content=0.7)
    words = " ".join(sentences(results))
    assert "70 % of the final answers are wrong" in words
    assert "lost" not in words and "foreign answer style" not in words


def difference(value: float, low: float, high: float) -> dict:
    return {"difference": value, "low": low, "high": high, "n": 9}


def test_two_runs_are_told_apart_only_where_the_interval_leaves_out_zero():
    apart = {"MFN": difference(-5.7, -8.6, -2.8), "BWT": difference(6.1, 2.4, 10.0)}
    assert difference_sentence("a", "b", apart) == (
        "b ends lower than a (mean score -5.7 [-8.6, -2.8]) and forgets less (change since learned +6.1 [+2.4, +10.0])."
    )
    alike = difference_sentence("a", "b", {"MFN": difference(1.0, -1.0, 3.0), "BWT": difference(-1.0, -3.0, 1.0)})
    assert "cannot be told from" in alike and "no more and no less" in alike
    assert "only single tasks" in difference_sentence("a", "b", {"MFN": None, "BWT": None})


def test_old_tasks_are_those_learned_before_the_last_stage():
    assert old_task_verdicts(_results()) == _shares(correct=0.3, wrong_format=0.4, wrong_content=0.1, wrong_both=0.2)
    single = _results()
    single["learned"] = {"digits": 2, "counting": 2}
    assert old_task_verdicts(single) is None


def test_nothing_a_model_said_reaches_the_page_as_markup(run):
    page = write_report([run]).read_text()
    assert "<script>document" not in page and "onerror=" not in page.replace("\\u003c", "<").split("<script>")[0]
    answers = json.loads(re.search(r"const runs = (.*);\n", page)[1])
    assert answers[0]["tasks"]["digits"]["questions"][0]["answers"]["0"]["text"] == EVIL
    assert not re.search(r'(src|href)="https?:', page), "the page must not need the network"


def test_matrix_cells_show_score_and_error_and_gaps(run):
    page = write_report([run]).read_text()
    assert "30.0<small> ±3.2</small>" in page or "30.0<small> ±3.3</small>" in page
    assert page.count('class="learned"') == 2
    assert ">–</td>" in page


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


def test_where_no_task_can_be_split_the_page_says_why_and_shows_no_empty_map(run):
    nothing = [[None, None]] * 3
    write_json(
        run / "results.json",
        _results()
        | {
            "constrained": {"shown": nothing, "known": nothing},
            "forgetting": {"tasks": {}, "mean": None, "left_out": {"digits": "its answers are no closed set"}},
        },
    )
    page = write_report([run]).read_text()
    assert "not split: its answers are no closed set" in page
    assert "<th>loss</th>" not in page and "Recoverable" not in page
    assert page.count('class="heat"') == 1, "the scores alone"
    assert "Lost since learned" not in (run / "report" / "report.md").read_text()


def test_what_was_asked_beside_the_matrix_is_shown(run, tmp_path):
    write_json(run / "results.json", with_everything())
    page = write_report([run]).read_text()
    assert "12.5 [11.5, 13.5]" in page and "47.5 [46.5, 48.5]" in page and "40.0 %" in page
    assert "not split: why &lt;not&gt;" in page
    assert "91.5" in page and "41.2" in page and "3.50" in page
    assert "61 · 12 · 7" in page
    words = " ".join(sentences(with_everything()))
    assert "they lost 60.0 points: 12.5 are essential" in words and "47.5 are superficial" in words
    assert "foreign answer style" not in words and "knowledge, not style" not in words
    other = tmp_path / "plain"
    write_json(other / "results.json", _results())
    for task in ("digits", "counting"):
        shutil.copytree(run / "data" / task, other / "data" / task)
        shutil.copytree(run / "predictions", other / "predictions", dirs_exist_ok=True)
    assert "12.5 [11.5, 13.5]" in write_report([other, run], tmp_path / "both").read_text()


def test_what_was_lost_is_shown_after_every_stage(run):
    shown, known = [[0.0, 0.0], [90.0, None], [30.0, 80.0]], [[0.0, 0.0], [92.0, None], [80.0, 81.0]]
    results = _results() | {"constrained": {"shown": shown, "known": known}}
    found = {table.title: table for table in loss_heatmaps(results)}
    after_counting = {name: [cell.value for cell in table.rows[2][1]] for name, table in found.items()}
    assert after_counting == {"superficial": [48.0, None], "essential": [12.0, None]}
    assert all(cell.value is None for table in found.values() for row in table.rows[:2] for cell in row[1])
    write_json(run / "results.json", results)
    page = write_report([run]).read_text()
    assert ">48.0</td>" in page and ">12.0</td>" in page


def test_metrics_stand_with_their_intervals(run):
    write_json(run / "results.json", _results() | {"intervals": {"MFN": {"low": 51.2, "high": 58.8}}})
    assert "<td>55.0 [51.2, 58.8]</td>" in write_report([run]).read_text()


def test_several_runs_stand_side_by_side(run, tmp_path):
    compared = {"tasks": {"digits": difference(9.0, 1.0, 17.0)}, "MFN": difference(3.0, 1.0, 5.0), "BWT": None}
    page = write_report([run, run], tmp_path / "both", {1: compared}).read_text()
    assert page.count('<table class="heat">') == 2
    assert f"two-tasks ({run.name})" in page, "runs of one recipe must be told apart"
    assert "ends higher than" in page and "+9.0 [+1.0, +17.0]" in page
    assert (tmp_path / "both" / "matrix.png").stat().st_size > 5000
    assert (tmp_path / "both" / "curves.png").stat().st_size > 5000


def test_every_way_in_which_answers_changed_is_there_to_look_at():
    def rows(verdicts: str) -> dict:
        long = {"c": "correct", "f": "wrong_format", "w": "wrong_content"}
        return {str(place): {"verdict": long[verdict]} for place, verdict in enumerate(verdicts)}

    before, after = rows("cccccccw"), rows("cccccfwc")
    assert choose(before, after, 4) == ["6", "5", "0", "7"], "lost first (content, form), then kept, then gained"
    assert choose(before, after, 99) == ["6", "5", "0", "7", "1", "2", "3", "4"]


def test_the_markdown_says_the_same(run):
    write_json(run / "results.json", with_everything())
    write_report([run])
    text = (run / "report" / "report.md").read_text()
    assert "**Forgot most: digits, from 90.0 to 30.0" in text
    assert "| 1 digits | **90.0** ±1.5 | – |" in text
    assert "| MFN | 55.0 | mean score after the last stage |" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in tables), "a row of a table broke off"
    assert "<" not in text, "nothing that a model said belongs into a model card"


def test_a_page_is_made_without_the_pictures_that_are_gone(run):
    (run / "data" / "digits" / "images" / "0.png").unlink()
    (run / "data" / "counting" / "images" / "0.png").write_bytes(b"no picture any more")
    answers = json.loads(re.search(r"const runs = (.*);\n", write_report([run]).read_text())[1])
    shown = [question["images"] for task in answers[0]["tasks"].values() for question in task["questions"]]
    assert len(shown) == 4 and all(images[0].startswith("data:image/svg+xml") for images in shown)


def test_a_copy_without_its_data_says_how_to_have_them(run):
    shutil.move(run / "data" / "digits", run / "elsewhere")
    (run / "data" / "digits").symlink_to(run / "cache-of-another-machine")
    with pytest.raises(InputError, match=r"data/digits: is not there\. Is the run a copy.*mcit prepare"):
        write_report([run])


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
    assert "2 of 2" in dom and "when learned, 1 digits" in dom
    assert "&lt;script&gt;document.title" in dom
