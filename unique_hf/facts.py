"""The retrieval task: facts as plain English sentences, near-duplicate distractors, questions; stdlib only.

A fact is (attribute, subject, answer). Every sentence is a list of fragments that tokenise independently of each other
(each starts at a pre-token boundary), so training can join cached token lists while users see ordinary text.
Train, validation and test never share an (attribute, subject) pair; made-up names are not shared at all.
"""

import random
import re
import zlib
from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache

SPLITS = ("train", "validation", "test")

ADJECTIVES = (
    "northern old red upper royal quiet golden wooden southern new blue lower public hidden silver iron eastern "
    "modern green inner national busy copper marble western ancient white outer private lonely crystal granite "
    "central little black distant municipal frozen amber narrow grand tall grey broad humble sunny scarlet windy "
    "famous haunted floating misty crimson rocky violet dusty"
).split()
NOUNS = (
    "library harbour station museum garden bridge tower castle hospital school bakery theatre market factory "
    "warehouse laboratory office hotel cathedral airport lighthouse stadium workshop mill farm vineyard quarry "
    "mine observatory aquarium palace temple chapel monastery prison depot garage shipyard pier ferry canal "
    "reservoir dam windmill greenhouse orchard archive gallery studio cinema arena pavilion clinic pharmacy "
    "brewery tavern kitchen cellar attic courtyard fountain monument cemetery village forest valley island "
    "glacier desert canyon meadow river lake mountain volcano cave beach cliff swamp lagoon"
).split()
NUMBER_ATTRIBUTES = tuple(
    "access code|phone number|serial number|locker number|alarm code|invoice number|room number|gate code|"
    "ticket number|postal code|account number|badge number|security code|catalogue number|registration number|"
    "vault code|parcel number|licence number|door code|order number|customer number|flight number|batch number|"
    "shelf number|file number|bank code|contract number|permit number|reference number|case number|member count|"
    "visitor count|meter reading|radio frequency|inventory number|tax number|storage code|docket number|"
    "annual budget|safe combination".split("|")
)
COLOURS = (
    "red blue green yellow purple orange brown pink turquoise ivory magenta indigo olive maroon beige lilac teal "
    "coral charcoal lavender"
).split()
ANIMALS = (
    "falcon otter badger heron lynx tiger walrus panda beaver raven dolphin giraffe hedgehog camel eagle lobster "
    "monkey penguin rabbit salmon spider turtle wolf zebra bison cobra donkey ferret gecko jaguar"
).split()
FLOWERS = (
    "rose tulip daisy lily orchid poppy violet iris jasmine lotus peony sunflower marigold thistle heather".split()
)
FOODS = (
    "soup bread cheese pasta rice pepper honey mango lemon cherry apple walnut potato carrot onion pumpkin ginger "
    "cinnamon garlic mustard"
).split()
METALS = "iron copper silver gold tin lead zinc nickel cobalt titanium bronze brass steel platinum mercury".split()
WORD_ATTRIBUTES = {
    "official colour": COLOURS,
    "mascot": ANIMALS,
    "emblem": FLOWERS,
    "favourite dish": FOODS,
    "main metal": METALS,
    "code name": ANIMALS,
    "favourite flower": FLOWERS,
    "door colour": COLOURS,
    "password": None,  # two words: a colour and an animal
    "secret phrase": None,
}
_ONSETS = "b br d dr f fl g gr h j k kr l m n p pr r s st t th tr v w z".split()
_VOWELS = "a e i o u ai ea or an en in el ar".split()
_CODAS = "k l m n r s t d x th nd sh".split()

ATTRIBUTE, SUBJECT, ANSWER = object(), object(), object()
STATEMENTS = (
    ("The", ATTRIBUTE, " of", SUBJECT, " is", ANSWER, "."),
    ("Note that the", ATTRIBUTE, " of", SUBJECT, " is", ANSWER, "."),
    ("For", SUBJECT, ", the", ATTRIBUTE, " is", ANSWER, "."),
    ("According to the records, the", ATTRIBUTE, " of", SUBJECT, " is", ANSWER, "."),
)
QUESTIONS = (
    ("\n", "Question: What is the", ATTRIBUTE, " of", SUBJECT, "?", "\n", "Answer:"),
    ("\n", "Question: For", SUBJECT, ", what is the", ATTRIBUTE, "?", "\n", "Answer:"),
    ("\n", "Question: Tell me the", ATTRIBUTE, " of", SUBJECT, ".", "\n", "Answer:"),
)


@dataclass(frozen=True)
class Fact:
    """One fact; `subject` starts with "the" unless it is a person's name."""

    attribute: str
    subject: str
    answer: str

    def fragments(self, template):
        """The template with this fact filled in, as a list of independently tokenisable strings."""
        filled = []
        for part in template:
            if part is ATTRIBUTE:
                filled.append(" " + self.attribute)
            elif part is SUBJECT:
                filled.extend(" " + word for word in self.subject.split())
            elif part is ANSWER:
                filled.extend(answer_fragments(self.answer))
            else:
                filled.append(part)
        return filled

    def statement(self, form=0):
        """The sentence that states the fact."""
        return "".join(self.fragments(STATEMENTS[form]))

    def question(self, form=0):
        """The prompt that asks for it; the model continues with `" " + answer` and the end-of-text token."""
        return "".join(self.fragments(QUESTIONS[form]))


@dataclass(frozen=True)
class Level:
    """Difficulty of the facts of one row: every field grows with the curriculum; the defaults are the full task."""

    vocabulary: float = 1.0  # share of each word list in use
    names: float = 0.35  # share of facts with made-up names
    words: float = 0.25  # share of facts whose answer is a word
    forms: int = 4  # statement forms in use (and at most three question forms)
    digits: tuple = (4, 6)  # fewest and most digits of a number
    duplicates: int = 3  # most near-duplicates per fact


FULL = Level()


def answer_fragments(answer):
    """`" 482"` as `[" ", "4", "8", "2"]` (digits are single tokens), words as `[" amber", " falcon"]`."""
    if answer.isdigit():
        return [" ", *answer]
    return [" " + word for word in answer.split()]


@lru_cache(maxsize=1 << 16)
def split_of(key):
    """The split that owns `key`: 80 % train, 10 % validation, 10 % test, by a stable hash."""
    return SPLITS[max(0, zlib.crc32(key.encode()) % 10 - 7)]


class FactSampler:
    """Draws facts of one split with pairwise different (attribute, subject); deterministic in `rng`."""

    def __init__(self, rng, split="train", level=FULL):
        if split not in SPLITS:
            raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
        self.rng, self.split, self.level = rng, split, level
        self.seen = set()

    def _choose(self, words):
        count = max(min(8, len(words)), round(self.level.vocabulary * len(words)))
        return words[int(self.rng.random() * count)]

    def _name(self):
        while True:
            rng = self.rng
            name = rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_ONSETS) + rng.choice(_VOWELS)
            name = (name + rng.choice(_CODAS)).capitalize()
            if split_of(name) == self.split:
                return name

    def _attribute(self):
        if self.rng.random() < self.level.words:
            return self._choose(tuple(WORD_ATTRIBUTES))
        return self._choose(NUMBER_ATTRIBUTES)

    def _parts(self):
        """`(kind, first, second)` of a subject; two parts, so that near-duplicates can share one."""
        draw = self.rng.random()
        if draw >= self.level.names:
            return ("place", self._choose(ADJECTIVES), self._choose(NOUNS))
        if draw < self.level.names / 2:
            return ("person", self._name(), self._name())
        return ("town", self._choose(NOUNS), self._name())

    def _answer(self, attribute):
        rng = self.rng
        if attribute in WORD_ATTRIBUTES:
            words = WORD_ATTRIBUTES[attribute]
            return rng.choice(words) if words else f"{rng.choice(COLOURS)} {rng.choice(ANIMALS)}"
        length = rng.randint(*self.level.digits)
        return str(rng.randrange(10 ** (length - 1), 10**length))

    def _admit(self, attribute, parts):
        key = (attribute, parts)
        if key in self.seen:
            return None
        kind, first, second = parts
        # made-up names carry their own split; subjects of known words are split by the whole pair
        if kind == "place" and split_of(f"{attribute}|{first}|{second}") != self.split:
            return None
        self.seen.add(key)
        subject = {"place": f"the {first} {second}", "person": f"{first} {second}", "town": f"the {first} of {second}"}
        return Fact(attribute, subject[kind], self._answer(attribute))

    def draw(self):
        """`(fact, attribute, parts)` of a new fact."""
        for _ in range(10_000):
            attribute, parts = self._attribute(), self._parts()
            fact = self._admit(attribute, parts)
            if fact is not None:
                return fact, attribute, parts
        raise ValueError(f"level {self.level} has no unused facts left after {len(self.seen)}: raise `vocabulary`")

    def near_duplicate(self, attribute, parts):
        """A fact that differs in the attribute or one part of the subject only; `None` if none was found."""
        for _ in range(50):
            kind, first, second = parts
            where = self.rng.randrange(3)
            if where == 0:
                candidate = (self._attribute(), parts)
            else:
                fresh = self._parts()
                if fresh[0] != kind:
                    continue
                candidate = (attribute, (kind, fresh[1], second) if where == 1 else (kind, first, fresh[2]))
            fact = self._admit(*candidate)
            if fact is not None:
                return fact
        return None

    def cluster(self, duplicates):
        """A new fact followed by up to `duplicates` near-duplicates of it."""
        fact, attribute, parts = self.draw()
        others = (self.near_duplicate(attribute, parts) for _ in range(duplicates))
        return [fact, *(other for other in others if other is not None)]


@dataclass(frozen=True)
class Haystack:
    """A real text with facts hidden in it, and the questions about them."""

    context: str
    input_ids: list  # of `context`
    facts: list  # asked facts, in the order of `questions`
    questions: list  # prompts; feed them after the context, then decode
    question_ids: list
    answers: list  # expected continuation without the leading space
    depths: list  # share of the context before each asked fact
    num_distractors: int


def encode_text(tokenizer, text):
    """Token ids of `text` without special tokens; takes a transformers or a `tokenizers` tokenizer."""
    if hasattr(tokenizer, "encode_batch_fast"):
        return tokenizer.encode(text, add_special_tokens=False).ids
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def make_haystack(tokenizer, text, context_tokens, num_facts, seed, split="test", distractors=3, level=FULL):
    """Hides facts and their near-duplicates at random sentence ends of a real text.

    Args:
        tokenizer: Of transformers, or a `tokenizers.Tokenizer`.
        text (`str`): The text that hides the facts; a random window of it is used, so it must be long enough.
        context_tokens (`int`): Length of the result, never exceeded and reached to within a token per sentence.
        num_facts (`int`): Facts that are asked; each brings up to `distractors` near-duplicates that are not asked.
        seed (`int`): Fixes everything.
        split (`str`, *optional*, defaults to `"test"`): `"train"`, `"validation"` or `"test"` facts.
    Returns:
        `Haystack`.
    Raises:
        ValueError: the facts do not fit into `context_tokens`, or the text is too short to fill it.
    """
    rng = random.Random(f"{seed}/{split}/{context_tokens}")
    sampler = FactSampler(rng, split, level)
    asked, hidden = [], []
    for _ in range(num_facts):
        fact, *others = sampler.cluster(distractors)
        asked.append(fact)
        hidden.extend(others)
    sentences = [(fact, " " + fact.statement(rng.randrange(level.forms))) for fact in asked + hidden]
    # one token of slack per insertion: the cut can change how the text around it is tokenised
    room = context_tokens - sum(len(encode_text(tokenizer, sentence)) + 1 for _, sentence in sentences)
    window = _window(tokenizer, text, room, context_tokens, len(sentences), rng)
    ends = [match.end() for match in re.finditer(r"[.!?](?=\s)", window)] or [len(window)]
    places = sorted(
        (ends[bisect_left(ends, min(rng.random() * len(window), ends[-1]))], i) for i in range(len(sentences))
    )
    rng.shuffle(sentences)
    pieces, position, length, depths = [], 0, 0, {}
    for end, i in places:
        pieces += [window[position:end], sentences[i][1]]
        length, position = length + end - position, end
        depths[sentences[i][0]] = length
        length += len(sentences[i][1])
    context = ("".join(pieces) + window[position:]).rstrip()
    questions = [fact.question(rng.randrange(min(level.forms, len(QUESTIONS)))) for fact in asked]
    return Haystack(
        context=context,
        input_ids=encode_text(tokenizer, context)[:context_tokens],
        facts=asked,
        questions=questions,
        question_ids=[encode_text(tokenizer, question) for question in questions],
        answers=[fact.answer for fact in asked],
        depths=[depths[fact] / len(context) for fact in asked],
        num_distractors=len(hidden),
    )


def _window(tokenizer, text, room, context_tokens, num_sentences, rng):
    """A random stretch of `text` of `room` tokens, starting at a line."""
    if room < 0:
        raise ValueError(f"{num_sentences} sentences do not fit into {context_tokens} tokens: ask for fewer facts")
    estimate = max(64, 8 * room)  # characters; shorter than 8 characters per token on any text
    start = text.find("\n", int(rng.random() * max(1, len(text) - estimate))) + 1
    while True:
        ids = encode_text(tokenizer, text[start : start + estimate])
        if len(ids) >= room:
            break
        if start + estimate < len(text):
            estimate *= 2
        elif start:
            start = max(0, start - estimate)
        else:
            raise ValueError(f"the text has {len(ids)} tokens, {room} are needed: give a longer text")
    cut = tokenizer.decode(ids[:room])
    return cut.rstrip("\ufffd")
