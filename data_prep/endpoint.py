"""Asking a model behind an OpenAI-compatible endpoint: many questions at once, each of them only once ever.

Answers are kept in a folder of the cache, one file each, under a key made from what was asked; the endpoint's address
and the API key are no part of it. So what was interrupted goes on where it was, and what is finished asks nothing.
"""

import asyncio
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

from .errors import InputError
from .files import hash_json, read_json, write_json
from .images import data_url
from .schema import EndpointConfig

if TYPE_CHECKING:
    from openai import AsyncOpenAI

_DEFAULTS = {"temperature": 0, "max_completion_tokens": 512}  # of the request; `request` changes them
_LATER = "Nothing is lost: run it again when the endpoint is well, and it goes on from here"
_PATIENCE = 4  # questions in a row that fail, each with all of its retries, before the endpoint counts as down
_GARBAGE = "answers something that is no chat completion"
_KNOCK = 10.0  # seconds to wait for the list of models


class Picture(NamedTuple):
    """An image file and the SHA-256 (hex) of its bytes."""

    path: Path
    sha256: str


class Prompt(NamedTuple):
    """One request's words and the JSON schema of the reply."""

    system: str
    user: str
    schema: dict[str, Any]


class Question(NamedTuple):
    """One request: the words, the form of the reply, and the images that come before the words."""

    prompt: Prompt
    images: tuple[Picture, ...]


class Answer(TypedDict):
    """What the model replied; `refused` is the reason where the endpoint would not take this question at all."""

    content: str
    finish_reason: str
    refused: str
    prompt_tokens: int
    completion_tokens: int


class _Passing(Exception):
    """A failure that may be over next time: no connection, a timeout, too many requests, a server's fault."""


class Endpoint:
    """A model at an endpoint, with the cache of what it has answered."""

    def __init__(self, config: EndpointConfig, folder: Path, version: int, show: Callable[[str], None]):
        """`folder` is where answers are kept, `version` that of the prompts, a part of every answer's key."""
        self.config, self.folder, self.version, self.show = config, folder, version, show
        self.body = {name: value for name, value in (_DEFAULTS | config.request).items() if value is not None}
        self.works = False  # whether it has answered anything, now or ever

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """The answer to each question, from the cache or the endpoint.

        Raises `InputError` where the endpoint cannot be used; what it answered until then is kept.
        """
        keys = [self._key(question) for question in questions]
        unknown = {key: question for key, question in zip(keys, questions, strict=True) if not self._file(key).exists()}
        self.works = self.works or len(unknown) < len(set(keys))
        refused = asyncio.run(_Asking(self, unknown).run()) if unknown else {}
        return [refused[key] if key in refused else read_json(self._file(key)) for key in keys]

    def keep(self, key: str, answer: Answer) -> None:
        """Remember an answer."""
        self.works = True
        write_json(self._file(key), answer)

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"

    def _key(self, question: Question) -> str:
        return hash_json(
            {
                "model": self.config.model,
                "request": self.body,
                "prompts": self.version,
                "prompt": question.prompt,
                "images": [picture.sha256 for picture in question.images],
            }
        )


class _Asking:
    """One call of `Endpoint.ask`: a client, its workers, and how far they are."""

    def __init__(self, endpoint: Endpoint, unknown: dict[str, Question]):
        self.endpoint, self.config, self.unknown = endpoint, endpoint.config, unknown
        self.key = os.environ.get(self.config.api_key_env, "")
        self.refused: dict[str, Answer] = {}
        self.answered = 0  # with an answer that is kept
        self.failures_in_a_row = 0
        self.served: list[str] = []
        self.start = time.monotonic()

    async def run(self) -> dict[str, Answer]:
        """Ask until every question has an answer; returns those that the endpoint would not take, which are not kept.

        What failed for the time being is asked once more at the end, as long as that still brings anything.
        """
        import openai  # here: takes a second, and only this needs it

        async with openai.AsyncOpenAI(
            base_url=self.config.endpoint,
            api_key=self.key or "none",  # a server of one's own wants none
            timeout=self.config.timeout,
            max_retries=self.config.retries,
        ) as client:
            await self._knock(client)
            left = self.unknown
            while left:
                failed, reason = await self._round(client, left)
                if len(failed) == len(left):
                    raise self._error(reason, _LATER)
                left = failed
        return self.refused

    async def _knock(self, client: "AsyncOpenAI") -> None:
        """Find out quickly whether anybody is there and lets us in; which models are served, if that is told."""
        import openai

        try:
            quick = client.with_options(max_retries=1, timeout=_KNOCK)
            self.served = [model.id async for model in quick.models.list()]
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise self._locked_out(error) from None
        except openai.APIConnectionError as error:
            if not isinstance(error, openai.APITimeoutError):
                remedy = "Start the server (`vllm serve MODEL`) or correct the address, which ends in /v1"
                raise self._error(f"cannot be reached: {error.__cause__ or error}", remedy) from None
        except Exception:  # many endpoints do not list their models, or answer something of their own
            pass

    async def _round(self, client: "AsyncOpenAI", left: dict[str, Question]) -> tuple[dict[str, Question], str]:
        """Ask all of `left`, `concurrency` at a time; returns what failed for the time being, and the last reason."""
        queue, failed, reasons = iter(left.items()), dict[str, Question](), ["no answer"]
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self.config.concurrency, len(left))):
                    group.create_task(self._work(client, queue, failed, reasons))
        except ExceptionGroup as group_error:
            raise group_error.exceptions[0] from None
        return failed, reasons[-1]

    async def _work(
        self,
        client: "AsyncOpenAI",
        queue: Iterator[tuple[str, Question]],
        failed: dict[str, Question],
        reasons: list[str],
    ) -> None:
        for key, question in queue:
            try:
                answer = await self._send(client, question)
            except _Passing as error:
                failed[key] = question
                reasons.append(str(error))
                self.failures_in_a_row += 1
                if self.failures_in_a_row >= max(_PATIENCE, self.config.concurrency):
                    raise self._error(str(error), _LATER) from None
                continue
            self.failures_in_a_row = 0
            if answer["refused"]:
                self.refused[key] = answer
                if not self.endpoint.works and len(self.refused) >= min(len(self.unknown), self.config.concurrency):
                    remedy = "It took no question yet: check its context length, `request`, and that it sees images"
                    raise self._error(answer["refused"], remedy)
                continue
            self.endpoint.keep(key, answer)
            self.answered += 1
            self._report()

    async def _send(self, client: "AsyncOpenAI", question: Question) -> Answer:
        import openai

        prompt = question.prompt
        pictures = [{"type": "image_url", "image_url": {"url": data_url(picture.path)}} for picture in question.images]
        messages: list[Any] = [
            {"role": "system", "content": prompt.system},
            {"role": "user", "content": [*pictures, {"type": "text", "text": prompt.user}]},
        ]
        form: Any = {
            "type": "json_schema",
            "json_schema": {"name": "reply", "strict": True, "schema": prompt.schema},
        }
        try:
            reply = await client.chat.completions.create(
                model=self.config.model or "", messages=messages, response_format=form, extra_body=self.endpoint.body
            )
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise self._locked_out(error) from None
        except openai.NotFoundError as error:
            served = f"Served: {', '.join(self.served[:5])}. " if self.served else ""
            remedy = f"{served}Check the model's name and that the address ends in /v1"
            raise self._error(f"has no model {self.config.model} ({self._said(error)})", remedy) from None
        except (openai.RateLimitError, openai.InternalServerError, openai.APITimeoutError) as error:
            raise _Passing(self._said(error)) from None
        except openai.APIStatusError as error:  # 400, 413, 422: about this question, as far as one can tell
            return Answer(content="", finish_reason="", refused=self._said(error), prompt_tokens=0, completion_tokens=0)
        except openai.APIConnectionError as error:
            raise _Passing(f"cannot be reached: {error.__cause__ or error}") from None
        except (openai.APIResponseValidationError, ValueError):  # JSON that is none
            raise _Passing(_GARBAGE) from None
        return _read(reply)

    def _report(self) -> None:
        total, speed = len(self.unknown), self.answered / max(1e-9, time.monotonic() - self.start)
        left = (total - self.answered) / speed
        self.endpoint.show(f"{self.answered} of {total} answers, {speed:.1f} a second, {left:.0f} s left")

    def _locked_out(self, error: Exception) -> InputError:
        state = "is not accepted" if self.key else "is not set"
        remedy = f"The environment variable {self.config.api_key_env} {state}: put the API key there"
        return self._error(self._said(error), remedy)

    def _said(self, error: Exception) -> str:
        """What an endpoint says went wrong, in a few words; some repeat the key."""
        body = getattr(error, "body", None)
        message = body.get("message") if isinstance(body, dict) else None
        text = " ".join(str(message or error).split())
        text = (text.replace(self.key, "…") if self.key else text)[:200]
        status = getattr(error, "status_code", None)
        return f"{status}: {text}" if status and not text.startswith("Error code") else text

    def _error(self, problem: str, remedy: str) -> InputError:
        return InputError(problem.rstrip("."), where=str(self.config.endpoint), remedy=remedy)


def _read(reply: Any) -> Answer:
    """A chat completion as an `Answer`; an endpoint can send anything."""
    try:
        choice = reply.choices[0]
        usage, refusal = reply.usage, getattr(choice.message, "refusal", None)
        return Answer(
            content=str(choice.message.content or ""),
            finish_reason="refusal" if refusal else str(choice.finish_reason),
            refused="",
            prompt_tokens=int(usage.prompt_tokens) if usage else 0,
            completion_tokens=int(usage.completion_tokens) if usage else 0,
        )
    except (AttributeError, LookupError, TypeError, ValueError):
        raise _Passing(_GARBAGE) from None
