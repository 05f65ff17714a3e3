"""TRL scripts that know nothing of this package, but for its import, train our models on pictures."""

import PIL.Image
import pytest
import torch
from datasets import Dataset
from transformers import AutoProcessor
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    SFTConfig,
    SFTTrainer,
)

from modeling_llava import AutoModelForVision2Seq
from processing_llava.data.collator import LlavaDataCollator
from processing_llava.transformers_versions import VERSION
from tests.tiny import save_tiny_checkpoint

pytestmark = pytest.mark.core

COLORS = ("red", "blue", "white", "green")
SETTINGS = {"per_device_train_batch_size": 2, "max_steps": 2, "learning_rate": 1e-3, "report_to": "none"}
SETTINGS |= {"use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return str(save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint")))


def pictures() -> list[list[PIL.Image.Image]]:
    return [[PIL.Image.new("RGB", (40, 30), color)] for color in COLORS]


def turn(role: str, text: str, *, has_image: bool = False) -> dict:
    return {"role": role, "content": [{"type": "image"}] * has_image + [{"type": "text", "text": text}]}


def questions() -> list[list[dict]]:
    return [[turn("user", "Color?", has_image=True)] for _ in COLORS]


def answers(words) -> list[list[dict]]:
    return [[turn("assistant", word)] for word in words]


def changed_parts(trainer, checkpoint: str) -> set[str]:
    before = AutoModelForVision2Seq.from_pretrained(checkpoint).state_dict()
    after = trainer.model.state_dict()
    assert all(value.isfinite().all() for value in after.values())
    return {name.removeprefix("model.").split(".")[0] for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("given", ["path", "model"])
def test_supervised(checkpoint, tmp_path, given):
    if VERSION < (5, 18):
        pytest.skip("TRL asks for transformers 5.18 before it learns answers alone beside pictures")
    messages = [question + answer for question, answer in zip(questions(), answers(COLORS))]
    dataset = Dataset.from_dict({"messages": messages, "images": pictures()})
    model = checkpoint if given == "path" else AutoModelForVision2Seq.from_pretrained(checkpoint)
    config = SFTConfig(str(tmp_path), **SETTINGS, max_length=None, assistant_only_loss=True)
    processor = AutoProcessor.from_pretrained(checkpoint)
    trainer = SFTTrainer(model, config, train_dataset=dataset, processing_class=processor)
    trainer.train()
    assert "language_model" in changed_parts(trainer, checkpoint)


@pytest.mark.parametrize("workers", [0, 1])
def test_whole_conversations_are_learned_without_their_images(checkpoint, tmp_path, workers):
    """TRL copies the ids into the labels, also those of images, which are outside the vocabulary."""
    messages = [question + answer for question, answer in zip(questions(), answers(COLORS))]
    dataset = Dataset.from_dict({"messages": messages, "images": pictures()})
    settings = SETTINGS | {"learning_rate": 0.0, "max_steps": 1, "dataloader_num_workers": workers}
    trainer = SFTTrainer(
        AutoModelForVision2Seq.from_pretrained(checkpoint),
        SFTConfig(str(tmp_path), **settings, max_length=None),
        train_dataset=dataset,
        processing_class=AutoProcessor.from_pretrained(checkpoint),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    is_image = batch["input_ids"] == trainer.model.config.image_token_id
    assert is_image.any() and (batch["labels"][is_image] == -100).all()
    assert (batch["labels"][~is_image & batch["attention_mask"].bool()] != -100).all()
    trainer.train()
    with torch.no_grad():
        expected = trainer.model.eval()(**batch).loss.item()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-4)


def test_supervised_with_our_collator(checkpoint, tmp_path):
    rows = [
        {"id": color, "images": picture, "messages": question + answer}
        for color, picture, question, answer in zip(COLORS, pictures(), questions(), answers(COLORS))
    ]
    processor = AutoProcessor.from_pretrained(checkpoint)
    config = SFTConfig(str(tmp_path), **SETTINGS, max_length=None, remove_unused_columns=False)
    trainer = SFTTrainer(
        AutoModelForVision2Seq.from_pretrained(checkpoint),
        config,
        train_dataset=Dataset.from_list(rows),
        data_collator=LlavaDataCollator(processor),
        processing_class=processor,
    )
    trainer.train()
    assert "language_model" in changed_parts(trainer, checkpoint)


def test_preferences(checkpoint, tmp_path):
    columns = {"prompt": questions(), "images": pictures()}
    columns |= {"chosen": answers(COLORS), "rejected": answers(reversed(COLORS))}
    trainer = DPOTrainer(
        AutoModelForVision2Seq.from_pretrained(checkpoint),
        args=DPOConfig(str(tmp_path), **SETTINGS, max_length=None),
        train_dataset=Dataset.from_dict(columns),
        processing_class=AutoProcessor.from_pretrained(checkpoint),
    )
    trainer.train()
    assert "language_model" in changed_parts(trainer, checkpoint)


def test_rewards(checkpoint, tmp_path):
    def prefers_long_answers(completions, **kwargs) -> list[float]:
        return [float(len(completion[0]["content"])) + index for index, completion in enumerate(completions)]

    trainer = GRPOTrainer(
        AutoModelForVision2Seq.from_pretrained(checkpoint),
        reward_funcs=prefers_long_answers,
        args=GRPOConfig(str(tmp_path), **SETTINGS, num_generations=2, max_completion_length=6),
        train_dataset=Dataset.from_dict({"prompt": questions(), "images": pictures()}),
        processing_class=AutoProcessor.from_pretrained(checkpoint),
    )
    trainer.train()
    assert "language_model" in changed_parts(trainer, checkpoint)


@pytest.mark.parametrize("max_length", [40, 52])
@pytest.mark.parametrize("kind", ["sft", "dpo", "kto"])
def test_a_length_that_cuts_images_is_named(checkpoint, tmp_path, kind, max_length):
    """Before the first token of the image, and in the middle of it."""
    both = {"prompt": questions(), "images": pictures()}
    trainer_class, config_class, columns = {
        "sft": (SFTTrainer, SFTConfig, {"completion": answers(COLORS)}),
        "dpo": (DPOTrainer, DPOConfig, {"chosen": answers(COLORS), "rejected": answers(reversed(COLORS))}),
        "kto": (KTOTrainer, KTOConfig, {"completion": answers(COLORS), "label": [True, False] * 2}),
    }[kind]
    trainer = trainer_class(
        AutoModelForVision2Seq.from_pretrained(checkpoint),
        args=config_class(str(tmp_path), **SETTINGS, max_length=max_length),
        train_dataset=Dataset.from_dict(both | columns),
        processing_class=AutoProcessor.from_pretrained(checkpoint),
    )
    with pytest.raises(ValueError, match=rf"`max_length` \({max_length}\) is too short"):
        trainer.train()


def test_rewards_of_questions_with_and_without_pictures(checkpoint, tmp_path):
    prompts = [[turn("user", "Color?", has_image=index % 2 == 0)] for index in range(4)]
    images = [picture if index % 2 == 0 else [] for index, picture in enumerate(pictures())]
    trainer = GRPOTrainer(
        AutoModelForVision2Seq.from_pretrained(checkpoint),
        reward_funcs=lambda completions, **kwargs: [float(index) for index in range(len(completions))],
        args=GRPOConfig(
            str(tmp_path), **SETTINGS | {"per_device_train_batch_size": 4}, num_generations=2, max_completion_length=6
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts, "images": images}),
        processing_class=AutoProcessor.from_pretrained(checkpoint),
    )
    trainer.train()
    assert "language_model" in changed_parts(trainer, checkpoint)
