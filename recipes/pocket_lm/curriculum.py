"""The curriculum: what is learnt in which order, and when to go on.

Retrieval circuits form on short rows with few symbols and are then stretched: alphabet, key and answer length, word
lists, sentence forms, text, length. A stage ends when its gates pass, or at its deadline (a share of the whole
training time), so that no stage can stall the run. The last stage lasts to the end.
"""

from dataclasses import dataclass, field

from recipes.pocket_lm.batches import Spec
from unique_hf.facts import FULL, Level


@dataclass(frozen=True)
class Stage:
    """One step of the curriculum; `gates` are the least accuracies per kind over the last steps at full length."""

    name: str
    length: int
    mix: dict
    deadline: float  # share of the training time at which it ends in any case
    gates: dict = field(default_factory=dict)
    alphabet: int = 4095
    key_tokens: int = 1
    value_tokens: int = 1
    level: Level = FULL
    shorter: dict = field(default_factory=dict)  # length -> share of the steps that use it instead
    min_steps: int = 30
    text_weight: float = 0.3

    def spec(self, tokens_per_step, draw):
        """The batch of one step; `draw` in [0, 1) chooses the length."""
        length = self.length
        for shorter, share in self.shorter.items():
            if draw < share:
                length = shorter
                break
            draw -= share
        return Spec(
            length=length, rows=max(1, tokens_per_step // length), mix=self.mix, alphabet=self.alphabet,
            key_tokens=self.key_tokens, value_tokens=self.value_tokens, level=self.level,
        )  # fmt: skip


def alphabets(first, last, growth):
    """Sizes from `first` to `last`; growth is `growth` up to 400 symbols and twice as fast (in logarithm) beyond."""
    sizes = [first]
    while sizes[-1] < last:
        sizes.append(min(last, round(sizes[-1] * (growth if sizes[-1] < 400 else growth**2))))
    return sizes


def h200():
    """About 8 minutes of one H200, 131k tokens a step, to 32k."""
    symbols = {"mqar": 0.6, "repeat": 0.4}
    stages = []
    sizes = alphabets(64, 4095, 1.3)
    for i, size in enumerate(sizes):
        stages.append(
            Stage(
                f"symbols {size}", 64, symbols, 0.22 + 0.04 * i / (len(sizes) - 1), {"repeat": 0.6, "mqar": 0.8},
                alphabet=size, min_steps=30 if size < 400 else 20,
            )
        )  # fmt: skip
    small = Level(vocabulary=0.1, names=0.0, words=0.0, forms=1, digits=(4, 4), duplicates=1)
    some = Level(vocabulary=0.25, names=0.0, words=0.1, forms=2, digits=(4, 5), duplicates=2)
    most = Level(vocabulary=0.6, names=0.2, words=0.25, forms=3, digits=(4, 6), duplicates=3)
    mixed = {"mqar": 0.3, "repeat": 0.05, "pure": 0.5, "text": 0.15}
    stages += [
        Stage("keys 128", 128, {"mqar": 0.75, "repeat": 0.15, "text": 0.1}, 0.29, {"mqar": 0.8},
              key_tokens=2, value_tokens=3),
        Stage("keys 256", 256, {"mqar": 0.75, "repeat": 0.15, "text": 0.1}, 0.33, {"mqar": 0.8},
              key_tokens=3, value_tokens=5),
        Stage("facts 128", 128, mixed, 0.37, {"fact": 0.8, "rest": 0.8}, key_tokens=3, value_tokens=5, level=small),
        Stage("facts 256", 256, mixed, 0.41, {"fact": 0.8, "rest": 0.85}, key_tokens=3, value_tokens=5, level=some),
        Stage("facts 512", 512, {"mqar": 0.2, "pure": 0.6, "text": 0.2}, 0.46, {"fact": 0.8, "rest": 0.85},
              key_tokens=3, value_tokens=5, level=most),
        Stage("hay 512", 512, {"mqar": 0.1, "pure": 0.3, "hay": 0.4, "text": 0.2}, 0.49, {"fact": 0.85, "rest": 0.9},
              key_tokens=3, value_tokens=5),
    ]  # fmt: skip
    hay = {"mqar": 0.05, "pure": 0.2, "hay": 0.6, "text": 0.15}
    long_hay = {"pure": 0.1, "hay": 0.75, "text": 0.15}
    gates = {"fact": 0.85, "rest": 0.9}
    deadlines = {1024: 0.52, 2048: 0.55, 4096: 0.59, 8192: 0.64, 16384: 0.72}
    for length, deadline in deadlines.items():
        stages.append(
            Stage(
                f"hay {length}", length, hay if length < 4096 else long_hay, deadline, gates, key_tokens=3,
                value_tokens=5, shorter={length // 2: 0.15, max(256, length // 8): 0.05}, text_weight=0.2,
            )
        )  # fmt: skip
    shorter = {16384: 0.25, 8192: 0.12, 4096: 0.05, 1024: 0.03}
    stages.append(Stage("hay 32768", 32768, long_hay, 1.0, shorter=shorter, text_weight=0.2))
    return stages


def smoke():
    """Seconds on two CPU cores: every kind of row and every transition, nothing is learnt."""
    tiny = Level(vocabulary=0.1, names=0.0, words=0.0, forms=1, digits=(4, 4), duplicates=1)
    return [
        Stage("symbols 64", 64, {"mqar": 0.6, "repeat": 0.4}, 0.2, {"mqar": 0.0}, alphabet=64, min_steps=2),
        Stage("facts 128", 128, {"mqar": 0.2, "pure": 0.5, "text": 0.3}, 0.5, {"fact": 0.0}, key_tokens=2,
              value_tokens=3, level=tiny, min_steps=2),
        Stage("hay 256", 256, {"hay": 0.8, "text": 0.2}, 1.0, shorter={128: 0.3}),
    ]  # fmt: skip
