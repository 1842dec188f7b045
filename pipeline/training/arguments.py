"""TRL's trainer arguments: what a recipe may set, what the pipeline owns, and the global batch split over devices."""

import dataclasses
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from mcit.data_prep.errors import InputError

from ..recipe.layers import nearest
from ..stage.trackers import check_trackers, usual_settings

if TYPE_CHECKING:
    from ..methods import Method
    from ..recipe.schema import Recipe, Stage, TrainConfig
    from ..stage.entering import Entered

# Arguments of TRL's configs that a recipe may not set, by what to do instead: they follow from the recipe, or would
# change what a stage is, or would have no effect.
_INSTEAD = {
    "It follows from the run folder": ["output_dir"],
    "Set the recipe's seed": ["seed", "data_seed"],
    "It follows from train.global_batch_size": [
        *("gradient_accumulation_steps", "auto_find_batch_size", "dataloader_drop_last"),
        "average_tokens_across_devices",
    ],
    "Set base_model.dtype": ["bf16", "fp16"],
    "Set base_model": ["model_init_kwargs", "trust_remote_code"],
    "Samples are not truncated; train.max_length refuses longer ones": ["max_length", "truncation_mode"],
    "Set train.packing": ["packing", "packing_strategy", "padding_free", "eval_packing"],
    "Data are prepared before training; loss is on the assistant's turns": [
        *("dataset_kwargs", "dataset_text_field", "dataset_num_proc", "completion_only_loss", "assistant_only_loss"),
        "remove_unused_columns",
    ],
    "Training and evaluation see the same prompts": [
        *("chat_template_path", "chat_template_kwargs", "eos_token", "pad_token"),
    ],
    "Samples come in an order that follows from the recipe's seed": [
        *("train_sampling_strategy", "length_column_name", "shuffle_dataset"),
    ],
    "Saving, evaluating and publishing are steps of their own": [
        *("save_strategy", "eval_strategy", "eval_on_start", "do_eval", "load_best_model_at_end", "push_to_hub"),
        *("hub_model_id", "hub_private_repo", "hub_revision", "hub_strategy", "hub_always_push"),
        *("resume_from_checkpoint", "log_completions_hub_repo", "save_only_model", "save_on_each_node", "do_train"),
        *("eval_steps", "eval_delay", "per_device_eval_batch_size", "eval_accumulation_steps", "batch_eval_metrics"),
        *("eval_do_concat_batches", "eval_use_gather_object", "metric_for_best_model", "greater_is_better"),
    ],
    "Set train.checkpoint_every": ["save_steps", "save_total_limit"],
    "Ask the policy with `mcit ask`; the log has what answers earned": ["log_completions", "num_completions_to_print"],
    "The launcher decides": ["use_cpu", "local_rank", "deepspeed", "fsdp", "parallelism_config", "ddp_backend"],
    "The pipeline relies on its own setting": [
        *("ddp_broadcast_buffers", "ddp_find_unused_parameters", "logging_nan_inf_filter"),
        *("logging_strategy", "logging_first_step", "accelerator_config"),
    ],
    "Secrets come from the environment (HF_TOKEN) or from `hf auth login`": ["hub_token"],
    "Set train.rft.rewards": ["reward_weights"],
    "Set train.reference": ["sync_ref_model"],
    "Set train.rft.rollout": [
        *("use_vllm", "use_transformers_continuous_batching", "use_transformers_paged"),
        *("vllm_mode", "vllm_model_impl", "vllm_enable_sleep_mode", "vllm_structured_outputs_regex"),
        *("vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_group_port"),
        *("vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_tensor_parallel_size"),
    ],
}
DISTRIBUTED = ("single", "ddp", "zero2", "zero3")  # what stages run under
OWNED = {name: instead for instead, names in _INSTEAD.items() for name in names}


def check_stage(stage: "Stage") -> None:
    """Everything about a stage's training that can be refused without data, model or machine. Raises `InputError`."""
    check_reference(stage.train)
    check_modules(stage.train)
    if "rft" in stage.train.phases and not any(stage.train.rft.rewards.values()):
        raise InputError("every weight is 0", where="recipe", field="train.rft.rewards")
    for phase in stage.train.phases:
        config = _config(phase)
        known = [field.name for field in dataclasses.fields(config)]
        for key in stage.train.args(phase):
            field = f"train.{phase}.args.{key}"
            if key in OWNED:
                raise InputError("is set by the pipeline", where="recipe", field=field, remedy=OWNED[key])
            if key not in known:
                problem = f"{config.__name__} has no such argument"
                raise InputError(problem, where="recipe", field=field, remedy=nearest(key, known))
        check_trackers(stage.train.args(phase).get("report_to") or [], f"train.{phase}.args.report_to")


def check_reference(train: "TrainConfig") -> None:
    """Refuse a KL setting that contradicts `train.reference`. Raises `InputError`."""
    beta = train.rft.args.get("beta", 0)
    if "rft" in train.phases and (train.reference == "none") != (not beta):
        raise InputError(
            f"train.reference is `{train.reference}` and beta is {beta}",
            where="recipe",
            field="train.rft.args.beta",
            remedy="Give the KL a weight (MLLM-CTBench 0.04, RFT paper 0.01), or set train.reference: none and beta: 0",
        )


def check_mode(recipe: "Recipe", stage: "Stage", methods: Iterable["Method"], mode: str) -> None:
    """Refuse a launch that a method, or being asked while it trains, does not work under. Raises `InputError`."""
    if mode not in DISTRIBUTED:
        raise InputError(f"stages do not run under {mode}", where="--launch", remedy=f"Use {', '.join(DISTRIBUTED)}")
    if mode == "zero3" and stage.train.lineage == "full":
        raise InputError("does not run under zero3", where="recipe", field="train.lineage: full", remedy="Use zero2")
    if mode == "zero3" and stage.train.picture_cache:  # some would encode, and wait forever for those that remember
        raise InputError("does not run under zero3", where="recipe", field="train.picture_cache", remedy="Leave it out")
    if mode == "zero3" and recipe.eval.during:  # its processes ask different numbers of times, and would wait forever
        raise InputError("does not run under zero3", where="recipe", field="eval.during", remedy="Leave it out")
    for method in methods:
        if mode not in method.distributed:
            remedy = f"It runs under {', '.join(method.distributed)}"
            raise InputError(f"does not run under {mode}", where="recipe", field=f"method.{method.name}", remedy=remedy)


def check_modules(train: "TrainConfig") -> None:
    """Refuse weights trained in full under a lineage of adapters, adapters under `full`, and training nothing.

    Raises `InputError`.
    """
    trained, other = ("full", "lora") if train.lineage == "full" else ("lora", "full")
    parts = train.modules.model_dump()
    if train.picture_cache and {parts["vision"], parts["projector"]} != {"frozen"}:
        problem, remedy = "is for a tower and a projector that are frozen", "Leave it out"
        raise InputError(problem, where="recipe", field="train.picture_cache", remedy=remedy)
    if {*parts.values()} == {"frozen"}:
        remedy = f"Set one of {', '.join(parts)} to {trained}"
        raise InputError("leave nothing to train", where="recipe", field="train.modules", remedy=remedy)
    for part, how in parts.items():
        if how == other:
            raise InputError(
                f"is `{other}`, and lineage {train.lineage} trains {trained}",
                where="recipe",
                field=f"train.modules.{part}",
                remedy=f"Set train.modules.{part}: {trained}, or another train.lineage",
            )


def try_config(stage: "Stage") -> None:
    """Whether TRL takes the values of a stage's arguments. Not in a process that trains: it settles on the CPU."""
    train = stage.train
    for phase in train.phases:
        args = train.args(phase)
        per_device, accumulation = split_batch(train.batch_size(phase), 1, args.get("per_device_train_batch_size"))
        batch = {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": accumulation}
        own = {"output_dir": "unused", "use_cpu": True, "bf16": False, "report_to": "none"}
        _made(_config(phase), phase, {**args, **batch, **own})


def make_config(entered: "Entered", own: Mapping[str, Any]) -> Any:
    """TRL's configuration of a phase: our defaults, the recipe's `args` over them, over both what the pipeline owns.

    `own` holds what one phase owns beside the rest. Raises `InputError`.
    """
    import torch  # here: what is checked before any training does not need it

    train, phase = entered.stage.train, entered.phase
    args = train.args(phase)
    per_device, accumulation = split_batch(
        train.batch_size(phase), processes(), args.get("per_device_train_batch_size")
    )
    on_cpu = not torch.accelerator.is_available()
    defaults = {
        **usual_settings(entered.recipe.name, entered.stage.folder),
        "disable_tqdm": not sys.stderr.isatty(),
        "dataloader_pin_memory": not on_cpu,
        # So that a GPU does not wait for pictures; on a CPU they would take the cores that train.
        "dataloader_num_workers": 0 if on_cpu else min(4, (os.cpu_count() or 1) // processes()),
    }
    if phase == "rft":
        defaults["disable_dropout"] = True  # with dropout, policy and reference differ by noise
    owned = {
        "output_dir": str(entered.output_dir),
        "seed": entered.seed,
        "per_device_train_batch_size": per_device,
        "gradient_accumulation_steps": accumulation,
        "bf16": entered.recipe.base_model.dtype == "bfloat16",
        "fp16": entered.recipe.base_model.dtype == "float16",
        "remove_unused_columns": False,
        "save_strategy": "no",
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # it would hide a NaN loss behind an average
        "ddp_backend": "gloo" if on_cpu and processes() > 1 else None,
        "use_cpu": on_cpu and not deepspeed(),  # bfloat16 and data parallel need it; with it, DeepSpeed is dropped
        "ddp_broadcast_buffers": False,  # the past of lineage `stack` is the same everywhere
        "ddp_find_unused_parameters": False,  # the loss touches them all (MethodLoss)
    }
    return _made(_config(phase), phase, {**defaults, **args, **owned, **own})


def _config(phase: str) -> Any:
    """TRL's class for the arguments of a phase."""
    from trl import GRPOConfig, SFTConfig  # here: takes seconds

    return SFTConfig if phase == "sft" else GRPOConfig


def _made(config: Callable[..., Any], paradigm: str, settings: Mapping[str, Any]) -> Any:
    """TRL's `config` of `settings`; what it refuses becomes an `InputError`."""
    try:
        return config(**settings)
    except (ValueError, TypeError) as error:
        field = f"train.{paradigm}.args"
        raise InputError(str(error).splitlines()[0], where="recipe", field=field) from None


def split_batch(global_batch: int, processes: int, per_device: int | None, replayed: int = 0) -> tuple[int, int]:
    """(samples per device and micro-batch, accumulation steps) of a global batch. Raises `InputError` with a remainder.

    Without `per_device`, the largest micro-batch: no accumulation. `replayed` samples come on top, and need not divide.
    """
    if global_batch % (processes * (per_device or 1)):
        parts = f"{processes} process{'es' if processes > 1 else ''}" + (f" × {per_device}" if per_device else "")
        raise InputError(f"{global_batch} does not divide by {parts}", where="recipe", field="train.global_batch_size")
    whole = global_batch + replayed
    per_device = per_device or -(-whole // processes)
    return per_device, -(-whole // (processes * per_device))


def processes() -> int:
    """How many processes the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def deepspeed() -> bool:
    """Whether the launcher was asked for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
