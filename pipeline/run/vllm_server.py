"""`mcit rollouts`: the vLLM server that answers while stages train by reinforcement, with the options that they need.

`pipeline/reinforcement/server.py` is what asks it.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mcit.data_prep.errors import InputError
from mcit.data_prep.prepare import read_samples
from mcit.eval.engines import EngineFailed, Policy
from mcit.eval.engines.settings import engine_settings, max_lora_rank
from mcit.eval.serving import read_serving

from .child import ChildFailed, run_child
from .disk import handed_rank
from .steps import Run
from .terminal import Terminal

_ENGINE = "train.rft.rollout.engine"


def serve_rollouts(run: Run, k: int | None, host: str, port: int, more: Sequence[str], terminal: Terminal) -> None:
    """Answer for stage `k`, by default for all, until asked to stop; `more` are options for vLLM, over ours.

    Raises `InputError`, `ChildFailed` when vLLM ends by itself, and `Preempted`.
    """
    stages = run.recipe.stages
    if k is not None and not 1 <= k <= len(stages):
        raise InputError(f"the stream has stages 1 to {len(stages)}", where=run.recipe.name, field="--stage")
    asking = [stage.k for stage in stages[: k or len(stages)] if stage.train.asks_server]
    if not asking or (k is not None and k != asking[-1]):
        remedy = "Only engine: server asks one (docs/rft.md)"
        raise InputError("no stage asks a vLLM server", where=run.recipe.name, field=_ENGINE, remedy=remedy)
    if run.check().done() is None:
        raise InputError("is not prepared", where=run.dir, remedy=f"First: `mcit prepare {run.dir}`")
    command, log = server_command(run, asking[-1]), run.dir / "logs" / f"rollouts-{asking[-1]}.log"
    terminal.say(f"vLLM will answer at http://{host}:{port}/v1 once it has loaded the model; it logs to {log}")
    # Adapters are loaded while it runs. (vLLM itself reads VLLM_API_KEY, without which it answers to everybody.)
    settings = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}

    def show(line: str) -> None:
        if "Application startup complete" in line:
            terminal.say("vLLM answers")

    run_child([*command, "--host", host, "--port", str(port), *more], log, settings | os.environ, show)
    raise ChildFailed(f"vLLM has ended; its log: {log}")


def server_command(run: Run, k: int) -> list[str]:
    """The command that serves the base model, with room for the adapter of any stage up to `k`. Raises `InputError`."""
    import torch  # here: takes seconds

    base = Policy(read_serving(run.stage_dir(0)), Path()).base()
    folders = [run.dir / "data" / task.name for task in (*run.recipe.tasks, *run.recipe.anchors)]
    images = max(len(sample["images"]) for folder in folders for sample in read_samples(folder, "train"))
    try:
        rank = max_lora_rank(_rank(run, k))
    except EngineFailed as error:
        raise InputError(str(error), where=run.recipe.name, field=_ENGINE, remedy="Set it to transformers") from None
    settings = engine_settings(base, images, None) | {
        "enable_lora": True,
        "max_loras": 1,
        "max_cpu_loras": 2,  # the new one comes before the old one goes
        "max_lora_rank": rank,
        "logprobs_mode": "processed_logprobs",  # of what is sampled from, not of the bare model
        # On a CPU vLLM 0.31 fails at seeded requests of which it reads the prompt in parts.
        "enable_chunked_prefill": None if torch.cuda.is_available() else False,
    }
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *_options(settings)]


def _rank(run: Run, k: int) -> int:
    """The rank of the policy that stage `k` trains, as one LoRA on the base: what is not trained yet by its recipe."""
    rank = 0
    for stage in run.recipe.stages[:k]:
        if (run.stage_dir(stage.k - 1) / "serving.json").exists():
            rank = handed_rank(run.stage_dir(stage.k - 1))
        rank = (rank if stage.train.lineage in ("stack", "fold") else 0) + stage.train.lora.r
    return rank


def _options(settings: dict[str, Any]) -> list[str]:
    """Arguments of `vllm.LLM` as the command line has them."""
    options = []
    for name, value in settings.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            options.append(f"--{option}" if value else f"--no-{option}")
        elif value is not None:
            options.append(f"--{option}={json.dumps(value) if isinstance(value, dict) else value}")
    return options
