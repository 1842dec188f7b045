"""Who judges: a model behind an endpoint, or a program. Both say the same of a case, and neither ever guesses."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from mcit.data_prep.endpoint import Answer, Endpoint, Picture, Question
from mcit.data_prep.errors import InputError
from mcit.data_prep.readers import load_function, source_identity
from mcit.data_prep.schema import Sample

from ..config import JudgeConfig
from .prompts import Unreadable, Verdict, dimensions_of, judge_prompt, read_verdict
from .rubrics import DIMENSIONS, VERSION, Dimension

# judged: has scores. absent: the policy gave no reasoning, which is worth 0. cut: it was still reasoning when the token
# limit came. unreadable: no reply of the judge was a verdict. refused: the endpoint would not take the question.
Outcome = Literal["judged", "absent", "cut", "unreadable", "refused"]


class Case(NamedTuple):
    """A response with reasoning in it, and what it answers."""

    sample: Sample
    pictures: tuple[Picture, ...]
    response: str
    think: str
    rubric: str


class Judgement(NamedTuple):
    """What became of a case; `remark` is the judge's comment, or why there is no verdict."""

    outcome: Outcome
    verdict: Verdict | None
    remark: str
    attempts: int


class Judge(Protocol):
    """Rates reasoning."""

    def judge(self, cases: Sequence[Case]) -> list[Judgement]:
        """A judgement a case. Raises `InputError` where the judge cannot be used; what it said until then is kept."""
        ...


def make_judge(config: JudgeConfig | str, cache: Path, show: Callable[[str], None]) -> Judge:
    """The judge that `eval.judge` of a recipe means. Raises `InputError` for a program that cannot be imported."""
    return ProgramJudge(config) if isinstance(config, str) else ModelJudge(config, cache, show)


def judge_identity(config: JudgeConfig | str) -> dict[str, Any]:
    """What judgements depend on beside the cases, recorded with every score: the model, how it is asked and the version
    of the rubrics; or the program and its code. Raises `InputError` for a program that cannot be imported."""
    if isinstance(config, str):
        return {"program": config, "code": source_identity(config, Path.cwd())}
    return {**config.identity(), "rubric_version": VERSION}


class ModelJudge:
    """A model behind an endpoint; its replies are kept in `cache/judge/`, so each question is asked once."""

    def __init__(self, config: JudgeConfig, cache: Path, show: Callable[[str], None]):
        self.config, self.endpoint = config, Endpoint(config, cache / "judge", VERSION, show)

    def judge(self, cases: Sequence[Case]) -> list[Judgement]:
        """Ask about every case; what is no verdict is asked again, and after `attempts` replies counted as such."""
        found: dict[int, Judgement] = {}
        for attempt in range(1, self.config.attempts + 1):
            left = [i for i in range(len(cases)) if i not in found or found[i].outcome == "unreadable"]
            answers = self.endpoint.ask([self._question(cases[i], attempt) for i in left])
            found.update({i: _judgement(cases[i], answer, attempt) for i, answer in zip(left, answers, strict=True)})
        return [found[i] for i in range(len(cases))]

    def _question(self, case: Case, attempt: int) -> Question:
        asked = dimensions_of(case.sample)
        prompt = judge_prompt(case.sample, case.response, case.rubric, self.config.instructions, asked, attempt)
        return Question(prompt, case.pictures)


def _judgement(case: Case, answer: Answer, attempt: int) -> Judgement:
    if answer["refused"]:
        return Judgement("refused", None, answer["refused"], attempt)
    if answer["finish_reason"] in ("refusal", "content_filter"):
        return Judgement("refused", None, "the judge refused", attempt)
    if answer["finish_reason"] == "length":
        return Judgement("unreadable", None, "the reply was cut off", attempt)
    try:
        verdict = read_verdict(answer["content"], dimensions_of(case.sample))
    except Unreadable as why:
        return Judgement("unreadable", None, str(why), attempt)
    return Judgement("judged", verdict, verdict.comment, attempt)


class ProgramJudge:
    """A function `(sample, think) -> {dimension: 0–100}`, of the dimensions that apply to the sample.

    It serves tasks whose reasoning can be checked exactly, such as those of the mini stream.
    """

    def __init__(self, name: str):
        self.name, self.function = name, load_function(name, Path.cwd())

    def judge(self, cases: Sequence[Case]) -> list[Judgement]:
        """Check every case. Raises `InputError` where the function fails, or returns no scores."""
        return [Judgement("judged", Verdict(self._scores(case), ""), "", 1) for case in cases]

    def _scores(self, case: Case) -> dict[Dimension, float]:
        where = f"judge {self.name}: sample {case.sample['id']}"
        try:
            found = self.function(case.sample, case.think)
        except Exception as error:
            raise InputError(f"{type(error).__name__}: {error}", where=where) from error
        if not isinstance(found, Mapping) or not found or not set(found) <= set(DIMENSIONS):
            raise InputError(f"returned {found!r}", where=where, remedy=f"Scores of some of {', '.join(DIMENSIONS)}")
        scores: dict[Dimension, float] = {name: found[name] for name in DIMENSIONS if name in found}
        for name, value in scores.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
                raise InputError(f"returned {value!r}", where=where, field=name, remedy="A score lies in 0–100")
        return scores
