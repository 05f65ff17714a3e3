"""Requests to a batch: what a user asks, what the model is given for it, and the answer.

Whatever can be refused is refused here, before a request takes part in a pass with others.
"""

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import BatchFeature, GenerationConfig, LogitsProcessorList, PreTrainedModel

from modeling_llava.generation import ForbidImageToken
from processing_llava.messages import check_question
from processing_llava.processing_llava import AnyLlavaProcessor

from .cached_generation import limit_new_tokens
from .foreign_processors import encode_messages
from .prompt_images import PromptImage, read_images
from .token_stream import build_sampler, check_numbers


@dataclass(frozen=True)
class AnswerRequest:
    """A conversation to answer, with the settings of `ChatSession.answer`."""

    messages: list[dict[str, Any]]
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    """Of a generator of its own: what is drawn does not depend on the other requests."""


@dataclass(frozen=True)
class BatchedAnswer:
    index: int
    """Of the request."""
    text: str = ""
    ids: list[int] = field(default_factory=list)
    """Of the answer, with the token that ends it."""
    error: Exception | None = None
    """Why there is no answer: a ValueError says what is wrong with the request; anything else came from a pass, of
    which all requests have no answer."""


@dataclass(eq=False)
class PreparedRequest:
    """A request as the passes take it, and its answer so far."""

    index: int
    request: AnswerRequest
    prompt_ids: list[int]
    processors: LogitsProcessorList
    inputs: BatchFeature | None
    """What the processor returned; None once the prompt was computed."""
    images: list[PromptImage]
    ids: list[int] = field(default_factory=list)

    @property
    def largest_length(self) -> int:
        return len(self.prompt_ids) + self.request.max_new_tokens


def prepare_request(
    index: int,
    request: AnswerRequest,
    model: PreTrainedModel,
    processor: AnyLlavaProcessor,
    *,
    generation_config: GenerationConfig,
) -> PreparedRequest:
    """Encode a request, and settle how its tokens are chosen and how many there may be.

    Args:
        index: What its answer is known by.
        generation_config: That of the model.

    Raises:
        ValueError: if a picture or a setting is refused, or the request is too long for the model.
        FileNotFoundError: if there is no picture at a path.
    """
    if not isinstance(request, AnswerRequest):
        raise ValueError(f"got a {type(request).__name__} as a request; expected an AnswerRequest")
    messages = request.messages
    check_question(messages)
    drawing = {"temperature": request.temperature, "top_p": request.top_p, "seed": request.seed}
    check_numbers(max_new_tokens=request.max_new_tokens, **drawing)
    sampler = build_sampler(**drawing, device=model.device)
    inputs = encode_messages(messages, processor)
    if model.config.model_type == "llava" and "image_sizes" in inputs:
        raise ValueError(
            "got pictures of different sizes for transformers' own class; expected pictures of one size: answer one "
            "request at a time"
        )
    prompt_ids = inputs["input_ids"][0].tolist()
    max_new_tokens = limit_new_tokens(
        model.config, num_prompt_tokens=len(prompt_ids), max_new_tokens=request.max_new_tokens
    )
    config = copy.deepcopy(generation_config)
    config.max_new_tokens, config.max_length = max_new_tokens, len(prompt_ids) + max_new_tokens
    return PreparedRequest(
        index=index,
        request=replace(request, max_new_tokens=max_new_tokens),
        prompt_ids=prompt_ids,
        processors=_build_processors(model, inputs["input_ids"], config, sampler),
        inputs=inputs,
        images=read_images(model, inputs),
    )


def _build_processors(
    model: PreTrainedModel, input_ids: torch.Tensor, config: GenerationConfig, sampler: LogitsProcessorList
) -> LogitsProcessorList:
    """What `generate` does to the logits of a request: what its config says, then drawing.

    Without what forbids image tokens, which `BatchedGeneration` does for all requests at once.
    """
    model._prepare_special_tokens(config, device=model.device)
    processors = model._get_logits_processor(
        generation_config=config,
        input_ids_seq_length=input_ids.shape[1],
        encoder_input_ids=input_ids,
        logits_processor=sampler,
        device=model.device,
        model_kwargs={},
    )
    if processors and isinstance(processors[0], ForbidImageToken):
        del processors[0]
    return processors
