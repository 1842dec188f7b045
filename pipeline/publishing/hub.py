"""Sending a publication to the Hub: stage after stage, so that one that was interrupted goes on where it stopped.

Nothing is kept here of what was sent: the repository itself says it. A tag is made after its commit, and a file that is
there already makes no commit, so a second publication changes nothing, and an answer that got lost does no harm.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

import httpx
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoFile, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import disable_progress_bars, sha

from mcit.data_prep.errors import InputError

from .files import Publication, Revision
from .private import Content, Tree

Say = Callable[[str], None]
T = TypeVar("T")
WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before a request that failed in passing is sent again
_REFUSALS = (HfHubHTTPError, httpx.HTTPError, ConnectionError, LocalTokenNotFoundError)
_PASSING = (429, 500, 502, 503, 504)


def send(publication: Publication, say: Say) -> str:
    """Publish; returns the address. What is there already stays as it is. Raises `InputError`."""
    api, repo_id, revisions = HfApi(), publication.repo_id, publication.revisions
    disable_progress_bars()  # `say` says it
    with _explained(repo_id):
        _repository(api, repo_id, "model", publication.private)
        tags = {tag.name for tag in _again(lambda: api.list_repo_refs(repo_id)).tags}
        for revision in revisions:
            if revision.tag in tags and not _holds(api, repo_id, revision):
                raise InputError(
                    "is there with another policy: the stage was trained again since",
                    where=f"{repo_id}@{revision.tag}",
                    field="repo_id",
                    remedy="Publish to another repository, or delete the tag on the Hub",
                )
        _commit(api, repo_id, "model", publication.card, set(), f"Card and results of {len(revisions)} stages")
        everywhere = {path for revision in revisions for path in revision.tree}
        for revision in revisions:
            if revision.tag in tags:
                say(f"{revision.tag} is there")
            else:
                say(f"{revision.tag}: {_megabytes(revision.tree)}")
                commit = _commit_stage(api, repo_id, revision, everywhere)
                _again(partial(api.create_tag, repo_id, tag=revision.tag, revision=commit, exist_ok=True))
        if revisions[-1].tag in tags:  # a tag before it may have been missing: `main` is the last stage
            _commit_stage(api, repo_id, revisions[-1], everywhere)
        if publication.predictions:
            dataset = f"{repo_id}-predictions"
            say(f"{dataset}: {_megabytes(publication.predictions)}")
            _repository(api, dataset, "dataset", publication.private)
            _commit(api, dataset, "dataset", publication.predictions, set(), "Answers")
    return f"{constants.ENDPOINT}/{repo_id}"


def readable_token() -> str | None:
    """A warning if others on this machine can read the token of `hf auth login`."""
    path = Path(constants.HF_TOKEN_PATH)
    if os.name == "posix" and path.is_file() and path.stat().st_mode & 0o077:
        return f"{path} can be read by other users of this machine: chmod 600 {path}"
    return None


def _repository(api: HfApi, repo_id: str, kind: str, private: bool) -> None:
    """Make a repository unless it is there. Raises `InputError` if everybody can read one that is to be private."""
    _again(lambda: api.create_repo(repo_id, repo_type=kind, private=private, exist_ok=True))
    if private and not _again(lambda: api.repo_info(repo_id, repo_type=kind)).private:
        remedy = "Make it private on the Hub, or publish with --public"
        raise InputError("is there and public", where=repo_id, field="publish.private", remedy=remedy)


def _commit(api: HfApi, repo_id: str, kind: str, tree: Tree, managed: set[str], title: str) -> str:
    """Make `main` hold `tree` and nothing else of `managed`; returns the commit, an old one if nothing changed."""

    def attempt() -> str:
        there = {
            file.path
            for file in api.list_repo_tree(repo_id, repo_type=kind, recursive=True)
            if isinstance(file, RepoFile)
        }
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationDelete(path) for path in sorted(managed & there - tree.keys())),
            *(CommitOperationAdd(path, content) for path, content in sorted(tree.items())),
        ]
        return api.create_commit(repo_id, operations, commit_message=title, repo_type=kind).oid

    return _again(attempt)


def _commit_stage(api: HfApi, repo_id: str, revision: Revision, everywhere: set[str]) -> str:
    return _commit(api, repo_id, "model", revision.tree, everywhere, f"Stage {revision.k}: {revision.name}")


def _holds(api: HfApi, repo_id: str, revision: Revision) -> bool:
    """Whether a tag holds the files of a stage as they are here."""
    listed = _again(lambda: list(api.list_repo_tree(repo_id, revision=revision.tag, recursive=True)))
    there = {file.path: file for file in listed if isinstance(file, RepoFile)}
    return all(path in there and _same(there[path], content) for path, content in revision.tree.items())


def _same(there: RepoFile, content: Content) -> bool:
    """Whether a file on the Hub has this content: by SHA-256 where it is large, by git's own hash where not."""
    if there.lfs is not None:
        if isinstance(content, bytes):
            return there.lfs.sha256 == CommitOperationAdd("x", content).upload_info.sha256.hex()
        with open(content, "rb") as file:
            return there.lfs.sha256 == sha.sha_fileobj(file).hex()
    return there.blob_id == sha.git_hash(content if isinstance(content, bytes) else content.read_bytes())


def _megabytes(tree: Tree) -> str:
    sizes = (len(content) if isinstance(content, bytes) else content.stat().st_size for content in tree.values())
    return f"{len(tree)} files, {sum(sizes) / 1e6:.1f} MB"


def _again(action: Callable[[], T]) -> T:
    """Do something on the Hub, again where it failed in passing. Every action here may be done twice."""
    for wait in WAITS:
        try:
            return action()
        except Exception as error:
            if not _is_passing(_cause(error)):
                raise
            time.sleep(wait)
    return action()


def _cause(error: BaseException) -> BaseException:
    """What the Hub's client has wrapped."""
    return error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error


def _is_passing(error: BaseException) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in _PASSING
    return isinstance(error, (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError))


@contextlib.contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """What the Hub or the network refuses, as one line."""
    try:
        yield
    except (*_REFUSALS, RuntimeError, ValueError) as caught:
        error = _cause(caught)
        if not isinstance(error, (*_REFUSALS, ValueError)):
            raise
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        goes_on = "What was sent is kept: the same command goes on from there"
        if status == 401:
            problem = "the Hub does not know the token" if get_token() else "the Hub wants to know who publishes"
            remedy = "Log in with `hf auth login`, or set HF_TOKEN"
        elif status == 403:
            problem, remedy = "the token may not write here", "Use one with write access to this namespace"
        elif status is not None:
            problem, remedy = f"the Hub answered {status} ({_first_line(error)})", goes_on
        elif isinstance(error, ValueError):
            problem, remedy = f"the Hub does not take it ({_first_line(error)})", ""
        else:
            problem, remedy = f"the Hub cannot be reached ({type(error).__name__}: {_first_line(error)})", goes_on
        raise InputError(problem, where=repo_id, field="publish", remedy=remedy) from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
