"""The embedded model's pretraining: what its rows hold, when its lessons end, what its optimizer does."""

import re

import numpy as np
import pretrain
import pytest
import torch
from lessons import agree, caption, choose, opening, pack, questions
from muon import orthogonalise
from PIL import Image
from random_model import PRETRAINED
from tiny import build_tokenizer
from tower import _ink
from transformers import AutoProcessor

from mcit.data_prep.mini import facts


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(PRETRAINED)


def rows_of(rng, processor, rows):
    """Every row as text, and its answers: [(what stands before, the answer)]."""
    batch, decode = pack(rows, processor), processor.tokenizer.decode
    for _, row, first, end in batch.answers:
        ids = batch.inputs["input_ids"][row]
        assert (batch.labels[row, first:end] == ids[first:end]).all() and batch.labels[row, first - 1] == -100
        yield decode(ids[:first]), decode(ids[first:end])


@pytest.mark.parametrize("near", [True, False])
def test_a_choice_is_only_asked_from_the_list_above_it(processor, near):
    rng, asked = np.random.default_rng(0), 0
    for before, answer in rows_of(rng, processor, [choose(rng, near) for _ in range(20)]):
        word = re.findall(r"The answer is ([^.\n]*)\.?\n?$", before)[-1]
        options = {}
        for letter, option in re.findall(r"^([A-D])\. (.*)$", before, re.MULTILINE):
            options = {letter: option} if letter == "A" else options | {letter: option}
        assert options[answer.strip()] == word
        asked += 1
    assert asked > 150


def test_agreement_is_right(processor):
    rng, verdicts = np.random.default_rng(0), set()
    for before, answer in rows_of(rng, processor, [agree(rng, near=False) for _ in range(10)]):
        pair = re.findall(r'The answer is (.*?)\.\s(?:Is it (.*)\?|Is "(.*)" the right answer\?)', before)[-1]
        assert (pair[0] == pair[1] + pair[2]) == (answer == "Yes\n")
        verdicts.add(answer)
    assert verdicts == {"Yes\n", "No\n"}


def test_an_opening_is_what_the_chat_template_gives(processor):
    picture, _ = facts.scene_facts(np.random.default_rng(0))
    content = [{"type": "image"}, {"type": "text", "text": "Where is it?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    real = processor(text=[text], images=[picture])["input_ids"][0]
    assert processor.tokenizer(opening("Where is it?", True), add_special_tokens=False)["input_ids"] == real


def test_every_word_that_is_taught_is_one_token():
    rng, tokenizer = np.random.default_rng(0), build_tokenizer()
    for source in facts.SOURCES:
        if source is facts.echo_facts:
            continue  # random characters
        for fact in [fact for _ in range(20) for fact in source(rng)[1]]:
            for style, reasoning in facts.styles_of(fact):
                for text in facts.ask(rng, fact, style, reasoning)[:2]:
                    for word in re.findall(r" ?[A-Za-z]+", text):
                        assert len(tokenizer(word)["input_ids"]) == 1, word


def test_the_tower_is_asked_for_each_tokens_own_pixels():
    """A picture white in one 2×2 block, the first of the token in row 1, column 2, and black elsewhere."""
    pixels = np.zeros((64, 64), np.uint8)
    pixels[16:18, 32:34] = 255
    ink = _ink([Image.fromarray(pixels).convert("RGB")])
    assert ink.shape == (1, 16, 64) and ink[0, 4 + 2, 0] == 1 and ink.sum() == 1


def test_rows_of_pictures_hold_their_picture_once(processor):
    rng = np.random.default_rng(0)
    sources = [facts.scene_facts, facts.chart_facts, facts.letter_facts]
    rows = [row for source in sources for row in (caption(rng, source), questions(rng, source, {}))]
    ids = pack(rows, processor).inputs["input_ids"]
    assert ((ids == processor.image_token_id).sum(1) == 16).all()


def test_what_is_not_learned_in_time_ends_the_script(monkeypatch):
    monkeypatch.setattr(pretrain, "PATIENCE", 3)
    accuracy = {"choose": 1.0}
    lesson = pretrain.agreement(np.random.default_rng(0), accuracy)
    for _ in range(3):
        next(lesson)
    with pytest.raises(SystemExit, match=r"not known after 3 steps: agree$"):
        next(lesson)


def test_a_lesson_ends_once_all_of_it_is_known():
    known = dict.fromkeys(("choose", "agree", "agree from afar"), 1.0)
    assert list(pretrain.agreement(np.random.default_rng(0), known)) == []
    far = pretrain.agreement(np.random.default_rng(0), known | {"agree from afar": 0.9})
    rows, _ = next(far)
    assert any(name == "agree from afar" for row in rows for _, _, name in row.turns)


def test_the_shipped_tokenizer_is_the_one_that_the_script_builds(processor):
    assert processor.tokenizer.backend_tokenizer.to_str() == build_tokenizer().backend_tokenizer.to_str()


@pytest.mark.parametrize("source", [facts.scene_facts, facts.chart_facts, facts.letter_facts])
def test_a_caption_tells_each_fact_once_and_truly(source):
    _, known = source(np.random.default_rng(4))
    told = caption(np.random.default_rng(4), source)
    sentences = "".join(given + wanted for given, wanted, _ in told.turns).split("assistant\n")[1].split("\n")
    truths = {f"{fact.think} {fact.answer}" if fact.style == "bbox" else fact.think for fact in known}
    assert sorted(sentences) == sorted(truths)
    answers = {(f"told {fact.name}", fact.answer) for fact in known}
    for _, wanted, name in told.turns:
        assert name == "caption" or any(name == fact and wanted.startswith(f" {answer}") for fact, answer in answers)


def test_the_learning_rate_falls_in_the_last_lesson():
    lesson = pretrain.last(np.random.default_rng(0), {}, 4)
    assert [share for _, share in lesson] == [1.0, 0.75, 0.5, 0.25]


def test_captions_describe_what_is_known_least():
    """Letters known and charts half known: a scene's chance is 1.05 of 1.65."""
    known = {"told letter": 1.0, "told bar_colour": 0.5, "told box_of_bar": 0.9}
    lesson = pretrain.captions(np.random.default_rng(0), known)
    rows = [row for _ in range(20) for row in next(lesson)[0] if row.picture is not None]
    scenes = [row for row in rows if any(name == "told colour_at" for _, _, name in row.turns)]
    assert abs(len(scenes) / len(rows) - 1.05 / 1.65) < 0.1


@pytest.mark.parametrize("shape", [(3, 16, 48), (3, 48, 16)])
def test_orthogonalised_matrices_keep_their_directions_and_lose_their_lengths(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, lengths, right = torch.linalg.svd(matrices, full_matrices=False)
    lengths = left.mT @ orthogonalise(matrices) @ right.mT
    diagonal = lengths.diagonal(dim1=1, dim2=2)
    assert (diagonal > 0.6).all() and (diagonal < 1.3).all()
    torch.testing.assert_close(lengths, torch.diag_embed(diagonal), atol=1e-4, rtol=0)
