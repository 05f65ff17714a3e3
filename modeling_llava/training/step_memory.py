"""How much memory a training step takes, before it is made, and how much the device has free.

    weights      all parameters and buffers, as they are loaded
    gradients    one more copy of the parameters that train
    optimizer    `OPTIMIZER_BYTES` for each element that trains
    activations  what the forward pass keeps for the backward pass; see `_measure_activations`

The sum is what is held where the backward pass ends, the largest moment of a step. Not in it: what CUDA itself takes
(about 0.5 GiB), what allocators lose between blocks, and the work space of single operations; `MARGIN` is for them.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from accelerate.utils import send_to_device
from datasets import Dataset, IterableDataset
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from trl import SFTConfig

from modeling_llava.acceleration.devices import count_free_bytes
from processing_llava.prompt_inputs import IGNORED_LABEL

from .recipe import Recipe
from .starting_model import count_elements
from .supervised_loss import MAX_LOGITS

MARGIN = 1.1
OPTIMIZER_BYTES = {
    "adafactor": 0,
    "adamw_8bit": 2,
    "adamw_bnb_8bit": 2,
    "adamw_torch_4bit": 1,
    "adamw_torch_8bit": 2,
    "lion_32bit": 4,
    "lion_8bit": 1,
    "lomo": 0,
    "paged_adamw_8bit": 2,
    "paged_lion_32bit": 4,
    "paged_lion_8bit": 1,
    "rmsprop": 4,
    "sgd": 0,
}
"""State for each element that trains, by `optim` of TrainingArguments; others are taken to need 8, as AdamW."""


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes that a training step takes on one device."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    checkpointed: int
    """Activations with gradient checkpointing: the inputs of all layers, and all of one layer."""

    def add_up(self, *, checkpointing: bool) -> int:
        activations = self.checkpointed if checkpointing else self.activations
        return self.weights + self.gradients + self.optimizer + activations

    def fits(self, free: int) -> bool:
        """Whether it fits without gradient checkpointing."""
        return self.add_up(checkpointing=False) * MARGIN <= free


def estimate_step(
    model: nn.Module,
    collate: Callable[[list[Any]], dict[str, Any]],
    dataset: Dataset | IterableDataset,
    *,
    recipe: Recipe,
    arguments: SFTConfig,
) -> StepMemory:
    """The memory of the largest step of a run; the model goes to the device on which it trains.

    The largest padded batch is taken to be `per_device_train_batch_size` times the longest row, the largest packed
    batch to be full; see `_find_costliest` for the row.
    """
    if model.device != arguments.device:
        model.to(arguments.device)
    row, num_tokens = _find_costliest(dataset, collate, recipe)
    num_rows: float = arguments.per_device_train_batch_size
    if recipe.tokens_per_batch is not None:
        num_rows = recipe.tokens_per_batch / num_tokens
    dtype = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else torch.float32
    activations, checkpointed = _measure_activations(model, collate, row, num_rows=num_rows, dtype=dtype)
    states = count_states(model, optim=arguments.optim)
    return StepMemory(**states, activations=activations, checkpointed=checkpointed)


def _find_costliest(
    dataset: Dataset | IterableDataset, collate: Callable[..., Any], recipe: Recipe
) -> tuple[dict[str, Any], int]:
    """The row that a batch is taken to be full of, and its tokens.

    It is the longest. Where the tower trains, images cost too: padded, it is the longest row with an image; packed,
    where a token costs the same in every row, the one with the most images for its length. Where rows were not
    measured, the first 64 are looked at.
    """
    if isinstance(dataset, Dataset) and "num_tokens" in dataset.column_names:
        counts = dataset.with_format(None)
        lengths, num_images = counts["num_tokens"][:], counts["num_images"][:]
        rows: Any = dataset
    else:
        rows = list(islice(dataset, 64))
        lengths = [collate([row])["input_ids"].shape[1] for row in rows]
        num_images = [len(row["images"]) for row in rows]

    def cost(index: int) -> tuple[float, int]:
        if not recipe.train_vision_tower:
            return 0, lengths[index]
        if recipe.tokens_per_batch is None:
            return num_images[index] > 0, lengths[index]
        return num_images[index] / lengths[index], lengths[index]

    costliest = max(range(len(lengths)), key=cost)
    return rows[costliest], lengths[costliest]


def free_memory(model: nn.Module, arguments: SFTConfig) -> int:
    """Bytes of the device that a step of this process can use: those that are free, and those of the weights."""
    device = arguments.device
    if device.type == "cuda":
        return count_free_bytes(device) + torch.cuda.memory_reserved(device)
    return count_free_bytes(device) // arguments.world_size + _count_weights(model)


def count_states(model: nn.Module, *, optim: str) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer.

    Args:
        model: With the parameters that train set to train.
        optim: As in TrainingArguments.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    num_elements = sum(count_elements(parameter) for parameter in trained)
    return {
        "weights": _count_weights(model),
        "gradients": sum(count_elements(parameter) * parameter.element_size() for parameter in trained),
        "optimizer": num_elements * OPTIMIZER_BYTES.get(optim, 8),
    }


def _count_weights(model: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    parameters = sum(count_elements(parameter) * parameter.element_size() for parameter in model.parameters())
    return parameters + sum(buffer.nbytes for buffer in model.buffers())


def _measure_activations(
    model: nn.Module, collate: Callable[[list[Any]], dict[str, Any]], row: Any, *, num_rows: float, dtype: torch.dtype
) -> tuple[int, int]:
    """Bytes that a batch of `num_rows` such rows keeps for the backward pass, and that with gradient checkpointing.

    The model computes a batch of this row and one of the row twice, and autograd tells what it saves. The difference
    is what a row takes. The rest, which is the same for every batch, are weights cast to 16 bits. The logits of
    supervised tokens come on top; see `supervised_loss.py`.

    Args:
        model: Where it will compute; its random state is left as it is.
        collate: Makes a batch of rows.
        row: The one that costs most.
        num_rows: Padded, the rows of a batch; packed, the tokens of a batch divided by those of the row.
        dtype: Dtype that the step computes in.
    """
    device = next(model.parameters()).device
    batches = [send_to_device(collate([row] * number), device) for number in (1, 2)]
    one, two = (_count_saved(model, batch, dtype) for batch in batches)
    num_supervised = int((batches[0]["labels"] != IGNORED_LABEL).sum()) * num_rows
    num_logits = min(num_supervised * model.config.get_text_config().vocab_size, MAX_LOGITS)
    # Logits, their softmax, and two results of computing with it, in float32.
    logits = 4 * 4 * num_logits
    plain = one.plain + (two.plain - one.plain) * (num_rows - 1)
    checkpointed = one.checkpointed + (two.checkpointed - one.checkpointed) * (num_rows - 1)
    return round(plain + logits), round(checkpointed + logits)


@dataclass
class _Saved:
    """Bytes that a forward pass saves."""

    outside: int = 0
    layers: Counter = field(default_factory=Counter)
    """In each layer that gradient checkpointing computes again."""
    inputs: Counter = field(default_factory=Counter)
    """Inputs of these layers, which it keeps."""

    @property
    def plain(self) -> int:
        return self.outside + sum(self.layers.values())

    @property
    def checkpointed(self) -> int:
        inputs = sum(self.inputs[name] for name in self.layers)
        return self.outside + inputs + max(self.layers.values(), default=0)


def _count_saved(model: nn.Module, batch: dict[str, Any], dtype: torch.dtype) -> _Saved:
    """Compute a batch and count what is saved; every storage once, and weights not at all."""
    device = next(model.parameters()).device
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved = _Saved()
    current: list[str] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            if current:
                saved.layers[current[-1]] += storage.nbytes()
            else:
                saved.outside += storage.nbytes()
        # An output that its own node saves would keep the graph, and all that it saved, for ever.
        return tensor.detach()

    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with (
        _watch_layers(model, current, saved.inputs),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.autocast(device.type, dtype, enabled=dtype != torch.float32),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        # Whatever is saved lives as long as the outputs, so that no address comes twice.
        outputs = model.train()(**inputs, use_cache=False, logits_to_keep=1)
    del outputs
    return saved


@contextlib.contextmanager
def _watch_layers(model: nn.Module, current: list[str], inputs: Counter) -> Iterator[None]:
    """Keep the name of the layer that computes in `current`, and count the bytes that go into each."""
    handles = []
    for name, layer in model.named_modules():
        if isinstance(layer, GradientCheckpointingLayer):

            def enter(layer: nn.Module, arguments: tuple, name: str = name) -> None:
                current.append(name)
                inputs[name] = arguments[0].nbytes

            def leave(layer: nn.Module, arguments: tuple, output: Any) -> None:
                current.pop()

            handles += [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
