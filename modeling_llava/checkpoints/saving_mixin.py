"""`save_pretrained` in every layout, and what would not come back from it.

A layout gives back what was in memory, or saving is refused: what is written is read once more (`layouts.py`), and
weights that are packed, quantized or reordered for answering have no place in any file.
"""

import contextlib
import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.integrations import peft as integration

from modeling_llava.acceleration.cpu_layers import Int8Linear, PackedLinear
from modeling_llava.acceleration.fused_layers import Columns
from processing_llava.original.original_folder import OriginalFolder

from .layouts import refuse_changes, write_original_config, write_transformers_config
from .original_weights import TOWER, complete_tower, refuse_missing_source
from .weight_names import add_transformers_only_weights, check_layout, rename_from_ours


class SavingMixin:
    """Writes the layouts of other code; to be listed before PreTrainedModel."""

    checkpoint_layout = "any_llava"
    """The layout that was loaded, which saving writes unless it is told another one."""
    source_folder: OriginalFolder | None = None
    """The original folder that a model was loaded from, which saving in that layout reads once more."""

    def __init__(self, config: PreTrainedConfig, *args, **kwargs) -> None:
        super().__init__(config, *args, **kwargs)
        self._built_config = copy.deepcopy(self.config)

    def save_pretrained(
        self, save_directory: str | Path, *args, layout: str | None = None, state_dict: dict | None = None, **kwargs
    ) -> None:
        """As in transformers, in a layout of choice.

        Args:
            layout: "any_llava", "original" (that of haotian-liu/LLaVA) or "transformers" (that of transformers' own
                `llava` and `llava_next`). Default: the layout that was loaded.

        Raises:
            ValueError: naming the field that the layout cannot express; and for packed or int8 weights, which no
                layout has.
        """
        if any(isinstance(module, (Int8Linear, PackedLinear, Columns)) for module in self.modules()):
            raise ValueError(
                "got a model whose weights are fused, packed or in int8, for answering; expected its own: load "
                "it with from_pretrained and without quantization, and save that"
            )
        layout = layout or self.checkpoint_layout
        check_layout(layout)
        kwargs["save_original_format"] = False
        if not self._hf_peft_config_loaded:
            self._refuse_unwritable(layout)
        if layout == "any_llava" or self._hf_peft_config_loaded:
            with accept_any_peft():
                return super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)
        if self.base_model is self:
            raise ValueError(
                f"got a {type(self).__name__}, which has no output layer; expected a model with one to write the "
                f"layout {layout!r}"
            )
        state_dict = dict(self.state_dict() if state_dict is None else state_dict)
        if self.config.tie_word_embeddings:
            state_dict.pop("lm_head.weight", None)
        if layout == "original":
            source = self.source_folder if self.checkpoint_layout == "original" else None
            vision_tower = self.config.vision_config.name_or_path
            if source is not None:
                refuse_missing_source(source, vision_tower)
            written_config = write_original_config(self.config, source=source)
            if source is not None:
                complete_tower(state_dict, source, vision_tower)
            if Path(vision_tower).is_dir():
                # As seen from there; a path of this machine stays here.
                written_config["mm_vision_tower"] = os.path.relpath(vision_tower, save_directory)
            if any(key.startswith(TOWER) for key in state_dict):
                written_config["unfreeze_mm_vision_tower"] = True
        else:
            built_in = write_transformers_config(self.config)
            add_transformers_only_weights(
                state_dict,
                vocab_size=built_in.text_config.vocab_size,
                vision_size=built_in.vision_config.hidden_size,
            )
            written_config = built_in.to_dict()
        renamed = {rename_from_ours(key, layout): value for key, value in state_dict.items()}
        super().save_pretrained(save_directory, *args, state_dict=renamed, **kwargs)
        text = json.dumps(written_config, indent=2, sort_keys=True) + "\n"
        (Path(save_directory) / "config.json").write_text(text, encoding="utf-8")

    def _refuse_unwritable(self, layout: str) -> None:
        """Refuse weights that a layout would not give back.

        Raises:
            ValueError: if they are quantized, or the configuration was changed to say what is not computed.
        """
        if layout != "any_llava" and getattr(self, "is_quantized", False):
            raise ValueError(
                f"got a model quantized by {self.quantization_method.value} for the layout {layout!r}; expected 16 or "
                "32 bits, as that layout has no place for other weights: save with layout='any_llava'"
            )
        # bitsandbytes 0.50 reorders the weights of 4 bits on a CPU when they first compute, and saves them so.
        if any(getattr(item, "packing_format_for_cpu", False) for item in self._quantization_states()):
            raise ValueError(
                "got a model in 4 bits that has computed on a CPU, for which bitsandbytes has reordered its "
                "weights; expected them as they were loaded: load it again, and save it before it computes"
            )
        refuse_changes(self.config, self._built_config)
        self.config.check()
        vocab_size, num_rows = self.config.text_config.vocab_size, self.get_input_embeddings().num_embeddings
        if vocab_size != num_rows:
            raise ValueError(
                f"got text_config.vocab_size={vocab_size} in the configuration of a model with {num_rows} embeddings; "
                f"expected {num_rows}: call resize_token_embeddings, which sets both"
            )
        output_layer = self.get_output_embeddings()
        is_tied = output_layer is not None and output_layer.weight is self.get_input_embeddings().weight
        if output_layer is not None and is_tied != self.config.tie_word_embeddings:
            raise ValueError(
                f"got tie_word_embeddings={self.config.tie_word_embeddings} in the configuration of a model whose "
                f"output layer {'shares' if is_tied else 'does not share'} its input embeddings; expected "
                f"{is_tied}: set it before the model is loaded"
            )

    def _quantization_states(self) -> list[Any]:
        """What bitsandbytes keeps of each weight of 4 bits."""
        if not getattr(self, "is_quantized", False):
            return []
        return [getattr(parameter, "quant_state", None) for parameter in self.parameters()]


@contextlib.contextmanager
def accept_any_peft() -> Iterator[None]:
    """Let transformers read an adapter of a model whatever PEFT is installed: 5.24 asks for 0.22, which is not
    published (integrations/peft.py)."""
    wanted, integration.MIN_PEFT_VERSION = integration.MIN_PEFT_VERSION, "0"
    try:
        yield
    finally:
        integration.MIN_PEFT_VERSION = wanted
