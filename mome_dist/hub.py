"""Models of the Hugging Face hub, where a directory may be named: ``hf://OWNER/NAME`` or ``hf://OWNER/NAME@REVISION``.

The form is that of huggingface_hub's own file system; a path never begins like that, so ``OWNER/NAME`` alone stays a
relative path. Files go into huggingface_hub's cache (``HF_HOME``), one directory a commit:
``models--OWNER--NAME/snapshots/COMMIT``. So a directory in there and ``hf://OWNER/NAME@COMMIT`` are two names of the
same files: a run works with the first and writes down the second.

Only settings, tokenizers and safetensors are fetched: no pickled weights, and no code. Nothing else in mome_dist asks a
hub for anything, or sends it anything: exports, when they are pushed. Cache: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from mome_dist.errors import UserError

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

SCHEME = "hf://"
CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_ADDRESS = re.compile(
    r"hf://([A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*)(?:@([A-Za-z0-9][A-Za-z0-9_./-]*))?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHARD = re.compile(r"[A-Za-z0-9_.-]+\.safetensors")
# Settings and tokenizers; not the folders with other forms of a model. No more than `_absent` advises to download: what
# is missing of it makes a snapshot incomplete.
_SMALL_FILES, _OTHERS = ["*.json"], ["*/*"]


@dataclass(frozen=True)
class HubModel:
    """A model of the hub.

    Attributes:
        repository: "OWNER/NAME".
        revision: branch, tag or commit; None for the repository's main branch.
    """

    repository: str
    revision: str | None = None

    @classmethod
    def parse(cls, key: str, text: str | Path) -> HubModel | None:
        """The model that a text names; None for a path.

        Raises:
            UserError: it begins like the name of a model, but is none; ``key`` says where it stands.
        """
        text = str(text)
        if not text.startswith(SCHEME):
            return None
        match = _ADDRESS.fullmatch(text)
        if match is None or "--" in match[1] or ".." in text:
            raise UserError(
                f"{key}={text!r} names no model of the hub: write hf://OWNER/NAME or hf://OWNER/NAME@REVISION."
            )
        return cls(match[1], match[2])

    def __str__(self) -> str:
        return f"{SCHEME}{self.repository}" + ("" if self.revision is None else f"@{self.revision}")

    @property
    def commit(self) -> str | None:
        """The commit, if the revision is one."""
        return self.revision if self.revision is not None and _COMMIT.fullmatch(self.revision) else None

    def last_seen(self) -> str | None:
        """The commit that the revision was when this cache was last filled from it."""
        ref = self._storage() / "refs" / (self.revision or "main")
        return self.commit or (ref.read_text(encoding="utf-8").strip() if ref.is_file() else None)

    def directory(self, commit: str) -> Path:
        """Where the cache has, or would have, the files of a commit."""
        return self._storage() / "snapshots" / commit

    def _storage(self) -> Path:
        return cache_directory() / f"models--{self.repository.replace('/', '--')}"


def cache_directory() -> Path:
    """The cache of huggingface_hub, which follows ``HF_HUB_CACHE`` and ``HF_HOME``."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser().resolve()


def model_at(path: str | Path) -> HubModel | None:
    """The model, by its commit, whose files a directory of the cache holds; None for any other directory."""
    path = Path(path)
    storage = path.parent.parent
    if path.parent.name != "snapshots" or not _COMMIT.fullmatch(path.name) or not storage.name.startswith("models--"):
        return None
    owner, _, name = storage.name.removeprefix("models--").partition("--")
    return HubModel(f"{owner}/{name}", path.name) if storage.parent.resolve() == cache_directory() else None


def portable(path: str) -> str:
    """A path as a run writes it down: of a directory in the cache the name of its model, with the commit."""
    return str(model_at(path) or path)


def directory_of(path: str | Path) -> Path:
    """The directory that a run wrote down (`portable`); it may not exist."""
    model = HubModel.parse("path", path)
    return Path(path) if model is None or model.commit is None else model.directory(model.commit)


def name_of(path: str | Path) -> str:
    """What to call the model in a directory: of the hub by its name there, others as the directory is called."""
    model = model_at(path) or HubModel.parse("path", path)
    return Path(path).name if model is None else model.repository.partition("/")[2]


def weight_files(directory: Path) -> list[str]:
    """Names of the files with a model's weights: those of its index if there is one.

    Raises:
        UserError: the index is none, or names something else than safetensors files beside it.
    """
    index = directory / INDEX
    if not index.is_file():
        return [SINGLE]
    try:
        named = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{index} is no index of shards; fetch it again.") from error
    for name in named:
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise UserError(f"{index} names {name!r}, which is no safetensors file; choose another revision.")
    return named


def fetch(key: str, model: HubModel, local: bool = False, weights: bool = True, also: Sequence[str] = ()) -> Path:
    """The directory of a model, whose files are fetched where the cache does not have them yet.

    Args:
        key: of the configuration, for messages.
        local: read the cache only, as with ``HF_HUB_OFFLINE=1``.
        weights: also these, and not only settings and tokenizers.
        also: names of further files, where the model has them.

    Raises:
        UserError: no network, no such repository or revision, no right to it, or no safetensors weights in it.
    """
    from huggingface_hub import constants, snapshot_download

    local = local or constants.HF_HUB_OFFLINE
    with _explained(key, model, local, also):
        with _bars(False):
            directory = Path(
                snapshot_download(
                    model.repository,
                    revision=model.revision,
                    allow_patterns=[*_SMALL_FILES, *also],
                    ignore_patterns=_OTHERS,
                    local_files_only=local,
                )
            )
        needed = weight_files(directory) if weights else []
        if not local and any(not (directory / name).is_file() for name in needed):
            with _bars(sys.stderr.isatty()):
                snapshot_download(model.repository, revision=directory.name, allow_patterns=needed)
    missing = [name for name in (CONFIG, *needed) if not (directory / name).is_file()]
    if missing and local:
        raise _absent(key, model, f"has no {missing[0]} of it", None, also)
    if missing:
        raise UserError(
            f"{key}: {model} has no {missing[0]} at commit {directory.name}. Weights are read from safetensors only, "
            "never from pickled files: choose a revision that has them, or convert it and give the directory."
        )
    return directory


def upload(
    directory: Path,
    repository: str,
    *,
    replaced: Sequence[str],
    private: bool | None,
    token: bool | str | None,
    revision: str | None,
    **commit: Any,
) -> Any:
    """Send the files of a directory as one commit of a model, which is made if there is none.

    Args:
        repository: "OWNER/NAME", or "NAME" of the user who is logged in.
        replaced: patterns of files that go where the directory does not have them.
        private: whether a new model is; None: as its owner has it.
        revision: branch, which is made if there is none.
        commit: of huggingface_hub's ``upload_folder``.

    Returns:
        Its ``CommitInfo``.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repository = api.create_repo(repository, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repository, branch=revision, exist_ok=True)
    return api.upload_folder(
        repo_id=repository, folder_path=directory, delete_patterns=list(replaced), revision=revision, **commit
    )


def model_card_data(results: Sequence[Mapping[str, Any]], **metadata: Any) -> ModelCardData:
    """The front matter of a model card, as the library of the hub writes and checks it; it asks no hub.

    Args:
        results: arguments of huggingface_hub's ``EvalResult``, of each result.
        metadata: the others of its ``ModelCardData``; None leaves one out.
    """
    from huggingface_hub import EvalResult, ModelCardData

    evaluated = [EvalResult(**result) for result in results]
    return ModelCardData(**metadata, eval_results=evaluated or None)


def with_tags(card: str, tags: Sequence[str]) -> str:
    """A model card with further tags in its front matter."""
    from huggingface_hub import ModelCard

    parsed = ModelCard(card)
    parsed.data["tags"] = list(dict.fromkeys([*(parsed.data.get("tags") or ()), *tags]))
    return str(parsed)


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """Hide the library's progress bars, unless something may be fetched that takes time."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def _explained(key: str, model: HubModel, local: bool, also: Sequence[str] = ()) -> Iterator[None]:
    """Tell in one line what the hub, or the way there, refuses. No text of the library's: it may hold signed addresses.

    Raises:
        UserError: for every refusal.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    host = urlsplit(constants.ENDPOINT).hostname
    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    try:
        yield
    except GatedRepoError as error:
        raise UserError(
            f"{key}: {host} keeps {model} for users who have accepted its terms: accept them on the page of "
            f"{model.repository}, and {log_in}."
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{key}: {host} shows this user no model {model.repository}: mend the name of {model}, or if it is a "
            f"private one, {log_in}."
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(
            f"{key}: {model.repository} has no revision {model.revision}: name a branch, a tag or a commit of it."
        ) from error
    except LocalEntryNotFoundError as error:
        cause = error.__cause__
        if isinstance(cause, HfHubHTTPError):
            raise _refused(key, model, host, cause.response.status_code) from error
        raise _absent(key, model, "does not have it whole", None if local else host, also) from error
    except HfHubHTTPError as error:
        raise _refused(key, model, host, error.response.status_code) from error
    except Exception as error:
        # The errors of the HTTP library, whose name differs between versions of huggingface_hub.
        if not type(error).__module__.startswith("http"):
            raise
        raise _absent(key, model, "does not have it whole", host, also) from error


def _absent(key: str, model: HubModel, problem: str, host: str | None, also: Sequence[str]) -> UserError:
    revision = "" if model.revision is None else f" --revision {model.revision}"
    why = "nothing is fetched here (a rank, or HF_HUB_OFFLINE is set)" if host is None else f"{host} cannot be reached"
    includes = " ".join(f"--include '{pattern}'" for pattern in (*_SMALL_FILES, "*.safetensors", *also))
    return UserError(
        f"{key}: {model}: {why}, and the cache {cache_directory()} {problem}: where there is a network, such as on a "
        f"login node, run `hf download {model.repository}{revision} {includes}`, with "
        "HF_HOME on a file system that both share."
    )


def _refused(key: str, model: HubModel, host: str | None, status: int) -> UserError:
    if status in (401, 403):
        return UserError(
            f"{key}: {host} refuses {model} to this user (HTTP {status}): log in with `hf auth login`, or set HF_TOKEN "
            f"to a token that may read {model.repository}."
        )
    return UserError(f"{key}: {host} answers HTTP {status} for {model}: try again later, or give a directory.")
