"""Each kind against hand-computed values; captions: test_captions.py; what peers got wrong: test_peer_defects.py."""

import random
import threading
import time
from pathlib import Path

import pytest

from mcit.data_prep.errors import InputError
from mcit.eval.kinds.formulas import latex_tokens
from mcit.eval.kinds.numbers import to_number
from mcit.eval.kinds.vqa import vqa_answer
from mcit.eval.scorers import SCORERS, get_scorer, scorer_identity
from mcit.eval.text import plain


def score(kind, answer, references, **meta):
    references = [references] if isinstance(references, str) else references
    return SCORERS[kind].score(answer, references, {"id": "s1", "references": references, "meta": meta})


# --- What holds for every kind --------------------------------------------------------------------------------------

REFERENCE = {"bbox": "[0.10, 0.20, 0.30, 0.40]", "iou": "[0.10, 0.20, 0.30, 0.40]", "number": "1,234.5", "math": "1/2"}

# Where a reference itself gets less than 100: METEOR's penalty never vanishes, CIDEr is a mean over the references.
GRADED = ("meteor", "cider", "caption")
EXACT = [kind for kind in SCORERS if kind not in GRADED]


@pytest.mark.parametrize("kind", SCORERS)
@pytest.mark.parametrize("empty", [None, "", " ", "\n\t", "\u3000"])
def test_an_empty_answer_never_scores(kind, empty):
    for reference in ("", " ", "?", "the", "no", "0", REFERENCE.get(kind, "a dog runs")):
        assert score(kind, empty, [reference]) == 0


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("count", [1, 2, 10])
def test_the_reference_itself_gets_100(kind, count):
    for reference in ("B", "?", "猫", "a", "The Who", "-3 %", r"\frac{a}{b}", REFERENCE.get(kind, "a dog runs")):
        assert score(kind, reference, [reference] * count) == pytest.approx(100)


@pytest.mark.parametrize("kind", [kind for kind in EXACT if kind not in ("vqa_soft", "bleu")])
def test_the_best_of_several_references_counts(kind):
    reference = REFERENCE.get(kind, "two dogs run")
    assert score(kind, reference, ["[0, 0, 0.01, 0.01]", "something else", reference]) == pytest.approx(100)


@pytest.mark.parametrize("kind", [kind for kind in SCORERS if kind not in ("bbox", "iou", "math", "number", "relaxed")])
def test_no_answer_beats_the_best_supported_reference(kind):
    references = (
        ["a dog runs on the grass"] * 4 + ["a brown dog runs on grass"] * 3 + ["the dog is running", "a dog", "dog"]
    )
    words = " ".join(references).split()
    rng = random.Random(4)
    others = [" ".join(rng.choices(words, k=rng.randint(1, 9))) for _ in range(200)]
    reached = max(score(kind, reference, references) for reference in references)
    assert max(score(kind, other, references) for other in others) <= reached + 1e-9
    assert reached == pytest.approx(100) or kind in GRADED


@pytest.mark.parametrize("kind", SCORERS)
def test_scores_stay_within_bounds_and_leave_the_references_alone(kind):
    rng = random.Random(0)
    pieces = [
        "A",
        "(b)",
        "yes",
        "no",
        "3",
        "-1,000",
        "%",
        "[",
        "0.5",
        ",",
        "]",
        "\\frac",
        "{",
        "}",
        "$",
        "the",
        "é",
        "/",
    ]
    for _ in range(5 if kind == "math" else 300):
        answer, *references = (" ".join(rng.choices(pieces, k=rng.randint(0, 6))) for _ in range(4))
        before = list(references)
        assert 0 <= score(kind, answer, references, options=["x", "y"]) <= 100
        assert references == before


@pytest.mark.parametrize("kind", [kind for kind in SCORERS if kind != "math"])  # math-verify works by the clock
def test_time_grows_with_the_length_of_the_answer(kind):
    for unit in ("a ", "1", "(", "\\a", "y", "n't", ". ' "):
        seconds = []
        for length in (20_000, 200_000):
            start = time.process_time()
            assert score(kind, unit * (length // len(unit)), "a short [1, 2, 3, 4] reference") < 100
            seconds.append(time.process_time() - start)
        assert seconds[1] < 40 * seconds[0] + 0.5  # quadratic would be 100 times as long


# --- Closed sets and short answers ----------------------------------------------------------------------------------


def test_mcq_letter_and_option_text():
    options = ["two", "three", "E. coli", "A"]
    assert score("mcq", "b", "B", options=options) == 100
    assert score("mcq", "(B).", "B") == 100
    assert score("mcq", "B. three", "B", options=options) == 100
    assert score("mcq", "Three", "B", options=options) == 100
    assert score("mcq", "B", "three", options=options) == 100
    assert score("mcq", "E. coli", "C", options=options) == 100
    assert score("mcq", "A", "D", options=options) == 0  # a letter names its option, not an option that reads like it
    assert score("mcq", "F", "B", options=options) == 0
    assert score("mcq", "AB", "A") == 0


def test_a_label_is_told_by_its_name_or_its_letter():
    labels = ["dovish", "hawkish", "neutral"]
    assert score("label", "Hawkish.", "hawkish", options=labels) == 100
    assert score("label", "B. hawkish", "hawkish", options=labels) == 100
    assert score("label", "hawkish", "B", options=labels) == 100
    assert score("label", "dovish", "hawkish", options=labels) == 0
    assert score("label", "not hawkish", "hawkish", options=labels) == 0


def test_yes_no_is_a_word_not_a_substring():
    assert score("yes_no", "Yes.", "yes") == 100
    assert score("yes_no", "TRUE", "Yes") == 100
    assert score("yes_no", "unknown", "no") == 0
    assert score("yes_no", "yes and no", "no") == 0
    assert score("yes_no", "no", "yes") == 0


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("the Eiffel Tower.", "Eiffel tower"),
        ("**Paris**.", "paris"),
        ("“Paris”", "Paris"),
        ("Pa\u0302ris", "P\u00e2ris"),
        ("Ｐａｒｉｓ", "Paris"),
        ("it’s", "it's"),
        (" a\n dog ", "dog"),
        ("STRASSE", "straße"),
    ],
)
def test_short_ignores_what_is_not_content(answer, reference):
    assert score("short", answer, reference) == 100


@pytest.mark.parametrize(
    ("answer", "reference"),
    [("C++", "C"), ("-5", "5"), ("$5", "5"), ("5%", "5"), (".5", "5"), ("10²", "102"), ("the", "a"), ("!", "?")],
)
def test_short_keeps_what_is_content(answer, reference):
    assert score("short", answer, reference) == 0


def test_plain_is_idempotent_and_never_loses_an_answer():
    rng = random.Random(1)
    for _ in range(2000):
        text = "".join(rng.choices("aA the.,!?()[]*_\"'-−$%1²½é ", k=rng.randint(1, 8)))
        assert bool(plain(text)) == bool(text.strip())


# Probe strings on which LLaVA's M4C evaluator and lmms-eval agree.
VQA_PROBES = {
    "a/b": "b",
    "it's 5:30": "it 's 5:30",
    "two dogs": "2 dogs",
    "The dog.": "dog",
    "1,000": "1000",
    "3.5": "3.5",
    "dont": "don't",
    "youdve": "youdve",
    "youd've": "you'd've",
    "x-ray": "x ray",
    "x - ray": "x ray",
    "None": "0",
    "somebody'd": "somebodyd",
    "(yes)": "yes",
    "what?!": "what",
    "end. of": "end of",
}


@pytest.mark.parametrize(("text", "expected"), VQA_PROBES.items())
def test_vqa_normalisation_is_the_official_one(text, expected):
    assert vqa_answer(text) == expected


def test_vqa_soft_by_count_of_annotators():
    # min(1, n/3) leave-one-out over ten answers; n annotators gave the answer
    for n, expected in enumerate([0, 30, 60, 90, 100, 100, 100, 100, 100, 100, 100]):
        references = ["yes"] * n + [f"other {i}" for i in range(10 - n)]
        assert score("vqa_soft", "Yes.", references) == pytest.approx(expected)
    assert score("vqa_soft", "cat", ["cat", "dog"]) == 100  # too few to leave one out
    assert score("vqa_soft", "the", ["a"] * 10) == 0  # both empty once articles are dropped


# --- Edit distances -------------------------------------------------------------------------------------------------


def test_anls_by_hand():
    assert score("anls", "Pariz", "paris") == pytest.approx(80)  # 1 of 5
    assert score("anls", "par", "paris") == pytest.approx(60)  # 2 of 5
    assert score("anls", "ab", "abcd") == 0  # 2 of 4: the distance reaches one half
    assert score("anls", "two  words", ["x", "Two words"]) == 100


def test_latex_by_hand():
    assert latex_tokens(r"\[ \dfrac{1}{2}\, x^{2} \]") == [r"\frac", "1", "2", "x", "^", "2"]
    assert score("latex", r"$\frac12 x^2$", r"\tfrac{1}{2} x^{2}") == 100
    assert score("latex", "x^3", "x^2") == pytest.approx(100 * 2 / 3)
    assert score("latex", r"\frac{12}{3}", r"\frac{1}{23}") < 100


# --- Numbers and mathematics ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("1,000", "1000"),
        ("$1,000.50", "1000.5"),
        ("−5", "-5"),
        ("5.", "5"),
        (".5", "0.5"),
        ("1/2", "0.5"),
        ("½", "0.5"),
        ("50 %", "50"),
        ("50%", "0.5"),
        ("0.5", "50 percent"),
        ("5 cm", "5"),
        ("5 cm²", "5 cm^2"),
        ("3 million", "3,000,000"),
        ("$3 million", "3e6"),
        ("0.30000000000000004", "0.3"),
        ("-0", "0"),
        ("３", "3"),
        ("unanswerable", "Unanswerable"),
    ],
)
def test_number_right(answer, reference):
    assert score("number", answer, reference) == 100


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("-5", "5"),
        ("3", "33"),
        ("5 cm", "5 m"),
        ("50%", "0.5%"),
        ("0.5", "5"),
        ("3 and 4", "3"),
        ("3,5", "35"),
        ("10²", "102"),
        ("1/0", "1"),
        ("3 million", "3"),
        ("1" * 5000, "1"),
        ("1e999999999", "1"),
    ],
)
def test_number_wrong(answer, reference):
    assert score("number", answer, reference) == 0


def test_number_reads_the_whole_text_or_nothing():
    assert to_number("see Figure 2") is None
    assert to_number("3. (see Figure 2)") is None
    assert to_number("-1,234.5 kg") == (to_number("-1234.5").value, "kg")


def test_relaxed_allows_five_percent_of_the_reference():
    assert score("relaxed", "105", "100") == 100
    assert score("relaxed", "105.1", "100") == 0
    assert score("relaxed", "95%", "1.0") == 100
    assert score("relaxed", "0.42%", "42") == 0
    assert score("relaxed", "0.001", "0") == 0
    assert score("relaxed", "-100", "100") == 0
    assert score("relaxed", "Blue", "blue") == 100
    assert score("relaxed", "blueish", "blue") == 0


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        (r"\frac12", "0.5", 100),
        ("so the answer is $\\frac{1}{2}$.", "1/2", 100),
        ("1+x^2", "x^2+1", 100),
        (r"\boxed{\sqrt{2}/2}", r"\frac{1}{\sqrt{2}}", 100),
        ("x = 3", "3", 100),
        ("-3", "3", 0),
        ("12", "1", 0),
        ("(1,3)", "3", 0),
        ("(1,3)", "[1,3]", 0),
        ("No solution.", "no solution", 100),
        ("9**9**9**9", "3", 0),
    ],
)
def test_math(answer, reference, expected):
    assert score("math", answer, reference) == expected


def test_math_works_off_the_main_thread():
    result = []
    thread = threading.Thread(target=lambda: result.append(score("math", "0.5", "1/2")))
    thread.start()
    thread.join()
    assert result == [100]


# --- Boxes ----------------------------------------------------------------------------------------------------------


def test_iou_by_hand():
    assert score("iou", "[0, 0, 2, 2]", "[1, 1, 3, 3]") == pytest.approx(100 / 7)
    assert score("iou", "[0, 0, 1, 1]", "[0, 0, 1, 0.5]") == 50
    assert score("bbox", "[0, 0, 1, 1]", "[0, 0, 1, 0.5]") == 0  # more than one half, not one half
    assert score("bbox", "[0, 0, 1, 1]", "[0, 0, 1, 0.51]") == 100
    assert score("iou", "[0, 0, 1, 1]", "[2, 2, 3, 3]") == 0


def test_iou_against_counted_cells():
    rng = random.Random(3)
    for _ in range(200):
        boxes = [sorted(rng.sample(range(9), 2)) + sorted(rng.sample(range(9), 2)) for _ in range(2)]
        boxes = [[x1, y1, x2, y2] for x1, x2, y1, y2 in boxes]
        a, b = ({(x, y) for x in range(x1, x2) for y in range(y1, y2)} for x1, y1, x2, y2 in boxes)
        assert score("iou", str(boxes[0]), str(boxes[1])) == pytest.approx(100 * len(a & b) / len(a | b))


@pytest.mark.parametrize(
    "answer", ["[0, 0, 1]", "no box", "[1, 1, 0, 0]", "[1, 0, 0, 1]", f"[{'1' * 400}, 0, 1, 1]", "[0.5, 0.5, 0.5, 0.5]"]
)
def test_a_bad_box_scores_nothing(answer):
    assert score("iou", answer, "[0, 0, 1, 1]") == 0


def test_a_point_is_right_where_the_reference_is_that_point():
    assert score("bbox", "[0.5,0.5,0.5,0.5]", "[0.50, 0.50, 0.50, 0.50]") == 100


def test_digits_of_a_name_are_no_coordinates():
    assert score("iou", "x1=0.1, y1=0.2, x2=0.3, y2=0.4", "[0.1, 0.2, 0.3, 0.4]") == 100


# --- The user's own -------------------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path, monkeypatch):
    def write(body):
        name = f"own_{abs(hash(body))}"
        (tmp_path / f"{name}.py").write_text(body)
        monkeypatch.chdir(tmp_path)
        return f"{name}:grade"

    return write


def test_own_scorer(own):
    scorer = get_scorer(own("def grade(response, references, sample):\n    return len(response) + sample['bonus']\n"))
    assert scorer.score("abc", ["x"], {"id": "s1", "bonus": 4}) == 7
    assert scorer.score("", ["x"], {"id": "s1", "bonus": 4}) == 0
    assert scorer.score(None, ["x"], {"id": "s1", "bonus": 4}) == 0
    assert scorer.right_from == 50
    assert get_scorer(own("def grade(r, refs, s): return 1\ngrade.right_from = 80\n")).right_from == 80


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise KeyError('x')", "sample s1: KeyError"),
        ("return float('nan')", "sample s1: returned nan"),
        ("return 101", "returned 101"),
        ("return -1", "returned -1"),
        ("return None", "sample s1: TypeError"),
    ],
)
def test_own_scorer_that_fails_names_the_sample(own, body, message):
    scorer = get_scorer(own(f"def grade(response, references, sample):\n    {body}\n"))
    with pytest.raises(InputError, match=message):
        scorer.score("abc", ["x"], {"id": "s1"})


def test_own_scorer_that_is_not_there(own):
    name = own("grade = 3\n")
    for wrong in (name, name.replace("grade", "none"), "no_such_module:grade", ":grade"):
        with pytest.raises(InputError):
            get_scorer(wrong)


def test_a_users_scorer_is_known_by_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = tmp_path / "grader_of_mine.py"
    module.write_text("def grade(answer, references, sample):\n    return 0\n")
    before = scorer_identity("grader_of_mine:grade")
    assert scorer_identity("grader_of_mine:grade") == before != scorer_identity("anls") == "anls"
    module.write_text("def grade(answer, references, sample):\n    return 100\n")
    assert scorer_identity("grader_of_mine:grade") != before
