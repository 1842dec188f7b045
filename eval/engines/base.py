"""What every engine takes and gives: requests to policies, greedy responses, log-probabilities of completions."""

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from mcit.data_prep.chat import render_chat
from mcit.data_prep.errors import InputError
from mcit.data_prep.files import hash_json, read_json
from mcit.data_prep.schema import Message
from mcit.eval.serving import Serving, read_serving


@dataclass(frozen=True, eq=False)
class Policy:
    """A `Serving` and the folder it lies in."""

    serving: Serving
    folder: Path

    @property
    def adapter(self) -> Path | None:
        """The folder of the LoRA; None for the base and for merged models."""
        return self.folder / str(self.serving.path) if self.serving.kind == "adapter" else None

    @property
    def model(self) -> str:
        """The weights an engine loads: the untouched base (folder or Hub id), or a merged model's folder."""
        return str(self.folder / str(self.serving.path)) if self.serving.kind == "merged" else self.serving.base

    @property
    def extension(self) -> Path | None:
        """The folder of modules that a method adds to the base."""
        return self.folder / str(self.serving.path) if self.serving.kind == "extended" else None

    @property
    def by_itself(self) -> bool:
        """Whether it has weights of its own, and so an engine."""
        return self.serving.kind in ("extended", "merged")

    @property
    def revision(self) -> str | None:
        """The Hub revision of `model`."""
        return None if self.serving.kind == "merged" else self.serving.revision

    @property
    def engine_key(self) -> str:
        """Policies with equal keys can share an engine."""
        serving = self.serving
        extension = [str(self.extension)] if self.extension else []
        settings = [serving.dtype, serving.processor, serving.trust_remote_code]
        return hash_json([self.model, self.revision, *settings, *extension])

    def base(self) -> "Policy":
        """The untouched base of this policy, as a policy."""
        update = {
            "stage": 0,
            "name": "base",
            "kind": "base",
            "path": None,
            "rank": None,
            "hash": self.serving.base_hash,
        }
        return Policy(self.serving.model_copy(update=update), self.folder)


def read_policy(stage_dir: Path) -> Policy:
    """The policy of a stage's folder. Raises `InputError` where its files are missing."""
    policy = Policy(read_serving(stage_dir), stage_dir)
    if policy.serving.kind != "base" and not (policy.serving.path and (stage_dir / policy.serving.path).is_dir()):
        raise InputError(
            "no such folder", where=stage_dir / "serving.json", field="path", remedy="Train the stage again"
        )
    return policy


class Request(NamedTuple):
    """One question to one policy. The images belong to the first user turn, in order."""

    prompt: Sequence[Message]
    images: Sequence[Path]
    policy: Policy
    completion: str = ""  # what `logprobs` scores; `generate` does not look at it
    pattern: str = ""  # a regular expression that the whole answer is held to; empty: the answer is free


class Response(NamedTuple):
    """A greedy answer."""

    text: str
    finished: bool  # ended by itself; False: cut off at the limit of tokens
    tokens: int  # generated, the closing one included
    prompt: str  # the text as the model got it, image placeholders not expanded


class Scored(NamedTuple):
    """A completion under teacher forcing."""

    prompt_ids: list[int]  # as the model saw them, image tokens expanded
    logprobs: list[float]  # of each token of the completion and of the end token, in nats


class Unscored(Exception):
    """An engine that cannot give log-probabilities was asked for some; the text says why."""


Then = Callable[[int, Response], Request | None]


class Engine(Protocol):
    """Serves the policies it was made with and their base; another one's request is a `KeyError`, never answered.

    Images are read when their request is started.
    """

    name: str  # stands beside every answer

    def serves(self, policy: Policy) -> bool:
        """Whether it answers requests to `policy`."""
        ...

    def stream(
        self, requests: Sequence[Request], max_new_tokens: int, then: Then | None = None
    ) -> Iterator[tuple[int, Response]]:
        """Answer greedily; gives (index of the request, response) as each is done, in any order.

        `then` is told of each answer before it is given, and may return one more request to the same policy, about the
        same images. It is asked soon, while they are in the caches, and gets the next index after all others.
        """
        ...

    def logprobs(self, requests: Sequence[Request]) -> list[Scored]:
        """The log-probability of each token of each request's completion, in the requests' order.

        Raises `Unscored`.
        """
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...


def generate(engine: Engine, requests: Sequence[Request], max_new_tokens: int) -> list[Response]:
    """Answer greedily, in the requests' order."""
    answers = dict(engine.stream(requests, max_new_tokens))
    return [answers[i] for i in range(len(requests))]


def load_processor(serving: Serving) -> Any:
    """The base's processor with the recipe's settings, padding on the left as generation needs it.

    Raises `InputError` for a setting that it does not have: transformers would ignore it.
    """
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(
        serving.base, revision=serving.revision, trust_remote_code=serving.trust_remote_code, **serving.processor
    )
    if getattr(processor, "tokenizer", None) is None:
        raise InputError("has no processor for images and text", where=serving.base, field="base_model.path")
    images = getattr(processor, "image_processor", None)
    known = [*getattr(getattr(images, "valid_kwargs", None), "__annotations__", ())]
    for key in serving.processor:
        if key not in known and not any(hasattr(part, key) for part in (processor, images, processor.tokenizer)):
            near = difflib.get_close_matches(key, known, n=1)
            remedy = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(sorted(known))}"
            problem = f"{type(processor).__name__} has no such setting"
            raise InputError(problem, where=serving.base, field=f"base_model.processor.{key}", remedy=remedy)
    processor.tokenizer.padding_side = "left"
    return processor


def load_config(policy: Policy) -> Any:
    """The configuration of a policy's model."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(
        policy.model, revision=policy.revision, trust_remote_code=policy.serving.trust_remote_code
    )


def unadapted(policies: Sequence[Policy]) -> set[str]:
    """The hashes of what an engine with `policies` serves without an adapter: a policy by itself, or the base."""
    return {p.serving.hash if p.by_itself else p.serving.base_hash for p in policies}


def render(processor: Any, request: Request) -> str:
    """The prompt of a request as text. Every engine gets this and adds nothing to it."""
    return render_chat(processor, request.prompt, len(request.images))


def completed(processor: Any, request: Request) -> tuple[str, int]:
    """The prompt with its completion and an end token, as text, and how many tokens that adds.

    Engines get the whole text, so that both cut it into the same tokens.
    """
    tokenizer, prompt = processor.tokenizer, render(processor, request)
    whole = prompt + request.completion + tokenizer.eos_token

    def length(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    return whole, length(whole) - length(prompt)


def end_tokens(policy: Policy, tokenizer: Any) -> list[int]:
    """The ids that end an answer: the generation configuration's and the tokenizer's."""
    from transformers import GenerationConfig

    try:
        configured = GenerationConfig.from_pretrained(
            policy.serving.base, revision=policy.serving.revision or "main"
        ).eos_token_id
    except OSError:  # a model without a generation_config.json
        configured = None
    listed = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in [*listed, tokenizer.eos_token_id] if token is not None})


def image_tokens(config: Any) -> list[int]:
    """The ids that stand for images and videos. A model that is broken enough to say one must not be able to."""
    tokens = config.to_dict().items()
    pattern = re.compile(r"(image|video|vision|audio)\w*_token_(id|index)")
    return sorted({token for key, token in tokens if pattern.fullmatch(key) and isinstance(token, int)})


def answer_text(tokenizer: Any, ids: Sequence[int], ends: Sequence[int]) -> str:
    """Generated ids as text: without the end token and other special tokens, otherwise unchanged."""
    kept = ids[:-1] if ids and ids[-1] in ends else ids
    return tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def adapter_config(policy: Policy) -> dict[str, Any]:
    """A LoRA's `adapter_config.json`. Raises `InputError` for anything but LoRA."""
    assert policy.adapter is not None
    config = read_json(policy.adapter / "adapter_config.json")
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise InputError("is not a LoRA adapter", where=policy.adapter / "adapter_config.json", field="peft_type")
    return config


def lora_rank(policy: Policy) -> int:
    """The largest rank of any module of a policy's adapter; 0 without one."""
    if policy.adapter is None:
        return 0
    config = adapter_config(policy)
    return max(int(config["r"]), *(int(rank) for rank in (config.get("rank_pattern") or {}).values()), 0)


def adapter_tensors(policy: Policy) -> list[str]:
    """The tensor names of a LoRA. Raises `InputError` if its file is missing or broken."""
    from safetensors import SafetensorError, safe_open

    assert policy.adapter is not None
    path = policy.adapter / "adapter_model.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except FileNotFoundError:
        raise InputError("no such file", where=path) from None
    except SafetensorError as error:
        raise InputError(f"is not a safetensors file: {error}", where=path) from None
