"""Answers held to a pattern in the transformers engine, by the library that vLLM is told to use: llguidance."""

from collections.abc import Sequence
from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from torch import Tensor
from transformers import LogitsProcessor


class Patterns:
    """Makes what holds a batch of answers to its patterns. The tokenizer is read once, which takes a while."""

    def __init__(self, tokenizer: Any, vocabulary: int):
        """`vocabulary` is the number of logits, which may exceed the tokenizer's ids."""
        self.tokenizer: LLTokenizer = from_tokenizer(tokenizer, max(vocabulary, len(tokenizer)))

    def hold(self, patterns: Sequence[str]) -> "_Held":
        """For a batch whose answers are held to `patterns`, in its order."""
        grammars = [LLMatcher.grammar_from_regex(pattern) for pattern in patterns]
        return _Held([LLMatcher(self.tokenizer, grammar) for grammar in grammars], self.tokenizer.vocab_size)


class _Held(LogitsProcessor):
    """Leaves each answer the tokens that its pattern allows next; once it is complete, the end token alone."""

    def __init__(self, matchers: list[LLMatcher], vocabulary: int):
        self.matchers = matchers
        self.mask = allocate_token_bitmask(len(matchers), vocabulary)  # [batch, vocabulary / 32], bits
        self.begun = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`input_ids` [batch, tokens], `scores` [batch, logits] → the same scores, −∞ where a token is not allowed."""
        if self.begun:  # before that there is only the prompt
            for matcher, token in zip(self.matchers, input_ids[:, -1].tolist(), strict=True):
                if not matcher.is_stopped():
                    matcher.consume_token(token)
        self.begun = True
        for row, matcher in enumerate(self.matchers):
            fill_next_token_bitmask(matcher, self.mask, row)
            if error := matcher.get_error():
                raise RuntimeError(f"llguidance: {error}")
        bits = torch.from_numpy(self.mask).to(scores.device)
        places = torch.arange(32, device=scores.device, dtype=torch.int32)
        allowed = (bits[:, :, None] >> places & 1).bool().flatten(1)[:, : scores.shape[1]]
        return scores.masked_fill(~allowed, float("-inf"))
