"""The remote engine: a vLLM server answers (`eval.remote`), and every adapter is a LoRA module of it.

Modules are named by content hash. Those that are not there yet are loaded through the server's own endpoint, where it
allows that and sees the files.
"""

import contextlib
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import lru_cache
from pathlib import Path
from typing import Any

import openai

from mcit.data_prep.chat import to_chat, tokenizer_options
from mcit.data_prep.errors import InputError
from mcit.data_prep.images import data_url
from mcit.data_prep.schema import Message
from mcit.eval.config import EvalConfig

from .base import (
    Policy,
    Request,
    Response,
    Scored,
    Then,
    Unscored,
    adapter_config,
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

_LATER = "Nothing is lost: run it again when the server is well, and it goes on from here"
# A server takes what a request does not say from the model's generation_config.json: a repetition penalty, say.
_GREEDY: dict[str, Any] = {"temperature": 0, "top_p": 1, "presence_penalty": 0, "frequency_penalty": 0, "n": 1}
_GREEDY_VLLM: dict[str, Any] = {"top_k": 0, "min_p": 0, "repetition_penalty": 1}


class RemoteEngine:
    """A vLLM server. Requests are sent `concurrency` at a time, image after image, for its caches."""

    name = "remote"

    def __init__(self, policies: Sequence[Policy], config: EvalConfig):
        """Find the server, and have it load the adapters of `policies` (they share a model) that it does not serve.

        Raises `InputError` where it cannot be reached or does not serve a policy.
        """
        assert config.remote is not None
        self.config, first = config.remote, policies[0]
        self.processor = load_processor(first.serving)
        self.ends = end_tokens(first, self.processor.tokenizer)
        self.forbidden = {str(token): -100 for token in image_tokens(load_config(first))}
        self._client = openai.OpenAI(
            base_url=self.config.endpoint,
            api_key=os.environ.get(self.config.api_key_env) or "none",  # a server of one's own wants none
            timeout=self.config.timeout,
            max_retries=self.config.retries,
        )
        try:
            with self._talking("cannot be used"):
                models = self._client.models.list().data
            served = {model.id for model in models}
            bases = [model.id for model in models if not getattr(model, "parent", None)]
            self._names = {name: self._unadapted(name, policies, bases) for name in unadapted(policies)}
            for policy in policies:
                if policy.adapter is not None:
                    if policy.serving.hash not in served:
                        self._load(policy)
                    self._names[policy.serving.hash] = policy.serving.hash
        except BaseException:
            self.close()
            raise

    def _unadapted(self, digest: str, policies: Sequence[Policy], bases: Sequence[str]) -> str:
        """What the server calls the model of `policies`: the base as it likes, a merged model by its hash."""
        if policies[0].extension:
            problem = "has modules of a method's own, which no server has"
            raise InputError(problem, where=policies[0].folder, remedy="Set eval.engine to transformers")
        wanted = digest if policies[0].by_itself else self.config.model or bases[0]
        if wanted in bases:
            return wanted
        remedy = f"Start one with `--model {policies[0].model} --served-model-name {wanted}`"
        raise self._error(f"serves no {wanted}, but {', '.join(bases)}", remedy)

    def _load(self, policy: Policy) -> None:
        """Have the server load an adapter."""
        adapter_config(policy)
        path = str(Path(str(policy.adapter)).resolve())
        body = {"lora_name": policy.serving.hash, "lora_path": path}
        try:
            self._client.with_options(max_retries=0).post("/load_lora_adapter", body=body, cast_to=str)
        except openai.APIStatusError as error:
            start = f"`--enable-lora --max-lora-rank {lora_rank(policy)} --lora-modules {policy.serving.hash}={path}`"
            raise self._error(
                f"does not load the adapter of stage {policy.serving.stage} ({_said(error)})",
                f"Start it with {start}, or with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True where it sees the files",
            ) from None
        except openai.APIConnectionError as error:
            raise self._error(f"stopped answering: {error.__cause__ or error}", _LATER) from None

    def serves(self, policy: Policy) -> bool:
        """See `Engine.serves`."""
        return policy.serving.hash in self._names

    def stream(
        self, requests: Sequence[Request], max_new_tokens: int, then: Then | None = None
    ) -> Iterator[tuple[int, Response]]:
        """See `Engine.stream`. What was answered before the server failed is given before that is raised."""
        requests, waiting = list(requests), deque(self._order(requests))
        pool, failure = ThreadPoolExecutor(self.config.concurrency), None
        running: dict[Future[Response], int] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self.config.concurrency:
                    index = waiting.popleft()
                    running[pool.submit(self._answer, requests[index], max_new_tokens)] = index
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    index = running.pop(future)
                    if error := future.exception():
                        failure = failure or error
                        waiting.clear()
                        continue
                    if then and not failure and (request := then(index, future.result())):
                        waiting.appendleft(len(requests))
                        requests.append(request)
                    yield index, future.result()
            if failure:
                raise failure
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _order(self, requests: Sequence[Request]) -> list[int]:
        """Indices by image → adapter → question."""
        return sorted(
            range(len(requests)),
            key=lambda i: ([str(path) for path in requests[i].images], self._names[requests[i].policy.serving.hash], i),
        )

    def _answer(self, request: Request, max_new_tokens: int) -> Response:
        text = render(self.processor, request)
        options: dict[str, Any] = {"stop_token_ids": self.ends}
        if request.pattern:
            options["structured_outputs"] = {"regex": request.pattern}
        reply = self._chat(request, request.prompt, text, max_new_tokens, options)
        choice = reply.choices[0]
        ids = getattr(choice, "token_ids", None)
        said = choice.message.content or "" if ids is None else answer_text(self.processor.tokenizer, ids, self.ends)
        tokens = reply.usage.completion_tokens if ids is None else len(ids)
        return Response(said, choice.finish_reason == "stop", tokens, text)

    def logprobs(self, requests: Sequence[Request]) -> list[Scored]:
        """See `Engine.logprobs`. Raises `Unscored` where the server gives none."""
        order, results = self._order(requests), dict[int, Scored]()
        with ThreadPoolExecutor(self.config.concurrency) as pool:
            for index, scored in zip(order, pool.map(self._score, [requests[i] for i in order]), strict=True):
                results[index] = scored
        return [results[i] for i in range(len(requests))]

    def _score(self, request: Request) -> Scored:
        """The completion and the end token as an assistant's turn that is to be continued: nothing comes after it."""
        text, count = completed(self.processor, request)
        turn: Message = {"role": "assistant", "content": request.completion + self.processor.tokenizer.eos_token}
        options = {"prompt_logprobs": 0, "continue_final_message": True, "add_generation_prompt": False}
        reply = self._chat(request, [*request.prompt, turn], text, 1, options)
        ids, rows = getattr(reply, "prompt_token_ids", None), getattr(reply, "prompt_logprobs", None)
        if ids is None or rows is None:
            raise Unscored(f"{self.config.endpoint} gives no log-probabilities of prompts")
        picked = [row[str(token)]["logprob"] for row, token in zip(rows[-count:], ids[-count:], strict=True)]
        return Scored(list(ids[:-count]), picked)

    def _chat(self, request: Request, turns: Sequence[Message], text: str, tokens: int, options: dict[str, Any]) -> Any:
        """One request. The server renders the turns itself: a prompt that is not `text` is refused."""
        messages: list[Any] = to_chat(turns, len(request.images))
        urls = (data_url(path) for path in request.images)
        for turn in messages:
            turn["content"] = [
                {"type": "image_url", "image_url": {"url": next(urls)}} if part["type"] == "image" else part
                for part in turn["content"]
            ]
        extra = {
            **_GREEDY_VLLM,
            **options,
            **tokenizer_options(self.processor, text),
            "return_token_ids": True,
            "return_prompt_text": True,
        }
        with self._talking("stopped answering"):
            reply: Any = self._client.chat.completions.create(
                model=self._names[request.policy.serving.hash],
                messages=messages,
                max_completion_tokens=tokens,
                logit_bias=self.forbidden,
                extra_body=extra,
                **_GREEDY,
            )
        rendered = getattr(reply, "prompt_text", None)
        if rendered is not None and rendered != text:
            shorter = min(len(rendered), len(text))
            place = next((i for i, (a, b) in enumerate(zip(rendered, text, strict=False)) if a != b), shorter)
            raise self._error(
                f"renders a prompt as {rendered[place : place + 40]!r} where its model's template says "
                f"{text[place : place + 40]!r}",
                "Serve the base with its own chat template",
            )
        return reply

    @contextlib.contextmanager
    def _talking(self, problem: str) -> Iterator[None]:
        """What goes wrong between us and the server, as one line."""
        try:
            yield
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            remedy = f"Put the API key into the environment variable {self.config.api_key_env}"
            raise self._error(_said(error), remedy) from None
        except openai.BadRequestError as error:
            remedy = "Lower base_model.processor.max_pixels, or serve with a larger --max-model-len"
            raise self._error(f"refuses a request ({_said(error)})", remedy) from None
        except openai.NotFoundError as error:
            remedy = "Check the address, which ends in /v1; run it again, and adapters that were unloaded are loaded"
            raise self._error(f"{problem} ({_said(error)})", remedy) from None
        except openai.APIStatusError as error:  # after all retries: overloaded, or broken
            raise self._error(f"{problem} ({_said(error)})", _LATER) from None
        except openai.APIConnectionError as error:
            raise self._error(f"{problem}: {error.__cause__ or error}", _LATER) from None

    def _error(self, problem: str, remedy: str) -> InputError:
        return InputError(problem.rstrip("."), where=str(self.config.endpoint), field="eval.remote", remedy=remedy)

    def close(self) -> None:
        """See `Engine.close`. Adapters stay loaded: their names are their contents."""
        self._client.close()


@lru_cache(maxsize=64)  # questions on one image follow each other
def _said(error: openai.APIStatusError) -> str:
    """A server's own words, in short."""
    body = error.body if isinstance(error.body, dict) else {}
    text = " ".join(str(body.get("message") or error.message).split())
    return f"{error.status_code}: {text[:300]}"
