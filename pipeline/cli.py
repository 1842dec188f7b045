"""The `mcit` command.

Exit codes: 0 done, 2 bad input (one line says which), 1 our fault, 75 asked to stop (by SLURM, say), 130 interrupted.
"""

import sys

import typer

from mcit.data_prep.errors import InputError, no_room

from . import cli_data, cli_judge, cli_plan, cli_publish, cli_runs, cli_tools

app = typer.Typer(
    help="Continual instruction tuning of vision-language models: tune task after task, measure what was forgotten.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.command()(cli_runs.run)
app.command()(cli_runs.prepare)
app.command()(cli_runs.train)
app.command("eval")(cli_runs.evaluate)
app.command()(cli_judge.judge)
app.command()(cli_runs.report)
app.command()(cli_plan.plan)
app.command()(cli_publish.publish)
app.command()(cli_publish.export)
app.command()(cli_runs.submit)
app.command()(cli_runs.cancel)
app.command()(cli_runs.status)
app.command()(cli_tools.methods)
app.command()(cli_tools.doctor)
app.command()(cli_tools.metrics)
app.command()(cli_tools.score)
app.command()(cli_judge.judge_data)
app.command()(cli_judge.agreement)
app.command()(cli_data.show)
app.command()(cli_runs.ask)
app.command()(cli_data.asd)
app.command()(cli_data.verify)


def main() -> None:
    """Entry point of the console script."""
    from .child import ChildFailed
    from .preemption import EXIT_CODE, Preempted, preemptible
    from .redaction import redact

    try:
        with preemptible():
            app()
    except InputError as error:
        print(f"error: {redact(str(error))}", file=sys.stderr)
        sys.exit(2)
    except ChildFailed as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        print(f"error: {no_room(error)}", file=sys.stderr)
        sys.exit(2)
    except Preempted as stop:
        print(stop, file=sys.stderr)
        sys.exit(EXIT_CODE)


if __name__ == "__main__":
    main()
