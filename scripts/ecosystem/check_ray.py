"""Ray Data on a local cluster of two actors, one of which is killed: every prompt is answered once, as in one run."""

import collections
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time

import ray
import ray.data

from tidemill.ray import TidemillActor

COUNT = 2000
BATCH = 100
FLAGS = {"model": "demo", "threads": 1, "cpu_memory": "1GiB", "progress": "none"}


class Watched(TidemillActor):
    """An actor that says where it runs, and that it has work."""

    def __init__(self, folder, **arguments):
        super().__init__(**arguments)
        self.folder = pathlib.Path(folder)

    def __call__(self, batch):
        (self.folder / f"{os.getpid()}-{time.time_ns()}").touch()
        return super().__call__(batch)


def killer(folder, killed):
    """Kills an actor when it has begun its second batch and another one works too."""
    while not killed:
        begun = collections.Counter(path.name.split("-")[0] for path in folder.iterdir())
        if len(begun) >= 2 and max(begun.values()) >= 2:
            victim = int(begun.most_common(1)[0][0])
            os.kill(victim, signal.SIGKILL)
            killed.append(victim)
        time.sleep(0.02)


def single_run(folder, rows):
    source, output = folder / "in.jsonl", folder / "out.jsonl"
    lines = ({"custom_id": row["custom_id"], "prompt": row["prompt"], **row["sampling_params"]} for row in rows)
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [os.environ["TIDEMILL_BIN"], "generate", "--input", source, "--output", output]
    for name, value in FLAGS.items():
        command += ["--" + name.replace("_", "-"), str(value)]
    subprocess.run(command, check=True)
    return {answer["custom_id"]: answer["text"] for answer in map(json.loads, output.read_text().splitlines())}


def main():
    names = ["Mia", "Leo", "Anna", "Otto"]
    rows = [{"custom_id": f"row-{index}", "prompt": f"Story: {names[index % 4]} had {index}",
             "sampling_params": {"max_tokens": 8 + index % 24, "temperature": 0.9}} for index in range(COUNT)]
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        (folder / "seen").mkdir()
        expected = single_run(folder, rows)
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        killed = []
        watcher = threading.Thread(target=killer, args=(folder / "seen", killed), daemon=True)
        watcher.start()
        started = time.time()
        dataset = ray.data.read_json(str(folder / "rows.jsonl"))
        dataset = dataset.map_batches(
            Watched, fn_constructor_kwargs={"folder": str(folder / "seen"), **FLAGS}, batch_size=BATCH, concurrency=2,
            num_cpus=1)
        answers = dataset.take_all()
        seconds = time.time() - started
        actors = {path.name.split("-")[0] for path in (folder / "seen").iterdir()}
        ray.shutdown()
        assert killed, "no actor was killed"
        assert str(killed[0]) in actors and len(actors) >= 3, f"{actors}: no actor took the place of the killed one"
        assert len(answers) == COUNT, f"{len(answers)} answers"
        texts = {answer["custom_id"]: answer["generated_text"] for answer in answers}
        assert len(texts) == COUNT, "an answer came twice"
        assert not any(answer["__inference_error__"] for answer in answers)
        assert texts == expected, "answers differ from those of one run"
        print(f"{COUNT} prompts, two actors, one killed ({len(actors)} processes in all): {len(texts)} answers, once "
              f"each, identical to one run; {seconds:.1f} s")


if __name__ == "__main__":
    sys.exit(main())
