"""The model and the processor that a recipe starts from, LoRA on it, and the parts of it that train.

LoRA is on the language model, with the projector fully trained beside it: what LLaVA calls its LoRA recipe. What is
surprising: layers are chosen by their full path. By their last word alone ("q_proj"), as the original and PEFT's
shortcuts choose them, the layers of a CLIP tower would get adapters too. A list of words, and "all-linear", therefore
leave the tower out; a pattern of full paths reaches it.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, prepare_model_for_kbit_training
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from modeling_llava import AutoModelForVision2Seq
from modeling_llava.acceleration.packed_attention import use_packed_attention
from modeling_llava.acceleration.quantization import four_bit_config
from modeling_llava.checkpoints.model_names import load_training_processor
from processing_llava import AnyLlavaProcessor
from processing_llava.original.original_folder import find_installed, name_installed
from processing_llava.prompt_ids import check_learn_tokens

from .recipe import Recipe

LORA_DEFAULTS = {"r": 128, "lora_alpha": 256, "lora_dropout": 0.05, "bias": "none"}
"""The defaults of LLaVA v1.5."""
NEWLINE = "image_newline"
"""The one part of a LLaVA that is a parameter and no module; only models that cut images into tiles have it."""


def load_processor(recipe: Recipe) -> AnyLlavaProcessor:
    """The processor of the model, with the conversation format, the image mode and the image limits of the recipe.

    Raises:
        ValueError: as `load_training_processor`, if the model was not made for the image mode, or `learn_tokens` are
            none of its tokenizer.
    """
    processor = load_training_processor(recipe.model, template=recipe.template, backend=recipe.image_backend)
    if recipe.image_aspect_ratio == "anyres" and not processor.image_processor.image_grid_pinpoints:
        raise ValueError(
            f"got image_aspect_ratio 'anyres' for {recipe.model!r}, which has no image_grid_pinpoints; expected a "
            "model with them: make one with `llava assemble`"
        )
    if recipe.image_aspect_ratio is not None:
        processor.image_processor.image_aspect_ratio = recipe.image_aspect_ratio
    processor.image_processor.limits = recipe.image_limits
    if recipe.learn_tokens:
        check_learn_tokens(recipe.learn_tokens, processor.tokenizer, image_token=processor.image_token)
        processor.learn_tokens = recipe.learn_tokens
    return processor


def load_model(recipe: Recipe, *, bf16: bool) -> PreTrainedModel:
    """The model that a recipe starts from, with the parts that it trains ready to train.

    What trains is float32, also where `bf16` computes in bfloat16; what is frozen under a LoRA is then bfloat16 too.

    Raises:
        ValueError: if the model is an adapter.
    """
    keeps_bfloat16 = recipe.uses_lora and bf16
    model = AutoModelForVision2Seq.from_pretrained(
        find_installed(recipe.model),
        dtype=torch.bfloat16 if keeps_bfloat16 else torch.float32,
        attn_implementation=recipe.attn_implementation,
        quantization_config=four_bit_config() if recipe.stage == "qlora" else None,
    )
    _refuse_adapter(model, recipe.model)
    # Whatever was loaded, checkpoints are in our layout, so that a run can be resumed from them.
    model.checkpoint_layout = "any_llava"
    if recipe.tokens_per_batch is not None:
        use_packed_attention(model)
    if recipe.uses_lora:
        return add_lora(model, recipe.lora, trained_parts=recipe.trained_parts, autocast=bf16)
    freeze_all_but(model, recipe.trained_parts)
    return model


def _refuse_adapter(model: PreTrainedModel, name: str) -> None:
    """Keep a run away from a model that is an adapter over another one, whose adapters it would train anew or cover.

    Args:
        name: Where the model comes from.

    Raises:
        ValueError: if there are adapters.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            f"got model {name!r}, which is an adapter; expected a whole model: make one with `llava merge {name} "
            "--out FOLDER`"
        )


def add_lora(
    model: PreTrainedModel, settings: dict[str, Any], *, trained_parts: tuple[str, ...], autocast: bool = False
) -> PeftModel:
    """Wrap a LLaVA so that adapters in its language model train, and whole parts beside them.

    Args:
        model: Its weights are frozen.
        settings: Fields of PEFT's LoraConfig. `target_modules` as a list, or "all-linear", never names layers of the
            tower: it is frozen, or trains as a whole.
        trained_parts: What trains fully and is saved with the adapter: "mm_projector", "vision_tower", and
            "image_newline", which a model may be without.
        autocast: The model trains under `torch.autocast`, which gives every product its 16 bits. PEFT would cast each
            input to 32 bits before (PEFT 0.21, tuners/tuners_utils.py), to be cast down again, and the backward pass
            would keep the copy.
    """
    if getattr(model, "is_quantized", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    modules = [part for part in trained_parts if part != NEWLINE]
    config = _keep_off_tower({"target_modules": None} | LORA_DEFAULTS | settings, model)
    config["modules_to_save"] = modules + list(settings.get("modules_to_save") or ())
    wrapped = LlavaPeftModel(model, LoraConfig(**config))
    for name, parameter in model.base_model.vision_tower.named_parameters():
        # PEFT's `bias: all` means every bias of the model (PEFT 0.21, tuners/tuners_utils.py), and those of the tower
        # may be frozen.
        if name.endswith(".bias") and not {"lora_B", "modules_to_save"} & set(name.split(".")):
            parameter.requires_grad_(False)
    newline = model.base_model.image_newline
    if NEWLINE in trained_parts and newline is not None:
        newline.requires_grad_(True)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            # Updates are smaller than what 16-bit weights can take up.
            parameter.data = parameter.data.float()
    for module in wrapped.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = not autocast
    return wrapped


def _keep_off_tower(config: dict[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """Fields of LoraConfig whose `target_modules`, unless they are a pattern, have no layer of the vision tower."""
    if config["target_modules"] in (None, "all-linear"):
        if config.get("layers_to_transform") is None:
            return config | {"target_modules": find_targets(model)}
        # PEFT counts layers for a list of words alone (PEFT 0.21, tuners/tuners_utils.py).
        config = config | {"target_modules": _find_words(model)}
    if isinstance(config["target_modules"], str):
        return config
    excluded = config.get("exclude_modules") or ()
    if not isinstance(excluded, str):
        excluded = "|".join(rf"(.*\.)?{re.escape(name)}" for name in excluded)
    return config | {"exclude_modules": "|".join(filter(None, (r"model\.vision_tower\..*", excluded)))}


def find_targets(model: PreTrainedModel) -> str:
    """A pattern for the full paths of all linear layers inside the language model."""
    return rf"model\.language_model\..*\.({'|'.join(_find_words(model))})"


def _find_words(model: PreTrainedModel) -> list[str]:
    """The last words of the names of all linear layers inside the language model."""
    layers = model.base_model.language_model.named_modules()
    return sorted({name.rsplit(".", 1)[-1] for name, module in layers if isinstance(module, nn.Linear)})


class LlavaPeftModel(PeftModel):
    """A PeftModel whose adapter file PEFT and transformers read alike, and which holds a trained `image_newline`.

    PEFT writes whole modules beside an adapter, but no single parameters; it reads them, and so does transformers. And
    it leaves out the last word of DoRA's magnitudes (PEFT 0.21, tuners/lora/model.py), without which transformers does
    not find them.
    """

    def save_pretrained(
        self,
        save_directory: str | Path,
        *args,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        **kwargs,
    ) -> None:
        super().save_pretrained(
            str(save_directory), *args, is_main_process=is_main_process, state_dict=state_dict, **kwargs
        )
        if is_main_process:
            _name_base(Path(save_directory, "adapter_config.json"))
        newline = self.get_base_model().base_model.image_newline
        has_newline = newline is not None and newline.requires_grad
        if not is_main_process or not (has_newline or self.active_peft_config.use_dora):
            return
        path = Path(save_directory, "adapter_model.safetensors")
        weights = {
            f"{name}.weight" if name.endswith("lora_magnitude_vector") else name: value
            for name, value in load_file(path).items()
        }
        if has_newline:
            name = f"base_model.model.model.{NEWLINE}"
            weights[name] = self.state_dict()[name] if state_dict is None else state_dict[name]
        save_file(weights, path, metadata={"format": "pt"})


def _name_base(path: Path) -> None:
    """Have an adapter of the embedded model name it as every machine finds it, and not by a folder of this one."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = name_installed(config["base_model_name_or_path"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


# Parts: whose a parameter is, which of them train, and how many parameters they have.


def part_of(parameter_name: str) -> str:
    """The part of the model that a parameter belongs to: "mm_projector", "language_model", "vision_tower", ..."""
    return parameter_name.removeprefix("base_model.model.").removeprefix("model.").split(".")[0]


def freeze_all_but(model: nn.Module, trained_parts: tuple[str, ...]) -> None:
    """Let these parts train and no other."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in trained_parts)


def count_elements(parameter: nn.Parameter) -> int:
    """Elements of a parameter; one that ZeRO-3 has sharded is empty, and says how many it had (PEFT 0.21,
    peft_model.py)."""
    return parameter.numel() or parameter.ds_numel


def count_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """For each part, its parameters and how many of them train."""
    counts: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        # PEFT keeps the parameters that a part started from beside those that train (PEFT 0.21, utils/other.py).
        if "original_module" in name.split("."):
            continue
        part = part_of(name)
        total, trained = counts.get(part, (0, 0))
        number = count_elements(parameter)
        counts[part] = (total + number, trained + number * parameter.requires_grad)
    return counts


def keep_float32(model: nn.Module) -> None:
    """Train the parts beside the adapters of a 4-bit model in float32.

    TRL casts all that trains there to bfloat16, as QLoRA's paper does with adapters (TRL 1.16,
    trainer/sft_trainer.py). The steps of a projector that was trained before are smaller than what its bfloat16
    weights can take up.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" not in name:
            parameter.data = parameter.data.float()
