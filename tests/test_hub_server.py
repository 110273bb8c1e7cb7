"""The test suite's Hub, driven by the real huggingface_hub client: what the other tests build on."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hub_server import PART_BYTES, Fault, Hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

LARGE = bytes(range(256)) * 2000
FILES = {"config.json": b"{}", "model.safetensors": LARGE, "sub/model.safetensors": b"x" * 100}


def test_facts_of_a_repository(hub: Hub) -> None:
    sha = hub.add("owner/model", FILES)
    info = HfApi().model_info("owner/model", files_metadata=True)
    assert info.sha == sha
    assert info.siblings is not None
    found = {file.rfilename: file for file in info.siblings}
    assert found["config.json"].size == 2
    assert found["config.json"].lfs is None
    lfs = found["model.safetensors"].lfs
    assert lfs is not None
    assert (lfs.size, lfs.sha256) == (len(LARGE), hashlib.sha256(LARGE).hexdigest())
    later = hub.change("owner/model", {"config.json": b"{ }"})
    assert HfApi().model_info("owner/model").sha == later
    assert HfApi().model_info("owner/model", revision=sha).sha == sha


def test_a_tree_comes_in_pages(hub: Hub) -> None:
    hub.add("owner/model", {f"{i}.txt": b"%d" % i for i in range(7)} | FILES)
    hub.page_length = 3
    paths = [entry.path for entry in HfApi().list_repo_tree("owner/model", recursive=True)]
    assert sorted(paths) == sorted([*(f"{i}.txt" for i in range(7)), *FILES, "sub", ".gitattributes"])
    assert [entry.path for entry in HfApi().list_repo_tree("owner/model", "sub")] == ["sub/model.safetensors"]
    infos = HfApi().get_paths_info("owner/model", ["config.json", "sub", "absent"])
    assert [info.path for info in infos] == ["config.json", "sub"]


def test_download_goes_by_way_of_the_cdn_without_the_token(hub: Hub) -> None:
    sha = hub.add("owner/model", FILES)
    for name, content in FILES.items():
        assert Path(hf_hub_download("owner/model", name)).read_bytes() == content
    paths = [request.line for request in hub.requests if request.sent > 1000]
    assert len(paths) == 1
    assert paths[0].startswith("GET /cdn/")
    before = len(hub.requests)
    hf_hub_download("owner/model", "model.safetensors", revision=sha)
    assert len(hub.requests) == before  # the commit is in the cache


def test_a_cut_connection_is_taken_up_where_it_ended(hub: Hub) -> None:
    hub.add("owner/model", FILES)
    hub.faults.append(Fault("GET /cdn/", cut_after=200_000))
    assert Path(hf_hub_download("owner/model", "model.safetensors")).read_bytes() == LARGE
    ranges = [request.range for request in hub.requests if "GET /cdn/" in request.line]
    assert ranges[0] == ""
    assert ranges[1].startswith("bytes=")
    assert 0 < int(ranges[1].removeprefix("bytes=").rstrip("-")) <= 200_000


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        (Fault("GET /cdn/", shorter=7), "Consistency check failed"),
        (Fault("HEAD ", times=9, status=403), "locate the file"),
    ],
)
def test_faults_reach_the_client(hub: Hub, fault: Fault, named: str) -> None:
    hub.add("owner/model", FILES)
    hub.faults.append(fault)
    with pytest.raises(OSError, match=named):
        hf_hub_download("owner/model", "model.safetensors")


def test_who_may_read(hub: Hub) -> None:
    hub.add("owner/secret", FILES, private=True)
    hub.add("owner/gated", FILES, gated=True, readers="reader")
    hub.users["hf_stranger"] = "stranger"
    assert HfApi(token="hf_owner").model_info("owner/secret").private
    for token in ("hf_stranger", False):
        with pytest.raises(RepositoryNotFoundError):
            HfApi(token=token).model_info("owner/secret")
        assert HfApi(token=token).model_info("owner/gated").gated == "manual"
        with pytest.raises(GatedRepoError):
            hf_hub_download("owner/gated", "config.json", token=token)
    assert hf_hub_download("owner/gated", "config.json", token="hf_reader")
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        HfApi(token="hf_wrong").model_info("owner/gated")


def test_what_is_not_there(hub: Hub) -> None:
    hub.add("owner/model", FILES)
    with pytest.raises(RepositoryNotFoundError):
        HfApi().model_info("owner/absent")
    with pytest.raises(RevisionNotFoundError):
        HfApi().model_info("owner/model", revision="v9")
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download("owner/model", "absent.json")


@pytest.mark.parametrize("size", [1000, 2 * PART_BYTES + 17])
def test_upload_in_one_part_and_in_several(hub: Hub, size: int) -> None:
    api = HfApi()
    url = api.create_repo("owner/new", private=True)
    assert url.repo_id == "owner/new"
    assert hub.store.repos["owner/new"].private
    api.create_repo("owner/new", exist_ok=True)
    content = bytes(range(251)) * (size // 251 + 1)
    content = content[:size]
    parts = [CommitOperationAdd("a.safetensors", content), CommitOperationAdd("config.json", b"{}")]
    info = api.create_commit("owner/new", parts, commit_message="add")
    assert hub.files("owner/new") == {"a.safetensors": content, "config.json": b"{}"}
    assert hub.store.repos["owner/new"].refs["main"] == info.oid
    before = hub.count("PUT /upload")
    api.create_commit("owner/new", [CommitOperationAdd("b.safetensors", content)], commit_message="again")
    assert hub.count("PUT /upload") == before  # the Hub has that content
    api.create_commit("owner/new", [CommitOperationDelete("a.safetensors")], commit_message="remove")
    assert set(hub.files("owner/new")) == {"b.safetensors", "config.json"}


def test_a_pull_request_from_draft_to_merge(hub: Hub) -> None:
    hub.add("owner/model", {"config.json": b"{}", "old.safetensors": b"old"})
    api = HfApi()
    pull = api.create_pull_request("owner/model", "New weights")
    assert (pull.status, pull.git_reference) == ("draft", "refs/pr/1")
    add, remove = CommitOperationAdd("new.safetensors", b"new"), CommitOperationDelete("old.safetensors")
    api.create_commit("owner/model", [add, remove], commit_message="shard", revision=pull.git_reference)
    assert set(hub.files("owner/model")) == {"config.json", "old.safetensors"}
    assert set(hub.files("owner/model", "refs/pr/1")) == {"config.json", "new.safetensors"}
    assert api.model_info("owner/model", revision="refs/pr/1").sha == hub.store.repos["owner/model"].refs["refs/pr/1"]
    with pytest.raises(HfHubHTTPError, match="draft"):
        api.merge_pull_request("owner/model", pull.num)
    assert api.change_discussion_status("owner/model", pull.num, "open").new_status == "open"
    assert [d.num for d in api.get_repo_discussions("owner/model", discussion_status="open")] == [1]
    api.merge_pull_request("owner/model", pull.num)
    assert set(hub.files("owner/model")) == {"config.json", "new.safetensors"}
    assert api.get_discussion_details("owner/model", 1).status == "merged"


def test_writing_needs_the_right(hub: Hub) -> None:
    hub.add("owner/model", FILES)
    with pytest.raises(HfHubHTTPError, match="rights"):
        HfApi(token="hf_reader").create_repo("owner/other")
    with pytest.raises(HfHubHTTPError, match="rights"):
        HfApi(token="hf_reader").create_pull_request("owner/model", "hello")


def test_a_commit_on_an_old_parent_is_refused(hub: Hub) -> None:
    first = hub.add("owner/model", FILES)
    hub.change("owner/model", {"config.json": b"{ }"})
    change = [CommitOperationAdd("config.json", b"{  }")]
    with pytest.raises(HfHubHTTPError, match="412"):
        HfApi().create_commit("owner/model", change, commit_message="late", parent_commit=first)
