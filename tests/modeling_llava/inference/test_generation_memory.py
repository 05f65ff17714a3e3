import json
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import DynamicCache

from modeling_llava import AnyLlavaConfig, AnyLlavaForConditionalGeneration
from modeling_llava.cli import main
from modeling_llava.inference.generation_memory import (
    _LiveBytes,
    predict_generation,
    read_config,
)
from modeling_llava.inference.loading import choose_dtype
from tests.conftest import ROOT
from tests.tiny import (
    IMAGE_TOKEN_ID,
    PINPOINTS,
    TEXT_CONFIGS,
    TILE_SIZE,
    random_images,
    save_tiny_checkpoint,
    text_ids,
    tiny_config,
    tiny_model,
)

NUM_TEXT_TOKENS, NUM_NEW_TOKENS = 40, 100


def predict(config, **overrides):
    lengths = {"num_text_tokens": NUM_TEXT_TOKENS, "num_new_tokens": NUM_NEW_TOKENS}
    return predict_generation(config, dtype=torch.float32, **lengths | overrides)


def generate(model, *, num_rows: int, images: dict) -> DynamicCache:
    """Answer in rows of one image each; returns the cache, as long as it became."""
    num_image_tokens = model.model.plan_images(**images)[0].num_tokens
    rows = [[IMAGE_TOKEN_ID] * num_image_tokens + text_ids(NUM_TEXT_TOKENS, seed=row) for row in range(num_rows)]
    input_ids = torch.tensor(rows)
    cache = DynamicCache(config=model.config.text_config)
    model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        past_key_values=cache,
        max_new_tokens=NUM_NEW_TOKENS,
        min_new_tokens=NUM_NEW_TOKENS,
        do_sample=False,
        # MPT does not by default.
        use_cache=True,
        **images,
    )
    return cache


@pytest.mark.parametrize("text", TEXT_CONFIGS)
def test_weights_and_cache_are_those_of_the_model(text):
    model = tiny_model(text)
    cache = generate(model, num_rows=2, images={"pixel_values": random_images(2)})
    predicted = predict(model.config, num_rows=2)
    assert predicted.weights == sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert predicted.cache == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def measure_peak(*, num_rows: int = 1, num_tiles: int | None = None, **overrides) -> tuple[int, AnyLlavaConfig]:
    """Bytes of real tensors beside the weights while a model really generates, and its configuration."""
    with _LiveBytes() as live:
        model = tiny_model(**overrides)
        live.peak = num_weights = live.current
        images = {"pixel_values": random_images(num_rows, num_tiles=num_tiles)}
        if num_tiles is not None:
            images["image_sizes"] = torch.tensor([[2 * TILE_SIZE, 2 * TILE_SIZE]])
        generate(model, num_rows=num_rows, images=images)
    return live.peak - num_weights, model.config


@pytest.mark.parametrize("num_rows", [1, 4])
@pytest.mark.parametrize("vision", ["clip", "siglip", "dinov2"])
def test_activations_are_those_of_generating(vision, num_rows):
    peak, config = measure_peak(vision=vision, num_rows=num_rows)
    predicted = predict(config, num_rows=num_rows)
    assert peak == pytest.approx(predicted.cache + predicted.activations, rel=0.1)


def test_a_tiled_image_takes_what_its_largest_grid_takes():
    peak, config = measure_peak(num_tiles=5, image_grid_pinpoints=PINPOINTS, patch_merge_type="spatial_unpad")
    predicted = predict(config)
    assert peak == pytest.approx(predicted.cache + predicted.activations, rel=0.1)


def test_choosing_visual_tokens_takes_what_its_products_take():
    tiled = {"image_grid_pinpoints": PINPOINTS, "patch_merge_type": "spatial_unpad", "visual_tokens": 4}
    peak, config = measure_peak(num_tiles=5, **tiled)
    predicted = predict(config)
    assert peak == pytest.approx(predicted.cache + predicted.activations, rel=0.1)


def test_fewer_visual_tokens_take_a_smaller_cache():
    all_tokens, four_tokens = predict(tiny_config()), predict(tiny_config(visual_tokens=4))
    assert four_tokens.num_prompt_tokens == NUM_TEXT_TOKENS + 4
    assert four_tokens.cache < all_tokens.cache


def test_without_images_the_prompt_is_text():
    predicted = predict(tiny_config(), num_images=0)
    assert predicted.num_prompt_tokens == NUM_TEXT_TOKENS


def test_half_as_many_bits_take_half_the_memory():
    config = tiny_config()
    full, half = predict(config), predict_generation(config, dtype=torch.bfloat16)
    assert half.weights == pytest.approx(full.weights / 2, rel=0.01)


def test_numbers_that_are_too_small_are_refused():
    with pytest.raises(ValueError, match="got num_rows=0; expected at least 1"):
        predict(tiny_config(), num_rows=0)


def test_a_configuration_is_read_in_any_layout(tmp_path):
    model = tiny_model()
    for layout in ("any_llava", "transformers"):
        model.save_pretrained(tmp_path / layout, layout=layout)
        assert predict(read_config(str(tmp_path / layout))).cache == predict(model.config).cache


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(OSError, match="there is no config.json in"):
        read_config(str(tmp_path))


def test_a_cpu_computes_float16_as_float32():
    config = tiny_config()
    config.dtype = torch.float16
    assert choose_dtype(config, torch.device("cpu")) == torch.float32
    assert choose_dtype(config, torch.device("cuda")) == torch.float16


def test_doctor_prints_what_a_model_takes(tmp_path, capsys):
    checkpoint = str(save_tiny_checkpoint(tmp_path))
    assert main(["doctor", "--model", checkpoint, "--images", "2", "--new-tokens", "8", "--rows", "3"]) == 0
    printed = capsys.readouterr().out
    assert f"{checkpoint}, 3 x {64 + 2 * 16} tokens with 2 images, answers of 8 tokens:" in printed
    assert "it fits" in printed
    options = ["--quantization", "int8", "--visual-tokens", "4"]
    assert main(["doctor", "--model", checkpoint, *options]) == 0
    printed = capsys.readouterr().out
    assert f"{checkpoint}, 1 x {64 + 4} tokens" in printed
    assert "weights in int8 and float32" in printed
    assert "a conversation that goes on keeps up to" in printed
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": checkpoint}))
    assert main(["doctor", "--model", str(adapter)]) == 0
    assert "it fits" in capsys.readouterr().out
    for options, reason in (
        (["--quantization", "int4"], "got quantization='int4' on cpu; expected int8"),
        (["--images", "50"], "expected fewer than 512"),
    ):
        assert main(["doctor", "--model", checkpoint, *options]) == 0
        printed = capsys.readouterr().out
        assert "it does not run: " in printed and reason in printed
        assert "it fits" not in printed
    assert main(["doctor", "--model", checkpoint, "--quantization", "int3"]) == 2
    assert "expected one of int8, fp8, int4, nf4" in capsys.readouterr().err


@pytest.mark.slow
def test_the_peak_of_a_process_is_the_predicted_one():
    from benchmarks.memory import measure

    rows = measure("cpu", "mid", 1)
    for row in rows:
        assert row["ours"] == pytest.approx(row["predicted"], rel=0.1), row
    assert rows[0]["ours"] <= 1.05 * rows[0]["weights_and_cache"]


LOAD = """
import json, sys
import torch
from benchmarks.peak_memory import read_peak, start_peak
from modeling_llava import AnyLlavaForConditionalGeneration
from modeling_llava.inference.generation_memory import predict_loading, read_config
from modeling_llava.inference.loading import prepare_for_answering

folder, settings = sys.argv[1], json.loads(sys.argv[2])
dtype = getattr(torch, settings.get("dtype", "float32"))
predicted = predict_loading(
    read_config(folder), dtype=dtype, quantization=settings.get("quantization"), num_threads=torch.get_num_threads()
)
before = start_peak("cpu")
model = AnyLlavaForConditionalGeneration.from_pretrained(folder, **settings)
prepare_for_answering(model)
print(json.dumps([read_peak("cpu") - before, predicted]))
"""


@pytest.fixture(scope="module")
def half_precision_folders(tmp_path_factory):
    """A billion parameters in float16, in two layouts."""
    from benchmarks.small_machine import write_checkpoint

    folder = tmp_path_factory.mktemp("folders")
    (folder / "original").mkdir()
    write_checkpoint(folder / "original", "mid")
    model = AnyLlavaForConditionalGeneration.from_pretrained(folder / "original", dtype="auto")
    model.save_pretrained(folder / "any_llava", layout="any_llava")
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "settings"),
    [
        ("original", {"dtype": "float32"}),
        ("original", {"dtype": "bfloat16"}),
        ("original", {"quantization": "int8"}),
        # transformers converts our own layout: pages of its files count to the process, until the kernel wants them.
        ("any_llava", {"quantization": "int8"}),
    ],
    ids=str,
)
def test_the_peak_of_loading_is_the_predicted_one(half_precision_folders, layout, settings):
    """Mapped files included: weights are converted as they are read."""
    arguments = [sys.executable, "-c", LOAD, str(half_precision_folders / layout), json.dumps(settings)]
    result = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, check=True)
    measured, predicted = json.loads(result.stdout.splitlines()[-1])
    assert measured == pytest.approx(predicted, rel=0.1)
