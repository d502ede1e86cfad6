#!/usr/bin/env python3
"""Write the synthetic corpus that the demo model is trained and measured on.

Six kinds of document, standard library only, every byte fixed by --seed:

  story       a story from a template grammar. Every choice has a known probability and no two
              derivations give the same text, so the exact probability of a story is the product
              over its choices. That is the floor that held-out perplexity is measured against.
  recall      pairs of a key and a value, then questions about keys anywhere in the document.
  label       few-shot labelling: the meaning of each label is drawn anew per document and shown
              only by the examples at its beginning.
  echo        a list of words, twice: a lesson in looking back, in the shortest rows only.
  arithmetic  sums and differences of numbers up to 99.
  chat        stories, recall, labelling and arithmetic as a user message and an answer.

Files written to --out:

  train-64.jsonl, train-128.jsonl, train-512.jsonl, train-1024.jsonl
      {"kind", "text", "spans"}: training documents made for rows of that many tokens.
      `spans` are the character ranges that can be predicted (answers, whole stories); the rest of a
      recall or labelling document is noise by construction and is given little weight.
  heldout-{stories,recall,labelling,arithmetic}.jsonl
      the tasks kept in examples/tasks; no story or prompt of theirs occurs in training.

Invariant: words of the corpus follow a space, except those that may open a document or a chat
turn, so each is one token of the vocabulary that `vocabulary()` lists.
"""

import argparse
import json
import math
import random
import re
from pathlib import Path

# ---------------------------------------------------------------------------------------------
# Words. The sets are disjoint: a word names one thing only, which keeps the grammar unambiguous.

CATEGORIES = {
    "animal": "fox wolf bear cat dog goat horse rabbit mouse duck frog sheep parrot turtle pony hen",
    "food": "bread cheese soup cake rice honey jam corn butter pie pasta salad toast stew fruit fish",
    "tool": "hammer saw rope needle shovel ladder brush knife bucket wrench nail drill hook rake",
    "colour": "red blue green yellow white black brown purple pink golden silver grey",
    "place": "harbour market forest river school bridge garden tower mill village castle station "
             "beach valley library square",
    "clothing": "hat coat scarf glove boot shirt belt sock dress jacket cap vest",
    "plant": "rose tulip fern moss daisy lily pine maple willow birch clover reed",
    "music": "drum flute harp violin piano trumpet bell guitar whistle horn",
    "vehicle": "train wagon cart ship bus sled truck tram ferry raft",
    "job": "baker farmer sailor teacher doctor painter miller tailor guard hunter singer writer",
    "toy": "kite ball lamp map clock book coin ring box marble puppet mirror lantern compass",
    "sky": "moon star cloud comet rainbow storm planet sunset",
}
CATEGORIES = {name: words.split() for name, words in CATEGORIES.items()}
GIRLS = "Mia Anna Lena Rosa Clara Nora Ella Ruth Vera Lucy Ada Jane Iris Tess Mary Hope".split()
BOYS = "Tom Ben Max Paul Leo Sam Jack Otto Finn Hugo Carl Noah Dan Will Adam Mark".split()
PETS = "Pip Dusty Bean Socks Ginger Patch Biscuit Pepper Sunny Smoky Nutmeg Button".split()
LABELS = ("north south east west alpha beta gamma delta sigma omega first second third fourth up "
          "down left right metal glass stone paper wood wool").split()
SPOTS = "bench table stairs tree fence chair door gate wall well".split()
KEYS = [word for words in CATEGORIES.values() for word in words] + SPOTS

# ---------------------------------------------------------------------------------------------
# The story grammar. `[a|b]` is a uniform choice, `{fact}` the value of a fact, `{fact=SET}` draws
# the fact anew, uniformly from a set, and remembers it.

SETS = {
    "girls": GIRLS, "boys": BOYS, "pets": PETS, "spots": SPOTS,
    "animals": CATEGORIES["animal"], "foods": CATEGORIES["food"], "colours": CATEGORIES["colour"],
    "places": CATEGORIES["place"], "jobs": CATEGORIES["job"], "toys": CATEGORIES["toy"],
    "houses": "small tiny wooden round narrow quiet bright dark".split(),
    "preps": "behind under beside near".split(),
}

OPENING = (
    "Story: {name} lived in a {house=houses} house near the {home=places}. "
    "{She} had a {colour=colours} {object=toys} and a {animal=animals} called {pet=pets}. "
    "{Her} best friend was {friend}, a [young|clever|cheerful|patient] {job=jobs} who loved {food=foods}. "
    "{name} kept the {object} {prep=preps} the {spot=spots}."
)

# Each kind of event is one sentence or two. Kinds that lean on facts stated far above are marked L.
EVENTS = {
    "walk": "[One morning|That day|Then|After a while] [{name}|{she}] [walked|ran|hurried|went] to the {goal=places}.",
    "meet": "There [{name}|{she}] [met|saw|greeted] a [kind|shy|tall|merry] {stranger=jobs}.",
    "weather": "Soon the [wind|rain|snow|sun] [grew|became|felt] [cold|warm|strong|gentle].",
    "care": "{name} [cleaned|lifted|admired|painted] the {colour} {object} with [care|joy|pride|patience].",  # L
    "hide": "[{name}|{friend}] [hid|put|placed|left] the {object} {prep=preps} the {spot=spots}.",
    "find": "Later [{she}|{friend}] found the {object} {prep} the {spot} again.",  # L
    "pet": "{pet} the {animal} [jumped|slept|danced|waited] [happily|quietly|all day|for hours].",  # L
    "wonder": "{friend} [said|thought|believed|knew] that the {colour} {object} was [lovely|magic|heavy|precious].",  # L
    "share": "{friend} the {job} [shared|cooked|brought|served] some {food} for {name} and {pet}.",  # L
    "meal": "They [ate|bought|made|tasted] [fresh|sweet|hot|plain] {meal=foods} [at noon|for lunch|for dinner|at dawn].",
    "home": "[{name}|{She}] missed the {house} house near the {home}.",  # L
    "feel": "{name} felt [happy|sad|tired|brave|curious|calm|proud|lonely], but {friend} [smiled|laughed|sang|nodded].",
    "dream": "At night [{name}|{she}] dreamed of a [giant|strange|distant|hidden] {vision=places}.",
    "follow": "{Her} {animal} {pet} followed {friend} [around|across|past|through] the {goal=places}.",  # L
    "ask": "Where is the {object}? asked {friend}. It is {prep} the {spot}, said {name}.",  # L
    "gift": "A [poor|rich|wise|funny] {giver=jobs} gave {pet} a [piece|plate|bowl|bit] of {treat=foods}.",
}

ENDING = (
    "In the end {name} and {friend} the {job} went [home|back] to the {house} house near the {home} "
    "with the {colour} {object}, and {pet} the {animal} [slept|sang|rested|smiled]. The end."
)

EVENTS_MIN, EVENTS_MAX = 10, 40
PIECE = re.compile(r"\[([^\]]*)\]|\{(\w+)(?:=(\w+))?\}")


class Grammar:
    """One walk through the story grammar: the facts so far and the nats spent on choices."""

    def __init__(self, rng):
        self.rng, self.nats, self.facts = rng, 0.0, {}
        girl = self.pick([True, False])
        self.facts["name"] = self.pick(GIRLS if girl else BOYS)
        others = [name for name in GIRLS + BOYS if name != self.facts["name"]]
        self.facts["friend"] = self.pick(others)
        pronouns = ("She", "she", "Her") if girl else ("He", "he", "His")
        self.facts.update(zip(("She", "she", "Her"), pronouns))

    def pick(self, options):
        """Choose uniformly, at a cost of ln(len(options)) nats."""
        self.nats += math.log(len(options))
        return self.rng.choice(options)

    def expand(self, template):
        """The text of a template, left to right, so that facts may be used once drawn."""
        def piece(match):
            choice, fact, source = match.groups()
            if choice is not None:
                return self.expand(self.pick(split_choice(choice)))
            if source:
                self.facts[fact] = self.pick(SETS[source])
            return self.facts[fact]
        return PIECE.sub(piece, template)


def split_choice(choice):
    return choice.split("|")


def story(rng, name=None):
    """(text, nats): a story and minus the log of its exact probability under the grammar.

    With `name`, the story of that hero; nats then still counts the choice of the name.
    """
    grammar = Grammar(rng)
    while name and grammar.facts["name"] != name:
        grammar = Grammar(rng)
    parts = [grammar.expand(OPENING)]
    count = grammar.pick(range(EVENTS_MIN, EVENTS_MAX + 1))
    last = None
    for _ in range(count):
        # Any kind but the last one: the text never says the same thing twice in a row.
        last = grammar.pick([kind for kind in EVENTS if kind != last])
        parts.append(grammar.expand(EVENTS[last]))
    parts.append(grammar.expand(ENDING))
    return " ".join(parts), grammar.nats


def derivations(template, facts):
    """Every (text, facts after it) that a template can give: the check below enumerates them."""
    match = PIECE.search(template)
    if not match:
        return [(template, facts)]
    choice, fact, source = match.groups()
    head, tail = template[:match.start()], template[match.end():]
    if choice is not None:
        branches = [(option, facts) for option in split_choice(choice)]
    elif source:
        branches = [(value, {**facts, fact: value}) for value in SETS[source]]
    else:
        branches = [(facts[fact], facts)]
    return [(head + text, after) for option, known in branches for text, after in derivations(option + tail, known)]


def check_unambiguous(seeds=3):
    """No two derivations of an event, nor of two events, nor of the ending, share a text.

    Sentences are then read off the text one by one, so a story has exactly one derivation and its
    probability is the product of its choices, not a sum.
    """
    for seed in range(seeds):
        grammar = Grammar(random.Random(seed))
        grammar.expand(OPENING)
        texts = [text for template in [*EVENTS.values(), ENDING] for text, _ in derivations(template, grammar.facts)]
        assert len(texts) == len(set(texts)), "the story grammar is ambiguous"


# ---------------------------------------------------------------------------------------------
# Tasks. Each function gives a list of (text, is_answer) segments.

def note(rng):
    """A sentence of noise, for distance."""
    grammar = Grammar(rng)
    grammar.expand(OPENING)
    return grammar.expand(EVENTS[rng.choice(["walk", "meet", "weather", "pet", "meal", "dream", "gift", "share"])])


def recall(rng, pairs, notes, queries, middle=False):
    """`pairs` facts with `notes` sentences among them, then `queries` questions.

    With `middle`, only pairs of the middle of the document are asked for.
    """
    keys = rng.sample(KEYS, pairs)
    values = [rng.choice(KEYS) for _ in keys]
    lines = [f" {key} {value};" for key, value in zip(keys, values)]
    spots = sorted(rng.randrange(len(lines) + 1) for _ in range(notes))
    for spot in reversed(spots):
        lines.insert(spot, f" {note(rng)}")
    asked = list(zip(keys, values))
    if middle:
        asked = asked[pairs // 8: max(pairs // 8 + 1, pairs * 4 // 5)]
    segments = [("Recall:" + "".join(lines) + " Ask:", False)]
    for number, (key, value) in enumerate(rng.choices(asked, k=queries)):
        segments += [(f"{';' if number else ''} {key}", False), (f" {value}", True)]
    return segments


def labelling(rng, classes, shots, notes, queries):
    """`classes` word classes under labels of this document's own, `shots` examples of each.

    The asked words are new to the document: only their class links them to an example.
    """
    labels = rng.sample(LABELS, classes)
    examples, pool = [], []
    for label, category in zip(labels, rng.sample(list(CATEGORIES), classes)):
        words = rng.sample(CATEGORIES[category], len(CATEGORIES[category]))
        examples += [(word, label) for word in words[:shots]]
        pool += [(word, label) for word in words[shots:]]
    rng.shuffle(examples)
    head = "Label:" + "".join(f" {word} {label};" for word, label in examples)
    head += "".join(f" {note(rng)}" for _ in range(notes)) + " Ask:"
    segments = [(head, False)]
    for number, (word, label) in enumerate(rng.sample(pool, min(queries, len(pool)))):
        segments += [(f"{';' if number else ''} {word}", False), (f" {label}", True)]
    return segments, labels


def echo(rng, count):
    """`count` words, then the same words again."""
    words = " ".join(rng.choice(KEYS) for _ in range(count))
    return [(f"Echo: {words};", False), (f" {words}", True)]


def arithmetic(rng, count):
    """`count` sums or differences, each with its result."""
    segments = [("Sum:", False)]
    for number in range(count):
        limit = rng.choice([10, 50, 100])
        left, right = rng.randrange(limit), rng.randrange(limit)
        sign = rng.choice("+-")
        if sign == "-":
            left, right = max(left, right), min(left, right)
        result = left + right if sign == "+" else left - right
        segments += [(f"{';' if number else ''} {left} {sign} {right} =", False), (f" {result}", True)]
    return segments


def chat(rng, window):
    """One of the kinds above as a chat: the task as the user's turn, the answer as the assistant's."""
    system = rng.choice(["You are a mill.", "You tell a story.", "Answer with care."]) if rng.random() < 0.2 else ""
    head = (f"<|system|>{system}" if system else "") + "<|user|>"
    kind = rng.choice(["story", "recall", "label", "arithmetic"])
    if kind == "story":
        name = rng.choice(GIRLS + BOYS)
        return [(f"{head}Tell me a story about {name}.<|assistant|>", False), (story(rng, name)[0], True)]
    if kind == "recall":
        segments = recall(rng, rng.randint(3, window // 12), rng.randrange(3), 1)
    elif kind == "label":
        segments, _ = labelling(rng, rng.randint(2, 4), rng.randint(1, 3), rng.randrange(3), 1)
    else:
        segments = arithmetic(rng, rng.choice([1, 1, 1, 3]))
    prompt = "".join(text for text, _ in segments[:-1])
    # The answer of a look-up repeats the question: "Answer: kite moon."
    asked = prompt.split()[-1] + " " if kind in ("recall", "label") else ""
    return [(f"{head}{prompt}<|assistant|>", False), (f"Answer: {asked}{segments[-1][0].strip()}.", True)]


# ---------------------------------------------------------------------------------------------
# Splits.

# Shares of documents by window. Looking things up in the context is the slow part to learn: it is
# learnt first, on short rows full of questions, and the rest builds on it.
MIX = {
    64: {"story": 0.06, "echo": 0.30, "recall": 0.44, "label": 0.14, "arithmetic": 0.06},
    128: {"story": 0.30, "recall": 0.32, "label": 0.22, "arithmetic": 0.10, "chat": 0.06},
    512: {"story": 0.42, "recall": 0.20, "label": 0.18, "arithmetic": 0.12, "chat": 0.08},
}
MIX[1024] = MIX[512]


def document(rng, window):
    """A training document of about `window` tokens at most (stories may be longer)."""
    kind = rng.choices(list(MIX[window]), MIX[window].values())[0]
    if kind == "story":
        return kind, [(story(rng)[0], True)]
    if kind == "recall":
        # A pair takes 3 tokens, a question 3, a note about 12: share the window among them.
        queries = rng.randint(4, min(24, window // 6))
        room = rng.uniform(0.2, 0.95) * window - 3 * queries
        noise = rng.choice([0, 0, rng.random() * 0.7]) if window > 128 else 0
        pairs = int(min(max(2, room * (1 - noise) / 3), len(KEYS) * 0.8))
        return kind, recall(rng, pairs, int(room * noise / 12), queries)
    if kind == "label":
        classes = rng.randint(2, 3 if window <= 128 else 6)
        shots = rng.randint(1, 3)
        queries = min(24, window // 6)
        room = window - 3 * (classes * shots + queries)
        notes = int(rng.choice([0, rng.random() * 0.9]) * max(0, room) / 12)
        return kind, labelling(rng, classes, shots, notes, queries)[0]
    if kind == "echo":
        return kind, echo(rng, rng.randint(6, window // 2 - 3))
    if kind == "arithmetic":
        return kind, arithmetic(rng, rng.randint(2, min(20, window // 12)))
    return kind, chat(rng, window)


def join(segments):
    """The text of segments, and the character ranges of its answers."""
    text, spans = "", []
    for segment, is_answer in segments:
        if is_answer:
            spans.append([len(text), len(text) + len(segment)])
        text += segment
    return text, spans


TASKS = {"stories": 140, "recall": 170, "labelling": 200, "arithmetic": 200}


def heldout(kind, rng):
    """One held-out task. Prompts end without a space and references begin with one, as the tokens do."""
    if kind == "stories":
        text, nats = story(rng)
        return {"text": text, "nats": round(nats, 6)}
    if kind == "recall":
        dense = rng.random() < 0.5
        pairs = rng.randint(32, 130) if dense else rng.randint(10, 50)
        notes = 0 if dense else rng.randint(6, (440 - 3 * pairs) // 12)
        segments = recall(rng, pairs, notes, 1, middle=True)
    elif kind == "labelling":
        segments, labels = labelling(rng, rng.randint(3, 6), rng.randint(2, 3), rng.randint(4, 24), 1)
    else:
        segments = arithmetic(rng, 4)
    prompt, answer = "".join(text for text, _ in segments[:-1]), segments[-1][0]
    task = {"prompt": prompt, "references": [answer]}
    if kind == "recall":
        values = re.findall(r" [a-z]+ ([a-z]+);", prompt)
        task["choices"] = sorted({answer} | {f" {value}" for value in rng.sample(values, 7)})
    elif kind == "labelling":
        task["choices"] = sorted(f" {label}" for label in labels)
    return task


def opening(text):
    """The first words of a document: enough of them to tell any held-out task from every other text."""
    return " ".join(text.split()[:16])


def vocabulary():
    """Every word of the corpus as it is written, with its leading space where it has one."""
    words = {f" {word}" for word in KEYS + GIRLS + BOYS + PETS + LABELS}
    for template in [OPENING, ENDING, *EVENTS.values(), "Tell me a story about", "You are a mill You tell a story",
                     "Answer with care"]:
        plain = PIECE.sub(lambda match: " ".join(split_choice(match[1])) if match[1] else "", template)
        words |= {f" {word}" for word in re.findall(r"[A-Za-z]+", re.sub(r"\{[^}]*\}", " ", plain))}
    words |= {f" {word}" for values in SETS.values() for word in values}
    words |= {" She", " she", " Her", " He", " he", " His", " Ask", " =", " +", " -"}
    words |= {"Story", "Recall", "Echo", "Label", "Sum", "Tell", "You", "Answer"}
    return sorted(words)


def write_lines(path, lines):
    with open(path, "w", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--docs-64", type=int, default=60000)
    parser.add_argument("--docs-128", type=int, default=20000)
    parser.add_argument("--docs-512", type=int, default=45000)
    parser.add_argument("--docs-1024", type=int, default=4000)
    args = parser.parse_args()
    check_unambiguous()
    args.out.mkdir(parents=True, exist_ok=True)

    kept = set()
    for kind, count in TASKS.items():
        rng = random.Random(f"{args.seed} heldout {kind}")
        tasks = [heldout(kind, rng) for _ in range(count)]
        kept |= {opening(task.get("text") or task["prompt"]) for task in tasks}
        write_lines(args.out / f"heldout-{kind}.jsonl", tasks)
    for window in (64, 128, 512, 1024):
        rng = random.Random(f"{args.seed} train {window}")

        def documents(count):
            for _ in range(count):
                kind, segments = document(rng, window)
                text, spans = join(segments)
                if opening(text) not in kept:
                    yield {"kind": kind, "text": text, "spans": spans}

        write_lines(args.out / f"train-{window}.jsonl", documents(getattr(args, f"docs_{window}")))


if __name__ == "__main__":
    main()
