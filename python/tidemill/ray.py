"""An actor for Ray Data, with the column names of Ray's own LLM processors:

    dataset.map_batches(TidemillActor, fn_constructor_kwargs={"model": "demo"}, batch_size=512, concurrency=2)

In: `prompt` (text or token ids) or `messages`, and as you like `sampling_params` (fields of a line, such as max_tokens)
and `custom_id`, which keys the randomness: with it a row's answer does not depend on the batch it is in. Out: the row
with `generated_text`, `generated_tokens`, `prompt_token_ids`, `num_input_tokens`, `num_generated_tokens`, and in
`__inference_error__` what went wrong, or "".
"""

import hashlib
import json

from tidemill.client import Worker

GIVEN = ("custom_id", "prompt", "messages", "sampling_params")


class TidemillActor:
    """One worker; `sampling_params` hold for rows without their own, `options` are flags of `tidemill worker`."""

    def __init__(self, model=None, sampling_params=None, **options):
        self.sampling_params = plain(sampling_params or {})
        self.worker = Worker(model, **options)

    def __call__(self, batch):
        rows = [{name: column[index] for name, column in batch.items()} for index in range(len(next(iter(batch.values()))))]
        taken = {}
        answers = self.worker.run([self._line(row, taken) for row in rows])
        out = {name: list(column) for name, column in batch.items()}
        for name, of in COLUMNS.items():
            out[name] = [of(answer) for answer in answers]
        return out

    def _line(self, row, taken):
        given = {name: plain(row[name]) for name in GIVEN if row.get(name) is not None}
        line = {**self.sampling_params, **(given.pop("sampling_params", None) or {}), **given, "return_token_ids": True}
        if "custom_id" not in line:
            name = hashlib.sha256(json.dumps(line, sort_keys=True).encode()).hexdigest()[:24]
            taken[name] = taken.get(name, 0) + 1
            line["custom_id"] = f"{name}-{taken[name]}"
        line["custom_id"] = str(line["custom_id"])
        return line


def plain(value):
    """Arrays and numbers of numpy as JSON has them; keys without a value, as tables have them, are left out."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def usage(name):
    return lambda answer: answer.get("usage", {}).get(name, 0)


def error(answer):
    failed = answer.get("error")
    return f"{failed['code']}: {failed['message']}" if failed else ""


COLUMNS = {
    "generated_text": lambda answer: answer.get("text", ""),
    "generated_tokens": lambda answer: answer.get("token_ids", []),
    "prompt_token_ids": lambda answer: answer.get("prompt_token_ids", []),
    "num_input_tokens": usage("prompt_tokens"),
    "num_generated_tokens": usage("completion_tokens"),
    "__inference_error__": error,
}
