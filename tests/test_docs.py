"""The site of docs/ is made of what is there: pages, names, versions. CI builds it; this needs no mkdocs."""

import json
import re
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from test_packaging import requirements

import zoo_hf
import zoo_hf.tasks


ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def pages(nav):
    """What a part of the navigation names, in its order."""
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in pages(part)]


def settings():
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def test_the_navigation_names_every_page_of_docs_once_and_nothing_else():
    there = [page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")]
    assert sorted(pages(settings()["nav"])) == sorted(there)


def test_the_site_is_strict_and_fetches_no_font():
    assert settings()["strict"] is True
    assert settings()["theme"]["font"] is False


@pytest.mark.parametrize("module", [zoo_hf, zoo_hf.tasks], ids=lambda module: module.__name__)
def test_every_public_name_stands_in_the_api_once(module):
    shown = re.findall(r"^::: ([\w.]+)$", (DOCS / "api.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    # the module `replay` has the name of its function
    shown = [name.replace("zoo_hf.replay.replay", "zoo_hf.replay") for name in shown]
    names = [name.removeprefix(f"{module.__name__}.") for name in shown if name.startswith(f"{module.__name__}.")]
    assert sorted(name for name in names if "." not in name) == sorted(module.__all__)


def test_the_comparison_has_the_figures_of_the_measured_runs():
    rows = json.loads((ROOT / "benchmarks" / "results" / "against_bptt.json").read_text(encoding="utf-8"))["rows"]
    text = (DOCS / "comparison.md").read_text(encoding="utf-8")
    for row in rows:
        (line,) = re.findall(rf"^\| {row['training']}.*$", text, flags=re.MULTILINE)
        cost = f"{row['steps']:,} | {row['forward passes']:,} | {row['seconds']:.3g}"
        assert line.endswith(f"| {cost} | {row['validation loss']:.2f} |"), line


def test_ci_builds_the_site_with_the_pinned_versions():
    assert "run: mkdocs build" in (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    for requirement in requirements("docs"):
        versions = [str(pin.specifier).removeprefix("==") for pin in pins if pin.name == requirement.name]
        assert versions, requirement.name
        assert all(version in requirement.specifier for version in versions), requirement.name
