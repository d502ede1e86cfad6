"""HELM on Tidemill, a whole scenario as one batch:

    TIDEMILL_MODEL=demo helm-run --runner-class-name tidemill.helm.BatchRunner ...

The worker is started once and serves all run entries. Its flags come from the environment (TIDEMILL_MODEL,
TIDEMILL_WEIGHTS, TIDEMILL_CPU_MEMORY, ...).
"""

import hashlib
import struct
import time
from dataclasses import replace

from helm.benchmark.adaptation.scenario_state import ScenarioState
from helm.benchmark.executor import Executor, ExecutorError
from helm.benchmark.runner import Runner
from helm.common.request import GeneratedOutput, RequestResult, Token

from tidemill.client import Worker

SEED_BITS = 63


class BatchRunner(Runner):
    """HELM's runner, whose requests are answered together."""

    def __init__(self, execution_spec, *arguments, **named):
        super().__init__(execution_spec, *arguments, **named)
        self.executor = BatchExecutor(execution_spec)


class BatchExecutor(Executor):
    """Answers all requests of a scenario at once."""

    worker = None

    def execute(self, scenario_state):
        if self.execution_spec.dry_run:
            return super().execute(scenario_state)
        if BatchExecutor.worker is None:
            BatchExecutor.worker = Worker()
        results = answer(BatchExecutor.worker, [state.request for state in scenario_state.request_states])
        states = [replace(state, result=result) for state, result in zip(scenario_state.request_states, results)]
        return ScenarioState(scenario_state.adapter_spec, states, scenario_state.annotator_specs)


def answer(worker, requests):
    """Results of requests. Equal requests have equal results, as HELM's cache would have it, and are asked once."""
    bos = worker.ready["bos_token"]
    lines = {}
    names = []
    for request in requests:
        names.append(name(request))
        lines.setdefault(names[-1], line(names[-1], request, bos))
    started = time.time()
    answers = dict(zip(lines, worker.run(list(lines.values()))))
    seconds = time.time() - started
    for failed in (answer for answer in answers.values() if answer.get("error")):
        raise ExecutorError(f"{failed['error']['code']}: {failed['error']['message']}")
    extra = {"cached": False, "request_time": seconds / max(len(requests), 1), "request_datetime": int(started),
             "batch_size": len(requests), "batch_request_time": seconds}
    return [RequestResult(success=True, embedding=[], completions=completions(answers[key], request), **extra)
            for key, request in zip(names, requests)]


def name(request):
    """What identifies a request: all that its result depends on. `tidemill eval` has the same names."""
    digest = hashlib.sha256()

    def add(part):
        part = part if isinstance(part, bytes) else str(part).encode()
        digest.update(struct.pack(">Q", len(part)) + part)

    add(request.prompt)
    add(len(request.messages or []))
    for message in request.messages or []:
        add(message["role"])
        add(message["content"])
    for number in (request.temperature, request.top_p, request.presence_penalty, request.frequency_penalty):
        add(struct.pack(">d", number))
    for count in (request.num_completions, request.max_tokens, int(request.echo_prompt), len(request.stop_sequences)):
        add(count)
    for stop in request.stop_sequences:
        add(stop)
    add(request.random or "")
    return "helm-" + digest.hexdigest()[:24]


def line(custom_id, request, bos):
    """A request as a batch line."""
    if request.embedding or request.multimodal_prompt or request.image_generation_parameters or request.response_format:
        raise ExecutorError("only requests for text are supported")
    digest = hashlib.sha256((request.random or "").encode()).digest()
    seed = int.from_bytes(digest[:8], "big") % (1 << SEED_BITS) if request.random else 0
    body = {"max_tokens": request.max_tokens, "temperature": request.temperature, "top_p": request.top_p,
            "n": request.num_completions, "stop": request.stop_sequences, "seed": seed,
            "presence_penalty": request.presence_penalty, "frequency_penalty": request.frequency_penalty,
            "top_k": 0, "min_p": 0, "repetition_penalty": 1, "return_token_ids": True}
    if request.messages:
        url = "/v1/chat/completions"
        body.update(messages=request.messages, logprobs=True)
    else:
        url = "/v1/completions"
        body.update(prompt=request.prompt, logprobs=0, echo=request.echo_prompt)
        # A prompt that begins with the model's own beginning gets no second one.
        body["add_special_tokens"] = not (bos and request.prompt.startswith(bos))
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def completions(answer, request):
    return [completion(choice, request) for choice in answer["response"]["body"]["choices"]]


def completion(choice, request):
    """A choice as HELM has it: tokens that a stop text cut off are not part of it."""
    if request.messages:
        text = choice["message"]["content"]
        scored = [(token["bytes"], token["logprob"]) for token in choice["logprobs"]["content"]]
    else:
        text = choice["text"]
        logprobs = choice["logprobs"]
        scored = list(zip(logprobs["token_bytes"], logprobs["token_logprobs"]))
    reason = choice["finish_reason"]
    if reason == "stop" and choice["stop_reason"] is None:
        reason = "endoftext"
    kept = scored if request.echo_prompt else within(text, scored, reason)
    tokens = [Token(text=token_text(bytes(token)), logprob=logprob or 0) for token, logprob in kept]
    return GeneratedOutput(text=text, logprob=sum(token.logprob for token in tokens), tokens=tokens,
                           finish_reason={"reason": reason})


def within(text, scored, reason):
    """The tokens that begin within the text."""
    if reason == "length":
        return scored
    if reason == "endoftext":
        return scored[:-1]
    text = text.encode()
    # Some tokenizers drop the space before a first word.
    start = -1 if scored and bytes(scored[0][0]).startswith(b" ") and text and not text.startswith(b" ") else 0
    kept = []
    for token, logprob in scored:
        if start >= len(text):
            break
        kept.append((token, logprob))
        start += len(token)
    return kept


def token_text(token):
    """Bytes that are no text alone are spelt out, as HELM counts them."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)
