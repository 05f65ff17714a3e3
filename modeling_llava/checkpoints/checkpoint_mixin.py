"""`from_pretrained` and `save_pretrained` for every layout that a LLaVA was ever published in.

Loading: config.json is translated, the weights of all parts are gathered under our names, transformers gets them as
one state dict whose tensors are not read yet, and a LoRA adapter is attached and merged, or kept. Where nobody chose
a dtype, a slow CPU gets float32 (`acceleration.devices`); fewer bits have names (`acceleration.quantization`).
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from modeling_llava.acceleration.devices import with_default_dtype
from modeling_llava.acceleration.quantization import (
    ON_CPU,
    quantize_to_int8,
    refuse_unchanged,
    with_quantization,
)
from processing_llava.messages import write_line
from processing_llava.original.file_checks import DOWNLOAD_KWARGS, find_file, in_one_line, select_download
from processing_llava.original.original_folder import OriginalFolder, check_model_type, override_tower, recognise

from .adapter_config import import_peft, read_adapter_config
from .generation_settings import check_generation_config, leave_out_settings, read_generation_config
from .layouts import restore_written, translate_config
from .original_adapters import (
    PEFT_PREFIX,
    add_original_adapter,
    attach_adapter,
    has_original_names,
    load_adapted,
    load_original_adapter,
    read_adapter,
    refuse_unfit_state,
)
from .original_weights import gather_original_weights, keep_used
from .saving_mixin import SavingMixin
from .weight_checks import check_fit, refuse_unfit
from .weight_files import (
    Weight,
    find_base_dtype,
    has_model,
    read_as,
    read_model,
    refuse_integers,
    refuse_needless_bits,
    refuse_quantized,
)
from .weight_names import rename_to_ours

logger = logging.get_logger(__name__)

# Arguments of from_pretrained that are attributes of configurations too.
_NOT_FOR_CONFIG = ("dtype", "torch_dtype", "attn_implementation", "quantization_config")


class CheckpointMixin(SavingMixin):
    """Reads the layouts of other code, and writes them; to be listed before PreTrainedModel."""

    @classmethod
    @in_one_line()
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | None,
        *model_args,
        config: PreTrainedConfig | str | None = None,
        base_model: str | None = None,
        delta: bool | None = None,
        vision_tower: str | None = None,
        merge_adapter: bool = True,
        quantization: str | None = None,
        **kwargs,
    ) -> PreTrainedModel:
        """As in transformers, for checkpoints in any layout.

        Without `dtype`, `device_map` and quantization, a checkpoint of 16 bits is loaded as float32 on a machine
        without GPU whose CPU is slow with them; `dtype="auto"` gives its own dtype everywhere.

        Args:
            pretrained_model_name_or_path: Folder or Hub id: a model of ours, of transformers' `llava` or `llava_next`,
                or of the original LLaVA (complete, LoRA, projector only, delta); or an adapter of any of them.
            base_model: Folder or Hub id of the model under a LoRA, a projector, a delta or an adapter that does not
                say its own.
            delta: Whether an original folder is to be added to `base_model`. Default: what its norm weights say.
            vision_tower: Folder or Hub id of the tower, instead of the one that an original folder names.
            merge_adapter: Add an original LoRA to the weights; False keeps it as an adapter of PEFT.
            quantization: "int4", "fp8" or "nf4" on a GPU, "int8" on a CPU: bits of the language model, for
                answering only. The rest is bfloat16 or float32.

        Raises:
            ValueError: naming file, weight, and expected and found shape, if something does not fit. In our own layout
                `output_loading_info=True` tells it instead.
        """
        refuse_bit_arguments(kwargs)
        if quantization is not None:
            kwargs = with_quantization(kwargs, quantization)
        if pretrained_model_name_or_path is None:
            loaded = super().from_pretrained(None, *model_args, config=config, **kwargs)
        else:
            base_model, vision_tower = (None if part is None else str(part) for part in (base_model, vision_tower))
            parts = {"base_model": base_model, "delta": delta, "vision_tower": vision_tower}
            loaded = cls._load(
                str(pretrained_model_name_or_path),
                *model_args,
                config=config,
                parts=parts,
                merge=merge_adapter,
                **kwargs,
            )
        if quantization is not None:
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            if quantization == ON_CPU:
                quantize_to_int8(model)
            else:
                refuse_unchanged(model, quantization)
        return loaded

    @classmethod
    def _load(
        cls, name: str, *args, config: PreTrainedConfig | str | None, parts: dict[str, Any], merge: bool, **kwargs
    ) -> Any:
        """Recognise the layout, and load by it."""
        download = select_download(kwargs)
        check_generation_config(name, download)
        if config is None:
            found = recognise(name, download, base_model=parts["base_model"])
            if found.layout == "adapter":
                given = {key: value for key, value in parts.items() if key != "base_model"}
                return load_adapted(cls, found.base, name, download, *args, merge=merge, **given, **kwargs)
            raw = found.raw
        elif isinstance(config, cls.config_class):
            # The fields are settled; how the weights are named is still for the folder to say.
            raw = recognise(name, download, base_model=parts["base_model"]).raw
        elif isinstance(config, PreTrainedConfig):
            stored = recognise(name, download, base_model=parts["base_model"])
            is_of_file = stored.layout == "transformers" and stored.raw["model_type"] == config.model_type
            raw = restore_written(config, stored.raw) if is_of_file else config.to_dict()
        else:
            raw = None
        if not raw and not isinstance(config, cls.config_class):
            raw, _ = PreTrainedConfig.get_config_dict(name if config is None else config, **download)
        layout = check_model_type(raw)
        refuse_parts(parts, layout, name)
        adapter = (kwargs.pop("adapter_kwargs", None) or {}).get("_adapter_model_path")
        if adapter is None and layout != "original" and find_file(name, "adapter_config.json", download) is not None:
            adapter = name
        if layout == "any_llava" and adapter != name:
            if has_model(name, download):
                cls._check_own(name, config if isinstance(config, cls.config_class) else raw, **kwargs)
            stored = config.dtype if isinstance(config, cls.config_class) else raw.get("dtype", raw.get("torch_dtype"))
            model, info, wants_info = cls._load_own(name, *args, config=config, stored=stored, **kwargs)
        else:
            if not isinstance(config, cls.config_class):
                translated = translate_config(raw, name=name, **parts, **download)
                held = {key: kwargs.pop(key) for key in _NOT_FOR_CONFIG if key in kwargs}
                config, kwargs = cls.config_class.from_dict(translated, return_unused_kwargs=True, **kwargs)
                kwargs |= held
            raw = override_tower(raw, parts["vision_tower"]) if layout == "original" else raw
            folder = OriginalFolder(name=name, config=raw, base_model=parts["base_model"], download=download)
            model, info, wants_info = cls._load_renamed(
                folder, *args, layout=layout, config=config, delta=parts["delta"], **kwargs
            )
            if layout == "original" and find_file(name, "adapter_config.json", download) is not None:
                model, adapter = load_original_adapter(model, folder, merge=merge), None
        leave_out_settings(model, name)
        if adapter is not None:
            model.load_adapter(adapter)
        return (model, info) if wants_info else model

    @classmethod
    @in_one_line()
    def check_files(
        cls, name: str, config: PreTrainedConfig, *, base_model: str | None = None, vision_tower: str | None = None
    ) -> None:
        """Refuse weights that are not those of a configuration, as `from_pretrained` does, by the headers of files.

        Args:
            name: Folder or Hub id; of an adapter, its base is looked at.
            config: What its config.json says.

        Raises:
            ValueError: naming file, weight and shapes.
        """
        found = recognise(name, {}, base_model=base_model)
        if found.layout == "adapter":
            cls.check_files(found.base, config)
        elif found.layout == "any_llava":
            if has_model(name, {}):
                cls._check_own(name, config)
        else:
            folder = OriginalFolder(name=name, config=override_tower(found.raw, vision_tower), base_model=base_model)
            weights, _ = read_layout(folder, config, found.layout)
            check_fit(cls, config, keep_used(weights, config), name)

    @classmethod
    def _check_own(cls, name: str, config: PreTrainedConfig | dict[str, Any], **kwargs) -> None:
        """Refuse weights in our own layout that are not those of a configuration.

        Raises:
            ValueError: naming file, weight and shapes.
        """
        weights = read_model(name, select_download(kwargs))
        if isinstance(config, dict):
            refuse_needless_bits(name, config, weights)
            fields = {key: value for key, value in kwargs.items() if key not in _NOT_FOR_CONFIG}
            config, _ = cls.config_class.from_dict(dict(config), return_unused_kwargs=True, **fields)
        is_quantized = bool(getattr(config, "quantization_config", None))
        if not is_quantized:
            refuse_integers(name, weights)
        _, wants_info, takes_any_shape = _take_checks(kwargs)
        is_exact = not (is_quantized or wants_info)
        check_fit(cls, config, weights, name, is_exact=is_exact, takes_any_shape=takes_any_shape)

    @classmethod
    def _load_own(cls, name: str, *args, stored: Any, **kwargs) -> tuple[PreTrainedModel, dict[str, Any], bool]:
        """A model in our own layout; what was loaded, and whether the caller asked for that."""
        download = select_download(kwargs)
        checks, wants_info, takes_any_shape = _take_checks(kwargs)
        model, info = super().from_pretrained(name, *args, **checks, **with_default_dtype(kwargs, stored=stored))
        if not wants_info:  # which tells the caller
            refuse_unfit(model, info, name, download=download, takes_any_shape=takes_any_shape)
        return model, info, wants_info

    @classmethod
    def _load_renamed(
        cls, folder: OriginalFolder, *args, layout: str, config: PreTrainedConfig, delta: bool | None, **kwargs
    ) -> tuple[PreTrainedModel, dict[str, Any], bool]:
        """As `_load_own`, for any folder whose weights are gathered here, under our names.

        Args:
            folder: Also one that is no original.
        """
        name = folder.name
        checks, wants_info, takes_any_shape = _take_checks(kwargs)
        kwargs = {key: value for key, value in kwargs.items() if key not in DOWNLOAD_KWARGS}
        weights, line = read_layout(folder, config, layout, delta=delta)
        if line is not None:
            logger.warning(write_line(line))
        weights = keep_used(weights, config)
        is_exact = not (folder.config.get("quantization_config") or wants_info)
        check_fit(cls, config, weights, name, is_exact=is_exact, takes_any_shape=takes_any_shape)
        config.dtype = config.dtype or find_base_dtype(weights)
        kwargs = with_default_dtype(kwargs, stored=config.dtype)
        # A GPU converts by itself, what it is sent in fewer bytes.
        dtype = kwargs.get("dtype") if kwargs.get("device_map") is None else None
        state_dict = {key: read_as(item, dtype) for key, item in weights.items()}
        model, info = super().from_pretrained(None, *args, config=config, state_dict=state_dict, **checks, **kwargs)
        refuse_unfit(model, info, name, weights=weights, takes_any_shape=takes_any_shape)
        # PEFT writes the second one into its adapters.
        model.config.name_or_path = model.name_or_path = name
        if model.can_generate():
            model.generation_config = read_generation_config(name, config, folder.download)
        model.checkpoint_layout = layout
        if layout == "original":
            # Saving may happen somewhere else.
            model.source_folder = replace(folder, name=str(Path(name).resolve()) if Path(name).is_dir() else name)
        return model, info, wants_info

    @in_one_line()
    def load_adapter(
        self,
        peft_model_id: str | None = None,
        adapter_name: str | None = None,
        peft_config: Any = None,
        adapter_state_dict: dict[str, Any] | None = None,
        **kwargs,
    ) -> Any:
        """As in transformers; an adapter of the original LLaVA gets our names.

        Raises:
            ValueError: naming the weight of the adapter that has no place in this model, the place that has no weight
                in the adapter, or two shapes; the model is as before.
        """
        import_peft()
        is_known = self._hf_peft_config_loaded and (adapter_name or "default") in self.peft_config
        if is_known or (peft_model_id is None and (peft_config is None or adapter_state_dict is None)):
            # Weights to exchange, or too little: transformers knows what to do.
            return super().load_adapter(peft_model_id, adapter_name, peft_config, adapter_state_dict, **kwargs)
        download = select_download(kwargs | (kwargs.get("adapter_kwargs") or {}))
        folder = OriginalFolder(name=str(peft_model_id), config={}, download=download)
        settings = {"adapter_name": adapter_name or "default"}
        if adapter_state_dict is not None:
            given = {key: Weight("adapter_state_dict", key, value) for key, value in adapter_state_dict.items()}
            weights = {key.removeprefix(PEFT_PREFIX): weight for key, weight in given.items()}
        else:
            weights = read_adapter(folder.name, folder.download)
            if has_original_names(weights):
                return add_original_adapter(self, folder, merge=False, **settings)
        if peft_config is None:
            peft_config = read_adapter_config(folder.name, folder.download)
        settings["is_trainable"] = kwargs.get("is_trainable", False)
        attach_adapter(self, peft_config, weights, folder.name, **settings)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> torch.nn.Module:
        """As in transformers, but that an image token beyond the vocabulary, which needs no embedding, gets none.

        PEFT's AutoPeftModel gives every token of the processor one, without asking (peft 0.21, auto.py).
        """
        num_rows = self.get_input_embeddings().num_embeddings
        if new_num_tokens == num_rows + 1 and self.config.image_token_id == num_rows:
            logger.warning(f"the image token needs no embedding; the model keeps its {num_rows}")
            return self.get_input_embeddings()
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args) -> None:
        # PEFT's own door: its PeftModel drops what has no place in silence (peft 0.21, utils/save_and_load.py).
        refuse_unfit_state(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args, **kwargs) -> Any:
        """As in PyTorch; weights may also have the names that `save_pretrained` gives them by default.

        So a Trainer resumes, and loads the best model, from what it saved of a model in any layout.
        """
        if self.checkpoint_layout != "any_llava":
            own = self.state_dict().keys()
            state_dict = {
                key if key in own else rename_to_ours(key, self.checkpoint_layout): value
                for key, value in state_dict.items()
            }
        return super().load_state_dict(state_dict, *args, **kwargs)


def read_layout(
    folder: OriginalFolder, config: PreTrainedConfig, layout: str, *, delta: bool | None = None
) -> tuple[dict[str, Weight], str | None]:
    """The weights of a folder in any layout, under our names; and a line on where they come from, if that may differ.

    Raises:
        ValueError: naming the file that cannot be read, or weights that are stored in fewer bits.
    """
    if layout == "original":
        return gather_original_weights(folder, config, delta=delta)
    weights = read_model(folder.name, folder.download)
    if not folder.config.get("quantization_config"):
        refuse_integers(folder.name, weights)
    if layout == "transformers":
        refuse_quantized(folder.name, folder.config, weights)
        weights = {rename_to_ours(key, "transformers"): item for key, item in weights.items()}
    return weights, None


def _take_checks(kwargs: dict[str, Any]) -> tuple[dict[str, bool], bool, bool]:
    """Take two arguments out: what transformers is told in place of them, and what the caller said."""
    wants_info = kwargs.pop("output_loading_info", False)
    takes_any_shape = kwargs.pop("ignore_mismatched_sizes", False)
    return {"ignore_mismatched_sizes": True, "output_loading_info": True}, wants_info, takes_any_shape


def refuse_parts(parts: dict[str, Any], layout: str, name: str) -> None:
    """Refuse a part for a checkpoint that has its own.

    Raises:
        ValueError: naming both.
    """
    for argument, value in parts.items():
        if value is not None and layout != "original":
            raise ValueError(
                f"got {argument}={value!r} for {name!r}, which is a complete model; expected it for a LoRA, a "
                "projector or a delta of the original LLaVA: leave it out"
            )
    if parts["delta"] and parts["base_model"] is None:
        raise ValueError(
            f"got delta=True for {name!r} and no base; expected base_model=: the folder or Hub id of the model that "
            "it is to be added to"
        )


def refuse_bit_arguments(kwargs: dict[str, Any]) -> None:
    """Refuse, and take out where they ask for nothing, arguments that transformers 5 dropped.

    Raises:
        ValueError: naming what stands for them.
    """
    for argument in ("load_in_4bit", "load_in_8bit"):
        if kwargs.pop(argument, False):
            raise ValueError(
                f"got {argument}=True; expected quantization_config=BitsAndBytesConfig({argument}=True), or "
                "quantization= with a name, such as 'int8' on a CPU or 'nf4' on a GPU"
            )
