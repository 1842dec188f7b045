"""ASD by a model that sees the image, as SEFE does it: it supplies wrong answers and explanations, rules the rest.

Rules are as good, and free, where the answer is one of few or can be computed: yes and no, numbers, boxes, the labels
of a label task, the options of a multiple-choice question. For everything else the model is asked.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..answers import sentences
from ..endpoint import Answer, Endpoint, Picture, Prompt, Question
from ..schema import Style
from .acceptance import LONGEST_OPTION, accept_explanation, accept_wrong, read_reply
from .prompts import VERSION, ask_explanation, ask_wrong
from .rules import Rules
from .turns import Job, Material, Turn, Unreachable

_BY_RULE = ("yes_no", "number", "bbox")  # kinds of answers whose wrong ones rules find


class Llm:
    """Converts with a model behind an endpoint. `pictures` are the images by the names that samples give them."""

    patience = 3  # failures for each sample wanted: a model that is right one time in four still fills its part

    at_once = None  # the endpoint is kept busy, and tells how far it is in all

    def __init__(self, endpoint: Endpoint, pictures: Mapping[str, Picture]):
        self._rules, self._endpoint, self._pictures = Rules(), endpoint, pictures
        self._usage: Counter[str] = Counter()
        self._not_taken = ""

    def learn(self, turns: Sequence[Turn]) -> None:
        """Take note of the answers of a dialogue, for what is done by rule."""
        self._rules.learn(turns)

    def why_not(self, turn: Turn, style: Style) -> str | None:
        """Why a turn cannot be put into a style, as far as that is known without asking."""
        if _by_rule(turn, style):
            return self._rules.why_not(turn, style)
        if turn.content is None:
            return "the answer names none of the options"
        if not turn.question:
            return "no question besides the format sentence"
        long = len(turn.content.split()) > LONGEST_OPTION or len(sentences(turn.content)) != 1
        if style in ("mcq", "yes_no") and turn.kind is None and long:
            return "the answer is too long for an option"
        return None

    def supply(self, jobs: Sequence[Job]) -> list[Material | Unreachable]:
        """The material of each job, or why there is none; what has to be asked is asked at once."""
        material: dict[int, Material | Unreachable] = {}
        by_rule = [i for i, job in enumerate(jobs) if _by_rule(job.turn, job.style)]
        material.update(zip(by_rule, self._rules.supply([jobs[i] for i in by_rule]), strict=True))
        asked = [i for i in range(len(jobs)) if i not in material]
        prompts = [_prompt(jobs[i]) for i in asked]
        answers = self._endpoint.ask(
            [
                Question(prompt, tuple(self._pictures[name] for name in jobs[i].images))
                for i, prompt in zip(asked, prompts, strict=True)
            ]
        )
        for i, prompt, answer in zip(asked, prompts, answers, strict=True):
            material[i] = self._read(jobs[i], prompt, answer)
        return [material[i] for i in range(len(jobs))]

    def provenance(self) -> dict[str, Any]:
        """What the report and every converted sample say of the converter."""
        return {"converter": "llm", "model": self._endpoint.config.model, "prompts": VERSION}

    def usage(self) -> dict[str, Any]:
        """Questions and tokens, whether answered now or from the cache, and the endpoint's first objection."""
        return {**self._usage, **({"first_not_taken": self._not_taken} if self._not_taken else {})}

    def _read(self, job: Job, prompt: Prompt, answer: Answer) -> Material | Unreachable:
        self._usage["questions"] += 1
        self._usage["prompt_tokens"] += answer["prompt_tokens"]
        self._usage["completion_tokens"] += answer["completion_tokens"]
        try:
            if answer["refused"]:
                self._not_taken = self._not_taken or answer["refused"]
                raise Unreachable("the endpoint did not take the question")
            if answer["finish_reason"] in ("refusal", "content_filter"):
                raise Unreachable("the model refused")
            if answer["finish_reason"] == "length":
                raise Unreachable("the reply was cut off")
            texts = read_reply(answer["content"], list(prompt.schema["properties"]))
            if job.style in ("mcq", "yes_no"):
                how = "the model's wrong answers" if job.style == "mcq" else "the model's wrong answer"
                return Material(how, accept_wrong(texts, job.turn))
            text = accept_explanation(texts[0], job.turn, job.style)
            return Material("the model's explanation", text=text, options=job.turn.options)
        except Unreachable as why:
            return why


def _by_rule(turn: Turn, style: Style) -> bool:
    """Whether no model is needed."""
    if style in ("brief", "detailed"):
        return False
    from_own_options = turn.style == "mcq" and style == "yes_no"
    return style == "short" or from_own_options or turn.style == "label" or turn.kind in _BY_RULE


def _prompt(job: Job) -> Prompt:
    if job.style in ("brief", "detailed"):
        return ask_explanation(job)
    return ask_wrong(job, 3 if job.style == "mcq" else 1)
