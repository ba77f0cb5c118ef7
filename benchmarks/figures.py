"""The README's figures, drawn from the JSON results: `python -m benchmarks.figures`.

`docs/img/front.png`: needle accuracy (quality.json) against the speedup of decode attention (decode_h200.json), a
point per setting. `docs/img/decode.png`: the speedup against the context length.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.decode import KEYS
from benchmarks.environment import RESULTS, ROOT

IMAGES = ROOT / "docs" / "img"
MARKERS = "osD^vP"
PAPER = {"page_size": 8, "stats_dtype": "bf16", "score": "scalar", "budget": 512, "super_page_size": None}


def read_results(path: Path) -> dict:
    """A results file.

    Raises:
        SystemExit: It is missing; the message names the command that makes it.
    """
    if not path.is_file():
        made_by = "benchmarks.quality" if path.name == "quality.json" else "benchmarks.decode"
        raise SystemExit(f"expected {path}, which does not exist: run `python -m {made_by}` on a GPU first")
    return json.loads(path.read_text())


def is_main_shape(row: dict) -> bool:
    """Whether a row has the head counts of the targets."""
    return (row["heads"], row["kv_heads"], row["head_dim"]) == (32, 8, 128)


def label(row: dict) -> str:
    """A setting in few words."""
    size = row.get("super_page_size")
    return f"{row['page_size']} {row['stats_dtype']}" + (f" in {size}/{row['super_budget']}" if size else "")


def join(decode: list[dict], quality: list[dict], context: int) -> list[dict]:
    """Decode rows with the accuracy that their settings had at `context`; rows without one are left out."""
    accuracy = {tuple(row.get(key) for key in KEYS): row for row in quality if row["context"] == context}
    joined = []
    for row in decode:
        found = accuracy.get(tuple(row.get(key) for key in KEYS))
        if found is not None and is_main_shape(row):
            joined.append({**row, "needle_accuracy": found["accuracy"], "dense_accuracy": found["dense_accuracy"]})
    return joined


def new_figure(width: float, height: float):
    """An empty figure with one axis, drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def save(figure, path: Path) -> None:
    """Write a figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def front(
    decode: dict, quality: dict, path: Path, cases=((80, 32768), (16, 131072)), context: int = 16384
) -> list[dict]:
    """Accuracy against speedup at budget 512, a point per setting and case; returns the rows drawn."""
    rows = [row for row in join(decode["rows"], quality["rows"], context) if row["budget"] == 512]
    rows = [row for row in rows if (row["batch"], row["context"]) in cases]
    if not rows:
        raise SystemExit(f"expected rows of the cases {cases} with settings that quality.json has, got none")
    figure, axis = new_figure(8, 4.5)
    for case, marker in zip(cases, MARKERS):
        drawn = [row for row in rows if (row["batch"], row["context"]) == case]
        name = f"batch {case[0]}, {case[1] // 1024}k tokens"
        points = axis.plot([row["speedup"] for row in drawn], [100 * row["needle_accuracy"] for row in drawn], marker,
                           linestyle="none", label=name, markersize=6)  # fmt: skip
        best: dict[float, dict] = {}
        for row in sorted(drawn, key=lambda row: row["speedup"]):
            best[row["needle_accuracy"]] = row
        for row in drawn:
            paper = all(row.get(key) == value for key, value in PAPER.items())
            if paper or row is best[row["needle_accuracy"]]:
                # the fastest of each accuracy; all others would only cover one another
                axis.annotate(
                    label(row) + (" (the paper's statistics)" if paper else ""),
                    (row["speedup"], 100 * row["needle_accuracy"]), textcoords="offset points",
                    xytext=(5, 5) if marker == MARKERS[0] else (5, -10), fontsize=7, color=points[0].get_color(),
                )  # fmt: skip
    axis.axhline(100 * rows[0]["dense_accuracy"], color="0.6", linewidth=1, linestyle="--")
    axis.annotate("dense", (1, 100 * rows[0]["dense_accuracy"]), textcoords="offset points", xytext=(0, 3), fontsize=7)
    axis.set_xlim(0, 1.2 * max(row["speedup"] for row in rows))
    axis.set(xlabel="speedup of decode attention over the fastest dense kernel",
             ylabel=f"needle accuracy at {context // 1024}k tokens (%)")  # fmt: skip
    axis.set_title(
        "page size, storage of the statistics, super-pages / tokens kept in them; budget 512; "
        f"{decode['environment']['gpu']}", fontsize=9,
    )  # fmt: skip
    axis.legend(fontsize=8, loc="lower left")
    axis.grid(alpha=0.3)
    save(figure, path)
    return rows


def speedups(decode: dict, path: Path) -> None:
    """Speedup against context, a line per batch and setting with at least two contexts."""
    figure, axis = new_figure(8, 4.5)
    rows = [row for row in decode["rows"] if is_main_shape(row) and row["budget"] == 512]
    lines: dict[tuple, dict] = {}
    for row in rows:
        lines.setdefault((row["batch"], label(row)), {})[row["context"]] = row["speedup"]
    settings = sorted({name for (_, name), points in lines.items() if len(points) > 1})
    batches = sorted({batch for batch, _ in lines})
    for (batch, name), points in sorted(lines.items()):
        if len(points) > 1:
            style = {"color": f"C{settings.index(name)}", "marker": MARKERS[batches.index(batch) % len(MARKERS)]}
            axis.plot(*zip(*sorted(points.items())), linewidth=1, label=f"batch {batch}, page {name}", **style)
    axis.axhline(1.0, color="0.6", linewidth=1, linestyle="--")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda x, _: f"{x / 1024:g}k" if x >= 1024 else f"{x:g}")
    axis.yaxis.set_major_formatter(lambda y, _: f"{y:g}x")
    axis.set(xlabel="context (tokens)", ylabel="speedup over the fastest dense kernel of the run")
    axis.set_title(
        f"decode attention, 32 query and 8 kv heads of 128, budget 512; {decode['environment']['gpu']}", fontsize=9
    )
    if axis.lines[1:]:
        axis.legend(fontsize=7)
    axis.grid(alpha=0.3)
    save(figure, path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--decode", type=Path, default=RESULTS / "decode_h200.json")
    parser.add_argument("--quality", type=Path, default=RESULTS / "quality.json")
    parser.add_argument("--out", type=Path, default=IMAGES)
    args = parser.parse_args(argv)
    decode = read_results(args.decode)
    speedups(decode, args.out / "decode.png")
    front(decode, read_results(args.quality), args.out / "front.png")


if __name__ == "__main__":
    main()
