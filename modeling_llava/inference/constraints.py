"""Constraint: what an answer may be, a choice among texts or JSON of a schema, token by token.

A grammar decides which tokens may come next (llguidance, in Rust: about 50 microseconds for a token). The answer is a
text that the grammar takes, unless it is cut off at its greatest length.

What is surprising: an answer may begin with a space, which is no part of its text: most templates make a model write
one. White space between the parts of JSON is not allowed, since small models write nothing else where they may.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from transformers import LogitsProcessor, PreTrainedTokenizerBase

MAX_SCHEMA = 100_000
"""Characters of a schema: grammars of strangers are compiled."""
LIMITS = {
    "initial_lexer_fuel": 200_000,
    "max_grammar_size": 100_000,
    "max_lexer_states": 20_000,
    "precompute_large_lexemes": False,
    "step_lexer_fuel": 50_000,
    "verbose_errors": False,
}
"""A tenth to a half of llguidance's own (1.9, LLParserLimits), with which a pattern such as (a{1,9999}){1,9999} takes
three seconds."""


@dataclass(frozen=True)
class Constraint:
    """A grammar that an answer follows; made by `choose` or `follow_schema`.

    Raises:
        ModuleNotFoundError: without llguidance (`pip install 'anyllava[serve]'`).
    """

    grammar: str
    """Of llguidance, in its JSON form."""

    @classmethod
    def choose(cls, texts: list[str]) -> "Constraint":
        """One of these texts.

        Raises:
            ValueError: if there is none, or one is empty.
        """
        if not texts or not all(isinstance(text, str) and text for text in texts):
            raise ValueError(f"got the choice {str(texts)[:80]}; expected a list of texts; write at least one")
        rule = " | ".join(json.dumps(text, ensure_ascii=False) for text in dict.fromkeys(texts))
        return cls._check(f"body: {rule}", "choice")

    @classmethod
    def follow_schema(cls, schema: dict[str, Any] | None = None) -> "Constraint":
        """JSON that a JSON Schema describes; any object by default.

        Raises:
            ValueError: if it is no schema, or has what a grammar cannot follow.
        """
        schema = {"type": "object"} if schema is None else schema
        if not isinstance(schema, dict):
            raise ValueError(f"got a {type(schema).__name__} as schema; expected an object; write a JSON Schema")
        try:
            text = json.dumps(schema | {"x-guidance": {"whitespace_flexible": False}})
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"got a schema that is no JSON ({error}); expected a JSON Schema; correct it") from None
        if len(text) > MAX_SCHEMA:
            raise ValueError(
                f"got a schema of {len(text)} characters; expected at most {MAX_SCHEMA}; write a shorter one"
            )
        return cls._check(f"body: %json {text}", "schema")

    @classmethod
    def _check(cls, body: str, kind: str) -> "Constraint":
        from llguidance import LLMatcher

        grammar = LLMatcher.grammar_from_lark(f'start: " "? body\n{body}')
        if problem := LLMatcher.validate_grammar(grammar):
            reason = " ".join(problem.split())[:200]
            raise ValueError(
                f"got a {kind} that is no grammar ({reason}); expected one that llguidance takes; correct it"
            )
        return cls(grammar)


class ConstrainTokens(LogitsProcessor):
    """Lets an answer grow by the tokens that its constraint allows.

    Args:
        constraint: What the answer is to be.
        tokenizer: The tokenizer of the model.
        end_ids: Tokens that end an answer.
        num_prompt_tokens: Tokens before the answer.

    Raises:
        ValueError: if the grammar is too large, at its beginning or at one of its tokens.
    """

    def __init__(
        self,
        constraint: Constraint,
        tokenizer: PreTrainedTokenizerBase,
        *,
        end_ids: frozenset[int],
        num_prompt_tokens: int,
    ) -> None:
        from llguidance import LLMatcher, LLParserLimits

        guide = _load_guide(tokenizer, len(tokenizer), end_ids)
        self.matcher = LLMatcher(guide, constraint.grammar, limits=LLParserLimits(**LIMITS))
        self.num_seen = num_prompt_tokens
        self._find_allowed()

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if input_ids.shape[1] > self.num_seen:
            self.matcher.consume_tokens(input_ids[0, self.num_seen :].tolist())
            self.num_seen = input_ids.shape[1]
            self._find_allowed()
        num_tokens = min(scores.shape[1], len(self.is_allowed_V))
        is_allowed_V = torch.zeros(scores.shape[1], dtype=torch.bool)
        is_allowed_V[:num_tokens] = self.is_allowed_V[:num_tokens]
        return scores.masked_fill(~is_allowed_V.to(scores.device), -torch.inf)

    def _find_allowed(self) -> None:
        bits = bytearray() if self.matcher.is_error() else bytearray(self.matcher.compute_bitmask())
        if self.matcher.is_error():
            reason = " ".join(self.matcher.get_error().split())[:200]
            raise ValueError(
                f"got a constraint that cannot be followed ({reason}); expected a smaller one; shorten it"
            )
        # Eight tokens a byte. What llguidance has for this compiles code, for which a CPU needs a C++ compiler.
        bytes_B1 = torch.frombuffer(bits, dtype=torch.uint8)[:, None]
        self.is_allowed_V = (bytes_B1 >> torch.arange(8) & 1).bool().flatten()


@lru_cache(maxsize=4)
def _load_guide(tokenizer: PreTrainedTokenizerBase, num_tokens: int, end_ids: frozenset[int]):
    """A tokenizer as llguidance has it, which takes about a second for 100,000 tokens."""
    from llguidance.hf import from_tokenizer

    # Tokens that were added behind the vocabulary count, too.
    return from_tokenizer(tokenizer, n_vocab=num_tokens, eos_token=sorted(end_ids))
