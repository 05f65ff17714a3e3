"""Three ways to load what was exported, two of them in a Python that cannot import this package."""

import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

from modeling_llava import AnyLlavaForConditionalGeneration
from modeling_llava.cli import main
from modeling_llava.export.model_repository import SEAMS, collect_modules
from tests.modeling_llava.export.conftest import run_python
from tests.tiny import PINPOINTS, save_tiny_checkpoint, tiny_model, tiny_processor

pytestmark = pytest.mark.slow

FACTS = ["--license", "mit", "--base-model", "someone/vicuna"]
LOAD = """
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

question = [{{"role": "user", "content": [
    {{"type": "image", "image": Image.open("photo.png")}}, {{"type": "text", "text": "What is <image> in </s> this?"}},
]}}]


def answer(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder, **{trust}).eval()
    processor = AutoProcessor.from_pretrained(folder, **{trust})
    inputs = processor.apply_chat_template(
        {question}, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        return model, processor, {{"input_ids": inputs["input_ids"], "logits": model(**inputs).logits}}
"""
PLAIN_QUESTION = """[{"role": "user", "content": [{"type": "image", "image": Image.open("photo.png")}, \
{"type": "text", "text": "What is this?"}]}]"""


def write_photo(folder: Path) -> Path:
    levels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    PIL.Image.fromarray(levels).save(folder / "photo.png")
    return folder / "photo.png"


def expected_answer(folder: Path, photo: Path, text: str) -> dict[str, torch.Tensor]:
    """What the model computes with this package, before it is exported."""
    model = AnyLlavaForConditionalGeneration.from_pretrained(folder).eval()
    content = [{"type": "image", "image": PIL.Image.open(photo)}, {"type": "text", "text": text}]
    inputs = AutoProcessor.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        return {"input_ids": inputs["input_ids"], "logits": model(**inputs).logits}


@pytest.fixture(scope="module")
def only_ours(tmp_path_factory) -> Path:
    """A model that transformers' classes cannot express, exported: folder of model, export and photo."""
    folder = tmp_path_factory.mktemp("only_ours")
    save_tiny_checkpoint(folder / "model", vision="dinov2", projector_type="linear")
    write_photo(folder)
    assert main(["export", str(folder / "model"), "--out", str(folder / "out"), *FACTS]) == 0
    return folder


@pytest.mark.core
def test_with_the_code_of_the_repository(only_ours):
    code = LOAD.format(trust={"trust_remote_code": True}, question="question") + (
        """
model, processor, found = answer("out")
torch.save(found, "found.pt")
model.save_pretrained("saved_again")
processor.save_pretrained("saved_again")
torch.save(answer("saved_again")[2], "found_again.pt")
pipe = pipeline("image-text-to-text", model="out", trust_remote_code=True)
print(type(model).__module__)
print(ascii(pipe(text=question, max_new_tokens=8, return_full_text=False)[0]["generated_text"]))
"""
    )
    module, answer = run_python(code, only_ours).splitlines()
    assert module.startswith("transformers_modules.out.")
    text = "What is <image> in </s> this?"
    content = [{"type": "image", "image": PIL.Image.open(only_ours / "photo.png")}, {"type": "text", "text": text}]
    pipe = pipeline("image-text-to-text", model=str(only_ours / "model"))
    (expected,) = pipe(text=[{"role": "user", "content": content}], max_new_tokens=8, return_full_text=False)
    assert len(expected["generated_text"]) > 3
    assert answer == ascii(expected["generated_text"])
    expected = expected_answer(only_ours / "model", only_ours / "photo.png", text)
    for name in ("found.pt", "found_again.pt"):
        found = torch.load(only_ours / name)
        assert torch.equal(found["input_ids"], expected["input_ids"])
        assert torch.equal(found["logits"], expected["logits"])
    code_files = {path.name for path in (only_ours / "out").glob("*.py")}
    assert {path.name for path in (only_ours / "saved_again").glob("*.py")} == code_files


def test_a_model_with_fewer_image_tokens_brings_the_code_that_chooses_them(tmp_path, capsys):
    save_tiny_checkpoint(tmp_path / "model", visual_tokens=5)
    tiny_processor(visual_tokens=5).save_pretrained(tmp_path / "model")
    photo = write_photo(tmp_path)
    export = ["export", str(tmp_path / "model"), "--out", str(tmp_path / "out"), *FACTS]
    assert main([*export, "--layout", "transformers"]) != 0
    assert "got visual_tokens=5, which the layout 'transformers' cannot express" in capsys.readouterr().err
    assert main(export) == 0
    code = LOAD.format(trust={"trust_remote_code": True}, question=PLAIN_QUESTION)
    run_python(code + 'torch.save(answer("out")[2], "found.pt")', tmp_path)
    expected = expected_answer(tmp_path / "model", photo, "What is this?")
    found = torch.load(tmp_path / "found.pt")
    assert torch.equal(found["input_ids"], expected["input_ids"])
    assert torch.equal(found["logits"], expected["logits"])


def test_the_code_is_flat_small_and_says_its_version(only_ours):
    files = sorted((only_ours / "out").glob("*.py"))
    assert {path.stem for path in files} == collect_modules().keys()
    # 183,000 for transformers 5.23 alone; a range of versions took 25,000, bounds of templates and pictures 40,000.
    assert sum(path.stat().st_size for path in files) < 260_000
    for path in files:
        first, text = path.read_text().split("\n", 1)
        assert re.fullmatch(r"# AnyLLaVA \d+\.\d+\.\d+, Apache-2.0; .*", first), path.name
        assert not re.search(r"^\s*(?:from|import) (?:modeling_llava|processing_llava)", text, flags=re.MULTILINE)
    for seam in SEAMS:
        assert "def " not in (only_ours / "out" / f"{seam}.py").read_text()


def test_with_this_package(only_ours):
    """No code of the repository runs, which would be another module."""
    code = LOAD.format(trust={}, question=PLAIN_QUESTION) + (
        """
model, processor, found = answer("out")
torch.save(found, "found_by_package.pt")
print(type(model).__module__)
"""
    )
    printed = run_python("import modeling_llava\n" + code, only_ours, blocked=False)
    assert printed == "modeling_llava.modeling_llava\n"
    expected = expected_answer(only_ours / "model", only_ours / "photo.png", "What is this?")
    found = torch.load(only_ours / "found_by_package.pt")
    assert torch.equal(found["input_ids"], expected["input_ids"])
    assert torch.equal(found["logits"], expected["logits"])


def test_without_code_only_this_package_loads_it(only_ours, tmp_path):
    out = tmp_path / "out"
    assert main(["export", str(only_ours / "model"), "--out", str(out), "--no-with-code", *FACTS]) == 0
    assert not list(out.glob("*.py"))
    assert type(AutoModelForImageTextToText.from_pretrained(out)) is AnyLlavaForConditionalGeneration


def test_with_plain_transformers(tmp_path):
    save_tiny_checkpoint(tmp_path / "model")
    photo = write_photo(tmp_path)
    assert main(["export", str(tmp_path / "model"), "--out", str(tmp_path / "out"), *FACTS]) == 0
    code = LOAD.format(trust={}, question=PLAIN_QUESTION) + (
        """
model, processor, found = answer("out")
torch.save(found, "found.pt")
print(type(model).__name__, type(processor).__name__, type(processor.image_processor).__name__)
"""
    )
    card = (tmp_path / "out" / "README.md").read_text()
    snippet = re.search(r"```python\n(.*?)```", card, flags=re.DOTALL).group(1)
    printed = run_python(code + snippet, tmp_path)
    assert printed.splitlines()[0] == "LlavaForConditionalGeneration LlavaProcessor LlavaImageProcessorPil"
    expected = expected_answer(tmp_path / "model", photo, "What is this?")
    found = torch.load(tmp_path / "found.pt")
    assert torch.equal(found["input_ids"], expected["input_ids"])
    vocab_size = expected["logits"].shape[-1]
    torch.testing.assert_close(found["logits"][..., :vocab_size], expected["logits"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "model_settings, processor_settings, image_processor",
    [
        ({}, {"image_aspect_ratio": "square"}, "CLIPImageProcessorPil"),
        ({"vision_feature_select_strategy": "cls_patch"}, {"num_prefix_tokens": 1}, "LlavaImageProcessorPil"),
        (
            {"patch_merge_type": "spatial_unpad", "image_grid_pinpoints": PINPOINTS},
            {"patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres", "image_grid_pinpoints": PINPOINTS},
            "LlavaNextImageProcessorPil",
        ),
    ],
)
def test_every_picture_mode_of_transformers(tmp_path, model_settings, processor_settings, image_processor):
    """The processor of the exported folder makes the same inputs as ours, and the same logits come out."""
    processor = tiny_processor(**processor_settings)
    tiny_model(image_token_id=processor.image_token_id, **model_settings).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    photo = write_photo(tmp_path)
    assert main(["export", str(tmp_path / "model"), "--out", str(tmp_path / "out"), *FACTS]) == 0
    expected = expected_answer(tmp_path / "model", photo, "What is this?")
    theirs = AutoProcessor.from_pretrained(tmp_path / "out")
    assert type(theirs.image_processor).__name__ == image_processor
    content = [{"type": "image", "image": PIL.Image.open(photo)}, {"type": "text", "text": "What is this?"}]
    inputs = theirs.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    with torch.no_grad():
        logits = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()(**inputs).logits
    torch.testing.assert_close(logits[..., : expected["logits"].shape[-1]], expected["logits"], rtol=1e-5, atol=1e-5)


TEXT_LAYER = [
    "input_layernorm.weight",
    "mlp.down_proj.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "post_attention_layernorm.weight",
    *(f"self_attn.{name}_proj.weight" for name in "kqvo"),
]
VISION_LAYER = [
    f"{name}.{kind}"
    for name in ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2", *(f"self_attn.{letter}_proj" for letter in "kqv"))
    for kind in ("weight", "bias")
] + ["self_attn.out_proj.weight", "self_attn.out_proj.bias"]
PUBLISHED_KEYS = [
    "language_model.lm_head.weight",
    "language_model.model.embed_tokens.weight",
    "language_model.model.norm.weight",
    *(f"language_model.model.layers.{layer}.{name}" for layer in range(2) for name in TEXT_LAYER),
    *(f"multi_modal_projector.linear_{layer}.{kind}" for layer in (1, 2) for kind in ("weight", "bias")),
    "vision_tower.vision_model.embeddings.class_embedding",
    "vision_tower.vision_model.embeddings.patch_embedding.weight",
    "vision_tower.vision_model.embeddings.position_embedding.weight",
    *(f"vision_tower.vision_model.encoder.layers.{layer}.{name}" for layer in range(3) for name in VISION_LAYER),
    *(
        f"vision_tower.vision_model.{name}.{kind}"
        for name in ("pre_layrnorm", "post_layernorm")
        for kind in ("weight", "bias")
    ),
]
"""Names of llava-hf/llava-1.5-7b-hf, for a model of two text and four vision layers, of which three are used."""
PUBLISHED_NEXT_KEYS = [*PUBLISHED_KEYS, "image_newline"]
"""Names of llava-hf/llava-v1.6-vicuna-7b-hf."""
PUBLISHED_SIGLIP_KEYS = [
    key for key in PUBLISHED_KEYS if "class_embedding" not in key and "pre_layrnorm" not in key
] + ["vision_tower.vision_model.embeddings.patch_embedding.bias"]
"""Names of llava-hf/llava-interleave-qwen-0.5b-hf, with another language model."""


@pytest.mark.parametrize(
    "model_settings, processor_settings, keys",
    [
        ({}, {}, PUBLISHED_KEYS),
        (
            {"patch_merge_type": "spatial_unpad", "image_grid_pinpoints": PINPOINTS},
            {"patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres", "image_grid_pinpoints": PINPOINTS},
            PUBLISHED_NEXT_KEYS,
        ),
        ({"vision": "siglip"}, {}, PUBLISHED_SIGLIP_KEYS),
    ],
    ids=["llava", "llava_next", "siglip"],
)
def test_the_names_of_weights_are_those_of_published_checkpoints(tmp_path, model_settings, processor_settings, keys):
    """vLLM, SGLang and MLX look for these; transformers 5 holds others in memory."""
    processor = tiny_processor(**processor_settings)
    tiny_model(image_token_id=processor.image_token_id, **model_settings).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), "--out", str(tmp_path / "out"), *FACTS]) == 0
    assert sorted(load_file(tmp_path / "out" / "model.safetensors")) == sorted(keys)
