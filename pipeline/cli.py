"""The `mcit` command.

Exit codes: 0 done, 2 bad input (one line says which), 1 our fault, 75 asked to stop (by SLURM, say), 130 interrupted.
"""

import logging
import sys

import typer

from mcit.data_prep.errors import InputError, not_written

from .verbs import data, jobs, judge, plan, publish, runs, tools

app = typer.Typer(
    help="Continual instruction tuning of vision-language models: tune task after task, measure what was forgotten.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.command()(runs.run)
app.command()(runs.prepare)
app.command()(runs.train)
app.command("eval")(runs.evaluate)
app.command()(judge.judge)
app.command()(runs.report)
app.command()(plan.plan)
app.command()(publish.publish)
app.command()(publish.export)
app.command()(jobs.submit)
app.command()(jobs.cancel)
app.command()(jobs.status)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(jobs.rollouts)
app.command()(tools.methods)
app.command()(tools.doctor)
app.command()(tools.metrics)
app.command()(tools.score)
app.command()(judge.judge_data)
app.command()(judge.agreement)
app.command()(data.show)
app.command()(runs.ask)
app.command()(data.asd)
app.command()(data.verify)


def main() -> None:
    """Entry point of the console script."""
    from .run.child import ChildFailed
    from .run.preemption import EXIT_CODE, Preempted, preemptible
    from .run.redaction import redact

    # bitsandbytes, which PEFT imports, recommends a package for speed on a CPU to whoever asks for a list of methods.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        with preemptible():
            app()
    except InputError as error:
        print(f"error: {redact(str(error))}", file=sys.stderr)
        sys.exit(2)
    except ChildFailed as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    except Preempted as stop:
        print(stop, file=sys.stderr)
        sys.exit(EXIT_CODE)
    except Exception as error:
        print(f"error: {not_written(error)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
