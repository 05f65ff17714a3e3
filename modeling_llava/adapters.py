"""LoRA folders of the original LLaVA: attached with PEFT, merged into the weights or kept.

What is surprising: such an adapter names its targets by their last word ("q_proj"), which vision towers have too. The
modules are therefore taken from the names of its weights.
"""

import torch
from transformers import PreTrainedModel

from processing_llava.original_folder import OriginalFolder, find_file

from .checkpoint_layouts import rename_to_ours
from .weight_files import Weight, read_file

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_PEFT_PREFIX = "base_model.model."


def load_original_adapter(model: PreTrainedModel, folder: OriginalFolder, *, merge: bool) -> PreTrainedModel:
    """Add the LoRA of an original folder to a model with the weights of its base.

    Args:
        model: The complete model, without the adapter.
        folder: Holds adapter_config.json and the adapter's weights.
        merge: Add the product of its matrices to the weights; False keeps both, for further training.

    Raises:
        ValueError: naming file, weight and shapes, if the adapter belongs to another model.
    """
    try:
        from peft import LoraConfig, PeftConfig, PeftModel, set_peft_model_state_dict
    except ImportError as error:
        raise ImportError("peft is needed to read a LoRA folder; pip install peft") from error

    weights = read_adapter(folder)
    peft_config = PeftConfig.from_pretrained(folder.name, **folder.download)
    if not isinstance(peft_config, LoraConfig):
        raise ValueError(f"got adapter {folder.name} of type {peft_config.peft_type}; expected LORA")
    modules = {key.rsplit(".lora_", 1)[0] for key in weights}
    check_adapter(model, weights)
    peft_config.target_modules = modules
    peft_config.base_model_name_or_path = folder.base_name
    state_dict = {key: weight.data[...] for key, weight in weights.items()}
    if not merge:
        model.load_adapter(peft_config=peft_config, adapter_state_dict=state_dict)
        return model
    peft_model = PeftModel(model, peft_config)
    set_peft_model_state_dict(peft_model, {f"{_PEFT_PREFIX}{key}": value for key, value in state_dict.items()})
    merged = peft_model.merge_and_unload(safe_merge=True)
    for parameter in merged.parameters():
        parameter.requires_grad_(True)
    return merged.eval()


def read_adapter(folder: OriginalFolder) -> dict[str, Weight]:
    """The weights of an adapter by our name of the module they belong to: "<module>.lora_A.weight".

    Raises:
        ValueError: if there are none.
    """
    for filename in ADAPTER_FILES:
        path = find_file(folder.name, filename, folder.download)
        if path is not None:
            return {
                rename_to_ours(key.removeprefix(_PEFT_PREFIX), "original"): weight
                for key, weight in read_file(path).items()
            }
    raise ValueError(f"got {folder.name} without adapter weights; expected one of {', '.join(ADAPTER_FILES)}")


def check_adapter(model: PreTrainedModel, weights: dict[str, Weight]) -> None:
    """Refuse an adapter that does not fit.

    Raises:
        ValueError: naming file, weight and shapes.
    """
    modules = dict(model.named_modules())
    for key, weight in weights.items():
        module_name, _, kind = key.rpartition(".lora_")
        module = modules.get(module_name)
        if not isinstance(module, torch.nn.Linear):
            raise ValueError(
                f"got {weight.key} in {weight.file}, but {type(model).__name__} has no linear layer {module_name}; "
                "expected an adapter of this architecture"
            )
        axis, expected = (1, module.in_features) if kind.startswith("A") else (0, module.out_features)
        shape = weight.shape
        if shape[axis] != expected:
            raise ValueError(
                f"got {weight.key} of shape {shape} in {weight.file}; expected {expected} in dimension {axis}: the "
                "base model is another one"
            )
