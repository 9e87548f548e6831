"""How mkdocs reads pages that are written for GitHub, and how mkdocstrings reads fields of dataclasses.

Links of a page may leave `docs/`: to a picture in `benchmarks/results/`, to an example, to a module. What they name is
put into the site under its path in the repository, a picture as it is, text as a page, and the links follow.
"""

import ast
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page


ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
LINK = re.compile(r"(?<=\]\()[^)#\s]+")  # without its anchor
LANGUAGES = {".py": "python", ".txt": "text", ".cfg": "ini", ".toml": "toml", ".yml": "yaml"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is linked to and stands elsewhere in the repository."""
    waiting = [DOCS / file.src_uri for file in files.documentation_pages()]
    while waiting:
        page = waiting.pop()
        for path in linked(page):
            if not path.is_relative_to(DOCS) and files.get_file_from_path(place(path)) is None:
                files.append(outside(path, config))
                waiting += [path] if path.suffix == ".md" else []
    return files


def on_page_markdown(markdown: str, page: Page, **kwargs: Any) -> str:
    """Let links name places in the site instead of places in the repository."""
    path, here = source(page.file.src_uri), posixpath.dirname(page.file.src_uri)

    def moved(link: re.Match[str]) -> str:
        target = (path.parent / link[0]).resolve()
        return posixpath.relpath(place(target), here or ".") if target.is_file() else link[0]

    return LINK.sub(moved, markdown) if path.suffix == ".md" else markdown


def linked(page: Path) -> Iterator[Path]:
    """Files of the repository that a page links to."""
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        target = (page.parent / link).resolve()
        if target.is_file() and target.is_relative_to(ROOT):
            yield target


def place(path: Path) -> str:
    """Where a file of the repository stands in the site; other text than Markdown gets a page around it."""
    inside = path.relative_to(DOCS if path.is_relative_to(DOCS) else ROOT).as_posix()
    return f"{inside}.md" if path.suffix in LANGUAGES else inside


def source(src_uri: str) -> Path:
    """The file of the repository that stands there, the inverse of `place`."""
    inside = DOCS / src_uri
    return inside if inside.exists() else next(p for p in (ROOT / src_uri, ROOT / src_uri[:-3]) if p.exists())


def outside(path: Path, config: MkDocsConfig) -> File:
    """A file from outside of `docs/`."""
    if path.suffix not in LANGUAGES:
        return File.generated(config, place(path), abs_src_path=str(path), inclusion=InclusionLevel.NOT_IN_NAV)
    name = path.relative_to(ROOT).as_posix()
    content = f"# {name}\n\n~~~~ {LANGUAGES[path.suffix]}\n{path.read_text(encoding='utf-8')}\n~~~~\n"
    return File.generated(config, place(path), content=content, inclusion=InclusionLevel.NOT_IN_NAV)


class Arguments(griffe.Extension):
    """Defaults and types of arguments, where they stand in other places than griffe looks for them."""

    def on_attribute_instance(self, *, node: Any, attr: griffe.Attribute, **kwargs: Any) -> None:
        """A field of a dataclass shows its default, and the help in its metadata is its docstring."""
        value = node.value if isinstance(node, ast.AnnAssign) else None
        given = {keyword.arg: keyword.value for keyword in value.keywords} if isinstance(value, ast.Call) else {}
        if {"default", "metadata"} <= given.keys():
            attr.docstring = griffe.Docstring(ast.literal_eval(given["metadata"])["help"], parent=attr)
            attr.value = griffe.get_expression(given["default"], parent=attr.parent, parse_strings=False)

    def on_class_instance(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """Configurations say it as those of transformers do: name (`type`, defaults to `value`), or *optional*."""
        if cls.docstring is None or "`, defaults to `" not in cls.docstring.value:
            return
        cls.docstring.parser = griffe.Parser.google
        cls.docstring.parser_options = {"warn_unknown_params": False, "warn_missing_types": False}
        for section in cls.docstring.parsed:
            for argument in section.value if section.kind is griffe.DocstringSectionKind.parameters else []:
                kind, _, default = str(argument.annotation).rpartition(", ")
                argument.annotation = kind.replace("`", "")
                argument.value = default.removeprefix("defaults to ").strip("`").replace("*optional*", "None")
