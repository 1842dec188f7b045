"""Which samples belong together: ids, images in common, subsets that depend on the data alone."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence

from .errors import InputError
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


def split_keys(sample: Sample, digests: list[str]) -> list[str]:
    """What a sample must share with no other for the two to end in different parts: images, or the question."""
    keys = digests or [hash_json(sample["prompt"])]
    named = sample["meta"].get("image_id")
    return keys if named is None else [*keys, f"image_id {named}"]


def choose_groups(keys: Iterable[Sequence[str]], share: float) -> tuple[list[str], set[str]]:
    """The group of each sample by its keys, and the groups that are split off: a `share` of them, always the same.

    Groups are taken in the order of their content's hash. Raises `InputError` where there is but one.
    """
    groups = connect(keys)
    order = sorted(set(groups), key=lambda group: rank(f"test {group}"))
    if len(order) < 2:
        raise InputError("all samples show one image: no test set can be split off", remedy="Give a test file")
    return groups, set(order[: min(len(order) - 1, max(1, round(share * len(order))))])


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
