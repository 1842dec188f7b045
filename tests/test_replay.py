"""Buffers, replay and DER against numbers worked out by hand."""

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from training import make_run, make_samples

from mcit.data_prep.errors import InputError
from mcit.pipeline.methods import build_methods, expand
from mcit.pipeline.methods.buffer import collision, ordered, parts, shares_by_age, word_shares
from mcit.pipeline.methods.der import Der, DerConfig
from mcit.pipeline.methods.outputs import logit_gap
from mcit.pipeline.methods.replay import ExperienceReplay, ReplayConfig
from mcit.pipeline.recipe.loading import load_recipe
from mcit.pipeline.recipe.schedule import past_of
from mcit.pipeline.recipe.schema import TrainConfig
from mcit.pipeline.stage.entering import trained_by
from mcit.pipeline.training.batches import Drawn
from mcit.pipeline.training.replay import Replayed


def stage(k: int, seed: int = 0) -> Any:
    return SimpleNamespace(k=k, seed=seed)


def ids(samples: list[Any]) -> set[str]:
    return {sample["id"] for sample in samples}


def question(name: str, text: str, images: int = 0) -> Any:
    return {
        "id": name,
        "task": "t",
        "images": ["x.png"] * images,
        "prompt": [{"role": "user", "content": text}],
    }


def test_a_buffer_is_shared_out_evenly_and_what_one_stage_lacks_goes_to_the_others() -> None:
    assert parts([100, 100, 100], [1, 1, 1], 10) == [4, 3, 3]
    assert parts([2, 100, 100], [1, 1, 1], 10) == [2, 4, 4]
    assert parts([3, 3], [1, 1], 10) == [3, 3]
    assert parts([], [], 10) == []


def test_shares_fall_with_age() -> None:
    assert shares_by_age(4, [1, 2, 3], 1.0) == [pytest.approx(1 / 3), 0.5, 1.0]
    assert shares_by_age(4, [1, 2, 3], 0.0) == [1, 1, 1]
    assert parts([100, 100, 100], shares_by_age(4, [1, 2, 3], 1.0), 11) == [2, 3, 6]


@pytest.mark.parametrize("buffer", [1, 7, 50])
def test_another_stage_never_makes_an_old_ones_part_larger(buffer: int) -> None:
    """So what was recorded of a stage at its end is enough for ever."""
    sizes = [30, 5, 60, 60, 2, 40]
    before: list[int] = []
    for count in range(1, len(sizes) + 1):
        now = parts(sizes[:count], [1.0] * count, buffer)
        assert sum(now) == min(buffer, sum(sizes[:count])) and all(n <= b for n, b in zip(now, before, strict=False))
        before = now


def test_what_is_kept_depends_on_ids_and_seed_alone() -> None:
    past = make_samples("colour", 30)
    first = [sample["id"] for sample in ordered(past, [], "random", 0)]
    assert first == [sample["id"] for sample in ordered(past[::-1], past, "random", 0)]
    assert first != [sample["id"] for sample in ordered(past, [], "random", 1)] and len(set(first)) == 30


def test_modality_puts_samples_like_the_new_ones_first() -> None:
    past = [
        question("text-1", "a"),
        question("picture-1", "b", 1),
        question("text-2", "c"),
        question("picture-2", "d", 1),
    ]
    assert ids(ordered(past, [question("new", "e", 1)], "modality", 0)[:2]) == {"picture-1", "picture-2"}
    assert ids(ordered(past, [question("new", "e")], "modality", 0)[:2]) == {"text-1", "text-2"}


def test_collision_puts_prompts_that_read_like_the_new_ones_first() -> None:
    own = [question("1", "How many dogs ?"), question("2", "How many cats ?")]
    common = word_shares(own)
    assert common == {"how": 1, "many": 1, "dogs": 0.5, "cats": 0.5, "?": 1}
    assert collision(question("x", "how many birds"), common) == pytest.approx(2 / 3)
    assert collision(question("x", ""), common) == 0
    past = [question("far", "Read the sign"), question("near", "How many dogs ?"), question("between", "Which dogs ?")]
    assert [one["id"] for one in ordered(past, own, "collision", 0)] == ["near", "between", "far"]


def test_rested_samples_come_again_after_the_same_number_of_batches() -> None:
    def gaps(drawn: Drawn) -> set[int]:
        seen: dict[int, list[int]] = {}
        for number in range(40):
            for index in drawn.of(number, 0):
                seen.setdefault(index, []).append(number)
        return {b - a for numbers in seen.values() for a, b in pairwise(numbers)}

    assert gaps(Drawn(range(10, 20), 2, rested=True)) == {5}
    assert len(gaps(Drawn(range(10, 20), 2))) > 3


def replayed(past: dict[int, Any], k: int, **settings: Any) -> tuple[ExperienceReplay, list[Any]]:
    method = ExperienceReplay(ReplayConfig(**settings))
    return method, method.data(stage(k), make_samples("new", 4), past, {})


def test_a_ratio_of_each_past_stage_is_mixed_in() -> None:
    past = {1: make_samples("one", 10), 2: make_samples("two", 20)}
    method, samples = replayed(past, 3, ratio=0.2)
    assert len(samples) == 4 + 2 + 4 and method.replay([]) is None
    assert [sample["task"] for sample in samples] == ["new"] * 4 + ["one"] * 2 + ["two"] * 4
    _, samples = replayed(past, 3, ratio=0.2, spacing="power", exponent=1.0)
    assert [sample["task"] for sample in samples] == ["new"] * 4 + ["one"] * 1 + ["two"] * 4


def test_a_buffer_is_beside_every_batch() -> None:
    past = {1: make_samples("one", 10), 2: make_samples("two", 20)}
    method, samples = replayed(past, 3, buffer=6, per_batch=2, spacing="rested")
    wanted = method.replay([])
    assert len(samples) == 4 and wanted is not None
    assert (len(wanted.samples), wanted.per_batch, wanted.rested) == (6, 2, True)
    assert [sample["task"] for sample in wanted.samples] == ["one"] * 3 + ["two"] * 3


def test_a_first_stage_has_no_past() -> None:
    method, samples = replayed({}, 1, buffer=6, per_batch=2)
    assert len(samples) == 4 and method.replay([]) is None


def test_a_share_that_keeps_nothing_is_refused() -> None:
    with pytest.raises(InputError, match=r"method.replay.ratio: keeps none of 10 past samples. Raise it"):
        replayed({1: make_samples("one", 10)}, 2, ratio=0.01)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"replay": {"ratio": 0.1, "buffer": 5}}, "`ratio` and `buffer` exclude each other"),
        ({"replay": {"buffer": 0}}, "method.replay.buffer: .*greater than 0"),
        ({"replay": {"spacing": "rested"}}, "spacing `rested` needs `per_batch`"),
        ({"replay": {}, "der": {}}, "method.der: does not work together with replay"),
    ],
)
def test_mistakes_are_one_clear_line(section: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        build_methods(section, TrainConfig())
    assert "\n" not in str(caught.value)


def test_der_plus_plus_is_der_with_labels() -> None:
    assert expand({"derpp": {}})["der"]["label_weight"] == 0.5 and expand({"der": {}})["der"]["label_weight"] == 0


@pytest.fixture
def head() -> nn.Linear:
    made = nn.Linear(2, 3, bias=False)
    with torch.no_grad():
        made.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    return made


def test_logit_gap_by_hand(head: nn.Linear) -> None:
    """Logits (1, 2, 3) at places 2 and 0 against 5 and 0: (3 − 5)² and (1 − 0)², a mean of 2.5."""
    hidden = torch.tensor([[1.0, 2.0]], requires_grad=True)
    gap = logit_gap(hidden, torch.tensor([[2, 0]]), torch.tensor([[5.0, 0.0]]), head)
    gap.backward()
    assert gap.item() == 2.5
    # d/dlogits = 2 (x − z) / 2 = (1, 0, −2), through the head
    assert hidden.grad.tolist() == [[1 - 2, -2]]


def test_der_by_hand(head: nn.Linear) -> None:
    """Of two answer tokens the largest logit is kept; alpha 0.5, beta 2."""
    method = Der(DerConfig(top=1, weight=0.5, label_weight=2))
    [sample] = method.kept = make_samples("t", 1)
    method.head = head
    key = f"t/{sample['id']}"
    method.logits = {
        f"{key}.values": torch.tensor([[1.0], [4.0]]).half(),
        f"{key}.places": torch.tensor([[2], [2]]).int(),
    }
    hidden = torch.tensor([[[9.0, 9.0], [0.0, 0.0], [1.0, 2.0], [9.0, 9.0], [7.0, 7.0]]])  # the last one is padding
    labels = torch.tensor([[-100, -100, 0, 2, -100]])
    [loss] = method.replay_loss(Replayed([0], [4], hidden, labels))
    cross_entropy = -(torch.tensor([0.0, 0, 0]).log_softmax(0)[0] + torch.tensor([1.0, 2, 3]).log_softmax(0)[2]) / 2
    assert loss.item() == pytest.approx(0.5 * ((0 - 1) ** 2 + (3 - 4) ** 2) / 2 + 2 * cross_entropy.item())
    method.logits[f"{key}.values"] = torch.zeros(3, 1).half()
    with pytest.raises(InputError, match="had 3 tokens and has 2 now"):
        method.replay_loss(Replayed([0], [4], hidden, labels))


def test_what_der_keeps_of_a_stage_shrinks_as_stages_come() -> None:
    method = Der(DerConfig(buffer=6))
    state: dict[str, torch.Tensor] = {}
    past: dict[int, Any] = {}
    for k in (1, 2, 3):
        own = make_samples(f"task-{k}", 10)
        assert method.data(stage(k), own, past, state) == own
        assert len(method.kept) == (6 if k > 1 else 0)
        recorded: list[Any] = []
        method._recorded = lambda samples, new, to=recorded: (  # type: ignore[method-assign]
            to.extend(new)
            or {f"{one['task']}/{one['id']}.{part}": torch.zeros(1) for one in new for part in ("values", "places")}
        )
        state = method.finish(None, own)  # type: ignore[arg-type]
        assert len(recorded) == 6 // k and len(state) == 2 * 6
        past[k] = own


def test_the_past_is_what_earlier_stages_trained_and_this_one_does_not(tmp_path: Path) -> None:
    """Each sample under the stage that trained it last, where a task comes again."""
    path = make_run(tmp_path, {name: make_samples(name, 3) for name in "abc"}, "")
    recipe = load_recipe(path, ["stream=[a, b, a, c]"])

    def past(k: int) -> dict[int, set[str]]:
        one = recipe.stages[k - 1]
        found = past_of(
            recipe.stages,
            one.k,
            trained_by(recipe, one, tmp_path),
            lambda earlier: trained_by(recipe, earlier, tmp_path),
        )
        assert all(
            Path(image).is_absolute() for samples in found.values() for each in samples for image in each["images"]
        )
        return {stage: {sample["task"] for sample in samples} for stage, samples in found.items()}

    assert [past(k) for k in (1, 2, 3, 4)] == [{}, {1: {"a"}}, {2: {"b"}}, {2: {"b"}, 3: {"a"}}]
