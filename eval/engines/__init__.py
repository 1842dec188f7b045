"""Engines answer requests to policies. `vllm` where it runs, `transformers` everywhere, `remote` where a server is."""

from collections.abc import Callable, Iterable, Sequence

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import hash_json
from mcit.eval.config import EvalConfig

from .base import Engine, Policy, Request, Response, Scored, generate, lora_rank, read_policy
from .settings import MAX_RANK, MERGED, EngineFailed

__all__ = [
    "Engine",
    "Policy",
    "Request",
    "Response",
    "Scored",
    "engine_name",
    "generate",
    "make_engine",
    "read_policy",
    "share",
]

FALLBACK = "evaluating with transformers, which is slower"  # what is said where vLLM cannot run


def engine_name(policy: Policy, config: EvalConfig) -> str:
    """The name of the engine that `config.engine` means for a policy, if it starts. Imports vLLM."""
    from .vllm import why_not_vllm

    if config.engine == "remote":
        return "remote"
    if config.engine == "transformers" or why_not_vllm(policy) is not None:
        return "transformers"
    return MERGED if lora_rank(policy) > MAX_RANK else "vllm"


def share(policies: Iterable[Policy], config: EvalConfig) -> list[list[Policy]]:
    """Policies, each once, in groups that one engine serves; the largest group first.

    Those on one model share an engine, but for those that are served as merged copies.
    """
    groups: dict[str, list[Policy]] = {}
    for policy in {policy.serving.hash: policy for policy in policies}.values():
        alone = policy.serving.hash if engine_name(policy, config) == MERGED else ""
        groups.setdefault(hash_json([policy.engine_key, alone]), []).append(policy)
    return sorted(groups.values(), key=len, reverse=True)


def gpus() -> int:
    """The GPUs that this process sees; vLLM runs on each of them."""
    import torch

    return torch.cuda.device_count()


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
    if config.engine == "remote":
        from .remote import RemoteEngine  # here: imports the client, which takes a second

        return RemoteEngine(policies, config)
    if config.engine != "transformers":
        from .vllm import VllmEngine, why_not_vllm

        reason = why_not_vllm(policies[0])
        if reason is None:
            try:
                if (count := gpus()) > 1:
                    from .replicas import ReplicatedEngine

                    return ReplicatedEngine(policies, config, max_images, count)
                return VllmEngine(policies, config, max_images)
            except EngineFailed as error:
                reason = str(error)
        if config.engine == "vllm":
            remedy = "Set it to auto or transformers; `mcit doctor` says more"
            raise InputError(reason, field="eval.engine", remedy=remedy)
        say(f"{FALLBACK}: {reason}")
    return TransformersEngine(policies, config)
