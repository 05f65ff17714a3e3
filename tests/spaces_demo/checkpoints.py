"""Checkpoints for the demo's menu: an adapter, one that answers with a remote picture, one without end, a giant."""

from pathlib import Path

import torch
from transformers import AutoProcessor

from modeling_llava import AnyLlavaConfig, AnyLlavaForConditionalGeneration
from modeling_llava.inference.loading import EMBEDDED_MODEL
from tests.tiny import tiny_config, tiny_processor

STEPS = 80


def load_embedded_model():
    """Model and processor, as they are for training."""
    model = AnyLlavaForConditionalGeneration.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(EMBEDDED_MODEL)


def save_adapter(folder: Path) -> None:
    """A fresh LoRA on the embedded model: it answers as the embedded model does."""
    from peft import LoraConfig, get_peft_model

    model, processor = load_embedded_model()
    config = LoraConfig(target_modules=r"model\.language_model\..*(q|v)_proj")
    get_peft_model(model, config).save_pretrained(folder)
    processor.save_pretrained(folder)


def save_leaking_checkpoint(folder: Path, *, question: str, answer: str) -> None:
    """The embedded model after it has learned one answer by heart."""
    torch.manual_seed(0)
    model, processor = load_embedded_model()
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
    )
    is_answer = torch.as_tensor(inputs.pop("assistant_masks")) == 1
    labels = inputs["input_ids"].where(is_answer, -100)
    optimizer = torch.optim.AdamW(model.model.language_model.parameters(), lr=1e-3)
    for _ in range(STEPS):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.1, f"the checkpoint has not learned its answer: loss {loss:.3f}"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def save_endless_checkpoint(folder: Path) -> None:
    """Random weights that never reach an end token, deep enough to be stopped before they are done."""
    processor = tiny_processor()
    config = tiny_config(image_token_id=processor.image_token_id)
    config.text_config.num_hidden_layers = 40
    torch.manual_seed(0)
    model = AnyLlavaForConditionalGeneration(config)
    model.generation_config.update(eos_token_id=None, suppress_tokens=[0, 1, 2])
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def save_config_of_a_giant(folder: Path) -> None:
    """The configuration of a hundred billion parameters, without the parameters."""
    config = AnyLlavaConfig.from_pretrained(EMBEDDED_MODEL)
    config.text_config.hidden_size = 12288
    config.text_config.intermediate_size = 49152
    config.text_config.num_hidden_layers = 48
    config.save_pretrained(folder)
