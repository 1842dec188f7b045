"""ASD by rule: shares, balance, determinism, and that every converted sample still says the truth."""

import random
import re
import string
from collections import Counter
from typing import Any

import pytest

from mcit.data_prep.answers import normalise
from mcit.data_prep.asd import conversion
from mcit.data_prep.asd.distractors import Pool, answer_kind, iou, same_answer
from mcit.data_prep.asd.report import make_report
from mcit.data_prep.asd.rules import Rules
from mcit.data_prep.extraction import extract
from mcit.data_prep.schema import AsdConfig, Sample, Style
from mcit.data_prep.styles import FORMAT, THINK, build_prompt, fits, parse, split_prompt, split_reasoning

COLOURS = ["red", "green", "blue", "yellow", "black", "white"]


def convert(
    samples: list[Sample], fraction: float, seed: int, known_formats: list[str] | None = None
) -> tuple[list[Sample], dict[str, Any]]:
    done = conversion.convert(samples, fraction, seed, Rules(), known_formats=known_formats or [])
    return list(done.after()), make_report(done, AsdConfig(fraction=fraction), seed)


def sample(number: int, question: str, answer: str, style: Style, **fields: Any) -> Sample:
    meta = fields.pop("meta", {})
    reasoning = fields.pop("reasoning", "none")
    text = build_prompt(question, style, options=meta.get("options"), reasoning=reasoning)
    return {
        "id": f"s{number}",
        "task": "t",
        "images": [f"{number}.png"],
        "prompt": [{"role": "user", "content": text}],
        "completion": [{"role": "assistant", "content": answer}],
        "references": [split_reasoning(answer, "think")[1]],
        "style": style,
        "reasoning": reasoning,
        "meta": meta,
        **fields,
    }


def short_task(n: int) -> list[Sample]:
    return [sample(i, f"What colour is thing {i}?", COLOURS[i % 6], "short") for i in range(n)]


def mcq_task(n: int) -> list[Sample]:
    rng, samples = random.Random(0), []
    for i in range(n):
        options = rng.sample(COLOURS, 4)
        samples.append(sample(i, f"Colour {i}?", rng.choice("ABCD"), "mcq", meta={"options": options, "image_id": "x"}))
    return samples


def yes_no_task(n: int) -> list[Sample]:
    return [sample(i, f"Is {i} even?", ("Yes", "No")[i % 2], "yes_no") for i in range(n)]


def number_task(n: int) -> list[Sample]:
    return [sample(i, f"How many in {i}?", str(i % 30), "number") for i in range(n)]


def box_task(n: int) -> list[Sample]:
    rng, samples = random.Random(0), []
    for i in range(n):
        x, y = rng.random() / 2, rng.random() / 2
        box = f"[{x:.2f}, {y:.2f}, {x + rng.uniform(0.1, 0.4):.2f}, {y + rng.uniform(0.1, 0.4):.2f}]"
        samples.append(sample(i, f"Where is {i}?", box, "bbox"))
    return samples


def content(native: Sample) -> str:
    """What a native sample's answer says."""
    answer = native["references"][0]
    return native["meta"]["options"][string.ascii_uppercase.index(answer)] if native["style"] == "mcq" else answer


def check_truth(before: Sample, after: Sample) -> None:
    """Re-derives what a converted single-turn sample has to say from the native one."""
    style, truth = after["style"], content(before)
    text, answer = after["prompt"][0]["content"], after["completion"][0]["content"]
    assert after["references"] == [answer] and after["meta"]["asd"]["style"] == style != before["style"]
    assert after["meta"]["asd"]["original_id"] == after["id"] == before["id"] and after["images"] == before["images"]
    assert text.endswith(FORMAT[style]) and sum(text.count(sentence) for sentence in FORMAT.values()) == 1
    assert fits(style, answer, options=after["meta"].get("options"))
    question, options, _ = split_prompt(text)
    native_question = split_prompt(before["prompt"][0]["content"])[0]
    if style == "mcq":
        assert question == native_question and options == after["meta"]["options"]
        assert options[string.ascii_uppercase.index(answer)].lower() == truth.lower()
        assert len({normalise(option) for option in options}) == len(options)
    elif style == "yes_no":
        asked, candidate = re.fullmatch(r'(.*)\nIs "(.*)" the right answer\?', question, re.DOTALL).groups()
        assert asked == native_question and (normalise(candidate) == normalise(truth)) == (answer == "Yes")
        assert parse("yes_no", answer).format_ok
    else:
        assert question == native_question and options is None and "options" not in after["meta"]
        read = extract("bbox" if before["style"] == "bbox" else "short", answer)
        assert normalise(read) == normalise(truth)


@pytest.mark.parametrize(
    ("task", "styles"),
    [
        (short_task, {"yes_no", "mcq", "brief"}),
        (mcq_task, {"yes_no", "short", "brief"}),
        (yes_no_task, {"mcq", "short", "brief"}),
        (number_task, {"yes_no", "mcq", "brief"}),
        (box_task, {"yes_no", "mcq", "brief"}),
    ],
)
@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.8])
def test_shares_places_and_truth(task, styles: set[str], fraction: float) -> None:
    samples = task(300)
    converted, report = convert(samples, fraction, seed=0)
    assert [s["id"] for s in converted] == [s["id"] for s in samples]
    changed = [(a, b) for a, b in zip(samples, converted, strict=True) if a != b]
    counts = Counter(after["style"] for _, after in changed)
    assert len(changed) == round(300 * fraction) == report["converted"] == report["wanted"]
    assert set(counts) == styles and max(counts.values()) - min(counts.values()) <= 1
    assert report["styles"]["detailed"]["skipped"] == {"rules cannot write explanations": 300}
    for before, after in changed:
        check_truth(before, after)
    assert all("asd" not in s["meta"] for s in samples)  # the input is left alone


def test_letters_and_propositions_are_balanced() -> None:
    report = convert(number_task(1200), 0.2, seed=3)[1]
    assert report["letters"] == {"A": 20, "B": 20, "C": 20, "D": 20}
    assert report["yes_no"] == {"No": 40, "Yes": 40}
    report = convert(yes_no_task(300), 0.2, seed=0)[1]
    assert report["letters"] == {"A": 10, "B": 10}  # Yes and No in either order, each equally often


def test_letters_do_not_follow_the_answer() -> None:
    """A model must not learn where the answer stands from what it is."""
    converted, _ = convert(yes_no_task(3000), 1.0, seed=0)
    table = Counter((s["meta"]["options"][0], s["references"][0]) for s in converted if s["style"] == "mcq")
    assert min(table.values()) > 0.2 * sum(table.values())


def test_deterministic_under_the_seed_and_whatever_the_order() -> None:
    samples = short_task(120)
    first, report = convert(samples, 0.5, seed=1)
    assert convert(samples, 0.5, seed=1) == (first, report)
    shuffled = random.Random(0).sample(samples, len(samples))
    again = {s["id"]: s for s in convert(shuffled, 0.5, seed=1)[0]}
    assert again == {s["id"]: s for s in first}
    other = convert(samples, 0.5, seed=2)[0]
    chosen = [{s["id"] for s in rows if "asd" in s["meta"]} for rows in (first, other)]
    assert chosen[0] != chosen[1]


def test_neutral_setting_changes_nothing() -> None:
    samples = short_task(20)
    assert convert(samples, 0, seed=0)[0] == samples and convert([], 0.5, seed=0)[0] == []


def test_different_seeds_ask_differently() -> None:
    texts = {convert(number_task(30), 1.0, seed=seed)[0][0]["prompt"][0]["content"] for seed in range(10)}
    assert len(texts) > 3


def test_distractors_are_never_a_reference() -> None:
    annotators = ["grey", "Gray cat", "the cats", "black cat"]
    samples = [sample(i, f"What is {i}?", ["cat", "dog", "fish"][i % 3], "short") for i in range(60)]
    for s in samples:
        if s["references"] == ["dog"]:
            s["references"] = ["dog", *annotators]
    for s in convert(samples, 1.0, seed=0)[0]:
        if s["style"] == "mcq" and samples[int(s["id"][1:])]["references"][0] == "dog":
            assert sorted(s["meta"]["options"]) == ["dog", "fish"]  # "cat" is what annotators said


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("The Cats", "cat", True),
        ("ice cream", "icecream", True),
        ("t-shirt", "T shirt", True),
        ("black cat", "cat", True),
        ("two", "2", True),
        ("cat", "dog", False),
        ("12", "2", False),
        ("New York", "New Jersey", False),
    ],
)
def test_same_answer(one: str, other: str, same: bool) -> None:
    assert same_answer(one, other) == same == same_answer(other, one)


def test_wrong_numbers_differ_are_near_and_look_alike() -> None:
    rng = random.Random(0)
    for _ in range(200):
        value = rng.choice(["7", "0", "-4", "1,250", "3.50", "45%", "$12"])
        pool = Pool([("How many?", str(rng.randint(0, 40)), "number") for _ in range(rng.randint(0, 9))])
        wrong = pool.wrong("How many?", [value], "number", 3, rng)
        numbers = [float(extract("number", w).removesuffix("%")) for w in wrong]
        assert len(set(numbers)) == 3 and float(extract("number", value).removesuffix("%")) not in numbers
        assert all(answer_kind(w, "number") == "number" for w in wrong)
    assert Pool([]).wrong("Q", ["3.50"], "number", 1, random.Random(0))[0].partition(".")[2] != ""


def test_wrong_boxes_are_boxes_elsewhere() -> None:
    def floats(text: str) -> list[float]:
        return [float(x) for x in text.strip("[]").split(",")]

    rng = random.Random(0)
    assert iou([0, 0, 2, 2], [1, 1, 3, 3]) == pytest.approx(1 / 7) and iou([0, 0, 1, 1], [2, 2, 3, 3]) == 0
    for box in ("[0.10, 0.10, 0.30, 0.30]", "[10, 10, 60, 90]"):
        pool = Pool([("Where?", box, "bbox"), ("Where?", box.replace("30]", "31]"), "bbox")])
        wrong = pool.wrong("Where?", [box], "bbox", 2, rng)
        assert wrong and all(iou(floats(w), floats(box)) < 0.5 for w in wrong)
        assert all(
            len(x.partition(".")[2]) == len(box[1:].split(",")[0].partition(".")[2])
            for w in wrong
            for x in w.strip("[]").split(", ")
        )


def test_wrong_answers_come_from_questions_of_the_same_kind_first() -> None:
    pool = Pool(
        [("What colour is it?", c, "text") for c in COLOURS]
        + [("Who is it?", f"person {i}", "text") for i in range(50)]
    )
    assert set(pool.wrong("What colour is this?", ["red"], "text", 3, random.Random(0))) < set(COLOURS)


def test_mixed_answers_of_a_vqa_task_keep_their_kind() -> None:
    samples = []
    for i in range(240):
        question, answer = [
            (f"What colour is {i}?", COLOURS[i // 3 % 6]),
            (f"Is {i} odd?", "no"),
            (f"How many {i}?", f"{i // 3 % 9}"),
        ][i % 3]
        samples.append(sample(i, question, answer, "short"))
    converted, report = convert(samples, 0.5, seed=0)
    assert report["converted"] == 120
    for before, after in zip(samples, converted, strict=True):
        kind = answer_kind(before["references"][0], "short")
        if after["style"] == "mcq":
            assert {answer_kind(option, "short") for option in after["meta"]["options"]} == {kind}
            assert len(after["meta"]["options"]) == (2 if kind == "yes_no" else 4)
        if after["style"] == "yes_no" and kind == "yes_no":  # a yes/no question is one already
            assert after["prompt"][0]["content"] == f"Is {before['id'][1:]} odd?\n{FORMAT['yes_no']}"
            assert after["references"] == ["No"]


def test_format_sentences_never_pile_up() -> None:
    own = "Reply with the colour's name only."
    samples = short_task(60)
    for s in samples:
        s["prompt"][0]["content"] = f"{split_prompt(s['prompt'][0]['content'])[0]}\n{own}"
    for known in ([own], []):  # given, or found because every question ends with it
        converted, report = convert(samples, 0.5, seed=0, known_formats=known)
        assert own in report["format_sentences"]
        changed = [s for s in converted if "asd" in s["meta"]]
        assert len(changed) == 30 and not any(own in s["prompt"][0]["content"] for s in changed)


def test_a_question_that_all_samples_share_is_no_format_sentence() -> None:
    samples = [sample(i, f"OCR: {i}\nWhat is written here?", f"word{i}", "short") for i in range(30)]
    for s in convert(samples, 1.0, seed=0)[0]:
        assert "What is written here?" in s["prompt"][0]["content"]


def test_reasoning_is_kept_around_the_new_answer() -> None:
    samples = [
        sample(i, f"How many {i}?", f"<think>count</think><answer>{i % 9}</answer>", "number", reasoning="think")
        for i in range(30)
    ]
    converted, _ = convert(samples, 1.0, seed=0)
    for s in converted:
        think, answer, ok = split_reasoning(s["completion"][0]["content"], "think")
        assert (think, ok) == ("count", True) and s["references"] == [answer] and fits(s["style"], answer)
        assert s["prompt"][0]["content"].endswith(f"{FORMAT[s['style']]} {THINK}")


def dialogue(number: int, turns: list[tuple[str, str]], style: Style = "short") -> Sample:
    messages = [m for q, a in turns for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]
    system = {"role": "system", "content": "Be kind."}
    return {**sample(number, "", turns[-1][1], style), "prompt": [system, messages[0]], "completion": messages[1:]}


def test_dialogues_convert_turn_by_turn() -> None:
    first = f"How many {{}}?\n{FORMAT['short']}"
    long_answer = "I do not know. It is too dark to see."
    samples = [
        dialogue(i, [(first.format(i), str(i % 7)), ("And why?", long_answer), ("What colour?", COLOURS[i % 6])])
        for i in range(40)
    ]
    converted, report = convert(samples, 0.5, seed=0)
    assert report["converted"] == 20 and report["turns"] == {"converted": 40, "left native": 20}
    letters, said = report["letters"], report["yes_no"]  # of both turns that each dialogue has in its new style
    assert sum(letters.values()) == 2 * report["styles"]["mcq"]["converted"] and set(letters) == set("ABCD")
    assert sum(said.values()) == 2 * report["styles"]["yes_no"]["converted"] and said["Yes"] == said["No"]
    for before, after in zip(samples, converted, strict=True):
        if "asd" not in after["meta"]:
            assert after == before
            continue
        style = after["style"]
        one, why, colour = (after["prompt"][1], *[m for m in after["completion"] if m["role"] == "user"])
        answers = [m["content"] for m in after["completion"] if m["role"] == "assistant"]
        assert after["prompt"][0] == before["prompt"][0]  # the system turn
        assert one["content"].endswith(FORMAT[style]) and colour["content"].endswith(FORMAT[style])
        # The turn that cannot be converted had leant on the first turn's sentence: it gets its own.
        assert why["content"] == f"And why?\n{FORMAT['short']}" and answers[1] == long_answer
        assert fits(style, answers[0]) and fits(style, answers[2]) and after["references"] == [answers[2]]


def test_what_rules_cannot_convert_is_reported() -> None:
    samples = [sample(i, f"Describe {i}.", "A dog runs over a hill. It is brown.", "detailed") for i in range(10)]
    converted, report = convert(samples, 0.5, seed=0)
    assert converted == samples and report["converted"] == 0
    assert report["summary"].endswith("not reachable by rules: yes_no, mcq, short, brief; 5 fewer than asked")
    assert report["styles"]["mcq"]["skipped"] == {"the answer is free text": 10}
    same = [sample(i, f"What is {i}?", "cat", "short") for i in range(10)]
    report = convert(same, 0.5, seed=0)[1]
    assert report["converted"] == 5 and report["styles"]["brief"]["converted"] == 5  # the total stays
    assert "no wrong answer of the same kind in the task" in report["styles"]["mcq"]["fell_back"]


def test_the_share_is_reached_within_half_a_point_or_the_report_says_why_not() -> None:
    for n, fraction in ((200, 0.2), (173, 0.37), (100, 1.0)):
        report = convert(short_task(n), fraction, seed=0)[1]
        assert abs(report["reached"] - fraction) <= 0.005 and report["within_half_a_point"] and not report["why_not"]
    few = convert(short_task(7), 0.2, seed=0)[1]
    assert few["converted"] == 1 and few["why_not"] == ["one sample more or less is 14.3 points of the share"]
    mixed = short_task(50) + [sample(i, f"Why {i}?", "It is so. It has been.", "detailed") for i in range(50, 100)]
    report = convert(mixed, 0.8, seed=0)[1]
    assert report["converted"] == 50 and not report["within_half_a_point"]
    assert "mcq: the answer is free text (50)" in report["why_not"]


def test_options_about_options_are_not_asked_alone() -> None:
    options = ["red", "blue", "All of the above", "A and B"]
    samples = [sample(i, f"Which {i}?", "ABCD"[i % 4], "mcq", meta={"options": options}) for i in range(80)]
    for before, after in zip(samples, convert(samples, 1.0, seed=0)[0], strict=True):
        if after["style"] in ("short", "yes_no", "brief"):
            assert content(before) in ("red", "blue")
            assert "above" not in after["prompt"][0]["content"] and "A and B" not in after["prompt"][0]["content"]


def test_options_that_are_sentences_can_be_asked_about() -> None:
    options = ["It is short of light.", "It has had too much water."]
    samples = [sample(i, f"Why is plant {i} pale?", "AB"[i % 2], "mcq", meta={"options": options}) for i in range(40)]
    converted, report = convert(samples, 0.5, seed=0)
    assert report["converted"] == 20 == report["styles"]["yes_no"]["converted"]
    assert report["styles"]["short"]["skipped"] == {"the answer is no word or phrase": 40}
    for before, after in zip(samples, converted, strict=True):
        if "asd" in after["meta"]:
            check_truth(before, after)


def test_report_holds_examples_before_and_after() -> None:
    samples = short_task(60)
    report = convert(samples, 0.5, seed=0)[1]
    assert {style: len(rows) for style, rows in report["examples"].items()} == {"yes_no": 10, "mcq": 10, "brief": 10}
    example = report["examples"]["brief"][0]
    native = next(s for s in samples if s["id"] == example["id"])
    assert example["before"] == {"prompt": native["prompt"], "completion": native["completion"]}
    assert example["after"]["completion"][0]["content"] == f"The answer is {native['references'][0]}."
