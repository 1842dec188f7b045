"""Which samples belong together: ids, images in common, subsets that depend on the data alone."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence

from .files import hash_json
from .schema import Sample


def give_ids(samples: list[Sample]) -> None:
    """Keep ids that are unique in the part; the others become hashes of the content, numbered where that repeats."""
    given = Counter(sample["id"] for sample in samples)
    seen: Counter[str] = Counter()
    for sample in samples:
        if sample["id"] and given[sample["id"]] == 1:
            continue
        content = [sample["prompt"], sample["completion"], sample["references"], sample["images"]]
        identity = hash_json(content)[:16]
        seen[identity] += 1
        sample["id"] = identity if seen[identity] == 1 else f"{identity}-{seen[identity]}"


def set_image_ids(samples: list[Sample], digests: dict[str, str]) -> None:
    """Give samples that share an image, directly or over others, the same `meta["image_id"]`, unless they have one."""
    shown = [sample for sample in samples if sample["images"]]
    groups = connect([[digests[name] for name in sample["images"]] for sample in shown])
    for sample, group in zip(shown, groups, strict=True):
        sample["meta"].setdefault("image_id", group[:16])


def connect(keys: Iterable[Sequence[str]]) -> list[str]:
    """For each list of keys, the smallest key among all that are connected to it by lists that share a key."""
    parent: dict[str, str] = {}

    def find(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = key = parent[parent[key]]
        return key

    lists = list(keys)
    for first, *rest in lists:
        for other in rest:
            one, two = sorted((find(first), find(other)))
            parent[two] = one
    return [find(first) for first, *_ in lists]


def rank(text: str) -> bytes:
    """A sort key that looks random, and is the same for the same text everywhere."""
    return hashlib.sha256(text.encode()).digest()
