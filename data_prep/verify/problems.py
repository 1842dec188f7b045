"""What can be wrong, how bad it is, and the list of what was found."""

from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from ..errors import InputError

Severity = Literal["error", "warning", "note"]
Kind = Literal[
    "file", "row", "image", "reference", "tokens", "form", "duplicate", "conflict", "leak", "link", "picture"
]
SEVERITY: dict[Kind, Severity] = {
    "file": "error",  # a data file, or a line of it, cannot be read
    "row": "error",  # a row is no sample: fields, roles, turns, length
    "image": "error",  # missing, not decodable, outside the image folder, not as many as placeholders
    "reference": "error",  # no answer that is asked for in a test could be scored as right
    "tokens": "error",  # a sample does not fit the model
    "form": "warning",  # an answer does not have the form of its style; an error where most of a part have not
    "duplicate": "warning",  # the same images, question and answer again in the same part
    "conflict": "warning",  # the same images and question with another answer, in a style with one right answer
    "leak": "warning",  # what is tested or validated on is trained on
    "link": "warning",  # a symbolic link that leads out of the image folder
    "picture": "note",  # an image that the model sees otherwise than a viewer shows it
}


class Ref(NamedTuple):
    """A sample: the number of its task, and its place in what was read of it."""

    task: int
    offset: int


class Problem(NamedTuple):
    """One thing that is wrong; `culprits` are the samples to leave out to be rid of it."""

    kind: Kind
    severity: Severity
    task: str
    part: str
    sample: str  # an id, where the data have one
    where: str  # file and line
    field: str
    problem: str
    remedy: str
    culprits: tuple[Ref, ...] = ()

    def line(self) -> str:
        """As one line."""
        return str(InputError(self.problem, where=self.where, field=self.field, remedy=self.remedy))

    def as_json(self) -> dict[str, Any]:
        """For the report."""
        return {key: value for key, value in self._asdict().items() if key != "culprits"}


class Findings:
    """All problems, in the order they were found."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def add(
        self,
        kind: Kind,
        problem: InputError | str,
        *,
        task: str,
        part: str,
        sample: str = "",
        where: str = "",
        field: str = "",
        remedy: str = "",
        severity: Severity | None = None,
        culprits: Iterable[Ref] = (),
    ) -> None:
        """One more problem; an `InputError` brings its own place and remedy, which the arguments override."""
        if isinstance(problem, InputError):
            where, field = where or problem.where, field or problem.field
            text, remedy = problem.problem, remedy or problem.remedy
        else:
            text = problem
        level = severity or SEVERITY[kind]
        self.problems.append(Problem(kind, level, task, part, sample, where, field, text, remedy, tuple(culprits)))

    def counts(self, task: str, part: str) -> Counter[Kind]:
        """Problems of a part by kind."""
        return Counter(found.kind for found in self.problems if (found.task, found.part) == (task, part))

    def against(self, strict: bool) -> list[Problem]:
        """What speaks against the data: errors, and under `strict` warnings too."""
        bad = ("error", "warning") if strict else ("error",)
        return [found for found in self.problems if found.severity in bad]
