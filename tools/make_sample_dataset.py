"""Write the sample data of the template: short phrases, each labelled with the tone of its one emotion cue.

python tools/make_sample_dataset.py            writes template/dataset/sample-{train,heldout}.jsonl
python tools/make_sample_dataset.py --check    exits 1 if the files on disk differ from what this script writes

A phrase is a frame filled with a cue, a scene and a person. All tones share frames, scenes and people; only the cue
determines the label. Held-out rows combine cues with scenes that do not occur together in the training rows.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple, TypeVar

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "template" / "dataset"
SEED = 20
ROWS_PER_TONE = {"sample-train.jsonl": 200, "sample-heldout.jsonl": 40}
SHORTEST, LONGEST = 5, 18  # words

# tone -> kind -> cues. A state follows «was», an act is a verb in the past, a feeling is a noun.
CUES: dict[str, dict[str, list[str]]] = {
    "joy": {
        "state": [
            "happy",
            "delighted",
            "thrilled",
            "cheerful",
            "elated",
            "ecstatic",
            "jubilant",
            "pleased",
            "gleeful",
            "euphoric",
        ],
        "act": ["laughed", "grinned", "cheered", "beamed", "smiled"],
        "feeling": ["delight", "happiness", "glee", "elation", "euphoria"],
    },
    "sadness": {
        "state": [
            "sad",
            "heartbroken",
            "miserable",
            "gloomy",
            "tearful",
            "dejected",
            "downcast",
            "glum",
            "sorrowful",
            "mournful",
        ],
        "act": ["cried", "wept", "sobbed", "broke down", "burst into tears"],
        "feeling": ["sorrow", "grief", "gloom", "misery", "despair"],
    },
    "fear": {
        "state": [
            "scared",
            "frightened",
            "terrified",
            "anxious",
            "nervous",
            "worried",
            "petrified",
            "uneasy",
            "alarmed",
            "horrified",
        ],
        "act": ["trembled", "shuddered", "panicked", "turned pale", "cowered"],
        "feeling": ["fright", "terror", "panic", "anxiety", "horror"],
    },
    "surprise": {
        "state": [
            "astonished",
            "amazed",
            "stunned",
            "startled",
            "astounded",
            "shocked",
            "flabbergasted",
            "bewildered",
            "dumbfounded",
            "gobsmacked",
        ],
        "act": ["gasped", "gaped", "gawped", "blinked twice", "did a double take"],
        "feeling": ["astonishment", "amazement", "disbelief", "shock", "bewilderment"],
    },
}


class Person(NamedTuple):
    """A person in a phrase, in the forms that frames use."""

    who: str
    obj: str
    possessive: str
    their: str
    was: str = "was"
    never_at: tuple[str, ...] = ()  # topics that would sound odd


# The speaker comes first: frames with an asterisk leave out these two.
PEOPLE = [
    Person("I", "me", "my", "my"),
    Person("we", "us", "our", "our", "were"),
    Person("my sister", "my sister", "my sister's", "her"),
    Person("my brother", "my brother", "my brother's", "his"),
    Person("Mum", "Mum", "Mum's", "her"),
    Person("Dad", "Dad", "Dad's", "his"),
    Person("Grandma", "Grandma", "Grandma's", "her", never_at=("work", "school")),
    Person("my best friend", "my best friend", "my best friend's", "her"),
    Person("our neighbour", "our neighbour", "our neighbour's", "his"),
    Person("my flatmate", "my flatmate", "my flatmate's", "his"),
    Person("the children", "the children", "the children's", "their", "were", ("work", "money")),
    Person("my parents", "my parents", "my parents'", "their", "were", ("school",)),
    Person("my cousins", "my cousins", "my cousins'", "their", "were"),
]

# topic -> events that can please, sadden, frighten or surprise, depending on the speaker
SCENES: dict[str, list[str]] = {
    "work": [
        "the boss called a meeting",
        "the boss read out the new plan",
        "the company moved to another town",
        "the office closed for good",
    ],
    "family": [
        "the letter from Uncle Ben arrived",
        "Uncle Ben walked in without a word",
        "the baby took its first steps",
        "the twins left home",
        "the wedding was moved to March",
    ],
    "travel": [
        "the plane turned back",
        "the ferry left the harbour",
        "the last train pulled out",
        "the bus took the mountain road",
        "the guard opened the blue bag",
    ],
    "weather": [
        "it started to rain",
        "the first snow fell on the hills",
        "the storm moved out to sea",
        "thick fog rolled in from the sea",
        "the wind dropped all at once",
    ],
    "food": [
        "the chef came out of the kitchen",
        "the judges tasted the cake",
        "the corner café was sold",
        "the bakery changed hands",
    ],
    "sport": [
        "the final whistle went",
        "the captain read out the team",
        "the match went to penalties",
        "the horse refused the last fence",
    ],
    "school": [
        "the exam results went up on the wall",
        "the teacher read the essay aloud",
        "the head teacher walked in",
        "the school bus drove straight past",
        "the bell rang for the last time",
    ],
    "neighbours": [
        "somebody knocked on the door late at night",
        "the house next door was sold",
        "the music upstairs stopped",
        "the family across the road moved out",
    ],
    "health": [
        "the doctor rang with the test results",
        "the nurse called the next name",
        "the surgeon came to the door",
    ],
    "home": [
        "the lights went out",
        "the phone rang at midnight",
        "the old piano was sold",
    ],
    "pets": [
        "the dog came back alone",
        "the kitten climbed the tallest tree",
        "the vet came out",
    ],
    "money": [
        "the letter from the bank arrived",
        "the lottery numbers were read out",
    ],
    "going out": [
        "the curtain fell",
        "the band played one more song",
        "the film ended like that",
    ],
}

TIMES = ["Yesterday", "Last week", "On Friday", "Last night", "A month ago"]
TAILS = [
    "I put the kettle on",
    "we talked about it for hours",
    "the others looked round",
    "nobody asked why",
]

# {reaction} is «was» and a state, or an act. Frames with an asterisk are about somebody other than the speaker.
FRAMES: dict[str, list[str]] = {
    "reaction": [
        "{who} {reaction} when {scene}.",
        "When {scene}, {who} {reaction}.",
        "{scene}, and {who} {reaction}.",
        "{time}, {who} {reaction} when {scene}.",
        "{who} {reaction} the moment {scene}.",
        "{who} {reaction} when {scene}, and {tail}.",
        "Guess what: {scene}, and {who} {reaction}!",
        "*I noticed that {who} {reaction} as soon as {scene}.",
        "*They say that {who} {reaction} when {scene}.",
        "*Apparently {who} {reaction} just after {scene}.",
    ],
    "state": [
        "{scene}, which left {obj} {cue}.",
        "You should have seen how {cue} {who} {was} when {scene}.",
        "Why {was} {who} so {cue} when {scene}?",
        "{who} had never been so {cue} as on the day {scene}.",
        "{who} tried not to look {cue} when {scene}.",
        "*{who} sounded {cue} on the phone after {scene}.",
        "*{who} looked {cue} to me when {scene}.",
    ],
    "feeling": [
        "{scene}, and I have rarely felt such {cue}.",
        "{who} could not hide {their} {cue} when {scene}.",
        "What {who} remembered most was the sheer {cue} when {scene}.",
        "Imagine {possessive} {cue} when {scene}!",
        "People still talk about the {cue} on the day {scene}.",
        "*I could see the {cue} in {possessive} eyes when {scene}.",
    ],
}
FRAMES_FOR = {
    "state": FRAMES["reaction"] + FRAMES["state"],
    "act": FRAMES["reaction"],
    "feeling": FRAMES["feeling"],
}


class Example(NamedTuple):
    """One phrase with its parts."""

    phrase: str
    tone: str
    cue: str
    frame: str
    scene: str
    person: str


def normalise(phrase: str) -> str:
    """Return the phrase in lower case and without punctuation, to detect duplicates."""
    return " ".join(re.findall(r"[\w']+", phrase.lower()))


def pick(rng: random.Random, items: list[T]) -> T:
    """Choose an item using only random(), the one method with the same results in every Python."""
    return items[int(rng.random() * len(items))]


def compose(rng: random.Random, tone: str, kind: str, cue: str) -> Example:
    """Fill a random frame of the kind; the phrase may be too long or repeat a word."""
    frame = pick(rng, FRAMES_FOR[kind])
    person = pick(rng, PEOPLE[2:] if frame.startswith("*") else PEOPLE)
    scene = pick(rng, [scene for topic, scenes in SCENES.items() if topic not in person.never_at for scene in scenes])
    phrase = frame.lstrip("*").format(
        cue=cue,
        reaction=f"{person.was} {cue}" if kind == "state" else cue,
        scene=scene,
        time=pick(rng, TIMES),
        tail=pick(rng, TAILS),
        **person._asdict(),
    )
    return Example(phrase[0].upper() + phrase[1:], tone, cue, frame, scene, person.who)


def reads_well(phrase: str) -> bool:
    """Return whether the phrase has a suitable length and repeats no long word."""
    words = normalise(phrase).split()
    long_words = [word.removesuffix("'s") for word in words if len(word) > 3]
    return SHORTEST <= len(phrase.split()) <= LONGEST and len(set(long_words)) == len(long_words)


def make_split(rng: random.Random, rows_per_tone: int, earlier: list[Example]) -> list[Example]:
    """Make a balanced list of new phrases that share no cue and scene, nor frame, person and cue, with earlier ones."""
    pairs = {(example.cue, example.scene) for example in earlier}
    triples = {(example.frame, example.person, example.cue) for example in earlier}
    seen = {normalise(example.phrase) for example in earlier}
    split: list[list[Example]] = []
    for tone, kinds in CUES.items():
        cues = [(kind, cue) for kind, words in kinds.items() for cue in words]
        used: Counter[str] = Counter()
        examples: list[Example] = []
        while len(examples) < rows_per_tone:
            if len(examples) % len(cues) == 0:
                cues.sort(key=lambda _: rng.random())
            kind, cue = cues[len(examples) % len(cues)]
            drafts = [compose(rng, tone, kind, cue) for _ in range(60)]
            drafts = [
                draft
                for draft in drafts
                if reads_well(draft.phrase)
                and normalise(draft.phrase) not in seen
                and (cue, draft.scene) not in pairs
                and (draft.frame, draft.person, cue) not in triples
            ]
            # The least used parts first, so that every tone has every frame, scene and person about equally often.
            best = min(drafts, key=lambda draft: 3 * used[draft.frame] + used[draft.scene] + used[draft.person])
            used.update([best.frame, best.scene, best.person])
            seen.add(normalise(best.phrase))
            examples.append(best)
        split.append(sorted(examples, key=lambda _: rng.random()))
    # One row of each tone in every four, so that the head of the file is balanced too.
    return [example for four in zip(*split, strict=True) for example in sorted(four, key=lambda _: rng.random())]


def make_dataset() -> dict[str, list[Example]]:
    """Return the examples of each file, the same at every call."""
    rng = random.Random(SEED)
    dataset: dict[str, list[Example]] = {}
    for name, rows_per_tone in ROWS_PER_TONE.items():
        dataset[name] = make_split(rng, rows_per_tone, [example for split in dataset.values() for example in split])
    return dataset


def to_jsonl(examples: list[Example]) -> bytes:
    """Return the examples as chat rows, one JSON object per line."""
    rows = (
        {"messages": [{"role": "user", "content": example.phrase}, {"role": "assistant", "content": example.tone}]}
        for example in examples
    )
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def main(arguments: list[str] | None = None) -> int:
    """Write the files, or compare them with --check; return the exit status."""
    parser = argparse.ArgumentParser(description="Write the sample data of the template.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file differs")
    parser.add_argument(
        "--folder", type=Path, default=FOLDER, help="the folder of the files (default: template/dataset)"
    )
    options = parser.parse_args(arguments)
    files = {options.folder / name: to_jsonl(examples) for name, examples in make_dataset().items()}
    if options.check:
        stale = [path for path, content in files.items() if not path.is_file() or path.read_bytes() != content]
        for path in stale:
            print(f"{path} is not what the generator writes: run python tools/make_sample_dataset.py.", file=sys.stderr)
        return 1 if stale else 0
    options.folder.mkdir(parents=True, exist_ok=True)
    for path, content in files.items():
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_bytes(content)
        temporary.replace(path)
        print(f"{path}: {len(content.splitlines())} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
