"""Both engines on the embedded tiny model: the same prompts, the same answers, and nothing of an adapter left out."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from serving import TINY, base_policy, lora_policy, make_images
from transformers import AutoConfig, AutoProcessor

from mcit.data_prep.chat import open_image, render_chat, to_chat
from mcit.data_prep.errors import InputError
from mcit.data_prep.files import read_json
from mcit.eval.config import EvalConfig
from mcit.eval.engines import Policy, Request, Response, generate, make_engine
from mcit.eval.engines.base import image_tokens
from mcit.eval.engines.settings import EngineFailed, max_lora_rank
from mcit.eval.engines.transformers import TransformersEngine
from mcit.eval.engines.vllm import VllmEngine, why_not_vllm
from mcit.eval.engines.vllm_cpu import add_products, blocks

pytest.importorskip("vllm")
TOKENS = 12
CONTEXT = 64


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines") / "stages"


@pytest.fixture(scope="module")
def policies(stages: Path) -> list[Policy]:
    settings = {"processor": {"max_pixels": 32 * 32}}
    return [
        base_policy(stages, **settings),
        lora_policy(stages, 1, "four", 4, **settings),
        lora_policy(stages, 2, "eight", 8, **settings),
    ]


@pytest.fixture(scope="module")
def requests(stages: Path, policies: list[Policy]) -> list[Request]:
    """One, two and no images, each question to the base and to two adapters."""
    images = make_images(stages / "images", 4)
    shown = [[images[0]], [images[1]], [images[2], images[3]], [], []]
    return [
        Request([{"role": "user", "content": f"What is number {i}?"}], paths, policy, completion="red circle")
        for i, paths in enumerate(shown)
        for policy in policies
    ]


@pytest.fixture(scope="module")
def slow(policies: list[Policy]) -> TransformersEngine:
    return TransformersEngine(policies, EvalConfig(batch_size=4, max_model_len=CONTEXT))


@pytest.fixture(scope="module")
def fast(policies: list[Policy]) -> Iterator[VllmEngine]:
    start = time.monotonic()
    engine = make_engine(policies, EvalConfig(engine="vllm", max_model_len=CONTEXT), max_images=2)
    assert isinstance(engine, VllmEngine)
    print(f"vLLM started in {time.monotonic() - start:.1f} s")
    yield engine
    engine.close()


def first_word(engine: VllmEngine | TransformersEngine, requests: list[Request]) -> tuple[Request, list[int]]:
    """A request and the token its answer begins with (one that is whole as text, and no end token)."""
    for request, answer in zip(requests, generate(engine, requests, 1), strict=True):
        ids = engine.processor.tokenizer(answer.text, add_special_tokens=False)["input_ids"]
        if len(ids) == 1:
            return request, ids
    raise AssertionError("no answer begins with a word")


def test_both_engines_say_the_same_with_base_and_adapters_in_one_batch(
    fast: VllmEngine, slow: TransformersEngine, requests: list[Request]
) -> None:
    ours, theirs = generate(fast, requests, TOKENS), generate(slow, requests, TOKENS)
    assert ours == theirs
    texts = [[answer.text for answer in ours[start::3]] for start in range(3)]
    assert texts[0] != texts[1] != texts[2] != texts[0]  # the adapters are not mere decoration


def test_log_probs_of_both_engines_agree_and_the_policies_differ(
    fast: VllmEngine, slow: TransformersEngine, requests: list[Request]
) -> None:
    ours, theirs = fast.logprobs(requests), slow.logprobs(requests)
    gaps = []
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.prompt_ids == other.prompt_ids
        assert len(mine.logprobs) >= 3
        gaps.append(max(abs(a - b) for a, b in zip(mine.logprobs, other.logprobs, strict=True)))
    print(f"largest gap {max(gaps):.1e} nats")
    assert max(gaps) < 1e-3
    base, four, eight = (scored.logprobs for scored in ours[:3])
    assert max(abs(a - b) for a, b in zip(base, four, strict=True)) > 1e-2
    assert max(abs(a - b) for a, b in zip(four, eight, strict=True)) > 1e-2


def test_log_probs_are_what_a_plain_forward_pass_gives(slow: TransformersEngine, requests: list[Request]) -> None:
    request = requests[9]  # without images, to the base
    processor = slow.processor
    prompt = render_chat(processor, request.prompt, 0)
    head = processor.tokenizer(prompt)["input_ids"]
    tail = processor.tokenizer("red circle<|im_end|>")["input_ids"]
    with torch.inference_mode(), slow.model.disable_adapter():
        logits = slow.model(input_ids=torch.tensor([head + tail])).logits[0]
    expected = [logits[len(head) + i - 1].log_softmax(-1)[token].item() for i, token in enumerate(tail)]
    assert slow.logprobs([request])[0].logprobs == pytest.approx(expected, abs=1e-5)


PATTERNS = (
    "A|B|C",
    "Yes|No|yes|no",
    "red|green|red circle|a\\|b",
    r"-?(?:[0-9]{1,3}(?:,[0-9]{3}){1,4}|[0-9]{1,15})(?:\.[0-9]{1,10})?",
    r"\[[0-9]\.[0-9]{2}, ?[0-9]\.[0-9]{2}\]",
    r"<think>\s?(?:[^<\s]|<+[^<A-Za-z/])(?:[^<]|<+[^<A-Za-z/])*</think>\s?<answer>(?:Yes|No)</answer>",
)


def test_held_to_a_pattern_both_engines_say_the_same_and_nothing_else(
    fast: VllmEngine, slow: TransformersEngine, requests: list[Request]
) -> None:
    """Free and held requests in one batch: the free ones stay what they are. Random weights never have a form."""
    held = [one._replace(pattern=PATTERNS[i % len(PATTERNS)]) for i, one in enumerate(requests * 2)]
    ours, theirs = generate(fast, [*requests, *held], 16), generate(slow, [*requests, *held], 16)
    assert ours == theirs
    assert ours[: len(requests)] == generate(fast, requests, 16)
    finished = set()
    for request, answer in zip(held, ours[len(requests) :], strict=True):
        if answer.finished:
            finished.add(request.pattern)
            assert re.fullmatch(request.pattern, answer.text), answer
    assert finished >= {*PATTERNS[:4]}
    free = generate(fast, requests, 16)
    assert not any(re.fullmatch(pattern, answer.text) for answer in free for pattern in PATTERNS)


def test_what_follows_from_an_answer_is_asked_too(
    fast: VllmEngine, slow: TransformersEngine, requests: list[Request]
) -> None:
    held = [request._replace(pattern=PATTERNS[0]) for request in requests]
    expected = generate(fast, held, TOKENS)
    for engine in (fast, slow):
        followed: list[int] = []

        def then(index: int, answer: Response, followed: list[int] = followed) -> Request | None:
            if index >= len(requests) or index % 2:
                return None
            followed.append(index)
            return held[index]

        answers = dict(engine.stream(requests, TOKENS, then))
        assert sorted(followed) == list(range(0, len(requests), 2))
        assert sorted(answers) == list(range(len(requests) + len(followed)))
        for place, index in enumerate(followed, len(requests)):
            assert answers[place] == expected[index]
        assert [answers[i] for i in range(len(requests))] == generate(engine, requests, TOKENS)


def test_an_answer_that_only_one_choice_leaves_is_given(fast: VllmEngine, slow: TransformersEngine, requests) -> None:
    held = [request._replace(pattern="purple") for request in requests]
    for engine in (fast, slow):
        assert {(answer.text, answer.finished) for answer in generate(engine, held, TOKENS)} == {("purple", True)}


def test_the_order_of_requests_changes_nothing(fast: VllmEngine, requests: list[Request]) -> None:
    assert generate(fast, requests[::-1], TOKENS) == generate(fast, requests, TOKENS)[::-1]


def test_vllm_works_by_image_then_adapter(fast: VllmEngine, requests: list[Request]) -> None:
    order = [requests[i] for i in fast._order(requests)]
    images = [tuple(request.images) for request in order]
    assert len({i for i in range(len(images)) if i == 0 or images[i] != images[i - 1]}) == len(set(images))
    assert [request.policy.serving.stage for request in order[-3:]] == [0, 1, 2]


def test_a_cut_off_answer_is_not_finished(fast: VllmEngine, slow: TransformersEngine, requests: list[Request]) -> None:
    for engine in (fast, slow):
        for answer, short in zip(generate(engine, requests, 9), generate(engine, requests, 1), strict=True):
            assert (short.tokens, short.finished) == (1, answer.tokens == 1)
            assert answer.finished or answer.tokens == 9


def test_the_context_ends_an_answer_and_refuses_a_prompt(
    fast: VllmEngine, slow: TransformersEngine, requests: list[Request]
) -> None:
    ours, theirs = generate(fast, requests, CONTEXT), generate(slow, requests, CONTEXT)
    assert ours == theirs
    assert any(
        len(scored.prompt_ids) + answer.tokens == CONTEXT
        for scored, answer in zip(fast.logprobs(requests), ours, strict=True)
    )
    long = requests[-1]._replace(prompt=[{"role": "user", "content": "9" * CONTEXT}])
    for engine in (fast, slow):
        with pytest.raises(InputError, match=r"64.*raise eval\.max_model_len"):
            generate(engine, [requests[0], long], 1)
    assert generate(fast, requests[:1], 4) == generate(slow, requests[:1], 4)  # and nothing is left in the queue


def test_a_finished_answer_ends_with_the_end_token(
    fast: VllmEngine, slow: TransformersEngine, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first token the model says is declared to be an end token: the answer is then empty, and finished."""
    for engine in (fast, slow):
        request, first = first_word(engine, requests)
        if isinstance(engine, TransformersEngine):
            monkeypatch.setattr(engine.model.generation_config, "eos_token_id", [*engine.ends, *first])
        monkeypatch.setattr(engine, "ends", [*engine.ends, *first])
        [ended] = generate(engine, [request], TOKENS)
        assert (ended.text, ended.finished, ended.tokens) == ("", True, 1)


@pytest.mark.parametrize(
    ("targets", "problem"),
    [
        (r".*(language_model.*q_proj|visual.*qkv)", "vLLM would ignore 6 of 16 tensors, the first: .*visual"),
        (r".*(language_model.*q_proj|merger.mlp.0)", "vLLM would ignore 2 of 12 tensors, the first: .*merger"),
        (r".*(language_model.*q_proj|patch_embed.proj)", "vLLM would ignore 2 of 12 tensors, the first: .*patch_embed"),
        (r".*(language_model.*q_proj|lm_head)", "vLLM refuses the adapter: .*lm_head"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_that_vllm_would_not_apply_in_full_is_refused(
    fast: VllmEngine, tmp_path: Path, targets: str, problem: str
) -> None:
    with pytest.raises(InputError, match=problem):
        fast.add(lora_policy(tmp_path, 3, "tower", 4, targets=targets))
    assert f"{3:064x}" not in fast._loras


def test_a_policy_that_the_engine_does_not_have_gets_no_answer(
    fast: VllmEngine, slow: TransformersEngine, requests: list[Request], tmp_path: Path
) -> None:
    for policy in (lora_policy(tmp_path, 5, "unknown", 4), base_policy(tmp_path, hash="e" * 64)):
        for engine in (fast, slow):
            with pytest.raises(KeyError):
                generate(engine, [requests[0]._replace(policy=policy)], 1)
            with pytest.raises(KeyError):
                engine.logprobs([requests[0]._replace(policy=policy)])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("moved", [True, False])
def test_vllm_refuses_an_adapter_of_another_model(fast: VllmEngine, tmp_path: Path, moved: bool) -> None:
    """Of other layers, and of other widths."""
    policy = lora_policy(tmp_path, 3, "foreign", 4)
    path = policy.folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    if moved:
        tensors = {name.replace("layers.0.", "layers.9."): tensor for name, tensor in tensors.items()}
    else:
        tensors = {name: torch.cat([t, t], dim=int("lora_A" in name)) for name, t in tensors.items()}
    save_file(tensors, path)
    with pytest.raises(InputError, match=r"vLLM (would ignore 14 of|refuses the adapter)"):
        fast.add(policy)
    assert f"{3:064x}" not in fast._loras


def test_an_adapter_with_a_scaling_that_vllm_does_not_read_is_refused(fast: VllmEngine, tmp_path: Path) -> None:
    policy = lora_policy(tmp_path, 3, "pattern", 4)
    path = policy.folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(read_json(path) | {"alpha_pattern": {"q_proj": 1}}))
    with pytest.raises(InputError, match="alpha_pattern: is not applied by vLLM"):
        fast.add(policy)


@pytest.mark.filterwarnings("ignore")
def test_transformers_refuses_an_adapter_of_another_model(tmp_path: Path) -> None:
    policy = lora_policy(tmp_path, 3, "foreign", 4)
    path = policy.folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({key.replace("layers.0.", "layers.9."): value for key, value in tensors.items()}, path)
    with pytest.raises(InputError, match="28 tensors do not fit the base model"):
        TransformersEngine([policy.base(), policy], EvalConfig())


def test_image_tokens_are_never_generated(
    fast: VllmEngine, slow: TransformersEngine, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    forbidden = image_tokens(AutoConfig.from_pretrained(TINY))
    assert forbidden == fast.forbidden == slow.model.generation_config.suppress_tokens
    tokenizer = fast.processor.tokenizer
    assert sorted(tokenizer.convert_ids_to_tokens(forbidden)) == sorted(
        ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    )
    # Any token is suppressed as they are: what the model would have said first, it now says never.
    for engine in (fast, slow):
        request, said = first_word(engine, requests)
        monkeypatch.setattr(fast, "forbidden", [*forbidden, *said])
        monkeypatch.setattr(slow.model.generation_config, "suppress_tokens", [*forbidden, *said])
        [after] = generate(engine, [request], TOKENS)
        assert not set(said) & set(tokenizer(after.text, add_special_tokens=False)["input_ids"])


def test_the_processor_settings_of_the_recipe_reach_both_engines(
    fast: VllmEngine, slow: TransformersEngine, requests: list[Request]
) -> None:
    """64 × 64 pixels are 16 tokens of 16 × 16; with max_pixels = 32 × 32, 4."""
    pad = fast.processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    request = next(request for request in requests if open_image(request.images[0]).size == (64, 64))
    for engine in (fast, slow):
        assert engine.logprobs([request])[0].prompt_ids.count(pad) == 4
    with_defaults = AutoProcessor.from_pretrained(TINY)(
        text=["<|image_pad|>"], images=[[open_image(request.images[0])]]
    )
    assert len(with_defaults["input_ids"][0]) == 16


def test_grouped_arithmetic_equals_token_by_token_and_leaves_the_base_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(7, 5, generator=generator), torch.randn(7, 10, generator=generator)
    a, b = torch.randn(3, 1, 2, 5, generator=generator), torch.randn(3, 1, 6, 2, generator=generator)
    a[2, 0, 1] = 0  # an adapter of rank 1, beside those of rank 2
    a = [a, a * torch.rand(a.shape, generator=generator)]
    slots, found, ranks = torch.tensor([2, -1, 0, 2, 1, -1]), y.clone(), {}  # of the last token vLLM says nothing
    add_products(found, x, a, [b, b - 1], [6, 4], blocks(slots), 0.5, ranks)
    assert list(ranks.values()) == [2, 2, 2, 2, 1, 1]
    for t, slot in enumerate([*slots.tolist(), -1]):
        up = [0.5 * b[slot, 0] @ a[0][slot, 0] @ x[t], (0.5 * (b[slot, 0] - 1) @ a[1][slot, 0] @ x[t])[:4]]
        torch.testing.assert_close(found[t], y[t] + torch.cat(up) if slot >= 0 else y[t])


def test_the_smallest_rank_that_vllm_allows_is_chosen() -> None:
    assert [max_lora_rank(rank) for rank in (0, 1, 2, 8, 80, 128, 129, 400, 512)] == [
        1, 1, 8, 8, 128, 128, 256, 512, 512,
    ]  # fmt: skip
    with pytest.raises(EngineFailed, match="rank 513"):
        max_lora_rank(513)


def test_auto_says_why_it_takes_transformers(stages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in TINY.iterdir():
        (model / file.name).symlink_to(file)
    (model / "config.json").unlink()
    (model / "config.json").write_text(json.dumps(read_json(TINY / "config.json") | {"architectures": ["Unheard"]}))
    policy = base_policy(tmp_path, base=str(model))
    assert why_not_vllm(policy) == "vLLM does not serve Unheard"
    assert make_engine([policy], EvalConfig(engine="auto"), 1).name == "transformers"
    assert "transformers, which is slower: vLLM does not serve Unheard" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"eval\.engine: vLLM does not serve Unheard"):
        make_engine([policy], EvalConfig(engine="vllm"), 1)


def test_a_failed_start_is_an_error_or_a_reason(policies: list[Policy], capsys: pytest.CaptureFixture[str]) -> None:
    impossible = EvalConfig(engine="vllm", max_model_len=10**6)
    with pytest.raises(InputError, match=r"eval\.engine: vLLM did not start: .*max_model_len"):
        make_engine(policies, impossible, 1)
    assert make_engine(policies, impossible.model_copy(update={"engine": "auto"}), 1).name == "transformers"
    assert "which is slower: vLLM did not start" in capsys.readouterr().out


def test_images_come_first_in_the_first_user_turn() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "A dog."},
        {"role": "user", "content": "Which?"},
    ]
    chat = to_chat(messages, 2)  # type: ignore[arg-type]
    assert [part["type"] for part in chat[1]["content"]] == ["image", "image", "text"]
    assert [len(turn["content"]) for turn in chat] == [1, 3, 1, 1]
    with pytest.raises(InputError, match="no user turn"):
        to_chat([{"role": "system", "content": "x"}], 1)


def test_templates_without_a_system_role_or_missing_are_refused() -> None:
    processor = AutoProcessor.from_pretrained(TINY)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is it?"}]
    assert "Be brief." in render_chat(processor, messages, 0)  # type: ignore[arg-type]
    processor.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'][0]['text'] }}{% endif %}{% endfor %}"
    )
    with pytest.raises(InputError, match="no system role"):
        render_chat(processor, messages, 0)  # type: ignore[arg-type]
    processor.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(InputError, match="refuses these messages: System role not supported"):
        render_chat(processor, messages, 0)  # type: ignore[arg-type]
    processor.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        render_chat(processor, messages, 0)  # type: ignore[arg-type]
