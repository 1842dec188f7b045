"""Protocols against what the authors' own code said of the same answers, and what holds for all of them."""

import json
import math
from pathlib import Path

import pytest

from mcit.data_prep.errors import InputError
from mcit.data_prep.styles import default_scorer
from mcit.eval.cells import _scoring_code
from mcit.eval.protocols import FAMILIES, PROTOCOLS
from mcit.eval.scorers import SCORERS, get_scorer, scorer_identity
from mcit.eval.scoring import score_response

# Made by running the authors' functions, at the commits that `eval/protocols/` names, on answers of ours.
PROBES = [json.loads(line) for line in (Path(__file__).parent / "fixtures/protocols.jsonl").read_text().splitlines()]

CAPTIONS = {"mcitlib:vizwiz", "mcitlib:flickr30k"}  # test_captions.py holds them against libraries: theirs needs Java


def sample(*references, style="short", **more):
    meta = {"options": more.pop("options", None)}
    return {"id": "s1", "references": list(references), "style": style, "reasoning": "none", "meta": meta, **more}


@pytest.mark.parametrize("name", sorted({probe["protocol"] for probe in PROBES}))
def test_the_authors_code_says_the_same(name):
    for probe in (probe for probe in PROBES if probe["protocol"] == name):
        asked = sample(*probe["references"], **probe.get("sample", {}))
        assert PROTOCOLS[name].score(probe["response"], asked["references"], asked) == pytest.approx(probe["score"]), (
            probe
        )


def test_every_protocol_was_held_against_its_authors_code():
    assert {probe["protocol"] for probe in PROBES} | CAPTIONS == set(PROTOCOLS)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocol_is_found_by_name_and_known_by_it(name):
    scorer = get_scorer(name)
    assert scorer.name == name and scorer.whole and scorer_identity(name) == name


@pytest.mark.parametrize("name", PROTOCOLS)
def test_any_response_gets_a_number(name):
    asked = sample("[0.1, 0.2, 0.3, 0.4]", *["yes"] * 9, images=["AI2D_1.png"], prompt="Which states are red?")
    for response in (
        "",
        " ",
        "nan",
        "[",
        "1,2,3,4",
        "<answer>",
        "</think>",
        "\ud800",
        "²",
        "A. ",
        "a" * 20_000,
        "<think>" * 3_000,
    ):
        assert math.isfinite(get_scorer(name).score(response, asked["references"], asked))


@pytest.mark.parametrize("unit", ["<think>", "<answer>", "1.", "a ", "é", "C. "])
def test_ten_megabytes_of_one_thing(unit):
    flood = unit * (10_000_000 // len(unit))
    for name in PROTOCOLS.keys() - CAPTIONS:
        asked = sample("[0.1, 0.2, 0.3, 0.4]", *["yes"] * 9, images=["AI2D_1.png"], prompt="Which?")
        assert score_response(asked, flood, get_scorer(name))["verdict"]


def test_only_known_defects_let_an_empty_answer_score():
    asked = sample("tabby cat", *["yes"] * 9, images=["AI2D_1.png"], prompt="Which?")
    boxed = sample("[0.1, 0.2, 0.3, 0.4]")
    scored = {
        name
        for name, protocol in PROTOCOLS.items()
        if protocol.score("", (boxed if "grounding" in name else asked)["references"], asked) > 0
    }
    assert scored == {"coin:imagenet", "sefe:imagenet"}


def test_a_protocol_judges_the_whole_response_and_the_form_stays_ours():
    asked, protocol = sample("no", style="yes_no"), get_scorer("mcitlib:med")
    result = score_response(asked, " <b>No</b> idea, unknown. ", protocol)
    assert (result["score"], result["verdict"]) == (100, "wrong_format")
    assert result["parsed"] == "<b>No</b> idea, unknown."
    assert score_response(asked, "no", protocol)["verdict"] == "correct"
    assert score_response(asked, "no", protocol, finished=False)["verdict"] == "wrong_format"
    assert score_response(asked, "yes", protocol)["verdict"] == "wrong_content"


@pytest.mark.parametrize(
    ("name", "asked", "message"),
    [
        ("coin:textvqa", sample("red", "blue"), "sample s1: references: TextVQA's evaluator wants ten answers, not 2"),
        ("coin:grounding", sample("top left"), "sample s1: references: 'top left' is no box"),
        ("mcitlib:sci", sample("yes"), "sample s1: image: "),
        ("mcitlib:sci", sample("yes", images=["MapQA_1.png"]), "sample s1: prompt: "),
        ("mcitlib:sci", {**sample("yes"), "images": 5}, "sample s1: image: "),
        ("mcitlib:sci", {**sample("yes", images=["MapQA_1.png"]), "prompt": [5]}, "sample s1: prompt: "),
    ],
)
def test_what_a_protocol_lacks_is_named(name, asked, message):
    with pytest.raises(InputError, match=message):
        get_scorer(name).score("x", asked["references"], asked)


def test_the_names_of_families_do_not_hide_kinds():
    assert not set(FAMILIES) & set(SCORERS)
    assert default_scorer("label") == "label"


def test_the_code_that_scores_is_known(tmp_path, monkeypatch):
    """A cell is scored again when any file that scores has changed, protocols included."""
    import mcit.eval.cells as cells

    root = Path(cells.__file__).parent
    seen = []
    monkeypatch.setattr(cells, "hash_files", lambda paths, base: seen.extend(Path(path) for path in paths) or "hash")
    _scoring_code.__wrapped__()
    scoring = {
        *root.glob("kinds/*.py"),
        *root.glob("protocols/*.py"),
        root / "scorers.py",
        root / "scoring.py",
        root / "text.py",
        *(root.parent / "data_prep" / name for name in ("answers.py", "extraction.py", "styles.py")),
    }
    assert {path.resolve() for path in scoring} <= {path.resolve() for path in seen}
