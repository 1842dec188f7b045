"""GeRe's formulas by hand and by brute force, the file of states, and anchor samples in recipes and runs."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors import safe_open
from torch import Tensor, nn
from training import TINY, make_samples

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import hash_json, write_jsonl
from mcit.data_prep.mini import facts
from mcit.data_prep.prepare import prepare_task, read_samples, read_task
from mcit.data_prep.schema import AnchorConfig, PrepareConfig
from mcit.pipeline.methods.anchor import Anchor, anchor_path, write_anchor
from mcit.pipeline.methods.gere import Gere, GereConfig
from mcit.pipeline.methods.keys import pack, unpack
from mcit.pipeline.methods.outputs import answer_loss, distance_to, divergence
from mcit.pipeline.methods.ternary import Moments, margin_loss, states
from mcit.pipeline.recipe.loading import load_recipe
from mcit.pipeline.recipe.schema import Recipe
from mcit.pipeline.run.runner import perform_steps, start_run
from mcit.pipeline.run.step import Launch
from mcit.pipeline.run.terminal import Terminal
from mcit.pipeline.training.replay import Replayed

THRESHOLDS = torch.tensor([[-1.0, 0.0], [1.0, 2.0]])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_margin_loss_by_hand() -> None:
    """Low must stay low, high high, middle between; the mean is over the four units that have left."""
    kept = states(torch.tensor([[-1.0, 1.0], [0.5, 2.0], [9.0, -9.0]]), THRESHOLDS)
    assert kept.tolist() == [[0, 1], [1, 2], [2, 0]]
    now = torch.tensor([[0.0, 3.0], [-2.0, 1.5], [1.0, 0.0]], requires_grad=True)
    loss = margin_loss(now, kept, THRESHOLDS)
    assert loss.item() == pytest.approx((1 + 1 + 1 + 0.5) / 4)
    loss.backward()
    assert now.grad.tolist() == [[0.25, 0.25], [-0.25, -0.25], [0, 0]]


def test_margin_loss_as_the_official_code_writes_it() -> None:
    """By three cases, unit for unit, with the count of what is not zero below."""
    then, now = random(50, 12), random(50, 12, seed=1)
    low, high = Moments.of(then).thresholds(1.0)
    losses = []
    for t in range(50):
        for d in range(12):
            h, was, lo, hi = now[t, d], then[t, d], low[d], high[d]
            if was <= lo:
                losses.append(max(0.0, (h - lo).item()))
            elif was >= hi:
                losses.append(max(0.0, (hi - h).item()))
            else:
                losses.append(max(0.0, (h - hi).item()) + max(0.0, (lo - h).item()))
    found = margin_loss(now, states(then, torch.stack([low, high])), torch.stack([low, high]))
    assert found.item() == pytest.approx(sum(losses) / (sum(loss != 0 for loss in losses) + 1e-8), rel=1e-5)


def test_what_has_not_moved_costs_nothing() -> None:
    hidden = random(40, 8).requires_grad_()
    thresholds = Moments.of(hidden.detach()).thresholds(1.0)
    loss = margin_loss(hidden, states(hidden, thresholds), thresholds)
    loss.backward()
    assert loss.item() == 0 and not hidden.grad.any()


@pytest.mark.parametrize("units", [8, 5])
def test_states_survive_being_packed_into_two_bits(units: int) -> None:
    kept = states(random(30, units), torch.stack([-torch.ones(units), torch.ones(units)]))
    assert set(kept.unique().tolist()) == {0, 1, 2}
    packed = pack(kept, 2)
    assert packed.shape == (30, -(-units // 4)) and torch.equal(unpack(packed, 2, units), kept)


@pytest.mark.parametrize("cuts", [[], [1], [0, 3, 3, 700], list(range(1, 1000))])
def test_thresholds_are_those_of_all_values_at_once_however_they_come(cuts: list[int]) -> None:
    """With a mean so far from zero that mean square minus squared mean has no digit left in float32."""
    values = random(1000, 6) * torch.tensor([1e-3, 0.1, 1, 1, 1, 0]) + torch.tensor([1e3, 1e3, 0, -5, 1e4, 7.0])
    moments = Moments.of(torch.zeros(0, 6))
    for part in values.tensor_split(cuts):
        moments = moments + Moments.unpacked(Moments.of(part).packed())
    wide = values.double().numpy()
    mean, spread = wide.mean(0), wide.std(0)
    assert moments.count == 1000
    np.testing.assert_allclose(moments.mean, mean, rtol=1e-14, atol=1e-14)
    np.testing.assert_allclose((moments.squares / 1000).sqrt(), spread, rtol=1e-10)
    expected = torch.from_numpy(np.stack([mean - 2 * spread, mean + 2 * spread])).float()
    torch.testing.assert_close(moments.thresholds(2.0), expected, rtol=1e-6, atol=1e-6)


def test_answer_loss_is_the_models_own_cross_entropy() -> None:
    head, hidden = nn.Linear(8, 20), random(6, 8).requires_grad_()
    labels = torch.tensor([-100, -100, 3, 4, -100, 5])
    loss = answer_loss(hidden, labels, head)
    expected = F.cross_entropy(head(hidden)[:-1], labels[1:], ignore_index=-100)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden), torch.autograd.grad(expected, hidden))


def test_divergence_by_hand() -> None:
    """Two tokens of two logits; at temperature 2, log 9 and 0 become probabilities 3/4 and 1/4."""
    head = nn.Linear(2, 2, bias=False)
    nn.init.eye_(head.weight)
    now, then = torch.zeros(2, 2, requires_grad=True), torch.tensor([[np.log(9.0), 0.0], [0.0, 0.0]])
    loss = divergence(now, then.float(), head)
    assert loss.item() == pytest.approx((0.75 * np.log(0.75 / 0.5) + 0.25 * np.log(0.25 / 0.5)) / 2)
    loss.backward()
    np.testing.assert_allclose(now.grad, [[(0.5 - 0.75) / 2 / 2, (0.5 - 0.25) / 2 / 2], [0, 0]], atol=1e-7)


@pytest.mark.parametrize(("temperature", "sharp"), [(1.0, 0.9), (2.0, 0.75)])
def test_distance_to_kept_predictions_by_hand(temperature: float, sharp: float) -> None:
    """As LwF has it: log 9 and 0 are 9/10 and 1/10, and 3/4 and 1/4 at temperature 2."""
    head = nn.Linear(2, 2, bias=False)
    nn.init.eye_(head.weight)
    now, then = torch.zeros(2, 2, requires_grad=True), torch.tensor([[np.log(9.0), 0.0], [0.0, 0.0]]).float()
    loss = distance_to(now, F.log_softmax(then / temperature, -1), head, temperature)
    assert loss.item() == pytest.approx((sharp * np.log(sharp / 0.5) + (1 - sharp) * np.log((1 - sharp) / 0.5)) / 2)
    loss.backward()
    slope = (0.5 - sharp) / temperature / 2
    np.testing.assert_allclose(now.grad, [[slope, -slope], [0, 0]], atol=1e-7)


class Alone:
    """An accelerator of one process."""

    num_processes, process_index, is_main_process, device = 1, 0, True, torch.device("cpu")

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor

    def wait_for_everyone(self) -> None:
        pass


UNITS, KINDS, TOKENS = 10, ["text", "images", "text"], [5, 9, 4]


def hidden_states() -> Tensor:
    """Of three samples, padded; those with images have another distribution."""
    return random(3, 9, UNITS) * torch.tensor([1.0, 5.0, 1.0])[:, None, None]


def look() -> Iterator[Replayed]:
    hidden, labels = hidden_states(), torch.full((3, 9), -100)
    for rows in ([2, 0], [1]):
        yield Replayed(rows, [TOKENS[row] for row in rows], hidden[rows], labels[rows])


def write(folder: Path, **provenance: Any) -> Anchor:
    path = anchor_path(folder, provenance)
    write_anchor(path, provenance, look, KINDS, units=UNITS, accelerator=Alone(), work=folder / "work")
    assert not list((folder / "work").iterdir())
    return Anchor(path, provenance)


def test_the_file_holds_the_states_of_each_kinds_own_thresholds(tmp_path: Path) -> None:
    anchor, hidden = write(tmp_path, policy="p", sigmas=1.0), hidden_states()
    samples = [hidden[i, :tokens] for i, tokens in enumerate(TOKENS)]
    expected = {
        "text": Moments.of(torch.cat([samples[0], samples[2]])).thresholds(1.0),
        "images": Moments.of(samples[1]).thresholds(1.0),
    }
    assert anchor.thresholds.keys() == expected.keys()
    for kind, thresholds in expected.items():
        torch.testing.assert_close(anchor.thresholds[kind], thresholds)
    for sample, (one, kind) in enumerate(zip(samples, KINDS, strict=True)):
        kept = unpack(anchor.of(sample, len(one)), 2, UNITS)
        assert torch.equal(kept, states(one, anchor.thresholds[kind]))
        assert margin_loss(one, kept, anchor.thresholds[kind]) == 0


def test_without_thresholds_the_file_holds_hidden_states_whole(tmp_path: Path) -> None:
    anchor, hidden = write(tmp_path, policy="p"), hidden_states()
    assert not anchor.thresholds
    assert all(torch.equal(anchor.of(i, tokens), hidden[i, :tokens]) for i, tokens in enumerate(TOKENS))


def test_a_file_says_whose_states_it_has(tmp_path: Path) -> None:
    anchor = write(tmp_path, policy="p", sigmas=1.0)
    with safe_open(anchor.path, framework="pt") as file:
        assert json.loads(file.metadata()["provenance"]) == {"policy": "p", "sigmas": 1.0}
    assert anchor.path.name == f"{hash_json({'policy': 'p', 'sigmas': 1.0})[:32]}.safetensors"
    assert anchor_path(tmp_path, {"policy": "q", "sigmas": 1.0}) != anchor.path
    with pytest.raises(InputError, match="a sample had 9 tokens when its states were kept, and has 8 now"):
        anchor.of(1, 8)
    with pytest.raises(InputError, match=r"is no file of states .*provenance.*Delete it"):
        Anchor(anchor.path, {"policy": "q"})
    anchor.path.write_bytes(anchor.path.read_bytes()[:100])
    with pytest.raises(InputError, match="is no file of states"):
        Anchor(anchor.path, {"policy": "p", "sigmas": 1.0})


def made(tmp_path: Path, **settings: Any) -> Gere:
    method = Gere(GereConfig(**settings))
    method.kinds, method.head = KINDS, nn.Linear(UNITS, 20)
    method.anchor = write(tmp_path, **({"sigmas": 1.0} if method.config.match == "tm" else {}))
    return method


def moved() -> tuple[Tensor, Tensor]:
    labels = torch.full((3, 9), -100)
    labels[:, 2:4] = 7
    return hidden_states() + random(3, 9, UNITS, seed=5), labels


DISTANCES: dict[str, Callable[[Tensor, Tensor], float]] = {
    "l1": lambda now, then: (now - then).abs().mean().item(),
    "l2": lambda now, then: (now - then).square().mean().item(),
}


@pytest.mark.parametrize("match", ["tm", "kl", "l1", "l2"])
@pytest.mark.parametrize("weight", [1, 100, "dynamic", 0])
def test_a_samples_loss_is_labels_plus_weighted_distance(tmp_path: Path, match: str, weight: Any) -> None:
    """And does not depend on what is in the batch beside it."""
    method = made(tmp_path, match=match, weight=weight, label_weight=0.5, weight_limit=3)
    hidden, labels = moved()
    together = method.replay_loss(Replayed([0, 1, 2], TOKENS, hidden, labels))
    for sample, tokens in enumerate(TOKENS):
        one, mine = hidden[sample, :tokens], labels[sample, :tokens]
        answers = answer_loss(one, mine, method.head).item()
        distance = method._distance(sample, one).item()
        if match in DISTANCES:
            assert distance == pytest.approx(DISTANCES[match](one, hidden_states()[sample, :tokens]), rel=1e-5)
        share = min(answers / distance, 3) if weight == "dynamic" else weight
        assert together[sample].item() == pytest.approx(0.5 * answers + share * distance, rel=1e-5)
        alone = method.replay_loss(Replayed([sample], [tokens], one[None], mine[None]))
        torch.testing.assert_close(alone[0], together[sample])


def test_a_dynamic_weight_stays_finite_where_nothing_has_moved(tmp_path: Path) -> None:
    method = made(tmp_path, weight="dynamic", label_weight=0)
    hidden, labels = hidden_states().requires_grad_(), moved()[1]
    loss = method.replay_loss(Replayed([0, 1, 2], TOKENS, hidden, labels)).sum()
    loss.backward()
    assert loss == 0 and not hidden.grad.any()


def test_the_anchors_chosen_depend_on_nothing_but_the_anchors() -> None:
    method, samples = Gere(GereConfig(samples=4)), make_samples("general", 9)
    chosen = method.replay(samples)
    assert chosen.per_batch == 4 and len(chosen.samples) == 4
    assert method.replay(samples[::-1]) == chosen
    assert {s["id"] for s in Gere(GereConfig(samples=5)).replay(samples).samples} > {s["id"] for s in chosen.samples}
    assert Gere(GereConfig(per_batch=0)).replay(samples) is None
    assert Gere(GereConfig(weight=0, label_weight=0)).replay(samples) is None


def load(tmp_path: Path, text: str, *overrides: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"name: x\nbase_model: {{path: {tmp_path}}}\nstream: [{{name: a, train: a.json}}]\n{text}")
    return load_recipe(path, overrides)


def test_anchors_in_a_recipe(tmp_path: Path) -> None:
    anchors = "anchors: [{name: general, train: g.jsonl, images: pictures}]\n"
    recipe = load(tmp_path, anchors + "method: {gere: {}}")
    [anchor] = recipe.anchors
    assert (anchor.train, anchor.images, anchor.test) == (str(tmp_path / "g.jsonl"), str(tmp_path / "pictures"), 0)
    assert [task.name for task in recipe.sources] == ["a", "general"] and [t.name for t in recipe.tasks] == ["a"]
    assert load(tmp_path, anchors).anchors == [] == load(tmp_path, anchors + "method: {reglora: {}}").anchors
    assert [a.name for a in load_recipe("mini/gere").anchors] == ["general"]
    assert load_recipe("mini/sequential", with_methods=["gere"]).method["gere"] == GereConfig().model_dump()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: {gere: {}}", "anchors: a method keeps general data, and the recipe names none. List data sets"),
        ("anchors: [{name: a, train: g.json}]\nmethod: {gere: {}}", "anchors.a: the name a is taken"),
        ("anchors: [{name: g, train: g.json, test: t.json}]", "anchors.g.test: Input should be 0"),
        ("anchors: [{name: g}]", "anchors.g.train: is missing"),
        ("anchors: [{name: g, train: g.json}]\nmethod: {gere: {weight: often}}",
         "method.gere.weight: is neither a number from 0 on nor `dynamic`"),
        ("anchors: [{name: g, train: g.json}]\nmethod: {gere: {weight: -1}}", "is neither a number from 0 on"),
    ],
)  # fmt: skip
def test_mistakes_are_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_anchors_are_prepared_whole(tmp_path: Path) -> None:
    """Not a sample is held out, and those of the mini stream are in many styles, with pictures and without."""
    config = AnchorConfig(name="general", train="mcit.data_prep.mini.facts:anchors")
    folder = prepare_task(config, PrepareConfig(), seed=0, asd=None, base_dir=tmp_path, cache=tmp_path / "cache")
    task, samples = read_task(folder), read_samples(folder, "train")
    assert task["counts"] == {"train": facts.ANCHORS, "validation": 0, "test": 0} and task["train_hash"]
    assert sum(bool(sample["images"]) for sample in samples) == pytest.approx(facts.ANCHORS * 16 / 24, abs=8)
    assert {sample["style"] for sample in samples} == {"short", "mcq", "yes_no", "brief", "bbox", "number", "latex"}
    assert {sample["reasoning"] for sample in samples} == {"none", "think"}
    assert len({sample["meta"]["fact"] for sample in samples}) == 14


def test_a_run_prepares_anchors_beside_its_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ASD; a stage depends on them, and on nothing of the kind where no method sees them."""
    monkeypatch.setenv("MCIT_CACHE", str(tmp_path / "cache"))
    rows = [{"id": str(i), "prompt": f"Say {i}.", "completion": str(i), "style": "number"} for i in range(40)]
    write_jsonl(tmp_path / "numbers.jsonl", rows)
    (tmp_path / "x.yaml").write_text(
        f"name: x\nbase_model: {{path: {TINY}, dtype: float32}}\nstream: [{{name: numbers, train: numbers.jsonl}}]\n"
        "anchors: [{name: general, train: 'mcit.data_prep.mini.facts:anchors'}]\nmethod: {asd: {}, gere: {}}\n"
    )
    terminal = Terminal(Console(file=io.StringIO()))
    for folder, overrides in (("with", []), ("without", ["method={}"])):
        run = start_run(
            load_recipe(tmp_path / "x.yaml", overrides), tmp_path / folder, Launch.named("single"), terminal
        )
        perform_steps(run, run.preparation(), terminal)
        inputs = run.train(run.recipe.stages[0]).inputs()
        if overrides:
            assert "anchors" not in inputs and not (run.dir / "data" / "general").exists()
        else:
            assert inputs["anchors"] == {"general": read_task(run.dir / "data" / "general")["train_hash"]}
            assert (run.dir / "data" / "numbers" / "asd_report.json").exists()
            assert not (run.dir / "data" / "general" / "asd_report.json").exists()
