"""Rollouts by a vLLM server, on another node perhaps: it is sent a LoRA after every optimizer step, by a shared folder.

`mcit rollouts` starts such a server, `pipeline/run/vllm_server.py`.
"""

import base64
import contextlib
import io
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from mcit.data_prep.chat import open_image
from mcit.data_prep.errors import InputError
from mcit.data_prep.schema import Sample
from mcit.eval.engines import Policy
from mcit.eval.engines.base import end_tokens, image_tokens, load_config

from ..stage.entering import Entered
from .rollouts import Drawn, Draws, Prompts
from .shipping import Shipping, check_tokens, runs

FIELD = "train.rft.rollout.url"
_URL, _KEY = "MCIT_ROLLOUT_URL", "VLLM_API_KEY"  # what a job tells; the second is vLLM's own
# Connection attempts, at most 8 s apart: to a server that the recipe names, and, for half an hour, to one that a job
# starts beside the training.
_ATTEMPTS, _PATIENCE = 3, 225
_IN_FLIGHT = 64  # requests of one process: the server batches what it has
_NEVER = -100  # the smallest bias that the protocol knows: no token comes back from it


class ServerRollouts:
    """`Engine` by a vLLM server, which every process asks its own part."""

    name = "server"

    def __init__(self, entered: Entered):
        """Raises `InputError` where nobody answers, or no address is given."""
        import openai  # here: takes a second, and only this needs it

        rollout = entered.stage.train.rft.rollout
        url = rollout.url or os.environ.get(_URL)
        if not url:
            remedy = f"Name a vLLM server here or in {_URL} (`mcit rollouts` starts one); `mcit submit` starts its own"
            raise InputError("is not set", where="recipe", field=FIELD, remedy=remedy)
        self.entered, self.url = entered, url
        own = entered.output_dir.resolve().with_suffix(".rollouts")  # beside the stage's
        folder = Path(rollout.adapters).resolve() if rollout.adapters else own
        folder.mkdir(parents=True, exist_ok=True)
        self.own = None if rollout.adapters else own
        self.shipping = Shipping(entered, folder)
        self.client = openai.OpenAI(base_url=url, api_key=os.environ.get(_KEY, "none"), max_retries=_ATTEMPTS)
        base = Policy(entered.before, Path()).base()
        self.forbidden = image_tokens(load_config(base))
        self.ends = end_tokens(base, entered.processor.tokenizer)
        self.model: str | None = None  # under which the server has the policy: the hash of it
        self.draws = Draws()
        with self._answering():
            self.client.with_options(max_retries=_ATTEMPTS if rollout.url else _PATIENCE).models.list()

    def draw(self, prompts: Prompts, samples: Sequence[Sample], trainer: Any) -> Drawn:
        """See `Engine.draw`."""
        self._send(trainer)
        self.draws.next(trainer)
        groups = runs(samples)
        asked = [samples[group.start] for group in groups]
        with self._answering(), ThreadPoolExecutor(_IN_FLIGHT) as pool:
            outputs = list(pool.map(lambda one: self._ask(trainer, *one), zip(asked, groups, strict=True)))
        seen = [output.model_extra["prompt_token_ids"] for output in outputs]
        trained, _, _ = trainer._tokenize_prompts([prompts[group.start] for group in groups])
        check_tokens(seen, trained, asked)
        answers = [choice for output in outputs for choice in output.choices]
        ids = [list(prompt) for prompt, group in zip(seen, groups, strict=True) for _ in group]
        logprobs = [[token.logprob for token in choice.logprobs.content] for choice in answers]
        return Drawn(ids, [list(choice.model_extra["token_ids"]) for choice in answers], logprobs)

    def report(self) -> dict[str, Any]:
        """See `Engine.report`."""
        return self.shipping.report()

    def close(self) -> None:
        """See `Engine.close`. What the server was sent is taken away."""
        if self.model is not None and PartialState().is_main_process:
            with contextlib.suppress(InputError):
                self._unload(self.model)
        if self.own is not None and PartialState().is_main_process:
            shutil.rmtree(self.own, ignore_errors=True)
        self.client.close()

    def _ask(self, trainer: Any, sample: Sample, group: range) -> Any:
        """As many answers to a sample as there are in `group`."""
        seed = self.draws.seed(trainer, f"{trainer.accelerator.process_index} {group.start}")
        return self.client.chat.completions.create(
            model=self.model or "",
            messages=_messages(sample),
            n=len(group),
            seed=seed,
            max_tokens=trainer.max_completion_length,
            temperature=trainer.temperature,
            top_p=trainer.top_p,
            logprobs=True,
            logit_bias={str(token): _NEVER for token in self.forbidden},
            extra_body={
                "top_k": trainer.top_k,
                "min_p": trainer.min_p or 0.0,
                "repetition_penalty": trainer.repetition_penalty,
                "stop_token_ids": self.ends,
                "return_token_ids": True,
                **({"mm_processor_kwargs": kwargs} if (kwargs := self.entered.before.processor) else {}),
            },
        )

    def _send(self, trainer: Any) -> None:
        """Have the server take up the policy as it is now, and forget the one before."""
        step = trainer.state.global_step
        if not self.shipping.is_due(step):
            return
        written = self.shipping.write(step, trainer.accelerator.is_main_process)
        before, names = self.model, [written.serving.hash if written else None]
        self.model = broadcast_object_list(names)[0]
        if written is not None and self.model != before:
            # In place: a stage that died may have left the same policy there.
            adapter = {"lora_name": self.model, "lora_path": str(written.adapter), "load_inplace": True}
            self._post("load_lora_adapter", adapter)
            if before is not None:
                self._unload(before)
        trainer.accelerator.wait_for_everyone()

    def _unload(self, model: str) -> None:
        self._post("unload_lora_adapter", {"lora_name": model})
        self.shipping.forget(model)

    def _post(self, what: str, body: dict[str, Any]) -> None:
        import httpx

        with self._answering():
            self.client.post(f"/{what}", cast_to=httpx.Response, body=body)

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        """Make an error of the server's an `InputError` that says what to do."""
        import openai

        try:
            yield
        except openai.APIConnectionError as error:
            remedy = "Start the server, or correct the address, which ends in /v1"
            raise InputError(f"cannot be reached: {error}", where=self.url, field=FIELD, remedy=remedy) from error
        except openai.APIStatusError as error:
            remedy = "Start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True (docs/rft.md)"
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"the server refuses: {reason}", where=self.url, field=FIELD, remedy=remedy) from error


def _messages(sample: Sample) -> list[Any]:
    """A prompt for the protocol: the pictures come first in the first user turn, as `to_chat` puts them."""
    messages: list[Any] = []
    pictures = [open_image(path) for path in sample["images"]]
    for turn in sample["prompt"]:
        content: list[Any] = [{"type": "text", "text": turn["content"]}]
        if turn["role"] == "user" and pictures:
            content = [
                {"type": "image_url", "image_url": {"url": _data_url(picture)}} for picture in pictures
            ] + content
            pictures = []
        messages.append({"role": turn["role"], "content": content})
    return messages


def _data_url(picture: Any) -> str:
    """A picture without loss: what the server sees is what is trained on."""
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
