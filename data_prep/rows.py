"""One row of a data file, in any of the layouts, into one raw sample.

A row is told by its fields: `conversations` (LLaVA, ShareGPT), `messages`, or `prompt` with `completion` (TRL).
"""

import dataclasses
import re
from typing import Any, cast, get_args

from PIL import Image

from .errors import InputError
from .schema import Message, Reasoning, Style

_LONGEST_TURN = 1_000_000  # characters: what no model's context holds, and patterns would be slow on
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclasses.dataclass
class RawSample:
    """A sample as its source has it: `prompt` ends with a user turn, `completion` starts and ends with the assistant's.

    `images` are paths as written, encoded bytes or PIL images; `where` names file and line or index for errors;
    `moved` says that an image stood elsewhere than before the first question.
    """

    where: str
    prompt: list[Message]
    completion: list[Message]
    images: list[str | bytes | Image.Image]
    references: list[str] | None
    id: str | None
    style: Style | None
    reasoning: Reasoning | None
    meta: dict[str, Any]
    moved: bool = False


def parse_row(row: Any, where: str) -> RawSample:
    """Read one row of any of the layouts. Raises `InputError` that names the field and what to do about it."""
    try:
        return _parse(row, where)
    except InputError as error:
        remedy = error.remedy or "Correct it, or set prepare.on_bad: drop"
        raise InputError(error.problem, where=error.where, field=error.field, remedy=remedy) from None


def _parse(row: Any, where: str) -> RawSample:
    if not isinstance(row, dict):
        raise InputError(f"a sample is an object, not a {type(row).__name__}", where=where)
    identity = row.get("id") if row.get("id") is not None else row.get("question_id")
    if identity is not None:
        where = f"{where} (id {identity})"
    if any(row.get(key) for key in ("video", "videos")):
        raise _no_video(where)
    images = _images(row, where)
    turns = _Turns(where, images)
    references = _references(row, where)
    if row.get("conversations") is not None:
        given = [{"from": "system", "value": row["system"]}] if row.get("system") else []
        dialogue = [*given, *row["conversations"]] if isinstance(row["conversations"], list) else row["conversations"]
        prompt, completion = _split(turns.read(dialogue, "conversations"), where, "conversations")
    elif row.get("messages") is not None:
        prompt, completion = _split(turns.read(row["messages"], "messages"), where, "messages")
    elif row.get("prompt") is not None:
        prompt = turns.read(_as_turns(row["prompt"], "user"), "prompt")
        answer = row.get("completion")
        if answer is None and references:
            answer = references[0]
        if answer is None:
            raise InputError("no answer", where=where, field="completion", remedy="Give `completion` or `references`")
        completion = turns.read(_as_turns(answer, "assistant"), "completion")
    else:
        raise InputError(
            f"no dialogue among the fields {sorted(row)}",
            where=where,
            remedy="Give `conversations` (LLaVA), `messages`, or `prompt` and `completion` (TRL), or name a layout",
        )
    _check_turns(prompt, completion, bool(images), where)
    turns.check_placeholders()
    return RawSample(
        where=where,
        prompt=prompt,
        completion=completion,
        images=images,
        references=references,
        id=None if identity is None else str(identity),
        style=_choice(row.get("style"), Style, "style", where),
        reasoning=_choice(row.get("reasoning"), Reasoning, "reasoning", where),
        meta=_meta(row.get("meta") or {}, where),
        moved=turns.moved,
    )


def _meta(meta: Any, where: str) -> dict[str, Any]:
    """What is known of a sample besides. Its options are texts, and numbers are written out."""
    if not isinstance(meta, dict):
        raise InputError("is not an object", where=where, field="meta")
    options, picture = meta.get("options"), meta.get("image_id")
    if not isinstance(picture, str | int | None):
        raise InputError("is neither a text nor a number", where=where, field="meta.image_id")
    if options is None:
        return dict(meta)
    if not isinstance(options, list) or not all(isinstance(option, str | int | float) for option in options):
        raise InputError("is not a list of texts", where=where, field="meta.options")
    return meta | {"options": [str(option) for option in options]}


class _Turns:
    """Reads a sample's turns into plain messages, counting image placeholders across all of them."""

    def __init__(self, where: str, images: list[str | bytes | Image.Image]):
        self.where, self.images = where, images
        self.placeholders, self.moved, self.first_user = 0, False, True

    def read(self, turns: Any, field: str) -> list[Message]:
        if not isinstance(turns, list) or not turns:
            raise InputError("is not a list of turns", where=self.where, field=field)
        return [self._message(turn, f"{field}[{index}]") for index, turn in enumerate(turns)]

    def _message(self, turn: Any, field: str) -> Message:
        if not isinstance(turn, dict):
            raise InputError("is not an object", where=self.where, field=field)
        role = turn.get("role") or turn.get("from")
        if not isinstance(role, str) or role not in _ROLES:
            raise InputError(f"unknown role {role!r}", where=self.where, field=field, remedy="Use user and assistant")
        role = _ROLES[role]
        content = turn.get("content") if turn.get("content") is not None else turn.get("value")
        text = self._text(content, field)
        if len(text) > _LONGEST_TURN:
            raise InputError(f"{len(text)} characters in one turn", where=self.where, field=field)
        if "<video>" in text:
            raise _no_video(self.where)
        if role == "user":
            text = self._without_placeholders(text)
            self.first_user = False
        elif "<image>" in text:
            raise InputError(f"an <image> placeholder in a turn of the {role}", where=self.where, field=field)
        return {"role": cast(Any, role), "content": text.strip()}

    def _text(self, content: Any, field: str) -> str:
        """A turn's text with `<image>` where a typed part is an image; images inside parts join the sample's."""
        if isinstance(content, str):
            return content
        if not isinstance(content, list):
            problem = "has no text" if content is None else f"is {str(content)[:60]}, not a text"
            raise InputError(problem, where=self.where, field=field, remedy="Write it as a text, in quotation marks")
        pieces = []
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text" and isinstance(part.get("text"), str):
                pieces.append(part["text"])
            elif kind == "image":
                pieces.append("<image>")
                inner = next((part[key] for key in ("image", "path", "url") if part.get(key) is not None), None)
                if inner is not None:
                    self.images.append(_image(inner, self.where, field))
            elif kind == "video":
                raise _no_video(self.where)
            else:
                raise InputError(f"unknown content part {str(part)[:60]!r}", where=self.where, field=field)
        return "".join(pieces)

    def _without_placeholders(self, text: str) -> str:
        """Drop the placeholders around a question; those inside a sentence become "image 1", "image 2", …

        All images are attached before the first question, so a placeholder elsewhere only keeps its number.
        """
        count = text.count("<image>")
        if not count:
            return text
        for number in range(self.placeholders + 1, self.placeholders + count + 1):
            text = text.replace("<image>", f"\0{number}\0", 1)
        self.placeholders += count
        mark = r"\0\d+\0"
        own_lines = re.sub(rf"(?m)^[ \t]*(?:{mark}[ \t]*)+$\n?", "", text)
        around = re.sub(rf"^\s*(?:{mark}\s*)+|(?:(?<=[.?!:\n])\s*(?:{mark}\s*)+$)", "", own_lines)
        self.moved |= not self.first_user or "\0" in around
        return around if "\0" not in around else re.sub(r"\0(\d+)\0", r"image \1", own_lines)

    def check_placeholders(self) -> None:
        if self.placeholders and self.placeholders != len(self.images):
            raise InputError(
                f"{self.placeholders} <image> placeholders, but {len(self.images)} images",
                where=self.where,
                field="image",
                remedy="Give one placeholder an image, or none at all (the images then come first)",
            )


def _split(messages: list[Message], where: str, field: str) -> tuple[list[Message], list[Message]]:
    """Cut before the first assistant turn, so that every assistant turn is taught."""
    first = next((index for index, message in enumerate(messages) if message["role"] == "assistant"), None)
    if first is None:
        raise InputError("has no assistant turn", where=where, field=field)
    return messages[:first], messages[first:]


def _check_turns(prompt: list[Message], completion: list[Message], has_images: bool, where: str) -> None:
    """Refuse what is not [system,] user, assistant, user, …, assistant with text in every turn."""
    turns = prompt[1:] if prompt and prompt[0]["role"] == "system" else prompt
    roles = [message["role"] for message in [*turns, *completion]]
    if not turns or turns[-1]["role"] != "user" or roles != [("user", "assistant")[i % 2] for i in range(len(roles))]:
        raise InputError(
            f"turns do not alternate between user and assistant ({', '.join(roles) or 'none'})",
            where=where,
            remedy="A dialogue is [system,] user, assistant, user, …, assistant",
        )
    if roles[-1] != "assistant":
        raise InputError("the last turn is a question without an answer", where=where)
    for index, message in enumerate([*turns, *completion]):
        if not message["content"] and not (index == 0 and has_images):
            raise InputError(f"turn {index + 1} ({message['role']}) is empty", where=where)


def _as_turns(value: Any, role: str) -> Any:
    return value if isinstance(value, list | dict) else [{"role": role, "content": value}]


def _images(row: dict[str, Any], where: str) -> list[str | bytes | Image.Image]:
    images: list[str | bytes | Image.Image] = []
    for field in ("image", "images"):
        value = row.get(field)
        if value is None or (isinstance(value, str) and not value):
            continue
        for item in value if isinstance(value, list | tuple) else [value]:
            images.append(_image(item, where, field))
    return images


def _image(item: Any, where: str, field: str) -> str | bytes | Image.Image:
    """A path, or the bytes of an image: as they are, or in the Hub's `{bytes, path}`."""
    if isinstance(item, dict):
        item = item.get("bytes") or item.get("path")
    if not isinstance(item, str | bytes | Image.Image) or not item:
        raise InputError(f"{str(item)[:60]!r} is no path and no image", where=where, field=field)
    return item


def _references(row: dict[str, Any], where: str) -> list[str] | None:
    """Accepted answers from `references` or `answers`: strings, or VQA's `{"answer": …}`."""
    for field in ("references", "answers"):
        value = row.get(field)
        if value is None:
            continue
        items = [item.get("answer") if isinstance(item, dict) else item for item in _as_list(value)]
        if not all(isinstance(item, str | int | float) for item in items):
            raise InputError("is not a list of strings", where=where, field=field)
        texts = [text for text in (str(item).strip() for item in items) if text]
        if texts:
            return texts
        if items:
            raise InputError("holds empty answers only", where=where, field=field)
    return None


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _choice(value: Any, allowed: Any, field: str, where: str) -> Any:
    if value is not None and value not in get_args(allowed):
        raise InputError(
            f"unknown value {value!r}", where=where, field=field, remedy=f"Use one of {', '.join(get_args(allowed))}"
        )
    return value


def _no_video(where: str) -> InputError:
    return InputError("videos are not supported yet", where=where, remedy="Leave the sample out")
