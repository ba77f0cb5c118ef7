"""Render the tables of measured figures in README.md from `benchmarks/results`; `--write` puts them there."""

from __future__ import annotations

import json
from pathlib import Path

import readme

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- results: docs/results_table.py --write -->", "<!-- end of results -->"
# batch, context: the cases of the decode table
SETTINGS = {(4, "int4"), (8, "bf16"), (8, "int4"), (16, "int8"), (32, "int4")}
# super-pages; rows from before there were any lack the key
SUPER_PAGES = {None, (16, 4096), (32, 2048), (32, 3072), (32, 4096)}
CASES = [(80, 32768), (16, 131072), (1, 131072), (1, 32768), (1, 1048576), (8, 4096), (1, 4096)]


def load(name: str) -> dict:
    """A results file.

    Args:
        name (`str`): Its name in `benchmarks/results`.
    Returns:
        `dict`: `environment`, `rows` and further facts.
    """
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text())


def decode_table() -> list[str]:
    """One row per case and setting, slowest setting first."""
    results = load("decode_h200.json")
    environment = results["environment"]
    lines = [
        f"Decode attention of one layer ({environment['gpu']}, torch {environment['torch']}, bf16, 32 query and 8 kv "
        "heads of 128, budget 512, in a CUDA graph; the fastest of FlashInfer, cuDNN and flash SDPA in the run is "
        "dense; accuracy: 192 needles of the pocket model at 16k with exactly these settings; floor: bytes to be "
        f"read over 4.4 TB/s; {len(results['rows'])} rows are in the JSON):",
        "",
        "| batch x context | page, statistics | dense us | unique us | speedup | bytes floor us | needle accuracy |",
        "|---|---|---|---|---|---|---|",
    ]
    for batch, context in CASES:
        rows = [r for r in results["rows"] if (r["batch"], r["context"], r["head_dim"]) == (batch, context, 128)]
        shown = [row for row in rows if (row["page_size"], row["stats_dtype"]) in SETTINGS]
        shown = [row for row in shown if super_pages(row) in SUPER_PAGES]
        for row in sorted(shown, key=lambda row: row["speedup"]):
            accuracy, form = 100 * row["needle_accuracy"], f"{row['page_size']}, {row['stats_dtype']}"
            if super_pages(row):
                form += " in the best super-pages of {}, {:,} tokens".format(*super_pages(row))
            lines.append(
                f"| {batch} x {context:,} | {form} | {row['dense_us']:.0f} | "
                f"{row['us']:.1f} | {row['speedup']:.1f}x | {row['floor_us']:.1f} | {accuracy:.1f} % |"
            )
    return lines


def super_pages(row: dict) -> tuple[int, int] | None:
    """Size and budget of the super-pages of a row, `None` where every page was scored."""
    size = row.get("super_page_size")
    return None if size is None else (size, row["super_budget"])


def generate_table() -> list[str]:
    """One row per model, batch and context, each setting in a column of its own."""
    measured = [row for row in load("generate_h200.json")["rows"] if "ms" in row and "settings" in row]
    cases = dict.fromkeys((row["model"], row["batch"], row["context"]) for row in measured)
    forms = {row["settings"]: row for row in measured}
    said = "; ".join(
        f"{name}: pages of {row['page_size']}, {row['stats_dtype']}, budget {row['budget']:,}"
        + (", in the best super-pages of {}, {:,} tokens".format(*super_pages(row)) if super_pages(row) else "")
        for name, row in forms.items()
    )
    lines = [
        f"`generate` end to end, ms/token (random weights of Qwen3 shape, bf16, greedy; {said}; SDPA captured in the "
        "same run, with fused launches (*) or without; the vLLM figure is a stored one of the same GPU type, not of "
        "this run):",
        "",
        f"| model | batch x context | {' | '.join(forms)} | SDPA | vLLM 0.24 dense (stored) | revision |",
        f"|---|---|{'---|' * len(forms)}---|---|---|",
    ]
    for model, batch, context in cases:
        case = (model, batch, context)
        rows = {r["settings"]: r for r in measured if (r["model"], r["batch"], r["context"]) == case}
        cells = [f"{row['ms']:.2f}" if (row := rows.get(name)) else "-" for name in forms]
        first = next(iter(rows.values()))
        dense = "-" if first.get("dense_ms") is None else f"{first['dense_ms']:.1f}"
        cells.append(dense + ("*" if first.get("dense_fused_launches") else ""))
        stored = first["vllm_dense_ms_stored"]
        cells += ["-" if stored is None else f"{stored:.1f}", first["revision"][:7]]
        lines.append(f"| {model} | {batch} x {context:,} | {' | '.join(cells)} |")
    return lines


def render() -> str:
    """Both tables in Markdown.

    Returns:
        `str`: Without a trailing newline.
    """
    return "\n".join([*decode_table(), "", *generate_table()])


if __name__ == "__main__":
    readme.main(__doc__ or "", START, END, render)
