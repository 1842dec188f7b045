"""The prompts that answers are drawn to: the evaluation's own."""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset

from mcit.data_prep.chat import open_image, render_chat, to_chat
from mcit.data_prep.errors import InputError
from mcit.data_prep.schema import Sample


def prompt_dataset(samples: Sequence[Sample]) -> Dataset:
    """Rows of `prompt` (the chat that evaluation renders), `sample` and, if there are any, `images`, opened late.

    Rows that are asked for together have images or have none (`GroupSampler`). No answer is in a prompt.
    """

    def rows(batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        chosen = [samples[i] for i in batch["index"]]
        columns: dict[str, list[Any]] = {
            "prompt": [to_chat(sample["prompt"], len(sample["images"])) for sample in chosen],
            "sample": chosen,
        }
        if chosen[0]["images"]:
            columns["images"] = [[open_image(path) for path in sample["images"]] for sample in chosen]
        return columns

    return Dataset.from_dict({"index": list(range(len(samples)))}).with_transform(rows)


def check_roles(samples: Sequence[Sample], processor: Any) -> None:
    """Refuse prompts that the chat template does not render whole: one of each row of roles and system turn is tried.

    Raises `InputError`.
    """
    tried = set()
    for sample in samples:
        roles = tuple(turn["content"] if turn["role"] == "system" else turn["role"] for turn in sample["prompt"])
        if roles not in tried:
            tried.add(roles)
            try:
                render_chat(processor, sample["prompt"], len(sample["images"]))
            except InputError as error:
                raise InputError(str(error), where=f"sample {sample['id']} of {sample['task']}") from None
