"""ASD conversion of one data file, for those who train elsewhere."""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from mcit.data_prep.asd.conversion import convert
from mcit.data_prep.asd.report import make_report
from mcit.data_prep.asd.rules import Rules
from mcit.data_prep.errors import InputError
from mcit.data_prep.files import check_output, read_json, write_json, write_jsonl
from mcit.data_prep.prepare import iter_samples, prepare_task, read_task
from mcit.data_prep.sample_file import SampleFile
from mcit.data_prep.schema import AnchorConfig, AsdConfig, PrepareConfig, Sample
from mcit.data_prep.styles import default_scorer
from mcit.eval.hashing import cache_dir
from mcit.eval.scorers import get_scorer
from mcit.eval.scoring import score_gold


def asd_settings(**options: Any) -> AsdConfig:
    """Settings from the command line's options. Raises `InputError` with the option."""
    try:
        return AsdConfig(**options)
    except ValidationError as error:
        first = error.errors()[0]
        option = "".join(f"--{str(key).replace('_', '-')}" for key in first["loc"][:1])
        raise InputError(first["msg"], where="mcit asd", field=option) from None


def convert_file(
    source: Path,
    target: Path,
    asd: AsdConfig,
    seed: int,
    images: Path | None,
    show: Callable[[str], None],
    *,
    layout: str | None = None,
    on_bad: Literal["error", "drop"] = "error",
) -> dict[str, Any]:
    """Write `source` (LLaVA JSON, TRL JSONL or Parquet) to `target` as JSONL, part of it in other answer styles.

    `layout` is what reads rows of another form, as for a task. The report beside it (`<target>.report.json`) is
    returned too. Image paths stay relative to `images`, or to the folder of `source`; images that had no file are
    written to `images/` beside `target`. Raises `InputError`.
    """
    source, images = source.resolve(), images.resolve() if images else None
    check_output(target, "OUT")
    if target.resolve() == source:
        raise InputError(
            "is the file to convert, which stays as it is", where=target, field="OUT", remedy="Name another"
        )
    # Like general samples a training set alone: nothing is split off.
    task = AnchorConfig(name="asd", train=str(source), images=str(images) if images else None, layout=layout)
    prepare = PrepareConfig(on_bad=on_bad)
    folder = prepare_task(task, prepare, seed=seed, asd=asd, base_dir=Path.cwd(), cache=cache_dir(), show=show)
    if read_task(folder)["image_root"] == "." and (folder / "images").is_dir():
        shutil.copytree(folder / "images", target.parent / "images", dirs_exist_ok=True)
    if asd.fraction:
        report = read_json(folder / "asd_report.json")
        report["notes"] = read_task(folder)["notes"][:-1]  # the last is the summary
    else:
        report = make_report(convert(SampleFile(folder / "train.jsonl"), 0, seed, Rules()), asd, seed)
        report["notes"] = read_task(folder)["notes"]
    report["validation"] = validate(sample for sample in iter_samples(folder, "train") if "asd" in sample["meta"])
    write_jsonl(target, iter_samples(folder, "train"))
    write_json(target.with_name(f"{target.name}.report.json"), report)
    return report


def validate(converted: Iterable[Sample]) -> dict[str, Any]:
    """Score the gold answer of every converted sample by its style's scorer: each must be right, in form and content.

    Returns the number of samples and, of those that are not, the verdicts by id.
    """
    verdicts = {}
    for sample in converted:
        scorer = get_scorer(default_scorer(sample["style"], len(sample["references"])))
        score = score_gold(sample, scorer)
        verdicts[sample["id"]] = score["verdict"] if score["score"] == 100 else f"{score['verdict']}, {score['score']}"
    return {"checked": len(verdicts), "failed": {key: found for key, found in verdicts.items() if found != "correct"}}
