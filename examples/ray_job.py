"""One job over every machine of a Ray cluster: each actor holds a model, Ray hands out the prompts.

    pip install "ray[data]" ./python
    python examples/ray_job.py examples/prompts.jsonl completions 2

Give rows a `custom_id`, as here: it keys the randomness, so answers do not depend on how rows are spread.
"""

import sys

import ray

from tidemill.ray import TidemillActor

source, output, actors = sys.argv[1], sys.argv[2], int(sys.argv[3])


def row(line):
    return {"custom_id": line["id"], "prompt": line["prompt"], "sampling_params": {"max_tokens": 64}}


dataset = ray.data.read_json(source).filter(lambda line: line.get("prompt") is not None).map(row)
answers = dataset.map_batches(
    TidemillActor, fn_constructor_kwargs={"model": "demo", "cpu_memory": "1GiB", "threads": 1}, batch_size=256,
    num_cpus=1, concurrency=actors)
answers.write_json(output)
