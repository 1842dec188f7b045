"""The verbs of `mcit` for clusters: runs as SLURM jobs, where they are, and a server that answers for the training."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import AsJson, Overrides, RecipeArgument, RunDir, With, print_json
from .runs import found, start


def submit(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    with_method: With = None,
    run_dir: RunDir = None,
    partition: Annotated[str | None, typer.Option(help="Of every job for which the profile names no other.")] = None,
    account: Annotated[str | None, typer.Option(help="The same.")] = None,
    time: Annotated[str | None, typer.Option(help="The same: the longest a job may take, as 24:00:00.")] = None,
    nodes: Annotated[int, typer.Option(min=1, help="How many train a stage.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="How many train on each; 0: the CPU does.")] = 1,
    launch: Annotated[str | None, typer.Option(help="As of `mcit run`. Default: single for one GPU, else ddp.")] = None,
    profile: Annotated[Path | None, typer.Option(help="What the site wants to be told (docs/cluster.md).")] = None,
    seeds: Annotated[str | None, typer.Option(metavar="0,1,2", help="The same as sweep.seed=[0,1,2].")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write the job scripts, submit nothing.")] = False,
) -> None:
    """Submit what is left of a run to SLURM: the steps of `mcit run` as jobs, each stage evaluated beside the next.

    The runs of a sweep share array jobs.

    Example: `mcit submit coin/sefe data=/data/CoIN --partition gpu --gpus-per-node 8 --launch zero2 --time 24:00:00`
    """
    from mcit.slurm.profile import Site, read_profile
    from mcit.slurm.submit import submit as submit_jobs

    from ..run.terminal import Terminal

    options = {"partition": partition, "account": account, "time": time}
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    site = Site(read_profile(profile), given, nodes, gpus_per_node, launch)
    swept = [*(overrides or ()), *([f"sweep.seed=[{seeds}]"] if seeds else ())]
    loaded, directory, _ = found(recipe, swept, with_method, run_dir, "single", None)
    submit_jobs(loaded, directory, site, Terminal(), dry_run)


def cancel(run: Annotated[Path, typer.Argument(help="A run directory, or a sweep's.")]) -> None:
    """Cancel the SLURM jobs of a run that are queued or running; what is done stays done.

    Example: `mcit cancel runs/coin-sefe`
    """
    from mcit.slurm.status import cancel as cancel_jobs

    from ..run.terminal import Terminal

    cancel_jobs(run, Terminal())


def status(
    run: Annotated[Path, typer.Argument(help="A run directory, or a sweep's.")], as_json: AsJson = False
) -> None:
    """Say what is done, running and left, and where its SLURM jobs are.

    Example: `mcit status runs/mini-sefe`
    """
    from mcit.slurm.status import full_status

    from ..run.terminal import Terminal

    told = full_status(run)
    if as_json:
        print_json(told)
    else:
        Terminal().status(told)


def rollouts(
    context: typer.Context,
    recipe: RecipeArgument,
    stage: Annotated[int | None, typer.Option(help="1 is the first. Default: any, one after the other.")] = None,
    run_dir: RunDir = None,
    host: Annotated[str, typer.Option(help="The address to listen at; 0.0.0.0 lets other nodes ask.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
) -> None:
    """Answer by vLLM for stages that train by reinforcement (`train.rft.rollout.engine: server`), until stopped.

    Further options are vLLM's own: `--data-parallel-size 8`, `--gpu-memory-utilization 0.8`. It answers to whoever
    knows VLLM_API_KEY, if that is set here and where the training is.

    Example: `mcit rollouts rft7/qwen3b data=/data/rft7 --host 0.0.0.0`
    """
    from ..run.terminal import Terminal
    from ..run.vllm_server import serve_rollouts

    overrides = [word for word in context.args if "=" in word and not word.startswith("-")]
    terminal, more = Terminal(), [word for word in context.args if word not in overrides]
    current = start(recipe, overrides, None, run_dir, "single", None, terminal)
    serve_rollouts(current, stage, host, port, more, terminal)
