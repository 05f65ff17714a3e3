"""Checkpoints in every layout of the original LLaVA, loaded as they are, against what the original computed.

The cases are whatever lies in the folder of reference outputs, so that more of them need no change here.
"""

import json
from pathlib import Path

import PIL.Image
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor

from modeling_llava import AutoModelForVision2Seq
from processing_llava.data.collator import LlavaDataCollator
from tests.conftest import SHARED_GOLDENS
from tests.processing_llava.golden_prompts import golden_messages

pytestmark = pytest.mark.core

CASES = sorted(path.parent.name for path in SHARED_GOLDENS.glob("*/checkpoint")) or ["v1.5-vicuna"]
ADAPTER_CASES = sorted(path.parent.name for path in SHARED_GOLDENS.glob("*/adapter")) or ["v1.5-lora"]
ORIGINAL_IMAGE_ID = -200
NUM_GREEDY_TOKENS = 8
LOGIT_TOLERANCE = 1e-4


def collapse_images(ids: list[int], image_token_id: int) -> list[int]:
    """The ids as the original writes them: one -200 for each image. No golden has two images side by side."""
    collapsed: list[int] = []
    for token in ids:
        if token != image_token_id:
            collapsed.append(token)
        elif collapsed[-1:] != [ORIGINAL_IMAGE_ID]:
            collapsed.append(ORIGINAL_IMAGE_ID)
    return collapsed


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def encode(processor, folder: Path, sample: dict) -> dict[str, torch.Tensor]:
    image = PIL.Image.open(folder.parent / "images" / sample["image"])
    return processor(images=[image], text=sample["prompt"], return_tensors="pt")


def run(model, inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and input embeddings of one prompt."""
    seen = {}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    with torch.no_grad():
        logits = model(**inputs).logits[0]
    hook.remove()
    return logits, seen["inputs_embeds"][0]


def generate_greedily(model, inputs) -> list[int]:
    tokens = model.generate(
        **inputs, max_new_tokens=NUM_GREEDY_TOKENS, min_new_tokens=NUM_GREEDY_TOKENS, do_sample=False
    )
    return tokens[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("case", CASES)
def test_checkpoint_computes_what_the_original_computed(shared_goldens, case):
    folder = shared_goldens / case
    facts = json.loads((folder / "expected.json").read_text())
    expected = load_file(folder / "expected.safetensors")
    processor = AutoProcessor.from_pretrained(folder / "checkpoint", backend="pil")
    model = AutoModelForVision2Seq.from_pretrained(folder / "checkpoint", dtype=torch.float32)

    for index, sample in enumerate(facts["samples"]):
        inputs = encode(processor, folder, sample)
        ids = inputs["input_ids"][0].tolist()
        assert collapse_images(ids, processor.image_token_id) == expected[f"{index}.input_ids"].tolist()
        assert ids.count(processor.image_token_id) == sample["n_image_tokens"]
        logits, embeddings = run(model, inputs)
        expected_embeddings = expected[f"{index}.inputs_embeds"].float()
        assert relative_error(embeddings[:: sample["embeds_stride"]], expected_embeddings) < 1e-3  # stored in float16
        expected_logits = expected[f"{index}.last_logits"]
        found_logits = logits[-len(expected_logits) :, :: facts["logits_vocab_stride"]]
        assert relative_error(found_logits, expected_logits) < LOGIT_TOLERANCE
        # The first of the stored tokens stands for the prompt.
        greedy = expected[f"{index}.generated"].tolist()[1 : 1 + NUM_GREEDY_TOKENS]
        assert generate_greedily(model, inputs) == greedy


@pytest.fixture(params=ADAPTER_CASES)
def adapter_case(request, shared_goldens) -> tuple[Path, list[dict], dict[str, torch.Tensor]]:
    folder = shared_goldens / request.param
    return folder, json.loads((folder / "expected.json").read_text()), load_file(folder / "expected.safetensors")


def last_logits(model, inputs, expected: torch.Tensor) -> torch.Tensor:
    """The part of the logits that is stored."""
    logits, _ = run(model, inputs)
    stride = -(-logits.shape[-1] // expected.shape[-1])
    return logits[-len(expected) :, ::stride]


def test_projector_over_a_base(adapter_case):
    folder, samples, expected = adapter_case
    base = {"base_model": str(folder / "base-lm")}
    processor = AutoProcessor.from_pretrained(folder / "projector", backend="pil", **base)
    model = AutoModelForVision2Seq.from_pretrained(folder / "projector", dtype=torch.float32, **base)
    for index, sample in enumerate(samples):
        inputs = encode(processor, folder, sample)
        ids = collapse_images(inputs["input_ids"][0].tolist(), processor.image_token_id)
        assert ids == expected[f"projector.{index}.input_ids"].tolist()
        logits = expected[f"projector.{index}.last_logits"]
        assert relative_error(last_logits(model, inputs, logits), logits) < LOGIT_TOLERANCE


def test_lora_over_a_base(adapter_case):
    """Ids are equal. The stored logits were computed with the dropout of the LoRA (0.05) switched on.

    They are a sample, so they cannot be met. That they are one of ours shows thus: samples of our model in training
    mode lie about as far from our logits as the stored ones do, and farther from the stored ones, by the square root
    of two, as independent samples around one centre do. A wrong scale or a left-out module moves the centre.
    """
    folder, samples, expected = adapter_case
    processor = AutoProcessor.from_pretrained(folder / "adapter", backend="pil")
    model = AutoModelForVision2Seq.from_pretrained(folder / "adapter", dtype=torch.float32, merge_adapter=False)
    merged = AutoModelForVision2Seq.from_pretrained(folder / "adapter", dtype=torch.float32)
    has_dropout = json.loads((folder / "adapter" / "adapter_config.json").read_text())["lora_dropout"] > 0
    for index, sample in enumerate(samples):
        inputs = encode(processor, folder, sample)
        ids = collapse_images(inputs["input_ids"][0].tolist(), processor.image_token_id)
        assert ids == expected[f"lora.{index}.input_ids"].tolist()
        stored = expected[f"lora.{index}.last_logits"]
        ours = last_logits(merged, inputs, stored)
        assert relative_error(last_logits(model, inputs, stored), ours) < LOGIT_TOLERANCE
        error = relative_error(stored, ours)
        if error < LOGIT_TOLERANCE:
            continue
        assert has_dropout
        model.train()
        torch.manual_seed(index)
        sampled = [last_logits(model, inputs, stored) for _ in range(12)]
        model.eval()
        spread = sorted(relative_error(sample_logits, ours) for sample_logits in sampled)
        assert 0.7 * spread[0] < error < 1.2 * spread[-1]
        assert all(relative_error(sample_logits, stored) > error for sample_logits in sampled)


def test_training_step(shared_goldens):
    facts = json.loads((shared_goldens / "train_step.json").read_text())
    expected = load_file(shared_goldens / "train_step.safetensors")
    name = shared_goldens / facts["checkpoint"]
    processor = AutoProcessor.from_pretrained(name, backend="pil", template=facts["template"])
    model = AutoModelForVision2Seq.from_pretrained(name, dtype=torch.float32)
    rows = [
        {
            "id": image,
            "images": [shared_goldens / "images" / image],
            "messages": golden_messages(turns, num_images=1, is_open=False),
        }
        for turns, image in enumerate(facts["images"], start=1)
    ]
    batch = LlavaDataCollator(processor)(rows)
    for row, (ids, labels) in enumerate(zip(expected["input_ids"].tolist(), expected["labels"].tolist())):
        length = int(batch["attention_mask"][row].sum())
        found = collapse_images(batch["input_ids"][row, :length].tolist(), processor.image_token_id)
        assert found == ids[: len(found)]
        assert [label for label in batch["labels"][row].tolist() if label != -100] == [
            label for label in labels if label != -100
        ]

    loss = model(**batch).loss
    assert loss.item() == pytest.approx(expected["loss"].item(), rel=1e-5)
    loss.backward()
    for name, parameter in model.model.mm_projector.named_parameters():
        assert relative_error(parameter.grad, expected[f"grad.{name}"]) < LOGIT_TOLERANCE
