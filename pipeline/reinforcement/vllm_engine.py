"""Rollouts by a vLLM in the process that trains: one engine a stage, sent a LoRA after every optimizer step."""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from mcit.data_prep.chat import open_image, render_chat, tokenizer_options
from mcit.data_prep.errors import InputError
from mcit.data_prep.schema import Sample
from mcit.eval.config import EvalConfig
from mcit.eval.engines import Policy
from mcit.eval.engines.base import end_tokens, image_tokens, load_config, load_processor
from mcit.eval.engines.settings import EngineFailed
from mcit.eval.engines.vllm import VllmEngine, why_not_vllm

from ..stage.entering import Entered
from ..training.arguments import processes
from .config import RolloutConfig
from .rollouts import Drawn, Draws, Prompts
from .shipping import Shipping, check_tokens, runs

FIELD = "train.rft.rollout.engine"
_MEMORY = Path("/dev/shm")  # where adapters change hands without touching a disk


class RolloutVllm(VllmEngine):
    """The evaluation's engine with room for the policy in training, and the log-probabilities that are sampled from."""

    def __init__(self, base: Policy, max_images: int, rank: int, config: RolloutConfig):
        """Raises `EngineFailed`."""
        import torch

        self.processor, self.slots, self._numbers = load_processor(base.serving), 1, count(1)
        self._loras, self._copy = {}, contextlib.ExitStack()
        settings: dict[str, Any] = {"logprobs_mode": "processed_logprobs"}
        if torch.cuda.is_available():
            settings |= {"gpu_memory_utilization": config.memory, "enable_sleep_mode": config.sleep}
        self.sleeps = bool(settings.get("enable_sleep_mode"))
        # Two adapters in memory: the new one comes before the old one goes.
        self._llm = self._start(base, EvalConfig(), max_images, 2, rank, **settings)
        try:
            self.ends = end_tokens(base, self.processor.tokenizer)
            self.forbidden = image_tokens(load_config(base))
            if self._lacks_kernels():
                raise EngineFailed("vLLM has no LoRA for mixtures of experts on a CPU")
        except BaseException:
            self.close()
            raise

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """With its share of the GPU; outside it is given back, if the recipe says so."""
        if self.sleeps:
            self._llm.wake_up()
        try:
            yield
        finally:
            if self.sleeps:
                self._llm.sleep(level=1)

    def sample(
        self, policy: Policy, requests: Sequence[dict[str, Any]], parameters: Sequence[Any], options: dict[str, bool]
    ) -> list[Any]:
        """vLLM's outputs for each request, answered by `policy`."""
        outputs: list[Any] = self._llm.generate(
            list(requests),
            list(parameters),
            lora_request=self._loras[policy.serving.hash],
            use_tqdm=False,
            tokenization_kwargs=options,
        )
        return outputs


class VllmRollouts:
    """`Engine` by `RolloutVllm`. An engine that fails in the middle is started once more."""

    name = "vllm"

    def __init__(self, entered: Entered):
        """Raises `InputError` where vLLM does not serve the model, or a stage runs in several processes."""
        self.config, self.entered = entered.stage.train.rft.rollout, entered
        if processes() > 1:
            remedy = "Use one process, or a vLLM server (engine: server)"
            raise InputError("is one engine in one process", where="recipe", field=FIELD, remedy=remedy)
        self.base = Policy(entered.before, Path()).base()
        if reason := why_not_vllm(self.base):
            raise InputError(reason, where="recipe", field=FIELD, remedy="Set it to transformers")
        self.folder = tempfile.TemporaryDirectory(prefix="mcit-rollouts-", dir=_MEMORY if _MEMORY.is_dir() else None)
        self.shipping = Shipping(entered, Path(self.folder.name))
        self.policy: Policy | None = None
        self.restarts, self.draws = 0, Draws()
        self.vllm = self._start()

    def draw(self, prompts: Prompts, samples: Sequence[Sample], trainer: Any) -> Drawn:
        """See `Engine.draw`."""
        groups = runs(samples)
        asked = [samples[group.start] for group in groups]
        texts = [render_chat(trainer.processing_class, one["prompt"], len(one["images"])) for one in asked]
        requests = [
            {"prompt": text}
            | ({"multi_modal_data": {"image": [open_image(path) for path in one["images"]]}} if one["images"] else {})
            for text, one in zip(texts, asked, strict=True)
        ]
        self.draws.next(trainer)
        parameters = [self._parameters(trainer, len(group), group.start) for group in groups]
        outputs = self._sampled(trainer, requests, parameters, tokenizer_options(self.vllm.processor, texts[0]))
        seen = [list(output.prompt_token_ids) for output in outputs]
        trained, _, _ = trainer._tokenize_prompts([prompts[group.start] for group in groups])
        check_tokens(seen, trained, asked)
        answers = [answer for output in outputs for answer in output.outputs]
        logprobs = [
            [row[token].logprob for row, token in zip(answer.logprobs, answer.token_ids, strict=True)]
            for answer in answers
        ]
        ids = [prompt for prompt, group in zip(seen, groups, strict=True) for _ in group]
        return Drawn(ids, [list(answer.token_ids) for answer in answers], logprobs)

    def report(self) -> dict[str, Any]:
        """See `Engine.report`."""
        return {**self.shipping.report(), "restarts": self.restarts}

    def close(self) -> None:
        """See `Engine.close`."""
        self.vllm.close()
        self.folder.cleanup()

    def _start(self) -> RolloutVllm:
        most = max(len(sample["images"]) for sample in self.entered.samples)
        try:
            return RolloutVllm(self.base, most, self.shipping.rank, self.config)
        except EngineFailed as error:
            raise InputError(str(error), where="recipe", field=FIELD, remedy="Set it to transformers") from error

    def _sampled(self, trainer: Any, requests: Any, parameters: Any, options: Any) -> list[Any]:
        """Answers by the policy as it is now; once more with a new engine if this one fails."""
        from vllm.exceptions import VLLMValidationError

        try:
            return self._answered(trainer, requests, parameters, options)
        except VLLMValidationError as error:
            raise InputError(f"vLLM refuses a prompt: {error}", where="recipe", field="train.max_length") from error
        except Exception as error:  # an engine that died says so in many ways
            self.restarts += 1
            print(f"vLLM failed ({type(error).__name__}: {error}), and is started again", flush=True)
            with contextlib.suppress(Exception):
                self.vllm.close()
            self.vllm, self.policy, self.shipping.step = self._start(), None, None
            return self._answered(trainer, requests, parameters, options)

    def _answered(self, trainer: Any, requests: Any, parameters: Any, options: Any) -> list[Any]:
        with self.vllm.awake():
            return self.vllm.sample(self._current(trainer), requests, parameters, options)

    def _current(self, trainer: Any) -> Policy:
        """The policy in training, which vLLM has under a name that is a hash of it: no cache can mistake it."""
        step = trainer.state.global_step
        if self.policy is None or self.shipping.is_due(step):
            before, written = self.policy, self.shipping.write(step)
            assert written is not None
            self.vllm.add(written)
            if before is not None and before.serving.hash != written.serving.hash:
                self.vllm.remove(before)
                self.shipping.forget(before.serving.hash)
            self.policy = written
        return self.policy

    def _parameters(self, trainer: Any, answers: int, place: int) -> Any:
        """How TRL's own generation would sample; image tokens never.

        On a CPU without a seed of its own, with which vLLM 0.31 fails where it reads a prompt in two parts; there it
        draws from torch's generator, which the trainer has seeded.
        """
        import torch
        from vllm import SamplingParams

        seed = self.draws.seed(trainer, place)
        return SamplingParams(
            n=answers,
            temperature=trainer.temperature,
            top_p=trainer.top_p,
            top_k=trainer.top_k,
            min_p=trainer.min_p or 0.0,
            repetition_penalty=trainer.repetition_penalty,
            max_tokens=trainer.max_completion_length,
            stop_token_ids=self.vllm.ends,
            logit_bias=dict.fromkeys(self.vllm.forbidden, float("-inf")),
            logprobs=0,
            detokenize=False,
            seed=seed if torch.cuda.is_available() else None,
            **(trainer.args.generation_kwargs or {}),
        )
