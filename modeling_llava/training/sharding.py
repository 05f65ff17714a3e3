"""What FSDP2 and accelerate must be told, or refused, to shard a LLaVA as `launch/fsdp2.yaml` does."""

import os

import torch
from accelerate import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy, StateDictType
from transformers import PreTrainedModel
from trl import SFTConfig

from .recipe import Recipe


def is_sharded(arguments: SFTConfig) -> bool:
    """Whether FSDP or DeepSpeed divide the model between processes; `accelerate launch` says so in a variable."""
    has_fsdp = arguments.fsdp_plugin_args is not None or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    return has_fsdp or arguments.deepspeed_plugin is not None


def check_divisible(recipe: Recipe, *, fsdp: bool) -> None:
    """Refuse a recipe whose model cannot be divided between processes.

    Args:
        fsdp: Whether FSDP divides it, or DeepSpeed.

    Raises:
        ValueError: naming the field.
    """
    if recipe.muon_learning_rate is not None:
        raise ValueError(
            "got muon_learning_rate for a model that is divided between processes; expected a whole model in each, "
            "since Muon takes whole matrices: launch with torchrun alone"
        )
    if fsdp and recipe.stage == "qlora":
        raise ValueError(
            "got stage 'qlora' for FSDP; expected a whole model in each process, since a checkpoint of 4-bit weights "
            "that FSDP has divided cannot be resumed: launch with torchrun alone"
        )


def prepare_sharding(model: PreTrainedModel, plugin: FullyShardedDataParallelPlugin) -> None:
    """Adapt a LLaVA, and the settings of `accelerate launch`, to each other before the model is sharded.

    Raises:
        ValueError: naming the setting under which weights would be lost or checkpoints could not be loaded.
    """
    if plugin.fsdp_version != 2:
        raise ValueError("got fsdp_version: 1; expected 2, which shards frozen and trained weights side by side")
    if plugin.state_dict_type != StateDictType.FULL_STATE_DICT:
        raise ValueError(
            f"got fsdp_state_dict_type: {plugin.state_dict_type.name}; expected FULL_STATE_DICT, whose checkpoints "
            "from_pretrained loads in one process"
        )
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "got fsdp_cpu_ram_efficient_loading: true; expected false: only the first process would have weights "
            "before the model is sharded, and the vision tower may encode pictures by then"
        )
    # Layers of these classes are sharded; the towers of transformers name some of their text half too.
    model._no_split_modules &= {type(module).__name__ for module in model.modules()}
    policy = plugin.mixed_precision_policy
    if policy is not None:
        # accelerate's own sums gradients, and gives back the loss, in 16 bits.
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=policy.param_dtype, reduce_dtype=torch.float32
        )
