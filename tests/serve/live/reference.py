"""What the demo must answer, computed by Hugging Face transformers with the adapter merged by PEFT, in float32."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoTokenizer, LlamaForCausalLM

TOLERANCE = 2e-3
"""Largest difference of a log-probability or logit between two ways to compute the same in float32; the logits' own
deviation is 4, and an adapter changes them by about as much."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Greedy token ids, and at each of their positions the log-probabilities of all tokens [num_tokens, vocabulary]."""

    token_ids: list[int]
    logprobs: torch.Tensor

    def check(self, token_ids: list[int], logprobs: list[float]) -> None:
        """Fails unless ``token_ids`` with ``logprobs`` is this answer.

        A greedy choice may differ where the best two are closer than TOLERANCE; after that the rest may be another one.
        """
        assert len(token_ids) == len(logprobs) == len(self.token_ids)
        for place, (token, logprob) in enumerate(zip(token_ids, logprobs, strict=True)):
            expected = float(self.logprobs[place, token])
            assert abs(logprob - expected) < TOLERANCE, (place, token_ids, self.token_ids, logprob, expected)
            if token != self.token_ids[place]:
                assert float(self.logprobs[place].max()) - expected < TOLERANCE, (place, token_ids, self.token_ids)
                return


class Reference:
    """The base model, with or without one adapter's weights merged into it."""

    def __init__(self, model: Path):
        self._model = model
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        torch.set_num_threads(1)

    def prompt_ids(self, prompt: str) -> list[int]:
        """The token ids of a completion's prompt."""
        return list(self._tokenizer(prompt)["input_ids"])

    def answer(self, adapter: Path | None, prompt_ids: list[int], num_tokens: int) -> Answer:
        """The greedy continuation; the cache-free way, so that it shares no shortcut with the engine."""
        model, token_ids, rows = _merged(self._model, adapter), [], []
        with torch.inference_mode():
            for _ in range(num_tokens):
                logits = model(torch.tensor([prompt_ids + token_ids]), use_cache=False).logits[0, -1].float()
                rows.append(torch.log_softmax(logits, dim=-1))
                token_ids.append(int(logits.argmax()))
        return Answer(token_ids, torch.stack(rows))


@cache
def _merged(model: Path, adapter: Path | None) -> torch.nn.Module:
    base = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter is None:
        return base.eval()
    merged: torch.nn.Module = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    return merged.eval()
