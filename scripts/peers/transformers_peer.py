"""transformers in bf16, all prompts as one batch of `generate`; with accelerate, weights beyond `--cpu-memory` on disk.

`--model` is a configuration (random weights in memory) or, with `--cpu-memory`, a directory in the form of Hugging
Face, whose weights accelerate then brings from its safetensors files for every layer and pass.
Needs torch, transformers and accelerate from PyPI.
"""

import job


def main():
    parser = job.options(__doc__)
    parser.add_argument("--cpu-memory", help="such as 600MiB: offload to disk what does not fit into it")
    parser.add_argument("--offload-dir", help="where accelerate puts what it moves to disk")
    options = parser.parse_args()
    import accelerate
    import torch
    import transformers

    torch.set_num_threads(options.threads)
    torch.manual_seed(1)
    if options.cpu_memory:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            options.model, dtype=torch.bfloat16, device_map="auto", max_memory={"cpu": options.cpu_memory},
            offload_folder=options.offload_dir)
        places = list(model.hf_device_map.values())
        where = (f"accelerate {accelerate.__version__}, device_map auto with max_memory cpu {options.cpu_memory}: "
                 f"{places.count('disk')} of {len(places)} modules on disk")
    else:
        config = transformers.AutoConfig.for_model(**transformers.PretrainedConfig.get_config_dict(options.model)[0])
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        where = "all weights in memory"
    model.eval()
    vocab = model.config.vocab_size
    ids = torch.tensor([job.prompt(index, options.prompt_len, vocab) for index in range(options.prompts)])

    def run(prefilled):
        seen = []

        def after_a_token(_ids, _scores, **_rest):
            if not seen:
                seen.append(True)
                prefilled()
            return torch.zeros(options.prompts, dtype=torch.bool)

        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=options.generated,
                min_new_tokens=options.generated, pad_token_id=0,
                stopping_criteria=transformers.StoppingCriteriaList([after_a_token]))
        assert out.shape == (options.prompts, options.prompt_len + options.generated), out.shape

    attention = model.config._attn_implementation
    job.serve(f"transformers {transformers.__version__}, torch {torch.__version__}, bf16 weights and KV, attention "
              f"{attention}, one batch; {where}", run)


if __name__ == "__main__":
    main()
