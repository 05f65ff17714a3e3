"""transformers' common tests of configurations and models, on LLaVAs of three kinds."""

import unittest

import torch

from modeling_llava import AnyLlavaConfig, AnyLlavaForConditionalGeneration, AnyLlavaModel
from tests.tiny import PATCH_SIZE, PINPOINTS, TILE_SIZE, VOCAB_SIZE, random_images, text_ids, tiny_config
from tests.transformers_suite.upstream import configuration, modeling

IMAGE_TOKEN_ID = 3
"""Inside the vocabulary, and where tests that shrink it leave it: some pass embeddings of image tokens, not ids."""


class ModelTester:
    """What the mixins ask about the model under test."""

    # A smaller batch would be filled up with images that have no tokens.
    batch_size = 7
    image_size = TILE_SIZE
    patch_size = PATCH_SIZE
    is_training = True

    def __init__(self, **overrides) -> None:
        self.overrides = {"image_token_id": IMAGE_TOKEN_ID} | overrides
        config, inputs = self.prepare_config_and_inputs_for_common()
        self.hidden_size = config.text_config.hidden_size
        self.num_hidden_layers = config.text_config.num_hidden_layers
        self.num_attention_heads = config.text_config.num_attention_heads
        self.seq_length = self.encoder_seq_length = inputs["input_ids"].shape[1]

    def get_config(self) -> AnyLlavaConfig:
        return tiny_config(**self.overrides)

    def prepare_config_and_inputs_for_common(self) -> tuple[AnyLlavaConfig, dict[str, torch.Tensor]]:
        config = self.get_config()
        inputs = {"pixel_values": random_images(self.batch_size)}
        if config.image_grid_pinpoints is not None:
            inputs["pixel_values"] = random_images(self.batch_size, num_tiles=5)
            inputs["image_sizes"] = torch.tensor([[40, 60]]).repeat(self.batch_size, 1)
        layouts = AnyLlavaModel(self.get_config()).plan_images(**inputs)
        rows = []
        for row, layout in enumerate(layouts):
            text = [max(id, IMAGE_TOKEN_ID + 1) for id in text_ids(7, seed=row)]
            rows.append([1, *[config.image_token_id] * layout.num_tokens, *text])
        inputs["input_ids"] = torch.tensor(rows)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        return config, inputs


class OneTileModelTest(modeling.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (AnyLlavaModel, AnyLlavaForConditionalGeneration)
    additional_model_inputs = ("pixel_values", "image_sizes")
    _is_composite = True
    overrides = {}

    def setUp(self) -> None:
        overrides = self.overrides
        if "rope_scaling" in self._testMethodName:
            # Runs on random ids, none of which may mean an image.
            overrides = overrides | {"image_token_id": VOCAB_SIZE}
        self.model_tester = ModelTester(**overrides)
        self.config_tester = configuration.ConfigTester(self, config_class=AnyLlavaConfig, has_text_modality=False)

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    @unittest.skip("the source distribution has no GenerationTesterMixin; tests/modeling_llava/test_generation.py")
    def test_generation_tester_mixin_inheritance(self) -> None:
        pass

    def test_reverse_loading_mapping(self) -> None:
        # Weights are saved under the names that they have in the model.
        super().test_reverse_loading_mapping(check_keys_were_modified=False)

    def _image_features_get_expected_num_attentions(self, model_tester=None) -> int:
        # The tower is pruned after the layer that is used.
        return max(self.model_tester.get_config().vision_feature_layers)


class TiledModelTest(OneTileModelTest):
    overrides = {"patch_merge_type": "spatial_unpad", "image_grid_pinpoints": PINPOINTS}
    # One of them asks for one row of tower output per image; here there is one per tile.
    skip_test_image_features_output_shape = True


class SeveralLayersModelTest(OneTileModelTest):
    """Every other choice at once: registers, a class token, features of two layers, tied embeddings."""

    overrides = {
        "vision": "dinov2_with_registers",
        "text": "qwen3",
        "vision_feature_layer": [-1, -3],
        "vision_feature_select_strategy": "cls_patch",
        "projector_type": "linear",
    }
    # Off by default for classes without a year; CLIP and SigLIP towers fail it in every class outside transformers.
    test_can_init_all_missing_weights_before_2023 = True
