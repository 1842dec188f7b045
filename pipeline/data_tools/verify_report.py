"""What `mcit verify` found: as one JSON object, and for the reader."""

from typing import Any

from mcit.data_prep.readers import PARTS
from mcit.data_prep.verify.pictures import ALIKE, HASH_BITS, NEAR
from mcit.data_prep.verify.problems import SEVERITY

from ..run.terminal import Terminal
from .verify import Verified

_SHOWN = 3  # problems of a kind and severity that are printed; the report has all


def make_report(verified: Verified, strict: bool) -> dict[str, Any]:
    """The report: `clean`, a row a part, the overlaps of held-out parts with training sets, and every problem."""
    rows = []
    for scan in verified.scans:
        for part in PARTS:
            counts = verified.findings.counts(scan.name, part)
            if part in scan.sources or scan.samples[part] or counts:
                lengths = scan.lengths.get(part)
                rows.append(
                    {
                        "task": scan.name,
                        "part": part,
                        "samples": scan.samples[part],
                        "images": len(scan.images.get(part, ())),
                        "style": scan.style,
                        "scorer": scan.scorer,
                        "tokens": lengths._asdict() if lengths else None,
                        "problems": {kind: counts[kind] for kind in SEVERITY if counts[kind]},
                    }
                )
    return {
        "clean": not verified.findings.against(strict),
        "strict": strict,
        "near": {"hash_bits": HASH_BITS, "bits_that_may_differ": NEAR, "colours_may_differ_by": ALIKE},
        "parts": rows,
        "leaks": [overlap._asdict() for overlap in verified.overlaps],
        "notes": verified.notes,
        "problems": [problem.as_json() for problem in verified.findings.problems],
    }


def show_report(verified: Verified, report: dict[str, Any], terminal: Terminal) -> None:
    """Tables, the first problems of each kind, and the verdict."""
    terminal.table(
        "verified",
        ["task", "part", "samples", "images", "tokens", "problems"],
        [
            [
                row["task"],
                row["part"],
                row["samples"],
                row["images"],
                f"up to {row['tokens']['max']}" if row["tokens"] else "not counted",
                ", ".join(f"{count} {kind}" for kind, count in row["problems"].items()) or "none",
            ]
            for row in report["parts"]
        ],
    )
    if verified.overlaps:
        trained = list(dict.fromkeys(overlap.trained for overlap in verified.overlaps))
        held_out = dict.fromkeys((overlap.task, overlap.part, overlap.samples) for overlap in verified.overlaps)
        cells = {(overlap.task, overlap.part, overlap.trained): overlap.leaked for overlap in verified.overlaps}
        terminal.table(
            "samples that the training data of a task (columns) give away",
            ["task", "part", "samples", *trained],
            [
                [task, part, samples, *(cells.get((task, part, name)) for name in trained)]
                for task, part, samples in held_out
            ],
        )
    for severity, style in (("error", "bold"), ("warning", "yellow"), ("note", "dim")):
        for kind in SEVERITY:
            found = [p for p in verified.findings.problems if (p.kind, p.severity) == (kind, severity)]
            for problem in found[:_SHOWN]:
                terminal.say(f"{severity} {kind}: {problem.task} {problem.part}: {problem.line()}", style)
            if len(found) > _SHOWN:
                terminal.say(f"  … and {len(found) - _SHOWN} more of {kind} (all are in the report: --out FILE)", "dim")
    for note in verified.notes:
        terminal.say(f"note: {note}", "dim")
    total = len(verified.findings.against(report["strict"]))
    warnings = sum(problem.severity == "warning" for problem in verified.findings.problems)
    if total:
        terminal.say(f"not clean: {total} problems", "bold")
    else:
        terminal.say("clean" + (f", with {warnings} warnings" if warnings else ""), "bold")
