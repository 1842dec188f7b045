"""What vLLM is told of a model, whether it runs in this process or is a server."""

from typing import Any

from .base import Policy

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM 0.31 allows for max_lora_rank
MAX_RANK = RANKS[-1]  # an adapter of a higher one is served as a merged copy
# What all slots' ranks add up to. Slots lie beside the weights: at 1,024 they are a third of a 7B model on top of it.
# Adapters that find no slot wait in the computer's memory for their turn.
SLOT_RANKS = 1024
MERGED = "vllm (merged copy)"  # the engine's name where it serves one


class EngineFailed(Exception):
    """vLLM could not be started; the text says why."""


def engine_settings(policy: Policy, max_images: int, max_model_len: int | None) -> dict[str, Any]:
    """Arguments of `vllm.LLM` for a policy's model; `max_images` is the largest number of images in one request."""
    import torch  # here: takes seconds

    serving = policy.serving
    return {
        "model": policy.model,
        "tokenizer": serving.base,
        "revision": policy.revision,
        "tokenizer_revision": serving.revision,
        "trust_remote_code": serving.trust_remote_code,
        "load_format": "safetensors",  # never a pickle
        "dtype": serving.dtype,
        "mm_processor_kwargs": serving.processor or None,
        "mm_processor_cache_gb": 0,  # a prompt is read once for all policies, by `VllmEngine`
        "limit_mm_per_prompt": {"image": max_images, "video": 0},
        "max_model_len": max_model_len or -1,  # -1: the model's own, less if the memory does not hold it
        # The library of the transformers engine too: held to a pattern, both give the same answers.
        "structured_outputs_config": {"backend": "guidance"},
        "use_tqdm_on_load": False,
        "enforce_eager": not torch.cuda.is_available(),
        "seed": 0,
    }


def max_lora_rank(rank: int) -> int:
    """The smallest rank vLLM allows that holds `rank`. Raises `EngineFailed` above 512."""
    for allowed in RANKS:
        if rank <= allowed:
            return allowed
    raise EngineFailed(f"an adapter of rank {rank} is more than vLLM serves, {RANKS[-1]}")
