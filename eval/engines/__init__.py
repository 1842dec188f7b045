"""Engines answer requests to policies. `vllm` where it runs, `transformers` everywhere."""

from collections.abc import Callable, Sequence

from mcit.data_prep.errors import InputError
from mcit.eval.config import EvalConfig

from .base import Engine, Policy, Request, Response, Scored, generate, read_policy

__all__ = ["Engine", "Policy", "Request", "Response", "Scored", "generate", "make_engine", "read_policy"]


FALLBACK = "evaluating with transformers, which is slower"  # what is said where vLLM cannot run


def make_engine(
    policies: Sequence[Policy], config: EvalConfig, max_images: int, say: Callable[[str], None] = print
) -> Engine:
    """The engine `config.engine` asks for, with all of `policies`, which share a model.

    `auto` takes vLLM where it serves the model and starts, transformers otherwise, and says why. `max_images` is the
    largest number of images in one request. Raises `InputError`.
    """
    from .transformers import TransformersEngine

    if len({policy.engine_key for policy in policies}) != 1:
        raise ValueError("policies on different models cannot share an engine")
    if config.engine != "transformers":
        from .vllm import EngineFailed, VllmEngine, why_not_vllm

        reason = why_not_vllm(policies[0])
        if reason is None:
            try:
                return VllmEngine(policies, config, max_images)
            except EngineFailed as error:
                reason = str(error)
        if config.engine == "vllm":
            remedy = "Set it to auto or transformers; `mcit doctor` says more"
            raise InputError(reason, field="eval.engine", remedy=remedy)
        say(f"{FALLBACK}: {reason}")
    return TransformersEngine(policies, config)
