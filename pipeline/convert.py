"""ASD conversion of one data file, for those who train elsewhere."""

import shutil
from pathlib import Path
from typing import Any

from mcit.data_prep.asd.rules import convert
from mcit.data_prep.files import read_json, write_json, write_jsonl
from mcit.data_prep.prepare import prepare_task, read_samples, read_task
from mcit.data_prep.schema import AsdConfig, PrepareConfig, TaskConfig
from mcit.eval.hashing import cache_dir


def convert_file(source: Path, target: Path, asd: AsdConfig, seed: int) -> dict[str, Any]:
    """Write `source` (LLaVA JSON, TRL JSONL or Parquet) to `target` as JSONL, part of it in other answer styles.

    The report beside it (`<target>.report.json`) is returned too. Image paths stay relative to the folder of `source`;
    images that had no file are written to `images/` beside `target`. Raises `InputError`.
    """
    source = source.resolve()
    task = TaskConfig(name="asd", train=str(source), test=str(source))  # as its own test set: nothing is split off
    folder = prepare_task(task, PrepareConfig(), seed=seed, asd=asd, base_dir=source.parent, cache=cache_dir())
    if read_task(folder)["image_root"] == "." and (folder / "images").is_dir():
        shutil.copytree(folder / "images", target.parent / "images", dirs_exist_ok=True)
    samples = read_samples(folder, "train")
    report = read_json(folder / "asd_report.json") if asd.fraction else convert(samples, 0, seed)[1]
    write_jsonl(target, samples)
    write_json(target.with_name(f"{target.name}.report.json"), report)
    return report
