#!/usr/bin/env python3
"""Train the demo model on the corpus of demo_corpus.py, measure it, and write it to demo/.

    python scripts/demo_corpus.py --out CORPUS
    python scripts/train_demo.py --corpus CORPUS --work WORK --out demo

Needs torch, transformers and tokenizers; a CPU is enough. The model is a Hugging Face
LlamaForCausalLM, so what is trained is what is shipped. WORK holds the checkpoint: run the same
command again to go on after an interruption. `--evaluate` only measures what is in --out, and
`--export` writes the model of the last checkpoint without training further.
"""

import argparse
import json
import math
import random
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers import AddedToken
from transformers import LlamaConfig, LlamaForCausalLM

import demo_corpus

SPECIALS = ["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
BOS, EOS = 0, 1
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# Weights of a token in the loss: one that cannot be predicted, an answer of a kind, anything else.
NOISE_WEIGHT, ANSWER_WEIGHT = 0.1, {"recall": 3.0, "label": 2.5, "echo": 2.0}


# ---------------------------------------------------------------------------------------------
# Tokeniser

def build_tokenizer():
    """Byte-level BPE whose words are whole tokens: with `ignore_merges` no merge is needed.

    A word of the corpus, leading space included, is one token; all else falls back to bytes, so
    any UTF-8 text encodes and decodes. Numbers are a space and digits.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    words = [split.pre_tokenize_str(word)[0][0] for word in demo_corpus.vocabulary()]
    names = SPECIALS + alphabet + words
    bpe = models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[], ignore_merges=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIALS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)])
    return tokenizer


def write_tokenizer(tokenizer, context, out):
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "add_eos_token": False,
        "clean_up_tokenization_spaces": False, "model_max_length": context,
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(out / "tokenizer_config.json", settings)


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_lines(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


# ---------------------------------------------------------------------------------------------
# Data

def rows(path, tokenizer, length):
    """(tokens, weights), both (rows, length + 1): documents one after another, from a row's start.

    What does not fit a row is dropped, so every row begins with the beginning of a document.
    """
    docs = read_lines(path)
    tokens, weights, row, row_weights = [], [], [], []
    for start in range(0, len(docs), 4096):
        batch = docs[start:start + 4096]
        for doc, encoding in zip(batch, tokenizer.encode_batch([doc["text"] for doc in batch])):
            row += encoding.ids + [EOS]
            answer = ANSWER_WEIGHT.get(doc["kind"], 1.0)
            row_weights += [NOISE_WEIGHT] + [
                answer if any(begin <= first and last <= end for begin, end in doc["spans"]) else NOISE_WEIGHT
                for first, last in encoding.offsets[1:]] + [1.0]
            if len(row) > length:
                tokens.append(row[:length + 1])
                weights.append(row_weights[:length + 1])
                row, row_weights = [], []
    return torch.tensor(tokens, dtype=torch.int16), torch.tensor(weights, dtype=torch.float16)


# ---------------------------------------------------------------------------------------------
# Training

def build_model(vocab_size, args):
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=args.hidden, intermediate_size=args.ffn,
        num_hidden_layers=args.layers, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        max_position_embeddings=1024, rms_norm_eps=1e-5, tie_word_embeddings=True,
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=None, use_cache=True,
        attention_bias=False, mlp_bias=False, initializer_range=0.05, attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def optimizers(model, args):
    """Muon for the matrices of the layers, AdamW for the embedding and the norms."""
    matrices = [value for name, value in model.named_parameters() if value.ndim == 2 and "embed" not in name]
    others = [value for name, value in model.named_parameters() if value.ndim != 2 or "embed" in name]
    pair = [
        torch.optim.Muon(matrices, lr=2 * args.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for optim in pair:
        for group in optim.param_groups:
            group["initial_lr"] = group["lr"]
    return pair


def learning_rate(done, total):
    """Of the peak: a short warm-up, a plateau, then linearly to nearly zero over the last 45 %."""
    return min(1.0, done / (0.01 * total) + 0.02, max(0.01, (1 - done / total) / 0.45))


def stage_plan(text):
    """`128:3e6,512:8e6` as [(row length, tokens)]."""
    return [(int(length), int(float(tokens))) for length, tokens in (part.split(":") for part in text.split(","))]


def train(model, tokenizer, args):
    plan = stage_plan(args.stages)
    total = sum(tokens for _, tokens in plan)
    optims = optimizers(model, args)
    checkpoint = args.work / "checkpoint.pt"
    done, clock = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        for optim, saved in zip(optims, state["optims"]):
            optim.load_state_dict(saved)
        done, clock = state["done"], state["clock"]
        print(f"going on after {done} tokens", flush=True)
    started = time.time()
    peak = learning_rate(done, total)

    def spent():
        """Share of --minutes used by this process; 0 without that limit."""
        return (time.time() - started) / (60 * args.minutes) if args.minutes else 0.0

    forward = torch.compile(model.model, dynamic=False) if args.compile else model.model
    begun, saved_at, step = time.time() - clock, time.time(), 0

    def save():
        state = {"model": model.state_dict(), "optims": [optim.state_dict() for optim in optims],
                 "done": done, "clock": time.time() - begun}
        torch.save(state, checkpoint.with_suffix(".new"))
        checkpoint.with_suffix(".new").rename(checkpoint)

    model.train()
    stage_start = 0
    for number, (length, stage_tokens) in enumerate(plan):
        stage_end = stage_start + stage_tokens
        # With --minutes the last stage gets what is left of the time, an eighth at least.
        time_end = 1.0 if number + 1 == len(plan) else 0.875
        if done >= stage_end:
            stage_start = stage_end
            continue
        cache = args.work / f"rows-{length}.pt"
        if not cache.exists():
            torch.save(rows(args.corpus / f"train-{length}.jsonl", tokenizer, length), cache)
        tokens, weights = torch.load(cache)
        batch = max(1, args.batch_tokens // length)
        print(f"rows of {length}: {len(tokens) * length} tokens, {stage_tokens} wanted", flush=True)
        stage_done = done
        while done < stage_end and spent() < time_end:
            index = (done - stage_start) // length
            pick = [(index + offset) % len(tokens) for offset in range(batch)]
            ids, weight = tokens[pick].long(), weights[pick].float()[:, 1:]
            rate = max(0.01, peak * (1 - spent())) if args.minutes else learning_rate(done, total)
            for optim in optims:
                for group in optim.param_groups:
                    group["lr"] = group["initial_lr"] * rate
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.bf16):
                hidden = forward(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
                logits = F.linear(hidden, model.model.embed_tokens.weight)
            nll = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            weight = weight.flatten()
            loss = (nll * weight).sum() / weight.sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optim in optims:
                optim.step()
                optim.zero_grad(set_to_none=True)
            done, step = done + batch * length, step + 1
            if step % 20 == 0:
                seconds = time.time() - begun
                kinds = " ".join(f"{value:g}: {nll.detach()[weight == value].mean():.3f}" for value in (1, 2, 2.5, 3))
                print(f"{done:9d} tokens {seconds:6.0f} s {done / seconds:6.0f}/s loss {loss.item():.4f} "
                      f"by weight {kinds}", flush=True)
            if time.time() - saved_at > args.save_every:
                save()
                saved_at = time.time()
        print(f"rows of {length}: {done - stage_done} tokens by this process", flush=True)
        stage_start, stage_end = done, done
    save()
    return done, time.time() - begun


# ---------------------------------------------------------------------------------------------
# Export and measurement

def export(model, tokenizer, out):
    """bf16 weights under their Hugging Face names, without the tied output matrix."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().to(torch.bfloat16).contiguous()
               for name, value in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    config = model.config
    write_json(out / "config.json", {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "vocab_size": config.vocab_size, "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size, "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads, "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim, "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings, "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": 10000.0, "rope_scaling": None, "attention_bias": False, "mlp_bias": False,
        "tie_word_embeddings": True, "bos_token_id": BOS, "eos_token_id": EOS, "torch_dtype": "bfloat16",
    })
    write_json(out / "generation_config.json", {"bos_token_id": BOS, "eos_token_id": EOS})
    write_tokenizer(tokenizer, config.max_position_embeddings, out)


def load_exported(out):
    """The model as shipped, weights rounded to bf16, arithmetic in f32."""
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(out)).float()
    weights = {name: value.float() for name, value in load_file(out / "model.safetensors").items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert missing in ([], ["lm_head.weight"]) and not unexpected, (missing, unexpected)
    model.tie_weights()
    return model.eval(), Tokenizer.from_file(str(out / "tokenizer.json"))


@torch.no_grad()
def log_probs(model, sequences, batch=16):
    """Per sequence, (log-probability, whether it is the greedy choice) of each token after the first."""
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    results = [None] * len(sequences)
    for start in range(0, len(order), batch):
        part = order[start:start + batch]
        longest = max(len(sequences[index]) for index in part)
        ids = torch.tensor([sequences[index] + [EOS] * (longest - len(sequences[index])) for index in part])
        logits = F.log_softmax(model(input_ids=ids, use_cache=False).logits[:, :-1].float(), dim=-1)
        picked = logits.gather(2, ids[:, 1:, None])[..., 0]
        greedy = logits.argmax(-1) == ids[:, 1:]
        for row, index in enumerate(part):
            count = len(sequences[index]) - 1
            results[index] = picked[row, :count], greedy[row, :count]
    return results


def evaluate(model, tokenizer, tasks_dir):
    """Held-out perplexity beside the grammar's own, and the share of tasks solved by greedy decoding."""
    stories = read_lines(tasks_dir / "stories.jsonl")
    scored = log_probs(model, [tokenizer.encode(line["text"]).ids for line in stories])
    tokens = sum(len(logs) for logs, _ in scored)
    assert tokens == sum(line["tokens"] for line in stories)
    nats = -sum(logs.sum().item() for logs, _ in scored) / tokens
    exact = sum(line["nats"] for line in stories) / tokens
    table = {"story tokens": tokens, "exact nats": exact, "model nats": nats, "exact perplexity": math.exp(exact),
             "model perplexity": math.exp(nats), "excess": math.exp(nats - exact) - 1}
    for name in ("recall", "labelling", "arithmetic"):
        lines = read_lines(tasks_dir / f"{name}.jsonl")
        encoded = [(tokenizer.encode(line["prompt"]).ids,
                    tokenizer.encode(line["references"][0], add_special_tokens=False).ids) for line in lines]
        solved = 0
        for (_, answer), (_, greedy) in zip(encoded, log_probs(model, [prompt + answer for prompt, answer in encoded])):
            solved += bool(greedy[-len(answer):].all())
        table[name] = solved / len(lines)
        lengths = [len(prompt) for prompt, _ in encoded]
        table[f"{name} prompt tokens"] = f"{min(lengths)} to {max(lengths)}"
    return table


def write_tasks(corpus, tasks_dir, tokenizer):
    """Copy the held-out tasks beside the examples, with token counts for the stories."""
    tasks_dir.mkdir(parents=True, exist_ok=True)
    for name in ("stories", "recall", "labelling", "arithmetic"):
        lines = read_lines(corpus / f"heldout-{name}.jsonl")
        if name == "stories":
            for line in lines:
                line["tokens"] = len(tokenizer.encode(line["text"], add_special_tokens=False).ids)
        demo_corpus.write_lines(tasks_dir / f"{name}.jsonl", lines)


def write_readme(model, table, training, args):
    parameters = sum(value.numel() for value in model.parameters())
    size = (args.out / "model.safetensors").stat().st_size
    config = model.config
    lines = [
        "# The demo model", "",
        "A small Llama-type model, trained from scratch on the synthetic corpus of `scripts/demo_corpus.py`. It is",
        "built into the binary as the model `demo`. It knows nothing but that corpus: short stories, key-value",
        "recall, few-shot labelling, small sums, and the same as chat.", "",
        f"{parameters:,} parameters in bf16 ({size:,} bytes), vocabulary {config.vocab_size}, hidden "
        f"{config.hidden_size}, {config.num_hidden_layers} layers,",
        f"{config.num_attention_heads} query heads on {config.num_key_value_heads} key-value heads of "
        f"{config.head_dim}, feed-forward {config.intermediate_size}, context "
        f"{config.max_position_embeddings}, tied embeddings.", "",
        "## Measured", "",
        "On the held-out tasks in `examples/tasks`, with the weights as shipped (bf16) and f32 arithmetic:", "",
        "| | |", "|---|---|",
        f"| story perplexity of the model | {table['model perplexity']:.4f} ({table['model nats']:.4f} nats a token) |",
        f"| story perplexity of the grammar (exact) | {table['exact perplexity']:.4f} ({table['exact nats']:.4f} nats a token) |",
        f"| excess | {100 * table['excess']:.2f} % over {table['story tokens']:,} tokens |",
    ]
    for name in ("recall", "labelling", "arithmetic"):
        lines.append(f"| {name}, greedy ({table[f'{name} prompt tokens']} prompt tokens) | {100 * table[name]:.1f} % |")
    lines += [
        "", "`stories.jsonl` gives for each story its exact nats under the grammar and its number of tokens; both count",
        "the text only, given `<s>` (not `</s>`). A task is solved when greedy decoding gives the whole reference.",
        "", "## Made by", "", "```", *training["commands"], "```", "",
        f"Training saw {training['tokens'] / 1e6:.1f} million tokens in {training['seconds'] / 60:.0f} minutes on "
        f"{torch.get_num_threads()} CPU threads; `--evaluate` measures again.", "",
    ]
    (args.out / "README.md").write_text("\n".join(lines), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", type=Path, help="what demo_corpus.py wrote")
    parser.add_argument("--work", type=Path, help="folder for the checkpoint, outside the repository")
    parser.add_argument("--out", type=Path, default=Path("demo"))
    parser.add_argument("--tasks", type=Path, default=Path("examples/tasks"))
    parser.add_argument("--stages", default="128:3e6,512:8e6,1024:1e6", help="row length:tokens, in order")
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--ffn", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--minutes", type=float, help="finish within, the learning rate falling to zero on the way")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save-every", type=float, default=120, help="seconds between checkpoints")
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--export", action="store_true", help="write the last checkpoint, train no further")
    parser.add_argument("--evaluate", action="store_true", help="measure the model in --out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.evaluate:
        model, tokenizer = load_exported(args.out)
        print(json.dumps(evaluate(model, tokenizer, args.tasks), indent=2))
        return
    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer.get_vocab_size(), args)
    print(f"{sum(value.numel() for value in model.parameters())} parameters, vocabulary {tokenizer.get_vocab_size()}")
    if args.export:
        state = torch.load(args.work / "checkpoint.pt")
        model.load_state_dict(state["model"])
        done, seconds = state["done"], state["clock"]
    else:
        done, seconds = train(model, tokenizer, args)
    export(model, tokenizer, args.out)
    write_tasks(args.corpus, args.tasks, tokenizer)
    model, tokenizer = load_exported(args.out)
    table = evaluate(model, tokenizer, args.tasks)
    print(json.dumps(table, indent=2))
    flags = [f"--stages {args.stages} --batch-tokens {args.batch_tokens} --lr {args.lr} --hidden {args.hidden} "
             f"--ffn {args.ffn} --layers {args.layers} --seed {args.seed}" + " --bf16" * args.bf16
             + " --compile" * args.compile + (f" --minutes {args.minutes:g}" if args.minutes else "")]
    commands = ["python scripts/demo_corpus.py --out CORPUS", "python scripts/train_demo.py --corpus CORPUS --work WORK \\",
                *[f"    {flag}" for flag in flags]]
    write_readme(model, table, {"commands": commands, "tokens": done, "seconds": seconds}, args)


if __name__ == "__main__":
    main()
