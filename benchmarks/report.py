"""What the benchmarks share: a table for the terminal, and results as JSON and a plot in `benchmarks/results/`."""

import json
from collections.abc import Callable
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
    RESULTS.mkdir(exist_ok=True)
    stem = name + ("_" + torch.cuda.get_device_name().replace(" ", "_") if torch.cuda.is_available() else "")
    about = {"device": hardware()} | versions()
    (RESULTS / f"{stem}.json").write_text(json.dumps({"machine": about, "rows": rows}, indent=1, ensure_ascii=False))
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.grid(alpha=0.3)
    plot(axes, rows)
    figure.suptitle(f"{about['device']}, torch {about['torch']}", fontsize=9)
    figure.savefig(RESULTS / f"{stem}.png", dpi=150)
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        page.write_text(with_table(text, stem, table(rows)), encoding="utf-8")
    print(f"written: {RESULTS / stem}.json, .png")


def with_table(page: str, name: str, shown: str) -> str:
    """The page with a table between the marks that bear its name, if it has them."""
    before, after = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    if before not in page:
        return page
    head, _, rest = page.partition(before)
    return f"{head}{before}{shown}\n{after}{rest.partition(after)[2]}"
