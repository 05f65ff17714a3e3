"""transformers' common tests of pipelines, on a checkpoint made here instead of one from the Hub."""

import tempfile
import unittest
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch
from PIL import Image
from transformers import Pipeline, pipeline

from modeling_llava import AnyLlavaConfig, AnyLlavaForConditionalGeneration
from processing_llava import AnyLlavaProcessor
from tests.tiny import save_tiny_checkpoint
from tests.transformers_suite.upstream import PICTURE, pipelines

TASK = "image-text-to-text"
QUESTION = {"type": "text", "text": "What is this?"}


class ImageTextToText:
    """What the mixin expects of transformers' own tests of the task, which the source distribution leaves out."""

    def get_test_pipeline(self, model, tokenizer, *, processor, image_processor, dtype: str) -> tuple[Pipeline, list]:
        model = model.to(getattr(torch, dtype))
        prompt = {"images": Image.open(PICTURE), "text": "<image>\nWhat is this?"}
        return pipeline(TASK, model=model, processor=processor, max_new_tokens=5), [prompt]

    def run_pipeline_test(self, test_pipeline: Pipeline, examples: list) -> None:
        (prompt,) = examples
        (output,) = test_pipeline(**prompt)
        assert output["input_text"] == prompt["text"]
        assert output["generated_text"].startswith(prompt["text"])

        contents = [[{"type": "image", "path": PICTURE}, QUESTION], [QUESTION]]
        chats = [[{"role": "user", "content": content}] for content in contents]
        for chat, (output,) in zip(chats, test_pipeline(text=chats), strict=True):
            assert output["generated_text"][:-1] == chat
            assert output["generated_text"][-1]["role"] == "assistant"


class PipelineTest(pipelines.PipelineTesterMixin, unittest.TestCase):
    # The other task of such models, any-to-any, is closed to everyone without torchvision.
    pipeline_model_mapping = {TASK: AnyLlavaForConditionalGeneration}

    @classmethod
    def setUpClass(cls) -> None:
        contexts = ExitStack()
        cls.addClassCleanup(contexts.close)
        folder = contexts.enter_context(tempfile.TemporaryDirectory())
        model_type, name = AnyLlavaConfig.model_type, AnyLlavaForConditionalGeneration.__name__
        save_tiny_checkpoint(Path(folder, model_type, name))
        parts = {
            "tokenizer_classes": ["PreTrainedTokenizerFast"],
            "processor_classes": ["AnyLlavaImageProcessorPil"],
        }
        contexts.enter_context(
            patch.multiple(
                pipelines,
                TRANSFORMERS_TINY_MODEL_PATH=folder,
                tiny_model_summary={name: parts},
                pipeline_test_mapping={TASK: {"test": f"{__name__}.{ImageTextToText.__name__}"}},
            )
        )
        processors = {model_type: AnyLlavaProcessor.__name__}
        contexts.enter_context(patch.dict(pipelines.PROCESSOR_MAPPING_NAMES, processors))
