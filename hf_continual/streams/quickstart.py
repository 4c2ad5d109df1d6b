"""The text of the stream `quickstart`: three small tasks from templates and word lists.

The prompts never list the possible answers, so a model that forgets a task also forgets how to answer it.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator

from datasets import Dataset

from ..errors import InputError
from ..tasks import Task

QUICKSTART_TASKS = ("sentiment", "topic", "tense")
# Every fifth text, by its hash, is for scoring only.
EVAL_PART = 5

_SUBJECTS = {
    "film": ["plot", "cast", "ending", "script", "camera work", "soundtrack", "first half", "dialogue"],
    "restaurant": ["soup", "waiter", "dessert", "service", "coffee", "pasta", "table", "menu"],
    "product": ["battery", "screen", "keyboard", "packaging", "manual", "handle", "zip", "fabric"],
}
_GOOD = ["wonderful", "excellent", "lovely", "superb", "great", "fantastic", "delightful", "perfect", "brilliant"]
_BAD = ["terrible", "awful", "dreadful", "poor", "horrible", "disappointing", "useless", "dull", "bad"]

_HEADLINES: dict[str, list[tuple[str, list[list[str]]]]] = {
    "sport": [
        (
            "{} {} the {} in {}",
            [
                ["Striker", "Goalkeeper", "Sprinter", "Young team", "Captain", "Tennis player", "Coach", "Champion"],
                ["wins", "loses", "misses", "celebrates", "dominates"],
                ["final", "match", "race", "cup game", "tournament", "league title"],
                ["extra time", "Madrid", "the rain", "record time", "Leeds", "front of full stands"],
            ],
        ),
    ],
    "food": [
        (
            "{} {} with {} and {}",
            [
                ["Quick", "Creamy", "Crispy", "Spicy", "Slow-cooked", "Classic", "Healthy", "Easy"],
                ["soup", "pie", "noodles", "salad", "stew", "curry", "bread", "pancakes"],
                ["garlic", "lemon", "cheese", "mushrooms", "ginger", "roast onions"],
                ["fresh herbs", "butter", "black beans", "honey", "toasted nuts"],
            ],
        ),
    ],
    "music": [
        (
            "{} {} a new {} {}",
            [
                ["Singer", "Rock band", "Jazz pianist", "Rapper", "Violinist", "Choir", "Guitarist", "Pop star"],
                ["releases", "records", "announces", "performs", "writes"],
                ["album", "song", "single", "symphony", "ballad", "concert programme"],
                ["about home", "after ten years", "with an orchestra", "for the summer", "on stage", "in the studio"],
            ],
        ),
    ],
    "travel": [
        (
            "{} {} in {} for {}",
            [
                ["Ten", "The best", "Cheap", "Quiet", "Seven", "Our favourite", "Hidden", "New"],
                ["beaches", "hotels", "walking trails", "islands", "train journeys", "villages to visit"],
                ["Portugal", "Greece", "Iceland", "Japan", "Peru", "Morocco"],
                ["a weekend", "families", "backpackers", "winter holidays", "first-time visitors"],
            ],
        ),
    ],
}

_PEOPLE = ["Anna", "Tom", "Maria", "The boy", "My aunt", "Peter", "The nurse", "Our neighbour", "Lucy", "The king"]
_VERBS = [
    ("paint", "paints", "painted"),
    ("wash", "washes", "washed"),
    ("buy", "buys", "bought"),
    ("sell", "sells", "sold"),
    ("repair", "repairs", "repaired"),
    ("find", "finds", "found"),
    ("bring", "brings", "brought"),
    ("carry", "carries", "carried"),
    ("see", "sees", "saw"),
    ("draw", "draws", "drew"),
]
_OBJECTS = ["the fence", "a red bicycle", "two chairs", "the old boat", "a small house", "some books", "the blue car"]


def quickstart_tasks(
    *, seed: int = 42, train_rows: int = 96, eval_rows: int = 60, scorer: str | None = None
) -> list[Task]:
    """The tasks `sentiment`, `topic` and `tense`, with the labels in equal numbers.

    Which texts may be learned and which are for scoring follows from the texts alone, so that no seed mixes them.
    """
    makers = {"sentiment": _sentiment, "topic": _topic, "tense": _tense}
    tasks = []
    for name in QUICKSTART_TASKS:
        pools = {label: list(texts) for label, texts in makers[name]().items()}
        splits = {}
        for split, rows in (("train", train_rows), ("eval", eval_rows)):
            rng = random.Random(f"{seed}/{name}/{split}")
            splits[split] = _sample(pools, rows, split, rng)
        tasks.append(
            Task(
                name=name,
                train_dataset=splits["train"],
                eval_dataset=splits["eval"],
                labels=list(pools),
                scorer=scorer,
            )
        )
    return tasks


def _sample(pools: dict[str, list[str]], rows: int, split: str, rng: random.Random) -> Dataset:
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
        raise InputError(f"{split}_rows: {rows!r} is not a whole number above 0; leave it out for the default")
    chosen: list[tuple[str, str]] = []
    for position, (label, texts) in enumerate(pools.items()):
        usable = [text for text in texts if _is_eval(text) == (split == "eval")]
        share = rows // len(pools) + (position < rows % len(pools))
        if share > len(usable):
            raise InputError(
                f"{split}_rows: {rows} is more than the stream 'quickstart' has; use {len(usable) * len(pools)} or less"
            )
        chosen += [(text, label) for text in rng.sample(usable, share)]
    rng.shuffle(chosen)
    return Dataset.from_dict(
        {
            "prompt": [text for text, _ in chosen],
            "completion": [label for _, label in chosen],
            "references": [[label] for _, label in chosen],
        }
    )


def _is_eval(text: str) -> bool:
    words = " ".join(sorted(text.lower().split()))
    return int(hashlib.sha256(words.encode()).hexdigest(), 16) % EVAL_PART == 0


def _sentiment() -> dict[str, Iterator[str]]:
    def texts(words: list[str]) -> Iterator[str]:
        for place, subjects in _SUBJECTS.items():
            for first, second in itertools.permutations(subjects, 2):
                for one, two in itertools.permutations(words, 2):
                    yield f"Review of a {place}: the {first} was {one} and the {second} was {two}.\nVerdict:"

    return {"good": texts(_GOOD), "bad": texts(_BAD)}


def _topic() -> dict[str, Iterator[str]]:
    def texts(templates: list[tuple[str, list[list[str]]]]) -> Iterator[str]:
        for template, slots in templates:
            for words in itertools.product(*slots):
                yield f'"{template.format(*words)}" is in the newspaper section'

    return {topic: texts(templates) for topic, templates in _HEADLINES.items()}


def _tense() -> dict[str, Iterator[str]]:
    def texts(verbs: list[str], times: list[str]) -> Iterator[str]:
        for person, verb, thing, time in itertools.product(_PEOPLE, verbs, _OBJECTS, times):
            yield f"{person} {verb} {thing}{time} ->"

    return {
        "past": texts([past for _, _, past in _VERBS], ["", " yesterday", " last week"]),
        "present": texts([present for _, present, _ in _VERBS], ["", " every day", " on Mondays"]),
        "future": texts([f"will {base}" for base, _, _ in _VERBS], ["", " tomorrow", " next week"]),
    }
