"""Which tokens carry loss, that the prompt is evaluation's own, and what happens in mixed batches."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from training import make_samples, tiny_model, tiny_processor, write_images
from transformers import PreTrainedTokenizerFast

from mcit.data_prep.chat import to_chat
from mcit.data_prep.errors import InputError
from mcit.data_prep.images import load_image
from mcit.data_prep.schema import Message, Sample
from mcit.pipeline.training.batches import MicroBatch
from mcit.pipeline.training.collator import IGNORED, Collator


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_images(tmp_path)
    return tmp_path


def sample(folder: Path, images: int = 1, **changes: Any) -> Sample:
    [made] = make_samples("colour", 1, images=images)
    made["images"] = [str(folder / image) for image in made["images"]]
    return {**made, **changes}  # type: ignore[typeddict-item]


def collate(samples: list[Sample], processor: Any = None, max_length: int = 1000) -> dict[str, torch.Tensor]:
    return Collator(processor or tiny_processor(), [], max_length).collate(samples)


def with_loss(batch: dict[str, torch.Tensor], row: int = 0) -> list[str]:
    """The runs of tokens that carry loss, as text; a label is always its own token."""
    runs: list[list[int]] = []
    before = False
    for token, label in zip(batch["input_ids"][row].tolist(), batch["labels"][row].tolist(), strict=True):
        if label != IGNORED:
            assert label == token
            if not before:
                runs.append([])
            runs[-1].append(token)
        before = label != IGNORED
    return [tiny_processor().tokenizer.decode(run) for run in runs]


def processor_with(template: str, tokenizer: Any = None) -> Any:
    processor = copy.copy(tiny_processor())
    processor.tokenizer = copy.deepcopy(tokenizer or processor.tokenizer)
    processor.chat_template = template
    return processor


def turn(role: Any, content: str) -> Message:
    return {"role": role, "content": content}


@pytest.mark.parametrize("images", [0, 1, 2])
def test_loss_on_the_answer_and_its_end_alone(folder: Path, images: int) -> None:
    made = sample(folder, images, completion=[turn("assistant", "dark red")])
    batch = collate([made])
    assert with_loss(batch) == ["dark red<|im_end|>"]
    processor = tiny_processor()
    prompt = processor.apply_chat_template(to_chat(made["prompt"], images), add_generation_prompt=True, tokenize=False)
    pictures = [load_image(path) for path in made["images"]] or None
    reference = processor(text=[prompt], images=pictures, return_tensors="pt")
    length = reference["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"][:, :length], reference["input_ids"])
    assert batch["input_ids"].shape[1] == length + len(processor.tokenizer("dark red<|im_end|>")["input_ids"])
    assert ("pixel_values" in batch) == (images > 0)
    if images:
        assert torch.equal(batch["pixel_values"], reference["pixel_values"])
        assert torch.equal(batch["image_grid_thw"], reference["image_grid_thw"])
        image_tokens = (batch["input_ids"] == processor.image_token_id).sum().item()
        assert image_tokens == (batch["image_grid_thw"].prod(-1) // 4).sum().item() > 0


def test_user_turns_inside_a_completion_carry_no_loss(folder: Path) -> None:
    dialogue = [turn("assistant", "red"), turn("user", "Sure?"), turn("assistant", "yes, red")]
    prompt = [turn("system", "Be brief."), turn("user", "Hi"), turn("assistant", "Hello"), turn("user", "Colour?")]
    batch = collate([sample(folder, prompt=prompt, completion=dialogue)])
    assert with_loss(batch) == ["red<|im_end|>", "yes, red<|im_end|>"]
    text = tiny_processor().tokenizer.decode(batch["input_ids"][0])
    assert "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nyes, red<|im_end|>" in text
    assert text.index("<|image_pad|>") < text.index("Hi")  # the images stand in the first user turn


def test_three_turns_over_two_images(folder: Path) -> None:
    """The images stand once, in the first user turn; each of the three answers and its end carry loss."""
    dialogue = [turn("assistant", "red"), turn("user", "And the second?"), turn("assistant", "blue too")]
    dialogue += [turn("user", "Sure?"), turn("assistant", "yes")]
    batch = collate([sample(folder, 2, completion=dialogue)])
    assert with_loss(batch) == ["red<|im_end|>", "blue too<|im_end|>", "yes<|im_end|>"]
    assert batch["image_grid_thw"].shape[0] == 2
    ids = batch["input_ids"][0].tolist()
    last_image = len(ids) - ids[::-1].index(tiny_processor().image_token_id)
    assert ids.count(tiny_processor().image_token_id) == (batch["image_grid_thw"].prod(-1) // 4).sum().item()
    assert last_image < (batch["labels"][0] != IGNORED).nonzero()[0].item()


def test_a_micro_batch_without_loss_is_the_same_but_for_its_labels(folder: Path) -> None:
    samples = [sample(folder, 0), sample(folder, 1)]
    collator = Collator(tiny_processor(), samples, 1000)
    idle, plain = collator([MicroBatch([1], loss=False)]), collator([MicroBatch([1])])
    assert (idle.pop("labels") == IGNORED).all() and with_loss(plain)
    assert all(torch.equal(tensor, plain[key]) for key, tensor in idle.items())


def test_replayed_samples_carry_no_loss_of_their_own(folder: Path) -> None:
    """Their labels are set aside, with which sample each of the last rows is and how many tokens it has."""
    samples = [sample(folder, 1), sample(folder, 1), sample(folder, 0), sample(folder, 2)]
    whole = Collator(tiny_processor(), samples, 1000)([MicroBatch([0, 3, 2])])
    batch = Collator(tiny_processor(), samples, 1000, own=2)([MicroBatch([0, 3, 2])])
    assert batch.pop("replayed") == [(3, whole["attention_mask"][1].sum()), (2, whole["attention_mask"][2].sum())]
    assert torch.equal(batch.pop("replayed_labels"), whole["labels"][1:])
    assert torch.equal(batch["labels"][0], whole["labels"][0]) and (batch["labels"][1:] == IGNORED).all()
    assert all(torch.equal(value, whole[key]) for key, value in batch.items() if key != "labels")
    assert "replayed" not in Collator(tiny_processor(), samples, 1000, own=2)([MicroBatch([3], loss=False)])


def test_a_mixed_batch_gives_each_sample_what_it_gets_alone(folder: Path) -> None:
    samples = [
        sample(folder, 0, prompt=[turn("user", "Say yes.")], completion=[turn("assistant", "yes")]),
        sample(folder, 2),
        sample(folder, 1, completion=[turn("assistant", "a rather long answer")]),
    ]
    batch = collate(samples)
    assert batch["image_grid_thw"].shape[0] == 3
    lengths = batch["attention_mask"].sum(1)
    for row, made in enumerate(samples):
        alone, length = collate([made]), lengths[row]
        for key in ("input_ids", "labels", "attention_mask", "mm_token_type_ids"):
            expected = alone.get(key, torch.zeros_like(alone["input_ids"]))
            assert torch.equal(batch[key][row, :length], expected[0]), key
        assert (batch["labels"][row, length:] == IGNORED).all() and (batch["input_ids"][row, length:] == 0).all()
    parts = [collate([made])["pixel_values"] for made in samples[1:]]
    assert torch.equal(batch["pixel_values"], torch.cat(parts))
    model = tiny_model().eval()
    with torch.no_grad():
        together = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        for row, made in enumerate(samples):
            alone = {key: value for key, value in collate([made]).items() if key != "labels"}
            torch.testing.assert_close(together[row, : lengths[row]], model(**alone).logits[0], rtol=0, atol=1e-4)


def test_nothing_is_truncated(folder: Path) -> None:
    made = sample(folder)
    length = collate([made])["input_ids"].shape[1]
    assert collate([made], max_length=length)["input_ids"].shape[1] == length
    with pytest.raises(InputError, match=rf"sample colour-0 of colour: takes {length} tokens, .* {length - 1} fit"):
        collate([made], max_length=length - 1)


VICUNA = (  # LLaVA-1.5's: roles in words, and no token that ends a turn
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def test_a_template_that_ends_no_turn_is_given_an_end(folder: Path) -> None:
    dialogue = [turn("assistant", "red"), turn("user", "Sure?"), turn("assistant", "yes")]
    batch = collate([sample(folder, completion=dialogue)], processor_with(VICUNA))
    assert with_loss(batch) == [" red<|im_end|>", " yes<|im_end|>"]


def test_word_starts_are_tokenized_in_context(folder: Path) -> None:
    """A tokenizer that marks word starts must not see the answer as the start of a text."""
    words = ["▁USER:", "▁Colour?", "▁ASSISTANT:", "▁red", "▁", "red", "</s>", "<unk>"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="</s>", unk_token="<unk>")
    collator = Collator(processor_with(VICUNA, tokenizer), [], 100)
    assert collator._tokens(["USER: Colour? ASSISTANT:", " red"]) == [[words.index("▁red")]]
    assert tokenizer("red", add_special_tokens=False)["input_ids"] == [words.index("▁red")]


def test_a_token_that_would_span_prompt_and_answer_is_not_used(folder: Path) -> None:
    tokenizer = tiny_processor().tokenizer
    assert len(tokenizer("th")["input_ids"]) == 1  # a merge of this tokenizer
    glued = "{% for m in messages %}{{ m['content'][0]['text'] }}{% if m['role'] == 'user' %}<|im_start|>t{% else %}" \
            "<|im_end|>{% endif %}{% endfor %}"  # fmt: skip
    made = sample(folder, 0, prompt=[turn("user", "Q")], completion=[turn("assistant", "hen")])
    batch = collate([made], processor_with(glued))
    assert batch["input_ids"][0, :-2].tolist()[:3] == tokenizer("Q<|im_start|>t")["input_ids"]
    assert with_loss(batch) == ["hen<|im_end|>"]


def test_templates_that_rewrite_earlier_turns_are_refused(folder: Path) -> None:
    forgetful = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if loop.last or m['role'] == 'user' %}{{ m['content'][-1]['text'] }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    dialogue = [turn("assistant", "red"), turn("user", "Sure?"), turn("assistant", "yes")]
    with pytest.raises(InputError, match="renders turn 3 differently when more turns follow"):
        collate([sample(folder, 0, completion=dialogue)], processor_with(forgetful))
    assert with_loss(collate([sample(folder, 0)], processor_with(forgetful)))[0].endswith("<|im_end|>")


def test_templates_that_refuse_a_role_are_named(folder: Path) -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}x"
    made = sample(folder, 0, prompt=[turn("system", "Be brief."), turn("user", "Q")])
    with pytest.raises(
        InputError, match=r"sample colour-0 of colour: .*the chat template refuses these messages: no system role"
    ):
        collate([made], processor_with(strict))
