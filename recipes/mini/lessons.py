"""What a batch of pretraining holds: pictures described, drills in matching, and questions in every style.

Everything is a row of turns: text without loss, text with loss, and the name its accuracy is counted under.
"""

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from tiny import IMAGE_TOKENS
from transformers import Qwen2_5_VLProcessor

from mcit.data_prep.mini import facts, world
from mcit.data_prep.styles import state_proposition

LENGTH = 144  # tokens a row
Source = Callable[[np.random.Generator], tuple[Image.Image | None, list[facts.Fact]]]


@dataclass(frozen=True)
class Row:
    """Turns (given, wanted, name), about a picture or none."""

    picture: Image.Image | None
    turns: Sequence[tuple[str, str, str]]


@dataclass
class Batch:
    """The model's inputs and labels, [rows, 144], and each wanted text's name, row, first token and end."""

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    answers: list[tuple[str, int, int, int]]

    def to(self, device: str) -> "Batch":
        """The same with its tensors on `device`."""
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        return Batch(inputs, self.labels.to(device), self.answers)


def opening(prompt: str, picture: bool) -> str:
    """A user turn up to where the answer begins, exactly as the chat template gives it."""
    image = "<|vision_start|>" + "<|image_pad|>" * IMAGE_TOKENS + "<|vision_end|>" if picture else ""
    return f"<|im_start|>user\n{image}{prompt}<|im_end|>\n<|im_start|>assistant\n"


def questions(rng: np.random.Generator, source: Source, accuracy: dict[str, float], native: bool = False) -> Row:
    """One picture's facts, each once (a second time, the first answer would give it away), in styles known least.

    `accuracy` is the share of right answers lately, 0–1, by fact × style; `native` asks in native styles alone.
    """
    picture, known = source(rng)
    turns = []
    for place in rng.permutation(len(known)):
        fact = known[place]
        styles = facts.styles_of(fact)[: 1 if native else None]
        names = [f"{fact.name} {' '.join(style)}" for style in styles]
        weights = np.array([1.1 - accuracy.get(name, 0.5) for name in names])
        choice = rng.choice(len(styles), p=weights / weights.sum())
        prompt, answer, _ = facts.ask(rng, fact, *styles[choice])
        given = opening(prompt, picture is not None and not turns)
        turns.append((("\n" if turns else "") + given, f"{answer}<|im_end|>", names[choice]))
    return Row(picture, turns)


def caption(rng: np.random.Generator, source: Source) -> Row:
    """A picture described sentence by sentence, in random order: many more words a picture than questions hold.

    What a fact's answer is, its words and what follows them, is counted under its name: the rest of a sentence is for
    the picture's describer to choose.
    """
    picture, known = source(rng)
    sentences = {}
    for fact in known:
        before, _, after = (fact.think, "", "") if fact.style == "bbox" else fact.think.partition(f" {fact.answer}")
        told = f" {fact.answer}{after}"
        sentences.setdefault(before + told, [(before, "caption"), (told, f"told {fact.name}")])
    turns, given = [], opening("Describe the picture.", True)
    for number in rng.permutation(len(sentences)):
        for text, name in list(sentences.values())[number]:
            turns.append((given, text, name))
            given = ""
        given = "\n"
    return Row(picture, turns)


def _words(rng: np.random.Generator) -> list[str]:
    """All answers of one kind, shuffled."""
    kinds = (tuple(world.COLOURS), world.SHAPES, world.CORNERS, world.ORDINALS, tuple(world.LETTERS))
    return [str(word) for word in rng.permutation(list(kinds[rng.integers(len(kinds))]))]


def choose(rng: np.random.Generator, near: bool) -> Row:
    """Which letter stands before a word; every option of a list is asked for.

    From near the letter often follows the word itself: a head that finds the word in the list is then of use at once,
    and else there is a long plateau at what is left when options already named are ruled out.
    """
    turns = []
    for _ in range(8):
        options = _words(rng)[: rng.integers(2, 5)]
        listed = (f"{letter}. {option}\n" for letter, option in zip(string.ascii_uppercase, options, strict=False))
        before = "\n" + "".join(listed)
        for i in rng.permutation(len(options)):
            given = f"The answer is {options[i]}" + str(rng.choice(["", "."] if near else [".", ".\n"]))
            turns.append((before + given, string.ascii_uppercase[i], "choose"))
            before = "\n"
    return Row(None, turns)


def agree(rng: np.random.Generator, near: bool) -> Row:
    """Whether two words are the same. Asked from further away this is learned only after it is known from near."""
    turns = []
    for _ in range(12):
        answer, other = _words(rng)[:2]
        same = bool(rng.random() < 0.5)
        candidate = answer if same else other
        if near or rng.random() < 0.4:
            given, name = f"The answer is {answer}. Is it {candidate}?\n", "agree"
        else:
            given, name = state_proposition(f"The answer is {answer}.", candidate) + "\n", "agree from afar"
        turns.append((given, "Yes\n" if same else "No\n", name))
    return Row(None, turns)


def pack(rows: list[Row], processor: Qwen2_5_VLProcessor) -> Batch:
    """Tokenize; a row ends before the first turn that it has no room for (the turns after may need that one's list)."""
    encode = processor.tokenizer.backend_tokenizer.encode
    ids = torch.full((len(rows), LENGTH), processor.tokenizer.pad_token_id)
    labels, attention, answers = torch.full_like(ids, -100), torch.zeros_like(ids), []
    for number, row in enumerate(rows):
        used = 0
        for given, wanted, name in row.turns:
            head, body = (encode(text, add_special_tokens=False).ids for text in (given, wanted))
            start, end = used + len(head), used + len(head) + len(body)
            if end > LENGTH:
                break
            ids[number, used:end] = torch.tensor(head + body)
            labels[number, start:end] = torch.tensor(body)
            attention[number, used:end] = 1
            answers.append((name, number, start, end))
            used = end
    inputs = {
        "input_ids": ids,
        "attention_mask": attention,
        "mm_token_type_ids": (ids == processor.image_token_id).int(),
    }
    pictures = [row.picture for row in rows if row.picture is not None]
    if pictures:
        inputs |= processor.image_processor(images=pictures, return_tensors="pt")
    return Batch(inputs, labels, answers)
