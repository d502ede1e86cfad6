#!/usr/bin/env python3
"""Make the golden files in tests/goldens from Hugging Face transformers.

    python -m venv .venv && .venv/bin/pip install -r scripts/requirements-goldens.txt
    .venv/bin/python scripts/make_goldens.py            # rewrites tests/goldens (half a minute)
    .venv/bin/python scripts/make_goldens.py --check    # makes them anew elsewhere and compares

Written:
  tests/goldens/NAME/        a tiny random model as a Hugging Face directory, with its tokenizer, and
                             golden.json: greedy tokens and log-probabilities for a few prompts
  tests/goldens/tokenizers.json   text -> ids and ids -> text
  tests/goldens/chat.json         chat templates and what they render to
  tests/goldens/rope.json         inverse frequencies and attention factors of each RoPE type

In golden.json each case has `prompt_ids`, `max_tokens`, the greedy `tokens`, their `logprobs`, per step the
`top` three as [id, logprob], and `prompt_logprobs` (the first null). Log-probabilities are natural, of the
unmodified logits.

Every case runs alone (batch 1, no padding, eager attention, float32) on a freshly loaded model, as one
forward pass over the prompt and then one cached pass per token. Dynamic NTK and longrope take their
frequencies from the length of the pass, so a prompt is rotated for its full length, generated token t for
its own position + 1, and cached keys stay as they were. EOS does not stop a case.

Weights come from seeds; the first seed whose greedy choices all lead by at least MIN_GAP is kept, so that
a correct implementation cannot pick another token by rounding, and whose cases are varied. Files come out
byte for byte the same on one kind of CPU; another may round the sixth digit of a number differently.
"""

import argparse
import filecmp
import hashlib
import json
import random
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

OUT = Path(__file__).resolve().parent.parent / "tests" / "goldens"
MIN_GAP = 5e-3  # least lead, in logits, of every greedy choice
MIN_DISTINCT = 0.2  # least share of a case's tokens that differ: a model that repeats itself proves little
TOP = 3  # candidates listed per step

ARCHITECTURES = {
    "opt": "OPTForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
}


@dataclass
class Model:
    """One golden model: what its directory holds and which cases are run on it."""

    name: str
    covers: str
    family: str
    config: dict
    tokenizer: str  # key of TOKENIZERS
    # "saved": config.json as transformers writes it (its v5 dialect, every field). "plain": the keys of
    # `config` only, for the v4 dialect and for keys that transformers would drop on saving.
    config_style: str = "plain"
    dtype: torch.dtype = torch.float32
    file: str = "safetensors"  # or "bin"
    shards: int = 1
    layout: str = ""  # key of LAYOUTS
    generation_config: dict | None = None
    # (prompt length, generated tokens)
    cases: tuple = ((1, 24), (17, 32), (70, 28), (150, 24))


# --- the models ---------------------------------------------------------------------------------

OPT = dict(
    vocab_size=288, num_hidden_layers=2, max_position_embeddings=180, activation_function="relu",
    bos_token_id=2, eos_token_id=2, pad_token_id=1,
)  # fmt: skip
LLAMA = dict(
    vocab_size=288, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5, hidden_act="silu",
    tie_word_embeddings=False, bos_token_id=276, eos_token_id=277,
)  # fmt: skip
QWEN = LLAMA | dict(bos_token_id=None, eos_token_id=278, rms_norm_eps=1e-6)
NEOX = dict(
    vocab_size=288, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=256, hidden_act="gelu", layer_norm_eps=1e-5, bos_token_id=276, eos_token_id=276,
    tie_word_embeddings=False,
)  # fmt: skip
LONG_CASES = ((3, 24), (40, 40), (64, 12), (65, 12), (150, 24))  # below, across, at and beyond a length of 64

MODELS = [
    Model(
        "opt-preln", "pre-LN, odd head size 9, tied; vocab.json + merges.txt only; generation_config",
        "opt", OPT | dict(hidden_size=27, num_attention_heads=3, ffn_dim=40), "opt", config_style="saved",
        generation_config=dict(bos_token_id=2, eos_token_id=2, pad_token_id=1, temperature=0.7, top_p=0.9, do_sample=True),
    ),
    Model(
        "opt-postln", "post-LN, project_in/out, no final LN (opt-350m); .bin with lm_head sharing storage",
        "opt",
        OPT | dict(
            hidden_size=30, num_attention_heads=3, ffn_dim=40, do_layer_norm_before=False, word_embed_proj_dim=20,
            _remove_final_layer_norm=False, torch_dtype="float32",
        ),
        "opt", file="bin", layout="opt-lm-head-shared",
    ),
    Model(
        "opt-noprefix", ".bin with names decoder.* (opt-6.7b), no lm_head, q/k/v views of one storage; "
        "_remove_final_layer_norm",
        "opt",
        OPT | dict(
            hidden_size=32, num_attention_heads=4, ffn_dim=44, word_embed_proj_dim=32, do_layer_norm_before=True,
            _remove_final_layer_norm=True, torch_dtype="float32",
        ),
        "opt", file="bin", layout="opt-noprefix",
    ),
    Model(
        "opt-f16", "f16 .bin in two shards with an index, lm_head present as an equal copy",
        "opt",
        OPT | dict(
            hidden_size=40, num_attention_heads=5, ffn_dim=48, word_embed_proj_dim=40, do_layer_norm_before=True,
            torch_dtype="float16",
        ),
        "opt", file="bin", shards=2, dtype=torch.float16, layout="opt-lm-head-copy",
    ),
    Model(
        "opt-nobias", "enable_bias false, gelu, untied head, head size 5, layer norms without weights",
        "opt",
        OPT | dict(
            hidden_size=30, num_attention_heads=6, ffn_dim=36, word_embed_proj_dim=30, do_layer_norm_before=True,
            enable_bias=False, layer_norm_elementwise_affine=False, activation_function="gelu",
            tie_word_embeddings=False, torch_dtype="float32",
        ),
        "opt",
    ),
    Model(
        "llama-mha", "Llama 1 style v4 config: no num_key_value_heads, no rope_theta; stored inv_freq to skip; "
        "SentencePiece-like tokenizer; eos list in generation_config",
        "llama",
        {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
        | dict(vocab_size=304, bos_token_id=1, eos_token_id=2, torch_dtype="float32"),
        "llama2", layout="llama-inv-freq",
        generation_config=dict(bos_token_id=1, eos_token_id=[2, 5], max_new_tokens=12),
    ),
    Model(
        "llama-gqa-tied", "GQA 4:1, tied, rope_theta 500000, v5 config as saved",
        "llama",
        LLAMA | dict(
            num_attention_heads=8, num_key_value_heads=2, hidden_size=48, tie_word_embeddings=True,
            rope_parameters=dict(rope_type="default", rope_theta=500000.0),
        ),
        "llama3", config_style="saved",
        generation_config=dict(bos_token_id=276, eos_token_id=[277, 278], temperature=0.6, top_p=0.9, do_sample=True),
    ),
    Model(
        "llama-head20", "head_dim 20 on hidden 30 / 3 heads, GQA 3:1, a large rms_norm_eps",
        "llama",
        LLAMA | dict(
            hidden_size=30, num_attention_heads=3, num_key_value_heads=1, head_dim=20, rms_norm_eps=0.05,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0),
        ),
        "llama3", config_style="saved",
    ),
    Model(
        "llama-bias", "head_dim 10, attention_bias and mlp_bias, v4 config",
        "llama",
        LLAMA | dict(
            hidden_size=30, num_attention_heads=6, num_key_value_heads=2, head_dim=10, attention_bias=True,
            mlp_bias=True, rope_theta=10000.0, rope_scaling=None, torch_dtype="float32",
        ),
        "llama3",
    ),
    Model(
        "llama-linear", "RoPE linear, v4 `type`",
        "llama", LLAMA | dict(rope_theta=10000.0, rope_scaling=dict(type="linear", factor=2.5), torch_dtype="float32"),
        "llama3",
    ),
    Model(
        "llama-dynamic", "RoPE dynamic NTK, v4 `type`; prompts below, across, at and beyond max_position_embeddings",
        "llama",
        LLAMA | dict(
            max_position_embeddings=64, rope_theta=10000.0, rope_scaling=dict(type="dynamic", factor=4.0),
            torch_dtype="float32",
        ),
        "llama3", cases=LONG_CASES,
    ),
    Model(
        "llama-llama3", "RoPE llama3, v4 `rope_type`; tied; three safetensors shards; eos list in the config",
        "llama",
        LLAMA | dict(
            rope_theta=10000.0, tie_word_embeddings=True, eos_token_id=[277, 278], head_dim=16, torch_dtype="float32",
            rope_scaling=dict(
                rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=64,
            ),
        ),
        "llama3", shards=3,
    ),
    Model(
        "llama-yarn", "RoPE yarn with defaults, v5 config as saved",
        "llama",
        LLAMA | dict(
            num_attention_heads=2, num_key_value_heads=1, head_dim=16,
            rope_parameters=dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=64),
        ),
        "llama3", config_style="saved",
    ),
    Model(
        "llama-yarn-mscale", "RoPE yarn with mscale, mscale_all_dim, own betas and truncate false, v4 `rope_type`",
        "llama",
        LLAMA | dict(
            num_attention_heads=2, head_dim=16, rope_theta=10000.0, torch_dtype="float32",
            rope_scaling=dict(
                rope_type="yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=4.0, beta_slow=0.5,
                mscale=1.0, mscale_all_dim=0.4, truncate=False,
            ),
        ),
        "llama3",
    ),
    Model(
        "llama-longrope", "RoPE longrope as Phi-3 writes it: v4 `type`, original length at top level, no factor; "
        "prompts below, across, at and beyond the original length",
        "llama",
        LLAMA | dict(
            rope_theta=10000.0, original_max_position_embeddings=64, torch_dtype="float32",
            rope_scaling=dict(
                type="longrope", short_factor=[1.0, 1.1, 1.25, 1.5], long_factor=[1.5, 2.5, 3.5, 4.0],
            ),
        ),
        "llama3", cases=LONG_CASES,
    ),
    Model(
        "llama-longrope-factor", "RoPE longrope with factor 2 that wins over the length ratio 4, v5 config as saved",
        "llama",
        LLAMA | dict(
            rope_parameters=dict(
                rope_type="longrope", rope_theta=10000.0, factor=2.0, original_max_position_embeddings=64,
                short_factor=[1.0, 1.05, 1.2, 1.3], long_factor=[1.0, 2.0, 3.0, 5.0],
            ),
        ),
        "llama3", config_style="saved", cases=LONG_CASES,
    ),
    Model(
        "llama-bf16", "bf16 checkpoint in two safetensors shards, GQA 2:1",
        "llama",
        LLAMA | dict(hidden_size=48, intermediate_size=64, rope_theta=10000.0, torch_dtype="bfloat16"),
        "llama3", dtype=torch.bfloat16, shards=2,
    ),
    Model(
        "llama-tie-conflict", "tie_word_embeddings true, yet a different lm_head is stored: transformers 5 uses it",
        "llama", LLAMA | dict(tie_word_embeddings=True, rope_theta=10000.0, torch_dtype="float32"),
        "llama3", layout="keep-lm-head", cases=((5, 24), (40, 16)),
    ),
    Model(
        "mistral-w23", "sliding window 23, far shorter than the prompts, v4 config",
        "mistral",
        LLAMA | dict(
            vocab_size=304, num_hidden_layers=3, sliding_window=23, rope_theta=10000.0, bos_token_id=1, eos_token_id=2,
            torch_dtype="float32",
        ),
        "llama2", cases=((2, 40), (22, 24), (70, 24), (150, 24)),
    ),
    Model(
        "mistral-w64", "sliding window of exactly 64, head_dim 12, v5 config as saved",
        "mistral",
        LLAMA | dict(
            vocab_size=304, head_dim=12, sliding_window=64, bos_token_id=1,
            eos_token_id=2, rope_parameters=dict(rope_type="default", rope_theta=1000000.0),
        ),
        "llama2", config_style="saved", cases=((17, 24), (63, 24), (128, 16), (160, 24)),
    ),
    Model(
        "qwen2-tied", "qkv bias, tied, GQA 7:1, a sliding_window that use_sliding_window false turns off, v4 config",
        "qwen2",
        QWEN | dict(
            hidden_size=42, num_attention_heads=7, num_key_value_heads=1, tie_word_embeddings=True, sliding_window=32,
            use_sliding_window=False, max_window_layers=0, rope_theta=1000000.0, torch_dtype="float32",
        ),
        "qwen", generation_config=dict(eos_token_id=[278, 276], top_k=20, top_p=0.8, repetition_penalty=1.05),
    ),
    Model(
        "qwen2-swa", "sliding window 40 on layers from max_window_layers on only, untied, v4 config without layer_types",
        "qwen2",
        QWEN | dict(
            num_hidden_layers=3, sliding_window=40, use_sliding_window=True, max_window_layers=1,
            rope_theta=10000.0, torch_dtype="float32",
        ),
        "qwen",
    ),
    Model(
        "qwen3-tied", "q/k norm, head_dim twice hidden/heads, tied, v5 config as saved",
        "qwen3",
        QWEN | dict(
            head_dim=16, tie_word_embeddings=True,
            rope_parameters=dict(rope_type="default", rope_theta=1000000.0),
        ),
        "qwen", config_style="saved",
    ),
    Model(
        "qwen3-mixed", "layer_types alternate sliding and full, yarn, bf16, v5 dialect (`dtype`, `rope_parameters`)",
        "qwen3",
        QWEN | dict(
            num_hidden_layers=3, head_dim=16, use_sliding_window=True, sliding_window=30, max_window_layers=3,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"], dtype="bfloat16",
            rope_parameters=dict(
                rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=64,
            ),
        ),
        "qwen", dtype=torch.bfloat16,
    ),
    Model(
        "neox-parallel", "parallel residual, head size 24 with rotary_pct 0.25, f16; hub names (embed_out) and old buffers",
        "gpt_neox",
        NEOX | dict(rotary_pct=0.25, rotary_emb_base=10000, use_parallel_residual=True, torch_dtype="float16"),
        "qwen", dtype=torch.float16, layout="neox-hub",
    ),
    Model(
        "neox-sequential", "sequential residual, head size 20: int(0.25 * 20) = 5 rotary dims round up to 6; gelu_fast, "
        "bf16, v5 config as saved",
        "gpt_neox",
        NEOX | dict(
            hidden_size=40, use_parallel_residual=False, hidden_act="gelu_fast", intermediate_size=48, layer_norm_eps=0.01,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.25),
        ),
        "qwen", config_style="saved", dtype=torch.bfloat16,
    ),
    Model(
        "neox-nobias", "attention_bias false, rotary_pct 0.5 with linear RoPE, tied, v4 config",
        "gpt_neox",
        NEOX | dict(
            hidden_size=40, intermediate_size=40, attention_bias=False, rotary_pct=0.5, rotary_emb_base=5000,
            rope_scaling=dict(type="linear", factor=2.0), use_parallel_residual=True, tie_word_embeddings=True,
            torch_dtype="float32",
        ),
        "qwen",
    ),
]  # fmt: skip


# --- weights ------------------------------------------------------------------------------------


def random_tensor(seed: int, name: str, shape: torch.Size, tied: bool) -> torch.Tensor:
    """Weights that spread the logits and let attention and every bias matter, from (seed, name) alone."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(int.from_bytes(digest[:6], "big")))
    if name.endswith("bias"):
        value = 0.1 * noise
    elif len(shape) == 1:  # norms
        value = 1 + 0.1 * noise
    elif "embed_positions" in name:
        value = 0.5 * noise
    elif "embed" in name:
        # A tied head finds the embedding of the last token again in the residual: keep that small, or
        # every model would repeat it for ever.
        value = (0.3 if tied else 0.8) * noise
    else:  # linear: (out, in)
        value = 1.4 / shape[1] ** 0.5 * noise
    return value


def make_weights(model: Model, config, seed: int) -> dict[str, torch.Tensor]:
    """State by transformers' names; a tied head is left out unless the layout keeps one."""
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    tied = config.tie_word_embeddings
    weights = {name: random_tensor(seed, name, t.shape, tied).to(model.dtype) for name, t in state.items()}
    if tied and model.layout != "keep-lm-head":
        del weights["lm_head.weight"]
    return weights


def layout_opt_noprefix(weights: dict) -> dict:
    out = {name.removeprefix("model."): t for name, t in weights.items()}
    for name in [n for n in out if ".q_proj." in n]:
        # A conversion that splits a fused tensor leaves three views of one storage behind.
        names = [name.replace("q_proj", part) for part in ("k_proj", "v_proj", "q_proj")]
        parts = torch.cat([out[n] for n in names]).chunk(3)
        out.update(zip(names, parts))
    return out


def layout_neox_hub(weights: dict) -> dict:
    out = {name.replace("lm_head.", "embed_out."): t for name, t in weights.items()}
    for layer in range(NEOX["num_hidden_layers"]):
        attention = f"gpt_neox.layers.{layer}.attention"
        out[f"{attention}.bias"] = torch.ones(1, 1, 16, 16, dtype=torch.bool).tril()
        out[f"{attention}.masked_bias"] = torch.tensor(-1e9)
        out[f"{attention}.rotary_emb.inv_freq"] = torch.tensor([1.0, 0.5, 0.25])
    return out


def layout_llama_inv_freq(weights: dict) -> dict:
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.tensor([9.0, 9.0]) for i in range(2)}
    return weights | buffers


LAYOUTS = {
    "opt-noprefix": layout_opt_noprefix,
    "opt-lm-head-shared": lambda w: w | {"lm_head.weight": w["model.decoder.embed_tokens.weight"]},
    "opt-lm-head-copy": lambda w: w | {"lm_head.weight": w["model.decoder.embed_tokens.weight"].clone()},
    "neox-hub": layout_neox_hub,
    "llama-inv-freq": layout_llama_inv_freq,
}


def write_weights(model: Model, weights: dict, folder: Path) -> None:
    weights = LAYOUTS.get(model.layout, lambda w: w)(weights)
    stem, suffix = ("model", "safetensors") if model.file == "safetensors" else ("pytorch_model", "bin")
    names = list(weights)
    per_shard = -(-len(names) // model.shards)
    weight_map = {}
    for shard in range(model.shards):
        part = {n: weights[n] for n in names[shard * per_shard : (shard + 1) * per_shard]}
        file = f"{stem}.{suffix}" if model.shards == 1 else f"{stem}-{shard + 1:05}-of-{model.shards:05}.{suffix}"
        if suffix == "safetensors":
            save_file(part, folder / file, metadata={"format": "pt"})
        else:
            torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    if model.shards > 1:
        size = sum(t.nbytes for t in weights.values())
        write_json(folder / f"{stem}.{suffix}.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})


# --- running a model ----------------------------------------------------------------------------


def load(folder: Path):
    """The model as a user would load it, in float32; every stored weight must have found its place."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    buffers = ("inv_freq", "attention.bias", "masked_bias")
    unexpected = [k for k in info["unexpected_keys"] if not k.endswith(buffers)]
    assert not info["missing_keys"] and not unexpected and not info["mismatched_keys"], (folder, info)
    return model.eval()


def six(x: float) -> float:
    return round(float(x), 6)


@torch.no_grad()
def run_case(model, prompt: list[int], max_tokens: int) -> tuple[dict, float]:
    """Greedy decoding with a cache; returns the case and the least lead of a choice."""
    out = model(torch.tensor([prompt]), use_cache=True)
    logprobs = out.logits[0].log_softmax(-1)
    prompt_logprobs = [None] + [six(logprobs[i, token]) for i, token in enumerate(prompt[1:])]
    tokens, chosen, top, gap = [], [], [], float("inf")
    while True:
        best = out.logits[0, -1].log_softmax(-1).topk(TOP)
        gap = min(gap, float(best.values[0] - best.values[1]))
        tokens.append(int(best.indices[0]))
        chosen.append(six(best.values[0]))
        top.append([[int(i), six(v)] for v, i in zip(best.values, best.indices)])
        if len(tokens) == max_tokens:
            break
        out = model(torch.tensor([[tokens[-1]]]), past_key_values=out.past_key_values, use_cache=True)
    case = dict(
        prompt_ids=prompt, max_tokens=max_tokens, tokens=tokens, logprobs=chosen, top=top, prompt_logprobs=prompt_logprobs
    )
    return case, gap


@torch.no_grad()
def uncached_error(model, case: dict) -> float:
    """How far the log-probabilities of one pass without a cache are from the case's."""
    ids = torch.tensor([case["prompt_ids"] + case["tokens"]])
    logprobs = model(ids, use_cache=False).logits[0].log_softmax(-1)
    start = len(case["prompt_ids"]) - 1
    return max(abs(float(logprobs[start + i, t]) - lp) for i, (t, lp) in enumerate(zip(case["tokens"], case["logprobs"])))


def prompts(model: Model) -> list[list[int]]:
    rng = random.Random(model.name)
    first = model.config.get("bos_token_id")
    out = []
    for length, _ in model.cases:
        ids = [rng.randrange(4, 276) for _ in range(length)]
        if first is not None and length > 1:
            ids[0] = first
        out.append(ids)
    return out


def write_config(model: Model, folder: Path) -> None:
    head = dict(architectures=[ARCHITECTURES[model.family]], model_type=model.family)
    if model.config_style == "saved":
        config = AutoConfig.for_model(**model.config, model_type=model.family)
        config.architectures = head["architectures"]
        config.dtype = model.dtype
        config.save_pretrained(folder)
    else:
        write_json(folder / "config.json", head | model.config, indent=2)
    if model.generation_config is not None:
        write_json(folder / "generation_config.json", model.generation_config, indent=2)


def make_model(model: Model, out: Path) -> None:
    folder = out / model.name
    folder.mkdir(parents=True)
    write_config(model, folder)
    TOKENIZERS[model.tokenizer](folder)
    config = AutoConfig.from_pretrained(folder)
    for seed in range(200):
        write_weights(model, make_weights(model, config, seed), folder)
        runs = []
        for prompt, (_, max_tokens) in zip(prompts(model), model.cases):
            runs.append(run_case(load(folder), prompt, max_tokens))
            if runs[-1][1] < MIN_GAP or len(set(runs[-1][0]["tokens"])) < MIN_DISTINCT * max_tokens:
                break
        else:
            break
    else:
        sys.exit(f"{model.name}: no seed gives varied cases with every greedy choice {MIN_GAP} ahead")
    cases = [case for case, _ in runs]
    golden = dict(
        model=model.name, covers=model.covers, transformers=transformers.__version__, torch=torch.__version__.split("+")[0],
        seed=seed, weight_dtype=str(model.dtype).removeprefix("torch."), compute_dtype="float32", kv_dtype="float32",
        cases=cases,
    )  # fmt: skip
    write_json(folder / "golden.json", golden)

    # Read back from disk: the same tokens again, and the same numbers without a cache where length plays no part.
    again, _ = run_case(load(folder), cases[-1]["prompt_ids"], cases[-1]["max_tokens"])
    assert again == cases[-1], model.name
    by_length = any(k in model.name for k in ("dynamic", "longrope"))
    error = max(uncached_error(load(folder), c) for c in cases)
    assert by_length or error < 2e-4, (model.name, error)
    size = sum(f.stat().st_size for f in folder.iterdir()) / 1024
    distinct = " ".join(f"{len(set(c['tokens']))}/{len(c['tokens'])}" for c in cases)
    gap = min(gap for _, gap in runs)
    print(f"{model.name:24} {size:4.0f} KiB  seed {seed:2}  gap {gap:.4f}  uncached {error:.1e}  distinct {distinct}")


# --- tokenizers ---------------------------------------------------------------------------------

# In the byte alphabet of GPT-2 (a space is Ġ).
WORD_MERGES = "t h|th e|Ġ the|i n|e r|a n|o n|r e|Ġ a|h e|Ġ w|l l|he ll|hell o|Ġ m|o r|Ġ in|l d".split("|")
EMOJI_MERGES = ["ð Ł", "ðŁ ĺ"]  # the first three of an emoji's four bytes: it stays split over two tokens
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins, in the order of its vocabulary."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(b) for b in kept] + [chr(0x100 + i) for i in range(256 - len(kept))]


def byte_level(first_id: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    merges = [tuple(m.split(" ")) for m in WORD_MERGES + EMOJI_MERGES]
    pieces = byte_alphabet() + ["".join(m) for m in merges]
    return {piece: first_id + i for i, piece in enumerate(pieces)}, merges


def special(*names: str) -> list[AddedToken]:
    return [AddedToken(n, special=True, normalized=False) for n in names]


def write_tokenizer(tok: Tokenizer, folder: Path, config: dict) -> None:
    write_json(folder / "tokenizer.json", json.loads(tok.to_str()))
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    write_json(folder / "tokenizer_config.json", config, indent=2)


def tokenizer_opt(folder: Path) -> None:
    """Like facebook/opt-*: vocab.json and merges.txt, no tokenizer.json."""
    vocab, merges = byte_level(4)
    write_json(folder / "vocab.json", {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3} | vocab)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")

    def token(content):
        return dict(content=content, single_word=False, lstrip=False, rstrip=False, normalized=True, __type="AddedToken")

    config = dict(
        errors="replace", unk_token=token("</s>"), bos_token=token("</s>"), eos_token=token("</s>"),
        pad_token=token("<pad>"), add_prefix_space=False, add_bos_token=True, tokenizer_class="GPT2Tokenizer",
    )  # fmt: skip
    write_json(folder / "tokenizer_config.json", config, indent=2)


def tokenizer_llama3(folder: Path) -> None:
    """Like Llama 3: own split, byte level, specials after the merges, bos prepended; a template in the config."""
    vocab, merges = byte_level(0)
    tok = Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    tok.add_special_tokens(
        special("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
    )
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.pre_tokenizer = pre_tokenizers.Sequence([split, byte])
    tok.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", pair="<|begin_of_text|> $A <|begin_of_text|>:1 $B:1",
        special_tokens=[("<|begin_of_text|>", 276)],
    )  # fmt: skip
    tok.decoder = decoders.ByteLevel()
    config = dict(bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>", chat_template="{{ bos_token }}" + CHATML)
    write_tokenizer(tok, folder, config)


def tokenizer_llama2(folder: Path) -> None:
    """Like Llama 1 and 2 and Mistral: SentencePiece BPE with byte fallback, ▁ for spaces; named templates."""
    merges = [tuple(m.replace("Ġ", "▁").split(" ")) for m in WORD_MERGES]
    letters = "▁etaoinrslhdmwué"
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
    pieces += ["".join(m) for m in merges] + list(letters)
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tok = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tok.add_special_tokens(special("<unk>", "<s>", "</s>"))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    tok.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    templates = [dict(name="default", template=MISTRAL), dict(name="tool_use", template=TOOLS_TEMPLATE)]
    write_tokenizer(tok, folder, dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=templates))


def tokenizer_qwen(folder: Path) -> None:
    """Like Qwen 2: NFC, byte level, no bos; a control token that is not `special`; chat_template.jinja."""
    vocab, merges = byte_level(0)
    tok = Tokenizer(models.BPE(vocab, merges))
    tok.add_special_tokens(special("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    tok.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    tok.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated")
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.pre_tokenizer = pre_tokenizers.Sequence([split, byte])
    tok.decoder = decoders.ByteLevel()
    config = dict(eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token=None, chat_template="not this one")
    write_tokenizer(tok, folder, config)
    (folder / "chat_template.jinja").write_text(CHATML, encoding="utf-8")  # wins over tokenizer_config.json


TOKENIZERS = {
    "opt": tokenizer_opt,
    "llama3": tokenizer_llama3,
    "llama2": tokenizer_llama2,
    "qwen": tokenizer_qwen,
}
TEXTS = [
    "",
    "hello",
    " hello",
    "  hello   world  ",
    "Then the man in the inn re-read 12345 words, on 3.14!",
    "line one\nline two\n\n\ttabbed\r\n",
    "naïve café über Ærø",
    "cafe\u0301",  # a combining accent: NFC joins it
    "😀 and 😃😄, then 👩‍👩‍👧 and 🇨🇭",
    "日本語のテキスト、한국어",
    "don't we'll I'M they've",
    "'s 't ...!?  \u00a0nbsp\u3000wide",
    "a" * 9 + " " * 9 + "b",
    "\ufffd and \u0000 and \u007f",
]
SPECIAL_TEXTS = {
    "opt": ["</s>hello</s>", "a <pad> b", " <s>x<unk> </s> "],
    "llama3": ["<|begin_of_text|>hello <|eot_id|> the", "<|start_header_id|>user<|end_header_id|>\n\nhello<|eot_id|>", "<|eot|>"],
    "llama2": ["<s>hello</s>", "a <s> the </s> b", "<unk> <0x41>"],
    "qwen": ["<|im_start|>user\nhello<|im_end|>\n", "<think> the </think>", "a<|endoftext|>b"],
}  # fmt: skip


def make_tokenizer_cases(out: Path) -> None:
    entries = []
    for kind in TOKENIZERS:
        folder = next(m.name for m in MODELS if m.tokenizer == kind)
        # Not AutoTokenizer for all: for some model types it builds a pre-tokenizer of its own over tokenizer.json.
        tokenizer_class = AutoTokenizer if kind == "opt" else PreTrainedTokenizerFast
        tok = tokenizer_class.from_pretrained(out / folder)
        encode = []
        for text in TEXTS + SPECIAL_TEXTS[kind]:
            encode.append(dict(text=text, ids=tok.encode(text), ids_no_special=tok.encode(text, add_special_tokens=False)))
        emoji = tok.encode("😀é", add_special_tokens=False)
        sequences = [e["ids"] for e in encode if e["ids"]]
        sequences += [emoji[:1], emoji[1:], emoji[:-1], emoji[2:] + emoji[:2], [100, 200, 150, 250], list(range(270, 276))]
        decode = []
        for ids in sequences:
            text = [tok.decode(ids, skip_special_tokens=s, clean_up_tokenization_spaces=False) for s in (False, True)]
            decode.append(dict(ids=ids, text=text[0], text_skip_special=text[1]))
        entries.append(dict(model=folder, kind=kind, encode=encode, decode=decode))
    versions = dict(transformers=transformers.__version__, tokenizers=tokenizers.__version__)
    write_json(out / "tokenizers.json", versions | dict(cases=entries))


# --- chat templates -----------------------------------------------------------------------------

CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

LLAMA2 = """{% if messages[0]['role'] == 'system' %}
{% set loop_messages = messages[1:] %}
{% set system_message = messages[0]['content'] %}
{% else %}
{% set loop_messages = messages %}
{% set system_message = false %}
{% endif %}
{% for message in loop_messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}
    {% if loop.index0 == 0 and system_message != false %}
        {% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}
    {% else %}
        {% set content = message['content'] %}
    {% endif %}
    {% if message['role'] == 'user' %}
{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
    {% elif message['role'] == 'assistant' %}
{{ ' ' + content.strip() + ' ' + eos_token }}
    {% endif %}
{% endfor %}"""

MISTRAL = """{%- if messages[0].role == "system" -%}
    {%- set system = messages[0].content -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set turns = messages -%}
{%- endif -%}
{{- bos_token -}}
{%- for m in turns -%}
    {%- if m.role == "user" -%}
        {%- if loop.last and system is defined -%}
            {{- "[INST] " ~ system ~ "\\n\\n" ~ m.content ~ "[/INST]" -}}
        {%- else -%}
            {{- "[INST] " ~ m.content ~ "[/INST]" -}}
        {%- endif -%}
    {%- elif m.role == "assistant" -%}
        {{- " " ~ m.content | trim ~ eos_token -}}
    {%- else -%}
        {{- raise_exception("Only user and assistant roles are supported, not " ~ m.role) -}}
    {%- endif -%}
{%- endfor -%}"""

LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%Y")[:2] ~ "xx" %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("One call at a time.") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}" }}
        {{- "<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable and message.content is not string %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

GENERATION = """{% for m in messages %}
{% if m.role == 'assistant' %}
<|assistant|>
{% generation %}
{{ m.content }}{{ eos_token }}
{% endgeneration %}
{% else %}
<|{{ m.role }}|>
{{ m.content }}
{% endif %}
{%- generation -%}  {%- endgeneration -%}
{% endfor %}
{% if add_generation_prompt %}<|assistant|>
{% endif %}"""

TOOLS_TEMPLATE = """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n\\n<tools>' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools>" }}
    {{- "\\nindented:\\n" ~ tools[0] | tojson(indent=2) }}
    {{- "\\n" ~ {"b": 1, "a": [1, 2.5, true, none, "é<&>'\\""]} | tojson ~ "<|im_end|>\\n" }}
{%- endif %}
{%- for message in messages %}
    {{- "<|im_start|>" ~ message.role ~ "\\n" ~ message.content }}
    {%- if message.tool_calls %}
        {%- for call in message.tool_calls %}
            {%- if call.function %}{%- set call = call.function %}{%- endif %}
            {{- "\\n<tool_call>\\n{\\"name\\": \\"" ~ call.name ~ "\\", \\"arguments\\": " }}
            {{- call.arguments | tojson }}
            {{- "}\\n</tool_call>" }}
        {%- endfor %}
    {%- endif %}
    {{- "<|im_end|>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|im_start|>assistant\\n" }}{%- endif %}"""

NAMESPACE = """{%- set ns = namespace(last_user=-1, is_first=true, n=0) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.last_user == -1 and message.role == "user" and not (message.content.startswith('<tool>') and message.content.endswith('</tool>')) %}
        {%- set ns.last_user = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "user" %}
        {{- (bos_token if ns.is_first else '') + '<u>' + message.content + '</u>' }}
        {%- set ns.is_first = false %}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
            {%- if loop.index0 > ns.last_user %}
                {{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' }}
            {%- endif %}
        {%- endif %}
        {{- '<a>' + content + '</a>' + eos_token }}
    {%- endif %}
    {%- set ns.n = ns.n + 1 %}
{%- endfor %}
{{- '#' ~ ns.n }}
{%- if enable_thinking is defined and enable_thinking is false %}
    {{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}"""

LOOP_CONTROLS = """{%- for message in messages -%}
    {%- if message.role == "system" %}{% continue %}{% endif -%}
    {%- if message.content == "STOP" %}{% break %}{% endif -%}
    {{- loop.index ~ ":" ~ loop.revindex0 ~ ":" ~ loop.length ~ " " ~ message.role.upper() ~ "=" ~ message.content.title() ~ "|" -}}
{%- endfor -%}"""

PYTHON_METHODS = """{%- for message in messages %}
    {%- for key, value in message.items() %}
        {{- key ~ '->' ~ (value if value is string else value | tojson) ~ ';' }}
    {%- endfor %}
    {{- ' ' ~ message.content.strip().lower().replace('a', 'A') ~ ' ' ~ message.get('name', 'nobody') }}
    {{- ' ' ~ message.content.split()|join('+') ~ ' ' ~ message.keys()|list|join(',') }}
    {{- ' ' ~ message.content.count('b') ~ ' ' ~ message.content.find('b') ~ '\\n' }}
{%- endfor %}"""

CONTENT_PARTS = """{%- macro text_of(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content if part.type == 'text' -%}{{- part.text -}}{%- if not loop.last %} {% endif -%}{%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
    {{ message.role | capitalize }}: {{ text_of(message.content) }}{{ "\\n" }}
{%- endfor -%}
{% if documents is defined and documents %}{{ documents | map(attribute='title') | join(', ') }}{% endif %}"""

WHITESPACE = """  {# a comment, with its line #}
{% for message in messages %}
    {% if loop.first %}
first
    {% endif %}
  {{ message.content }}
	{%- if not loop.last +%}  |  {% endif %}
{% endfor %}

{% set x = {'k': messages[0].role, 'n': none} %}
{{ x.k }} {{ x['missing'] }} {{ 7 // 2 }} {{ 7 / 2 }} {{ [1, 'a'] | length }} {{ (x.n is none) and 'none' }}
"""

# How Python prints what is no string: no real template should depend on it.
PYTHON_LITERALS = "{{ true }} {{ none }} {{ [1, 'a', false] }} {{ {'k': none} }} {{ 1.0 }} {{ 'ab' * 2 }}"

TALK = [
    {"role": "system", "content": "  You are terse.  "},
    {"role": "user", "content": " Hi <b>there</b> & \"all\" "},
    {"role": "assistant", "content": " Hello! é 日本 \n"},
    {"role": "user", "content": "Bye?"},
]
THINKING = [
    {"role": "user", "content": "q1"},
    {"role": "assistant", "content": "<think>\nold\n</think>\n\na1"},
    {"role": "user", "content": "q2"},
    {"role": "assistant", "content": "<think>\nnew thought\n\n</think>\n\na2"},
    {"role": "user", "content": "<tool>42</tool>"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_température",
            "description": "Wärme in °C; a<b && c>d, it's \"fine\" / 温度",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer", "default": 1}},
                "required": ["city"],
            },
        },
    }
]
CALLS = [
    {"role": "user", "content": "Weather in Zürich?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "function": {"name": "get_température", "arguments": {"city": "Zürich <CH>", "days": 2}}}
        ],
    },
    {"role": "tool", "content": "{\"t\": 12.5}"},
]
CHAT = [
    dict(name="chatml", template=CHATML, messages=TALK, add_generation_prompt=True),
    dict(name="chatml-no-prompt", template=CHATML, messages=TALK, add_generation_prompt=False),
    dict(name="llama2-system", template=LLAMA2, messages=TALK),
    dict(name="llama2-roles-error", template=LLAMA2, messages=TALK[:1] + TALK[2:]),
    dict(name="mistral", template=MISTRAL, messages=TALK),
    dict(name="mistral-role-error", template=MISTRAL, messages=CALLS),
    dict(name="llama3-date", template=LLAMA3, messages=TALK, add_generation_prompt=True, kwargs={"date_string": "01 Feb 2026"}),
    dict(name="llama3-strftime", template=LLAMA3, messages=TALK[1:], add_generation_prompt=True),
    dict(name="llama3-tool-call", template=LLAMA3, messages=CALLS, kwargs={"date_string": "x"}),
    dict(name="generation-tags", template=GENERATION, messages=TALK, add_generation_prompt=True),
    dict(name="tools", template=TOOLS_TEMPLATE, messages=CALLS, tools=TOOLS, add_generation_prompt=True),
    dict(name="tools-absent", template=TOOLS_TEMPLATE, messages=TALK[1:]),
    dict(name="namespace", template=NAMESPACE, messages=THINKING),
    dict(name="namespace-kwargs", template=NAMESPACE, messages=THINKING[:3], kwargs={"enable_thinking": False}),
    dict(
        name="loop-controls", template=LOOP_CONTROLS,
        messages=TALK[:2] + [{"role": "user", "content": "the old man's sea"}, {"role": "user", "content": "STOP"}] + TALK[2:],
    ),
    dict(
        name="python-methods", template=PYTHON_METHODS,
        messages=[{"role": "user", "content": "  A b  c\tab ", "name": "Ann"}, {"role": "user", "content": "b", "n": [1, "ü"]}],
    ),
    dict(
        name="content-parts", template=CONTENT_PARTS,
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "image"}, {"type": "text", "text": "two"}]},
            {"role": "assistant", "content": "three"},
        ],
    ),
    dict(name="whitespace", template=WHITESPACE, messages=TALK),
    dict(name="python-literals", template=PYTHON_LITERALS, messages=TALK),
    dict(name="syntax-error", template="{% for m in messages %}{{ m.content }", messages=TALK),
]  # fmt: skip


def make_chat_cases(out: Path) -> None:
    bos, eos = "<s>", "</s>"
    tok = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), bos_token=bos, eos_token=eos)
    entries = []
    for case in CHAT:
        case = dict(add_generation_prompt=False, kwargs={}, bos_token=bos, eos_token=eos) | case
        try:
            case["rendered"] = tok.apply_chat_template(
                case["messages"], tools=case.get("tools"), chat_template=case["template"], tokenize=False,
                add_generation_prompt=case["add_generation_prompt"], **case["kwargs"],
            )  # fmt: skip
        except Exception as error:  # raise_exception or a syntax error: what matters is that it fails
            assert "error" in case["name"], (case["name"], error)
            case["error"] = True
        entries.append(case)
    write_json(out / "chat.json", dict(transformers=transformers.__version__, cases=entries))


# --- rotary frequencies -------------------------------------------------------------------------


def llama_config(head_dim: int, max_len: int, **rope) -> dict:
    return dict(
        model_type="llama", hidden_size=head_dim * 4, num_attention_heads=4, head_dim=head_dim,
        max_position_embeddings=max_len, **rope,
    )  # fmt: skip


DYNAMIC = llama_config(128, 4096, rope_theta=10000.0, rope_scaling={"type": "dynamic", "factor": 2.0})
LONG = llama_config(
    96, 131072, rope_theta=10000.0, original_max_position_embeddings=4096,
    rope_scaling={
        "type": "longrope",
        "short_factor": [six(1 + 0.03 * i) for i in range(48)],
        "long_factor": [six(1.05 * 1.09**i) for i in range(48)],
    },
)  # fmt: skip
DEEPSEEK = {"factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
ROPE = [
    ("default", llama_config(128, 4096, rope_theta=10000.0), [16]),
    ("default, no rope key at all", llama_config(128, 2048), [16]),
    ("linear", llama_config(128, 8192, rope_theta=10000.0, rope_scaling={"type": "linear", "factor": 4.0}), [16]),
    ("dynamic", DYNAMIC, [16, 4096, 4097, 6000, 16384]),
    (
        "llama3 8B",
        llama_config(
            128, 131072, rope_theta=500000.0,
            rope_scaling={
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
        [16],
    ),
    (
        "yarn, truncate false, as gpt-oss",
        llama_config(
            64, 131072,
            rope_parameters={
                "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
                "truncate": False, "original_max_position_embeddings": 4096,
            },
        ),
        [16],
    ),
    (
        "yarn as Qwen2",
        llama_config(
            128, 32768, rope_theta=1000000.0,
            rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        ),
        [16],
    ),
    (
        "yarn, mscale equal to mscale_all_dim, as DeepSeek-V3",
        llama_config(
            64, 163840, rope_theta=10000.0, rope_scaling={"type": "yarn", "mscale": 1.0, "mscale_all_dim": 1.0} | DEEPSEEK
        ),
        [16],
    ),
    (
        "yarn, mscale unlike mscale_all_dim",
        llama_config(
            64, 163840, rope_theta=10000.0,
            rope_scaling={"rope_type": "yarn", "mscale": 1.0, "mscale_all_dim": 0.707} | DEEPSEEK,
        ),
        [16],
    ),
    (
        "yarn, own attention_factor",
        llama_config(
            64, 163840, rope_theta=10000.0, rope_scaling={"rope_type": "yarn", "attention_factor": 1.25} | DEEPSEEK
        ),
        [16],
    ),
    (
        "yarn, a ramp of no width",
        llama_config(
            16, 256, rope_theta=10000.0,
            rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4},
        ),
        [16],
    ),
    ("longrope", LONG, [16, 4096, 4097, 8192]),
    (
        "longrope, own factor",
        {k: v for k, v in LONG.items() if k not in ("original_max_position_embeddings", "rope_scaling", "rope_theta")}
        | {
            "rope_parameters": {
                **LONG["rope_scaling"], "rope_type": "longrope", "rope_theta": 10000.0, "factor": 16.0,
                "original_max_position_embeddings": 4096,
            }
        },
        [16, 8192],
    ),
    (
        "partial rotary",
        dict(
            model_type="gpt_neox", hidden_size=512, num_attention_heads=8, max_position_embeddings=2048, rotary_pct=0.25,
            rotary_emb_base=10000,
        ),
        [16],
    ),
    (
        "partial rotary of odd size",
        dict(
            model_type="gpt_neox", hidden_size=80, num_attention_heads=4, max_position_embeddings=2048, rotary_pct=0.25,
            rotary_emb_base=10000,
        ),
        [16],
    ),
    (
        "partial rotary, linear",
        dict(
            model_type="gpt_neox", hidden_size=96, num_attention_heads=2, max_position_embeddings=2048, rotary_pct=0.5,
            rotary_emb_base=10000, rope_scaling={"type": "linear", "factor": 2.0},
        ),
        [16],
    ),
]  # fmt: skip


def make_rope_cases(out: Path) -> None:
    """What a rotary module holds after one pass over `seq_len` positions."""
    entries = []
    for name, written, lengths in ROPE:
        for seq_len in lengths:
            config = AutoConfig.for_model(**json.loads(json.dumps(written)))
            rotary = (GPTNeoXRotaryEmbedding if config.model_type == "gpt_neox" else LlamaRotaryEmbedding)(config)
            rotary(torch.zeros(1), torch.arange(seq_len)[None])
            head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            inv_freq = [float(f"{f:.8e}") for f in rotary.inv_freq.tolist()]
            entries.append(
                dict(
                    name=name, config=written, head_dim=head_dim, seq_len=seq_len, inv_freq=inv_freq,
                    attention_factor=float(f"{float(rotary.attention_scaling):.8e}"),
                )
            )  # fmt: skip
    write_json(out / "rope.json", dict(transformers=transformers.__version__, cases=entries))


# --- putting it together ------------------------------------------------------------------------


def write_json(path: Path, value, indent: int | None = None) -> None:
    separators = (",", ":") if indent is None else None
    path.write_text(json.dumps(value, ensure_ascii=False, indent=indent, separators=separators) + "\n", encoding="utf-8")


def make_all(out: Path, names: list[str]) -> None:
    for model in MODELS:
        if not names or model.name in names:
            make_model(model, out)
    if not names:
        make_tokenizer_cases(out)
        make_chat_cases(out)
        make_rope_cases(out)
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    print(f"{out.name}: {size / 2**20:.2f} MiB")


def differences(a: Path, b: Path) -> list[str]:
    files = {p.relative_to(root) for root in (a, b) for p in root.rglob("*") if p.is_file()}
    same = {f for f in files if (a / f).is_file() and (b / f).is_file() and filecmp.cmp(a / f, b / f, shallow=False)}
    return sorted(str(f) for f in files - same)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the committed files, write nothing")
    parser.add_argument("--output", type=Path, default=OUT)
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="these models only, into an empty --output")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.check:
        with tempfile.TemporaryDirectory() as folder:
            make_all(Path(folder), [])
            changed = differences(Path(folder), args.output)
        sys.exit("differs: " + ", ".join(changed) if changed else 0)
    if args.output == OUT:
        if args.only:
            sys.exit("--only needs an --output of its own")
        shutil.rmtree(OUT, ignore_errors=True)
    elif args.output.exists() and any(args.output.iterdir()):
        sys.exit(f"{args.output} is not empty")
    args.output.mkdir(parents=True, exist_ok=True)
    make_all(args.output, args.only)


if __name__ == "__main__":
    main()
