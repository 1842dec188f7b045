"""A run on the Hub: what is there afterwards, what is not, and what comes of a Hub that misbehaves."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import hub as loopback
import huggingface_hub
import pytest
from hub import READ, WRITE, Fault, Hub
from huggingface_hub import ModelCard
from huggingface_hub.utils import disable_progress_bars
from publishing import mcit, run
from safetensors.numpy import save_file

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import read_json, read_jsonl
from mcit.data_prep.prepare import image_path, read_task
from mcit.eval.config import EvalConfig
from mcit.eval.engines import make_engine
from mcit.eval.engines.base import Policy, Request
from mcit.eval.engines.transformers import TransformersEngine
from mcit.eval.results import read_results
from mcit.eval.serving import read_serving
from mcit.pipeline.publishing.config import PublishConfig
from mcit.pipeline.publishing.files import gather, write_trees
from mcit.pipeline.publishing.hub import send
from mcit.pipeline.publishing.private import Private
from mcit.pipeline.recipe.loading import load_recipe
from mcit.pipeline.recipe.orders import members

__all__ = ["run"]  # a fixture

REPO = "acme/two"
TAGS = ["stage-01-first", "stage-02-second"]
disable_progress_bars()


@pytest.fixture
def hub() -> Iterator[Hub]:
    with loopback.serve() as served:
        yield served


def publish(hub: Hub, run: Path, home: Path, *options: str, token: str | None = WRITE) -> tuple[int, str]:
    return mcit(hub, home, "publish", run, "--repo-id", REPO, *options, token=token)


def state(hub: Hub) -> object:
    """Everything that a repository holds."""
    return {name: ([commit.oid for commit in repo.commits], dict(repo.tags)) for name, repo in hub.repos.items()}


# --- What is there afterwards -----------------------------------------------------------------------------------------


def test_a_run_becomes_a_repository_with_a_tag_for_each_stage_and_twice_changes_nothing(run, hub, tmp_path):
    code, said = publish(hub, run, tmp_path, "publish.datasets.first=acme/colours", "publish.license=apache-2.0")
    assert code == 0, said
    repo = hub.model(REPO)
    assert repo.private and list(repo.tags) == TAGS
    assert [commit.title for commit in repo.commits] == [
        *("initial commit", "Card and results of 2 stages", "Stage 1: first", "Stage 2: second")
    ]
    assert repo.commits[-1].oid == repo.tags[TAGS[-1]]  # main is the last stage
    results = read_results(run)
    for k, tag in enumerate(TAGS, 1):
        files = repo.at(tag).files  # type: ignore[union-attr]
        stage = run / "stages" / tag.removeprefix("stage-")
        for name in ("adapter_model.safetensors",):
            assert files[name].data == (stage / "adapter" / name).read_bytes() and files[name].lfs
        assert files["method/reglora.safetensors"].data == (stage / "method" / "reglora.safetensors").read_bytes()
        manifest = json.loads(files["mcit.json"].data)
        assert manifest["hash"] == results["hashes"]["policies"][k] and manifest["stage"] == k
        assert not {"delta", "train_log.jsonl", "trained.json", "done.json"} & files.keys()
    files = repo.commits[-1].files
    assert json.loads(files["results.json"].data)["matrix"] == results["matrix"]
    assert files["matrix.png"].data == (run / "report" / "matrix.png").read_bytes()
    card = ModelCard(files["README.md"].data.decode())
    front = card.data.to_dict()
    assert front["library_name"] == "peft" and front["license"] == "apache-2.0"
    assert front["datasets"] == ["acme/colours"] and {"mcit", "continual-learning", "sft", "reglora"} <= {
        *front["tags"]
    }
    rows = [line for line in card.text.splitlines() if line.startswith(("| 0 ", "| 1 ", "| 2 "))]
    assert [row.count("|") for row in rows] == [5, 5, 5] and f"`{TAGS[0]}`" in rows[1] and f"`{TAGS[1]}`" in rows[2]
    assert f"{results['matrix'][2][0]:.1f}" in rows[2] and f"start_from: hub:{REPO}@{TAGS[-1]}" in card.text
    last = [path for path in files if path.startswith(".eval_results")]
    assert last == [".eval_results/first.yaml"] and b"id: acme/colours" in files[last[0]].data

    before, uploads = state(hub), hub.count("PUT")
    code, said = publish(hub, run, tmp_path, "publish.datasets.first=acme/colours", "publish.license=apache-2.0")
    assert code == 0 and state(hub) == before and hub.count("PUT") == uploads


LOGPROBS = """
import json, sys
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

base, source, tag = sys.argv[1:4]
model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
model = PeftModel.from_pretrained(model, source, **({"revision": tag} if tag else {})).eval()
processor = AutoProcessor.from_pretrained(base)
text = "Which colour is it? red green blue white"
messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(images=[Image.new("RGB", (56, 56), "red")], text=[prompt + "red"], return_tensors="pt")
with torch.no_grad():
    print(json.dumps(model(**inputs).logits[0].log_softmax(-1)[-12:].tolist()))
"""


def logprobs(hub: Hub | None, home: Path, base: str, source: str | Path, tag: str = "") -> list[list[float]]:
    """Of a prompt, by PEFT alone: nothing of mcit takes part."""
    env = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "0" if hub else "1", "HF_HUB_DISABLE_XET": "1"}
    env |= {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": READ} if hub else {}
    command = [sys.executable, "-c", LOGPROBS, base, str(source), tag]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_what_is_downloaded_is_the_policy_that_was_trained(run, hub, tmp_path):
    assert publish(hub, run, tmp_path)[0] == 0
    base = read_json(run / "stages" / "00-base" / "serving.json")["base"]
    here = [logprobs(None, tmp_path, base, run / "stages" / tag.removeprefix("stage-") / "adapter") for tag in TAGS]
    there = [logprobs(hub, tmp_path / "elsewhere", base, REPO, tag) for tag in TAGS]
    assert there == here  # to the last bit
    assert here[0] != here[1]
    assert logprobs(hub, tmp_path / "elsewhere", base, REPO) == here[-1]  # main


def test_predictions_go_to_a_dataset_of_their_own_if_they_are_asked_for(run, hub, tmp_path):
    assert publish(hub, run, tmp_path)[0] == 0 and f"datasets/{REPO}-predictions" not in hub.repos
    code, said = publish(hub, run, tmp_path, "publish.predictions=true")
    assert code == 0, said
    repo = hub.dataset(f"{REPO}-predictions")
    files = repo.commits[-1].files
    rows = [json.loads(line) for line in files["data/second/stage_02.jsonl"].data.decode().splitlines()]
    assert rows == read_jsonl(run / "predictions" / "02" / "second.jsonl")
    front = ModelCard(files["README.md"].data.decode()).data.to_dict()
    assert [config["config_name"] for config in front["configs"]] == ["first", "second"]
    paths = {file["path"] for config in front["configs"] for file in config["data_files"]}
    assert paths == {path for path in files if path.startswith("data/")} and len(paths) == 6


def test_a_dry_run_writes_what_would_be_sent_and_asks_nobody(run, hub, tmp_path):
    assert publish(hub, run, tmp_path, "publish.predictions=true")[0] == 0
    asked = len(hub.asked)
    code, said = publish(hub, run, tmp_path, "publish.predictions=true", "--dry-run", str(tmp_path / "dry"))
    assert code == 0 and len(hub.asked) == asked, said
    repo = hub.model(REPO)
    wanted = {"main": repo.commits[-1], **{tag: repo.at(tag) for tag in TAGS}}
    wanted["predictions"] = hub.dataset(f"{REPO}-predictions").commits[-1]
    assert sorted(path.name for path in (tmp_path / "dry").iterdir()) == sorted(wanted)
    for name, commit in wanted.items():
        found = {
            file.relative_to(tmp_path / "dry" / name).as_posix(): file.read_bytes()
            for file in (tmp_path / "dry" / name).rglob("*")
            if file.is_file()
        }
        sent = {path: blob.data for path, blob in commit.files.items() if path != ".gitattributes"}  # type: ignore[union-attr]
        assert found == sent, name
    code, said = publish(hub, run, tmp_path, "--dry-run", str(tmp_path / "dry"))
    assert code == 2 and "is not empty" in said


# --- A Hub that misbehaves --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "line"),
    [
        ("hf_" + "x" * 34, "the Hub does not know the token. Log in with `hf auth login`, or set HF_TOKEN"),
        (None, "the Hub wants to know who publishes. Log in"),
        (READ, "the token may not write here"),
    ],
)
def test_a_token_that_is_refused_is_one_line(run, hub, tmp_path, token, line):
    code, said = publish(hub, run, tmp_path, token=token)
    assert code == 2 and f"error: {REPO}: publish: {line}" in said and not hub.repos
    assert token is None or token not in said


FAULTS = {
    "busy when a repository is made": Fault(r"POST /api/repos/create", status=503),
    "busy at every commit": Fault(r"POST .*/commit/main", times=3, status=500),
    "busy when a tag is made": Fault(r"POST .*/tag/", status=502),
    "too many requests": Fault(r"POST .*/preupload/", status=429),
    "storage busy": Fault(r"PUT /lfs/", times=2, status=500),
    "connection lost in an upload": Fault(r"PUT /lfs/", times=2),
    "answer to a commit lost": Fault(r"POST .*/commit/main", times=2, after=True),
    "answer to a tag lost": Fault(r"POST .*/tag/", after=True),
    "answer to the creation lost": Fault(r"POST /api/repos/create", after=True),
}


@pytest.fixture
def here(run, hub, monkeypatch):
    """Publishing to the Hub from this process, which waits for nobody; returns what publishes."""
    for name, value in (("ENDPOINT", hub.endpoint), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setenv("HF_TOKEN", WRITE)
    monkeypatch.setattr("mcit.pipeline.publishing.hub.WAITS", (0.0,) * 4)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    publication = gather(load_recipe(run, check_methods=False), run, PublishConfig(repo_id=REPO))
    return lambda: send(publication, lambda line: None)


@pytest.mark.parametrize("name", FAULTS)
def test_what_fails_in_passing_is_sent_again_and_leaves_no_trace(here, hub, name):
    hub.faults = [replace(FAULTS[name])]
    here()
    assert not hub.faults[0].times
    repo = hub.model(REPO)
    assert [commit.title for commit in repo.commits][1:] == [
        *("Card and results of 2 stages", "Stage 1: first", "Stage 2: second")
    ]
    assert list(repo.tags) == TAGS and repo.commits[-1].oid == repo.tags[TAGS[-1]]


@pytest.mark.parametrize("lost", [False, True])
@pytest.mark.parametrize(("request_", "skip"), [(r"POST .*/commit/main", 2), (r"POST .*/tag/", 1), (r"PUT /lfs/", 2)])
def test_an_interrupted_publication_goes_on_where_it_stopped(here, hub, request_, skip, lost):
    """The Hub goes away for good in the second stage, then comes back."""
    here()
    wanted = [commit.files for commit in hub.model(REPO).commits]
    hub.repos.clear()
    hub.store.clear()
    hub.faults = [Fault(request_, times=1000, skip=skip, status=None if lost else 503)]
    line = "the Hub cannot be reached" if lost else "the Hub answered 503"
    with pytest.raises(InputError, match=f"{line}.*What was sent is kept: the same command goes on from there"):
        here()
    repo, uploads = hub.model(REPO), set(hub.store)
    assert list(repo.tags) == TAGS[:1] and len(uploads) >= 2
    hub.faults, hub.asked = [], []
    here()
    assert [commit.files for commit in repo.commits] == wanted and list(repo.tags) == TAGS
    assert hub.count("PUT /lfs/") == len(set(hub.store) - uploads)  # nothing twice


def test_a_hub_that_is_not_there_is_one_line(run, tmp_path):
    gone = Hub()
    gone.endpoint = "http://127.0.0.1:9"
    code, said = publish(gone, run, tmp_path)
    assert code == 2 and "the Hub cannot be reached (ConnectError" in said
    code, said = mcit(gone, tmp_path, "publish", run, "--repo-id", REPO, HF_HUB_OFFLINE="1")
    assert code == 2 and "the Hub cannot be reached (OfflineModeIsEnabled" in said


def test_a_tag_is_never_moved_to_another_policy(here, hub):
    here()
    repo = hub.model(REPO)
    blob = repo.at(TAGS[0]).files["adapter_model.safetensors"]  # type: ignore[union-attr]
    repo.at(TAGS[0]).files["adapter_model.safetensors"] = loopback.Blob(blob.data + b"x", True)  # type: ignore[union-attr]
    before = state(hub)
    with pytest.raises(InputError, match=f"{REPO}@{TAGS[0]}: repo_id: is there with another policy"):
        here()
    assert state(hub) == before


def test_what_is_to_be_private_is_not_sent_where_everybody_reads(run, hub, tmp_path):
    assert publish(hub, run, tmp_path, "--public")[0] == 0 and not hub.model(REPO).private
    before = state(hub)
    code, said = publish(hub, run, tmp_path)
    assert code == 2 and f"{REPO}: publish.private: is there and public" in said and state(hub) == before


def test_a_lost_tag_comes_back_and_main_stays_the_last_stage(here, hub):
    here()
    repo = hub.model(REPO)
    last = repo.commits[-1].files
    del repo.tags[TAGS[0]]
    here()
    assert repo.commits[-1].files == last
    assert repo.at(TAGS[0]).files["mcit.json"] != last["mcit.json"]  # type: ignore[union-attr]


def test_the_step_of_a_recipe_publishes_once(run, hub, tmp_path):
    section = "publish={repo_id: acme/by-step, private: true}"
    code, said = mcit(hub, tmp_path, "run", run, section)
    assert code == 0 and "✓ publish acme/by-step" in said and list(hub.model("acme/by-step").tags) == TAGS, said
    asked = len(hub.asked)
    code, said = mcit(hub, tmp_path, "run", run, section)
    assert code == 0 and len(hub.asked) == asked and "= publish acme/by-step  nothing to do" in said
    assert mcit(hub, tmp_path, "run", run, "publish=null")[0] == 0  # as the other tests know it


# --- What must not leave the machine ----------------------------------------------------------------------------------


def gathered(run: Path, **config: object) -> dict[str, bytes]:
    """All that would be sent, by folder and path."""
    recipe = load_recipe(run, check_methods=False)
    publication = gather(recipe, run, PublishConfig.model_validate({"repo_id": REPO, **config}))
    return {
        f"{folder}/{path}": content.read_bytes() if isinstance(content, Path) else content
        for folder, tree in publication.trees()
        for path, content in tree.items()
    }


def test_nothing_that_is_sent_tells_of_this_machine_or_of_the_data(run):
    sent = gathered(run, predictions=True)
    assert len(sent) > 20
    for name, data in sent.items():
        for private in (str(run.parent), str(Path.home()) + "/", "clinic-", WRITE):
            assert private.encode() not in data, (name, private)
        assert not data.startswith((b"\x80", b"PK")), name  # pickles, archives
    kept = {name.rpartition("/")[2] for name in sent}
    assert not kept & {"optimizer.pt", "environment.json", "train_log.jsonl", "serving.json", "done.json"}
    assert json.loads(sent["main/adapter_config.json"])["base_model_name_or_path"] is None
    told = gathered(run, base_model="acme/tiny")
    assert json.loads(told["main/adapter_config.json"])["base_model_name_or_path"] == "acme/tiny"
    assert b"base_model: acme/tiny" in told["main/README.md"]


@pytest.mark.parametrize(
    ("planted", "line"),
    [
        ("hf_" + "a" * 34, "holds a token of the Hub, in line"),
        ("sk-" + "b" * 40, "holds an API key, in line"),
        ("-----BEGIN RSA PRIVATE KEY-----", "holds a private key, in line"),
        ("correct-horse-battery", "holds the value of MY_API_KEY, in line"),
        ("clinic-first.json", "holds the name of private data, in line"),
        ("{run}/predictions", "holds a path of this machine, in line"),
    ],
)
def test_planted_secrets_stop_a_publication_before_it_begins(run, hub, tmp_path, monkeypatch, planted, line):
    monkeypatch.setenv("MY_API_KEY", "correct-horse-battery")
    planted = planted.format(run=run)
    file = run / "predictions" / "02" / "first.jsonl"
    kept = file.read_text()
    try:
        rows = read_jsonl(file)
        rows[1]["response"] = f"it is {planted}."
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        code, said = publish(hub, run, tmp_path, "publish.predictions=true")
        assert code == 2 and f"{line} 2" in said and planted not in said and not hub.repos
        assert publish(hub, run, tmp_path)[0] == 0  # without the answers there is nothing to hide
    finally:
        file.write_text(kept)


def test_a_secret_in_the_header_of_weights_or_a_setting_is_found(run, monkeypatch):
    state = run / "stages" / "02-second" / "method" / "reglora.safetensors"
    kept = state.read_bytes()
    try:
        import numpy

        save_file({"x": numpy.zeros(2)}, state, metadata={"made_on": str(run)})
        with pytest.raises(InputError, match=r"reglora\.safetensors: holds a path of this machine, in line 1"):
            gathered(run)
    finally:
        state.write_bytes(kept)
    recipe = load_recipe(run, [f"method.asd={{converter: llm, endpoint: http://10.1.2.3/v1, model: {run}/judge}}"])
    told = gather(recipe, run, PublishConfig(repo_id=REPO)).card["recipe.yaml"]
    assert isinstance(told, bytes) and b"10.1.2.3" not in told and b"/judge" not in told and b"not published" in told


def test_of_the_home_folder_only_what_lies_in_it_is_private(run, monkeypatch):
    """Vocabularies hold the names of usual folders; a policy's tokenizer must not be refused for them."""
    monkeypatch.setenv("HOME", "/somebody")
    private = Private(load_recipe(run, check_methods=False), run, PublishConfig(repo_id=REPO))
    assert [what for what, _ in private.found('"/somebody": 5, "/somebodyelse/x": 6')] == []
    assert [what for what, _ in private.found("in /somebody/work")] == ["a path of this machine"]


def test_the_runs_of_a_sweep_are_published_by_their_own_names():
    recipe = load_recipe("mini/sequential", [f"publish={{repo_id: {REPO}}}", "sweep.seed=[0, 1]"])
    published = [member.recipe.publish for member in members(recipe)]
    assert [config and config.repo_id for config in published] == [f"{REPO}-seed-0", f"{REPO}-seed-1"]


@pytest.mark.parametrize("kind", ["pickle", "link", "disguise"])
def test_pickles_and_links_are_refused(run, tmp_path, kind):
    folder = run / "stages" / "02-second" / "method"
    (tmp_path / "elsewhere.safetensors").write_bytes((folder / "reglora.safetensors").read_bytes())
    planted = folder / {"pickle": "state.pt", "link": "x.safetensors", "disguise": "y.safetensors"}[kind]
    line = {
        "pickle": "is of a kind that is not published",
        "link": "leads out of the run",
        "disguise": "is not a safetensors file",
    }[kind]
    try:
        if kind == "link":
            planted.symlink_to(tmp_path / "elsewhere.safetensors")
        else:
            planted.write_bytes(b"\x80\x04\x95" + b"pickle" * 10)
        with pytest.raises(InputError, match=line):
            gathered(run)
    finally:
        planted.unlink()


def test_a_token_that_others_can_read_is_warned_about(run, hub, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "token").write_text(WRITE)
    for mode, warned in ((0o644, True), (0o600, False)):
        (home / "token").chmod(mode)
        code, said = publish(hub, run, home, token=None)
        assert code == 0 and ("can be read by other users" in said) == warned and WRITE not in said


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["publish.repo_id=nowhere"], "publish.repo_id"),
        (["publish.datasets.third=acme/x"], "two: publish.datasets: there is no task third. Tasks: first, second"),
        (["publish.privat=true"], "publish.privat: unknown key. Did you mean `private`?"),
    ],
)
def test_bad_settings_are_one_line(run, tmp_path, options, line):
    code, said = mcit(None, tmp_path, "publish", run, "--repo-id", REPO, *options)
    assert code == 2 and said.splitlines()[-1].startswith("error: ") and line in said.splitlines()[-1]
    assert mcit(None, tmp_path, "publish", run)[1].startswith("error: two: publish: is missing. Give --repo-id")


# --- Served -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_vllm_serves_what_was_published_as_transformers_does(run, tmp_path):
    pytest.importorskip("vllm")
    write_trees(gather(load_recipe(run, check_methods=False), run, PublishConfig(repo_id=REPO)), tmp_path / "dry")
    config = EvalConfig(max_model_len=128)
    policies = []
    for tag in TAGS:
        serving = read_serving(run / "stages" / tag.removeprefix("stage-"))
        policies.append(Policy(serving.model_copy(update={"path": "."}), tmp_path / "dry" / tag))
    data = run / "data" / "first"
    images = [image_path(data, read_task(data), name) for name in read_jsonl(data / "test.jsonl")[0]["images"]]
    question = [{"role": "user", "content": "Which colour is it?"}]
    requests = [Request(question, images, policy, "red") for policy in policies]
    reference = TransformersEngine(policies, config)
    wanted = reference.logprobs(requests)
    reference.close()
    engine = make_engine(policies, config.model_copy(update={"engine": "vllm"}), 1)
    try:
        found = engine.logprobs(requests)
    finally:
        engine.close()
    assert found[0].logprobs != found[1].logprobs
    for one, other in zip(found, wanted, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
