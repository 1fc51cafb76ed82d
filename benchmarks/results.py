"""`RESULTS.md` from the JSON lines in `results/`: one section per run, newest first.

python -m benchmarks.results
"""

import json
from pathlib import Path

HERE = Path(__file__).parent
HEAD = """# Results

Made from the JSON lines in `results/` by `python -m benchmarks.results`; `make bench` measures a machine of yours.
Contenders take turns within one run, so ratios hold where single times drift. In brackets: least and greatest round.
"""


def section(file: Path) -> str:
    """A run as a heading, its machine, and a table."""
    first, *lines = [json.loads(line) for line in file.read_text().splitlines()]
    machine = ", ".join(f"{key} {value}" for key, value in first["machine"].items() if value)
    rows = [f"## {file.stem}", "", machine, "", "| measure | median | |", "|---|---|---|"]
    for line in lines:
        low, high = line.get("spread", (line["value"], line["value"]))
        rows.append(f"| {line['name']} | {line['value']:.3f} {line['unit']} | ({low:.3f} … {high:.3f}) |")
    return "\n".join(rows) + "\n"


def main() -> None:
    """Writes RESULTS.md."""
    files = sorted((HERE / "results").glob("*.jsonl"), reverse=True)
    (HERE / "RESULTS.md").write_text("\n".join([HEAD, *map(section, files)]))


if __name__ == "__main__":
    main()
