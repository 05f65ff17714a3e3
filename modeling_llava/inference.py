"""Loading a model for answering, and ChatSession: a conversation about pictures that streams."""

from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from transformers import AutoProcessor, PreTrainedModel, TextIteratorStreamer, set_seed

from processing_llava.conversation_templates import load_template
from processing_llava.image_loading import load_image
from processing_llava.processing_llava import AnyLlavaProcessor

from .auto import AutoModelForVision2Seq

EMBEDDED_MODEL = str(Path(__file__).parent / "tiny_llava" / "checkpoint")
"""The small LLaVA that ships in this package."""


def load_for_inference(
    model: str = EMBEDDED_MODEL, *, template: str | None = None, base_model: str | None = None
) -> tuple[PreTrainedModel, AnyLlavaProcessor]:
    """Load a model and its processor on the best device there is.

    Args:
        model: Folder or Hub id.
        template: Name of a conversation format to use instead of the one stored with the model.
        base_model: Folder or Hub id of the language model, for a LoRA, projector or delta that does not say its own.

    Raises:
        ValueError: if there is no such model or template.
    """
    base = {} if base_model is None else {"base_model": base_model}
    chosen = {} if template is None else {"template": template}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Most processors compute 16-bit floats many times slower than 32-bit ones.
    dtype = "auto" if device == "cuda" else torch.float32
    try:
        processor = AutoProcessor.from_pretrained(model, **chosen, **base)
        loaded = AutoModelForVision2Seq.from_pretrained(model, dtype=dtype, **base)
    except OSError as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"got model {model!r}; expected a folder or a Hub id of a LLaVA: {reason}") from error
    if template is not None and not isinstance(processor, AnyLlavaProcessor):
        processor.chat_template = load_template(template)
    return loaded.to(device).eval(), processor


class ChatSession:
    """A conversation with one model.

    Args:
        model: A model with `generate`.
        processor: Its processor.
        system: Replaces the system text of the template.
    """

    def __init__(self, model: PreTrainedModel, processor: AnyLlavaProcessor, *, system: str | None = None) -> None:
        self.model = model
        self.processor = processor
        self.system = system
        self.messages: list[dict[str, Any]] = []
        self.reset()

    def reset(self) -> None:
        """Forget every turn and picture."""
        self.messages = []
        if self.system is not None:
            self.messages.append({"role": "system", "content": self.system})

    def ask(
        self,
        question: str,
        *,
        images: list[Any] = (),
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Iterator[str]:
        """Answer in pieces of text as they are generated; the turn is remembered when the last piece is out.

        Args:
            question: What the user says; never read as control tokens.
            images: Pictures that come with it: PIL images, paths, bytes or data URIs.
            max_new_tokens: Longest answer in tokens.
            temperature: 0 for the likeliest answer, higher for varied ones.
            seed: Of the sampling.

        Raises:
            ValueError: if a picture is refused.
        """
        content = [{"type": "image", "image": load_image(image)} for image in images]
        question_message = {"role": "user", "content": [*content, {"type": "text", "text": question}]}
        inputs = self.processor.apply_chat_template(
            [*self.messages, question_message],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.model.device)
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        set_seed(seed)
        pieces = []
        for piece in stream(self.model, self.processor, inputs, max_new_tokens=max_new_tokens, **sampling):
            pieces.append(piece)
            yield piece
        answer = {"role": "assistant", "content": [{"type": "text", "text": "".join(pieces)}]}
        self.messages += [question_message, answer]


def stream(model: PreTrainedModel, processor: AnyLlavaProcessor, inputs: dict, **settings) -> Iterator[str]:
    """The generated text in pieces. An error of the generating thread is raised here."""
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    errors: list[BaseException] = []

    def run() -> None:
        try:
            model.generate(**inputs, **settings, streamer=streamer)
        except BaseException as error:
            errors.append(error)
            streamer.end()

    thread = Thread(target=run, daemon=True)
    thread.start()
    leading = True
    for piece in streamer:
        # Templates write the space before an answer into the answer.
        piece = piece.lstrip() if leading else piece
        leading = leading and not piece
        if piece:
            yield piece
    thread.join()
    if errors:
        raise errors[0]
