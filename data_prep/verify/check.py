"""What can be said of each sample by itself: its images, its answer, its length."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from ..checks import Tally, TokenCounter
from ..errors import InputError
from ..forms import final_answer, give_style, has_form
from ..images import ImageFacts
from ..readers import Part
from ..schema import Sample, Style
from ..spool import Record
from ..styles import parse, split_reasoning
from .pictures import Pictures, leads_out
from .problems import Ref, Severity
from .scan import Entry, Scan
from .texts import answer_key, question_key

# Styles of one form: no answer that scoring can read meets a reference without it.
_CLOSED: tuple[Style, ...] = ("yes_no", "mcq", "number", "bbox", "latex")
_EVERY = 5000  # samples between two lines of progress


class Checks(NamedTuple):
    """What samples are held against, by who knows models and scorers.

    `counter` counts tokens (of samples whose images are named by number), and `limits` are those that fit, by part.
    `taught` says whether the training answers are: under reinforcement tuning alone, a gold answer needs no reasoning.
    `why_wrong` says why the gold answer of a sample would not be scored as right by the scorer of that name.
    """

    counter: TokenCounter | None
    limits: dict[Part, int | None]
    taught: bool
    why_wrong: Callable[[Sample, str], str | None]


class Numbered(dict[str, ImageFacts]):
    """The facts of images by their numbers as text: what a `TokenCounter` asks for."""

    def __init__(self, pictures: Pictures):
        self.pictures = pictures

    def __missing__(self, name: str) -> ImageFacts:
        return self.pictures.sound(int(name)).facts


def check(scan: Scan, checks: Checks, show: Callable[[str], None]) -> None:
    """Hold every sample of a task against `checks`; the sound ones become its `entries`, the lengths its `lengths`."""
    waiting: dict[str, Record] = {}  # handed to the counter

    def sound() -> Iterator[Sample]:
        for count, record in enumerate(_sound(scan, checks), 1):
            if count % _EVERY == 0:
                show(f"{scan.name}: {count} samples checked")
            waiting[str(record.offset)] = record
            yield {**record.sample, "id": str(record.offset), "images": [str(n) for n in record.images]}

    tallies: dict[Part, Tally] = {}
    counted = checks.counter.each(sound()) if checks.counter else ((sample, None) for sample in sound())
    for sample, result in counted:
        record = waiting.pop(sample["id"])
        limit = checks.limits[record.part]
        if isinstance(result, InputError):
            scan.complain("tokens", result, record, remedy="Leave it out, or use another base model")
        elif result is not None and limit is not None and result > limit:
            problem = f"has {result} tokens, images included, but only {limit} fit"
            scan.complain("tokens", problem, record, remedy="Raise the limit, shrink its images, or leave it out")
        elif result is not None:
            tallies.setdefault(record.part, Tally()).add(record.sample["id"] or record.where, result)
    scan.lengths = {part: tally.lengths() for part, tally in tallies.items()}
    _check_pictures(scan)


def _sound(scan: Scan, checks: Checks) -> Iterator[Record]:
    """The samples with whole images; those whose answer is wrong are among them, and among the findings."""
    formless: dict[Part, int] = Counter()
    problems, since = scan.findings.problems, len(scan.findings.problems)
    for record in scan.records():
        sample = record.sample
        give_style(sample, scan.style, scan.formats)
        broken = next((e for n in record.images if isinstance(e := scan.pictures.found[n], InputError)), None)
        if broken:
            scan.complain("image", f"{broken.where}: {broken.problem}", record, field="image", remedy=broken.remedy)
            continue
        answer, style = final_answer(sample["completion"]), sample["style"]
        if not _has_reference(sample) and record.part != "train":
            problem = f"no reference has the form of style {style}: {_shown(sample['references'][0])}"
            scan.complain("reference", problem, record, field="references", remedy="Correct it, or name another style")
        elif not has_form(sample):
            formless[record.part] += 1
            problem = f"the answer does not have the form of style {style}: {_shown(answer)}"
            scan.complain("form", problem, record, field="answer", remedy="Correct it, or name another `style:`")
        elif record.part != "train" and (why := checks.why_wrong(sample, scan.scorer)):
            remedy = f"Correct it, or name another `scorer:` (it is {scan.scorer})"
            scan.complain("reference", why, record, field="references", remedy=remedy)
        taught = checks.taught and record.part == "train"
        if taught and not split_reasoning(sample["completion"][-1]["content"], sample["reasoning"])[2]:
            problem = f"the answer is not in the form of reasoning {sample['reasoning']!r}"
            scan.complain("form", problem, record, field="answer", remedy="Correct it, or name another `reasoning:`")
        question, said = question_key(sample, scan.formats), answer_key(sample)
        scan.entries.append(Entry(record.offset, record.part, tuple(record.images), question, said, style))
        yield record
    refused = [part for part, wrong in formless.items() if wrong > scan.samples[part] / 2]
    for index in range(since, len(problems)):  # the preparation refuses such a part as a whole
        if problems[index].kind == "form" and problems[index].part in refused:
            problems[index] = problems[index]._replace(severity="error")


def _check_pictures(scan: Scan) -> None:
    """Links out of the image folder, and what of images the model will see otherwise than a viewer shows it."""
    for part, numbers in scan.images.items():
        remarks: dict[tuple[Severity, str], list[int]] = {}
        links: dict[Path, list[int]] = {}
        for number in sorted(numbers):
            path, picture = Path(scan.pictures.paths[number]), scan.pictures.found[number]
            for root in dict.fromkeys(scan.reader.roots):
                if link := leads_out(path, root):
                    links.setdefault(link, []).append(number)
            if not isinstance(picture, InputError):
                for remark in picture.remarks:
                    remarks.setdefault(remark, []).append(number)
        for (severity, text), numbers_of in remarks.items():
            first = scan.pictures.paths[numbers_of[0]]
            many = f"{len(numbers_of)} images; the first: " if len(numbers_of) > 1 else ""
            scan.findings.add(
                "picture",
                f"{text} ({many}{first})",
                task=scan.name,
                part=part,
                severity=severity,
                field="image",
                remedy="" if severity == "note" else "Convert them to 8 bits a channel",
                culprits=_showing(scan, part, numbers_of),
            )
        for link, behind in links.items():
            scan.findings.add(
                "link",
                f"a link that leads out of the image folder, with {len(behind)} images behind it",
                task=scan.name,
                part=part,
                where=str(link),
                field="image",
                remedy="Put the files there, or set `images:` to the folder that holds all of them",
                culprits=_showing(scan, part, behind),
            )


def _showing(scan: Scan, part: Part, numbers: list[int]) -> list[Ref]:
    """The sound samples of a part that show any of these images."""
    wanted = set(numbers)
    return [
        Ref(scan.number, entry.offset)
        for entry in scan.entries
        if entry.part == part and not wanted.isdisjoint(entry.images)
    ]


def _has_reference(sample: Sample) -> bool:
    """Whether a reference has the form of the sample's style, if that is one that scoring reads strictly."""
    style, options = sample["style"], sample["meta"].get("options")
    return style not in _CLOSED or any(parse(style, text, options=options).format_ok for text in sample["references"])


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}…")
