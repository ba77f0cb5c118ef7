"""Training data for the recipe without a download: facts hidden in text, then questions with their answers, as JSONL.

python -m recipes.soft_mask_sft.facts_data --out build/facts.jsonl --rows 512 --tokens 4096
"""

import argparse
import json
from pathlib import Path

from recipes.pocket_lm.tokenizer import load_tokenizer
from unique_hf.facts import make_haystack
from unique_hf.text import topics


def rows(count, tokens, seed=0):
    """Yields `{"text": ...}`: a haystack of about `tokens` tokens with as many questions as facts at its end."""
    tokenizer, source = load_tokenizer(), topics(held_out=False)
    for index in range(count):
        # a fact with three near-duplicates takes about 80 tokens, its question with the answer 30
        facts = max(1, tokens // 256)
        haystack = make_haystack(tokenizer, source, tokens - 36 * facts, facts, seed + index, split="train")
        asked = "".join(f"{question} {answer}" for question, answer in zip(haystack.questions, haystack.answers))
        yield {"text": haystack.context + asked}


def main():
    """Writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=4096, help="about this many per row")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w") as file:
        for row in rows(args.rows, args.tokens, args.seed):
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
