"""How many tokens each training sample has: counted once, when samples are checked, and known to every stage."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from mcit.data_prep.files import read_json, write_json
from mcit.data_prep.schema import Sample


def write_lengths(run_dir: Path, tokens: Mapping[str, Mapping[str, int]]) -> None:
    """Keep the tokens of training samples, images included, by task and id."""
    write_json(_file(run_dir), tokens)


def lengths_of(run_dir: Path, samples: Iterable[Sample]) -> list[int] | None:
    """The tokens of samples of a run; None where some were not counted: a method's own, or an earlier version's."""
    tokens = read_json(_file(run_dir)) if _file(run_dir).is_file() else {}
    lengths = [tokens.get(sample["task"], {}).get(sample["id"]) for sample in samples]
    return None if None in lengths else lengths


def _file(run_dir: Path) -> Path:
    return run_dir / "data" / "tokens.json"
