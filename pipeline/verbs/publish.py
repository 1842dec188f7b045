"""The verbs of `mcit` that hand a run on: to the Hub, or as a model merged into one folder."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from mcit.data_prep.errors import InputError

from .options import Overrides, print_json


def publish(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The directory of a run with results.")],
    overrides: Overrides = None,
    repo_id: Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="Default: the recipe's.")] = None,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Who can read it. Default: the recipe's, else private.")
    ] = None,
    dry_run: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write what would be sent into this folder, send nothing.")
    ] = None,
) -> None:
    """Publish a run on the Hub: a tag for each stage's policy, a card, results. Again: only what is missing.

    Example: `mcit publish runs/coin-sefe --repo-id me/coin-sefe publish.license=apache-2.0`
    """
    from ..publishing.files import gather, write_trees
    from ..recipe.loading import load_recipe
    from ..run.runner import perform_steps
    from ..run.step import Launch
    from ..run.steps import Run
    from ..run.terminal import Terminal

    given = [f"publish.repo_id={repo_id}"] if repo_id is not None else []
    given += [f"publish.private={str(private).lower()}"] if private is not None else []
    recipe = load_recipe(run, [*given, *(overrides or ())], check_methods=False)
    if recipe.publish is None:
        remedy = "Give --repo-id owner/name, or a section publish: {repo_id: …} in the recipe"
        raise InputError("is missing", where=recipe.name, field="publish", remedy=remedy)
    if recipe.sweep:
        remedy = "Name the folder of one of its runs; with `publish:` in the recipe, `mcit run` publishes them all"
        raise InputError("is a sweep", where=run, remedy=remedy)
    terminal = Terminal()
    if dry_run is not None:
        write_trees(gather(recipe, run, recipe.publish), dry_run)
        terminal.say(f"what would be published as {recipe.publish.repo_id}: {dry_run}")
        return
    current = Run(recipe, run.resolve(), Launch.named("single"))
    # Asked for by name it is always done: what the Hub holds may have changed.
    perform_steps(current, [replace(step, again=True) for step in current.publication()], terminal)


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write, which must not exist.")],
    stage: Annotated[int | None, typer.Option(help="Default: the last that is done.")] = None,
) -> None:
    """Write the policy of a stage as one model: the adapter merged in float32, rounded once, and compared.

    Prints, as JSON, the largest gap between log-probabilities of merged model and adapter on the stage's probes.

    Example: `mcit export runs/coin-sefe --stage 3 --out models/coin-sefe-3`
    """
    from ..policy.export import export as export_stage
    from ..recipe.loading import load_recipe

    print_json(export_stage(load_recipe(run, check_methods=False), run, stage, out))
