"""The vLLM engine: one copy of the base, every policy a LoRA request, all cells mixed in one queue."""

import contextlib
import importlib.util
import os
from collections import deque
from collections.abc import Iterator, Sequence
from functools import cache, cached_property, lru_cache
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcit.data_prep.chat import open_image, tokenizer_options
from mcit.data_prep.errors import InputError
from mcit.eval.config import EvalConfig
from mcit.eval.hashing import cache_dir, model_folder

from .applied import ignored_tensors
from .base import (
    Policy,
    Request,
    Response,
    Scored,
    Then,
    adapter_config,
    adapter_tensors,
    answer_text,
    completed,
    end_tokens,
    image_tokens,
    load_config,
    load_processor,
    lora_rank,
    render,
    unadapted,
)
from .settings import MAX_RANK, MERGED, SLOT_RANKS, EngineFailed, engine_settings, max_lora_rank

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

# vLLM reads these when it is imported; a user's own setting wins.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # an engine that can be asked what it did with an adapter
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; without a GPU alone
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # it would report what it runs to its makers

READ = 64  # prompts that are kept as they were read, for the next policy: questions on one picture, if not very many
IN_FLIGHT = 512  # requests handed to vLLM at a time: enough to keep it busy, few enough to hold their images


class VllmEngine:
    """An in-process `vllm.LLM`. Adapters are named by content hash, so that no cache can mistake one for another."""

    name = "vllm"
    _copy = contextlib.ExitStack()  # holds the merged copy that is served, if one is

    def __init__(self, policies: Sequence[Policy], config: EvalConfig, max_images: int):
        """Start vLLM on the model of `policies` (they share it) and load their adapters.

        `max_images` is the largest number of images in one request. A policy whose rank is more than `MAX_RANK` has an
        engine of its own, for a merged copy. Raises `InputError` for an adapter that vLLM would not apply in full,
        `EngineFailed` if vLLM does not start.
        """
        first, merged = policies[0], max(map(lora_rank, policies)) > MAX_RANK
        adapters = [policy for policy in policies if policy.adapter is not None and not merged]
        rank = max(map(lora_rank, adapters), default=0)
        self.processor = load_processor(first.serving)
        self.slots = min(len(adapters), max(1, SLOT_RANKS // max_lora_rank(rank)))
        self._loras: dict[str, LoRARequest | None] = dict.fromkeys(unadapted(policies))
        self._numbers = count(1)  # of adapters: none is given out twice
        with contextlib.ExitStack() as copy:
            settings: dict[str, Any] = {}
            if merged:
                from .merging import merged_copy

                [policy] = policies
                settings = {"model": str(copy.enter_context(merged_copy(policy, cache_dir()))), "revision": None}
                self.name, self._loras = MERGED, {policy.serving.hash: None}
            self._llm = self._start(first, config, max_images, len(adapters), rank, **settings)
            self._copy = copy.pop_all()
        try:
            self.ends = end_tokens(first, self.processor.tokenizer)
            self.forbidden = image_tokens(load_config(first))
            if adapters and self._lacks_kernels():
                raise EngineFailed("vLLM has no LoRA for mixtures of experts on a CPU")
            for policy in adapters:
                self.add(policy)
        except BaseException:
            self.close()
            raise

    def _start(
        self, first: Policy, config: EvalConfig, max_images: int, adapters: int, rank: int, **settings: Any
    ) -> Any:
        lora: dict[str, Any] = {}
        if adapters:
            lora = {
                "enable_lora": True,
                "max_loras": self.slots,
                "max_cpu_loras": adapters,
                "max_lora_rank": max_lora_rank(rank),
            }
        try:
            from vllm import LLM
            from vllm.platforms import current_platform

            all_settings = engine_settings(first, max_images, config.max_model_len) | lora | settings
            if current_platform.is_cpu():
                from .vllm_cpu import install, use_threads

                install()
                use_threads(model_folder(all_settings["model"], all_settings["revision"]))
            return LLM(**all_settings)
        except Exception as error:  # whatever stops vLLM, here it only means: no vLLM
            reason = " ".join(str(error).split()) or type(error).__name__
            raise EngineFailed(f"vLLM did not start: {reason[:500]}") from error

    def _lacks_kernels(self) -> bool:
        """Whether requests with an adapter would fail: experts are multiplied by Triton, which a CPU does not have."""
        from vllm.lora.utils import is_moe_model
        from vllm.platforms import current_platform

        [mixture] = self._llm.apply_model(is_moe_model)
        return mixture and current_platform.is_cpu()

    def add(self, policy: Policy) -> None:
        """Hand an adapter to vLLM. Raises `InputError` for anything of it that vLLM would leave out."""
        from vllm.lora.request import LoRARequest

        if policy.serving.hash in self._loras:
            return
        remedy = "Use the transformers engine, or train what vLLM serves: LoRA on the language model"
        config, names = adapter_config(policy), adapter_tensors(policy)
        # vLLM reads neither of these and would scale every module alike.
        for key in ("alpha_pattern", "rank_pattern"):
            if config.get(key):
                raise InputError("is not applied by vLLM", where=policy.adapter, field=key, remedy=remedy)
        number = next(self._numbers)
        lora = LoRARequest(policy.serving.hash, number, str(policy.adapter))
        try:
            self._llm.llm_engine.add_lora(lora)
        except Exception as error:  # vLLM's own refusals, for which it has no type
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"vLLM refuses the adapter: {reason}", where=policy.adapter, remedy=remedy) from error
        [ignored] = self._llm.apply_model(lambda model: ignored_tensors(model, number, names))
        if ignored:
            self._llm.llm_engine.remove_lora(number)
            raise InputError(
                f"vLLM would ignore {len(ignored)} of {len(names)} tensors, the first: {ignored[0]}",
                where=policy.adapter,
                remedy=remedy,
            )
        self._loras[policy.serving.hash] = lora

    def remove(self, policy: Policy) -> None:
        """Have vLLM forget an adapter."""
        lora = self._loras.pop(policy.serving.hash)
        if lora is not None:
            self._llm.llm_engine.remove_lora(lora.lora_int_id)

    def stream(
        self, requests: Sequence[Request], max_new_tokens: int, then: Then | None = None
    ) -> Iterator[tuple[int, Response]]:
        """See `Engine.stream`. The order of work is image → adapter → question, for the encoder and prefix caches."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        @cache
        def parameters(pattern: str) -> SamplingParams:
            return SamplingParams(
                temperature=0,
                max_tokens=max_new_tokens,
                stop_token_ids=self.ends,
                logit_bias=dict.fromkeys(self.forbidden, float("-inf")),
                structured_outputs=StructuredOutputsParams(regex=pattern) if pattern else None,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )

        requests, waiting = list(requests), deque(self._order(requests))
        prompts = [render(self.processor, request) for request in requests]
        asked = [parameters(request.pattern) for request in requests]
        for index, output in self._run(requests, prompts, waiting, asked):
            answer = output.outputs[0]
            ids = list(answer.token_ids)
            text = answer_text(self.processor.tokenizer, ids, self.ends)
            response = Response(text, answer.finish_reason == "stop", len(ids), prompts[index])
            if then and (request := then(index, response)):
                waiting.appendleft(len(requests))
                requests.append(request)
                prompts.append(render(self.processor, request))
                asked.append(parameters(request.pattern))
            yield index, response

    def logprobs(self, requests: Sequence[Request]) -> list[Scored]:
        """See `Engine.logprobs`. The prompt's cached prefix is not read, or there would be no log-probs for it."""
        from vllm import SamplingParams

        texts, counts = zip(*(completed(self.processor, request) for request in requests), strict=True)
        parameters = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        results = {}
        for index, output in self._run(requests, texts, deque(range(len(requests))), [parameters] * len(requests)):
            ids, length = output.prompt_token_ids, counts[index]
            rows = output.prompt_logprobs[-length:]
            picked = [row[token].logprob for row, token in zip(rows, ids[-length:], strict=True)]
            results[index] = Scored(list(ids[:-length]), picked)
        return [results[i] for i in range(len(requests))]

    def _order(self, requests: Sequence[Request]) -> list[int]:
        """Indices by image → adapter → question; if adapters outnumber the slots, a slotful of adapters at a time."""

        def key(index: int) -> tuple[int, list[str], int, int]:
            lora = self._loras[requests[index].policy.serving.hash]
            number = lora.lora_int_id if lora else 0
            wave = (number - 1) // self.slots if number else 0
            return wave, [str(path) for path in requests[index].images], number, index

        return sorted(range(len(requests)), key=key)

    def _run(
        self, requests: Sequence[Request], texts: Sequence[str], waiting: deque[int], parameters: Sequence[Any]
    ) -> Iterator[tuple[int, Any]]:
        """(index, vLLM's output) as each request ends; the queue is topped up, so that the engine never runs dry.

        `waiting` holds the indices in the order of work; whoever takes an output may add to it and to the others.
        """
        running: dict[str, int] = {}
        try:
            while waiting or running:
                while waiting and len(running) < IN_FLIGHT:
                    index = waiting.popleft()
                    name = self._enqueue(requests[index], texts[index], parameters[index])
                    running[name] = index
                for output in self._llm.llm_engine.step():
                    if output.finished:
                        yield running.pop(output.request_id), output
        finally:
            if running:
                self._llm.llm_engine.abort_request(list(running))

    def _enqueue(self, request: Request, text: str, parameters: Any) -> str:
        from vllm.exceptions import VLLMValidationError

        try:
            prompt = self._read(text, *request.images)
            lora, name = self._loras[request.policy.serving.hash], str(next(self._llm.request_counter))
            name = self._llm.llm_engine.add_request(name, prompt, parameters, lora_request=lora)
        except VLLMValidationError as error:
            raise InputError(
                f"vLLM refuses a prompt: {error}",
                field=f"prompt beginning {text[:60]!r}",
                remedy="Lower base_model.processor.max_pixels, or raise eval.max_model_len",
            ) from error
        return str(name).rsplit("-", 1)[0]  # outputs carry the name without vLLM's random suffix

    @cached_property
    def _read(self) -> Any:
        return lru_cache(READ)(self._render)

    def _render(self, text: str, *images: Path) -> Any:
        """A prompt as vLLM's engine takes it: tokens, and what the processor makes of the images."""
        prompt: dict[str, Any] = {"prompt": text}
        if images:
            prompt["multi_modal_data"] = {"image": [open_image(path) for path in images]}
        return self._llm._preprocess_cmpl_one(prompt, tokenizer_options(self.processor, text))

    def serves(self, policy: Policy) -> bool:
        """See `Engine.serves`."""
        return policy.serving.hash in self._loras

    def close(self) -> None:
        """See `Engine.close`."""
        from vllm.distributed import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        cleanup_dist_env_and_memory()
        self._copy.close()


def why_not_vllm(policy: Policy) -> str | None:
    """Why vLLM cannot serve a policy's model, or None if nothing speaks against it. Imports vLLM."""
    if policy.extension:
        return "it has no layers of a method's own"
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed"
    try:
        from vllm.model_executor.models import ModelRegistry
    except (ImportError, OSError, RuntimeError) as error:  # built for another machine, or another torch
        return f"vLLM cannot be imported: {str(error).splitlines()[0]}"
    served = ModelRegistry.get_supported_archs()
    names = load_config(policy).architectures or []
    return None if any(name in served for name in names) else f"vLLM does not serve {', '.join(names) or 'this model'}"
