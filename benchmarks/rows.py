"""Samples as rows of a data set that TRL's own trainers take."""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset

from mcit.data_prep.chat import open_image
from mcit.data_prep.schema import Sample


def conversations(samples: Sequence[Sample]) -> Dataset:
    """Rows of `prompt`, `completion` and `images`, opened late."""

    def rows(batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        chosen = [samples[i] for i in batch["index"]]
        return {
            "prompt": [sample["prompt"] for sample in chosen],
            "completion": [sample["completion"] for sample in chosen],
            "images": [[open_image(path) for path in sample["images"]] for sample in chosen],
        }

    return Dataset.from_dict({"index": list(range(len(samples)))}).with_transform(rows)
