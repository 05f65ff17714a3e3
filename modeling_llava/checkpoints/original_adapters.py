"""Adapters: LoRA folders of the original LLaVA, merged into the weights or kept, and what fits at every door.

What is surprising: an adapter of the original names its targets by their last word ("q_proj"), which vision towers
have too. The modules are therefore taken from the names of its weights. And neither PEFT nor transformers refuses an
adapter whose weights fit nothing, or a part of which is missing. Every door therefore asks `find_unfit`: our own doors
of a model without weights, before the adapter is attached.
"""

import copy
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from processing_llava.original.file_checks import find_file, read_json
from processing_llava.original.original_folder import OriginalFolder

from .adapter_config import import_peft, naming_adapter, read_adapter_config, write_out_patterns
from .original_weights import PROJECTOR_PREFIX, is_used, read_trained_parts
from .weight_checks import refuse_unfit_weights
from .weight_files import Weight, read_file, refuse_infinite, refuse_integers
from .weight_names import rename_from_ours, rename_to_ours

logger = logging.get_logger(__name__)

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
PROJECTOR = "mm_projector"
"""How adapters that were trained with this package call the projector that they bring."""
PEFT_PREFIX = "base_model.model."
"""How every name in an adapter's file begins."""
_ORIGINAL_LAYERS = ("model.layers.", "transformer.blocks.")
_TUNER_PREFIXES = {
    "LORA": "lora_",
    "IA3": "ia3_",
    "LOHA": "hada_",
    "LOKR": "lokr_",
    "OFT": "oft_",
    "BOFT": "boft_",
}
"""How the weights of a layer begin, for the kinds of adapter that keep all of theirs in layers."""


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
        **kwargs: Arguments of `from_pretrained`, for the base.

    Raises:
        ValueError: if one does not fit the other.
    """
    import_peft()
    kwargs = {key: value for key, value in kwargs.items() if key not in ("revision", "subfolder")}
    loaded = loader.from_pretrained(base, *args, **kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    weights = read_adapter(name, download)
    if has_original_names(weights):
        folder = OriginalFolder(name=name, config={}, base_model=base, download=download)
        model = add_original_adapter(model, folder, merge=merge)
    else:
        attach_adapter(model, read_adapter_config(name, download), weights, name)
    return (model, loaded[1]) if isinstance(loaded, tuple) else model


def needs_our_class(name: str, download: dict[str, Any]) -> bool:
    """Whether an adapter has names that transformers' own class has no place for, and ours has."""
    config = read_json(name, "adapter_config.json", download) or {}
    return PROJECTOR in (config.get("modules_to_save") or ()) or has_original_names(read_adapter(name, download))


def load_original_adapter(
    model: PreTrainedModel, folder: OriginalFolder, *, merge: bool, adapter_name: str = "default"
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
    peft = import_peft()
    weights = {
        rename_to_ours(key, "original"): item for key, item in read_adapter(folder.name, folder.download).items()
    }
    peft_config = read_adapter_config(folder.name, folder.download)
    if not isinstance(peft_config, peft.LoraConfig):
        raise ValueError(f"got adapter {folder.name} of type {peft_config.peft_type}; expected LORA")
    write_out_patterns([rename_from_ours(key, "original") for key in list_modules(model)], peft_config, folder.name)
    check_targets(model, peft_config, weights, folder.name)
    adapted = {key.split(".lora_")[0] for key in weights if ".lora_" in key}
    peft_config.target_modules, peft_config.exclude_modules = adapted, None
    peft_config.base_model_name_or_path = folder.base_name
    if not merge:
        attach_adapter(model, peft_config, weights, folder.name, adapter_name=adapter_name)
        return model
    check_adapter_weights(build_without_weights(model), peft_config, weights, folder.name)
    with naming_adapter(folder.name):
        peft_model = peft.PeftModel(model, peft_config)
    state_dict = {f"{PEFT_PREFIX}{key}": weight.data[...] for key, weight in weights.items()}
    peft.set_peft_model_state_dict(peft_model, state_dict)
    merged = peft_model.merge_and_unload(safe_merge=True)
    for parameter in merged.parameters():
        parameter.requires_grad_(True)
    return merged.eval()


def add_original_adapter(
    model: PreTrainedModel, folder: OriginalFolder, *, merge: bool, adapter_name: str = "default"
) -> PreTrainedModel:
    """As `load_original_adapter`, with what the run trained beside the adapter.

    Raises:
        ValueError: naming file, weight and shapes, if something does not fit; the model is as before.
    """
    parts = read_trained_parts(folder.name, folder.download)
    own = dict(model.named_parameters())
    shapes = [(key, part.shape, list(own[key].shape)) for key, part in parts.items() if key in own]
    found = {
        "missing_keys": [],
        "mismatched_keys": [entry for entry in shapes if entry[1] != entry[2]],
        "unexpected_keys": [key for key in parts.keys() - own.keys() if is_used(key, model.config)],
    }
    if any(key.startswith(PROJECTOR_PREFIX) for key in parts):  # which comes whole
        found["missing_keys"] = [key for key in own.keys() - parts.keys() if key.startswith(PROJECTOR_PREFIX)]
    refuse_unfit_weights(found, parts, folder.name)
    model = load_original_adapter(model, folder, merge=merge, adapter_name=adapter_name)
    with torch.no_grad():
        for key, _, _ in shapes:
            own[key].copy_(parts[key].data[...])
    if not any(key.startswith(PROJECTOR_PREFIX) for key in parts):
        logger.warning(f"{folder.name} holds an adapter without a projector; the projector is that of its base")
    return model


def read_adapter(name: str, download: dict[str, Any]) -> dict[str, Weight]:
    """The weights of an adapter by the name in its file without PEFT's prefix: "<module>.lora_A.weight".

    Raises:
        ValueError: if there are none, or a name is without the prefix: PEFT leaves such a weight out in silence.
    """
    for filename in ADAPTER_FILES:
        path = find_file(name, filename, download)
        if path is None:
            continue
        weights = read_file(path)
        refuse_integers(name, weights)
        for key in weights:
            if not key.startswith(PEFT_PREFIX):
                raise ValueError(
                    f"got {key} in {path}; expected a name that begins with {PEFT_PREFIX!r}, as PEFT writes all of "
                    "an adapter: save it with PEFT, from the model as it was before it was compiled or wrapped"
                )
        return {key.removeprefix(PEFT_PREFIX): weight for key, weight in weights.items()}
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


def attach_adapter(
    model: PreTrainedModel,
    peft_config: Any,
    weights: dict[str, Weight],
    name: str,
    *,
    adapter_name: str = "default",
    is_trainable: bool = False,
) -> None:
    """Add an adapter of PEFT to a model in place, if it fits.

    Args:
        model: Any class of transformers.
        weights: The adapter's, as `read_adapter` gives them.
        name: Folder or Hub id of the adapter.
        adapter_name: What PEFT is to call it.

    Raises:
        ValueError: naming file, weight and shapes; the model is as before.
    """
    peft = import_peft()
    if model.base_model is model:  # without an output layer, its names are one word shorter
        weights = {key.removeprefix(f"{model.base_model_prefix}."): item for key, item in weights.items()}
    check_adapter_weights(build_without_weights(model), peft_config, weights, name)
    write_out_patterns(list_modules(model), peft_config, name)
    peft_config.inference_mode = not is_trainable
    with naming_adapter(name):
        peft.inject_adapter_in_model(peft_config, model, adapter_name)
    peft.set_peft_model_state_dict(model, {key: item.data[...] for key, item in weights.items()}, adapter_name)
    model._hf_peft_config_loaded = True
    if not is_trainable:
        model.eval()


def build_without_weights(model: PreTrainedModel) -> PreTrainedModel:
    with torch.device("meta"):
        return type(model)(copy.deepcopy(model.config))


def list_modules(model: PreTrainedModel) -> list[str]:
    return [name for name, _ in model.named_modules()]


def check_adapter_file(model: PreTrainedModel, name: str) -> None:
    """Refuse an adapter of PEFT that does not fit a model, by names and shapes alone.

    Args:
        model: The base without weights (on "meta"); gets the layers of the adapter.
        name: Folder or Hub id of the adapter.

    Raises:
        ValueError: naming file, weight and shapes.
    """
    check_adapter_weights(model, read_adapter_config(name, {}), read_adapter(name, {}), name)


def check_adapter_weights(model: PreTrainedModel, peft_config: Any, weights: dict[str, Weight], name: str) -> None:
    """As `check_adapter_file`, for an adapter that was read; its numbers are looked at, too."""
    refuse_infinite(weights)
    adapter_name, peft_config = "default", copy.deepcopy(peft_config)
    write_out_patterns(list_modules(model), peft_config, name)
    with naming_adapter(name), torch.device("meta"):
        import_peft().inject_adapter_in_model(peft_config, model, adapter_name)
    empty = {key: torch.empty(item.shape, dtype=item.dtype, device="meta") for key, item in weights.items()}
    try:
        renamed = rename_for_model(model, empty, adapter_name)
        found = find_unfit(model, renamed, adapter_name, brought=list_brought(model))
    except KeyError as error:  # PEFT, of a part of a module that the adapter brings whole
        found = {"missing_keys": [error.args[0]], "mismatched_keys": [], "unexpected_keys": []}
    for kind in ("missing_keys", "unexpected_keys"):
        found[kind] = [_plain(key, adapter_name) for key in found[kind]]
    found["mismatched_keys"] = [(_plain(key, adapter_name), *shapes) for key, *shapes in found["mismatched_keys"]]
    refuse_unfit_weights(found, weights, name)


def list_brought(model: PreTrainedModel) -> set[str]:
    """Weights of a model that may stand beside an adapter: those of embeddings, which PEFT writes (peft 0.21,
    save_and_load.py), and the newline, which is no layer that PEFT adapts (`training/starting_model.py`)."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    ids = {id(parameter) for layer in layers if layer is not None for parameter in layer.parameters()}
    named = model.named_parameters(remove_duplicate=False)
    return {key for key, parameter in named if id(parameter) in ids or key.endswith("image_newline")}


def find_unfit(
    model: PreTrainedModel, state_dict: dict[str, torch.Tensor], adapter_name: str, *, brought: set[str] | None = None
) -> dict[str, list]:
    """What does not fit of an adapter, compared with what PEFT would save of the model.

    Args:
        model: With the layers of the adapter.
        state_dict: The weights of the adapter by the names that the model gives them.
        brought: Which of the model's own weights may be among them; None for all.

    Returns:
        `missing_keys`, `unexpected_keys`, and `mismatched_keys` with the shape that is found and the one expected.
    """
    saved = import_peft().get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    expected = rename_for_model(model, saved, adapter_name)
    own = model.state_dict()
    shapes = [(key, list(item.shape), list(own[key].shape)) for key, item in state_dict.items() if key in own]
    known = expected.keys() | (own.keys() if brought is None else brought)
    return {
        "missing_keys": sorted(expected.keys() - state_dict.keys()),
        "unexpected_keys": sorted(state_dict.keys() - known),
        "mismatched_keys": [entry for entry in shapes if entry[1] != entry[2]],
    }


def rename_for_model(
    model: PreTrainedModel, state_dict: dict[str, torch.Tensor], adapter_name: str
) -> dict[str, torch.Tensor]:
    """The weights of an adapter's file by the names that a model with its layers gives them, as PEFT would load them.

    Raises:
        KeyError: with the name of a weight that is missing in a module which the adapter brings whole.
    """
    renamed = {}
    model.load_state_dict = lambda state_dict, **kwargs: renamed.update(state_dict)
    try:
        import_peft().set_peft_model_state_dict(model, dict(state_dict), adapter_name)
    finally:
        del model.load_state_dict
    return renamed


def _plain(key: str, adapter_name: str) -> str:
    """What the file of an adapter calls a weight in a model."""
    return ".".join(part for part in key.split(".") if part not in (adapter_name, "modules_to_save"))


def refuse_unfit_state(model: PreTrainedModel, state_dict: dict[str, Any], prefix: str) -> None:
    """Refuse a state dict with an adapter's weights that do not fit, or with nothing at all, for an adapted model.

    Args:
        state_dict: May hold other weights too.
        prefix: How the model's names begin in it.

    Raises:
        ValueError: naming the weight.
    """
    given = {key.removeprefix(prefix): item for key, item in state_dict.items() if key.startswith(prefix)}
    for adapter_name, peft_config in vars(model).get("peft_config", {}).items():
        tuner = _TUNER_PREFIXES.get(peft_config.peft_type)
        of_tuner = {key for key in given if tuner is not None and f".{tuner}" in key}
        named = {name for name in model.peft_config for key in of_tuner if name in key.split(".")}
        if tuner is None or (given and not of_tuner) or (named and adapter_name not in named):
            continue
        others = model.peft_config.keys() - {adapter_name}
        own = {key: item for key, item in given.items() if not others & set(key.split("."))}
        found = find_unfit(model, own, adapter_name) | {"mismatched_keys": []}  # torch refuses other shapes
        try:
            refuse_unfit_weights(found, {}, f"adapter {adapter_name!r}")
        except ValueError as error:
            raise ValueError(
                f"{error}; AutoModelForVision2Seq.from_pretrained(adapter) names the file, and reads those of the "
                "original LLaVA too"
            ) from error
