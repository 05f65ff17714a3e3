"""ChatSession: a conversation about pictures that streams."""

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from modeling_llava.acceleration.cpu_layers import use_cpu_attention
from modeling_llava.checkpoints.shared_values import check_pair
from processing_llava.image_loading import naming_picture
from processing_llava.processing_llava import AnyLlavaProcessor

from .cached_generation import CachedGeneration, check_compiles
from .chat_cache import ChatCache
from .token_stream import (
    StreamedText,
    build_sampler,
    check_sampling,
    encode_question,
    find_answer_end,
    limit_new_tokens,
    read_greedy_config,
    stream_tokens,
)


@dataclass(frozen=True)
class AnswerStatistics:
    """Tokens and times of an answer."""

    num_prompt_tokens: int
    """Tokens of the prompt, image tokens included."""
    num_image_tokens: int
    num_reused_tokens: int
    """Tokens of the prompt whose keys and values were cached."""
    num_new_tokens: int
    """Tokens of the answer, with the one that ends it."""
    seconds_to_first_token: float
    """Time from the question on, with preparing the images and waiting for other answers."""
    tokens_per_second: float
    """Rate after the first token; 0 if there are no others."""


class ChatSession:
    """A conversation with one model.

    Sessions of one model that run in several threads must share a cache: the model then gives one answer at a time.

    Args:
        model: A LLaVA of our class, in evaluation mode.
        processor: The processor of the model.
        system: System text instead of that of the template.
        cache: KV cache and image features of earlier answers; the session's own by default.
        scope: Sessions that share a cache reuse each other's work only if they have the same scope. Time and
            statistics tell what was reused: users who must not learn what others ask take a random one each.
        compile: Decode with compiled code and a static KV cache, on a GPU as CUDA graphs. The first answer takes some
            minutes longer, and so does the first conversation beyond 1024 tokens, 2048, and so on.

    Raises:
        ValueError: if the cache belongs to another model, or the model cannot be compiled.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: AnyLlavaProcessor,
        *,
        system: str | None = None,
        cache: ChatCache | None = None,
        scope: bytes = b"",
        compile: bool = False,
    ) -> None:
        if compile:
            check_compiles(model)
            use_cpu_attention(model.base_model.language_model)
        check_pair(model, processor)
        self.model = model
        self.processor = processor
        self.system = system
        self.cache = ChatCache() if cache is None else cache
        self.cache.bind(model)
        self.scope = scope
        self.compile = compile
        self._end = find_answer_end(processor)
        self.messages: list[dict[str, Any]] = []
        self.statistics: AnswerStatistics | None = None
        """Statistics of the last answer, also of one that was stopped."""
        self.reset()

    def reset(self) -> None:
        """Forget every turn and picture."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def ask(self, question: str, *, images: list[Any] = (), **settings) -> Iterator[str]:
        """Answer in pieces of text as they are generated; the turn is remembered when the last piece is out.

        Args:
            question: Text of the user; it is never read as control tokens.
            images: Pictures that come with it: PIL images, `pathlib.Path`, bytes or data URIs.
            **settings: Settings of `answer`.

        Raises:
            ValueError: if a picture or a setting is refused.
        """
        if not isinstance(question, str) or not isinstance(images, (list, tuple)):
            raise ValueError(
                f"got a {type(question).__name__} and a {type(images).__name__}; expected a question and a list of "
                "pictures"
            )
        content = []
        for number, image in enumerate(images, start=1):
            with naming_picture(number, len(images)):
                # Later turns read it again, and need no more than its tiles.
                content.append({"type": "image", "image": self.processor.image_processor.cut_picture(image)})
        question_message = {"role": "user", "content": [*content, {"type": "text", "text": question}]}
        # `reset` begins another list meanwhile.
        messages, pieces = self.messages, []
        with closing(self.answer([*messages, question_message], **settings)) as answer:
            for piece in answer:
                pieces.append(piece)
                yield piece
        answer_message = {"role": "assistant", "content": [{"type": "text", "text": "".join(pieces)}]}
        messages += [question_message, answer_message]

    def answer(
        self,
        messages: list[dict[str, Any]],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[str]:
        """Answer a whole conversation, which the session does not remember; the cache keeps what it computes.

        Closing the iterator stops the model within one token.

        Args:
            messages: `[{"role": ..., "content": text or [{"type": "image", "image": ...}, ...]}]`, the last one from
                the user. The system text of the session is added if there is none.
            max_new_tokens: Longest answer in tokens; it ends earlier where the model can read no more.
            temperature: 0 for greedy decoding, higher for varied answers.
            top_p: Sample from the most probable tokens whose probabilities add up to this, at most 1.
            seed: Seed of the sampler.

        Raises:
            ValueError: if a picture or a setting is refused, the conversation is longer than the model can read, or
                its last message is not from the user.
        """
        started = time.perf_counter()
        read_greedy_config(self.model)
        sampling = {"temperature": temperature, "top_p": top_p, "seed": seed}
        check_sampling(max_new_tokens=max_new_tokens, **sampling)
        inputs = encode_question(messages, self.processor, system=self.system)
        num_prompt_tokens = inputs["input_ids"].shape[1]
        max_new_tokens = limit_new_tokens(
            self.model.config, num_prompt_tokens=num_prompt_tokens, max_new_tokens=max_new_tokens
        )
        sampler = build_sampler(**sampling, device=self.model.device)
        generation = CachedGeneration(self.model, inputs, self.cache, scope=self.scope, compile=self.compile)
        generate = partial(generation.run, max_new_tokens=max_new_tokens, logits_processor=sampler)
        text = StreamedText(self.processor.tokenizer, end=self._end, learn_tokens=self.processor.learn_tokens)
        times: list[float] = []
        worker = self.cache.compiled_worker if self.compile else None
        try:
            with closing(stream_tokens(generate, lock=self.cache.lock, worker=worker)) as tokens:
                for token, token_time in tokens:
                    times.append(token_time)
                    if piece := text.add(token):
                        yield piece
                    if text.has_ended:
                        break
            if piece := text.finish():
                yield piece
        finally:
            if times:
                seconds = times[-1] - times[0]
                self.statistics = AnswerStatistics(
                    num_prompt_tokens=num_prompt_tokens,
                    num_image_tokens=int((inputs["input_ids"] == self.processor.image_token_id).sum()),
                    num_reused_tokens=generation.num_reused_tokens,
                    num_new_tokens=len(times),
                    seconds_to_first_token=times[0] - started,
                    tokens_per_second=(len(times) - 1) / seconds if seconds else 0.0,
                )
