"""How many tokens each training sample has: counted once, when samples are checked, and known to every stage."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from mcit.data_prep.files import read_json, write_json
from mcit.data_prep.schema import Sample


def write_lengths(run_dir: Path, tokens: Mapping[str, Mapping[str, int]]) -> None:
    """Keep the tokens of training samples, images included, by task and id."""
    write_json(_file(run_dir), tokens)


def has_lengths(run_dir: Path) -> bool:
    """Whether they have been counted."""
    return _file(run_dir).is_file()


def lengths_of(run_dir: Path, samples: Iterable[Sample]) -> list[int]:
    """The tokens of samples of a run. Raises `InputError` if nobody has counted them."""
    tokens = read_json(_file(run_dir))
    return [tokens[sample["task"]][sample["id"]] for sample in samples]


def _file(run_dir: Path) -> Path:
    return run_dir / "data" / "tokens.json"
