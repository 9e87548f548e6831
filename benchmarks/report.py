"""What the benchmarks share: a table for the terminal, and results as JSON and a plot in `benchmarks/results/`."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import torch


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # after the backend is chosen

from zoo_hf.procedure import hardware, versions


ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table; numbers get three significant digits."""
    cells = [list(rows[0]), *([shown(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def save_results(name: str, rows: list[dict], plot: Callable[[plt.Axes, list[dict]], None]) -> None:
    """Write `<name>.json` and `<name>.png`, and the table into every page that has a place for it.

    A GPU's results get its name, so that they stand beside the CPU's.
    """
    stem = name + ("_" + torch.cuda.get_device_name().replace(" ", "_") if torch.cuda.is_available() else "")
    write_results(stem, rows, plot, {"device": hardware()} | versions())


def write_results(
    stem: str,
    rows: list[dict],
    plot: Callable[[plt.Axes, list[dict]], None],
    machine: dict[str, str],
    *,
    folder: Path = RESULTS,
    pages: Sequence[Path] = PAGES,
) -> None:
    """`save_results` under any name, of a machine by its `device` and versions."""
    folder.mkdir(exist_ok=True)
    (folder / f"{stem}.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1, ensure_ascii=False))
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.grid(alpha=0.3)
    plot(axes, rows)
    figure.suptitle(f"{machine['device']}, torch {machine['torch']}", fontsize=9)
    figure.savefig(folder / f"{stem}.png", dpi=150)
    plt.close(figure)
    written = [f"{folder / stem}.json", ".png"]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        shown = with_table(text, stem, table(rows))
        if shown != text:
            page.write_text(shown, encoding="utf-8")
            written.append(page.name)
    print(f"written: {', '.join(written)}")


def with_table(page: str, name: str, shown: str) -> str:
    """The page with a table between the marks that bear its name, if it has them."""
    before, after = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    if before not in page:
        return page
    head, _, rest = page.partition(before)
    return f"{head}{before}{shown}\n{after}{rest.partition(after)[2]}"
