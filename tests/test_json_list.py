"""A JSON list read item by item: what `json` reads and says, whatever the size of the pieces it is read in."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from mcit.data_prep import json_list
from mcit.data_prep.errors import InputError
from mcit.data_prep.json_list import iter_json_list


def anything(rng: random.Random, depth: int = 0) -> Any:
    """A random JSON value."""
    simple = [None, True, -0.5e-7, 12345678901234567890, "", 'é"\\\n\u2028😀]', float("inf"), rng.random()]
    if depth > 3 or rng.random() < 0.5:
        return rng.choice(simple)
    if rng.random() < 0.5:
        return [anything(rng, depth + 1) for _ in range(rng.randint(0, 4))]
    return {rng.choice("abc[]{},") * n: anything(rng, depth + 1) for n in range(rng.randint(0, 4))}


@pytest.mark.parametrize("chunk", [1, 3, 64, 1 << 20])
def test_what_json_reads(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_list, "_CHUNK", chunk)
    rng, path = random.Random(0), tmp_path / "list.json"
    for case in range(40):
        value = [anything(rng) for _ in range(rng.randint(0, 5))]
        text = json.dumps(value, indent=rng.choice([None, 2]), ensure_ascii=rng.random() < 0.5)
        path.write_text(text, encoding="utf-8-sig" if case % 3 == 0 else "utf-8")
        assert list(iter_json_list(path)) == value


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_where_it_breaks_is_where_json_says(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_list, "_CHUNK", chunk)
    rng, path = random.Random(1), tmp_path / "list.json"
    whole = json.dumps([{"a": [1, "two é", None], "b": 3.5}, {"c": {}}, "x"], indent=1, ensure_ascii=False)
    for _ in range(300):
        at = rng.randrange(1, len(whole))
        text = whole[:at] if rng.random() < 0.5 else whole[:at] + rng.choice('[]{},":x9') + whole[at:]
        path.write_text(text)
        items: list[Any] = []
        try:
            expected = json.loads(text)
        except json.JSONDecodeError as error:
            with pytest.raises(InputError, match="malformed JSON") as caught:
                items.extend(iter_json_list(path))
            line, column = map(int, caught.value.where.rsplit(":", 2)[1:])
            assert line == error.lineno, text
            assert column == error.colno, (text, error.msg, caught.value.problem)
        else:
            assert list(iter_json_list(path)) == expected


def test_memory_is_that_of_an_item(tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "list.json"
    path.write_text(json.dumps(["x" * 1000] * 20_000))  # 20 MB
    tracemalloc.start()
    count = sum(1 for _ in iter_json_list(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000 and peak < 8e6


def test_not_utf_8_names_the_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_list, "_CHUNK", 4)
    (tmp_path / "list.json").write_bytes(b'["abc", "caf\xe9", 1]')
    items = iter_json_list(tmp_path / "list.json")
    assert next(items) == "abc"
    with pytest.raises(InputError, match=r"is not UTF-8 \(byte 12\)"):
        next(items)
