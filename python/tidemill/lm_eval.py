"""lm-evaluation-harness on Tidemill:

    tidemill-lm-eval --model tidemill --model_args model=demo,weights=int4 --tasks ...

takes every argument of `lm_eval`. Further model arguments: `max_length`, `max_gen_toks`, `add_bos_token`,
`prefix_token_id` as the harness's `hf` has them, and any flag of `tidemill worker` with underscores.
"""

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from tidemill.client import Worker

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
STOPS = 16


@register_model("tidemill")
class TidemillLM(LM):
    """All requests of a kind arrive in one call, so they are one batch."""

    def __init__(self, model=None, pretrained=None, max_length=None, max_gen_toks=256, add_bos_token=None,
                 prefix_token_id=None, batch_size=None, max_batch_size=None, device=None, **options):
        super().__init__()
        self.worker = Worker(model or pretrained, **options)
        self.max_length = int(max_length or self.worker.ready["context_length"])
        self.max_gen_toks = int(max_gen_toks)
        self.add_bos_token = add_bos_token
        scoring = {"max_length": self.max_length, "add_special_tokens": add_bos_token,
                   "prefix_token_id": prefix_token_id}
        self.scoring = {name: value for name, value in scoring.items() if value is not None}

    def loglikelihood(self, requests, disable_tqdm=False):
        pairs = [request.args for request in requests]
        lines = [{"context": context, "continuation": continuation, **self.scoring} for context, continuation in pairs]
        answers = [(answer["logprob"], answer["is_greedy"]) for answer in self.worker.run_all(lines)]
        for pair, answer in zip(pairs, answers):
            self.cache_hook.add_partial("loglikelihood", pair, answer)
        return answers

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        texts = [text for (text,) in (request.args for request in requests)]
        answers = [answer["logprob"] for answer in self.worker.run_all([{"text": text, **self.scoring} for text in texts])]
        for text, answer in zip(texts, answers):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), answer)
        return answers

    def generate_until(self, requests, disable_tqdm=False):
        pairs = [request.args for request in requests]
        answers = self.worker.run_all([self._generation(context, kwargs) for context, kwargs in pairs])
        texts = [cut(answer["text"], stops_of(kwargs)) for answer, (_, kwargs) in zip(answers, pairs)]
        for pair, text in zip(pairs, texts):
            self.cache_hook.add_partial("generate_until", pair, text)
        return texts

    def _generation(self, context, kwargs):
        lengths = (kwargs.get(name) for name in LENGTHS)
        max_tokens = int(next((length for length in lengths if length is not None), self.max_gen_toks))
        if max_tokens >= self.max_length:
            raise ValueError(f"max_gen_toks {max_tokens} leaves no room for a prompt in {self.max_length} positions")
        temperature = float(kwargs.get("temperature") or 0.0)
        sample = kwargs.get("do_sample", temperature > 0)
        bos = self.worker.ready["bos_token"]
        special = False if bos and context.startswith(bos) else self.add_bos_token
        line = {"prompt": context, "max_tokens": max_tokens, "truncate_prompt_tokens": self.max_length - max_tokens,
                "add_special_tokens": special, "stop": [stop for stop in stops_of(kwargs) if stop][:STOPS] or None}
        line.update((name, kwargs[name]) for name in SAMPLING if name in kwargs)
        if not sample:
            line["temperature"] = 0
        return {name: value for name, value in line.items() if value is not None}

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        line = {"messages": chat_history, "add_generation_prompt": add_generation_prompt,
                "continue_final_message": not add_generation_prompt, "echo": True, "max_tokens": 0}
        return self.worker.run_all([line])[0]["text"]

    def chat_template(self, chat_template=False):
        return self.tokenizer_name if self.worker.ready["chat_template"] else ""

    @property
    def tokenizer_name(self):
        return f"tidemill-{self.worker.ready['fingerprint']}"


def stops_of(kwargs):
    until = kwargs.get("until") or []
    return [until] if isinstance(until, str) else list(until)


def cut(text, stops):
    for stop in stops:
        if stop:
            text = text.split(stop)[0]
    return text


def main():
    """`lm_eval` with the model `tidemill`."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
