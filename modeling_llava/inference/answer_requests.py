"""AnswerRequest and BatchedAnswer: what a batch is asked, and what it answers."""

from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral
from typing import Any, NamedTuple

import torch
from transformers import BatchFeature, LogitsProcessorList

from modeling_llava.generation import ForbidImageToken

from .chat_cache import PromptImage, TokenKey
from .constraints import Constraint
from .token_stream import check_sampling

MAX_LOGPROBS = 20
"""Most alternatives of a token that a request can ask for."""


@dataclass(frozen=True)
class AnswerRequest:
    """A conversation to answer, with the settings of `ChatSession.answer` and more."""

    messages: list[dict[str, Any]]
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    """Seed of the request's own sampler: its tokens do not depend on the other requests."""
    stop: tuple[str, ...] = ()
    """Texts before which the answer ends."""
    logprobs: int | None = None
    """How many of the most probable tokens to tell with each token; None tells no probabilities at all."""
    constraint: Constraint | None = None
    """What the answer may be."""
    scope: bytes | None = None
    """Whose keys and values of earlier conversations may be reused, as in `ChatSession`; those of this conversation
    are kept for the next one. None reuses and keeps none, and pictures are shared with whoever has no scope either."""

    def check(self) -> None:
        """Refuse settings out of range.

        Raises:
            ValueError: naming the setting.
        """
        check_sampling(
            max_new_tokens=self.max_new_tokens, temperature=self.temperature, top_p=self.top_p, seed=self.seed
        )
        if not isinstance(self.stop, tuple) or not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"got stop={str(self.stop)[:80]}; expected a tuple of texts; leave empty ones out")
        is_number = isinstance(self.logprobs, Integral) and not isinstance(self.logprobs, bool)
        if self.logprobs is not None and not (is_number and 0 <= self.logprobs <= MAX_LOGPROBS):
            raise ValueError(f"got logprobs={self.logprobs!r}; expected None or 0 to {MAX_LOGPROBS}; correct it")
        if self.constraint is not None and not isinstance(self.constraint, Constraint):
            raise ValueError(
                f"got constraint={str(self.constraint)[:80]!r}; expected a Constraint: Constraint.choose([...])"
            )


class TokenLogprobs(NamedTuple):
    """How probable a token was for the model, before any setting of the request."""

    token: int
    logprob: float
    alternatives: list[tuple[int, float]]
    """The most probable tokens, the first one first, with their logprobs."""


@dataclass(frozen=True)
class BatchedAnswer:
    index: int
    """The number that the request was added with."""
    text: str = ""
    ids: list[int] = field(default_factory=list)
    """Tokens of the answer, with the one that ends it."""
    error: Exception | None = None
    """Why there is no answer: a ValueError says what is wrong with the request; any other error came from a pass, and
    all requests of that pass have it."""
    finish_reason: str = "stop"
    """"stop", or "length" where `max_new_tokens` or the length of the model cut the answer off."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_reused_tokens: int = 0
    """Tokens of the prompt whose keys and values were known."""


@dataclass(eq=False)
class PreparedRequest:
    """A request as the passes take it, and its answer so far."""

    index: int
    request: AnswerRequest
    prompt_ids: list[int]
    max_new_tokens: int
    processors: LogitsProcessorList
    inputs: BatchFeature | None
    """What the processor returned; None once the prompt was computed."""
    images: list[PromptImage]
    keys: list[TokenKey]
    """Of the tokens of the prompt, in the tree of the ChatCache; empty without a scope."""
    num_reused_tokens: int = 0
    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    error: ValueError | None = None
    """Why its constraint can be followed no further."""

    @property
    def largest_length(self) -> int:
        return len(self.prompt_ids) + self.max_new_tokens

    @cached_property
    def is_greedy(self) -> bool:
        """Whether each token is that of the largest logit, image tokens left out."""
        return all(isinstance(processor, ForbidImageToken) for processor in self.processors)

    def add(self, token: int, logits_V: torch.Tensor) -> None:
        """Take the next token of the answer, which was chosen by these logits."""
        self.ids.append(token)
        if self.request.logprobs is not None:
            logprobs_V = logits_V.float().log_softmax(dim=-1)
            best = logprobs_V.topk(self.request.logprobs)
            alternatives = list(zip(best.indices.tolist(), best.values.tolist()))
            self.logprobs.append(TokenLogprobs(token, float(logprobs_V[token]), alternatives))
