"""The style of a task's samples, and whether their gold answers have its form."""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import cast

from .errors import InputError
from .schema import Message, Sample, Style
from .styles import infer_style, parse, split_prompt, split_reasoning

_ENOUGH_TO_INFER = 2000  # samples looked at to infer a style


def choose_style(named: Counter[str], samples: Iterable[Sample]) -> Style:
    """The style that most samples name, or, where some name none, what the answers of those look like.

    `named` counts the styles of `samples`, under "" those that name none.
    """
    unnamed = named[""]
    if not unnamed:
        return cast(Style, named.most_common(1)[0][0])
    answers, questions = [], []
    stride = max(1, unnamed // _ENOUGH_TO_INFER)
    for sample in islice((sample for sample in samples if not sample["style"]), 0, None, stride):
        answers.append(final_answer(sample["completion"]))
        questions.append(last_question(sample))
    return infer_style(answers, questions)


def give_style(sample: Sample, style: Style, formats: Sequence[str]) -> None:
    """Give a sample that names no style its task's, and an mcq the options that its question lists."""
    sample["style"] = sample["style"] or style
    if sample["style"] == "mcq" and "options" not in sample["meta"]:
        options = split_prompt(last_question(sample), formats)[1]
        if options:
            sample["meta"]["options"] = options


def final_answer(completion: list[Message]) -> str:
    """The last assistant turn's answer, without any thinking."""
    return split_reasoning(completion[-1]["content"], "think")[1]


def last_question(sample: Sample) -> str:
    """The user turn that the last answer is to."""
    turns = [*sample["prompt"], *sample["completion"]]
    return [message["content"] for message in turns if message["role"] == "user"][-1]


def has_form(sample: Sample) -> bool:
    """Whether the gold answer has the form of the sample's style."""
    options = sample["meta"].get("options")
    return parse(sample["style"], final_answer(sample["completion"]), options=options).format_ok


class GoldForms:
    """What is to be said of a part's gold answers once all have been looked at."""

    def __init__(self) -> None:
        self.samples = self.fewest_references = 0
        self.formless = self.untagged = 0
        self.first_formless: Sample | None = None
        self.first_untagged: Sample | None = None

    def look(self, sample: Sample) -> None:
        """One more."""
        references = len(sample["references"])  # never 0
        self.fewest_references = min(self.fewest_references or references, references)
        self.samples += 1
        if not has_form(sample):
            self.formless += 1
            self.first_formless = self.first_formless or sample
        if not split_reasoning(sample["completion"][-1]["content"], sample["reasoning"])[2]:
            self.untagged += 1
            self.first_untagged = self.first_untagged or sample

    def notes(self, task: str, part: str) -> list[str]:
        """What is odd. Raises `InputError` where most have not the form that strict scoring would look for."""
        notes = []
        if first := self.first_formless:
            answer, style = final_answer(first["completion"]), first["style"]
            if self.formless > self.samples / 2:
                raise InputError(
                    f"{self.formless} of {self.samples} {part} answers do not have the form of style {style}",
                    where=task,
                    field=f"sample {first['id']}, answer {answer[:60]!r}",
                    remedy="Name another `style:` for the task, or none to have it inferred",
                )
            notes.append(
                f"{part}: {self.formless} answers do not have the form of their style; "
                f"the first: {first['id']}: {answer[:60]!r}"
            )
        if first := self.first_untagged:
            notes.append(
                f"{part}: {self.untagged} answers are not in the form of reasoning {first['reasoning']!r}; "
                f"the first: {first['id']}"
            )
        return notes
