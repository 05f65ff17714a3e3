"""Adapters: LoRA folders of the original LLaVA, merged into the weights or kept, and what fits at every door.

What is surprising: an adapter of the original names its targets by their last word ("q_proj"), which vision towers
have too. The modules are therefore taken from the names of its weights. And neither PEFT nor transformers refuses an
adapter whose weights fit nothing, or a part of which is missing.
"""

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from processing_llava.original.original_folder import OriginalFolder, find_file, read_json

from .original_weights import is_used, read_trained_parts
from .weight_files import Weight, read_file, refuse_unfit_weights
from .weight_names import rename_from_ours, rename_to_ours

logger = logging.get_logger(__name__)

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
PROJECTOR = "mm_projector"
"""How adapters that were trained with this package call the projector that they bring."""
_PEFT_PREFIX = "base_model.model."
_ORIGINAL_LAYERS = ("model.layers.", "transformer.blocks.")
_TUNER_PREFIXES = ("lora_", "ia3_", "hada_", "lokr_", "oft_", "boft_")
"""How PEFT's own weights of a layer begin; the next part of such a name is that of the adapter."""


def load_adapted(
    loader: type, base: str, name: str, download: dict[str, Any], *args, merge: bool, **kwargs
) -> PreTrainedModel:
    """A model with an adapter.

    Args:
        loader: Class whose `from_pretrained` loads the base.
        base: Folder or Hub id under the adapter.
        name: Folder or Hub id of the adapter.
        download: Some of `DOWNLOAD_KWARGS`, for the adapter.
        merge: Add an adapter of the original LLaVA to the weights. One of PEFT is kept.
        **kwargs: Of `from_pretrained`, for the base.

    Raises:
        ValueError: if one does not fit the other.
    """
    kwargs = {key: value for key, value in kwargs.items() if key not in ("revision", "subfolder")}
    loaded = loader.from_pretrained(base, *args, **kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    weights = read_adapter(name, download)
    if has_original_names(weights):
        folder = OriginalFolder(name=name, config={}, base_model=base, download=download)
        add_trained_parts(model, folder)
        model = load_original_adapter(model, folder, merge=merge)
    else:
        info = model.load_adapter(name, adapter_kwargs=download)
        # Those of transformers' own classes; ours has done so.
        refuse_unfit_adapter(model, info, weights, name)
    return (model, loaded[1]) if isinstance(loaded, tuple) else model


def needs_our_class(name: str, download: dict[str, Any]) -> bool:
    """Whether an adapter has names that transformers' own class has no place for, and ours has."""
    config = read_json(name, "adapter_config.json", download) or {}
    return PROJECTOR in (config.get("modules_to_save") or ()) or has_original_names(read_adapter(name, download))


def load_original_adapter(
    model: PreTrainedModel, folder: OriginalFolder, *, merge: bool, adapter_name: str | None = None
) -> Any:
    """Add the LoRA of an original folder to a model with the weights of its base.

    Args:
        model: The complete model, without the adapter.
        folder: Holds adapter_config.json and the adapter's weights.
        merge: Add the product of its matrices to the weights; False keeps both, for further training.
        adapter_name: What PEFT is to call it.

    Returns:
        The merged model, or the model.

    Raises:
        ValueError: naming file, weight and shapes, if the adapter belongs to another model.
    """
    try:
        from peft import LoraConfig, PeftConfig, PeftModel, set_peft_model_state_dict
    except ImportError as error:
        raise ImportError("peft is needed to read a LoRA folder; pip install peft") from error

    weights = {
        rename_to_ours(key, "original"): item for key, item in read_adapter(folder.name, folder.download).items()
    }
    peft_config = PeftConfig.from_pretrained(folder.name, **folder.download)
    if not isinstance(peft_config, LoraConfig):
        raise ValueError(f"got adapter {folder.name} of type {peft_config.peft_type}; expected LORA")
    check_adapter(model, weights)
    check_targets(model, peft_config, weights, folder.name)
    peft_config.target_modules = {key.rsplit(".lora_", 1)[0] for key in weights}
    peft_config.base_model_name_or_path = folder.base_name
    state_dict = {key: weight.data[...] for key, weight in weights.items()}
    if not merge:
        model.load_adapter(adapter_name=adapter_name, peft_config=peft_config, adapter_state_dict=state_dict)
        return model
    peft_model = PeftModel(model, peft_config)
    set_peft_model_state_dict(peft_model, {f"{_PEFT_PREFIX}{key}": value for key, value in state_dict.items()})
    merged = peft_model.merge_and_unload(safe_merge=True)
    for parameter in merged.parameters():
        parameter.requires_grad_(True)
    return merged.eval()


@torch.no_grad()
def add_trained_parts(model: PreTrainedModel, folder: OriginalFolder) -> None:
    """Give a model, in place, what a LoRA run of the original trained beside its adapter.

    Raises:
        ValueError: naming file, weight and shapes, if something does not fit.
    """
    parts = read_trained_parts(folder.name, folder.download)
    own = dict(model.named_parameters())
    shapes = [(key, part.shape, list(own[key].shape)) for key, part in parts.items() if key in own]
    found = {
        "missing_keys": [],
        "mismatched_keys": [entry for entry in shapes if entry[1] != entry[2]],
        "unexpected_keys": [key for key in parts.keys() - own.keys() if is_used(key, model.config)],
    }
    refuse_unfit_weights(found, parts, folder.name)
    for key, _, _ in shapes:
        own[key].copy_(parts[key].data[...])
    if not any(key.startswith("model.mm_projector.") for key in parts):
        logger.warning(f"{folder.name} holds an adapter without a projector; the projector is that of its base")


def read_adapter(name: str, download: dict[str, Any]) -> dict[str, Weight]:
    """The weights of an adapter by the name in its file without PEFT's prefix: "<module>.lora_A.weight".

    Raises:
        ValueError: if there are none.
    """
    for filename in ADAPTER_FILES:
        path = find_file(name, filename, download)
        if path is not None:
            return {key.removeprefix(_PEFT_PREFIX): weight for key, weight in read_file(path).items()}
    raise ValueError(f"got {name} without adapter weights; expected one of {', '.join(ADAPTER_FILES)}")


def has_original_names(weights: dict[str, Weight]) -> bool:
    """Whether an adapter calls the layers of its language model as the original LLaVA does."""
    return any(key.startswith(_ORIGINAL_LAYERS) for key in weights)


def check_targets(model: PreTrainedModel, peft_config: Any, weights: dict[str, Weight], name: str) -> None:
    """Refuse an adapter of the original without weights for a layer of the language model that it says to adapt.

    Raises:
        ValueError: naming the layer.
    """
    from peft.tuners.tuners_utils import check_target_module_exists

    for module_name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or not module_name.startswith("model.language_model."):
            continue
        wanted = check_target_module_exists(peft_config, rename_from_ours(module_name, "original"))
        missing = [kind for kind in ("A", "B") if f"{module_name}.lora_{kind}.weight" not in weights]
        if wanted and missing or len(missing) == 1:
            raise ValueError(
                f"got adapter {name} without lora_{missing[0]}.weight of {module_name}; expected one, as "
                "adapter_config.json names that layer: the file is incomplete or of another model"
            )


def refuse_unfit_adapter(
    model: PreTrainedModel, info: Any, weights: dict[str, Weight], name: str, *, adapter_name: str | None = None
) -> None:
    """Take out and refuse an adapter of which a weight has no place, or a place no weight.

    Args:
        info: What transformers' `load_adapter` returned.
        weights: Of the adapter, as `read_adapter` gives them.
        name: Folder or Hub id of the adapter.
        adapter_name: What PEFT calls it.

    Raises:
        ValueError: naming file, weight and shapes.
    """
    adapter_name = adapter_name or "default"
    found = {
        "mismatched_keys": [(_plain(key, adapter_name), *shapes) for key, *shapes in info.mismatched_keys],
        "missing_keys": [_plain(key, adapter_name) for key in info.missing_keys],
        "unexpected_keys": [_plain(key, adapter_name) for key in info.unexpected_keys],
    }
    try:
        refuse_unfit_weights(found, weights, name)
    except ValueError:
        model.delete_adapter(adapter_name)
        raise


@torch.no_grad()
def fill_saved_modules(
    model: PreTrainedModel, info: Any, weights: dict[str, Weight], *, adapter_name: str | None
) -> None:
    """Give whole modules of an adapter, such as a projector, what `load_adapter` left out, and take it off its report.

    transformers 5.17 finds no place for them; 5.23 does.

    Args:
        info: What transformers' `load_adapter` returned; changed in place.
        weights: Of the adapter, as `read_adapter` gives them.
    """
    own = dict(model.named_parameters())
    for key in list(info.missing_keys):
        stored = _plain(key, adapter_name or "default")
        if stored in weights and weights[stored].shape == list(own[key].shape):
            own[key].copy_(weights[stored].data[...])
            info.missing_keys.discard(key)
            info.unexpected_keys.discard(stored)


def _plain(key: str, adapter_name: str) -> str:
    """What the file of an adapter calls a weight in a model."""
    return ".".join(part for part in key.split(".") if part not in (adapter_name, "modules_to_save"))


def check_adapter_file(model: PreTrainedModel, name: str) -> None:
    """Refuse an adapter of PEFT that does not fit a model, by names and shapes alone.

    Args:
        model: Of the base; may be without weights (on "meta"), and gets the layers of the adapter.
        name: Folder or Hub id of the adapter.

    Raises:
        ValueError: naming file, weight and shapes.
    """
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict

    base = set(model.state_dict())
    adapted = PeftModel(model, PeftConfig.from_pretrained(name), low_cpu_mem_usage=True)
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    # PEFT leaves out the last word of DoRA's magnitudes, which transformers needs.
    shapes = {_cut(key): list(value.shape) for key, value in expected.items()}
    weights = {_cut(key): weight for key, weight in read_adapter(name, {}).items()}
    found = {
        "missing_keys": shapes.keys() - weights.keys(),
        "unexpected_keys": weights.keys() - shapes.keys() - base,
        "mismatched_keys": [
            (key, weight.shape, shapes[key])
            for key, weight in weights.items()
            if key in shapes and weight.shape != shapes[key]
        ],
    }
    refuse_unfit_weights(found, weights, name)


def _cut(key: str) -> str:
    key = key.removeprefix(_PEFT_PREFIX)
    return key.removesuffix(".weight") if key.endswith("lora_magnitude_vector.weight") else key


def refuse_unfit_state(module: torch.nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Refuse a state dict with an adapter's weights that have no place in a module, or of which some are missing.

    Args:
        module: With the adapter's layers.
        state_dict: May hold other weights too.
        prefix: Of the module's names in it.

    Raises:
        ValueError: naming the weight.
    """
    given = {key: adapter for key in state_dict if (adapter := _adapter_of(key)) is not None}
    if not given:
        return
    own = {f"{prefix}{key}" for key in module.state_dict()}
    unexpected = sorted(key for key in state_dict.keys() - own if key.startswith(prefix))
    missing = sorted(key for key in own - state_dict.keys() if _adapter_of(key) in given.values())
    if keys := unexpected or missing:
        what = "weights without a place in this model" if unexpected else "layers without a weight"
        raise ValueError(
            f"got an adapter with {len(keys)} {what}, {keys[0]} among them; expected one that was trained on this "
            "model: load one of the original LLaVA with AutoModelForVision2Seq.from_pretrained(adapter), which knows "
            "its names"
        )


def _adapter_of(key: str) -> str | None:
    """The adapter that a weight of PEFT in a model belongs to; None for other weights."""
    parts = key.split(".")
    for part, following in zip(parts, parts[1:]):
        if part.startswith(_TUNER_PREFIXES):
            return following
    return None


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
