"""Where training is tracked, if a recipe asks for it (`report_to`): a stream's stages side by side, on this machine.

TensorBoard, Weights & Biases and trackio get a project of the recipe's name with a run for each stage, and write into
`RUN/logs/`. Nothing is sent anywhere: `wandb sync` or another setting of their own variables does that.
"""

import os
from pathlib import Path
from typing import Any

from mcit.data_prep.errors import InputError

from ..recipe.layers import nearest


def usual_settings(recipe: str, stage: str) -> dict[str, Any]:
    """Arguments of TRL's configs, which a recipe may set otherwise."""
    return {"report_to": "none", "project": recipe, "run_name": f"{recipe} {stage}"}


def check_trackers(report_to: str | list[str], field: str) -> None:
    """Refuse trackers that do not exist or are not installed. Raises `InputError`."""
    from transformers.integrations.integration_utils import (  # here: takes seconds
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    for name in [report_to] if isinstance(report_to, str) else report_to:
        if name in ("none", "all", *get_available_reporting_integrations()):
            continue
        known, remedy = name in INTEGRATION_TO_CALLBACK, nearest(name, ["none", *INTEGRATION_TO_CALLBACK])
        problem = f"{name} is {'not installed' if known else 'no tracker'}"
        raise InputError(problem, where="recipe", field=field, remedy=f"pip install {name}" if known else remedy)


def set_environment(recipe: str, stage: str, run_dir: Path, fingerprint: str) -> None:
    """What trackers read from the environment when training begins; a user's own setting wins.

    The `fingerprint` makes a stage that goes on after a kill the same run.
    """
    logs = run_dir.resolve() / "logs"
    usual = {
        "TENSORBOARD_LOGGING_DIR": logs / "tensorboard" / stage,
        "TRACKIO_DIR": logs / "trackio",
        "WANDB_MODE": "offline",
        "WANDB_DIR": logs,
        "WANDB_PROJECT": recipe,
        "WANDB_RUN_ID": f"{stage}-{fingerprint[:12]}".replace("+", "-"),
        "WANDB_RESUME": "allow",
    }
    for name, value in usual.items():
        os.environ.setdefault(name, str(value))
