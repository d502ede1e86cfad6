"""What all peers share: the job's prompts, its flags, and how a peer's process is told to run it.

A peer is a program that loads its model, prints one JSON line of facts about it, and then, for every line that it
reads, runs the whole job once and prints its seconds: `prefill` and `decode` by the clock, `cpu` of all cores.
"""

import argparse
import json
import sys
import time


def prompt(index, length, vocab):
    """Token ids of one prompt: no two begin alike."""
    return [3 + (index * 7919 + k * 104_729) % (vocab - 10) for k in range(length)]


def options(description):
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", type=int, required=True)
    parser.add_argument("--prompt-len", type=int, required=True)
    parser.add_argument("--generated", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    return parser


def serve(facts, run):
    """Runs the job whenever a line comes. `run()` calls the function that it is given when all prompts are computed."""
    print(json.dumps(facts), flush=True)
    for _ in sys.stdin:
        started, used, prefilled = time.perf_counter(), time.process_time(), []
        run(lambda: prefilled.append(time.perf_counter()))
        ended = time.perf_counter()
        seconds = {"prefill": prefilled[0] - started, "decode": ended - prefilled[0]}
        print(json.dumps({**seconds, "cpu": time.process_time() - used}), flush=True)
