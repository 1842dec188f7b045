"""What the verbs of `mcit` have in common: arguments, options, output."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, a packaged recipe (`mini/sefe`), or a run directory.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Recipe keys to change: `seed=1`, `stream.digits.test=0.2`."),
]
With = Annotated[
    list[str] | None,
    typer.Option("--with", metavar="METHOD", help="Add a method: a name (`mcit methods`), a file, or module:Class."),
]
RunDir = Annotated[
    Path | None, typer.Option(help="Where the run is kept. Default: runs/<the recipe's name>[-<added method>…].")
]
LaunchOption = Annotated[
    str, typer.Option(help="single, fork, ddp, zero2, zero3, or an accelerate configuration file.")
]
Gpus = Annotated[int | None, typer.Option(min=1, help="Number of training processes, on each node.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def print_json(value: Any) -> None:
    """Print plain data as JSON, indented."""
    print(json.dumps(value, indent=1, ensure_ascii=False))
