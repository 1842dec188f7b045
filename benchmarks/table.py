"""One table of all figures that have been measured.

    python benchmarks/table.py [FOLDER]

FOLDER holds what the scripts wrote, default: `benchmarks/figures`. A ratio above 1: ours takes less. The spread is from
the smallest to the largest ratio of the rounds in which both took turns.
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from figures import Figure

from mcit.data_prep.files import read_json

HEADS = ("figure", "against", "ratio", "spread", "target", "met")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent / "figures")
    print("\n".join(table(read(parser.parse_args().folder))))


def read(folder: Path) -> list[Figure]:
    """The figures of all files in a folder, by the files' names; of some that have none nothing."""
    return [one for path in sorted(folder.glob("*.json")) for one in read_json(path).get("figures", [])]


def table(figures: Iterable[Figure]) -> list[str]:
    """The lines of a Markdown table, its columns flush."""
    rows = [HEADS, *map(cells, figures)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADS))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def cells(one: Figure) -> Sequence[str]:
    """A figure's row; a target is met by the median of the rounds."""
    target = one["target"]
    spread = "{:.2f} to {:.2f}".format(*one["spread"]) if one["rounds"] > 1 else "once"
    wanted = ("", "") if target is None else (f"{target:g} ×", "yes" if one["ratio"] >= target else "no")
    return (one["figure"], one["against"], f"{one['ratio']:.2f} ×", spread, *wanted)


if __name__ == "__main__":
    main()
