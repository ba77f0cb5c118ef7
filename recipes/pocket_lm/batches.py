"""Training batches: token ids and, per token, what predicting it is worth. numpy only; runs in worker processes.

A row is one of: `repeat` (a random segment, later again), `mqar` (random keys with random values, then the keys again
in another order: multi-query associative recall), `text`, `pure` (facts and questions only) and `hay` (facts and
questions spread over text). Kinds of a target token: 0 none, 1 text, 2 repeat, 3 mqar, 4 first token of an answer that
takes retrieval, 5 the rest of it.
"""

import random
from dataclasses import dataclass, field

import numpy as np

from unique_hf import facts

KIND_NAMES = ("none", "text", "repeat", "mqar", "fact", "rest")
NONE, TEXT, REPEAT, MQAR, FIRST, REST = range(6)
END_ID = 0


@dataclass(frozen=True)
class Spec:
    """What one batch is made of."""

    length: int
    rows: int
    mix: dict = field(hash=False)  # row kind -> weight
    alphabet: int  # random tokens in use by repeat and mqar
    key_tokens: int = 1  # most tokens of an mqar key
    value_tokens: int = 1
    level: facts.Level = facts.FULL
    density: tuple = (0.08, 0.8)  # share of a hay row that is facts and questions, log-uniform


class Batches:
    """Builds batches from token ids of the text; deterministic in `(spec, seed)`.

    Args:
        tokenizer (`tokenizers.Tokenizer`): The committed one.
        text_ids (`np.ndarray`): uint16, documents separated by `END_ID`.
    """

    def __init__(self, tokenizer, text_ids):
        self.text_ids = text_ids
        self.tokenizer = tokenizer
        self.cache = {}
        strings = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
        newline = np.array([s.endswith("Ċ") for s in strings])
        stop = np.array([s.endswith(".") for s in strings])
        spaced = np.array([s.startswith(("Ġ", "Ċ")) for s in strings])
        after_line, after_stop = newline[text_ids[:-1]], stop[text_ids[:-1]] & spaced[text_ids[1:]]
        # places where a sentence can go in: positive positions follow a line, negative ones a full stop
        self.gaps = np.flatnonzero(after_line | after_stop) + 1
        self.gap_is_line = after_line[self.gaps - 1]
        self.symbols = np.random.default_rng(7).permutation(np.arange(1, tokenizer.get_vocab_size())).astype(np.int32)

    def build(self, spec, seed):
        """`(ids, kinds)`, int32 and uint8, `[rows, length + 1]`; `kinds[:, t]` is the kind of target `ids[:, t]`."""
        rng = np.random.default_rng(seed)
        names = sorted(name for name in spec.mix if spec.mix[name] > 0)
        weights = np.array([spec.mix[name] for name in names])
        # systematic sampling: few rows of a long batch still cover the mix
        points = (np.arange(spec.rows) + rng.random()) / spec.rows * weights.sum()
        counts = np.bincount(np.searchsorted(weights.cumsum(), points), minlength=len(names))
        parts = [getattr(self, "_" + name)(spec, int(n), rng) for name, n in zip(names, counts) if n]
        ids = np.concatenate([part[0] for part in parts])
        kinds = np.concatenate([part[1] for part in parts])
        kinds[:, 0] = NONE
        return ids, kinds

    def _repeat(self, spec, rows, rng):
        width = spec.length + 1
        ids = self.symbols[rng.integers(0, spec.alphabet, (rows, width))]
        kinds = np.zeros((rows, width), np.uint8)
        for row in range(rows):
            size = int(rng.integers(min(8, width // 4), width // 2 + 1))
            first = int(rng.integers(0, width - 2 * size + 1))
            second = int(rng.integers(first + size, width - size + 1))
            ids[row, second : second + size] = ids[row, first : first + size]
            kinds[row, second + 2 : second + size] = REPEAT
        return ids, kinds

    def _mqar(self, spec, rows, rng):
        """Rows share key and value length; keys of several tokens come from a small set, so they share tokens."""
        width = spec.length + 1
        k, v = int(rng.integers(1, spec.key_tokens + 1)), int(rng.integers(1, spec.value_tokens + 1))
        n = min(width // (2 * (k + v)), 2048, spec.alphabet // 2 if k == 1 else 1 << 30)
        n = int(rng.integers(max(1, n // 2), n + 1))
        base = n if k == 1 else min(spec.alphabet, max(3, round((2 * n) ** (1 / k)) + 1))
        codes = rng.random((rows, max(n, min(base**k, 4 * n)))).argsort(1)[:, :n]  # distinct per row
        keys = np.stack([codes // base**i % base for i in range(k)], axis=-1)
        subset = self.symbols[rng.random((rows, spec.alphabet)).argsort(1)[:, : max(base, n)]]
        keys = np.take_along_axis(subset, keys.reshape(rows, -1), 1).reshape(rows, n, k)
        values = self.symbols[rng.integers(0, spec.alphabet, (rows, n, v))]
        pairs = np.concatenate([keys, values], axis=-1).astype(np.int32)
        order = rng.random((rows, n)).argsort(1)[:, :, None]
        asked = np.take_along_axis(pairs, order, 1)
        block = np.concatenate([pairs.reshape(rows, -1), asked.reshape(rows, -1)], axis=1)
        kinds = np.zeros((rows, n, k + v), np.uint8)
        kinds[:, :, k:] = MQAR
        kinds = np.concatenate([np.zeros((rows, n * (k + v)), np.uint8), kinds.reshape(rows, -1)], axis=1)
        pad = width - block.shape[1]  # random tokens in front
        ids = np.concatenate([self.symbols[rng.integers(0, spec.alphabet, (rows, pad))], block], axis=1)
        return ids, np.pad(kinds, ((0, 0), (pad, 0)))

    def _text(self, spec, rows, rng):
        width = spec.length + 1
        starts = rng.integers(0, len(self.text_ids) - width, rows)
        ids = self.text_ids[starts[:, None] + np.arange(width)].astype(np.int32)
        return ids, np.full(ids.shape, TEXT, np.uint8)

    def _pure(self, spec, rows, rng):
        return self._fact_rows(spec, rows, rng, lambda: 0.95)

    def _hay(self, spec, rows, rng):
        low, high = np.log(spec.density)
        return self._fact_rows(spec, rows, rng, lambda: float(np.exp(rng.uniform(low, high))))

    def _fact_rows(self, spec, rows, rng, draw_share):
        width = spec.length + 1
        ids, kinds = np.empty((rows, width), np.int32), np.empty((rows, width), np.uint8)
        for row in range(rows):
            ids[row], kinds[row] = self._fact_row(spec, width, max(draw_share(), 52 / width), rng)
        return ids, kinds

    def _fact_row(self, spec, width, share, rng):
        draw = random.Random(int(rng.integers(1 << 62)))
        events, used = self._events(spec, int(width * share), draw)
        room = width - used
        spare = len(events) + 8  # the variants of a statement differ by a token or two
        start = int(rng.integers(0, len(self.text_ids) - width - spare))
        pieces, kinds, position = [], [], start
        for place, is_statement, variants in events:
            gap = int(np.searchsorted(self.gaps, start + int(place * room)))
            cut = min(int(self.gaps[min(gap, len(self.gaps) - 1)]), start + room)
            if cut > position:
                pieces.append(self.text_ids[position:cut])
                kinds.append(np.full(cut - position, TEXT, np.uint8))
                position = cut
            inline = is_statement and cut < start + room and not self.gap_is_line[min(gap, len(self.gaps) - 1)]
            tokens, token_kinds = variants[1 if inline else 0]
            pieces.append(tokens)
            kinds.append(token_kinds)
        rest = start + room - position + spare
        pieces.append(self.text_ids[position : position + rest])
        kinds.append(np.full(rest, TEXT, np.uint8))
        return np.concatenate(pieces)[:width], np.concatenate(kinds)[:width]

    def _events(self, spec, budget, draw):
        """Statements and questions by place in [0, 1], and their tokens; questions come after their fact."""
        sampler = facts.FactSampler(draw, "train", spec.level)
        at_end, asked_share = draw.random() < 0.5, draw.uniform(0.6, 1.0)
        events, used, queue = [], 0, []
        while True:
            if not queue:
                queue = sampler.cluster(draw.randint(0, spec.level.duplicates))
            fact = queue.pop()
            statement = self._statement(fact, draw.randrange(spec.level.forms))
            cost, place = len(statement[0][0]), draw.random()
            asked = not events or draw.random() < asked_share
            if asked:
                question = self._question(fact, draw.randrange(min(spec.level.forms, len(facts.QUESTIONS))))
                cost += len(question[0])
            if used + cost > budget and events:
                break
            used += cost
            if not at_end:
                place *= 0.95
            events.append((place, True, statement))
            if asked:
                # ties in place are impossible but for 1.0, where only questions are
                later = 1.0 + draw.random() if at_end else place + (1.0 - place) * draw.random()
                events.append((later, False, (question, question)))
        events.sort(key=lambda event: event[0])
        return [(min(place, 1.0), *rest) for place, *rest in events], used

    def _tokens(self, fragments):
        ids = []
        for fragment in fragments:
            known = self.cache.get(fragment)
            if known is None:
                known = self.tokenizer.encode(fragment, add_special_tokens=False).ids
                if len(self.cache) < 1 << 17:
                    self.cache[fragment] = known
            ids.extend(known)
        return ids

    def _statement(self, fact, form):
        """As a line of its own, and as a sentence after another one; the answer cannot be foreseen: kind 0."""
        words = fact.fragments(facts.STATEMENTS[form])
        variants = []
        for fragments in ([*words, "\n"], [" " + words[0], *words[1:]]):
            tokens = np.array(self._tokens(fragments), np.int32)
            kinds = np.full(len(tokens), TEXT, np.uint8)
            tail = len(self._tokens(facts.answer_fragments(fact.answer)))
            after = len(fragments) - fragments.index(".")
            kinds[len(tokens) - after - tail : len(tokens) - after] = NONE
            variants.append((tokens, kinds))
        return variants

    def _question(self, fact, form):
        prompt = self._tokens(fact.fragments(facts.QUESTIONS[form]))
        answer = [*self._tokens(facts.answer_fragments(fact.answer)), END_ID]
        kinds = [TEXT] * len(prompt) + [REST] * len(answer)
        # a number starts with a space token that says nothing about which number
        kinds[len(prompt) + (1 if fact.answer.isdigit() else 0)] = FIRST
        return np.array([*prompt, *answer], np.int32), np.array(kinds, np.uint8)
