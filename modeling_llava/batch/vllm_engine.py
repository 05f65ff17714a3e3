"""The same batch on vLLM, which computes it on many GPUs: `--engine vllm`.

The ids of a prompt are ours, so that a text of a row is no control token; each picture is one id in them, which vLLM
makes as many as the picture has features. It prepares pictures with what stands in the folder of the model.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from modeling_llava.inference.token_stream import cut_at_end, decode_answer, find_answer_end
from processing_llava.image_limits import ImageLimits
from processing_llava.image_loading import load_image, naming_picture
from processing_llava.messages import list_pictures
from processing_llava.processing_llava import AnyLlavaProcessor
from processing_llava.prompt_ids import encode_prompt

from .answering import ROW_ERRORS, Question, Result

CHUNK = 64
"""Rows that vLLM has at a time: their pictures are in memory, and their records are written together."""


class VllmEngine:
    """Answers of vLLM.

    Args:
        name: Folder or Hub id, in transformers' layout.
        processor: The processor of the model.
        limits: What pictures may cost.
        system: System text to use instead of the template's.
        dtype: As vLLM names it; None for that of the checkpoint.
        schema: What answers are to be, as JSON; None for text.
        sampling: `max_tokens`, `temperature` and `seed` of vLLM's SamplingParams.

    Raises:
        ModuleNotFoundError: vLLM is not installed.
        ValueError: it cannot read the model.
    """

    def __init__(
        self,
        name: str,
        processor: AnyLlavaProcessor,
        *,
        limits: ImageLimits,
        system: str | None,
        dtype: str | None,
        schema: dict[str, Any] | None,
        sampling: dict[str, Any],
    ) -> None:
        from vllm import LLM, SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        self.processor = processor
        self.limits = limits
        self.system = system
        self.end = find_answer_end(processor)
        structured, config = {}, {}
        if schema is not None:
            structured = {"structured_outputs": StructuredOutputsParams(json=schema)}
            # Small models write nothing but white space where they may.
            config = {"structured_outputs_config": {"backend": "guidance", "disable_any_whitespace": True}}
        self.sampling = SamplingParams(**sampling, stop=[self.end] if self.end else None, **structured)
        try:
            self.engine = LLM(model=name, dtype=dtype or "auto", **config)
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"got the model {name!r}, which vLLM does not start ({reason}); expected a folder in transformers' "
                "layout: write one with llava export, or leave out --engine vllm"
            ) from error

    def answer(self, questions: Iterable[Question]) -> Iterator[Result]:
        """Answers, chunk by chunk."""
        questions = iter(questions)
        while chunk := list(islice(questions, CHUNK)):
            prepared: list[tuple[Question, dict[str, Any]]] = []
            for question in chunk:
                try:
                    prepared.append((question, self._prepare(question)))
                except ROW_ERRORS as error:
                    yield Result(question, error=error)
            yield from self._generate(prepared)

    def _generate(self, prepared: list[tuple[Question, dict[str, Any]]]) -> Iterator[Result]:
        """Answers of some rows; where vLLM refuses one of them, it says so for all, and each is asked alone."""
        if not prepared:
            return
        try:
            outputs = self.engine.generate([request for _, request in prepared], self.sampling, use_tqdm=False)
        except ValueError as error:
            if len(prepared) == 1:
                yield Result(prepared[0][0], error=error.with_traceback(None))
                return
            for row in prepared:
                yield from self._generate([row])
            return
        for (question, _), output in zip(prepared, outputs, strict=True):
            answer = output.outputs[0]
            # vLLM's own text leaves out half a character at the end.
            text = decode_answer(
                list(answer.token_ids), self.processor.tokenizer, learn_tokens=self.processor.learn_tokens
            )
            yield Result(question, cut_at_end(text, self.end), answer.finish_reason)

    def _prepare(self, question: Question) -> dict[str, Any]:
        messages = question.build_messages(self.system)
        processor = self.processor
        images = []
        pictures = list(list_pictures(messages))
        for number, picture in enumerate(pictures, start=1):
            with naming_picture(number, len(pictures)):
                images.append(load_image(picture, limits=self.limits))
        ids, _ = encode_prompt(
            processor.render(messages, add_generation_prompt=True),
            processor.tokenizer,
            image_token=processor.image_token,
            image_token_id=processor.image_token_id,
            num_image_tokens=[1] * len(images),
        )
        return {"prompt_token_ids": ids, "multi_modal_data": {"image": images}}
