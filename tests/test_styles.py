"""Styles: prompts come apart into what built them, strict forms, style-free extraction, inference."""

import random
import string
import time

import pytest

from mcit.data_prep.answers import is_sentence, normalise, sentences
from mcit.data_prep.styles import (
    FORMAT,
    STYLES,
    THINK,
    build_prompt,
    default_scorer,
    extract,
    find_options,
    fits,
    infer_style,
    parse,
    split_prompt,
    split_reasoning,
    state_answer,
)


def test_build_prompt_writes_question_options_and_format_sentence() -> None:
    assert build_prompt("Which?", "mcq", options=["red", "blue"]) == (
        "Which?\nA. red\nB. blue\nAnswer with the option's letter from the given choices directly."
    )
    assert build_prompt("How many?", "number", reasoning="think") == f"How many?\nAnswer with a number. {THINK}"


def test_a_built_prompt_comes_apart_again() -> None:
    rng = random.Random(0)
    for _ in range(300):
        question = " ".join(rng.choice(["what", "is", "A.", "the", "12", "yes or no", "(B)"]) for _ in range(5)) + "?"
        style = rng.choice(STYLES)
        options = [f"option {rng.random()}" for _ in range(rng.randint(2, 6))] if style == "mcq" else None
        reasoning = rng.choice(["none", "think"])
        text = build_prompt(question, style, options=options, reasoning=reasoning)
        found, found_options, sentence = split_prompt(text)
        assert (found, found_options) == (question, options)
        assert sentence.startswith(FORMAT[style]) and (THINK in sentence) == (reasoning == "think")


def test_split_prompt_drops_foreign_and_given_format_sentences() -> None:
    assert split_prompt("Is it?\nPlease answer yes or no.")[0] == "Is it?"
    assert split_prompt("Is it? Reply in French.", ["Reply in French."])[0] == "Is it?"
    assert split_prompt("What do you answer?") == ("What do you answer?", None, "")


@pytest.mark.parametrize(
    ("text", "question", "options"),
    [
        ("Q?\nA. a\nB. b", "Q?", ["a", "b"]),
        ("Q?\nOptions:\n(A) a b\n(B) c", "Q?", ["a b", "c"]),
        ("Q? Options: (A) one (B) two", "Q?", ["one", "two"]),
        ("Q?\nA. only one", "Q?\nA. only one", None),
        ("Q?\nA. a\nC. c", "Q?\nA. a\nC. c", None),
        ("B. b\nC. c", "B. b\nC. c", None),
        ("A. Lincoln was who?", "A. Lincoln was who?", None),
    ],
)
def test_find_options(text: str, question: str, options: list[str] | None) -> None:
    assert find_options(text) == (question, options)


@pytest.mark.parametrize(
    ("response", "reasoning", "expected"),
    [
        ("<think>2+5</think><answer>7</answer>", "think", ("2+5", "7", True)),
        (" <think>2+5</think>\n<answer> 7 </answer>\n", "think", ("2+5", "7", True)),
        ("7", "think", (None, "7", False)),
        ("<think>2+5</think>7", "think", ("2+5", "7", False)),
        ("<think>2+5 = ", "think", ("2+5 =", "", False)),  # cut off while thinking: no answer
        ("<think>a</think><answer>7", "think", ("a", "7", False)),
        ("<think></think><answer>7</answer>", "think", (None, "7", False)),
        ("<think>a</think><answer>1</answer><answer>7</answer>", "think", ("a1", "7", False)),
        ("<think>a</think><answer>7</answer> and more", "think", ("a", "7", False)),
        ("7", "none", (None, "7", True)),
        ("<think>a</think><answer>7</answer>", "none", ("a", "7", False)),
    ],
)
def test_split_reasoning(response: str, reasoning, expected) -> None:
    assert split_reasoning(response, reasoning) == expected


GOOD = {
    "mcq": {"B": "B", "b": "B", "B.": "B", "(B)": "B", "B)": "B", " B ": "B"},
    "yes_no": {"Yes": "yes", "no.": "no", "NO": "no"},
    "number": {
        "7": "7",
        "-3.50": "-3.50",
        "1,234": "1234",
        "$5": "5",
        "12 %": "12%",
        "-$5": "-5",
        "–5": "-5",
        "7.": "7",
        ".5": ".5",
        "+4": "4",
        "1e3": "1e3",
    },
    "bbox": {"[0.1, 0.2, 0.3, 0.4]": "[0.1, 0.2, 0.3, 0.4]", "[10,20,300,400]": "[10, 20, 300, 400]"},
    "short": {
        "red": "red",
        "on the left": "on the left",
        "Harry Potter and the Prisoner of Azkaban": "Harry Potter and the Prisoner of Azkaban",
        "7.": "7",
        "C. S. Lewis": "C. S. Lewis",
        "B": "B",
        "This": "This",
    },
    "label": {"tabby cat": "tabby cat"},
    "latex": {
        r"$\frac{1}{2}$": r"\frac{1}{2}",
        r"\(x^2\)": "x^2",
        "7": "7",
        r"\text{two of the}": r"\text{two of the}",
    },
    "brief": {"Two dogs play.": "Two dogs play.", "7": "7"},
    "detailed": {"One. Two.": "One. Two."},
    "caption": {"a dog": "a dog"},
}
BAD = {
    "mcq": ["", "BC", "B. red", "The answer is B.", "7", "<answer>B</answer>", "red"],
    "yes_no": ["", "Yes, it is.", "true", "maybe", "B"],
    "number": ["", "seven", "7 dogs", "The digit is 7.", "1 2", "[1, 2, 3, 4]", "3/4", "12,34", "B"],
    "bbox": [
        "",
        "0.1, 0.2, 0.3, 0.4",
        "(0.1, 0.2, 0.3, 0.4)",
        "[0.1, 0.2, 0.3]",
        "[0.3, 0.2, 0.1, 0.4]",
        "[0.1, 0.4, 0.3, 0.4]",
        "[-0.1, 0.2, 0.3, 0.4]",
        "The box is [0.1, 0.2, 0.3, 0.4].",
    ],
    "short": [
        "",
        "The digit is 7.",
        "It's a cat.",
        "[0.1, 0.2, 0.3, 0.4]",
        "red\nblue",
        "B. red",
        "Answer: 7",
        "<think>a</think><answer>red</answer>",
        "Two dogs play with a ball in the park.",
        "word " * 16,
    ],
    "label": ["", "It is a tabby cat."],
    "latex": ["", r"The answer is $\frac{1}{2}$.", r"\frac{1}{2", "one half of it all"],
    "brief": ["", "  "],
    "detailed": [""],
    "caption": [""],
}


@pytest.mark.parametrize("style", STYLES)
def test_parse_is_strict(style) -> None:
    for answer, value in GOOD[style].items():
        assert parse(style, answer) == (value, True), answer
    for answer in BAD[style]:
        assert parse(style, answer) == (None, False), answer


def test_parse_uses_options() -> None:
    assert parse("mcq", "D", options=["a", "b", "c"]) == (None, False)
    assert parse("label", "Tabby cat.", options=["tabby cat", "fox"]) == ("tabby cat", True)
    assert parse("label", "dog", options=["tabby cat", "fox"]) == (None, False)


def test_what_has_the_form_is_extracted_as_it_is() -> None:
    for style in STYLES:
        for answer, value in GOOD[style].items():
            assert extract(style, answer) == value, (style, answer)


@pytest.mark.parametrize(
    ("style", "answer", "value"),
    [
        ("short", "The digit is 7.", "7"),
        ("short", "It's a cat.", "cat"),
        ("short", "The animal that is on the left is a zebra.", "zebra"),
        ("short", "The answer is St. Louis.", "St. Louis"),
        ("short", 'The answer is "cat".', "cat"),
        ("short", "Answer: blue", "blue"),
        ("short", "B. red", "red"),
        ("short", "**red**", "red"),
        ("short", r"\boxed{red}", "red"),
        ("short", "B", "B"),
        ("short", "It is the Eiffel Tower. It stands in Paris.", "Eiffel Tower"),
        ("number", "seven", "7"),
        ("number", "There are twenty-one dots.", "21"),
        ("number", "12 + 30 = 42", "42"),
        ("number", "The answer is 12 + 30 = 42.", "42"),
        ("number", "There are 3 dogs and 2 cats, so 5 animals.", "5"),
        ("number", r"so \boxed{1,024}", "1024"),
        ("number", "-5 degrees", "-5"),
        ("number", "5-3", "3"),
        ("number", "x1", None),
        ("number", "many", None),
        ("number", "[0.1, 0.2, 0.3, 0.4]", None),
        ("yes_no", "Yes, there is.", "yes"),
        ("yes_no", "The answer is no.", "no"),
        ("yes_no", "There is no cat.", "no"),
        ("yes_no", "False", "no"),
        ("yes_no", "yes or no", "yes"),
        ("yes_no", "It could be yes, or no", None),
        ("yes_no", "7", None),
        ("bbox", "The box is (0.1,0.2),(0.5,0.6).", "[0.1, 0.2, 0.5, 0.6]"),
        ("bbox", '{"bbox_2d": [100,200,300,400]}', "[100, 200, 300, 400]"),
        ("bbox", "100,200,300,400", "[100, 200, 300, 400]"),
        ("bbox", "x1=0.1 y1=0.2 x2=0.5 y2=0.6", "[0.1, 0.2, 0.5, 0.6]"),
        ("bbox", "[0.5, 0.6, 0.1, 0.2]", None),
        ("bbox", "7", None),
        ("latex", r"The result is $x+1$, hence $\frac{1}{2}$.", r"\frac{1}{2}"),
        ("latex", r"The answer is \sqrt{2}.", r"\sqrt{2}"),
        ("brief", "<think>a</think><answer>A dog.</answer>", "A dog."),
    ],
)
def test_extract_reads_content_out_of_any_form(style, answer: str, value: str | None) -> None:
    assert extract(style, answer) == value


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("B. dog", "B"),
        ("(B) dog", "B"),
        ("[B]", "B"),
        ("dog", "B"),
        ("Dog.", "B"),
        ("The answer is B.", "B"),
        ("The answer is b", "B"),
        ("The answer is a dog.", "B"),
        ("A dog", "B"),
        ("a cat", "A"),
        ("It is a cat.", "A"),
        ("B, because it barks", "B"),
        ("B is right", "B"),
        ("Option A is wrong. The answer is B.", "B"),
        ("I choose option C", "C"),
        ("It shows the sea otter", "D"),
        ("<think>It could be A</think><answer>C</answer>", "C"),
        ("either A or B", None),
        ("It is a horse.", None),
        ("E", None),
        ("cat or dog", None),
    ],
)
def test_extract_mcq(answer: str, value: str | None) -> None:
    assert extract("mcq", answer, options=["cat", "dog", "otter", "sea otter"]) == value


OPTIONS = ["cat", "A red car", "dog"]


@pytest.mark.parametrize(
    ("style", "answer", "options", "value"),
    [
        ("mcq", "A. cat\nB. A red car\nAnswer: B", OPTIONS, "B"),
        ("mcq", "A is incorrect because it is too small. The answer is C.", OPTIONS, "C"),
        ("mcq", "(A) is a cat and (B) is a dog. So the answer is (B).", OPTIONS, "B"),
        ("mcq", "Answer: A red car", OPTIONS, "B"),
        ("mcq", "The answer is x + 1.", ["x - 1", "x + 1"], "B"),
        ("mcq", "It must be x > 3, I think", ["x > 3", "x < 3"], "A"),
        ("label", "x > 3", ["x < 3", "x > 3"], "x > 3"),
        ("label", "C++", ["C", "C++"], "C++"),
        ("number", "50%", None, "50%"),
        ("number", "It is 50 percent of them.", None, "50 percent"),
        ("number", "so 3/4 of it", None, "3/4"),
        ("number", "3 million", None, "3 million"),
        ("number", "–5", None, "-5"),
        ("number", "minus 5", None, "-5"),
        ("number", "8 minus 5 makes 3", None, "3"),
        ("number", "It costs -$5", None, "-5"),
        ("number", r"\boxed{\frac{1}{2}}", None, "1/2"),
        ("number", "one hundred twenty-one", None, "121"),
        ("number", "one million two hundred thousand and five", None, "1200005"),
        ("number", "three and five", None, "5"),
        ("number", "10\u202f000", None, "10000"),
        ("number", "on 12/25/2020", None, None),
        ("yes_no", "That is not true.", None, "no"),
        ("yes_no", "It isn't correct.", None, "no"),
        ("yes_no", "I don't think that is correct.", None, "no"),
        ("yes_no", "The answer is not yes.", None, "no"),
        ("yes_no", "This is not incorrect.", None, "yes"),
        ("yes_no", "I do not see any, no", None, "no"),
        ("yes_no", "There is not one, so no", None, "no"),
        ("yes_no", "Not sure, but yes", None, "yes"),
        ("latex", "The answer is $x^2+1$, where $x$ is real.", None, "x^2+1"),
        ("bbox", "[-0.01, 0.20, 0.30, 0.40]", None, "[0, 0.20, 0.30, 0.40]"),
        ("bbox", "The 2 dogs are at 100, 200, 300, 400.", None, "[100, 200, 300, 400.]"),
    ],
)
def test_extract_reads_what_is_meant(style, answer, options, value) -> None:
    assert extract(style, answer, options=options) == value


@pytest.mark.parametrize(
    "question", ["What is the difference between (A) and (B)?", "Are the triangles (A) and (B) congruent?"]
)
def test_letters_in_a_question_are_no_options(question: str) -> None:
    assert find_options(question) == (question, None)
    assert find_options("Which is it? (A) red (B) blue") == ("Which is it?", ["red", "blue"])
    assert find_options("Which\n(A) < (B) >") == ("Which", ["<", ">"])


def test_extract_mcq_reads_numbers_and_single_letters_as_options() -> None:
    assert extract("mcq", "There are three.", options=["1", "3", "13"]) == "B"
    assert extract("mcq", "1.5", options=["1", "1.5"]) == "B"
    assert extract("mcq", "B", options=["B", "A"]) == "B"  # the letter, not the text
    assert extract("mcq", "Yes.", options=["No", "Yes"]) == "B"


def test_extract_label_finds_the_only_label_named() -> None:
    labels = ["fox", "red fox", "cat"]
    assert extract("label", "The image shows a red fox.", options=labels) == "red fox"
    assert extract("label", "It is a dog.", options=labels) == "dog"


# Peers' scorers read answers in ways that must not come back (published evaluation code of the projects named).


def test_ctbench_wrong_letter_in_answer_tags_is_not_the_gold_letter() -> None:
    assert extract("mcq", "<answer>C</answer>", options=["a", "b", "c"]) == "C"
    assert parse("mcq", "<answer>C</answer>") == (None, False)


def test_ctbench_number_is_not_the_last_one_in_the_text() -> None:
    assert extract("number", "The answer is 3. (see Figure 2)") == "3"
    assert extract("number", "The answer is 3. Figure 2 shows it.") == "3"


def test_coin_imagenet_empty_prediction_is_nothing() -> None:
    for style in STYLES:
        for empty in ("", "  \n", "<think>long thoughts", "<answer></answer>", '""'):
            assert extract(style, empty) is None
        assert parse(style, "") == (None, False)


def test_coin_grounding_keeps_the_last_digit() -> None:
    box = "[0.12, 0.33, 0.55, 0.97]"
    assert parse("bbox", box).value == extract("bbox", box) == extract("bbox", f"It is {box}.") == box


def test_mcitlib_no_inside_unknown_is_not_no() -> None:
    assert extract("yes_no", "unknown") is None
    assert extract("yes_no", "It is not known.") is None


def test_coin_scienceqa_first_short_word_is_not_the_letter() -> None:
    assert extract("mcq", "a picture of I do not know what", options=["x", "y"]) is None


def test_same_letter_in_another_case_is_the_same_answer() -> None:
    assert parse("mcq", "a").value == parse("mcq", "A").value == "A"


def test_extraction_survives_any_text() -> None:
    rng = random.Random(0)
    alphabet = string.printable + "é−“”\u2028$\\[](){}<>"
    fragments = ["<think>", "</think>", "<answer>", r"\boxed{", "The answer is", "[0.1, 0.2", "A.", "(B)", "yes"]
    for _ in range(2000):
        text = "".join(
            rng.choice(fragments) if rng.random() < 0.2 else rng.choice(alphabet) for _ in range(rng.randint(0, 30))
        )
        for style in STYLES:
            value = extract(style, text, options=["red", "1"] if style == "mcq" else None)
            assert value is None or value.strip()
            parsed = parse(style, text)
            assert (parsed.value is None) != parsed.format_ok


@pytest.mark.parametrize(
    "unit",
    [
        "(a",
        "<answer>",
        "</think> ",
        "1,111,",
        "a. ",
        "that is ",
        "\\boxed{",
        "word ",
        "x",
        "7 ",
        " ",
        "$",
        "(B) ",
        "the answer is ",
    ],
)
def test_a_flood_is_read_in_good_time(unit: str) -> None:
    flood = unit * (20_000 // len(unit))
    start = time.process_time()
    for style in STYLES:
        extract(style, flood, options=["red", "blue"])
        parse(style, flood)
        fits(style, flood)
    split_reasoning(flood, "think")
    split_prompt(flood)
    assert time.process_time() - start < 2


def test_a_stated_answer_is_read_back() -> None:
    for answer in ("7", "red", "New York", "St. Louis", "Mr. Bean", "The Who", "3.5", "yes"):
        assert normalise(str(extract("short", state_answer(answer)))) == normalise(answer)
    assert extract("bbox", state_answer("[0.1, 0.2, 0.3, 0.4]")) == "[0.1, 0.2, 0.3, 0.4]"
    assert extract("number", state_answer("3.5")) == "3.5"


def test_normalise_sentences_and_is_sentence() -> None:
    assert normalise("The  Two Dogs!") == "2 dogs"
    assert normalise("1,000.50") == "1000.50" and normalise("−3") == "-3"
    assert normalise("+") == "+" and normalise("the") == "the"
    assert sentences("He is Dr. Who. He is 3.5 m tall!\nGood") == ["He is Dr. Who.", "He is 3.5 m tall!", "Good"]
    assert is_sentence("It is red.") and not is_sentence("red and blue.") and not is_sentence("In the corner")
    assert is_sentence("It's red.") and not is_sentence("It's") and not is_sentence("red")


def test_fits_tells_free_text_by_its_shape() -> None:
    assert fits("brief", "The digit is 7.") and not fits("brief", "7") and not fits("brief", "It is 7. It is red.")
    assert fits("detailed", "It is 7. It is red.") and fits("detailed", "word " * 15) and not fits("detailed", "7 dogs")
    assert fits("mcq", "B") and not fits("mcq", "red")


@pytest.mark.parametrize(
    ("prompt", "completion", "style"),
    [
        ("Q{}?\nAnswer the question using a single word or phrase.", "7", "short"),
        ("Q{}?\nA. 1\nB. 2", "B", "mcq"),
        ("Q{}?", "B", "short"),
        ("Q{}?", "No", "yes_no"),
        ("Q{}?", "{}", "number"),
        ("Q{}?", "[0.1, 0.2, 0.3, 0.4]", "bbox"),
        ("Q{}?", r"\frac{{1}}{{{}}}", "latex"),
        ("Q{}?", "red fox", "short"),
        ("Q{}?", "There is a red fox on the hill.", "brief"),
        ("Describe picture {}.", "There is a red fox on the hill.", "caption"),
        ("Q{}?", "There is a fox. It is red. It sits on a hill.", "detailed"),
    ],
)
def test_infer_style(prompt: str, completion: str, style: str) -> None:
    numbers = range(1, 41)
    assert infer_style([completion.format(n) for n in numbers], [prompt.format(n) for n in numbers]) == style


def test_infer_style_tolerates_a_few_odd_answers() -> None:
    assert infer_style(["Yes", "No"] * 48 + ["maybe"] * 4, ["Q?"] * 100) == "yes_no"
    assert infer_style(["Yes", "No"] * 40 + ["maybe"] * 20, ["Q?"] * 100) == "short"


def test_default_scorer() -> None:
    assert default_scorer("short") == "short" and default_scorer("short", references=10) == "vqa_soft"
    assert [default_scorer(style) for style in ("bbox", "mcq", "caption")] == ["bbox", "mcq", "caption"]
