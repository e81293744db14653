"""Downloads from a hub on localhost: whole, resumed, checked, offline, and what goes wrong."""

from __future__ import annotations

import errno
import traceback
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants

from strank.errors import InputError
from strank.hub import download, explained, upload

REPO = "lab/data"
LARGE = np.random.default_rng(0).bytes(300_000)
FILES = {"a/large.bin": LARGE, "a/small.json": b"{}", "b/other.txt": b"other"}
TOKEN = "hf_secretsecretsecret"
COMMIT = "a" * 40


@pytest.fixture
def hub(hub_server):
    hub_server.repos[REPO] = dict(FILES)
    return hub_server


def get(folder: Path, **options: object) -> Path:
    return download(REPO, repo_type="dataset", folder=folder, **options)


def contents(folder: Path) -> dict[str, bytes]:
    files = [p for p in folder.rglob("*") if p.is_file() and ".cache" not in p.parts]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def test_files_that_fit_arrive_and_are_asked_for_once(hub, tmp_path):
    assert get(tmp_path / "d", allow_patterns=["a/*"]) == tmp_path / "d"
    assert contents(tmp_path / "d") == {k: v for k, v in FILES.items() if k.startswith("a/")}
    asked = len(hub.ranges())
    get(tmp_path / "d", allow_patterns=["a/*"])
    assert len(hub.ranges()) == asked == 2
    with pytest.raises(InputError, match=r"^lab/data: has no c/\*$"):
        get(tmp_path / "d", allow_patterns=["c/*"])


def test_the_cache_is_used_where_no_folder_is_given(hub):
    hub.repos["lab/model"] = {"config.json": b"{}"}
    folder = download("lab/model")
    assert contents(folder) == {"config.json": b"{}"}
    assert Path(constants.HF_HUB_CACHE) in folder.parents


def test_a_commit_that_is_in_the_cache_is_not_asked_for(hub):
    first = get(None, allow_patterns=["a/*"], revision=COMMIT)
    asked = len(hub.requests)
    assert get(None, allow_patterns=["a/*"], revision=COMMIT) == first
    assert len(hub.requests) == asked
    assert contents(get(None, revision=COMMIT)) == FILES


def test_a_broken_connection_goes_on_where_it_broke(hub, tmp_path):
    hub.drop = [100_000]
    get(tmp_path / "d", allow_patterns=["*.bin"])
    assert contents(tmp_path / "d") == {"a/large.bin": LARGE}
    assert hub.ranges() == [None, "bytes=100000-"]


def test_a_run_that_failed_goes_on_with_the_missing_files(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.fail["large.bin"] = 503, {}
    with pytest.raises(InputError, match="answers 503; wait, and run it again: what has arrived"):
        get(tmp_path / "d")
    assert b"" not in contents(tmp_path / "d").values()
    hub.fail.clear()
    get(tmp_path / "d")
    assert contents(tmp_path / "d") == FILES
    asked = [path for verb, path, _ in hub.requests if verb == "GET" and "other.txt" in path]
    assert len(asked) == 1


def test_other_bytes_than_the_checksum_says_are_named_and_removed(hub, tmp_path):
    hub.corrupt = True
    with pytest.raises(InputError, match=r"large\.bin: damaged .* removed; run it again"):
        get(tmp_path / "d", allow_patterns=["*.bin"])
    assert contents(tmp_path / "d") == {}
    hub.corrupt = False
    get(tmp_path / "d")
    assert contents(tmp_path / "d") == FILES
    for name in ("a/large.bin", "a/small.json"):
        (tmp_path / "d" / name).write_bytes(b"x" * len(FILES[name]))
        with pytest.raises(InputError, match=f"{name}: damaged"):
            get(tmp_path / "d")


def test_without_a_network_a_whole_folder_will_do(hub, tmp_path, monkeypatch):
    get(tmp_path / "d", allow_patterns=["a/*"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert get(tmp_path / "d", allow_patterns=["a/*"]) == tmp_path / "d"
    for folder in (tmp_path / "d", tmp_path / "other"):
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other/there.txt").touch()
        with pytest.raises(InputError, match="not all of it, in the cache, and HF_HUB_OFFLINE"):
            get(folder)


@pytest.mark.parametrize("offline", ["HF_HUB_OFFLINE", "no answer"])
def test_without_a_network_the_cache_will_do(hub, tmp_path, monkeypatch, offline):
    get(None, allow_patterns=["a/*"])
    if offline == "no answer":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    else:
        monkeypatch.setattr(constants, offline, True)
    get(tmp_path / "d", allow_patterns=["a/*.bin"])
    assert contents(tmp_path / "d") == {"a/large.bin": LARGE}
    assert contents(get(None, allow_patterns=["a/*"]))["a/large.bin"] == LARGE


def test_a_revision_is_pinned(hub, tmp_path):
    get(tmp_path / "d", revision="v1")
    asked = [path for _, path, _ in hub.requests if "/resolve/" in path]
    assert asked
    assert all(f"/resolve/{COMMIT}/" in path for path in asked)
    with pytest.raises(InputError, match=r"lab/data: no such revision \(404\)"):
        get(tmp_path / "d", revision="v2")


GATED = {"X-Error-Code": "GatedRepo"}
INVALID = {"X-Error-Message": "Invalid credentials in Authorization header"}
LICENCE = r"accept its licence at https://huggingface\.co/datasets/lab/data"


@pytest.mark.parametrize(
    ("where", "answer", "told"),
    [
        ("/api/", (401, {}), r"no access \(401\).*`hf auth login`, or set HF_TOKEN"),
        ("/api/", (401, INVALID), r"no access \(401\): no valid token, or no such dataset"),
        ("/resolve/", (401, GATED), rf"gated \(401\): {LICENCE}"),
        ("/resolve/", (403, GATED), rf"gated \(403\): {LICENCE}"),
        ("/tree/", (403, {}), rf"forbidden \(403\): {LICENCE}"),
        (
            "/api/",
            (404, {"X-Error-Code": "RepoNotFound"}),
            r"no such dataset \(404\), or a pri",
        ),
        ("/resolve/", (404, {"X-Error-Code": "EntryNotFound"}), r"no such file \(404\): .*/a/"),
        ("/revision/", (503, {}), "the hub answers 503; wait, and run it again"),
    ],
)
def test_answers_of_the_hub_are_explained(hub, tmp_path, where, answer, told):
    hub.fail[where] = answer
    with pytest.raises(InputError, match=f"^lab/data: {told}") as caught:
        get(tmp_path / "d", allow_patterns=["a/*"], revision="v1")
    assert TOKEN not in "".join(traceback.format_exception(caught.value))
    assert contents(tmp_path / "d") == {}


def test_a_hub_that_does_not_answer_is_explained(hub, tmp_path, monkeypatch):
    hub.silent = 3
    with pytest.raises(InputError, match=r"cannot be reached \(.*\).*check the connection"):
        get(tmp_path / "d")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(InputError, match="cannot be reached"):
        get(tmp_path / "d")


def test_other_troubles_are_explained(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device", "x")
    for trouble, told in {
        full: "the disk is full; free some space",
        PermissionError(errno.EACCES, "Permission denied", "/x"): "/x: Permission denied",
        OSError("Consistency check failed: file should be"): "a file arrived incomplete",
    }.items():
        with pytest.raises(InputError, match=told), explained(REPO):
            raise trouble
    with pytest.raises(InputError, match="not the name of a repository"):
        download("a/b/c")


def test_the_token_is_never_told(hub_server):
    with pytest.raises(InputError) as caught, explained(REPO):
        raise PermissionError(
            errno.EACCES, f"Bearer {TOKEN} and hf_{'a1' * 17}, hf_owner_name", TOKEN
        )
    given = "a-token-of-another-form"
    with (
        pytest.raises(InputError, match=r"^lab/data: <token>: no <token>$"),
        explained(REPO, token=given),
    ):
        raise PermissionError(errno.EACCES, f"no {given}", given)
    told = "".join(traceback.format_exception(caught.value))
    assert "<token>: Bearer <token> and <token>, hf_owner_name" in told
    assert TOKEN not in told


def test_what_is_uploaded_can_be_downloaded(hub_server, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/a.json").write_bytes(b"{}")
    (tmp_path / "model/large.bin").write_bytes(LARGE)
    told = upload(tmp_path / "model", "me/model", message="A model")
    assert told == f"{hub_server.address}/me/model"
    assert contents(download("me/model")) == {"a.json": b"{}", "large.bin": LARGE}


def test_what_is_to_be_private_is_not_put_into_a_public_repository(hub_server, tmp_path):
    (tmp_path / "a.json").touch()
    with pytest.raises(InputError, match="me/model: is there already, and public"):
        upload(tmp_path, "me/model", message="A model", private=True)
    assert hub_server.repos["me/model"] == {}


def test_an_upload_that_is_refused_is_explained(hub_server, tmp_path):
    (tmp_path / "a.json").write_bytes(b"{}")
    hub_server.fail["/commit/"] = 403, {}
    with pytest.raises(InputError, match=r"me/model: forbidden \(403\).*may lack a right"):
        upload(tmp_path, "me/model", message="A model")
