"""`mcit show`: what is marked as carrying loss is what the assistant says, and nothing else."""

import json
from pathlib import Path

import pytest
from PIL import Image

from mcit.data_prep.errors import InputError
from mcit.pipeline.data_tools.show import read_stage, show_stage
from mcit.pipeline.recipe.layers import RECIPES
from mcit.pipeline.recipe.loading import load_recipe
from mcit.pipeline.recipe.schema import Recipe
from mcit.pipeline.run.terminal import Terminal


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Recipe:
    """Two tasks of one's own: a dialogue about two pictures, and text alone."""
    monkeypatch.setenv("MCIT_CACHE", str(tmp_path / "cache"))
    for number, size in enumerate([(28, 28), (56, 84)]):
        Image.new("RGB", size, "red").save(tmp_path / f"{number}.png")
    turns = ["<image>\n<image>\nWhich colour?", "Red.", "And the second?", "Red too."]
    talk = [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]
    rows = [{"id": f"d{i}", "image": ["0.png", "1.png"], "conversations": talk} for i in range(3)]
    (tmp_path / "talk.json").write_text(json.dumps(rows))
    words = [{"id": f"w{i}", "prompt": f"What is {i} + 1?", "completion": str(i + 1)} for i in range(40)]
    (tmp_path / "words.jsonl").write_text("\n".join(map(json.dumps, words)))
    (tmp_path / "r.yaml").write_text(
        f"name: shown\nbase_model: {{path: {RECIPES / 'mini' / 'tiny_vlm'}, dtype: float32}}\nstream:\n"
        "  - {name: talk, train: talk.json, test: talk.json, style: brief}\n"
        "  - {name: words, train: words.jsonl, test: words.jsonl, style: number}\n"
    )
    return load_recipe(tmp_path / "r.yaml")


def test_only_the_assistant_s_turns_carry_loss(recipe):
    (shown,) = read_stage(recipe, 1, 1)
    assert [span.text.removesuffix("<|im_end|>") for span in shown.spans if span.loss] == ["Red.", "Red too."]
    around = "".join(span.text for span in shown.spans if not span.loss)
    assert "Which colour?" in around and "And the second?" in around and "Red" not in around


def test_images_come_with_their_size_and_tokens(recipe):
    (shown,) = read_stage(recipe, 1, 1)
    assert [(Path(path).name, size) for path, size, _ in shown.images] == [("0.png", (28, 28)), ("1.png", (56, 84))]
    tokens = [count for _, _, count in shown.images]
    assert all(tokens) and tokens[1] > tokens[0]
    text = "".join(span.text for span in shown.spans)
    assert text.count("<|image_pad|>") == 2 and f"<|image_pad|>×{tokens[1]}" in text
    # Tokens are counted with images expanded: a byte a token, but for the special ones.
    assert sum(span.tokens for span in shown.spans) > sum(tokens)


def test_before_and_after_asd_and_what_the_gold_answer_scores(recipe):
    recipe.method = {"asd": {"fraction": 0.5, "converter": "rules"}}
    samples = read_stage(recipe, 2, 4)
    converted = [shown for shown in samples if shown.native]
    assert len(samples) == 4 and len(converted) == 2
    for shown in converted:
        assert shown.native["style"] == "number" != shown.sample["style"]
        assert shown.native["id"] == shown.sample["id"]
    assert {shown.gold["verdict"] for shown in samples} == {"correct"}


def test_a_blurred_stage_shows_what_it_trains(recipe, capsys):
    recipe.blur = 0.5
    visiting, at_home = (
        {shown.sample["id"]: shown.visits for shown in read_stage(recipe, k, 40) if shown.sample["task"] == "words"}
        for k in (1, 2)
    )
    assert set(visiting.values()) == {True} and set(at_home.values()) == {False}
    assert sorted([*visiting, *at_home]) == sorted(f"w{number}" for number in range(40))
    show_stage(recipe, 1, 1, Terminal())
    assert capsys.readouterr().out.count("· visits this stage ·") == 1


def test_without_a_terminal_brackets_mark_the_loss(recipe, capsys):
    show_stage(recipe, 2, 1, Terminal())
    out = capsys.readouterr().out
    assert "── words w0 · number" in out and "[[1<|im_end|>]]" in out and "scores 100.0 (correct)" in out


def test_a_model_that_cannot_be_had_is_one_line(recipe, tmp_path, monkeypatch):
    recipe.base_model.path = str(tmp_path)
    with pytest.raises(InputError, match="base_model: its processor cannot be loaded") as error:
        read_stage(recipe, 1, 1)
    assert "\n" not in str(error.value)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    recipe.base_model.path = "acme/no-such-model"
    with pytest.raises(InputError, match=r"base_model\.path: neither a folder nor a model that could be had"):
        read_stage(recipe, 1, 1)


def test_a_stage_that_is_not_there(recipe):
    with pytest.raises(InputError, match="the stream has stages 1 to 2"):
        read_stage(recipe, 3, 1)
