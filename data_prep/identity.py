"""Which samples belong together: ids, images in common, subsets that depend on the data alone."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from .errors import InputError
from .files import hash_json
from .schema import Sample


class Ids:
    """The ids of a part: `note` those that its samples came with, then ask for each final one, in the same order.

    Ids that are unique stay; the others become hashes of the content, numbered where that repeats.
    """

    def __init__(self) -> None:
        self._seen: set[bytes] = set()  # digests: they take less memory than ids may
        self._repeated: set[bytes] = set()
        self._given: set[str] = set()
        self._copies: Counter[str] = Counter()
        self.replaced = 0  # ids that samples came with and others had too

    def note(self, sample: Sample) -> None:
        """One more sample as it was read."""
        digest = _digest(sample["id"])
        (self._repeated if digest in self._seen else self._seen).add(digest)

    def final(self, sample: Sample) -> str:
        """The id of a sample, once all were noted."""
        if sample["id"] and _digest(sample["id"]) not in self._repeated:
            return sample["id"]
        self.replaced += bool(sample["id"])
        content = [sample["prompt"], sample["completion"], sample["references"], sample["images"]]
        identity = hash_json(content)[:16]
        if identity not in self._given:
            self._given.add(identity)
            return identity
        self._copies[identity] += 1
        return f"{identity}-{self._copies[identity] + 1}"


def image_ids(shown: Iterable[Sequence[str]]) -> Iterator[str]:
    """An id for each list of images' digests, the same where an image is shared, directly or over others."""
    return (group[:16] for group in connect(shown))


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
        raise InputError("no test set can be split off: all samples share their images", remedy="Give a test file")
    return groups, set(order[: min(len(order) - 1, max(1, round(share * len(order))))])


def connect(keys: Iterable[Sequence[str]]) -> list[str]:
    """For each list of keys, the smallest key among all that are connected to it by lists that share a key."""
    parent: dict[str, str] = {}

    def find(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = key = parent[parent[key]]
        return key

    firsts = []
    for first, *rest in keys:
        firsts.append(first)
        for other in rest:
            one, two = sorted((find(first), find(other)))
            parent[two] = one
    return [find(first) for first in firsts]


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()


def rank(text: str) -> bytes:
    """A sort key that looks random, and is the same for the same text everywhere."""
    return hashlib.sha256(text.encode()).digest()
