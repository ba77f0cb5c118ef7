"""Byte-level BPE with single digits, trained on the machine's own text; the trained one is committed in `tokenizer/`.

`python -m recipes.pocket_lm.tokenizer --out recipes/pocket_lm/tokenizer` trains it again.
"""

import argparse
import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from recipes.pocket_lm.text import collect_text
from unique_hf import facts

FOLDER = Path(__file__).parent / "tokenizer"
END = "<|endoftext|>"
VOCAB_SIZE = 4096
WORD_WEIGHT = 3000  # occurrences of each task word, about the count of the rarest learnt token


def train_tokenizer(documents, vocab_size=VOCAB_SIZE):
    """Trains a `tokenizers.Tokenizer`; any bytes can be encoded, digits are always single tokens.

    Args:
        documents (iterable of `str`): Text.
        vocab_size (`int`, *optional*, defaults to 4096): Tokens, with the 256 bytes and `<|endoftext|>` (id 0).
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=16,
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def task_sentences(count=20_000, seed=0):
    """Statements, questions and the bare words of the task: they earn its words tokens of their own."""
    rng = random.Random(seed)
    lists = (
        facts.ADJECTIVES,
        facts.NOUNS,
        facts.NUMBER_ATTRIBUTES,
        facts.WORD_ATTRIBUTES,
        facts.COLOURS,
        facts.ANIMALS,
    )
    words = [word for words in (*lists, facts.FLOWERS, facts.FOODS, facts.METALS) for word in words]
    sentences = [" " + " ".join(words)] * WORD_WEIGHT
    while len(sentences) < WORD_WEIGHT + count:
        for fact in facts.FactSampler(rng, "train", facts.Level(names=0.1)).cluster(0):
            sentences.append(fact.statement(rng.randrange(len(facts.STATEMENTS))))
            sentences.append(fact.question(rng.randrange(len(facts.QUESTIONS))))
    return sentences


def save_tokenizer(tokenizer, folder, max_length):
    """Writes it as a transformers tokenizer that loads with `AutoTokenizer`."""
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(folder)


def load_tokenizer(folder=FOLDER):
    """The committed `tokenizers.Tokenizer`."""
    return Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))


def main():
    """Trains and saves."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE)
    parser.add_argument("--max-bytes", type=int, default=24 << 20)
    args = parser.parse_args()
    documents = collect_text(args.max_bytes)
    tokenizer = train_tokenizer([*documents, *task_sentences()], args.vocab_size)
    save_tokenizer(tokenizer, args.out, max_length=32768)
    size, tokens = sum(map(len, documents[:2000])), sum(len(tokenizer.encode(d).ids) for d in documents[:2000])
    print(f"{len(documents)} documents, {tokenizer.get_vocab_size()} tokens, {size / tokens:.2f} characters per token")


if __name__ == "__main__":
    main()
