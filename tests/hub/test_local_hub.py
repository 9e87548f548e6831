"""The Hub of the tests answers the real client as the real one does."""

import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import local_hub
import pytest
from datasets import Dataset, load_dataset
from huggingface_hub import (
    HfApi,
    create_branch,
    create_repo,
    create_tag,
    delete_file,
    delete_repo,
    hf_hub_download,
    list_repo_files,
    list_repo_refs,
    list_repo_tree,
    model_info,
    repo_exists,
    snapshot_download,
    update_repo_settings,
    upload_file,
    upload_folder,
    whoami,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,  # of the client's HTTP library, whichever it uses
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .conftest import environment


NAME = "tester/lstm"


@pytest.fixture(autouse=True)
def repository(hub) -> None:
    create_repo(NAME)


@pytest.fixture
def reader(hub) -> str:
    return next(iter(hub.readers))


def push(content: bytes, path: str = "small.txt", **options):
    return upload_file(path_or_fileobj=content, path_in_repo=path, repo_id=NAME, **options)


def pulled(path: str = "small.txt", **options) -> bytes:
    return Path(hf_hub_download(NAME, path, **options)).read_bytes()


def status(error: pytest.ExceptionInfo[HfHubHTTPError]) -> int:
    return error.value.response.status_code


def test_a_large_and_a_small_file_come_back_with_the_same_bits(hub, tmp_path):
    contents = {"large.dat": os.urandom(11 * 2**20), "folder/small.txt": b"small"}
    for path, content in contents.items():
        (tmp_path / "mine" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / path).write_bytes(content)
    upload_folder(repo_id=NAME, folder_path=tmp_path / "mine")
    assert {path: pulled(path) for path in contents} == contents
    copy = snapshot_download(NAME)
    assert {path: Path(copy, path).read_bytes() for path in contents} == contents
    assert contents.items() <= hub.files(NAME).items()


def test_the_large_file_goes_the_way_that_the_hub_is_for(hub):
    push(b"\0" * 100, "model.safetensors")
    entry = next(entry for entry in list_repo_tree(NAME) if entry.path == "model.safetensors")
    assert (entry.xet_hash is not None) == hub.large_files.xet
    assert any("PUT /_lfs/" in line for line in hub.log) != hub.large_files.xet
    assert any("/xet-write-token/" in line for line in hub.log) == hub.large_files.xet


@pytest.mark.parametrize("path", ["small.txt", "small.safetensors"])
def test_a_part_of_a_file_is_sent_to_who_asks_for_it(hub, path):
    push(b"0123456789", path)
    question = urllib.request.Request(f"{hub.url}/{NAME}/resolve/main/{path}", headers={"Range": "bytes=3-6"})
    with urllib.request.urlopen(question) as answer:
        assert (answer.status, answer.read()) == (206, b"3456")
        assert answer.headers["Content-Range"] == "bytes 3-6/10"


def test_a_private_repository_is_there_only_for_who_may_read_it(reader):
    push(b"secret")
    update_repo_settings(NAME, private=True)
    assert model_info(NAME).private
    assert pulled(token=reader) == b"secret"
    with pytest.raises(RepositoryNotFoundError) as error:
        model_info(NAME, token=False)
    assert status(error) == 401
    with pytest.raises(HfHubHTTPError, match="Invalid credentials") as error:
        model_info(NAME, token="hf_wrong")
    assert status(error) == 401
    assert not isinstance(error.value, RepositoryNotFoundError)


def test_who_may_only_read_is_forbidden_to_write(hub, reader):
    assert whoami(reader)["auth"]["accessToken"]["role"] == "read"
    for write in (
        lambda: push(b"mine", token=reader),
        lambda: push(b"mine", "mine.safetensors", token=reader),
        lambda: create_repo("tester/other", exist_ok=True, token=reader),
        lambda: delete_repo(NAME, token=reader),
    ):
        with pytest.raises(HfHubHTTPError, match="403 Forbidden") as error:
            write()
        assert status(error) == 403
    assert set(hub.files(NAME)) == {".gitattributes"}
    assert create_repo(NAME, exist_ok=True, token=reader).repo_id == NAME  # it is there, and so the client is content


def test_without_a_token_nothing_is_written(hub):
    for token in (False, "hf_wrong"):
        for write in (lambda: push(b"mine", token=token), lambda: create_repo("tester/other", token=token)):  # noqa: B023
            with pytest.raises(HfHubHTTPError) as error:
                write()
            assert status(error) == 401
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        whoami("hf_wrong")
    assert set(hub.files(NAME)) == {".gitattributes"}


def test_what_is_missing_has_the_error_of_its_kind():
    for kind, missing in {
        RepositoryNotFoundError: lambda: hf_hub_download("tester/none", "small.txt"),
        RevisionNotFoundError: lambda: hf_hub_download(NAME, "small.txt", revision="none"),
        RemoteEntryNotFoundError: lambda: hf_hub_download(NAME, "small.txt"),
    }.items():
        with pytest.raises(kind) as error:
            missing()
        assert status(error) == 404
    with pytest.raises(RepositoryNotFoundError):
        upload_file(path_or_fileobj=b"", path_in_repo="small.txt", repo_id="tester/none")
    with pytest.raises(RevisionNotFoundError):
        push(b"", revision="none")
    with pytest.raises(RemoteEntryNotFoundError):
        delete_file("small.txt", NAME)


def test_a_branch_and_a_tag_keep_what_they_point_at(hub):
    first = push(b"first").oid
    create_tag(NAME, tag="v1")
    create_branch(NAME, branch="step/1")
    push(b"second")
    push(b"third", revision="step/1")
    revisions = {"main": b"second", "v1": b"first", "step/1": b"third", first: b"first"}
    assert {revision: pulled(revision=revision) for revision in revisions} == revisions
    references = list_repo_refs(NAME)
    assert {branch.name for branch in references.branches} == {"main", "step/1"}
    assert [(tag.name, tag.target_commit) for tag in references.tags] == [("v1", first)]
    with pytest.raises(HfHubHTTPError, match="409"):
        create_tag(NAME, tag="v1")


def test_a_pull_request_leaves_the_branch_alone():
    push(b"mine")
    request = push(b"yours", create_pr=True)
    assert request.pr_revision == "refs/pr/1"
    assert (pulled(), pulled(revision=request.pr_revision)) == (b"mine", b"yours")


def test_a_commit_whose_parent_is_not_the_last_one_is_refused():
    first = push(b"first").oid
    push(b"second", parent_commit=first)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as error:
        push(b"third", parent_commit=first)
    assert status(error) == 412
    assert pulled() == b"second"


def test_a_busy_hub_refuses_as_many_commits_as_it_is_told(hub):
    hub.busy = 2
    for _ in range(2):
        with pytest.raises(HfHubHTTPError) as error:
            push(b"mine")
        assert status(error) == 412
    push(b"mine")
    assert pulled() == b"mine"


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("moment", ["/preupload/", "/commit/", "/api/repos/create"])
def test_a_push_in_which_the_server_dies_is_done_again_once_it_is_back(hub, moment):
    push(b"first", "model.safetensors")

    def second_push():
        create_repo(NAME, exist_ok=True)
        push(b"second", "model.safetensors")

    hub.dies_at = lambda request: moment in request
    with pytest.raises(HTTPError) as error:
        second_push()
    assert not isinstance(error.value, OSError)  # as the client's own errors are
    assert moment in hub.log[-1]
    with pytest.raises(HTTPError, match="refused"):
        whoami()
    assert hub.files(NAME)["model.safetensors"] == b"first"
    hub.revive()
    second_push()
    assert pulled("model.safetensors") == b"second"


@pytest.mark.usefixtures("impatient")
def test_a_large_file_during_which_the_server_dies_is_pushed_once_it_is_back(hub):
    moment, kind = ("/xet-write-token/", ConnectionError) if hub.large_files.xet else ("/_lfs/", RuntimeError)
    hub.dies_at = lambda request: moment in request
    with pytest.raises(kind):
        push(b"mine", "model.safetensors")
    hub.revive()
    push(b"mine", "model.safetensors")
    assert pulled("model.safetensors") == b"mine"


def test_deleted_files_and_repositories_are_gone():
    push(b"", "model.safetensors")
    push(b"mine")
    delete_file("model.safetensors", NAME)
    assert set(list_repo_files(NAME)) == {".gitattributes", "small.txt"}
    with pytest.raises(HfHubHTTPError, match="409"):
        create_repo(NAME)
    delete_repo(NAME)
    assert not repo_exists(NAME)
    create_repo(NAME)
    assert list_repo_files(NAME) == [".gitattributes"]


def test_the_log_has_no_tokens(hub, reader):
    push(b"mine")
    model_info(NAME, token=reader)
    assert f"POST /api/models/{NAME}/commit/main" in hub.log
    assert not any(token in line for line in hub.log for token in (hub.token, reader))


def test_a_dataset_is_loaded_from_its_repository():
    rows = {"text": ["a", "b", "c"], "label": [0, 1, 2]}
    Dataset.from_dict(rows).push_to_hub("tester/rows")
    assert load_dataset("tester/rows", split="train").to_dict() == rows
    create_repo("tester/lines", repo_type="dataset")
    lines = {"path_or_fileobj": b'{"text": "d"}\n', "path_in_repo": "train.jsonl"}
    upload_file(**lines, repo_id="tester/lines", repo_type="dataset")
    assert load_dataset("tester/lines", split="train")[:] == {"text": ["d"]}


def test_a_new_process_finds_the_hub_in_its_environment(hub, tmp_path):
    push(b"mine", "model.safetensors")
    program = f"from huggingface_hub import hf_hub_download; print(hf_hub_download('{NAME}', 'model.safetensors'))"
    variables = {"PATH": os.environ["PATH"]} | environment(hub, tmp_path)
    found = subprocess.check_output([sys.executable, "-c", program], text=True, env=variables, timeout=60).strip()
    assert Path(found).read_bytes() == b"mine"
    assert Path(found).is_relative_to(tmp_path)


def test_the_script_serves_who_exports_what_it_prints(hub):
    command = [sys.executable, local_hub.__file__] + ["--xet"] * hub.large_files.xet
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as script:
        export, *variables = script.stdout.readline().split()
        variables = dict(variable.split("=") for variable in variables)
        created = HfApi(variables["HF_ENDPOINT"], variables["HF_TOKEN"]).create_repo("there").repo_id
        script.send_signal(signal.SIGINT)
    assert (export, created, script.returncode) == ("export", "tester/there", 0)
    assert variables["HF_HUB_DISABLE_XET"] == ("0" if hub.large_files.xet else "1")
