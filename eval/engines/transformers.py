"""The transformers engine: slower, serves whatever transformers and PEFT load, and is what vLLM is compared with."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from mcit.data_prep.chat import open_image, tokenizer_options
from mcit.data_prep.errors import InputError
from mcit.eval.config import EvalConfig
from mcit.eval.extension import IGNORED, extend

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
    render,
    unadapted,
)

if TYPE_CHECKING:
    from .grammar import Patterns


class TransformersEngine:
    """One copy of the weights with every LoRA loaded beside it; a batch is of one policy, with or without images, and
    all its answers are free or all are held to patterns."""

    name = "transformers"

    def __init__(self, policies: Sequence[Policy], config: EvalConfig):
        """Load the model of `policies` (they share it) and their adapters. Raises `InputError`."""
        from transformers import AutoModelForImageTextToText, GenerationConfig

        first = policies[0]
        self.batch_size = config.batch_size
        self.served = unadapted(policies) | {policy.serving.hash for policy in policies if policy.adapter is not None}
        text = load_config(first).get_text_config()
        self.context = config.max_model_len or text.max_position_embeddings  # tokens, prompt and answer
        self.processor = load_processor(first.serving)
        if self.processor.tokenizer.pad_token is None:
            self.processor.tokenizer.pad_token = self.processor.tokenizer.eos_token
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model: Any = AutoModelForImageTextToText.from_pretrained(
            first.model,
            revision=first.revision,
            trust_remote_code=first.serving.trust_remote_code,
            use_safetensors=True,  # never a pickle
            dtype=getattr(torch, first.serving.dtype),
        )
        if first.extension:
            extend(model, first.extension)
        # The model's own generation defaults (a repetition penalty, a temperature) would change greedy answers.
        self.ends = end_tokens(first, self.processor.tokenizer)
        model.generation_config = GenerationConfig(
            do_sample=False,
            eos_token_id=self.ends,
            pad_token_id=self.processor.tokenizer.pad_token_id,
            suppress_tokens=image_tokens(load_config(first)) or None,
        )
        self.adapters: set[str] = set()
        self.model = model.to(self.device).eval()
        for policy in policies:
            if policy.adapter is not None and policy.serving.hash not in self.adapters:
                self.model = load_lora(self.model, policy).to(self.device)
                self.adapters.add(policy.serving.hash)
        self.model.eval()

    def stream(
        self, requests: Sequence[Request], max_new_tokens: int, then: Then | None = None
    ) -> Iterator[tuple[int, Response]]:
        """See `Engine.stream`. One batch is decoded at a time; what follows from answers comes after all of them."""
        prompts = [render(self.processor, request) for request in requests]
        more: list[Request] = []
        for batch in self._batches(requests, prompts):
            for index, (ids, finished) in zip(
                batch,
                self._generate([requests[i] for i in batch], [prompts[i] for i in batch], max_new_tokens),
                strict=True,
            ):
                text = answer_text(self.processor.tokenizer, ids, self.ends)
                answer = Response(text, finished, len(ids), prompts[index])
                if then and (request := then(index, answer)):
                    more.append(request)
                yield index, answer
        if more:
            for index, answer in self.stream(more, max_new_tokens):
                yield len(requests) + index, answer

    @cached_property
    def _patterns(self) -> "Patterns":
        from .grammar import Patterns

        return Patterns(self.processor.tokenizer, self.model.get_output_embeddings().weight.shape[0])

    def _batches(self, requests: Sequence[Request], prompts: Sequence[str]) -> Iterator[list[int]]:
        """Indices in batches of one policy, with images or without (processors refuse a mix), of similar lengths.

        Free answers have batches of their own, so that they are the same whatever else is asked.
        """
        groups: dict[tuple[str, bool, bool], list[int]] = {}
        for index, request in enumerate(requests):
            key = (request.policy.serving.hash, bool(request.images), bool(request.pattern))
            groups.setdefault(key, []).append(index)
        for group in groups.values():
            group.sort(key=lambda index: len(prompts[index]))
            for start in range(0, len(group), self.batch_size):
                yield group[start : start + self.batch_size]

    @torch.inference_mode()
    def _generate(
        self, requests: Sequence[Request], prompts: Sequence[str], max_new_tokens: int
    ) -> list[tuple[list[int], bool]]:
        """The generated ids of each request up to its end token, and whether there was one."""
        inputs = self._inputs(requests, prompts)
        patterns = [request.pattern for request in requests]
        held = [self._patterns.hold(patterns)] if patterns[0] else None
        with self._active(requests[0].policy):
            output = self.model.generate(**inputs, max_new_tokens=max_new_tokens, logits_processor=held)
        rooms = (self.context - inputs["attention_mask"].sum(1)).tolist()
        answers = []
        for row, room in zip(output[:, inputs["input_ids"].shape[1] :].tolist(), rooms, strict=True):
            end = next((place for place, token in enumerate(row[:room]) if token in self.ends), None)
            answers.append((row[:room] if end is None else row[: end + 1], end is not None))
        return answers

    @torch.inference_mode()
    def logprobs(self, requests: Sequence[Request]) -> list[Scored]:
        """See `Engine.logprobs`. One request at a time: padding would change the numbers a little."""
        results = []
        for request in requests:
            text, count = completed(self.processor, request)
            inputs = self._inputs([request], [text])
            ids = inputs["input_ids"]
            with self._active(request.policy):
                told = {"labels": _labels(ids, count)} if request.policy.extension else {}
                logits = self.model(**inputs, **told).logits[0, -count - 1 : -1].float()  # [count, vocabulary]
            picked = logits.log_softmax(-1).gather(1, ids[0, -count:, None])[:, 0]
            results.append(Scored(ids[0, :-count].tolist(), picked.tolist()))
        return results

    def _inputs(self, requests: Sequence[Request], texts: Sequence[str]) -> Any:
        images = [[open_image(path) for path in request.images] for request in requests]
        inputs = self.processor(
            text=list(texts),
            images=images if requests[0].images else None,
            padding=True,
            return_tensors="pt",
            **tokenizer_options(self.processor, texts[0]),
        )
        longest = inputs["input_ids"].shape[1]
        if longest > self.context:
            remedy = "Lower base_model.processor.max_pixels, or raise eval.max_model_len"
            raise InputError(f"a prompt takes {longest} tokens and {self.context} fit", remedy=remedy)
        return inputs.to(self.device, dtype=self.model.dtype)

    def _active(self, policy: Policy) -> AbstractContextManager[Any]:
        """Switch to a policy; the base is the model with every adapter off."""
        if not self.serves(policy):
            raise KeyError(policy.serving.hash)
        if policy.adapter is not None:
            self.model.set_adapter(policy.serving.hash)
            return nullcontext()
        return self.model.disable_adapter() if self.adapters else nullcontext()

    def serves(self, policy: Policy) -> bool:
        """See `Engine.serves`."""
        return policy.serving.hash in self.served

    def close(self) -> None:
        """See `Engine.close`."""
        del self.model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def load_lora(model: Any, policy: Policy) -> Any:
    """`model`, a PEFT model or not yet one, with a policy's adapter added under its content hash.

    Raises `InputError` for an adapter that belongs to another base: for a tensor that PEFT leaves out or makes up, or
    that has another shape.
    """
    from peft import PeftModel, get_peft_model_state_dict

    adapter_config(policy)
    name, remedy = policy.serving.hash, "The adapter belongs to another base, or its files are incomplete"
    try:
        if isinstance(model, PeftModel):
            model.load_adapter(str(policy.adapter), adapter_name=name)
        else:
            model = PeftModel.from_pretrained(model, str(policy.adapter), adapter_name=name)
    except (RuntimeError, ValueError) as error:  # PEFT's: tensors of another shape, no such module
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"does not fit the base model: {reason}", where=policy.adapter, remedy=remedy) from error
    live, stored = set(get_peft_model_state_dict(model, adapter_name=name)), set(adapter_tensors(policy))
    if live != stored:
        problem = f"{len(live ^ stored)} tensors do not fit the base model, the first: {min(live ^ stored)}"
        raise InputError(problem, where=policy.adapter, remedy=remedy)
    return model


def _labels(ids: torch.Tensor, count: int) -> torch.Tensor:
    """What tells a model with an extension where a question ends: the last `count` tokens are its answer."""
    labels = torch.full_like(ids, IGNORED)
    labels[:, -count:] = ids[:, -count:]
    return labels
