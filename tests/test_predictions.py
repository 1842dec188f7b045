"""Predictions made elsewhere: `mcit score`, every line of a file, whole or not at all."""

import json
import statistics

import pytest
from typer.testing import CliRunner

from mcit.data_prep.errors import InputError
from mcit.eval.predictions import score_file
from mcit.eval.scorers import SCORERS, get_scorer
from mcit.eval.scoring import score_response
from mcit.pipeline.cli import app

OPTIONS = ["two", "three", "four"]


def write(tmp_path, *rows):
    path = tmp_path / "predictions.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows), encoding="utf-8")
    return path


def prediction(id_, response, *references, **more):
    return {"id": id_, "response": response, "references": list(references), **more}


def test_score_file_reads_content_where_no_form_was_asked_for(tmp_path):
    path = write(
        tmp_path,
        prediction("1", "The answer is 3. (see Figure 2)", "3"),
        "",
        prediction("2", "<think>3?</think><answer>4</answer>", "4"),
        prediction(3, "", "5"),
        prediction("4", "5", "7", "6"),
    )
    result = score_file("number", path)
    assert result == {
        "kind": "number",
        "score": 50,
        "n": 4,
        "stderr": pytest.approx(statistics.stdev([100, 100, 0, 0]) / 2),
    }


@pytest.mark.parametrize(
    ("kind", "response", "reference", "expected"),
    [
        ("mcq", "<answer>C</answer>", "A", 0),
        ("mcq", "answer c answer", "A", 0),
        ("mcq", "The answer is (A).", "A", 100),
        ("mcq", "three", "B", 100),
        ("yes_no", "Yes, it is.", "yes", 100),
        ("short", "The digit is 7.", "7", 100),
        ("short", "", "cat", 0),
        ("vqa_soft", "It's a cat.", "cat", 100),
        ("anls", "Pariz", "Paris", 80),
        ("relaxed", "42%", "41", 100),
        ("math", "Therefore $x = \\frac{1}{2}$.", "0.5", 100),
        ("latex", "The formula is $x^{2}$.", "x^2", 100),
        ("rouge_l", "a dog", "a dog", 100),
        ("label", "The stance is hawkish.", "hawkish", 100),
        ("bleu", "a dog runs fast", "a dog runs fast", 100),
        ("meteor", "a dog", "a dog", 100 * (1 - 0.5 / 8)),
        ("cider", "a dog", "a dog", 50),  # two of four orders
        ("caption", "a dog", "a dog", (100 + 93.75 + 100 + 50) / 4),
        ("bbox", "It is at [0.12, 0.33, 0.55, 0.97].", "[0.12, 0.33, 0.55, 0.97]", 100),
        ("iou", "[0, 0, 1, 0.5]", "[0, 0, 1, 1]", 50),
    ],
)
def test_score_file_of_every_kind(tmp_path, kind, response, reference, expected):
    path = write(tmp_path, prediction("1", response, reference, options=OPTIONS if kind == "mcq" else None))
    assert score_file(kind, path)["score"] == pytest.approx(expected)
    assert score_file(kind, path)["stderr"] is None


def test_score_file_is_strict_where_a_form_was_asked_for(tmp_path):
    path = write(
        tmp_path,
        prediction("1", "3", "3", style="number", image_id="a"),
        prediction("2", "It is 3.", "3", style="number", image_id="a", extra=[1]),
        prediction("3", "<think>x</think><answer>3</answer>", "3", style="number", reasoning="think", image_id="b"),
        prediction("4", "3", "3", style="number", finished=False, image_id="b"),
    )
    out = tmp_path / "scored" / "out.jsonl"
    result = score_file("number", path, per_sample=out)
    assert (result["score"], result["n"], result["stderr"]) == (50, 4, 0)
    assert result["verdicts"] == {"correct": 0.5, "wrong_content": 0, "wrong_format": 0.5, "wrong_both": 0}
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["score"] for r in rows] == [100, 0, 100, 0]
    assert [r["verdict"] for r in rows] == ["correct", "wrong_format", "correct", "wrong_format"]
    assert rows[1]["extra"] == [1] and rows[1]["parsed"] == "3" and rows[1]["response"] == "It is 3."


def test_score_file_with_a_users_function(tmp_path, monkeypatch):
    (tmp_path / "own_score_file.py").write_text("def grade(response, references, sample): return sample['weight']\n")
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, prediction("1", "x", "y", weight=7), prediction("2", "x", "y", weight=9))
    assert score_file("own_score_file:grade", path)["score"] == 8
    with pytest.raises(InputError, match="sample 2: returned 900"):
        score_file("own_score_file:grade", write(tmp_path, prediction("2", "x", "y", weight=900)))


def test_line_separators_inside_a_response_do_not_end_the_line(tmp_path):
    text = json.dumps(prediction("1", "a\u2028b\x85c", "a b c"), ensure_ascii=False)
    assert score_file("short", write(tmp_path, text))["score"] == 100


GOOD = prediction("1", "x", "x")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", r":3:2: malformed JSON"),
        ("[1]", r":3: "),
        ({"id": "2", "references": ["x"]}, r":3: response: "),
        ({"id": "2", "response": None, "references": ["x"]}, r":3: response: "),
        ({"id": "2", "response": "x"}, r":3: references: "),
        (prediction("2", "x"), r":3: references: "),
        (prediction("2", "x", 3), r":3: references.0: "),
        ({"id": "2", "response": "x", "references": "x"}, r":3: references: "),
        ({"response": "x", "references": ["x"]}, r":3: id"),
        (prediction("1", "y", "y"), r":3: id: .*predictions.jsonl:1"),
        (prediction(1, "y", "y"), r":3: id: "),
        (prediction("2", "x", "x", style="mqc"), r":3: style: "),
        (prediction("2", "x", "x", options="AB"), r":3: options: "),
        (prediction("2", "x", "x", finished="yes"), r":3: finished: "),
    ],
)
def test_a_bad_line_is_named(tmp_path, bad, message):
    path = write(tmp_path, GOOD, "", bad)
    out = tmp_path / "out.jsonl"
    with pytest.raises(InputError, match=message) as error:
        score_file("short", path, per_sample=out)
    assert "\n" not in str(error.value)
    assert not out.exists()


def test_files_that_cannot_be_scored(tmp_path):
    for content in ("", "\n \n"):
        with pytest.raises(InputError, match="no predictions"):
            score_file("short", write(tmp_path, content))
    with pytest.raises(InputError, match="no such file"):
        score_file("short", tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="unknown scorer"):
        score_file("shrt", write(tmp_path, GOOD))


@pytest.mark.parametrize(
    ("style", "reference", "response"),
    [
        ("short", "7", "7"),
        ("short", "7", "The digit is 7."),
        ("mcq", "B", "three"),
        ("number", "1000", "1,000"),
        ("brief", "A dog runs.", "A dog."),
    ],
)
@pytest.mark.parametrize("kind", ["short", "rouge_l", "coin:vizwiz"])
def test_a_run_and_a_file_give_the_same_score(tmp_path, kind, style, reference, response):
    line = prediction("1", response, reference, style=style, options=OPTIONS if style == "mcq" else None)
    sample = {**line, "reasoning": "none", "meta": {"options": line["options"]}}
    expected = score_response(sample, response, get_scorer(kind))["score"]
    assert score_file(kind, write(tmp_path, line))["score"] == expected


# --- Protocols ------------------------------------------------------------------------------------------------------


def test_a_protocol_stands_beside_the_kind(tmp_path):
    path, out = (
        write(tmp_path, *(prediction(i, text, "tabby cat") for i, text in enumerate(("", "Tabby cat", "cat")))),
        tmp_path / "o",
    )
    result = score_file("short", path, protocol="coin:imagenet", per_sample=out)
    assert result == {
        "kind": "short",
        "protocol": "coin:imagenet",
        "score": pytest.approx(200 / 3),  # empty and "cat"; "Tabby cat" has another case
        "n": 3,
        "stderr": pytest.approx(statistics.stdev([100, 0, 100]) / 3**0.5),
        "kind_score": pytest.approx(100 / 3),
    }
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["score"], row["kind_score"]) for row in rows] == [(100, 0), (0, 100), (100, 0)]


def test_a_protocol_scores_whatever_the_form(tmp_path):
    lines = [
        prediction("1", "It is <b>no</b>, unknown.", "no", style="yes_no"),
        prediction("2", "yes", "no", style="yes_no"),
    ]
    result = score_file("yes_no", write(tmp_path, *lines), protocol="mcitlib:med")
    assert (result["score"], result["kind_score"]) == (50, 0)
    assert result["verdicts"] == {"correct": 0, "wrong_content": 0.5, "wrong_format": 0.5, "wrong_both": 0}


def test_a_score_that_is_no_mean_is_that_of_the_whole_file(tmp_path):
    lines = [
        prediction("1", "the cat sat on the mat", "the cat sat on the mat"),
        prediction("2", "a dog", "a dog runs"),
    ]
    result = score_file("bleu", write(tmp_path, *lines))
    assert result["score"] == pytest.approx(
        SCORERS["bleu"].pooled([line["response"] for line in lines], [line["references"] for line in lines])
    )
    assert result["stderr"] is None


def test_cider_is_weighed_by_the_whole_file(tmp_path):
    references = [["a dog runs on grass"], ["a cat sits on a mat"], ["a man sits on grass"]]
    answers = ["the dog on grass", "a cat", "a man on a mat"]
    rows = zip(answers, references, strict=True)
    lines = [prediction(i, answer, *captions) for i, (answer, captions) in enumerate(rows)]
    out = tmp_path / "out"
    score_file("cider", write(tmp_path, *lines), per_sample=out)
    scorer = SCORERS["cider"].for_corpus(references)
    assert [json.loads(line)["score"] for line in out.read_text().splitlines()] == pytest.approx(
        [scorer.score(answer, captions, {}) for answer, captions in zip(answers, references, strict=True)]
    )
    assert scorer.score(answers[0], references[0], {}) != pytest.approx(
        SCORERS["cider"].score(answers[0], references[0], {})
    )


# --- Against a test set ---------------------------------------------------------------------------------------------


@pytest.fixture
def test_part(tmp_path):
    rows = [
        {"id": "a", "references": ["B"], "style": "mcq", "reasoning": "none", "meta": {"options": OPTIONS}},
        {
            "id": "7",
            "references": ["A"],
            "style": "mcq",
            "reasoning": "none",
            "meta": {"options": OPTIONS, "image_id": "x"},
        },
    ]
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_test_set_says_what_the_lines_need_not(tmp_path, test_part):
    path = write(tmp_path, {"id": "a", "response": "three", "references": ["forged"]}, {"id": 7, "response": "a"})
    result = score_file("mcq", path, samples=test_part)
    assert (result["score"], result["n"]) == (50, 2)
    assert result["verdicts"]["wrong_format"] == 0.5


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"id": "a", "response": "B"}], r"1 of 2 samples have no prediction, the first is '7'"),
        ([{"id": "a", "response": "B"}, {"id": "c", "response": "B"}], r":2: id: 'c' is not among the samples"),
        ([{"id": "a", "response": "B"}, {"response": "B"}], r":2: id: None is not among the samples"),
        ([{"id": "a", "response": "B"}, {"id": "a", "response": "B"}], r":2: id: 'a' stands in .*:1 too"),
    ],
)
def test_missing_foreign_and_doubled_answers_are_named(tmp_path, test_part, lines, message):
    with pytest.raises(InputError, match=message):
        score_file("mcq", write(tmp_path, *lines), samples=test_part)


def test_a_test_set_that_is_none(tmp_path, test_part):
    path = write(tmp_path, {"id": "a", "response": "B"})
    with pytest.raises(InputError, match="no such file"):
        score_file("mcq", path, samples=tmp_path / "none.jsonl")
    with pytest.raises(InputError, match=r":1: is no sample.*test\.jsonl"):
        score_file("mcq", path, samples=path)


# --- What else can be wrong -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        '{"id": "2", "response": "x", "references": ["x"], "weight": NaN}',
        '{"id": "2", "response": "x", "references": ["x"], "deep": [{"er": Infinity}]}',
        '{"id": "2", "response": "\\ud800", "references": ["x"]}',
    ],
)
def test_what_cannot_be_written_again_is_refused(tmp_path, line):
    with pytest.raises(InputError, match=r":2: cannot be written again"):
        score_file("short", write(tmp_path, GOOD, line))


def test_a_place_that_cannot_be_written(tmp_path):
    with pytest.raises(InputError, match="cannot be written: Is a directory"):
        score_file("short", write(tmp_path, GOOD), per_sample=tmp_path)


@pytest.mark.parametrize(
    ("protocol", "message"),
    [
        ("coin:imagnet", "Did you mean coin:imagenet"),
        ("coin:ImageNet", "Did you mean coin:imagenet"),
        ("coin", "Known: coin:scienceqa, coin:textvqa"),
        ("nonsense", "Known: coin:<task>, sefe:<task>"),
    ],
)
def test_an_unknown_protocol_names_the_nearest(tmp_path, protocol, message):
    with pytest.raises(InputError, match=message):
        score_file("short", write(tmp_path, GOOD), protocol=protocol)


@pytest.mark.parametrize("kind", SCORERS)
def test_ten_megabytes_are_scored(tmp_path, kind):
    path = write(tmp_path, prediction("1", "a dog, 1 2 3. " * 700_000, "a short [1, 2, 3, 4] reference"))
    assert score_file(kind, path)["score"] < 50


@pytest.mark.parametrize("more", [{}, {"style": "short"}, {"style": "caption"}])
def test_of_a_flood_only_the_ends_reach_a_scorer(tmp_path, monkeypatch, more):
    (tmp_path / "own_flood.py").write_text("def grade(response, references, sample): return len(response) < 100_010\n")
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, prediction("1", "x" * 10_000_000, "y", **more))
    assert score_file("own_flood:grade", path, per_sample=tmp_path / "out")["n"] == 1
    row = json.loads((tmp_path / "out").read_text())
    assert len(row["parsed"]) < 100_010 and len(row["response"]) == 10_000_000


def test_the_command(tmp_path):
    path = write(tmp_path, prediction("1", "", "cat"))
    result = CliRunner().invoke(app, ["score", "short", str(path), "--protocol", "coin:imagenet"])
    assert json.loads(result.stdout) == {
        "kind": "short",
        "score": 100,
        "n": 1,
        "stderr": None,
        "protocol": "coin:imagenet",
        "kind_score": 0,
    }
