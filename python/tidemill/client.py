"""A worker process: JSON lines in, answers out. Standard library only."""

import json
import os
import shutil
import subprocess
import threading


class WorkerDied(RuntimeError):
    """The process ended before everything was answered."""


class LineFailed(RuntimeError):
    """A line was answered with an error."""


def binary():
    """The program: TIDEMILL_BIN, else what PATH has."""
    found = os.environ.get("TIDEMILL_BIN") or shutil.which("tidemill")
    if not found:
        raise FileNotFoundError("no program `tidemill`: set TIDEMILL_BIN, or put it on PATH")
    return found


def flags_of(options):
    """`{"cpu_memory": "4GiB"}` as flags of the program; None is left out."""
    flags = []
    for name, value in options.items():
        if value is not None:
            flags += ["--" + name.replace("_", "-"), str(value)]
    return flags


class Worker:
    """A loaded model. `options` are flags of `tidemill worker`, such as cpu_memory="4GiB" or weights="int4"."""

    def __init__(self, model=None, **options):
        command = [binary(), "worker"] + flags_of({"model": model, **options})
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.lock = threading.Lock()
        line = self.process.stdout.readline()
        if not line:
            raise WorkerDied(f"{' '.join(command)}: ended with exit code {self.process.wait()} before it was ready")
        self.ready = json.loads(line)

    def run(self, lines):
        """Answers to the lines, in their order; failed lines have `error`. Lines without `custom_id` are numbered."""
        lines = [{"custom_id": str(index), **line} for index, line in enumerate(lines)]
        places = {line["custom_id"]: index for index, line in enumerate(lines)}
        if len(places) != len(lines):
            raise ValueError("two lines have the same custom_id")
        answers = [None] * len(lines)
        with self.lock:
            # Written beside the reading: both pipes are finite.
            writer = threading.Thread(target=self._write, args=(lines,), daemon=True)
            writer.start()
            for _ in lines:
                answer = self.process.stdout.readline()
                if not answer.endswith(b"\n"):
                    raise WorkerDied(f"the worker ended with exit code {self.process.wait()}")
                answer = json.loads(answer)
                answers[places[answer["custom_id"]]] = answer
            writer.join()
        return answers

    def run_all(self, lines):
        """As `run`, but an error of any line is raised."""
        answers = self.run(lines)
        for answer in answers:
            if answer.get("error"):
                raise LineFailed(f"{answer['custom_id']}: {answer['error']['code']}: {answer['error']['message']}")
        return answers

    def _write(self, lines):
        try:
            for line in lines:
                self.process.stdin.write(json.dumps(line).encode() + b"\n")
            self.process.stdin.write(b'{"type":"flush"}\n')
            self.process.stdin.flush()
        except (BrokenPipeError, ValueError):
            pass  # The reading side says what became of the process.

    def close(self):
        """Lets the worker finish, and gives its exit code."""
        if not self.process.stdin.closed:
            self.process.stdin.close()
        code = self.process.wait()
        self.process.stdout.close()
        return code

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __del__(self):
        process = getattr(self, "process", None)
        if process and process.poll() is None:
            process.kill()
            process.wait()
