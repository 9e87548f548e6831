"""What the package says of itself is said once, and its modules stand in one order."""

import ast
import configparser
import datetime
import json
import re
import subprocess
import sys
from importlib.metadata import metadata, version
from importlib.resources import files
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version


ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "zoo_hf"

# A module imports only from those above its own; nothing above config imports transformers.
ORDER = (
    "philox",
    "noise",
    "rounding",
    "low_rank",
    "kernels",
    "perturbation",
    "displaced",
    "named",
    "autocast",
    "population",
    "meter",
    "prediction",
    "failures",
    "probes",
    "estimators",
    "gradients",
    "descent",
    "update",
    "record",
    "trajectory",
    "replay",
    "interrupt",
    "distributed",
    "figures",
    "batches",
    "config",
    "callbacks",
    "own_objective",
    "procedure",
    "loading",
    "cards",
    "carry",
    "preparation",
    "objective",
    "origin",
    "recovery",
    "agreement",
    "pushing",
    "hub",
    "learning_rate",
    "trainer",
    "models",
    "tasks",
    "clm",
    "cli",
)
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def setup_cfg():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def requirements(extra=None):
    section = setup_cfg()["options.extras_require"][extra] if extra else setup_cfg()["options"]["install_requires"]
    return [Requirement(line) for line in section.splitlines() if line]


def imports(path):
    """Absolute names of the modules that a file imports, at its top or inside a function."""
    package = [*path.relative_to(ROOT).with_suffix("").parts][:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            # `from . import noise` imports modules by name
            yield from ([f"{source}.{alias.name}" for alias in node.names] if not node.module else [source])


def place(module):
    """Where a module of zoo_hf, by its absolute name, stands in the order."""
    return ORDER.index(module.split(".")[1])


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_module_imports_only_from_modules_above_it(path):
    own = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for name in imports(path):
        if name.startswith("zoo_hf."):
            above = place(name) < place(own)
            same_folder = place(name) == place(own) and path.parent != PACKAGE
            assert above or same_folder, f"{own} imports {name}"
        if name.split(".")[0] == "transformers":
            assert place(own) >= ORDER.index("config"), f"{own} imports transformers"


def test_every_package_that_is_imported_is_required():
    own = {"zoo_hf", *sys.stdlib_module_names}
    imported = {name.split(".")[0] for path in PACKAGE.rglob("*.py") for name in imports(path)} - own
    required = {canonicalize_name(r.name) for r in [*requirements(), *requirements("plot"), *requirements("harness")]}
    # triton comes with torch on the machines that have its kernels; fla and flashrnn are used where they are installed
    assert {canonicalize_name(name) for name in imported} - {"triton", "fla", "flashrnn"} <= required


def test_setup_cfg_says_what_the_package_is_and_pyproject_how_it_is_built():
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    tables = set(re.findall(r"^\[+([\w.]+)\]+", pyproject, flags=re.MULTILINE))
    assert "project" not in {table.split(".")[0] for table in tables}
    assert "tool.setuptools" not in {".".join(table.split(".")[:2]) for table in tables}
    sections = {section.split(".")[0] for section in setup_cfg().sections()}
    assert sections == {"metadata", "options"}, "tools are set up in pyproject.toml"


def test_no_version_of_python_stands_in_pyproject():
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert not re.search(r"(requires-python|target-version|python_version)", pyproject)


def test_the_installed_package_is_this_version():
    assert version("zoo_hf") == setup_cfg()["metadata"]["version"]
    assert metadata("zoo_hf")["License-Expression"] == "Apache-2.0"


def test_every_package_that_is_required_is_imported():
    imported = {name.split(".")[0] for path in PACKAGE.rglob("*.py") for name in imports(path)}
    unused = {canonicalize_name(r.name) for r in requirements()} - {canonicalize_name(name) for name in imported}
    # huggingface_hub writes cards with jinja2, accelerate looks for peft's adapters; neither requires its package
    assert unused <= {"jinja2", "peft"}


def test_the_changelog_and_the_citation_name_this_version_and_one_date():
    changelog, citation = ((ROOT / name).read_text(encoding="utf-8") for name in ("CHANGELOG.md", "CITATION.cff"))
    version, date = re.search(r"^## (\S+) \((\S+)\)$", changelog, flags=re.MULTILINE).groups()
    assert version == setup_cfg()["metadata"]["version"]
    cited = dict(re.findall(r"^(version|date-released): (\S+)$", citation, flags=re.MULTILINE))
    assert cited == {"version": version, "date-released": date}
    assert datetime.date.fromisoformat(date)


def test_files_that_are_no_code_are_installed():
    declared = setup_cfg()["options.package_data"]["zoo_hf"].split(", ")
    others = {
        path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.*") if path.suffix not in (".py", ".pyc")
    }
    assert set(declared) == others
    assert all(files("zoo_hf").joinpath(name).is_file() for name in declared)


@pytest.mark.parametrize("extra", [None, "plot", "harness", "test", "dev"])
def test_every_requirement_is_pinned_within_its_range(extra):
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    for python in ("3.10", "3.11", "3.12", "3.13"):
        at = {
            canonicalize_name(pin.name): str(pin.specifier).removeprefix("==")
            for pin in pins
            if pin.marker is None or pin.marker.evaluate({"python_version": python})
        }
        for requirement in requirements(extra):
            if requirement.name != "zoo_hf":
                pinned = at[canonicalize_name(requirement.name)]
                assert Version(pinned) in requirement.specifier, f"{requirement} on Python {python}: {pinned}"


# constraints-lowest.txt says why
WITH_TRANSFORMERS = {"transformers", "datasets", "huggingface-hub", "safetensors", "tokenizers"}


@pytest.mark.parametrize("extra", [None, "plot", "harness", "test", "dev"])
def test_the_lowest_versions_that_ci_tests_are_the_lowest_allowed(extra):
    lines = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    at = {canonicalize_name(pin.name): Version(str(pin.specifier).removeprefix("==")) for pin in pins}
    for requirement in requirements(extra):
        if requirement.name != "zoo_hf":
            (lowest,) = (Version(bound.version) for bound in requirement.specifier if bound.operator == ">=")
            pin = at[canonicalize_name(requirement.name)]
            assert pin == lowest or (requirement.name in WITH_TRANSFORMERS and pin > lowest), requirement.name


def test_ci_tests_every_python_that_is_declared_and_the_lowest_versions_on_the_first():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    declared = re.findall(r":: (3\.\d+)$", setup_cfg()["metadata"]["classifiers"], flags=re.MULTILINE)
    assert f"python-version: {declared}".replace("'", '"') in workflow
    lowest = re.search(r'python-version: "(\S+)"\n +constraints: constraints-lowest.txt', workflow).group(1)
    assert [lowest, f">={lowest}"] == [declared[0], setup_cfg()["options"]["python_requires"]]


def commands():
    """The commands of the README, in the order in which they stand."""
    return re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.M | re.S)


def test_the_readme_opens_with_training_and_testing_each_from_nothing():
    train, test, *_ = commands()
    for command in (train, test):
        assert command.startswith("python -m venv .venv && .venv/bin/pip install -c constraints.txt ")
    assert "examples/run_clm.py" in train
    assert '".[test]"' in test
    assert "-m pytest" in test


PAGES = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_a_page_links_to_and_runs_exists(page):
    text = page.read_text(encoding="utf-8")
    headings = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in re.findall("^#+ (.*)$", text, flags=re.M)}
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        assert link[1:] in headings if link.startswith("#") else (page.parent / link).exists(), link
    for script in re.findall(r"\b(?:benchmarks|examples)/[\w/]+\.\w+", text):
        assert (ROOT / script).exists(), script


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_tables_of_a_page_are_those_of_the_results(page, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from report import RESULTS, table, with_table

    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"<!-- (\w+) -->", text):
        if (RESULTS / f"{name}.json").exists():
            rows = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
            assert with_table(text, name, table(rows)) == text, name


@pytest.mark.skipif(sys.platform == "win32", reason="needs bash")
def test_ci_runs_the_second_command_of_the_readme_and_returns_its_status(tmp_path):
    """In a copy whose README holds another second command, `.ci/run` executes that one, in a folder of its own."""
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci" / "run").write_bytes((ROOT / ".ci" / "run").read_bytes())
    blocks = ["echo first", "pwd && ls && exit 7", "echo third"]
    other = "Text.\n\n```python\nraise SystemExit(9)\n```\n\n"
    fenced = "\n\n".join(f"{other}```bash\n{block}\n```" for block in blocks)
    (tmp_path / "README.md").write_text(f"# Title\n\n{fenced}\n")
    (tmp_path / ".venv").mkdir()
    done = subprocess.run(["bash", tmp_path / ".ci" / "run"], capture_output=True, text=True, cwd="/", timeout=60)
    assert done.returncode == 7, done.stderr
    shown, folder, *listed = done.stdout.splitlines()
    assert shown == blocks[1]
    assert folder != str(tmp_path)
    assert not Path(folder).exists(), "the copy is removed"
    assert listed == ["README.md"]
