"""generate_answers: many requests at once, with pictures or without, each answered as `generate` would alone.

Requests share every pass of the language model (continuous batching, Orca, OSDI 2022). A request joins as soon as
there is room, its prompt in the same pass as the next tokens of the others, and leaves with its last token. There is
no padding. Pictures of requests that join together are encoded together, and each picture once. A request that must be
refused is refused before it takes part in a pass with others.

What is surprising: in 16 bits, and with quantization="int8", answers are equal within rounding: which of two almost
equal logits is larger can differ. And transformers' own continuous batching is not used: its passes take ids and no
image features (transformers 5.23, generation/continuous_batching/input_outputs.py).

    for answer in generate_answers(model, processor, [AnswerRequest(messages) for messages in conversations]):
        print(answer.index, answer.text)
"""

import copy
from collections import deque
from collections.abc import Iterable, Iterator

import torch
from transformers import LogitsProcessorList, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_llava.checkpoints.shared_values import check_pair
from modeling_llava.generation import forbid_image_token
from processing_llava.processing_llava import AnyLlavaProcessor

from .answer_requests import AnswerRequest, BatchedAnswer, PreparedRequest
from .cached_generation import build_cache, build_compile_config, check_compiles
from .chat_cache import ChatCache, iterate_unknown, key_tokens, load_features, read_images
from .constraints import ConstrainTokens
from .row_cache import NewRow, RowCache, check_row_attention, use_row_attention
from .token_stream import (
    build_sampler,
    cut_at_end,
    decode_answer,
    encode_question,
    find_answer_end,
    find_end_token,
    limit_new_tokens,
    read_greedy_config,
)

MAX_PASS_TOKENS = 2048
"""No request joins a pass that has this many tokens of prompts: it bounds activations, and the wait of the others."""


def generate_answers(
    model: PreTrainedModel,
    processor: AnyLlavaProcessor,
    requests: Iterable[AnswerRequest],
    *,
    max_rows: int = 16,
    max_cache_tokens: int = 16384,
    cache: ChatCache | None = None,
    compile: bool = False,
) -> Iterator[BatchedAnswer]:
    """Answer requests in the order in which they finish; one that fails is an answer with an error.

    Requests are read as there is room for them. Closing the iterator frees the KV cache.

    Args:
        requests: Requests, whose answers are numbered in this order.
        The others: see `BatchedGeneration`.

    Raises:
        ValueError: at the first answer, if the model cannot be used so.
    """
    if isinstance(requests, AnswerRequest):
        raise ValueError("got one AnswerRequest; expected a list of them, or what gives one after the other")
    batch = BatchedGeneration(
        model, processor, max_rows=max_rows, max_cache_tokens=max_cache_tokens, cache=cache, compile=compile
    )
    for index, request in enumerate(requests):
        try:
            batch.add(index, request)
        except (ValueError, OSError) as error:
            yield BatchedAnswer(index, error=ValueError(str(error)))
        while batch.is_full:
            yield from batch.step()
    while batch.num_requests:
        yield from batch.step()


class BatchedGeneration:
    """A batch that requests join and leave; for a server that calls `add` and `step` in turns.

    Args:
        model: A LLaVA of our class, in evaluation mode.
        processor: The processor of the model.
        max_rows: Requests that are answered at the same time.
        max_cache_tokens: Size of the KV cache in tokens. As many rows are answered at the same time as this is a
            multiple of the longest one (prompt and `max_new_tokens`). One token of a 7B model takes 0.5 MB in 16 bits,
            so the default is 8 GB; it is taken as it is needed on a CPU and at once on a GPU. While rows are made
            longer, those of one layer exist twice.
        cache: A cache for image features, of 256 MB by default, and for keys and values of requests with a scope. Its
            lock is held during a step, so that ChatSessions of the same cache may run in other threads. Nothing else
            may use the model during a step.
        compile: For a GPU: steps in which no request joins run as CUDA graphs over `max_rows` slots, each of at most
            `max_cache_tokens / max_rows` tokens. The first of them takes some minutes. All steps must then be taken in
            one thread.

    Raises:
        ValueError: if the KV cache of the model cannot be kept row by row, it cannot be compiled, or limits are
            below 1.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: AnyLlavaProcessor,
        *,
        max_rows: int = 16,
        max_cache_tokens: int = 16384,
        cache: ChatCache | None = None,
        compile: bool = False,
    ) -> None:
        if compile:
            check_compiles(model)
        if min(max_rows, max_cache_tokens) < 1:
            raise ValueError(
                f"got max_rows={max_rows} and max_cache_tokens={max_cache_tokens}; expected at least 1 of each"
            )
        check_pair(model, processor)
        if build_cache(model) is None:
            language_model = type(model.base_model.language_model).__name__
            raise ValueError(
                f"got a {language_model}; expected a language model whose KV cache does not depend on the rows beside "
                "it: answer one request at a time"
            )
        self._generation_config = read_greedy_config(model)
        if self._generation_config.max_time is not None:
            raise ValueError(
                f"got a model whose generation_config says max_time={self._generation_config.max_time}; expected none "
                "for answers that share their time: take it out of model.generation_config"
            )
        self.model = model
        self.processor = processor
        self.cache = ChatCache(max_bytes=256 * 2**20) if cache is None else cache
        self.cache.bind(model)
        # The check sets the attention function for a moment.
        with self.cache.lock:
            check_row_attention(model.base_model.language_model)
        # On a CPU padding costs more than calls; on a GPU calls cost more than padding.
        row_by_row = model.device.type == "cpu" and not compile
        self._row_cache = RowCache(
            max_rows=max_rows,
            max_tokens=max_cache_tokens,
            row_by_row=row_by_row,
            device=model.device,
            fixed=compile,
        )
        ends = self._generation_config.eos_token_id
        self.end = find_answer_end(processor)
        """The text before which an answer ends."""
        end_ids = {*(ends if isinstance(ends, list) else [ends]), find_end_token(processor.tokenizer, self.end)}
        self._end_ids = frozenset(end_ids - {None})
        self._rows: list[PreparedRequest] = []
        self._waiting: deque[PreparedRequest] = deque()

    @property
    def num_requests(self) -> int:
        """Requests that have no answer yet."""
        return len(self._rows) + len(self._waiting)

    @property
    def running(self) -> list[PreparedRequest]:
        """Requests that have a part of their answer."""
        return list(self._rows)

    @property
    def is_full(self) -> bool:
        """Whether a request that is added would have to wait for longer than a step."""
        return len(self._choose()) < len(self._waiting)

    def add(self, index: int, request: AnswerRequest) -> None:
        """Prepare a request for one of the next steps.

        Args:
            index: The number that its answer will have.
            request: The request.

        Raises:
            ValueError: if a picture or a setting is refused, or the request is too long for the model or the limits.
            FileNotFoundError: if there is no picture at a path.
        """
        self.join(self.prepare(index, request))

    def join(self, row: PreparedRequest) -> None:
        """Let a request that `prepare` has made join one of the next steps."""
        self._waiting.append(row)

    def leave(self, index: int) -> None:
        """Drop the request with this number, of which nobody wants the rest; one that has ended is no mistake."""
        self._waiting = deque(row for row in self._waiting if row.index != index)
        for place, row in enumerate(self._rows):
            if row.index == index:
                self._drop(place)
                break

    def step(self) -> list[BatchedAnswer]:
        """Compute the next token of every request that there is room for.

        If a pass fails, for example because memory is short, its requests are answered with the error; others go on.
        If a constraint can be followed no further, its request alone is.

        Returns:
            The answers that this token completes.
        """
        if not self.num_requests:
            return []
        new_rows = self._choose()
        for _ in new_rows:
            self._waiting.popleft()
        is_step = self._row_cache.fixed and not new_rows
        try:
            with self.cache.lock, use_row_attention(self.model.base_model.language_model):
                logits = self._compute_step() if is_step else self._compute_pass(new_rows)
            tokens = self._sample_tokens(logits, [*self._rows, *new_rows])
        except Exception as error:
            failed = [*self._rows, *new_rows]
            self._rows = []
            self._row_cache.clear()
            # A traceback would keep the tensors of the pass alive.
            return [BatchedAnswer(row.index, error=error.with_traceback(None)) for row in failed]
        self._rows += new_rows
        for row, token, logits_V in zip(self._rows, tokens, logits):
            row.add(token, logits_V)
        answers = []
        for place in reversed(range(len(self._rows))):
            row = self._rows[place]
            if row.error is not None:
                answers.append(BatchedAnswer(row.index, error=row.error))
                self._drop(place)
                continue
            has_ended = row.ids[-1] in self._end_ids or self._has_ended(row)
            if has_ended or len(row.ids) == row.max_new_tokens:
                answers.append(self._finish(row, "stop" if has_ended else "length"))
                if row.keys:
                    # The last token of an answer has never been an input.
                    with self.cache.lock:
                        self.cache.store_prefix([*row.keys, *row.ids[:-1]], self._row_cache.read(place))
                self._drop(place)
        return answers[::-1]

    def prepare(self, index: int, request: AnswerRequest) -> PreparedRequest:
        """Encode a request, and settle how its tokens are chosen and how many there may be.

        It changes nothing here, so that another thread can do it during a step, one request after the other.

        Raises:
            ValueError, FileNotFoundError: as `add`.
        """
        if not isinstance(request, AnswerRequest):
            raise ValueError(f"got a {type(request).__name__} as a request; expected an AnswerRequest")
        request.check()
        device = self.model.device
        inputs = encode_question(request.messages, self.processor)
        prompt_ids = inputs["input_ids"][0].tolist()
        max_new_tokens = limit_new_tokens(
            self.model.config, num_prompt_tokens=len(prompt_ids), max_new_tokens=request.max_new_tokens
        )
        config = copy.deepcopy(self._generation_config)
        config.max_new_tokens, config.max_length = max_new_tokens, len(prompt_ids) + max_new_tokens
        self.model._prepare_special_tokens(config, device=device)
        choosing = LogitsProcessorList()
        if request.constraint is not None:
            choosing.append(
                ConstrainTokens(
                    request.constraint,
                    self.processor.tokenizer,
                    end_ids=self._end_ids,
                    num_prompt_tokens=len(prompt_ids),
                )
            )
        choosing += build_sampler(
            temperature=request.temperature, top_p=request.top_p, seed=request.seed, device=device
        )
        # As `generate` gets them: what the generation config asks for, then the constraint and the sampler.
        processors = self.model._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=len(prompt_ids),
            encoder_input_ids=inputs["input_ids"],
            logits_processor=choosing,
            device=device,
            model_kwargs={},
        )
        scope = request.scope or b""
        images = read_images(self.model, inputs, scope=scope)
        row = PreparedRequest(
            index=index,
            request=request,
            prompt_ids=prompt_ids,
            max_new_tokens=max_new_tokens,
            processors=processors,
            inputs=inputs,
            images=images,
            keys=[] if request.scope is None else key_tokens(prompt_ids, images, scope),
        )
        if row.largest_length > self._row_cache.largest_length:
            raise ValueError(
                f"got a request of {row.largest_length} tokens, max_new_tokens included; expected at most "
                f"{self._row_cache.largest_length}: raise max_cache_tokens"
            )
        return row

    def _choose(self) -> list[PreparedRequest]:
        """The waiting rows that can join the next pass, in their order."""
        chosen, num_tokens = [], 0
        for row in self._waiting:
            lengths = [chosen_row.largest_length for chosen_row in (*chosen, row)]
            if num_tokens >= MAX_PASS_TOKENS or not self._row_cache.has_room(lengths):
                break
            chosen.append(row)
            num_tokens += len(row.prompt_ids)
        return chosen

    @torch.no_grad()
    def _compute_pass(self, new_rows: list[PreparedRequest]) -> torch.Tensor:
        """Logits `[N, vocabulary]` after the newest token of every row, the new ones last."""
        device = self.model.device
        joining, unknown = [], []
        for row in new_rows:
            # The last token is always computed: the answer begins with its logits.
            row.num_reused_tokens, known = self.cache.find_prefix(row.keys[:-1])
            joining.append(NewRow(len(row.prompt_ids), row.largest_length, row.num_reused_tokens, known))
            unknown += [
                (image, row.inputs, start) for image, start in iterate_unknown(row.images, row.num_reused_tokens)
            ]
        features = load_features(self.model, self.cache, [(image, inputs) for image, inputs, _ in unknown])
        features = [image_features[start:] for image_features, (_, _, start) in zip(features, unknown)]
        positions = self._row_cache.begin_pass(joining)
        ids = [row.ids[-1] for row in self._rows]
        newest = list(range(len(ids)))
        for row in new_rows:
            ids += row.prompt_ids[row.num_reused_tokens :]
            newest.append(len(ids) - 1)
            row.inputs = None
        encoded = {}
        if features:
            encoded["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=features)}
        outputs = self.model(
            input_ids=torch.tensor([ids], device=device),
            position_ids=positions,
            logits_to_keep=torch.tensor(newest, device=device),
            use_cache=False,
            row_cache=self._row_cache,
            **encoded,
        )
        # As `generate` does, before logits are compared or sampled from.
        return outputs.logits[0].float()

    @torch.no_grad()
    def _compute_step(self) -> torch.Tensor:
        """As `_compute_pass` without new rows, in compiled code."""
        compiled = self.model.get_compiled_call(build_compile_config(self.model.device))
        positions = self._row_cache.begin_step()
        ids = torch.zeros_like(positions)
        ids[0, : len(self._rows)] = torch.tensor([row.ids[-1] for row in self._rows])
        outputs = compiled(input_ids=ids, position_ids=positions, use_cache=False, row_cache=self._row_cache)
        # A copy: the next step writes to the same memory.
        return outputs.logits[0, : len(self._rows)].to(torch.float32, copy=True)

    def _sample_tokens(self, logits_NV: torch.Tensor, rows: list[PreparedRequest]) -> list[int]:
        tokens_N = forbid_image_token(logits_NV, self.model.config.image_token_id).argmax(dim=-1)
        for place, row in enumerate(rows):
            if not row.is_greedy:
                ids_1L = torch.tensor([row.prompt_ids + row.ids], device=logits_NV.device)
                try:
                    tokens_N[place] = row.processors(ids_1L, logits_NV[place : place + 1])[0].argmax()
                except ValueError as error:
                    row.error = error.with_traceback(None)
        return tokens_N.tolist()

    def _has_ended(self, row: PreparedRequest) -> bool:
        """Whether the text of an answer holds its end."""
        # A token is at least a byte; twice as many tokens leave room for some that decode to no text.
        num_tokens = 2 * len(self.end.encode())
        if num_tokens > 0 and self.end in self.processor.tokenizer.decode(row.ids[-num_tokens:]):
            return True
        text = self._decode(row) if row.request.stop else ""
        return any(stop in text for stop in row.request.stop)

    def _decode(self, row: PreparedRequest) -> str:
        return decode_answer(row.ids, self.processor.tokenizer, learn_tokens=self.processor.learn_tokens)

    def _finish(self, row: PreparedRequest, finish_reason: str) -> BatchedAnswer:
        return BatchedAnswer(
            row.index,
            cut_at_end(self._decode(row), self.end, *row.request.stop),
            row.ids,
            finish_reason=finish_reason,
            logprobs=row.logprobs,
            num_prompt_tokens=len(row.prompt_ids),
            num_reused_tokens=row.num_reused_tokens,
        )

    def _drop(self, place: int) -> None:
        self._row_cache.remove(place)
        self._rows[place] = self._rows[-1]
        self._rows.pop()
