"""`start_from`: a stream that is cut in two trains as one, wherever its first half lies; and merging a policy."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import hub as loopback
import pytest
import torch
from families import save_qwen3_vl_moe
from hub import READ
from publishing import finish, mcit, run, write_recipe_file
from random_model import RANDOM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import read_json, write_json
from mcit.eval.extension import save_extension
from mcit.eval.hashing import hash_model
from mcit.eval.lora import hash_adapter, load_adapter
from mcit.eval.results import read_results
from mcit.eval.serving import read_serving
from mcit.pipeline.policy.adapters import save_adapter, scaled
from mcit.pipeline.policy.export import export
from mcit.pipeline.publishing.config import PublishConfig
from mcit.pipeline.publishing.files import gather, write_trees
from mcit.pipeline.recipe.loading import load_recipe
from mcit.pipeline.run.start import check_start, find_start, pin_start, place_start, stages_behind
from mcit.pipeline.run.step import Launch
from mcit.pipeline.run.steps import Run

__all__ = ["run"]  # a fixture

TAG = "stage-01-first"


@pytest.fixture(scope="module")
def published(run, tmp_path_factory) -> Path:
    """The folder that a dry run writes: a folder for each tag."""
    folder = tmp_path_factory.mktemp("dry") / "tree"
    write_trees(gather(load_recipe(run, check_methods=False), run, PublishConfig(repo_id="acme/two")), folder)
    return folder


def second_half(run: Path, folder: Path, place: str | Path) -> Path:
    """A recipe whose only stage is the second of the run's two."""
    for file in run.parent.glob("clinic-second*"):
        shutil.copy(file, folder)
    base = Path(read_serving(run / "stages" / "00-base").base)
    return write_recipe_file(folder, "half.yaml", ["second"], f"start_from: {place}\n", base)


def test_a_stream_that_is_cut_in_two_trains_as_one(run, published, tmp_path):
    half = finish(second_half(run, tmp_path, published / TAG), tmp_path / "run")
    whole, part = run / "stages" / "02-second", half / "stages" / "01-second"
    assert hash_adapter(part / "adapter") == hash_adapter(whole / "adapter")  # to the last bit
    assert hash_adapter(part / "delta") == hash_adapter(whole / "delta")
    state, other = (load_file(folder / "method" / "reglora.safetensors") for folder in (whole, part))
    assert state.keys() == other.keys() and all(torch.equal(state[key], other[key]) for key in state)
    results = read_results(half)
    assert [stage["name"] for stage in results["stages"]] == ["start", "second"]
    assert results["matrix"][0] == [read_results(run)["matrix"][1][1]]  # row 0 is what the stream began with
    assert stages_behind(half / "stages" / "00-base") == 1
    # Once it is taken up, where it came from may go, and a second start is nobody's business.
    shutil.rmtree(published / TAG)
    recipe = load_recipe(half)
    assert all(step.done() for step in Run(recipe, half, Launch.named("single")).steps())


def test_a_published_stage_is_fetched_at_its_commit(run, tmp_path):
    with loopback.serve() as hub:
        code, said = mcit(hub, tmp_path / "one", "publish", run, "--repo-id", "acme/two")
        assert code == 0, said
        (tmp_path / "work").mkdir()
        recipe = second_half(run, tmp_path / "work", f"hub:acme/two@{TAG}")
        arguments = ("prepare", recipe, "--run-dir", tmp_path / "half")
        code, said = mcit(hub, tmp_path / "other", *arguments, token=READ)
        assert code == 0, said
        base = tmp_path / "half" / "stages" / "00-base"
        serving = read_serving(base)
        wanted = read_serving(run / "stages" / "01-first")
        assert (serving.kind, serving.hash, serving.name, serving.stage) == ("adapter", wanted.hash, "start", 0)
        assert hash_adapter(base / "adapter") == wanted.hash
        state = Path("method") / "reglora.safetensors"
        assert (base / state).read_bytes() == (run / "stages" / "01-first" / state).read_bytes()
        commit = hub.model("acme/two").tags[TAG]
        assert load_recipe(tmp_path / "half").start_from == f"hub:acme/two@{commit}"
        unknown = second_half(run, tmp_path / "work", "hub:acme/nothing")
        code, said = mcit(hub, tmp_path / "other", "prepare", unknown, "--run-dir", tmp_path / "no", token=READ)
        assert code == 2 and "hub:acme/nothing: start_from: could not be had from the Hub" in said


def test_what_there_is_to_start_from(run, tmp_path):
    stages = run / "stages"
    last, first = find_start(str(run)), find_start(str(stages / "01-first"))
    assert (last.stages, first.stages) == (2, 1)
    assert last.hash == read_serving(stages / "02-second").hash and [file.name for file in last.state]
    assert pin_start(str(run), None) == str(run)
    pinned = "hub:acme/two@" + "a" * 40
    assert pin_start("hub:acme/two", pinned) == pinned and pin_start(pinned, None) == pinned  # nobody is asked
    for place, line in (
        (tmp_path / "nowhere", "start_from: no such folder"),
        (tmp_path, "is neither a run nor a stage of one. Name a run"),
        (stages / "00-base", "is the untouched base. Leave start_from out"),
    ):
        with pytest.raises(InputError, match=line):
            find_start(str(place))


def copied(run: Path, folder: Path) -> Path:
    shutil.copytree(run / "stages" / "01-first", folder)
    return folder


def test_a_start_that_does_not_fit_is_one_line(run, tmp_path):
    base = read_serving(run / "stages" / "00-base")
    start = find_start(str(copied(run, tmp_path / "01-first")))
    with pytest.raises(InputError, match=r"start_from: was trained on another base model: .* Set base_model to"):
        place_start(start, base.model_copy(update={"base_hash": "other"}), tmp_path / "a")
    weights = tmp_path / "01-first" / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name] + 1}, weights)
    with pytest.raises(InputError, match=r"01-first: start_from: holds another policy than it says"):
        place_start(start, base, tmp_path / "b")
    write_json(weights.parent / "adapter_config.json", {"peft_type": "LORA", "use_dora": True})
    with pytest.raises(InputError, match=r"is not a plain LoRA adapter"):
        place_start(start, base, tmp_path / "c")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"state": ["../../secret.safetensors"]}, "mcit.json: state: is no state of a method"),
        ({"state": ["method/state.pt"]}, "mcit.json: state: is no state of a method"),
        ({"state": ["method/other.safetensors"]}, "other.safetensors: start_from: is missing"),
        ({"schema_version": 2}, "mcit.json: schema_version: "),
        ({"kind": "pickle"}, "mcit.json: kind: "),
    ],
)
def test_a_manifest_that_asks_for_anything_else_is_refused(run, tmp_path, change, line):
    tree = gather(load_recipe(run, check_methods=False), run, PublishConfig(repo_id="acme/two")).revisions[0].tree
    for path, content in tree.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(content.read_bytes() if isinstance(content, Path) else content)
    assert find_start(str(tmp_path)).stages == 1
    write_json(tmp_path / "mcit.json", read_json(tmp_path / "mcit.json") | change)
    with pytest.raises(InputError, match=line):
        find_start(str(tmp_path))


def carrying(run: Path, folder: Path, kind: str) -> Path:
    """A copy of a run whose second stage is a merge in the policy's place, or modules of a method's own."""
    for name in ("stages", "report"):
        shutil.copytree(run / name, folder / name)
    stage, results = folder / "stages" / "02-second", read_json(run / "results.json")
    serving = read_json(stage / "serving.json")
    if kind == "carried":
        (stage / "adapter").rename(stage / "carried")
        save_adapter(stage / "adapter", scaled(load_adapter(stage / "carried"), 0.5), serving["base"])
        serving |= {"carried": "carried", "hash": hash_adapter(stage / "adapter")}
    else:
        tensors = {"layer.a": torch.ones(2, 3), "layer.b": torch.ones(3, 2), "layer.router": torch.ones(2, 3)}
        save_extension(stage / "extended", {"kind": "mixture", "scaling": 2.0}, tensors)
        save_file(tensors, stage / "method" / "moelora.safetensors")
        shutil.rmtree(stage / "adapter")
        digest = hash_model(str(stage / "extended"))
        serving |= {"kind": "extended", "path": "extended", "rank": None, "hash": digest}
    write_json(stage / "serving.json", serving)
    results["hashes"]["policies"][2] = serving["hash"]
    write_json(folder / "results.json", results)
    return folder


@pytest.mark.parametrize("kind", ["carried", "extended"])
def test_what_no_plain_lora_is_is_published_and_gone_on_from(run, tmp_path, kind):
    """From the run's folder and from what was published: the same policy, and what its method goes on from."""
    copy, recipe = carrying(run, tmp_path / "run", kind), load_recipe(run, check_methods=False)
    write_trees(gather(recipe, copy, PublishConfig(repo_id="acme/two")), tmp_path / "dry")
    tree, wanted = tmp_path / "dry" / "stage-02-second", read_serving(copy / "stages" / "02-second")
    card = (tree / "README.md").read_text()
    other = tmp_path / "dry" / TAG / "mcit.json"
    assert "carried" not in read_json(other)  # what was published before is the same file as ever
    if kind == "carried":
        assert "the LoRA in `carried/` of stage-02-second" in card and "is_trainable" not in card
    else:
        assert "modules of mcit's own on the base" in card and "extend(model, " in card and "library_name" not in card
        assert not (tree / "adapter_model.safetensors").exists()
    base = read_serving(run / "stages" / "00-base")
    for number, place in enumerate((copy / "stages" / "02-second", tree)):
        start, folder = find_start(str(place)), tmp_path / f"base{number}"
        placed = place_start(start, base, folder)
        assert (placed.kind, placed.path, placed.hash) == (wanted.kind, wanted.path, wanted.hash)
        assert placed.carried == wanted.carried and start.stages == 2
        if kind == "carried":
            assert hash_adapter(folder / "carried") == hash_adapter(copy / "stages" / "02-second" / "carried")
            assert start.entering_rank == 4
            check_start(start, "stack", None)
            with pytest.raises(InputError, match=r"has no state of moelora, which goes on from nothing else"):
                check_start(start, "continue", "moelora")
        else:
            check_start(start, "continue", "moelora")
            with pytest.raises(
                InputError, match=r"modules of a method's own on the base, and the first stage trains a"
            ):
                check_start(start, "stack", None)
    touched = tree / ("carried/adapter_model" if kind == "carried" else "extended/model")
    tensors = load_file(f"{touched}.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, f"{touched}.safetensors")
    with pytest.raises(InputError, match="holds another policy than it says"):
        place_start(find_start(str(tree)), base, tmp_path / "touched")


def test_a_merged_model_is_gone_on_from_by_the_method_that_made_it(run, tmp_path):
    start = replace(find_start(str(copied(run, tmp_path / "01-first"))), kind="merged", state=[])
    check_start(start, "full", None)
    with pytest.raises(
        InputError, match=r"is a merged model, and the first stage trains a LoRA.*or train\.lineage: full"
    ):
        check_start(start, "stack", None)
    with pytest.raises(InputError, match="has no state of moextend"):
        check_start(start, "stack", "moextend")
    check_start(replace(start, state=[tmp_path / "moextend.safetensors"]), "stack", "moextend")


WAYS = {
    "moelora": ["method={moelora: {experts: 2}}", "train.lineage=continue"],
    "magmax": ["method={magmax: {}}", "train.lineage=continue"],
    "ties": ["method={ties: {}}", "train.lineage=stack"],
    "moextend": ["method={moextend: {experts: 1}}", "train.lineage=stack"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WAYS)
def test_a_stream_that_is_cut_in_two_trains_as_one_whatever_holds_its_policy(name, tmp_path, monkeypatch):
    """Published between its halves, and gone on from elsewhere: weights and state to the last bit."""
    monkeypatch.setenv("MCIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # several threads do not always sum in the same order
    base = RANDOM
    if name == "moextend":
        save_qwen3_vl_moe(base := tmp_path / "mixture")
    run = finish(write_recipe_file(tmp_path, "two.yaml", ["first", "second"], base=base), tmp_path / "run", *WAYS[name])
    with loopback.serve() as hub:
        code, said = mcit(hub, tmp_path / "one", "publish", run, "--repo-id", "acme/two")
        assert code == 0, said
        recipe = write_recipe_file(tmp_path, "half.yaml", ["second"], f"start_from: hub:acme/two@{TAG}\n", base)
        half = tmp_path / "half"
        code, said = mcit(hub, tmp_path / "other", "run", recipe, "--run-dir", half, *WAYS[name], token=READ)
        assert code == 0, said
    whole, part = run / "stages" / "02-second", half / "stages" / "01-second"
    one, two = read_serving(whole), read_serving(part)
    assert (one.kind, one.hash, one.carried) == (two.kind, two.hash, two.carried)
    state, other = (load_file(folder / "method" / f"{name}.safetensors") for folder in (whole, part))
    assert state.keys() == other.keys() and all(torch.equal(state[key], other[key]) for key in state)
    if one.carried:
        assert hash_adapter(whole / "carried") == hash_adapter(part / "carried")
    assert read_results(half)["matrix"][0] == [read_results(run)["matrix"][1][1]]


def test_a_published_pickle_is_never_read(run, tmp_path):
    """Beside the weights, or in their place."""
    folder = copied(run, tmp_path / "01-first")
    for place in ("adapter/adapter_model.bin", "method/evil.pt"):
        (folder / place).write_bytes(b"\x80\x04\x95pickle")
    start = find_start(str(folder))
    assert {file.suffix for file in (*start.policy, *start.state)} == {".json", ".safetensors"}
    (folder / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"adapter_model\.safetensors: no such file"):
        place_start(find_start(str(folder)), read_serving(run / "stages" / "00-base"), tmp_path / "base")


# --- One model --------------------------------------------------------------------------------------------------------


def test_a_stage_is_exported_as_one_model(run, tmp_path):
    recipe = load_recipe(run, check_methods=False)
    exported = export(recipe, run, None, tmp_path / "merged")
    assert (exported["stage"], exported["name"], exported["probes"]) == (2, "second", 4)
    assert exported["gap_max"] is not None and 0 < exported["gap_max"] < 1e-4  # float32; the policy moves tenths
    assert exported["hash"] == hash_model(str(tmp_path / "merged"))
    base = load_file(Path(recipe.base_model.path) / "model.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    adapter = load_adapter(run / "stages" / "02-second" / "adapter")
    assert merged.keys() == base.keys()
    moved = {name for name in base if not torch.equal(base[name], merged[name])}
    assert len(moved) == len(adapter)
    for name, factors in adapter.items():
        [key] = [key for key in moved if key.endswith(name.split("language_model.")[-1] + ".weight")]
        wanted = (base[key].double() + factors.scaling * factors.b.double() @ factors.a.double()).float()
        assert torch.allclose(merged[key], wanted, atol=1e-7)
    with pytest.raises(InputError, match=r"exists\. Name a new folder"):
        export(recipe, run, None, tmp_path / "merged")
    with pytest.raises(InputError, match=r"--stage: stage 3 is not done\. Done: 1, 2"):
        export(recipe, run, 3, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged"]


def test_a_merge_is_rounded_once(run, tmp_path):
    """In bfloat16: from the base in float32 terms, not from a base that each increment was rounded into."""
    recipe = load_recipe(run, ["base_model.dtype=bfloat16"], check_methods=False)
    stage = copied(run, tmp_path / "run" / "stages" / "01-first")
    serving = json.loads((stage / "serving.json").read_text())
    write_json(stage / "serving.json", serving | {"dtype": "bfloat16"})
    (tmp_path / "run" / "data").symlink_to(run / "data")
    exported = export(recipe, tmp_path / "run", 1, tmp_path / "merged")
    assert exported["dtype"] == "bfloat16" and exported["gap_mean"] is not None
    base = load_file(Path(recipe.base_model.path) / "model.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    adapter = load_adapter(run / "stages" / "01-first" / "adapter")
    for name, factors in adapter.items():
        [key] = [key for key in base if key.endswith(name.split("language_model.")[-1] + ".weight")]
        once = (base[key].bfloat16().float() + factors.delta()).bfloat16()
        assert torch.equal(merged[key], once)


def test_a_merged_policy_is_published_as_a_model_and_the_card_says_so(run, tmp_path):
    """As MoExtend leaves one: here the second stage, merged, in the place of its adapter."""
    recipe, copy = load_recipe(run, check_methods=False), tmp_path / "run"
    shutil.copytree(run / "stages", copy / "stages")
    shutil.copytree(run / "report", copy / "report")
    stage = copy / "stages" / "02-second"
    exported = export(recipe, run, 2, stage / "merged")
    serving = read_json(stage / "serving.json")
    update = {"kind": "merged", "path": "merged", "rank": None, "hash": exported["hash"]}
    write_json(stage / "serving.json", serving | update)
    results = read_json(run / "results.json")
    results["hashes"]["policies"][2] = exported["hash"]
    write_json(copy / "results.json", results)
    publication = gather(recipe, copy, PublishConfig(repo_id="acme/two"))
    write_trees(publication, tmp_path / "dry")
    first, second = (tmp_path / "dry" / revision.tag for revision in publication.revisions)
    assert (first / "adapter_model.safetensors").exists() and not (second / "adapter_model.safetensors").exists()
    card = (second / "README.md").read_text()
    assert "library_name: transformers" in card and "The stages stage-02-second are" in card
    assert "whole merged models" in card and "PeftModel" not in card
    model = AutoModelForImageTextToText.from_pretrained(second, dtype=torch.float32)
    whole = load_file(stage / "merged" / "model.safetensors")
    state = model.state_dict()
    assert all(any(torch.equal(tensor, other) for other in state.values()) for tensor in list(whole.values())[:5])
    start = find_start(str(second))
    base = read_serving(run / "stages" / "00-base")
    placed = place_start(start, base, tmp_path / "base")
    assert (placed.kind, placed.path, placed.hash) == ("merged", "merged", exported["hash"])
