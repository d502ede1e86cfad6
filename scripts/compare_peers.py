"""The whole job of one Llama shape here and in llama.cpp, in turn: bench_results/peers.md.

    python3 scripts/compare_peers.py [--bin target/release/tidemill] [--rounds 3] [--peer-kv f16] [--no-write]

Both complete the same prompts with random weights of 4 bits on the same threads: llama.cpp through llama-cpp-python
(Q4_0, all sequences in one context, greedy tokens chosen with numpy), tidemill through `generate`. Runs alternate, so
that what else the machine does hits both; ratios are of neighbouring runs. Loading is reported beside, never counted.
Needs numpy and, from PyPI, llama-cpp-python and gguf. Its AMX code crashes when gcc 12 compiled it (that compiler drops
the stores of the tile configuration): CMAKE_ARGS="-DCMAKE_CXX_FLAGS='-fno-tree-dse -fno-dse'" pip install helps.
"""

import argparse
import ctypes
import datetime
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIG = ROOT / "policies" / "models" / "llama-1.1b.json"
KV_TYPES = {"f16": "GGML_TYPE_F16", "q8_0": "GGML_TYPE_Q8_0", "q4_0": "GGML_TYPE_Q4_0"}
EXTRA = "llama.cpp Q4_0"
OURS = ["--weights", "int4", "--kv-dtype", "int4", "--activations", "int8"]


def prompt(index, length, vocab):
    return [3 + (index * 7919 + k * 104_729) % (vocab - 10) for k in range(length)]


def make_gguf(path, config):
    """A Llama of this shape, every matrix in Q4_0 with random codes, without a tokenizer."""
    import gguf
    import numpy

    random = numpy.random.default_rng(1)
    writer = gguf.GGUFWriter(path, "llama")
    heads, width = config["num_attention_heads"], config["hidden_size"]
    head_dim, vocab = width // heads, config["vocab_size"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(width)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(vocab)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_tokenizer_model("none")

    def matrix(name, outputs, inputs):
        # A block is a scale in f16 and 32 codes of 4 bits around 8; weights get a deviation of 0.02.
        blocks = random.integers(0, 256, (outputs, inputs // 32, 18), dtype=numpy.uint8)
        blocks[:, :, :2] = numpy.frombuffer(numpy.float16(0.02 / 4.6).tobytes(), dtype=numpy.uint8)
        writer.add_tensor(name, blocks.reshape(outputs, -1), raw_dtype=gguf.GGMLQuantizationType.Q4_0)

    def scale(name):
        writer.add_tensor(name, numpy.ones(width, dtype=numpy.float32))

    kv_width, inner = head_dim * config["num_key_value_heads"], config["intermediate_size"]
    matrix("token_embd.weight", vocab, width)
    matrix("output.weight", vocab, width)
    scale("output_norm.weight")
    for layer in range(config["num_hidden_layers"]):
        name = f"blk.{layer}.{{}}.weight".format
        scale(name("attn_norm"))
        scale(name("ffn_norm"))
        for part, outputs, inputs in (
            ("attn_q", width, width), ("attn_k", kv_width, width), ("attn_v", kv_width, width),
            ("attn_output", width, width), ("ffn_gate", inner, width), ("ffn_up", inner, width),
            ("ffn_down", width, inner),
        ):
            matrix(name(part), outputs, inputs)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run_peer(options):
    """Loads the model and runs the job `options.rounds` times; prints a JSON line for each, when told to on stdin."""
    import llama_cpp
    import numpy

    log = []
    keep = llama_cpp.llama_log_callback(lambda level, text, data: log.append(text.decode()))
    llama_cpp.llama_log_set(keep, None)
    llama_cpp.llama_backend_init()
    parameters = llama_cpp.llama_model_default_params()
    parameters.use_extra_bufts = not options.plain
    model = llama_cpp.llama_model_load_from_file(options.gguf.encode(), parameters)
    assert model, "".join(log)
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    sequences, length, generated = options.prompts, options.prompt_len, options.generated

    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = sequences * (length + generated)
    settings.n_batch, settings.n_ubatch, settings.n_seq_max = options.batch, options.ubatch, sequences
    settings.n_threads = settings.n_threads_batch = options.threads
    settings.type_k = settings.type_v = getattr(llama_cpp, KV_TYPES[options.peer_kv])
    settings.flash_attn_type = options.flash
    settings.kv_unified = options.unified
    context = llama_cpp.llama_init_from_model(model, settings)
    assert context, "".join(log)
    memory = llama_cpp.llama_get_memory(context)
    prompts = numpy.array([prompt(index, length, vocab) for index in range(sequences)], dtype=numpy.int32)

    batch = llama_cpp.llama_batch_init(options.batch, 0, 1)
    view = lambda pointer, kind: numpy.ctypeslib.as_array(
        ctypes.cast(pointer, ctypes.POINTER(kind)), (options.batch,))
    tokens, positions = view(batch.token, ctypes.c_int32), view(batch.pos, ctypes.c_int32)
    counts, asked = view(batch.n_seq_id, ctypes.c_int32), view(batch.logits, ctypes.c_int8)
    counts[:] = 1

    def decode(ids, at, owners, wanted):
        batch.n_tokens = len(ids)
        tokens[: len(ids)], positions[: len(ids)], asked[: len(ids)] = ids, at, wanted
        for place, owner in enumerate(owners):
            batch.seq_id[place][0] = owner
        status = llama_cpp.llama_decode(context, batch)
        assert status == 0, f"llama_decode: {status}"

    def best():
        """The likeliest token of every place that was asked in the last batch, in order."""
        rows = int(asked[: batch.n_tokens].sum())
        logits = numpy.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (rows, vocab))
        return logits.argmax(axis=1).astype(numpy.int32)

    together = options.batch // length
    wanted = numpy.tile(numpy.arange(length) == length - 1, together)
    facts = llama_cpp.llama_print_system_info().decode()
    buffers = [text.split(":", 1)[1].split("model")[0].strip() for text in log if "model buffer size" in text]
    print(json.dumps({"info": facts, "buffers": buffers}), flush=True)
    for _ in sys.stdin:
        llama_cpp.llama_memory_clear(memory, True)
        started, used = time.perf_counter(), time.process_time()
        first = []
        for group in range(0, sequences, together):
            some = prompts[group : group + together]
            count = some.size
            decode(some.ravel(), numpy.tile(numpy.arange(length), len(some)),
                   numpy.repeat(numpy.arange(group, group + len(some)), length), wanted[:count])
            first.append(best())
        last = numpy.concatenate(first)
        prefilled = time.perf_counter()
        for step in range(generated - 1):
            decode(last, length + step, range(sequences), 1)
            last = best()
        ended = time.perf_counter()
        run = {"prefill": prefilled - started, "decode": ended - prefilled, "cpu": time.process_time() - used}
        print(json.dumps(run), flush=True)


class Peer:
    """llama.cpp in a process of its own."""

    def __init__(self, arguments, gguf, plain):
        given = ["--gguf", gguf] + (["--plain"] if plain else [])
        names = ("prompts", "prompt_len", "generated", "batch", "ubatch", "threads", "peer_kv", "flash")
        for name in names:
            given += ["--" + name.replace("_", "-"), str(getattr(arguments, name))]
        given += ["--unified"] if arguments.unified else []
        self.process = subprocess.Popen(
            [sys.executable, __file__, *given], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.facts = json.loads(self.process.stdout.readline())

    def run(self):
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def pack(arguments, folder):
    """Our model, packed once, so that loading is short."""
    command = [arguments.bin, "pack", "--model", f"synth:{CONFIG}#1", "--output", folder / "packed", "--weights", "int4"]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


def run_ours(arguments, folder):
    """Seconds of the job without loading, and those of all cores with it."""
    vocab = json.loads(CONFIG.read_text())["vocab_size"]
    source, stats = folder / "in.jsonl", folder / "stats.json"
    with open(source, "w", encoding="utf-8") as file:
        for index in range(arguments.prompts):
            line = {"prompt": prompt(index, arguments.prompt_len, vocab), "max_tokens": arguments.generated,
                    "temperature": 0, "ignore_eos": True}
            file.write(json.dumps(line) + "\n")
    output = folder / "out.jsonl"
    for old in folder.glob("out.jsonl*"):
        old.unlink()
    command = [arguments.bin, "generate", "--model", folder / "packed", "--input", source, "--output", output,
               "--stats", stats, "--progress", "none", "--threads", str(arguments.threads)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command + OURS, check=True, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = json.loads(stats.read_text())
    assert result["generated_tokens"] == arguments.prompts * arguments.generated
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"whole": result["wall_s"], "cpu": cpu}


def seconds(run):
    return sum(value for key, value in run.items() if key != "cpu")


def report(arguments, rows):
    """The table, as text."""
    total = arguments.prompts * (arguments.prompt_len + arguments.generated)
    yield "# Whole job beside llama.cpp\n"
    yield (f"`python3 scripts/compare_peers.py`, {datetime.date.today()}: the 1.1 B Llama shape with random weights, "
           f"{arguments.prompts} prompts of\n{arguments.prompt_len} tokens, {arguments.generated} generated each, "
           f"{arguments.threads} threads, alternating rounds, medians. Prompts count, loading does not (but\nfor "
           "tidemill's own core seconds, which contain it). Core seconds are what the processes used: where others use\n"
           "the machine too, they say more than the clock.\n")
    yield "| run | whole job, tokens/s | prefill, tokens/s | decode, tokens/s | core seconds | seconds of each round |"
    yield "|---|---|---|---|---|---|"
    for name, runs in rows.items():
        middle = lambda of: statistics.median(of(run) for run in runs)
        rate = lambda key, count: f"{count / middle(lambda run: run[key]):.1f}" if key in runs[0] else ""
        prefill = rate("prefill", arguments.prompts * arguments.prompt_len)
        decode = rate("decode", arguments.prompts * (arguments.generated - 1))
        each = ", ".join(f"{seconds(run):.1f}" for run in runs)
        cores = middle(lambda run: run["cpu"])
        yield f"| {name} | {total / middle(seconds):.1f} | {prefill} | {decode} | {cores:.1f} | {each} |"
    yield ""
    *peers, ours = rows
    for name in peers:
        for what, of in (("clock", seconds), ("core seconds", lambda run: run["cpu"])):
            values = [of(peer) / of(own) for peer, own in zip(rows[name], rows[ours])]
            each = ", ".join(f"{value:.2f}" for value in values)
            yield f"tidemill over {name}, by {what}: **{statistics.median(values):.2f}** (median of {each})\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", default=str(ROOT / "target" / "release" / "tidemill"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--generated", type=int, default=32)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--peer-kv", choices=KV_TYPES, default="f16")
    parser.add_argument("--batch", type=int, default=2048, help="n_batch: tokens of a call")
    parser.add_argument("--ubatch", type=int, default=512, help="n_ubatch: tokens computed together")
    parser.add_argument("--flash", type=int, default=1, help="flash_attn_type: 1 is on, 0 off, -1 its own choice")
    parser.add_argument("--unified", action="store_true", help="kv_unified: one buffer of keys for all sequences")
    parser.add_argument("--peer", choices=("all", "extra", "plain"), default="all",
                        help="llama.cpp with its rearranged weights (AMX where it has it), without, or both")
    parser.add_argument("--plain-rounds", type=int, default=1, help="rounds of the peer without them")
    parser.add_argument("--no-write", action="store_true", help="print the table only")
    parser.add_argument("--gguf", help=argparse.SUPPRESS)
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.gguf:
        run_peer(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        path = str(folder / "model.gguf")
        make_gguf(path, json.loads(CONFIG.read_text()))
        peers = {}
        if arguments.peer != "plain":
            peers[EXTRA] = Peer(arguments, path, plain=False)
        if arguments.peer != "extra":
            peers["llama.cpp Q4_0, weights not rearranged"] = Peer(arguments, path, plain=True)
        rows = {name: [] for name in peers}
        rows["tidemill " + " ".join(OURS)] = own = []
        pack(arguments, folder)
        for turn in range(arguments.rounds):
            for name, peer in peers.items():
                # Without its rearranged weights it takes long: fewer rounds tell enough.
                if turn < arguments.plain_rounds or name == EXTRA:
                    rows[name].append(peer.run())
                    print(name, rows[name][-1], file=sys.stderr)
            own.append(run_ours(arguments, folder))
            print("tidemill", own[-1], file=sys.stderr)
        import llama_cpp

        text = list(report(arguments, rows))
        text.append(f"llama-cpp-python {llama_cpp.__version__}: n_batch {arguments.batch}, n_ubatch {arguments.ubatch}, "
                    f"KV {arguments.peer_kv}, flash_attn {arguments.flash}, kv_unified {arguments.unified}, "
                    f"all sequences in one context,\nOMP_WAIT_POLICY {os.environ.get('OMP_WAIT_POLICY', 'not set')}.\n")
        for name, peer in peers.items():
            text.append(f"{name}: weights in {', '.join(peer.facts['buffers'])}; {peer.facts['info'].strip(' |')}\n")
            peer.close()
    text = "\n".join(text)
    print(text)
    if not arguments.no_write:
        (ROOT / "bench_results" / "peers.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
