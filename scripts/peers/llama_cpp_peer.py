"""llama.cpp through llama-cpp-python: all sequences in one context, greedy tokens chosen with numpy.

Needs numpy and, from PyPI, llama-cpp-python and gguf. Its AMX code crashes when gcc 12 compiled it (that compiler drops
the stores of the tile configuration): CMAKE_ARGS="-DCMAKE_CXX_FLAGS='-fno-tree-dse -fno-dse'" pip install helps.
"""

import ctypes

import job

KV_TYPES = {"f16": "GGML_TYPE_F16", "q8_0": "GGML_TYPE_Q8_0", "q4_0": "GGML_TYPE_Q4_0"}


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


def load(options, log):
    """The model and a context with a place for every sequence. `log` collects what llama.cpp says."""
    import llama_cpp

    keep = llama_cpp.llama_log_callback(lambda level, text, data: log.append(text.decode()))
    llama_cpp.llama_log_set(keep, None)
    llama_cpp.llama_backend_init()
    parameters = llama_cpp.llama_model_default_params()
    parameters.use_extra_bufts = not options.plain
    model = llama_cpp.llama_model_load_from_file(options.model.encode(), parameters)
    assert model, "".join(log)
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = options.prompts * (options.prompt_len + options.generated)
    settings.n_batch, settings.n_ubatch, settings.n_seq_max = options.batch, options.ubatch, options.prompts
    settings.n_threads = settings.n_threads_batch = options.threads
    settings.type_k = settings.type_v = getattr(llama_cpp, KV_TYPES[options.kv])
    settings.flash_attn_type = 1
    context = llama_cpp.llama_init_from_model(model, settings)
    assert context, "".join(log)
    return model, context, keep


def main():
    parser = job.options(__doc__)
    parser.add_argument("--kv", choices=KV_TYPES, default="f16")
    parser.add_argument("--batch", type=int, default=2048, help="n_batch: tokens of a call")
    parser.add_argument("--ubatch", type=int, default=512, help="n_ubatch: tokens computed together")
    parser.add_argument("--plain", action="store_true",
                        help="weights as they are in the file (mapped, not rearranged for AMX and the like)")
    options = parser.parse_args()
    import llama_cpp
    import numpy

    log = []
    model, context, _keep = load(options, log)
    memory = llama_cpp.llama_get_memory(context)
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    sequences, length = options.prompts, options.prompt_len
    prompts = numpy.array([job.prompt(index, length, vocab) for index in range(sequences)], dtype=numpy.int32)

    batch = llama_cpp.llama_batch_init(options.batch, 0, 1)
    view = lambda pointer, kind: numpy.ctypeslib.as_array(
        ctypes.cast(pointer, ctypes.POINTER(kind)), (options.batch,))
    tokens, positions = view(batch.token, ctypes.c_int32), view(batch.pos, ctypes.c_int32)
    counts, asked = view(batch.n_seq_id, ctypes.c_int32), view(batch.logits, ctypes.c_int8)
    counts[:] = 1

    def decode(ids, at, owners, wanted):
        """Computes these tokens; the likeliest next one of every place that is wanted, in order."""
        batch.n_tokens = len(ids)
        tokens[: len(ids)], positions[: len(ids)], asked[: len(ids)] = ids, at, wanted
        for place, owner in enumerate(owners):
            batch.seq_id[place][0] = owner
        status = llama_cpp.llama_decode(context, batch)
        assert status == 0, f"llama_decode: {status}"
        rows = int(asked[: len(ids)].sum())
        logits = numpy.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (rows, vocab))
        return logits.argmax(axis=1).astype(numpy.int32)

    together = min(options.batch // length, sequences)
    ends = numpy.tile(numpy.arange(length) == length - 1, together)

    def run(prefilled):
        llama_cpp.llama_memory_clear(memory, True)
        first = []
        for group in range(0, sequences, together):
            some = prompts[group : group + together]
            first.append(decode(some.ravel(), numpy.tile(numpy.arange(length), len(some)),
                                numpy.repeat(numpy.arange(group, group + len(some)), length), ends[: some.size]))
        last = numpy.concatenate(first)
        prefilled()
        for step in range(options.generated - 1):
            last = decode(last, length + step, range(sequences), 1)

    buffers = [text.split(":", 1)[1].split("model")[0].strip() for text in log if "model buffer size" in text]
    facts = (f"llama-cpp-python {llama_cpp.__version__}, Q4_0: weights in {', '.join(buffers)}; KV {options.kv}, "
             f"flash_attn on, n_batch {options.batch}, n_ubatch {options.ubatch}, all sequences in one context; "
             f"{llama_cpp.llama_print_system_info().decode().strip(' |')}")
    job.serve(facts, run)


if __name__ == "__main__":
    main()
