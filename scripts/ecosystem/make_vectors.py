"""Makes tests/goldens/metrics.json: texts compared by HELM's own functions (ROUGE by rouge_score), and stems by NLTK.

    .cache/helm/bin/python scripts/ecosystem/make_vectors.py           # rewrites it
    .cache/helm/bin/python scripts/ecosystem/make_vectors.py --check   # compares
"""

import json
import pathlib
import random
import sys

from helm.benchmark.metrics import evaluate_reference_metrics as metrics
from nltk.stem.porter import PorterStemmer

OUT = pathlib.Path("tests/goldens/metrics.json")
FUNCTIONS = {
    "exact_match": metrics.exact_match,
    "quasi_exact_match": metrics.quasi_exact_match,
    "prefix_exact_match": metrics.prefix_exact_match,
    "quasi_prefix_exact_match": metrics.quasi_prefix_exact_match,
    "f1_score": metrics.f1_score,
    "rouge_1": metrics.get_rouge_function("rouge1"),
    "rouge_2": metrics.get_rouge_function("rouge2"),
    "rouge_l": metrics.get_rouge_function("rougeL"),
    "exact_set_match": metrics.exact_set_match,
    "iou_set_match": metrics.iou_set_match,
    "f1_set_match": metrics.f1_set_match,
}
PIECES = """the a an The A cat cats sat sitting running runs happily relational conditional generalization U.S.A. don't
it's naïve café Straße ÉCOLE İstanbul ﬁne 3.14 42 x_y a-the “quoted” — … 東京 हिन्दी a.b, end! Nothing. is and are big red
cold. Carol Bob flies dying news innings skies proceed feed agreed troubled sizing hopping falling hissing fizzed
failing filing happy sky enjoy rational valenci digitizer conformably radically differently vilely analogously
vietnamization predication operator feudalism decisiveness hopefulness callousness formality sensitivity sensibility
theologically hopefully triplicate formative formalize electricity electrical goodness revival allowance inference
airliner gyroscopic adjustable defensible irritant replacement adjustment dependent adoption homologous communism
activate angularity effective bowdlerize probate rate cease control roll ties died oed yy""".split()
SPACES = [" ", "  ", "\n", "\t", " \u00a0", "\x1c", " and ", " is "]
SUFFIXES = """s es ies sses ss ed ing ied eed y ational tional enci anci izer bli abli alli entli eli ousli ization ation
ator alism iveness fulness ousness aliti iviti biliti fulli logi icate ative alize iciti ical ful ness al ance ence er
ic able ible ant ement ment ent ion sion tion ou ism ate iti ous ive ize e ll""".split()


def texts(chance):
    count = chance.choice([0, 1, 1, 2, 3, 5, 8, 12])
    text = "".join(chance.choice(PIECES) + chance.choice(SPACES) for _ in range(count))
    return text if chance.random() < 0.5 else text.strip()


def pairs(chance):
    yield from [("Carol is big and red.", "Carol is red and big.\nmore"), ("Nothing.", "Nothing."), ("Nothing.", "a"),
                ("Bob is cold.", "Nothing."), ("a", "the"), ("", ""), ("", "x"), ("x", "")]
    for _ in range(150):
        gold = texts(chance)
        kind = chance.random()
        if kind < 0.25:
            yield gold, gold.upper() + chance.choice(["", ".", " more"])
        elif kind < 0.5:
            words = gold.split(" ")
            chance.shuffle(words)
            yield gold, " ".join(words[:6])
        else:
            yield gold, texts(chance)


def stems(chance):
    stemmer = PorterStemmer()
    words = [piece.lower() for piece in PIECES if piece.isascii() and piece.isalnum()]
    letters = "aeioubcdlstyz"
    for suffix in SUFFIXES:
        words += ["".join(chance.choice(letters) for _ in range(size)) + suffix for size in (0, 1, 2, 3, 4, 5, 7)]
    return {word: stemmer.stem(word) for word in sorted(set(words)) if word}


def main():
    chance = random.Random(7)
    rows = [[gold, pred, [float(function(gold, pred)) for function in FUNCTIONS.values()]] for gold, pred in pairs(chance)]
    text = json.dumps({"metrics": list(FUNCTIONS), "rows": rows, "stems": stems(chance)}, ensure_ascii=False) + "\n"
    if "--check" in sys.argv:
        assert OUT.read_text(encoding="utf-8") == text, f"{OUT} is not what the libraries here give"
        print(f"{len(rows)} pairs of texts and the stems are as committed")
    else:
        OUT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
