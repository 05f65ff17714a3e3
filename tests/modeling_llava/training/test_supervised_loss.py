"""The loss over supervised positions is that over all logits, whatever the batch, and holds few logits at a time."""

import pytest
import torch
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, MixtralConfig
from trl import SFTConfig

from modeling_llava import AnyLlavaConfig, AnyLlavaForConditionalGeneration
from modeling_llava.acceleration.packed_attention import use_packed_attention
from modeling_llava.training import supervised_loss
from modeling_llava.training.recipe import Recipe
from modeling_llava.training.starting_model import add_lora, freeze_all_but, part_of
from modeling_llava.training.trainer import LlavaTrainer
from processing_llava.data.collator import LlavaDataCollator
from processing_llava.data.data_sources import DataSource
from tests.modeling_llava.acceleration.test_packed_attention import make_rows, pack
from tests.tiny import (
    PINPOINTS,
    VISION_CONFIGS,
    VOCAB_SIZE,
    batch,
    random_images,
    text_ids,
    tiny_model,
    tiny_processor,
)

ONE_LAYER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}


def build_trainer(model, folder, *, stage="finetune", **settings) -> LlavaTrainer:
    settings = {"use_cpu": True, "bf16": False, "report_to": "none", "remove_unused_columns": False} | settings
    processor = tiny_processor()
    row = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
    return LlavaTrainer(
        model,
        SFTConfig(str(folder), max_length=None, **settings),
        recipe=Recipe(stage=stage, model="m", data=[DataSource(path="d")], output_dir=str(folder)),
        train_dataset=Dataset.from_list([{"messages": row}]),
        data_collator=LlavaDataCollator(processor),
        processing_class=processor,
    )


def padded_batch() -> dict[str, torch.Tensor]:
    inputs = batch([text_ids(12), text_ids(9, seed=1), text_ids(3, seed=2)])
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[0, 4:6] = inputs["input_ids"][0, 4:6]
    labels[1, 8] = inputs["input_ids"][1, 8]
    # Nothing predicts the first token.
    labels[2, :3] = inputs["input_ids"][2, :3]
    return inputs | {"labels": labels}


def make_case(name: str) -> tuple:
    """A model, a batch and a stage."""
    if name == "padded":
        return tiny_model(text="phi"), padded_batch(), "finetune"
    if name == "packed":
        model = tiny_model()
        use_packed_attention(model)
        return model, pack(make_rows()) | {"pixel_values": random_images(3)}, "finetune"
    settings = {"r": 2, "lora_alpha": 2, "lora_dropout": 0.0, "init_lora_weights": False}
    settings["modules_to_save"] = ["lm_head"]
    return add_lora(tiny_model(), settings, trained_parts=("mm_projector",)), padded_batch(), "lora"


def plain_loss(model, inputs: dict) -> torch.Tensor:
    logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())


@pytest.mark.parametrize("chunk_size", [1, 2, 1000])
@pytest.mark.parametrize("case", ["padded", "packed", "lora"])
def test_loss_and_gradients_are_those_of_all_logits(tmp_path, monkeypatch, case, chunk_size):
    monkeypatch.setattr(supervised_loss, "MAX_LOGITS", chunk_size * VOCAB_SIZE)
    model, inputs, stage = make_case(case)
    trainer = build_trainer(model, tmp_path, stage=stage)
    results = []
    for compute in (lambda: plain_loss(model, inputs), lambda: trainer.compute_loss(model, dict(inputs))):
        model.zero_grad()
        loss = compute()
        loss.backward()
        # What only pictures reach has a gradient of zero in a batch without any, and in plain PyTorch none.
        trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        gradients = {
            name: torch.zeros_like(value) if value.grad is None else value.grad for name, value in trained.items()
        }
        results.append((loss.detach(), gradients))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_the_number_of_tokens_of_all_processes_and_batches_counts(tmp_path):
    model = tiny_model()
    trainer = build_trainer(model, tmp_path)
    num_supervised = 5
    alone = trainer.compute_loss(model, padded_batch())
    shared = trainer.compute_loss(model, padded_batch(), num_items_in_batch=torch.tensor(20))
    torch.testing.assert_close(shared, alone * num_supervised / 20)


def test_a_batch_without_a_supervised_token_trains_nothing(tmp_path):
    model = tiny_model()
    inputs = padded_batch()
    inputs["labels"].fill_(-100)
    loss = build_trainer(model, tmp_path).compute_loss(model, inputs)
    loss.backward()
    assert loss == 0
    assert all(not value.grad.any() for value in model.parameters() if value.grad is not None)


PROJECTOR, TOWER_AND_TEXT = ("mm_projector", "image_newline"), r".*(vision_tower|language_model).*q_proj"
WHAT_TRAINS = {
    "align": PROJECTOR,
    "tower": (*PROJECTOR, "vision_tower"),
    "tower alone": ("vision_tower",),
    "finetune": (*PROJECTOR, "language_model", "lm_head"),
    "lora": {},
    "lora on the tower": {"target_modules": TOWER_AND_TEXT},
    "lora on the tower alone": {"target_modules": TOWER_AND_TEXT.replace("|language_model", "")},
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("is_tiled", [False, True])
@pytest.mark.parametrize("case", WHAT_TRAINS)
def test_a_batch_of_texts_has_a_gradient_of_zero_for_what_pictures_reach(tmp_path, case, is_tiled, checkpointing):
    """And the loss that it has without."""
    tiles = {"image_grid_pinpoints": PINPOINTS, "patch_merge_type": "spatial_unpad"} if is_tiled else {}
    model, stage, parts = tiny_model(**tiles), "finetune", WHAT_TRAINS[case]
    if isinstance(parts, dict):
        settings = {"r": 2, "lora_alpha": 2, "lora_dropout": 0.0, "init_lora_weights": False} | parts
        model, stage = add_lora(model, settings, trained_parts=PROJECTOR if is_tiled else PROJECTOR[:1]), "lora"
    else:
        freeze_all_but(model, parts)
    inputs = padded_batch()
    trainer = build_trainer(model, tmp_path, stage=stage, activation_checkpointing=checkpointing)
    loss = trainer.compute_loss(model, dict(inputs))
    loss.backward()
    with torch.no_grad():
        torch.testing.assert_close(loss.detach(), plain_loss(model, inputs))
    of_pictures = [
        (name, value.grad)
        for name, value in model.named_parameters()
        if value.requires_grad and part_of(name) not in ("language_model", "lm_head")
    ]
    # What follows the layer whose features are taken is reached by nothing.
    reached = [(name, grad) for name, grad in of_pictures if grad is not None]
    assert {part_of(name) for name, _ in reached} == {part_of(name) for name, _ in of_pictures} != set()
    assert all(not gradient.any() for _, gradient in reached)


class LargestTensor(TorchDispatchMode):
    """Takes note of how many numbers the largest tensor had that was computed."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.size = max(self.size, leaf.numel())
        return result


def test_memory_does_not_grow_with_vocabulary_times_tokens(tmp_path, monkeypatch):
    max_logits, num_tokens = 2**20, 150
    monkeypatch.setattr(supervised_loss, "MAX_LOGITS", max_logits)
    text = LlamaConfig(vocab_size=32000, **ONE_LAYER)
    model = AnyLlavaForConditionalGeneration(AnyLlavaConfig(VISION_CONFIGS["clip"](), text))
    trainer = build_trainer(model, tmp_path)
    ids = torch.tensor([text_ids(num_tokens)])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    kept = []
    with LargestTensor() as ours:
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda kept: kept):
            loss = trainer.compute_loss(model, dict(inputs))
        loss.backward()
    assert ours.size <= max_logits
    assert sum(tensor.numel() for tensor in kept) < max_logits
    with LargestTensor() as plain:
        plain_loss(model, inputs).backward()
    assert plain.size == num_tokens * 32000


def test_options_of_trl_reach_the_loss(tmp_path):
    model = tiny_model()
    inputs = padded_batch()
    losses = {
        loss_type: build_trainer(model, tmp_path, loss_type=loss_type).compute_loss(model, dict(inputs)).item()
        for loss_type in ("nll", "dft")
    }
    with torch.no_grad():
        log_probs = model(**{name: inputs[name] for name in ("input_ids", "attention_mask")}).logits.log_softmax(-1)
    targets = inputs["labels"][:, 1:]
    chosen = log_probs[:, :-1].gather(2, targets.clamp(min=0)[..., None])[..., 0][targets != -100]
    expected = {"nll": -chosen.mean().item(), "dft": -(chosen * chosen.exp()).mean().item()}
    assert losses == pytest.approx(expected, rel=1e-5)


def test_a_loss_on_a_router_is_refused(tmp_path):
    text = MixtralConfig(vocab_size=VOCAB_SIZE, **ONE_LAYER, num_key_value_heads=2, num_local_experts=2)
    model = AnyLlavaForConditionalGeneration(AnyLlavaConfig(VISION_CONFIGS["clip"](), text))
    with pytest.raises(ValueError, match="got router_aux_loss_coef=0.001 for a mixture of experts"):
        build_trainer(model, tmp_path)
    trainer = build_trainer(model, tmp_path, router_aux_loss_coef=0.0)
    assert trainer.compute_loss(model, padded_batch()).isfinite()


@pytest.mark.gpu
@pytest.mark.parametrize("chunk_size", [1, 1000])
def test_loss_on_a_gpu_is_that_on_a_cpu(tmp_path, monkeypatch, chunk_size):
    monkeypatch.setattr(supervised_loss, "MAX_LOGITS", chunk_size * VOCAB_SIZE)
    results = []
    for device in ("cpu", "cuda"):
        model, inputs, stage = make_case("packed")
        model.to(device)
        trainer = build_trainer(model, tmp_path, stage=stage, use_cpu=device == "cpu")
        inputs = {name: value.to(device) if torch.is_tensor(value) else value for name, value in inputs.items()}
        loss = trainer.compute_loss(model, inputs)
        loss.backward()
        gradients = {name: value.grad.cpu() for name, value in model.named_parameters() if value.grad is not None}
        results.append((loss.detach().cpu(), gradients))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
