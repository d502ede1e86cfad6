"""Does choosing per head from a profile (FastGen, arXiv 2310.01801) keep more than heavy hitters at the same memory?

    python scripts/fastgen_choice.py [--root .] [--shares 0.2,0.1] [--only "NAME;..."] [--cache results.json] [--limit N]

A slow reference in f32 PyTorch of the demo model (Llama), with evictions as boolean masks: per layer, KV head and
position. Tasks are answered greedily and stories scored as `scripts/demo_quality.py` does; what is measured is printed
as Markdown tables. Needs torch, safetensors and tokenizers.

Evictions happen where Tidemill has them: in prompts at multiples of 64 and at the prompt's end, after it at every
token. Policies named "end" evict nothing before the prompt's end: their prompts are not bounded.

A head keeps its `recent` latest positions, those that are forced (sinks, punctuation), and of the others the `heavy`
ones with the highest score: softmax probabilities summed over the queries so far and the query heads of the KV head;
the older of equals goes first.

The recovered mass of such a choice is the mean over the profiled queries (the latest 64, or all; averaged over
the query heads) of the attention on keys that are forced, among the `recent` latest before the query, or heavy; as a
share of what is on keys that the head still has.
"""

import argparse
import functools
import json
import math
import pathlib
import sys
import time

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

TASKS = ("recall", "labelling", "arithmetic")
MAX_TOKENS = 8
PAGE = 64


def amount(share, length):
    """A share of a length as Tidemill rounds it: halves up."""
    return math.floor(share * length + 0.5)


# --------------------------------------------------------------------------------------------------------------------
# The model.

class Model:
    def __init__(self, folder):
        self.config = json.loads((folder / "config.json").read_text())
        weights = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
        self.embedding = weights["model.embed_tokens.weight"]
        self.norm = weights["model.norm.weight"]
        self.layers = []
        for layer in range(self.config["num_hidden_layers"]):
            part = lambda name: weights[f"model.layers.{layer}.{name}.weight"]
            self.layers.append({
                "in": part("input_layernorm"), "post": part("post_attention_layernorm"),
                "qkv": torch.cat([part(f"self_attn.{name}_proj") for name in "qkv"]), "o": part("self_attn.o_proj"),
                "gate_up": torch.cat([part("mlp.gate_proj"), part("mlp.up_proj")]), "down": part("mlp.down_proj"),
            })
        self.heads, self.kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        self.dim = self.config["head_dim"]
        inverse = self.config["rope_theta"] ** (-torch.arange(0, self.dim, 2).double() / self.dim)
        angles = torch.arange(2048).double()[:, None] * inverse
        self.cos, self.sin = angles.cos().float(), angles.sin().float()
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.eos = self.config["eos_token_id"]
        vocabulary = self.tokenizer.get_vocab()
        self.punctuation = {vocabulary[mark] for mark in ".,;:?!" if mark in vocabulary}

    def rms(self, x, weight):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"]) * weight

    def rotate(self, x, start):
        cos, sin = (table[start:start + x.shape[1]] for table in (self.cos, self.sin))
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Sequence:
    """One sequence's cache: per layer everything ever stored, and masks of what is still there."""

    def __init__(self, model, prompt, capacity):
        layers, heads = len(model.layers), model.kv_heads
        self.model, self.prompt_len, self.len = model, len(prompt), 0
        self.tokens = list(prompt)
        self.keys = torch.zeros(layers, heads, capacity, model.dim)
        self.values = torch.zeros(layers, heads, capacity, model.dim)
        self.kept = torch.zeros(layers, heads, capacity, dtype=torch.bool)
        self.scores = torch.zeros(layers, heads, capacity)
        # Row by row what every KV head's queries paid attention to.
        self.attention = torch.zeros(layers, heads, capacity, capacity)

    def forward(self, tokens):
        """Logits of some more tokens, between which nothing is evicted."""
        model, start, stop = self.model, self.len, self.len + len(tokens)
        count, group = len(tokens), model.heads // model.kv_heads
        x = model.embedding[torch.tensor(tokens)]
        self.kept[:, :, start:stop] = True
        causal = torch.arange(stop)[None, :] <= torch.arange(start, stop)[:, None]
        for index, layer in enumerate(model.layers):
            qkv = (model.rms(x, layer["in"]) @ layer["qkv"].T).view(count, -1, model.dim).transpose(0, 1)
            queries, keys, values = qkv.split([model.heads, model.kv_heads, model.kv_heads])
            self.keys[index, :, start:stop] = model.rotate(keys, start)
            self.values[index, :, start:stop] = values
            queries = model.rotate(queries, start).reshape(model.kv_heads, group, count, model.dim)
            logits = queries @ self.keys[index, :, None, :stop].transpose(-1, -2) / math.sqrt(model.dim)
            sees = causal & self.kept[index, :, None, None, :stop]
            weights = logits.masked_fill(~sees, -math.inf).softmax(-1)
            result = (weights @ self.values[index, :, None, :stop]).view(model.heads, count, model.dim)
            x = x + result.transpose(0, 1).reshape(count, -1) @ layer["o"].T
            gate, up = (model.rms(x, layer["post"]) @ layer["gate_up"].T).chunk(2, -1)
            x = x + (torch.nn.functional.silu(gate) * up) @ layer["down"].T
            self.scores[index, :, :stop] += weights.sum((1, 2))
            self.attention[index, :, start:stop, :stop] = weights.mean(1)
        self.len = stop
        return model.rms(x, model.norm) @ model.embedding.T

    def order(self, layer, head, recent, forced):
        """Kept positions that are neither recent nor forced, what stays longest first."""
        old = max(self.len - recent, 0)
        free = self.kept[layer, head, :old].clone()
        if forced is not None:
            free &= ~forced[:old]
        positions = free.nonzero()[:, 0].flip(0)
        return positions[self.scores[layer, head, positions].argsort(descending=True, stable=True)]

    def evict(self, layer, head, recent, heavy, forced=None):
        self.kept[layer, head, self.order(layer, head, recent, forced)[heavy:]] = False

    def profile(self, layer, head, queries):
        """What the profiled queries paid to keys that are still there, and how far before the query they lie."""
        stop = self.len
        first = 0 if queries == "all" else max(0, stop - queries)
        rows = self.attention[layer, head, first:stop, :stop] * self.kept[layer, head, :stop]
        distance = torch.arange(first, stop)[:, None] - torch.arange(stop)[None, :]
        return rows / rows.sum(-1, keepdim=True).clamp_min(1e-12), distance

    def recovered(self, layer, head, recent, queries):
        """Recovered mass for every number of heavy hitters from none to all, with nothing forced."""
        rows, distance = self.profile(layer, head, queries)
        outside = (rows * (distance >= recent)).mean(0)
        gains = outside[self.order(layer, head, recent, None)]
        return torch.cat([torch.zeros(1), gains.cumsum(0)]) + 1 - outside.sum()


# --------------------------------------------------------------------------------------------------------------------
# Policies. `evict(sequence, phase)` is called after every stretch, phase one of "prompt", "end", "decode";
# `now` is how many keys FastGen holds in all heads together, `peak` the most that it has held after an eviction.

class Policy:
    end_only = False
    # Share of the capacity that is the latest positions, or their number: three quarters at most then.
    window = 0.5
    threshold = None

    def begin(self, sequence, length):
        """A sequence that may reach `length` = prompt + max_tokens."""
        self.length = length
        capacity = 2 * amount(self.share / 2, length)
        if isinstance(self.window, int):
            self.recent = max(1, min(self.window, amount(0.75, capacity)))
        else:
            self.recent = max(1, amount(self.share * self.window, length))
        self.heavy = max(0, capacity - self.recent)
        self.capacity = self.heavy + self.recent
        self.grid = [(layer, head) for layer in range(len(sequence.model.layers))
                     for head in range(sequence.model.kv_heads)]
        self.now = self.peak = 0
        self.spared = self.capacity >= sequence.prompt_len + max(0, length - sequence.prompt_len - 1)

    def budget(self):
        return self.capacity * len(self.grid)


class Full(Policy):
    share = 1

    def evict(self, sequence, phase):
        pass


class H2O(Policy):
    """Every head as many."""

    def __init__(self, share, end_only=False, window=0.5):
        self.share, self.end_only, self.window = share, end_only, window

    def evict(self, sequence, phase):
        for layer, head in self.grid:
            sequence.evict(layer, head, self.recent, self.heavy)


class PerHead(Policy):
    """Tidemill's `per-head`: keys of a layer compete by score, whichever head they belong to."""

    def __init__(self, share, least=0.2, end_only=False, frozen=False, window=0.5):
        self.share, self.least, self.end_only, self.frozen, self.window = share, least, end_only, frozen, window

    def evict(self, sequence, phase):
        least = amount(self.least, self.heavy)
        if self.frozen and phase == "decode":
            for layer, head in self.grid:
                sequence.evict(layer, head, self.recent, self.fixed[layer, head])
            return
        self.fixed = {}
        for layer in range(len(sequence.model.layers)):
            heads = range(sequence.model.kv_heads)
            victims = int(sequence.kept[layer].sum()) - self.capacity * len(heads)
            orders = [sequence.order(layer, head, self.recent, None) for head in heads]
            if victims > 0:
                may_go = [(float(sequence.scores[layer, head, position]), int(position), head)
                          for head, order in enumerate(orders) for position in order[least:]]
                for _, position, head in sorted(may_go)[:victims]:
                    sequence.kept[layer, head, position] = False
            for head in heads:
                self.fixed[layer, head] = int(sequence.kept[layer, head].sum()) - min(self.recent, sequence.len)


class FastGen(Policy):
    """Every head the cheapest candidate that recovers `threshold` of its attention; the threshold is such that all
    heads of all cases keep the budget on average.

    Candidates: sinks (the first 1 or 4) with or without all punctuation, a local window of 2.5, 5 or 10 % of the
    length, heavy hitters of 0, 2.5, 5, 10, 20, 30 or 50 % of it; or everything.

    What keeps the budget on average is what is held from the prompt's end on; before it no head goes below the budget,
    which is there anyway, and some have more than that. With `by_peak` it is instead the most that a case holds after
    any eviction, and heads keep what they chose.
    """

    WINDOWS = (0.025, 0.05, 0.1)
    HEAVY = (0, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5)

    def __init__(self, share, end_only=False, queries=64, by_peak=False):
        self.share, self.end_only, self.queries, self.by_peak = share, end_only, queries, by_peak

    def candidates(self, sequence):
        """Forced positions and windows of all kinds, windows varying fastest."""
        positions = torch.arange(sequence.len)
        marks = torch.tensor([token in sequence.model.punctuation for token in sequence.tokens[:sequence.len]])
        forced = [(positions < sinks) | (marks & punctuation) for sinks in (1, 4) for punctuation in (False, True)]
        windows = [max(1, amount(window, self.length)) for window in self.WINDOWS]
        return (torch.stack([mask for mask in forced for _ in windows]), torch.tensor(windows).repeat(len(forced)))

    def choose(self, sequence, place):
        """(cost, recent, heavy, forced) of the cheapest that recovers enough; None for everything.

        `Sequence.recovered` for all candidates at once.
        """
        (forced, windows), stop = self.kinds, sequence.len
        kept = sequence.kept[place][:stop]
        rows, distance = sequence.profile(*place, self.queries)
        outside = torch.stack([(rows * (distance >= window)).mean(0) for window in windows[:len(self.WINDOWS)]])
        outside = outside.repeat(len(windows) // len(outside), 1) * ~forced
        old = torch.arange(stop) < (stop - windows)[:, None]
        order = sequence.order(*place, 0, None)
        free = (old & ~forced)[:, order]
        rank = free.cumsum(1)
        gains = outside[:, order] * free
        heavy = torch.tensor([amount(share, self.length) for share in self.HEAVY])
        mass = 1 - outside.sum(1) + (gains * (rank <= heavy[:, None, None])).sum(-1)
        cost = windows.clamp_max(stop) + (forced & old & kept).sum(1) + heavy[:, None]
        options = [(c, -m, index) for index, (c, m) in enumerate(zip(cost.flatten().tolist(), mass.flatten().tolist()))
                   if m >= self.threshold]
        best = min(options, default=None)
        if best is None or best[0] >= self.length:
            return None
        number, kind = divmod(best[2], len(windows))
        marked = torch.zeros(sequence.keys.shape[2], dtype=torch.bool)
        marked[:stop] = forced[kind]
        return best[0], int(windows[kind]), int(heavy[number]), marked

    def evict(self, sequence, phase):
        if phase == "decode":
            for place in self.grid:
                if self.chosen[place] is not None:
                    _, recent, heavy, forced = self.chosen[place]
                    sequence.evict(*place, recent, heavy, forced)
            return
        self.kinds = self.candidates(sequence)
        self.chosen = {}
        for place in self.grid:
            choice = self.choose(sequence, place)
            if choice is not None and phase == "prompt" and not self.by_peak:
                cost, recent, heavy, forced = choice
                choice = cost, recent, heavy + max(0, self.capacity - cost), forced
            self.chosen[place] = choice
            if choice is not None:
                sequence.evict(*place, *choice[1:])
        self.now = int(sequence.kept.sum())
        if phase == "end":
            most = max(sequence.len, self.length - 1)
            self.now = sum(most if choice is None else min(most, choice[0]) for choice in self.chosen.values())
        self.peak = max(self.peak, self.now)


class Shared(Policy):
    """The budget is fixed; heads that share it (`scope`: those of a layer, all, or none) get heavy hitters one by one,
    always the head that recovers least so far: all recover the same T, as high as the budget allows. They begin with
    the window and `least` of the even number of heavy hitters, or with `floor` of the even capacity.

    `gain` instead gives the next one to the head whose mass grows most by it. `splits` lets the window of a head be
    one of several shares of the even capacity, whichever recovers most. Numbers are found
    anew at each eviction within the prompt and stay as the prompt's end leaves them.
    """

    def __init__(self, share, end_only=False, queries=64, least=0.2, scope="layer", splits=None, gain=False,
                 floor=None):
        self.share, self.end_only, self.queries = share, end_only, queries
        self.least, self.scope, self.splits, self.gain, self.floor = least, scope, splits, gain, floor

    def curve(self, sequence, place):
        """Of every capacity from the window on: mass, and the window it is reached with."""
        windows = [self.recent] if self.splits is None else sorted(
            {max(1, amount(split, self.capacity)) for split in self.splits})
        curves = {w: sequence.recovered(*place, w, self.queries).tolist() for w in windows}
        most = int(sequence.kept[place].sum())
        best = []
        for capacity in range(most + 1):
            options = []
            for window, curve in curves.items():
                shown = min(window, sequence.len)
                if shown <= capacity:
                    options.append((curve[min(capacity - shown, len(curve) - 1)], window))
            best.append(max(options, key=lambda option: option[0]) if options else (0.0, min(curves)))
        return best

    def evict(self, sequence, phase):
        if phase != "decode":
            self.keeps = {}
            groups = {"head": lambda place: place, "layer": lambda place: place[0], "all": lambda place: None}
            group = groups[self.scope]
            for key in dict.fromkeys(map(group, self.grid)):
                self.allot(sequence, [place for place in self.grid if group(place) == key])
        for place, (recent, heavy) in self.keeps.items():
            sequence.evict(*place, recent, heavy)

    def allot(self, sequence, places):
        budget = self.capacity * len(places)
        curves = {place: self.curve(sequence, place) for place in places}
        most = {place: len(curve) - 1 for place, curve in curves.items()}
        if sum(most.values()) <= budget:
            # All fits: what each may grow to is decided later, or shared evenly if it never is.
            given = {place: max(self.capacity, most[place]) for place in places}
            while sum(given.values()) > budget:
                given[max(given, key=lambda place: given[place] - most[place])] -= 1
        else:
            floor = self.recent + amount(self.least, self.heavy)
            if self.floor is not None:
                floor = max(2, amount(self.floor, self.capacity))
            given = {place: min(most[place], floor) for place in places}
            left = budget - sum(given.values())
            for _ in range(left):
                open_places = [place for place in places if given[place] < most[place]]
                if not open_places:
                    break
                if self.gain:
                    key = lambda place: curves[place][given[place]][0] - curves[place][given[place] + 1][0]
                else:
                    key = lambda place: curves[place][given[place]][0]
                given[min(open_places, key=key)] += 1
        for place in places:
            window = curves[place][min(given[place], most[place])][1]
            self.keeps[place] = window, max(0, given[place] - window)


# --------------------------------------------------------------------------------------------------------------------
# Measuring.

def read(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def solves(text, reference):
    """As scripts/demo_quality.py has it."""
    rest = text.strip().removeprefix(reference.strip())
    return rest != text.strip() and not rest[:1].isalnum()


def prefill(model, policy, tokens, max_tokens):
    sequence = Sequence(model, tokens, len(tokens) + max_tokens)
    policy.begin(sequence, len(tokens) + max_tokens)
    logits = []
    step = len(tokens) if policy.end_only else PAGE
    for start in range(0, len(tokens), step):
        logits.append(sequence.forward(tokens[start:start + step]))
        if not policy.spared:
            policy.evict(sequence, "end" if sequence.len == len(tokens) else "prompt")
    return sequence, torch.cat(logits)


def answer(model, policy, tokens, references):
    """Whether a case is solved. Stops once what follows cannot change it."""
    sequence, logits = prefill(model, policy, tokens, MAX_TOKENS)
    text, new = "", []
    enough = max(len(reference.strip()) for reference in references)
    while True:
        token = int(logits[-1].argmax())
        if token == model.eos:
            break
        new.append(token)
        text = model.tokenizer.decode(new)
        if len(new) == MAX_TOKENS or len(text.strip()) > enough:
            break
        sequence.tokens.append(token)
        logits = sequence.forward([token])
        if not policy.spared:
            policy.evict(sequence, "decode")
    return any(solves(text, reference) for reference in references)


class Data:
    def __init__(self, root, model, limit):
        folder = root / "examples" / "tasks"
        encode = lambda text: model.tokenizer.encode(text).ids
        self.cases = {task: [(encode(case["prompt"]), case["references"]) for case in read(folder / f"{task}.jsonl")]
                      [:limit] for task in TASKS}
        self.stories = [encode(story["text"]) for story in read(folder / "stories.jsonl")][:limit]


def shares_kept(model, policy, prompts, max_tokens):
    """Averages of what is held at the prompt's end and at most, as shares of the budget."""
    now = peak = budget = 0
    for tokens in prompts:
        prefill(model, policy, tokens, max_tokens)
        if not policy.spared:
            now, peak, budget = now + policy.now, peak + policy.peak, budget + policy.budget()
    return now / budget, peak / budget


def find_threshold(model, policy, prompts, max_tokens, rounds=10, step=4):
    """Sets the threshold with which prompts keep the budget on average, or a little less. Found on some of them.

    Gives it and what all prompts hold with it, at the prompt's end and at most.
    """
    low, high = 0.0, 7.0
    policy.threshold = 0.0
    for _ in range(rounds):
        middle = (low + high) / 2
        policy.threshold, previous = 1 - math.exp(-middle), policy.threshold
        kept = shares_kept(model, policy, prompts[::step], max_tokens)[policy.by_peak]
        if kept > 1:
            high, policy.threshold = middle, previous
        elif kept > 0.995:
            break
        else:
            low = middle
    return [policy.threshold, *shares_kept(model, policy, prompts, max_tokens)]


def measure(model, data, policy, with_stories):
    """Outcomes of all cases, perplexity, and the thresholds that were found."""
    result = {"thresholds": {}}
    for task in TASKS:
        if isinstance(policy, FastGen):
            prompts = [tokens for tokens, _ in data.cases[task]]
            result["thresholds"][task] = find_threshold(model, policy, prompts, MAX_TOKENS)
        result[task] = [answer(model, policy, tokens, references) for tokens, references in data.cases[task]]
    if with_stories and not policy.end_only:
        if isinstance(policy, FastGen):
            result["thresholds"]["stories"] = find_threshold(model, policy, data.stories, 0)
        nats = tokens = 0
        for story in data.stories:
            _, logits = prefill(model, policy, story, 0)
            nats -= float(logits[:-1].log_softmax(-1).gather(1, torch.tensor(story[1:])[:, None]).double().sum())
            tokens += len(story) - 1
        result["perplexity"] = math.exp(nats / tokens)
    return result


SPLITS = (0.125, 0.25, 0.5, 0.75)
FINE = (0.0625, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 1.0)
POLICIES = {
    "h2o (b)": H2O,
    **{f"h2o, window {window:g}": functools.partial(H2O, window=window) for window in SPLITS if window != 0.5},
    **{f"h2o, {window} latest": functools.partial(H2O, window=window) for window in (4, 8, 12)},
    "per-head (e)": PerHead,
    "per-head, 8 latest": functools.partial(PerHead, window=8),
    **{f"per-head, window {window:g}": functools.partial(PerHead, window=window) for window in SPLITS if window != 0.5},
    "per-head, frozen at the prompt's end": functools.partial(PerHead, frozen=True),
    "FastGen (c), last 64": FastGen,
    "FastGen (c), last 64, peak at budget": functools.partial(FastGen, by_peak=True),
    "shared T (d), last 64, least 0.2": Shared,
    "shared T (d), all queries, least 0.2": functools.partial(Shared, queries="all"),
    "shared T (d), last 64, least 0.5": functools.partial(Shared, least=0.5),
    "shared T (d), last 64, all layers": functools.partial(Shared, scope="all"),
    "shared by gain, last 64, least 0.2": functools.partial(Shared, gain=True),
    "shared by gain, all queries, least 0.2": functools.partial(Shared, gain=True, queries="all"),
    "shared T (d), last 64, windows vary": functools.partial(Shared, splits=SPLITS),
    "shared T (d), last 64, windows vary, all layers": functools.partial(Shared, splits=SPLITS, scope="all"),
    "shared T (d), last 64, windows vary, floor 0.2": functools.partial(Shared, splits=SPLITS, floor=0.2),
    "shared T (d), last 64, windows vary, floor 0.2, all layers": functools.partial(Shared, splits=SPLITS, floor=0.2,
                                                                                   scope="all"),
    "own budget, last 64, windows vary": functools.partial(Shared, splits=SPLITS, scope="head"),
    "own budget, all queries, windows vary": functools.partial(Shared, splits=SPLITS, scope="head", queries="all"),
    "own budget, last 64, windows vary finely": functools.partial(Shared, splits=FINE, scope="head"),
    "end: h2o": functools.partial(H2O, end_only=True),
    "end: per-head": functools.partial(PerHead, end_only=True),
    "end: FastGen (c), last 64": functools.partial(FastGen, end_only=True),
    "end: shared T (d), last 64": functools.partial(Shared, end_only=True),
    "end: shared by gain, last 64": functools.partial(Shared, end_only=True, gain=True),
    "end: shared T (d), last 64, windows vary": functools.partial(Shared, end_only=True, splits=SPLITS),
    "end: own budget, last 64, windows vary": functools.partial(Shared, end_only=True, splits=SPLITS, scope="head"),
}


def against(this, other):
    """Difference in points of paired outcomes, and its standard error."""
    differences = [a - b for a, b in zip(this, other)]
    count, mean = len(differences), sum(differences) / len(differences)
    error = math.sqrt(sum((d - mean) ** 2 for d in differences)) / count
    return 100 * mean, 100 * error


def table(results, share, reference):
    yield f"## {100 * share:g} % of prompt + max_tokens\n"
    yield f"Solved in percent (binomial standard error); after `/` against {reference}, paired.\n"
    yield "| policy | " + " | ".join(TASKS) + " | all tasks | perplexity |"
    yield "|---" * (len(TASKS) + 3) + "|"
    base = results.get(f"{share} {reference}")
    for key, result in results.items():
        if not key.startswith(f"{share} ") and key != "full":
            continue
        cells = []
        for tasks in [[task] for task in TASKS] + [list(TASKS)]:
            solved = sum((result[task] for task in tasks), [])
            rate = sum(solved) / len(solved)
            cell = f"{100 * rate:.1f} ({100 * math.sqrt(rate * (1 - rate) / len(solved)):.1f})"
            if base and base is not result and key != "full":
                mean, error = against(solved, sum((base[task] for task in tasks), []))
                cell += f" / {mean:+.1f} ± {error:.1f}"
            cells.append(cell)
        perplexity = f"{result['perplexity']:.4f}" if "perplexity" in result else ""
        yield f"| {key.removeprefix(f'{share} ')} | " + " | ".join(cells) + f" | {perplexity} |"
    yield ""
    for key, result in results.items():
        if key.startswith(f"{share} ") and result["thresholds"]:
            found = ", ".join(f"{task} {threshold:.3f} ({100 * now:.0f} %, {100 * peak:.0f} %)"
                              for task, (threshold, now, peak) in result["thresholds"].items())
            yield (f"- {key.removeprefix(f'{share} ')}: T (share of the budget held from the prompt's end on, and at "
                   f"most after an eviction) {found}")
    yield ""


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=pathlib.Path, default=pathlib.Path(__file__).resolve().parent.parent,
                        help="where demo/ and examples/tasks/ are")
    parser.add_argument("--shares", default="0.2,0.1")
    parser.add_argument("--only", help="names of policies that contain one of these, split at `;`")
    parser.add_argument("--cache", type=pathlib.Path, help="results by name, read and added to")
    parser.add_argument("--limit", type=int, help="cases per task, and stories")
    parser.add_argument("--no-stories", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = Model(arguments.root / "demo")
    data = Data(arguments.root, model, arguments.limit)
    cache = arguments.cache
    results = json.loads(cache.read_text()) if cache and cache.exists() else {}
    shares = [float(share) for share in arguments.shares.split(",")]
    wanted = [name for name in POLICIES
              if not arguments.only or any(part in name for part in arguments.only.split(";"))]
    runs = [("full", Full())] + [(f"{share} {name}", POLICIES[name](share)) for name in wanted for share in shares]
    for key, policy in runs:
        if key not in results:
            started = time.time()
            results[key] = measure(model, data, policy, not arguments.no_stories)
            rates = ", ".join(f"{task} {100 * sum(results[key][task]) / len(results[key][task]):.1f}" for task in TASKS)
            print(f"{key}: {rates}, perplexity {results[key].get('perplexity', 0):.4f}, "
                  f"{results[key]['thresholds'] or ''} {time.time() - started:.0f} s", file=sys.stderr, flush=True)
            if cache:
                cache.write_text(json.dumps(results))
    for share in shares:
        print("\n".join(table(results, share, "per-head (e)")))


if __name__ == "__main__":
    main()
