"""The Hugging Face hub: downloads that go on where they stopped, uploads, errors that explain."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strank.errors import InputError, some
from strank.extras import need
from strank.files import check_room, sha256
from strank.storage import new_file

if TYPE_CHECKING:
    from huggingface_hub import HfApi, RepoFile
    from huggingface_hub.errors import HfHubHTTPError

_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
_AGAIN = "run it again: what has arrived is kept"
# For a first answer, in seconds.
_TIMEOUT = 15


def download(
    repo: str,
    *,
    repo_type: str = "model",
    revision: str | None = None,
    allow_patterns: Sequence[str] | None = None,
    folder: Path | None = None,
    room: float = 1.0,
    token: str | bool | None = None,
) -> Path:
    """Get files of a repository that fit the patterns, at one commit; those that are there stay.

    Into ``folder``, laid out as in the repository and checked against the hub's checksums, or into
    the hub's own cache. A broken connection goes on where it broke, a stopped run with the files
    that are missing. Without a network it works from what was downloaded before. The disk of the
    folder must have room for what is still to come, ``room`` times.

    >>> download("not a name")
    Traceback (most recent call last):
    ...
    strank.errors.InputError: not a name: not the name of a repository; write owner/name
    """
    need("huggingface_hub")
    from huggingface_hub import HfApi, get_cached_repo_tree
    from huggingface_hub.errors import (
        CachedRepoTreeNotFoundError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
    )

    api = HfApi(token=token)
    what: dict[str, Any] = {"repo_id": repo, "repo_type": repo_type, "revision": revision}
    patterns = ["*"] if allow_patterns is None else list(allow_patterns)
    with explained(repo, repo_type, token=token):
        if folder is None and re.fullmatch("[0-9a-f]{40}", revision or ""):
            # A commit does not change: where all of it is known to be here, nobody is asked.
            with suppress(CachedRepoTreeNotFoundError, LocalEntryNotFoundError):
                get_cached_repo_tree(**what)
                return _without_hub(api, what, patterns, None)
        try:
            api.repo_info(**what, timeout=_TIMEOUT)
        except _hub_errors() as error:
            # Its answers, unlike its silence, are for the user to know.
            if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
                raise
            return _without_hub(api, what, patterns, folder)
        return _with_hub(api, what, patterns, folder, room)


def upload(
    folder: Path,
    repo: str,
    *,
    message: str,
    private: bool | None = None,
    token: str | bool | None = None,
) -> str:
    """Put the files of a folder into a model repository, made if there is none; its address."""
    need("huggingface_hub")
    from huggingface_hub import HfApi

    with explained(repo, token=token):
        api = HfApi(token=token)
        address = str(api.create_repo(repo, private=private, exist_ok=True))
        if private and not api.repo_info(repo).private:
            raise InputError(f"{repo}: is there already, and public; make it private on the hub")
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    return address


@contextmanager
def explained(
    repo: str, repo_type: str = "model", *, token: str | bool | None = None
) -> Iterator[None]:
    """Turn what goes wrong between here and the hub into one `InputError` that says what to do.

    A refused or absent token, a licence not accepted, a name that does not exist, no connection, a
    full disk. The message never holds the token.
    """
    try:
        yield
    except InputError:
        raise
    except _hub_errors() as error:
        # Not `from error`, whose text may hold the token.
        told = f"{repo}: {_explanation(error, repo, repo_type)}"
        raise InputError(_redacted(told, token)) from None


def _hub_errors() -> tuple[type[Exception], ...]:
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        RevisionResolutionError,
        XetDownloadError,
    )

    # Its first base is that of all errors of the HTTP client in use.
    client = HfHubHTTPError.__bases__[0]
    named = EntryNotFoundError, HFValidationError, RevisionResolutionError, XetDownloadError
    return OSError, client, *named


def _explanation(error: BaseException, repo: str, repo_type: str) -> str:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    chain = [error]
    while link := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(link)
    for link in chain:
        if isinstance(link, HFValidationError):
            return "not the name of a repository; write owner/name"
        if isinstance(link, HfHubHTTPError):
            return _answer(link, repo, repo_type)
        if isinstance(link, OfflineModeIsEnabled):
            return "not, or not all of it, in the cache, and HF_HUB_OFFLINE is set; unset it"
    for link in chain:
        if isinstance(link, OSError) and link.errno == errno.ENOSPC:
            return f"the disk is full; free some space, or choose another folder, and {_AGAIN}"
        if isinstance(link, OSError) and link.filename is not None:
            return f"{link.filename}: {link.strerror}"
    if "Consistency check failed" in str(error):
        return f"a file arrived incomplete; {_AGAIN}"
    reason = type(chain[-1]).__name__
    return (
        f"the hub cannot be reached ({reason}), and the cache does not have all of it; check the "
        f"connection and {_AGAIN}"
    )


def _answer(error: HfHubHTTPError, repo: str, repo_type: str) -> str:
    """Say what an answer of the hub means."""
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RevisionNotFoundError

    status = error.response.status_code
    page = f"https://huggingface.co/{'datasets/' * (repo_type == 'dataset')}{repo}"
    if isinstance(error, GatedRepoError):
        ask = f"accept its licence at {page}, wait for approval if needed"
        return f"gated ({status}): {ask}, {_LOG_IN}"
    if isinstance(error, RevisionNotFoundError):
        return "no such revision (404); see its branches, tags and commits at " + page
    if isinstance(error, EntryNotFoundError):
        return f"no such file (404): {error.response.url.path}"
    told = {
        401: f"no access (401): no valid token, or no such {repo_type}",
        403: f"forbidden (403): accept its licence at {page}; the token may lack a right, too",
        404: f"no such {repo_type} (404), or a private one: check the spelling",
    }
    if status in told:
        return f"{told[status]}; {_LOG_IN}"
    return f"the hub answers {status}; wait, and {_AGAIN}"


def _redacted(text: str, given: str | bool | None) -> str:
    from huggingface_hub import get_token

    for token in (given, get_token()):
        if isinstance(token, str) and token:
            text = text.replace(token, "<token>")
    return re.sub(r"\bhf_[A-Za-z0-9]{20,}", "<token>", text)


def _with_hub(
    api: HfApi, what: dict[str, Any], patterns: list[str], folder: Path | None, room: float
) -> Path:
    from huggingface_hub import RepoFile

    what["revision"] = api.resolve_revision(**what).resolved
    if folder is None:
        return Path(api.snapshot_download(**what, allow_patterns=patterns))
    listed = api.list_repo_tree(**what, recursive=True)
    files = {file.path: file for file in listed if isinstance(file, RepoFile)}
    names = _fitting(files, patterns)
    if not names:
        raise InputError(f"{what['repo_id']}: has no {some(patterns)}")
    sizes = {folder / name: files[name].size for name in names}
    there = {path: path.stat().st_size for path in sizes if path.is_file()}
    to_come = sum(size for path, size in sizes.items() if there.get(path) != size)
    check_room(folder, int(room * to_come))
    api.snapshot_download(**what, allow_patterns=patterns, local_dir=folder)
    _check(folder, [files[name] for name in names])
    return folder


def _check(folder: Path, files: Iterable[RepoFile]) -> None:
    """Compare with the hub's checksums: SHA-256 of large files, git's own of small ones."""
    from huggingface_hub.utils.sha import git_hash

    # Not `verify_repo_checksums`, which reads all that ever came into the folder, terabytes of HEST
    # say, and not only what was asked for.
    wrong = []
    for file in files:
        path = folder / file.path
        found = sha256(path) if file.lfs else git_hash(path.read_bytes())
        if found != (file.lfs.sha256 if file.lfs else file.blob_id):
            path.unlink()
            wrong.append(path)
    if wrong:
        raise InputError(
            f"{some(wrong)}: damaged (other checksum than on the hub), and removed; run it again"
        )


def _without_hub(
    api: HfApi, what: dict[str, Any], patterns: list[str], folder: Path | None
) -> Path:
    """Be content with what is in the folder, if it is whole, or in the hub's cache."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, LocalEntryNotFoundError

    what["revision"] = api.resolve_revision(**what, local_files_only=True).resolved
    if folder is not None:
        with suppress(CachedRepoTreeNotFoundError):
            listed = get_cached_repo_tree(**what, local_dir=folder)
            names = _fitting((file.path for file in listed), patterns)
            if names and all((folder / name).is_file() for name in names):
                return folder
    cached = Path(api.snapshot_download(**what, allow_patterns=patterns, local_files_only=True))
    there = (path.relative_to(cached).as_posix() for path in cached.rglob("*") if path.is_file())
    names = _fitting(there, patterns)
    if not names:
        raise LocalEntryNotFoundError("no such files")
    if folder is None:
        return cached
    for name in names:
        with new_file(folder / name) as file, (cached / name).open("rb") as source:
            shutil.copyfileobj(source, file)
    return folder


def _fitting(names: Iterable[str], patterns: list[str]) -> list[str]:
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
