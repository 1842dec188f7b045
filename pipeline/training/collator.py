"""From samples to a training batch: the evaluation's own prompt, then the assistant's turns; loss on these alone."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mcit.data_prep.chat import open_image, render_chat, tokenizer_options
from mcit.data_prep.errors import InputError
from mcit.data_prep.schema import Message, Sample

from .batches import MicroBatch, same_images
from .packing import PACKING, pack

if TYPE_CHECKING:
    from transformers import ProcessorMixin

IGNORED = -100  # the label that carries no loss
# What a batch says of its last rows, if they are replayed: [(index of the sample, its tokens), …], and their labels.
REPLAYED, REPLAYED_LABELS = "replayed", "replayed_labels"


class Collator:
    """Collates a `MicroBatch` of `samples` (their image paths absolute) for a vision-language model.

    The prompt is tokenized exactly as in evaluation: rendered with the generation prompt, its images through the
    processor. Each assistant turn of the completion follows, end-of-turn token included, and carries loss; everything
    else is labelled -100. Nothing is ever truncated. Samples from the index `own` on (default: none) are replayed by
    methods, which see to their loss: in the batch they carry none. With `packed`, the decoder's hidden size, a batch
    says how its rows are packed.
    """

    def __init__(
        self,
        processor: "ProcessorMixin",
        samples: Sequence[Sample],
        max_length: int,
        padding_side: Literal["right", "left"] = "right",
        own: int | None = None,
        packed: int | None = None,
    ):
        self.processor, self.samples, self.max_length = processor, samples, max_length
        self.padding_side, self.packed = padding_side, packed
        self.own = len(samples) if own is None else own
        self.tokenizer = processor.tokenizer  # type: ignore[attr-defined]
        # A template may close no assistant turn (LLaVA-1.5's does not): then the end-of-sequence token does.
        turns: list[Message] = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        left_open = render_chat(processor, turns, 0, add_generation_prompt=False).rstrip().endswith("!")
        self.end_of_turn = self.tokenizer.eos_token if left_open else ""

    def __call__(self, one: Sequence[MicroBatch]) -> dict[str, Any]:
        """The batch of the one micro-batch that a data loader of batch size 1 brings."""
        [micro_batch] = one
        samples = [self.samples[index] for index in micro_batch.samples]
        batch: dict[str, Any] = dict(self.collate(samples))
        if self.packed:
            batch[PACKING] = pack(batch["input_ids"], batch["attention_mask"], same_images(samples), self.packed)
        if not micro_batch.loss:
            batch["labels"] = torch.full_like(batch["labels"], IGNORED)
        elif replayed := [index for index in micro_batch.samples if index >= self.own]:
            rows = slice(-len(replayed), None)
            tokens = batch["attention_mask"][rows].sum(1).tolist()
            batch[REPLAYED] = list(zip(replayed, tokens, strict=True))
            batch[REPLAYED_LABELS] = batch["labels"][rows].clone()
            batch["labels"][rows] = IGNORED
        return batch

    def collate(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask`, `labels` [batch, length], padded, and what the processor adds.

        Image tensors hold the images of the batch in order and are missing where no sample has one.
        Raises `InputError` for a sample that is too long or that the chat template does not render turn by turn.
        """
        pieces = [self.pieces(sample) for sample in samples]
        rows: list[dict[str, Tensor]] = [{} for _ in samples]
        images: dict[str, Tensor] = {}
        for with_images in (True, False):
            group = [i for i, sample in enumerate(samples) if bool(sample["images"]) == with_images]
            if group:
                prompts = [pieces[i][0] for i in group]
                pictures = [[open_image(path) for path in samples[i]["images"]] for i in group]
                encoded, fields = self._prompts(prompts, pictures if with_images else None)
                images |= fields
                for i, row in zip(group, encoded, strict=True):
                    rows[i] = self._extend(row, pieces[i], samples[i])
        fill = {"input_ids": self.tokenizer.pad_token_id, "labels": IGNORED}
        return {
            key: pad_sequence([_field(row, key) for row in rows], True, fill.get(key, 0), self.padding_side)
            for key in sorted({key for row in rows for key in row})
        } | images

    def pieces(self, sample: Sample) -> list[str]:
        """The rendered dialogue, cut: prompt, assistant turn, what leads to the next one, assistant turn, …"""
        ends = {"assistant": self.end_of_turn}
        completion: list[Message] = [
            {**turn, "content": turn["content"] + ends.get(turn["role"], "")} for turn in sample["completion"]
        ]
        messages = [*sample["prompt"], *completion]
        pieces: list[str] = []
        done = ""
        for turn in range(len(sample["prompt"]), len(messages)):
            if messages[turn]["role"] != "assistant":
                continue
            before, after = self._render(sample, messages[:turn], True), self._render(sample, messages[: turn + 1])
            if not (before.startswith(done) and after.startswith(before)):
                raise InputError(
                    f"the chat template renders turn {turn} differently when more turns follow",
                    where=_place(sample),
                    remedy="Make each assistant turn a sample of its own, with the turns before it as the prompt",
                )
            pieces += [before[len(done) :], after[len(before) :]]
            done = after
        if not pieces:
            raise InputError("the completion has no assistant turn", where=_place(sample))
        return pieces

    def _render(self, sample: Sample, messages: list[Message], generation_prompt: bool = False) -> str:
        images = len(sample["images"])
        try:
            text = render_chat(self.processor, messages, images, add_generation_prompt=generation_prompt)
        except InputError as error:
            raise InputError(str(error), where=_place(sample)) from None
        return text if generation_prompt else text.rstrip()

    def _prompts(self, texts: list[str], images: Any) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Token fields [length] of each prompt, and the image tensors of all."""
        options = tokenizer_options(self.processor, texts[0])
        batch = self.processor(text=texts, images=images, padding=True, return_tensors="pt", **options)
        ids, mask = batch["input_ids"], batch["attention_mask"].bool()
        is_token_field = {
            key: value.shape == ids.shape and not value.is_floating_point() for key, value in batch.items()
        }
        rows = [{key: batch[key][i][mask[i]] for key in batch if is_token_field[key]} for i in range(len(texts))]
        return rows, {key: value for key, value in batch.items() if not is_token_field[key]}

    def _extend(self, row: dict[str, Tensor], pieces: list[str], sample: Sample) -> dict[str, Tensor]:
        """Append everything after the prompt to a prompt's token fields, and add the labels."""
        ids = [row["input_ids"]]
        labels = [torch.full_like(row["input_ids"], IGNORED)]
        for place, tokens in enumerate(self._tokens(pieces)):
            ids.append(torch.tensor(tokens, dtype=torch.long))
            labels.append(ids[-1] if place % 2 == 0 else torch.full_like(ids[-1], IGNORED))
        added = sum(map(len, ids[1:]))
        if len(ids[0]) + added > self.max_length:
            raise InputError(
                f"takes {len(ids[0]) + added} tokens, images included, and {self.max_length} fit",
                where=_place(sample),
                remedy="Shorten it, lower base_model.processor.max_pixels, or raise train.max_length",
            )
        fields = {key: torch.cat([value, value.new_zeros(added)]) for key, value in row.items()}
        fields["attention_mask"] = torch.ones(len(ids[0]) + added, dtype=torch.long)
        return fields | {"input_ids": torch.cat(ids), "labels": torch.cat(labels)}

    def _tokens(self, pieces: list[str]) -> list[list[int]]:
        """Token ids of each piece after the first.

        The dialogue is tokenized as a whole, so that a tokenizer that marks word starts sees them in context, and cut
        where the pieces meet; if a token spans a cut, the pieces are tokenized alone, as generation would meet them.
        """

        def alone(text: str) -> list[int]:
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]

        if self.tokenizer.is_fast:
            whole = self.tokenizer("".join(pieces), add_special_tokens=False, return_offsets_mapping=True)
            cuts = [0, *accumulate(map(len, pieces))]
            starts = [start for start, _ in whole["offset_mapping"]]
            ends = [bisect_right(starts, cut - 1) for cut in cuts]
            rows = [whole["input_ids"][start:end] for start, end in pairwise(ends)]
            spans = any(start < cut < end for cut in cuts for start, end in whole["offset_mapping"])
            if not spans and rows[0] == alone(pieces[0]):
                return rows[1:]
        return [alone(piece) for piece in pieces[1:]]


def _field(row: dict[str, Tensor], key: str) -> Tensor:
    """A token field of a row; zeros where only other rows have it (image markers of a text-only sample)."""
    return row[key] if key in row else torch.zeros_like(row["input_ids"])


def _place(sample: Sample) -> str:
    return f"sample {sample['id']} of {sample['task']}"
