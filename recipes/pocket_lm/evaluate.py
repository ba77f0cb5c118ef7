"""Retrieval accuracy: facts hidden in text that was never trained on, each question answered from the same context.

The context is prefilled once; for each group of questions of equal length the cache is copied and repeated, the
question is fed (as one chunk, or token by token as a decoder would) and the answer is decoded greedily.

`python -m recipes.pocket_lm.evaluate --model models/pocket-lm --lengths 1024 8192 --attn sdpa`
"""

import argparse
import copy
import json
import math
import time
from pathlib import Path

import torch

from unique_hf.facts import make_haystack
from unique_hf.text import topics

ANSWER_TOKENS = 12


@torch.no_grad()
def answer_questions(model, haystack, feed="chunk", batch=64):
    """Decoded answer ids of every question of one haystack.

    Args:
        feed (`str`, *optional*, defaults to `"chunk"`): `"chunk"` reads the question in one forward (dense in any
            implementation), `"decode"` token by token, which is what sparse decode has to survive.
    Returns:
        `list[list[int]]`, without the end token, in the order of `haystack.questions`.
    """
    from transformers import DynamicCache

    if feed not in ("chunk", "decode"):
        raise ValueError(f'feed must be "chunk" or "decode", got {feed!r}')
    cache = DynamicCache(config=model.config)
    context = torch.tensor([haystack.input_ids], device=model.device)
    model(context, past_key_values=cache, use_cache=True, logits_to_keep=1)
    groups = {}
    for index, ids in enumerate(haystack.question_ids):
        groups.setdefault(len(ids), []).append(index)
    answers = [None] * len(haystack.question_ids)
    for indices in groups.values():
        for start in range(0, len(indices), batch):
            part = indices[start : start + batch]
            branch = copy.deepcopy(cache)
            branch.batch_repeat_interleave(len(part))
            ids = torch.tensor([haystack.question_ids[i] for i in part], device=model.device)
            for row, index in zip(_continue(model, branch, ids, feed), part):
                answers[index] = row
    return answers


def _continue(model, cache, ids, feed):
    for chunk in ids.split(1, dim=1) if feed == "decode" else [ids]:
        logits = model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    tokens, end = [], model.config.eos_token_id
    for _ in range(ANSWER_TOKENS):
        tokens.append(logits[:, -1].argmax(-1, keepdim=True))
        if bool((torch.cat(tokens, dim=1) == end).any(dim=1).all()):
            break
        logits = model(tokens[-1], past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return [row[: row.index(end)] if end in row else row for row in torch.cat(tokens, dim=1).tolist()]


def retrieval(model, tokenizer, lengths, contexts=2, num_facts=48, split="test", feed="chunk", seed=0, batch=64):
    """Exact-match accuracy per context length.

    Returns:
        `list[dict]` with `context, questions, correct, accuracy, numbers, words, distractors, seconds, misses`.
    """
    source = topics(held_out=True)
    rows = []
    for length in lengths:
        start, right, wrong, distractors = time.monotonic(), [], [], 0
        for index in range(contexts):
            count = min(num_facts, max(1, length // 128))
            haystack = make_haystack(tokenizer, source, length, count, seed + index, split)
            distractors += haystack.num_distractors
            for fact, ids in zip(haystack.facts, answer_questions(model, haystack, feed, batch)):
                answer = tokenizer.decode(ids).strip()
                right.append((answer == fact.answer, fact.answer.isdigit()))
                if answer != fact.answer:
                    wrong.append([fact.statement(), answer])
        correct = sum(ok for ok, _ in right)
        rows.append(
            {
                "context": length,
                "questions": len(right),
                "correct": correct,
                "accuracy": correct / len(right),
                "numbers": _mean([ok for ok, number in right if number]),
                "words": _mean([ok for ok, number in right if not number]),
                "distractors": distractors,
                "feed": feed,
                "split": split,
                "seconds": round(time.monotonic() - start, 2),
                "misses": wrong[:8],
            }
        )
    return rows


def _mean(values):
    return sum(values) / len(values) if values else None


@torch.no_grad()
def bits_per_byte(model, tokenizer, length=2048, windows=8):
    """Bits per byte on the held-out text: the plain language-model figure."""
    source = topics(held_out=True)
    ids = torch.tensor(tokenizer(source, add_special_tokens=False)["input_ids"][: length * windows])
    total, size = 0.0, 0
    for window in ids.to(model.device).split(length):
        logits = model(window[None]).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
        size += len(tokenizer.decode(window[1:].tolist()).encode())
    return total / size / math.log(2)


def main():
    """Evaluates a saved model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 8192, 16384, 32768])
    parser.add_argument("--contexts", type=int, default=2, help="haystacks per length")
    parser.add_argument("--num-facts", type=int, default=48, help="questions per haystack")
    parser.add_argument("--split", default="test", choices=("train", "validation", "test"))
    parser.add_argument("--feed", default="chunk", choices=("chunk", "decode"))
    parser.add_argument("--batch", type=int, default=64 if torch.cuda.is_available() else 4, help="questions at once")
    parser.add_argument("--attn", default="sdpa", help="attn_implementation; `unique` imports unique_hf")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if args.attn == "unique":
        import unique_hf  # noqa: F401  registers the attention function
    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda else torch.float32
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, attn_implementation=args.attn)
    model = model.to("cuda" if cuda else "cpu").eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = retrieval(
        model, tokenizer, args.lengths, args.contexts, args.num_facts, args.split, args.feed, args.seed, args.batch
    )
    for row in rows:
        print({key: value for key, value in row.items() if key != "misses"})
    if args.out:
        args.out.write_text(json.dumps({"model": str(args.model), "attn": args.attn, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
