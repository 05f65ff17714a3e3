"""transformers' common tests of processors and image processors."""

import unittest

import pytest

from processing_llava import AnyLlavaImageProcessor, AnyLlavaImageProcessorPil, AnyLlavaProcessor
from processing_llava.templates import load_template
from tests.tiny import PATCH_SIZE, TILE_SIZE, tiny_processor, tiny_tokenizer
from tests.transformers_suite.upstream import image_processing, processing

# transformers leaves the files of further chat templates open.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file .*additional_chat_templates:ResourceWarning")

PINPOINTS = [[TILE_SIZE, 2 * TILE_SIZE], [2 * TILE_SIZE, TILE_SIZE]]
"""Every image has three tiles."""


class OneTileProcessorTest(processing.ProcessorTesterMixin, unittest.TestCase):
    processor_class = AnyLlavaProcessor
    overrides = {}

    @classmethod
    def _setup_tokenizer(cls):
        return tiny_tokenizer()

    @classmethod
    def _setup_image_processor(cls):
        return tiny_processor(**cls.overrides).image_processor

    @staticmethod
    def prepare_processor_dict() -> dict:
        return {"chat_template": load_template("vicuna_v1"), "patch_size": PATCH_SIZE}

    def test_if_input_has_mismatching_tokens_and_mm_data(self) -> None:
        # The refusal that transformers' test asks for, in our words.
        images, text = self.prepare_images_inputs(4, nested=True), self.prepare_text_inputs(3, modalities="image")
        with self.assertRaisesRegex(ValueError, "got 4 lists of images for 3 prompts"):
            self.get_processor()(images=images, text=text)


class TiledProcessorTest(OneTileProcessorTest):
    overrides = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": PINPOINTS}

    @staticmethod
    def prepare_processor_dict() -> dict:
        return OneTileProcessorTest.prepare_processor_dict() | {"patch_merge_type": "spatial_unpad"}


class OneTileImageProcessorTester(image_processing.ImageProcessingTester):
    def __init__(self, parent, **kwargs) -> None:
        crop_size = {"height": TILE_SIZE, "width": TILE_SIZE}
        super().__init__(parent, size={"shortest_edge": TILE_SIZE}, crop_size=crop_size, **kwargs)

    def _get_image_processing_classes(self) -> dict:
        return {"pil": AnyLlavaImageProcessorPil, "torch": AnyLlavaImageProcessor}


class TiledImageProcessorTester(OneTileImageProcessorTester):
    def __init__(self, parent) -> None:
        super().__init__(parent, image_aspect_ratio="anyres", image_grid_pinpoints=PINPOINTS)

    def expected_output_image_shape(self, images: list) -> tuple[int, ...]:
        return 3, *super().expected_output_image_shape(images)


class OneTileImageProcessorTest(image_processing.ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = OneTileImageProcessorTester
    test_cast_dtype = True

    @unittest.skip("Pillow alone, by design: the project runs where torchvision cannot be installed")
    def test_new_models_require_torchvision_backend(self) -> None:
        pass

    def test_call_numpy_4_channels(self) -> None:
        # Vision towers take three channels; a fourth is converted, or refused.
        with self.assertRaisesRegex(ValueError, "expected three numbers, one per channel"):
            super().test_call_numpy_4_channels()


class TiledImageProcessorTest(OneTileImageProcessorTest):
    image_processor_tester_class = TiledImageProcessorTester
