"""`RESULTS.md` from the JSON lines in `results/`: one section per run, newest first, with a plot where batches differ.

python -m benchmarks.results
"""

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib import rcParams
from matplotlib.figure import Figure

from benchmarks.samplers_report import read, table

HERE = Path(__file__).parent
HEAD = """# Results

Made from the JSON lines in `results/` by `python -m benchmarks.results`; `make bench` measures a machine of yours.
Contenders take turns within one run, so ratios hold where single times drift. In brackets: least and greatest
round, or 10 and 90 % of distances.
"""
STEP = re.compile(r"(?P<model>.+), batch (?P<batch>\d+): (?P<contender>.+)")
Curves = dict[str, dict[str, list[tuple[int, float]]]]  # by model and contender: (batch, image-steps per second)


def curves(lines: list[dict[str, Any]]) -> Curves:
    """What was measured at three batches or more."""
    found: Curves = defaultdict(lambda: defaultdict(list))
    for line in lines:
        if line["unit"] == "ms/step" and (match := STEP.fullmatch(line["name"])):
            batch = int(match["batch"])
            found[match["model"]][match["contender"]].append((batch, 1000 * batch / line["value"]))
    return {model: each for model, each in found.items() if all(len(points) > 2 for points in each.values())}


def draw(found: Curves, target: Path) -> None:
    """Image-steps per second over the batch, one panel per model."""
    figure = Figure(figsize=(5 * len(found), 3.6), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, (model, each) in zip(panels, found.items(), strict=True):
        for contender, points in each.items():
            axes.plot(*zip(*points, strict=True), marker="o", lw=2.5 if contender == "ours" else 1.2, label=contender)
        axes.set(title=model, xlabel="batch", ylabel="image-steps per second", xscale="log")
        axes.set_ylim(bottom=0)
        axes.set_xticks(sorted({batch for points in each.values() for batch, _ in points}))
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.minorticks_off()
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
    figure.savefig(target, metadata={"Date": None})


def section(file: Path) -> str:
    """A run as a heading, its machine, a plot and a table."""
    first, *lines = [json.loads(line) for line in file.read_text().splitlines()]
    machine = ", ".join(f"{key} {value}" for key, value in first["machine"].items() if value)
    rows = [f"## {file.stem}", "", machine, ""]
    models = {f"{each['name']}: {each['digest']}" for line in lines if (each := line.get("model"))}
    rows += [text for model in sorted(models) for text in (f"`{model}`", "")]
    lines = [line for line in lines if "name" in line or "choice" in line]
    if "choice" in lines[0]:
        return "\n".join([*rows, table(read(file))])
    if found := curves(lines):
        draw(found, file.with_suffix(".svg"))
        rows += [f"![image-steps per second by batch](results/{file.stem}.svg)", ""]
    rows += ["| measure | median | |", "|---|---|---|"]
    for line in lines:
        spread = " … ".join(f"{end:.3f}" for end in line.get("spread", ()))
        rows.append(f"| {line['name']} | {line['value']:.3f} {line['unit']} | {spread and f'({spread})'} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    """Writes RESULTS.md."""
    rcParams["svg.hashsalt"] = "the same file for the same numbers"
    files = sorted((HERE / "results").glob("*.jsonl"), reverse=True)
    (HERE / "RESULTS.md").write_text("\n".join([HEAD, *map(section, files)]))


if __name__ == "__main__":
    main()
