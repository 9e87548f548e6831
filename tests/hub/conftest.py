"""A Hub of its own for every test, at which the libraries of this process are pointed."""

import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.utils import _xet
from local_hub import LocalHub


@pytest.fixture(params=["lfs", "xet"])
def hub(request, tmp_path, monkeypatch):
    """A Hub that serves large files through Git LFS or hf_xet; the token of its owner is the one that is used."""
    with LocalHub(tmp_path / "hub", xet=request.param == "xet") as served:
        for name, value in environment(served, tmp_path).items():
            monkeypatch.setenv(name, value)
        for name, value in settings(served, tmp_path).items():
            monkeypatch.setattr(name, value, raising=False)  # some are younger than our oldest libraries
        monkeypatch.setattr(sys, "path", list(sys.path))  # transformers appends its modules' folder
        for name in code_from_hubs():
            monkeypatch.delitem(sys.modules, name)
        with warnings.catch_warnings():
            # how it uploads to LFS itself: https://github.com/huggingface/huggingface_hub/blob/v2.4.0/src/huggingface_hub/lfs.py
            warnings.filterwarnings("ignore", "Use 'content=<...>' to upload raw bytes", DeprecationWarning)
            yield served
    for name in code_from_hubs():
        del sys.modules[name]


@pytest.fixture
def impatient(monkeypatch) -> None:
    """The client gives up at once; it repeats its requests for 23 s otherwise, and hf_xet for three minutes."""
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_BASE_DELAY", "1ms")
    # a session reads them when it begins
    monkeypatch.setattr("huggingface_hub.utils._xet._GLOBAL_XET_HOLDER", _xet.XetSessionHolder())


def environment(hub: LocalHub, tmp_path: Path) -> dict[str, str]:
    """The variables with which a new process talks to the hub, as its owner."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": hub.token,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": str(int(not hub.large_files.xet)),
        "HF_HUB_OFFLINE": "0",
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # datasets asks another server for it
    }


def settings(hub: LocalHub, tmp_path: Path) -> dict[str, object]:
    """What the imported libraries have made of these variables."""
    home = tmp_path / "home"
    return {
        "huggingface_hub.constants.ENDPOINT": hub.url,
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "huggingface_hub.constants.HF_HOME": str(home),
        "huggingface_hub.constants.HF_HUB_CACHE": str(home / "hub"),
        "huggingface_hub.constants.HF_TOKEN_PATH": str(home / "token"),
        "huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY": True,
        "huggingface_hub.constants.HF_HUB_DISABLE_XET": not hub.large_files.xet,
        "huggingface_hub.constants.HF_HUB_OFFLINE": False,
        "huggingface_hub.hf_api.api.endpoint": hub.url,
        "transformers.utils.hub._hf_api": None,
        "transformers.utils.hub.HF_MODULES_CACHE": str(home / "modules"),
        "transformers.dynamic_module_utils.HF_MODULES_CACHE": str(home / "modules"),
        "datasets.config.HF_ENDPOINT": hub.url,
        "datasets.config.HUB_DATASETS_URL": hub.url + "/datasets/{repo_id}/resolve/{revision}/{path}",
        "datasets.config.HF_HUB_OFFLINE": False,
        "datasets.config.HF_UPDATE_DOWNLOAD_COUNTS": False,
        "datasets.config.HF_DATASETS_CACHE": home / "datasets",
        "datasets.config.HF_MODULES_CACHE": home / "modules",
        "datasets.config.DOWNLOADED_DATASETS_PATH": str(home / "datasets" / "downloads"),
    }


def code_from_hubs() -> list[str]:
    """Modules that were imported from repositories; the folder that the first came from is remembered for all."""
    return [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]
