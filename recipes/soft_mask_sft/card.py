"""Installs a checkpoint that the arms shipped and renders its card; every number comes from the results file.

    python -m recipes.soft_mask_sft.card --facts model_cards/pocket-lm-unique.json --shipped OUT

`--shipped` is the folder that `arms.py` wrote: its `arms.json` becomes the results file that the facts name, and its
checkpoint of the task that they name is unpacked to their location. Without it only the card is rendered.
"""

import argparse
import json
import shutil
import tarfile
from pathlib import Path

from transformers import AutoConfig

from unique_hf.hub import render_card

ROOT = Path(__file__).parents[2]


def facts_of(results, task):
    """Tables of one arm for [`unique_hf.hub.render_card`].

    Args:
        results (`dict`): `arms.json`.
        task (`str`): Name of the arm.
    Returns:
        `dict`: `tables`.
    Raises:
        ValueError: the results do not hold the arm.
    """
    records = results["records"]
    own = next((record for record in records if record["task"] == task), None)
    if own is None:
        raise ValueError(f"expected an arm of {sorted({r['task'] for r in records})}, got {task!r}")
    same = [r for r in records if (r["page_size"], r["score"]) == (own["page_size"], own["score"])]
    arms = {"before": _find(same, "start", None), "dense control": _find(same, "dense", own["seed"]),
            "hard top-k": _find(same, "hard", own["seed"]), "this model": own}  # fmt: skip
    arms = {name: record for name, record in arms.items() if record is not None}
    return {"tables": [_accuracy(own, arms, results["plan"]), _training(results, own)]}


def _find(records, arm, seed):
    return next((r for r in records if r["arm"] == arm and seed in (None, r["seed"])), None)


def _cell(record, length, budget):
    return next(c for c in record["cells"] if (c["length"], c["budget"]) == (length, budget))


def _met(length, budget, plan):
    """Whether training had rows of that length, and, below a budget, the mask with one like it."""
    if budget is None:
        return str(length) in {**plan["lengths"], **plan["dense_lengths"]}
    least, most = plan["budgets"]
    return str(length) in plan["lengths"] and least <= budget <= most


def _accuracy(own, arms, plan):
    rows = []
    for cell in own["cells"]:
        length, budget = cell["length"], cell["budget"]
        kept = "all (dense)" if budget is None else f"{budget} ({100 * budget / length:.1f} %)"
        found = [f"{100 * _cell(record, length, budget)['accuracy']:.1f}" for record in arms.values()]
        rows.append([length, kept, "yes" if _met(length, budget, plan) else "no", cell["questions"], *found])
    return {
        "title": "Accuracy",
        "columns": ["context", "tokens kept", "trained at", "questions", *arms],
        "rows": rows,
        "note": f"Percent of exact answers, page size {own['page_size']}, score {own['score']}, questions read token "
        "by token by the sparse decoder, facts and text that training never saw, same questions in every column. All "
        "columns but the first were trained on the same data in the same order from the same start.",
    }


def _training(results, own):
    training, plan, environment = own["training"], results["plan"], results["environment"]
    schedule = training["schedule"]
    first, last = schedule["temperature"]
    lengths, dense = (", ".join(map(str, sorted(map(int, plan[name])))) for name in ("lengths", "dense_lengths"))
    factor = "as trained" if plan["mix"] == 1 else f"start + {plan['mix']:g} (trained - start)"
    chosen = "validation facts" if results["tuning"] else "no validation facts: the default of the recipe"
    rows = [
        ["steps, tokens a step", f"{plan['steps']}, {plan['tokens']}"],
        ["row lengths under the mask", lengths],
        ["row lengths of dense steps", dense],
        ["tokens kept", f"{plan['budgets'][0]} to {plan['budgets'][1]}, drawn per step"],
        ["dense steps", f"{100 * schedule['dense_share']:.0f} %"],
        ["temperature", f"{first:g} to {last:g} logits"],
        ["share of the base model's learning rates", f"{plan['rate']:g}"],
        ["gradient clipped to a norm of", f"{plan['clip']:g}"],
        ["weights", factor],
        ["plan chosen on", chosen],
        ["seconds", f"{training['seconds']:g}"],
        ["device", environment["device"]],
        ["versions", ", ".join(f"{name} {version}" for name, version in sorted(environment["versions"].items()))],
        ["revision, seed", f"{own.get('revision', results['revision'])}, {own['seed']}"],
    ]
    return {"title": "Training", "columns": ["", "value"], "rows": rows}


def install(shipped, results, task, target):
    """Puts what `arms.py` shipped where the card's facts say.

    Args:
        shipped (`Path`): `OUT` of the arms: `arms.json`, and a folder per checkpoint.
        results (`Path`): Becomes the results file.
        task (`str`): Name of the arm.
        target (`Path`): Becomes the checkpoint's folder; one that is there is replaced.
    Raises:
        ValueError: the arm was not measured or not shipped.
    """
    measured = json.loads((shipped / "arms.json").read_text())
    facts_of(measured, task)
    source = shipped / task
    if not (source / "meta.tar").is_file():
        raise ValueError(f"expected the checkpoint of {task} in {source}, there is none: run arms with --ship {task}")
    results.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(shipped / "arms.json", results)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for shard in sorted(source.glob("*.safetensors")):
        shutil.copyfile(shard, target / shard.name)
    with tarfile.open(source / "meta.tar") as archive:
        archive.extractall(target, filter="data")


def main():
    """Writes README.md into the checkpoint's folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--facts", type=Path, required=True)
    parser.add_argument("--shipped", type=Path, help="folder that arms.py wrote, to install from")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder that the paths in the facts start from")
    args = parser.parse_args()
    facts = json.loads(args.facts.read_text())
    if args.shipped is not None:
        install(args.shipped, args.root / facts["results"], facts["task"], args.root / facts["location"])
    results = json.loads((args.root / facts.pop("results")).read_text())
    location = facts.pop("location")
    facts |= facts_of(results, facts.pop("task"))
    render_card(AutoConfig.from_pretrained(args.root / location), location, facts).save(
        args.root / location / "README.md"
    )


if __name__ == "__main__":
    main()
