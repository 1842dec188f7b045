"""Several engine processes as one engine: whole images, even loads, the same answers, and a death that is told."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import base_policy, lora_policy, make_images

from mcit.data_prep.errors import InputError
from mcit.eval import engines
from mcit.eval.config import EvalConfig
from mcit.eval.engines import Policy, Request, Response, generate, make_engine
from mcit.eval.engines.replicas import ReplicatedEngine, deal
from mcit.eval.engines.transformers import TransformersEngine

TOKENS, CONTEXT = 8, 64


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> list[Policy]:
    stages = tmp_path_factory.mktemp("replicas") / "stages"
    return [base_policy(stages), lora_policy(stages, 1, "four", 4)]


@pytest.fixture(scope="module")
def requests(policies: list[Policy], tmp_path_factory: pytest.TempPathFactory) -> list[Request]:
    images = make_images(tmp_path_factory.mktemp("images"), 3)
    shown = [[images[0]], [images[1]], [images[2]], [images[0]], []]
    return [
        Request([{"role": "user", "content": f"What is {i}?"}], paths, policy, completion="red")
        for i, paths in enumerate(shown)
        for policy in policies
    ]


@pytest.fixture(scope="module")
def pair(policies: list[Policy]) -> Iterator[ReplicatedEngine]:
    pytest.importorskip("vllm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "gpus", lambda: 2)
        engine = make_engine(policies, EvalConfig(engine="vllm", max_model_len=CONTEXT), max_images=1)
    assert isinstance(engine, ReplicatedEngine) and engine.name == "vllm"
    yield engine
    engine.close()


def test_an_image_goes_to_one_engine_and_all_have_as_much_to_do(requests: list[Request]) -> None:
    many = [
        request._replace(images=[Path(f"{number}.png")])
        for number in range(9)
        for request in requests[: 2 + number % 2]
    ]
    for count in (1, 2, 3):
        places = deal(many, count)
        assert all(
            len({place for place, r in zip(places, many, strict=True) if r.images == request.images}) == 1
            for request in many
        )
        loads = Counter(places)
        assert len(loads) == count and max(loads.values()) - min(loads.values()) <= 3
    assert deal(requests, 2)[0] == deal(requests, 2)[6]  # of the first image, asked again later


@pytest.mark.slow
def test_two_engines_say_what_one_says(pair: ReplicatedEngine, policies: list[Policy], requests: list[Request]) -> None:
    slow = TransformersEngine(policies, EvalConfig())
    assert generate(pair, requests, TOKENS) == generate(slow, requests, TOKENS)
    for ours, theirs in zip(pair.logprobs(requests), slow.logprobs(requests), strict=True):
        assert ours.prompt_ids == theirs.prompt_ids
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-3)
    assert all(map(pair.serves, policies))
    held = [request._replace(pattern="A|B") for request in requests]
    followed: list[int] = []

    def then(index: int, answer: Response) -> Request | None:
        if index >= len(requests) or index % 2:
            return None
        followed.append(index)
        return held[index]

    answers, expected = dict(pair.stream(requests, TOKENS, then)), generate(slow, held, TOKENS)
    assert sorted(answers) == list(range(len(requests) + len(followed)))
    assert [answers[len(requests) + n] for n in range(len(followed))] == [expected[i] for i in followed]


@pytest.mark.slow
def test_what_an_engine_refuses_and_its_death_are_told(policies: list[Policy], requests: list[Request]) -> None:
    pytest.importorskip("vllm")
    config = EvalConfig(engine="vllm", max_model_len=CONTEXT)
    pair = ReplicatedEngine(policies, config, 1, 2)
    long = requests[-1]._replace(prompt=[{"role": "user", "content": "9" * CONTEXT}])
    with pytest.raises(InputError, match=r"64.*raise eval\.max_model_len"):
        generate(pair, [requests[0], long], 1)
    pair = ReplicatedEngine(policies, config, 1, 2)
    pair._processes[1].kill()
    with pytest.raises(RuntimeError, match="engine process 1 has ended, exit code -9"):
        generate(pair, requests, TOKENS)
    pair.close()
