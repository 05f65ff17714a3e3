"""The loss on a CPU, which leaves out columns without a label."""

from types import SimpleNamespace

import pytest
import torch

from modeling_llava.training.trainer import LlavaTrainer
from tests.tiny import tiny_model


@pytest.fixture
def trainer() -> LlavaTrainer:
    trainer = object.__new__(LlavaTrainer)
    trainer.args = SimpleNamespace(device=torch.device("cpu"))
    trainer.accelerator = SimpleNamespace(num_processes=2)
    return trainer


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    input_ids = torch.randint(3, 300, (3, 12), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(input_ids, -100)
    labels[0, 4:6] = input_ids[0, 4:6]
    labels[1, 11] = input_ids[1, 11]
    # No position comes before the first, so that nothing predicts it.
    labels[2, :3] = input_ids[2, :3]
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}


def test_loss_and_gradients_are_those_of_the_model(trainer, batch):
    model = tiny_model()
    results = []
    for compute in (lambda: model(**batch).loss, lambda: trainer.compute_loss(model, batch)):
        model.zero_grad()
        loss = compute()
        loss.backward()
        gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        results.append((loss, gradients))
    torch.testing.assert_close(*results)


def test_the_number_of_tokens_of_all_processes_and_batches_counts(trainer, batch):
    model = tiny_model()
    num_supervised = 5
    alone = trainer.compute_loss(model, batch)
    shared = trainer.compute_loss(model, batch, num_items_in_batch=torch.tensor(20))
    # Gradients of the two processes are averaged, so each has twice its share.
    torch.testing.assert_close(shared, alone * num_supervised / 20 * 2)


def test_logits_are_only_those_of_columns_with_labels(trainer, batch):
    _, outputs = trainer.compute_loss(tiny_model(), batch, return_outputs=True)
    assert outputs.logits.shape[1] == 5
