"""Key/value states that lie in memory with room to spare.

transformers copies all of them for every token, which takes a tenth of the time of one row on a processor, and a third
of that of eight.
"""

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


def leave_room(states: DynamicCache) -> None:
    """Let states that are still empty grow without being copied, in place; sliding windows stay as they are."""
    states.layers = [
        RoomyLayer() if type(layer) is DynamicLayer and not layer.is_initialized else layer for layer in states.layers
    ]
    # Layers of a cache that was made without a config come with the first states.
    if states.layer_class_to_replicate is DynamicLayer:
        states.layer_class_to_replicate = RoomyLayer


def count_spare_tokens(num_rows: int) -> int:
    """Room behind the states of each row. What more of it would save in copies it would take in memory."""
    return max(16, 128 // num_rows)


class RoomyLayer(DynamicLayer):
    """States of one layer at the beginning of a buffer, whose rest takes the next tokens; the same values.

    States that were read before are overwritten where the cache was cut since and has grown again.
    """

    def __init__(self) -> None:
        super().__init__()
        self._buffers: dict[str, torch.Tensor] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # A backward pass needs the states as they were, and a compiled graph knows no addresses.
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._append("keys", self.keys, key_states)
        self.values = self._append("values", self.values, value_states)
        return self.keys, self.values

    def _append(self, name: str, states: torch.Tensor, new_states: torch.Tensor) -> torch.Tensor:
        """States `[B, heads, L, width]` with new ones behind them."""
        start = states.shape[-2] if states.numel() else 0
        stop = start + new_states.shape[-2]
        buffer = self._buffers.get(name)
        # Beams and selected rows are other tensors than the one that was returned here.
        is_here = buffer is not None and (states.data_ptr(), len(states)) == (buffer.data_ptr(), len(buffer))
        is_locked = is_here and buffer.is_inference() and not torch.is_inference_mode_enabled()
        if not is_here or is_locked or stop > buffer.shape[-2]:
            rows, heads, _, width = new_states.shape
            buffer = new_states.new_empty(rows, heads, stop + count_spare_tokens(rows), width)
            if start:
                buffer[:, :, :start] = states
            self._buffers[name] = buffer
        buffer[:, :, start:stop] = new_states
        return buffer[:, :, :stop]
