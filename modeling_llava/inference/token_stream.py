"""What lies between `generate` and a stream of text: settings, sampling, a thread that can be stopped, decoding.

What is surprising: the next token is sampled in a logits processor. `generate` itself takes its random numbers from
torch's global generator (transformers 5.23, generation/utils.py, _sample), which all threads of a process share.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from numbers import Integral, Real
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import Any

import torch
from transformers import (
    BatchFeature,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.streamers import BaseStreamer

from modeling_llava.generation import read_max_length
from processing_llava.messages import list_pictures
from processing_llava.processing_llava import AnyLlavaProcessor
from processing_llava.prompt_ids import refusing_panics


def read_greedy_config(model: PreTrainedModel) -> GenerationConfig:
    """The model's generation config for greedy decoding.

    Raises:
        ValueError: if it asks for anything but one token at a time.
    """
    config, _ = model._prepare_generation_config(None, do_sample=False)
    mode = config.get_generation_mode()
    if mode != GenerationMode.GREEDY_SEARCH:
        raise ValueError(
            f"got a model whose generation_config asks for {mode.value}; expected one token at a time: take what asks "
            "for it (such as num_beams) out of model.generation_config, or call model.generate"
        )
    for name in ("stop_strings", "return_dict_in_generate"):
        if value := getattr(config, name):
            raise ValueError(
                f"got a model whose generation_config says {name}={value!r}; expected none here: take it out of "
                "model.generation_config, or call model.generate"
            )
    return config


def check_sampling(*, max_new_tokens: int, temperature: float, top_p: float, seed: int) -> None:
    """Refuse settings out of range.

    Raises:
        ValueError: naming the setting.
    """
    for name, value in {"max_new_tokens": max_new_tokens, "seed": seed}.items():
        if not isinstance(value, Integral):
            raise ValueError(f"got {name}={value!r}; expected a whole number")
    for name, value in {"temperature": temperature, "top_p": top_p}.items():
        if not isinstance(value, Real):
            raise ValueError(f"got {name}={value!r}; expected a number")
    if max_new_tokens < 1:
        raise ValueError(f"got max_new_tokens={max_new_tokens}; expected at least 1")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"got temperature={temperature}; expected 0 (greedy) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"got top_p={top_p}; expected more than 0 and at most 1 (every token)")


def limit_new_tokens(config: PreTrainedConfig, *, num_prompt_tokens: int, max_new_tokens: int) -> int:
    """`max_new_tokens`, or what a prompt leaves of the length that a model was made for.

    Raises:
        ValueError: if it leaves nothing.
    """
    max_length = read_max_length(config)
    if max_length is None:
        return max_new_tokens
    if num_prompt_tokens >= max_length:
        raise ValueError(
            f"got a conversation of {num_prompt_tokens} tokens; expected fewer than {max_length}, for which this "
            "model was made: begin anew, or take pictures out"
        )
    return min(max_new_tokens, max_length - num_prompt_tokens)


def encode_question(
    messages: list[dict[str, Any]], processor: AnyLlavaProcessor, *, system: str | None = None
) -> BatchFeature:
    """Inputs of the model for the answer to a conversation.

    Args:
        system: System text to begin with, if the conversation has none.

    Raises:
        ValueError: if it is no conversation, its last message is not from the user, or a picture is refused.
    """
    # What is no conversation is for the processor to refuse, which checks the form of every message.
    is_list = isinstance(messages, (list, tuple))
    roles = [message.get("role") for message in messages if isinstance(message, dict)] if is_list else []
    if roles and isinstance(roles[-1], str) and roles[-1] != "user":
        raise ValueError(f"got {len(messages)} messages; expected the last from the user")
    if system is not None and roles and roles[0] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    prompt = processor.render(messages, add_generation_prompt=True)
    pictures = list(list_pictures(messages))
    return processor(images=[pictures] if pictures else None, text=[prompt], return_tensors="pt")


def build_sampler(*, temperature: float, top_p: float, seed: int, device: torch.device) -> LogitsProcessorList:
    """A sampler: logits processors that leave one token over, for `generate` with `do_sample=False`.

    Args:
        temperature: 0 gives no processors, with which `generate` is greedy.
        top_p: Sample from the most probable tokens whose probabilities add up to this.
        seed: Gives the tokens of `do_sample=True` after `torch.manual_seed(seed)`.
        device: Device of the logits.
    """
    if temperature == 0:
        return LogitsProcessorList()
    sampler = [TemperatureLogitsWarper(float(temperature))]
    if top_p < 1:
        sampler.append(TopPLogitsWarper(float(top_p)))
    return LogitsProcessorList([*sampler, _SampleWithSeed(seed, device)])


class _SampleWithSeed(LogitsProcessor):
    def __init__(self, seed: int, device: torch.device) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        # A probability divided by exponential noise is the largest one that often: so torch.multinomial samples, too.
        noise = torch.empty_like(scores).exponential_(generator=self.generator)
        sampled = (scores.softmax(dim=-1) / noise).argmax(dim=-1, keepdim=True)
        return torch.full_like(scores, float("-inf")).scatter(-1, sampled, 0.0)


def stream_tokens(
    generate: Callable[..., None], *, lock: Lock, worker: Executor | None = None
) -> Iterator[tuple[int, float]]:
    """The tokens that `generate` makes in another thread, with the `time.perf_counter()` of each.

    Closing the iterator ends the thread within one token. The lock belongs to the thread, not to the iterator: an
    iterator that nobody closes or reads holds up nobody else.

    Args:
        generate: Called with a `streamer` and `stopping_criteria` for `model.generate`. What it raises is raised here.
        lock: Held while `generate` runs.
        worker: An executor of one thread to run in; a new thread by default.
    """
    queue, stop = SimpleQueue(), Event()

    def run() -> None:
        while not lock.acquire(timeout=0.1):
            if stop.is_set():
                return
        try:
            generate(streamer=_QueueStreamer(queue), stopping_criteria=StoppingCriteriaList([_StopOnEvent(stop)]))
            queue.put(None)
        except BaseException as error:
            queue.put(error)
        finally:
            lock.release()

    if worker is None:
        thread = Thread(target=run, daemon=True)
        thread.start()
        wait = thread.join
    else:
        wait = worker.submit(run).result
    try:
        while (item := queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        wait()


class _QueueStreamer(BaseStreamer):
    def __init__(self, queue: SimpleQueue) -> None:
        self.queue = queue
        self.is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        if not self.is_prompt:
            self.queue.put((int(value), time.perf_counter()))
        self.is_prompt = False

    def end(self) -> None:
        """Does nothing: the thread still has to cache its keys and values when the last token is out."""


class _StopOnEvent(StoppingCriteria):
    def __init__(self, event: Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


def find_answer_end(processor: AnyLlavaProcessor) -> str:
    """The text that the chat template writes behind an answer, empty if there is none.

    It is "###" in `llava_v0`, and a special token in most other templates.
    """
    if processor.chat_template is None:
        return ""
    answer = {"role": "assistant", "content": [{"type": "text", "text": "ANSWER"}]}
    # A template may refuse a question with an image, or without one.
    for images in ([], [{"type": "image"}]):
        question = {"role": "user", "content": [*images, {"type": "text", "text": "QUESTION"}]}
        try:
            prompt = processor.render([question, answer])
        except ValueError:
            continue
        return str(prompt).rpartition("ANSWER")[2].strip()
    return ""


def find_end_token(tokenizer: PreTrainedTokenizerBase, end: str) -> int | None:
    """The id of the special token that ends an answer, if that is one; generation_config may not name it."""
    return tokenizer.convert_tokens_to_ids(end) if end in tokenizer.all_special_tokens else None


@refusing_panics()
def decode_answer(ids: list[int], tokenizer: PreTrainedTokenizerBase, *, learn_tokens: Sequence[str] = ()) -> str:
    """The text of an answer, without special tokens except those in `learn_tokens`.

    White space before an answer belongs to the template, and is dropped.
    """
    if not learn_tokens:
        return tokenizer.decode(ids, skip_special_tokens=True).lstrip()
    added = tokenizer.added_tokens_decoder
    hidden = {id for id, token in added.items() if token.special and token.content not in learn_tokens}
    return tokenizer.decode([id for id in ids if id not in hidden]).lstrip()


def cut_at_end(text: str, *ends: str) -> str:
    """The text before the first of its ends, of which some may be empty; all of it where there is none."""
    return text[: min((text.find(end) for end in ends if end and end in text), default=len(text))]


class StreamedText:
    """Decodes tokens as they come; the pieces add up to the text that all tokens together decode to.

    Text that may be half a character or a part of the end is held back.

    Args:
        tokenizer: The tokenizer of the model.
        end: The text or special token before which the answer ends; see `find_answer_end`.
        stop: Other texts before which it ends.
        learn_tokens: As in `decode_answer`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        end: str = "",
        stop: Sequence[str] = (),
        learn_tokens: Sequence[str] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.learn_tokens = learn_tokens
        self.ends = tuple(filter(None, (end, *stop)))
        self.end_token = find_end_token(tokenizer, end)
        self.ids: list[int] = []
        self.given = ""
        self.has_ended = False

    def add(self, token: int) -> str:
        """The text that this token makes certain."""
        self.ids.append(token)
        text = self._decode()
        self.has_ended = token == self.end_token or any(end in text for end in self.ends)
        text = text.rstrip("\ufffd")
        if not self.has_ended:
            parts = [end[:length] for end in self.ends for length in range(1, len(end))]
            text = text.removesuffix(max(filter(text.endswith, parts), key=len, default=""))
        return self._give(cut_at_end(text, *self.ends))

    def finish(self) -> str:
        """What was held back."""
        return self._give(cut_at_end(self._decode(), *self.ends))

    def _decode(self) -> str:
        return decode_answer(self.ids, self.tokenizer, learn_tokens=self.learn_tokens)

    def _give(self, text: str) -> str:
        # SentencePiece also drops whole characters before half a one, until that is whole.
        if not text.startswith(self.given):
            return ""
        piece, self.given = text[len(self.given) :], text
        return piece
