"""ASD by a model: what of its replies is accepted, who is asked what, and that a file comes out whole."""

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from canned import COLOURS, Reply, completion, failure, good, keys_of, serve, words_of
from PIL import Image
from test_asd import box_task, dialogue, mcq_task, number_task, sample, short_task, yes_no_task

from mcit.data_prep.asd import conversion
from mcit.data_prep.asd.acceptance import accept_explanation, accept_wrong, read_reply
from mcit.data_prep.asd.llm import Llm
from mcit.data_prep.asd.prompts import VERSION
from mcit.data_prep.asd.report import make_report
from mcit.data_prep.asd.turns import Turn, Unreachable, take_apart
from mcit.data_prep.endpoint import Endpoint, Picture
from mcit.data_prep.errors import InputError
from mcit.data_prep.files import read_json, read_jsonl
from mcit.data_prep.prepare import prepare_task, read_samples, read_task
from mcit.data_prep.schema import AsdConfig, PrepareConfig, Sample, Style, TaskConfig
from mcit.data_prep.styles import FORMAT, fits, split_prompt
from mcit.pipeline.data_tools.convert import asd_settings, validate
from mcit.pipeline.recipe.loading import load_recipe


class Anything(dict):
    """One picture under every name."""

    def __missing__(self, name: str) -> Picture:
        return self["*"]


@pytest.fixture
def pictures(tmp_path: Path) -> Anything:
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    return Anything({"*": Picture(tmp_path / "x.png", "0")})


@pytest.fixture
def convert(tmp_path: Path, pictures: Anything) -> Any:
    """Convert with a canned server: (samples, fraction, reply, …) → (converted, report, requests)."""

    def run(
        samples: list[Sample], fraction: float, answer: Any = good, seed: int = 0, cache: str = "cache"
    ) -> tuple[list[Sample], dict[str, Any], list[dict[str, Any]]]:
        with serve(answer) as server:
            asd = AsdConfig(fraction=fraction, converter="llm", endpoint=server.address, model="m", retries=1)
            endpoint = Endpoint(asd, tmp_path / cache / "asd", VERSION, lambda line: None)
            done = conversion.convert(samples, fraction, seed, Llm(endpoint, pictures))
            return list(done.after()), make_report(done, asd, seed), server.asked

    return run


def turn(answer: str, style: Style = "short", references: list[str] | None = None, **meta: Any) -> Turn:
    native = sample(0, "What is it?", answer, style, meta=meta)
    native["references"] = references or native["references"]
    return take_apart(native, ())[-1]


# --- What is accepted -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"a": "x", "b": " y  z "}', ["x", "y z"]),
        ('```json\n{"a": "x", "b": "y"}\n```', ["x", "y"]),
        ("Certainly!", "the reply is not the JSON asked for"),
        ("", "the reply is empty"),
        ('{"a": "x"}', "the reply is not the JSON asked for"),
        ('{"a": "x", "b": 3}', "the reply is not the JSON asked for"),
        ('{"a": "x", "b": ', "the reply is not the JSON asked for"),
        ('{"a": "x", "b": " "}', "the reply is empty"),
        ("I'm sorry, I can't help with that.", "the model refused"),
        ('{"a": "I cannot see an image", "b": "y"}', "the model refused"),
        ('{"a": "red</think><answer>", "b": "y"}', "the reply holds markup"),
        ('{"a": "red<|im_end|>", "b": "y"}', "the reply holds markup"),
    ],
)
def test_replies(text: str, found: list[str] | str) -> None:
    if isinstance(found, list):
        assert read_reply(text, ["a", "b"]) == found
        return
    with pytest.raises(Unreachable, match=found):
        read_reply(text, ["a", "b"])


@pytest.mark.parametrize(
    ("of", "texts", "found"),
    [
        (turn("cat"), ["Dog", '"fish"', "bird"], ["dog", "fish", "bird"]),
        (turn("Paris"), ["london", "Rome", "Oslo"], ["London", "Rome", "Oslo"]),
        (turn("NATO"), ["EU", "UN", "WHO"], ["EU", "UN", "WHO"]),
        (turn("cat"), ["the cats", "dog", "fish"], "means the same as the right one"),
        (turn("cat", references=["cat", "kitten"]), ["dog", "Kittens", "fish"], "means the same as the right one"),
        (turn("cat"), ["black cat", "dog", "fish"], "means the same as the right one"),
        (turn("cat"), ["dog", "Dogs", "fish"], "two wrong answers mean the same"),
        (turn("cat"), ["...", "dog", "fish"], "the reply is empty"),
        (turn("cat"), ["12", "dog", "fish"], "another form"),
        (turn("cat"), ["A dog is lying on the sofa.", "dog", "fish"], "another form"),
        (turn("cat"), ["very large grey african elephant with tusks", "dog", "fish"], "another form"),
        (turn("cat"), ["B. dog", "fish", "bird"], "another form"),
        (turn(r"x^2", "latex"), [r"x^3", r"x^{22}", r"y^2"], [r"x^3", r"x^{22}", r"y^2"]),
        (
            turn("A dog runs on grass.", "caption"),
            ["a man sits on a bench", "Two birds fly over water.", "A boat lies at a pier"],
            ["A man sits on a bench.", "Two birds fly over water.", "A boat lies at a pier."],
        ),
        (turn("A dog runs on grass.", "caption"), ["bird"], "another form"),
    ],
)
def test_wrong_answers(of: Turn, texts: list[str], found: list[str] | str) -> None:
    if isinstance(found, list):
        assert accept_wrong(texts, of) == found
        return
    with pytest.raises(Unreachable, match=found):
        accept_wrong(texts, of)


WHY = "because one can see it clearly in the middle of the picture, next to the door"
LONG = (
    f"{WHY}, where the light falls on it from the left. Nothing covers it, and nothing else in the scene looks like it"
)


@pytest.mark.parametrize(
    ("of", "style", "text", "problem"),
    [
        (turn("red"), "brief", f"The thing is red {WHY}.", None),
        (turn("red"), "detailed", f"The thing is red {LONG}.", None),
        (turn("red"), "brief", f"The thing is red {LONG}.", "too long|not one sentence"),
        (turn("red"), "detailed", f"The thing is red {WHY}.", "too short"),
        (turn("red"), "brief", "It is red.", "too short"),
        (turn("red"), "brief", f"It is red. One knows it {WHY}.", "not one sentence"),
        (turn("red"), "brief", f"The thing is blue {WHY}.", "does not say the answer"),
        (turn("red"), "brief", f"The thing is not red {WHY}.", "contradicts the answer"),
        (turn("red"), "brief", f"The thing is blue rather than red {WHY}.", "contradicts the answer"),
        (turn("red"), "brief", f"The given answer is red {WHY}.", "speaks of the answer it was given"),
        (turn("red", references=["red", "crimson"]), "brief", f"The thing is crimson {WHY}.", None),
        (turn("2 dogs"), "brief", f"There are two dogs {WHY}.", None),
        (turn("12", "number"), "brief", f"There are 12 of them {WHY}.", None),
        (turn("12", "number"), "brief", f"There are 120 of them {WHY}.", "does not say the answer"),
        (turn("Yes", "yes_no"), "brief", f"Yes, it is even {WHY}.", None),
        (turn("Yes", "yes_no"), "brief", f"No, it is not even {WHY}.", "contradicts the answer"),
        (turn("Yes", "yes_no"), "brief", f"It is even {WHY}.", "does not say the answer"),
        (turn("[0.1, 0.2, 0.3, 0.4]", "bbox"), "brief", f"It is at [0.1,0.2,0.3,0.4] {WHY}.", None),
        (turn("[0.1, 0.2, 0.3, 0.4]", "bbox"), "brief", f"It is at [0.1, 0.2, 0.3, 0.5] {WHY}.", "does not say"),
        (turn("B", "mcq", options=["red", "blue"]), "brief", f"The thing is blue {WHY}.", None),
        (turn("B", "mcq", options=["red", "blue"]), "brief", f"The answer is B {WHY}.", "does not say the answer"),
        (
            turn("A", "mcq", options=["The plant needs more light to grow.", "It needs water."]),
            "brief",
            "The plant needs more light in order to grow, as its pale leaves beside the dark wall show.",
            None,
        ),
        (turn("A dog runs over a hill.", "caption"), "detailed", f"A dog runs over a green hill {LONG}.", None),
        (turn("A dog runs over a hill.", "caption"), "detailed", f"A ship lies at anchor {LONG}.", "does not say"),
    ],
)  # fmt: skip
def test_explanations(of: Turn, style: Style, text: str, problem: str | None) -> None:
    if problem is None:
        assert accept_explanation(text, of, style) == text
        return
    with pytest.raises(Unreachable, match=problem):
        accept_explanation(text, of, style)


# --- Who is asked what ------------------------------------------------------------------------------------------------


def test_four_equal_parts_balanced_and_valid(convert: Any) -> None:
    samples = short_task(400)
    converted, report, asked = convert(samples, 0.2)
    assert [s["id"] for s in converted] == [s["id"] for s in samples]
    new = [s for s in converted if "asd" in s["meta"]]
    assert Counter(s["style"] for s in new) == {"yes_no": 20, "mcq": 20, "brief": 20, "detailed": 20}
    assert report["letters"] == {"A": 5, "B": 5, "C": 5, "D": 5} and report["yes_no"] == {"No": 10, "Yes": 10}
    assert report["within_half_a_point"] and report["reached"] == 0.2
    assert report["usage"] == {"questions": 80, "prompt_tokens": 8000, "completion_tokens": 800} and len(asked) == 80
    assert validate(new) == {"checked": 80, "failed": {}}
    for s in new:
        native = samples[int(s["id"][1:])]
        assert s["meta"]["asd"] == {
            "style": s["style"],
            "original_id": native["id"],
            "native_style": "short",
            "how": s["meta"]["asd"]["how"],
            "converter": "llm",
            "model": "m",
            "prompts": 1,
        }
        text, answer, truth = s["prompt"][0]["content"], s["completion"][0]["content"], native["references"][0]
        assert text.endswith(FORMAT[s["style"]]) and sum(text.count(sentence) for sentence in FORMAT.values()) == 1
        assert s["references"] == [answer] and fits(s["style"], answer, options=s["meta"].get("options"))
        if s["style"] == "mcq":
            assert split_prompt(text)[1] == s["meta"]["options"]
            assert s["meta"]["options"]["ABCD".index(answer)] == truth and len(set(s["meta"]["options"])) == 4
        elif s["style"] == "yes_no":
            candidate = re.search(r'Is "(.*)" the right answer\?', text).group(1)
            assert (candidate == truth) == (answer == "Yes")
        else:
            assert truth in answer
    assert all(len(rows) == 10 for rows in report["examples"].values()) and len(report["examples"]) == 4


@pytest.mark.parametrize(
    ("task", "asked_for"),
    [
        (number_task, {"brief", "detailed"}),
        (yes_no_task, {"brief", "detailed"}),
        (box_task, {"brief", "detailed"}),
        (mcq_task, {"brief", "detailed"}),
        (partial(short_task), {"brief", "detailed", "mcq", "yes_no"}),
    ],
)
def test_the_model_is_asked_only_what_rules_cannot_do_as_well(convert: Any, task: Any, asked_for: set[str]) -> None:
    def truthful(body: dict[str, Any]) -> Reply:
        """Begins with what it is to say, so that yes, no and boxes are said too."""
        reply = good(body)
        answer = re.findall(r"^Correct answer: (.*)$", words_of(body), re.MULTILINE)[-1]
        text = json.loads(json.loads(reply.body)["choices"][0]["message"]["content"]).get("explanation")
        return completion(json.dumps({"explanation": f"{answer}, {text}"})) if text else reply

    converted, report, asked = convert(task(200), 0.4, truthful)
    assert report["converted"] == 80 and {report["styles"][s]["converted"] for s in report["styles"]} == {20}
    kinds = Counter(len(keys_of(body)) + (keys_of(body) == ["explanation"]) * 10 for body in asked)
    assert sum(kinds.values()) == 20 * len(asked_for) and kinds[11] == 40
    assert validate(s for s in converted if "asd" in s["meta"])["failed"] == {}


def test_explanations_keep_the_options_and_the_question_shows_the_context(convert: Any) -> None:
    converted, _, asked = convert(mcq_task(40), 1.0)
    for s in converted:
        if s["style"] in ("brief", "detailed"):
            assert split_prompt(s["prompt"][0]["content"])[1] == s["meta"]["options"]
    assert all(words_of(body).count("\n- ") == 4 for body in asked)
    samples = [
        dialogue(i, [(f"What is thing {i}?", "a cup"), ("What colour is it?", COLOURS[i % 6])]) for i in range(20)
    ]
    converted, report, asked = convert(samples, 0.5)
    assert report["converted"] == 10 and report["turns"]["converted"] > 10
    second = next(words_of(body) for body in asked if "Question: What colour is it?" in words_of(body))
    assert re.search(r"Earlier question: What is thing \d+\?\nIts answer: a cup\n", second)
    assert asked[0]["messages"][1]["content"][0]["type"] == "image_url"


def test_free_text_tasks_get_choices_and_longer_answers(convert: Any) -> None:
    caption = "A brown dog runs over a green hill."
    samples = [sample(i, f"What does picture {i} show?", caption, "caption") for i in range(40)]

    def writer(body: dict[str, Any]) -> Reply:
        if keys_of(body) == ["explanation"]:
            return completion(json.dumps({"explanation": f"{caption} The sky is clear. {LONG}."}))
        wrong = ["A ship lies at the pier.", "Two birds fly over a lake.", "A man reads in his chair."]
        return completion(json.dumps(dict(zip(keys_of(body), wrong, strict=False))))

    converted, report, _ = convert(samples, 0.3, writer)
    assert Counter(s["style"] for s in converted if "asd" in s["meta"]) == {"yes_no": 4, "mcq": 4, "detailed": 4}
    assert report["styles"]["short"]["skipped"] == {"the answer is free text": 40}
    assert report["summary"].endswith("; not reachable by llm: short")


# --- Replies that are no use ------------------------------------------------------------------------------------------


def test_what_falls_back_is_counted_and_made_up_for(convert: Any) -> None:
    """A model that fails on every third thing: others take their place, until the share is reached."""

    def careless(body: dict[str, Any]) -> Reply:
        number = int(re.findall(r"thing (\d+)", words_of(body))[-1])
        answer = re.findall(r"^Correct answer: (.*)$", words_of(body), re.MULTILINE)[-1]
        bad = [completion("no"), completion(json.dumps(dict.fromkeys(keys_of(body), answer))), failure(400, "too long")]
        return bad[number // 3 % 3] if number % 3 == 0 else good(body)

    converted, report, asked = convert(short_task(400), 0.2, careless)
    assert report["converted"] == 80 and report["within_half_a_point"]
    assert {report["styles"][style]["converted"] for style in ("yes_no", "mcq", "brief", "detailed")} == {20}
    reasons = sum((Counter(found["fell_back"]) for found in report["styles"].values()), Counter())
    assert set(reasons) == {
        "the reply is not the JSON asked for",
        "a wrong answer means the same as the right one",
        "the explanation is too short",
        "the endpoint did not take the question",
    }
    assert report["usage"]["first_not_taken"] == "400: too long"
    assert len(asked) == 80 + reasons.total() and f"{reasons.total()} fell back, most often: " in report["summary"]
    assert all(int(s["id"][1:]) % 3 for s in converted if "asd" in s["meta"])


def test_a_model_that_is_rarely_right_is_given_up_in_time(convert: Any) -> None:
    """One reply in ten is right: three failures for each sample wanted, then the share is what it is."""

    def poor(body: dict[str, Any]) -> Reply:
        number = int(re.findall(r"thing (\d+)", words_of(body))[-1])
        return completion("?") if number % 10 else good(body)

    _, report, asked = convert(short_task(1000), 0.04, poor)
    assert 0 < report["converted"] < 40 and "fewer than asked" in report["summary"]
    assert len(asked) <= 4 * 40 + 4 * 40
    for found in report["styles"].values():
        assert sum(found["fell_back"].values()) <= 4 * 40


def test_a_style_that_the_model_cannot_do_is_given_up_and_its_part_goes_to_the_others(convert: Any) -> None:
    def no_writer(body: dict[str, Any]) -> Reply:
        return completion('{"explanation": "red"}') if keys_of(body) == ["explanation"] else good(body)

    _, report, asked = convert(short_task(400), 0.2, no_writer)
    assert report["converted"] == 80 and report["within_half_a_point"]
    assert {style: found["converted"] for style, found in report["styles"].items()} == {
        "yes_no": 40,
        "mcq": 40,
        "brief": 0,
        "detailed": 0,
    }
    assert report["styles"]["brief"]["rounds"] == 1 and len(asked) == 80 + 40
    converted, report, asked = convert(short_task(100), 0.2, lambda body: completion("?"), cache="other")
    assert converted == short_task(100) and len(asked) == 20
    assert report["summary"].startswith("0 of 100") and report["summary"].endswith("20 fewer than asked")
    assert not report["within_half_a_point"]
    assert report["why_not"][:2] == [f"{style}: the reply is not the JSON asked for (5)" for style in ("yes_no", "mcq")]


def test_the_result_depends_neither_on_who_answers_first_nor_on_the_order(convert: Any) -> None:
    rng = random.Random(0)

    def dawdling(body: dict[str, Any]) -> Reply:
        time.sleep(rng.random() / 50)
        return good(body)

    samples = short_task(100)
    first = convert(samples, 0.5, dawdling)
    assert convert(samples, 0.5, dawdling, cache="second")[:2] == first[:2]
    shuffled = random.Random(0).sample(samples, len(samples))
    again = convert(shuffled, 0.5)
    assert {s["id"]: s for s in again[0]} == {s["id"]: s for s in first[0]} and again[2] == []
    other = convert(samples, 0.5, seed=1)
    assert other[0] != first[0] and 0 < len(other[2]) < 50  # what both seeds ask is asked once


# --- Files, recipes and the command line ------------------------------------------------------------------------------


def write_data(folder: Path, count: int = 40) -> None:
    (folder / "img").mkdir(parents=True)
    rows = []
    for i in range(count):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / "img" / f"{i}.png")
        turns = [{"from": "human", "value": f"<image>\nWhat colour is thing {i}?"}]
        turns.append({"from": "gpt", "value": COLOURS[i % 6]})
        rows.append({"id": f"s{i}", "image": f"{i}.png", "conversations": turns})
    (folder / "train.json").write_text(json.dumps(rows))


def test_a_task_of_a_recipe(tmp_path: Path) -> None:
    write_data(tmp_path)
    task = TaskConfig(name="t", train="train.json", test="train.json", images="img")
    with serve() as server:

        def prepare(**settings: Any) -> Path:
            asd = AsdConfig(fraction=0.5, converter="llm", endpoint=server.address, **{"model": "m", **settings})
            return prepare_task(
                task, PrepareConfig(), seed=0, asd=asd, base_dir=tmp_path, cache=tmp_path / "cache", show=lines.append
            )

        lines: list[str] = []
        folder = prepare()
        assert len(server.asked) == 20 and lines[-1].startswith("20 of 20 answers")
        assert prepare(concurrency=2) == folder and len(server.asked) == 20
        assert prepare(model="other") != folder and len(server.asked) == 40
    samples = read_samples(folder, "train")
    assert sum("asd" in s["meta"] for s in samples) == 20 == read_json(folder / "asd_report.json")["converted"]
    assert read_task(folder)["notes"][-1].startswith("ASD: 20 of 40 samples converted (50.0 %)")
    with pytest.raises(InputError, match="cannot be reached"):
        prepare(model="third")
    assert not list((tmp_path / "cache" / "data").glob(".building*"))


def test_validation_finds_a_wrong_form_and_a_wrong_answer() -> None:
    right = sample(0, "What is it?", "cat", "short")
    wrong: Sample = {**sample(1, "What is it?", "cat", "short"), "references": ["dog"]}
    other: Sample = {**sample(2, "Is it?", "Perhaps", "yes_no"), "references": ["Yes"]}
    assert validate([right, wrong, other]) == {
        "checked": 3,
        "failed": {"s1": "wrong_content, 0.0", "s2": "wrong_both, 0.0"},
    }


def test_a_recipe_says_who_converts(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    text = "name: x\nbase_model: {path: .}\nstream: [{name: a, train: a.json}]\nmethod: {sefe: {asd: %s}}\n"
    recipe.write_text(text % "{converter: llm, endpoint: 'http://localhost:8000/v1', model: big}")
    asd = load_recipe(recipe).asd
    assert asd is not None and (asd.fraction, asd.model) == (0.2, "big")
    assert asd.identity() == {"fraction": 0.2, "converter": "llm", "model": "big", "request": {}}
    for settings, problem in {
        "{converter: llm}": "the converter llm needs `endpoint`",
        "{converter: llm, endpoint: 'http://h/v1'}": "the converter llm needs `model`",
        "{endpoint: 'http://h/v1'}": "the converter rules takes no `endpoint`",
        "{converter: llm, model: m, endpoint: 'localhost:8000'}": "`endpoint` is an address such as",
        "{converter: llm, model: m, endpoint: 'http://me:secret@h/v1'}": "without a key",
        "{converter: llm, model: m, api_key: secret}": "Extra inputs are not permitted",
    }.items():
        recipe.write_text(text % settings)
        with pytest.raises(InputError, match=f"method.asd.*{problem}") as caught:
            load_recipe(recipe)
        assert "secret" not in str(caught.value)
    for option, value, problem in (
        ("fraction", 2, "--fraction: Input should be less than or equal to 1"),
        ("timeout", 0, "--timeout: Input should be greater than 0"),
        ("request", [1], "--request: Input should be a valid dictionary"),
        ("model", "m", "the converter rules takes no `model`"),
    ):
        with pytest.raises(InputError, match=f"^mcit asd: {problem}"):
            asd_settings(**{option: value})


def run_asd(folder: Path, out: str, address: str, **environment: str) -> subprocess.Popen[str]:
    arguments = [folder / "train.json", folder / out, "--fraction", "0.5", "--images", folder / "img"]
    arguments += ["--converter", "llm", "--endpoint", address, "--model", "m", "--retries", "1", "--concurrency", "2"]
    code = "from mcit.pipeline.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, "asd", *map(str, arguments)],
        env={**os.environ, "MCIT_CACHE": str(folder / "cache"), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A suite started in the background of a script ignores interrupts, and its children would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def test_the_command_interrupted_continues_and_finished_costs_nothing(tmp_path: Path) -> None:
    write_data(tmp_path)
    with serve() as server:
        numbers = itertools.count(1)

        def interrupting(body: dict[str, Any]) -> Reply:
            if (number := next(numbers)) == 8:
                process.send_signal(signal.SIGINT)
            elif number > 8:
                process.wait(300)  # whoever is not answered yet is not answered
            return good(body)

        server.answer = interrupting
        process = run_asd(tmp_path, "out.jsonl", server.address)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 130 and "Traceback" not in err
        assert err.startswith("interrupted: the answers so far are kept") and err.count("\n") <= 2
        assert not (tmp_path / "out.jsonl").exists()
        kept = len(list((tmp_path / "cache" / "asd").rglob("*.json")))
        assert 1 <= kept < 20

        server.answer = good
        server.asked.clear()
        process = run_asd(tmp_path, "out.jsonl", server.address, OPENAI_API_KEY="secret-2")
        out, err = process.communicate(timeout=300)
        assert (process.returncode, err) == (0, "") and "20 of 40 samples converted (50.0 %)" in out
        assert len(server.asked) == 20 - kept and server.keys == {"Bearer none", "Bearer secret-2"}
    rows, report = read_jsonl(tmp_path / "out.jsonl"), read_json(tmp_path / "out.jsonl.report.json")
    assert report["validation"] == {"checked": 20, "failed": {}} and report["model"] == "m"
    assert rows[0]["images"] == ["0.png"] and sum("asd" in row["meta"] for row in rows) == 20
    assert not any(b"secret-2" in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())

    finished = run_asd(tmp_path, "again.jsonl", "http://127.0.0.1:9/v1")  # nobody there, and nobody needed
    assert finished.communicate(timeout=300)[1] == "" and finished.returncode == 0
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()


def test_the_command_without_an_endpoint_exits_2_with_one_line(tmp_path: Path) -> None:
    write_data(tmp_path, 10)
    process = run_asd(tmp_path, "out.jsonl", "http://127.0.0.1:9/v1")
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (2, "") and err.count("\n") == 1
    assert err.startswith("error: http://127.0.0.1:9/v1: cannot be reached") and not (tmp_path / "out.jsonl").exists()
