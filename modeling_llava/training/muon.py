"""Muon for the matrices inside the layers and AdamW for everything else, as one optimizer.

A small language model that starts from random weights needs less than half of the rows with it. Muon is made for
matrices that map hidden states to hidden states; embeddings, norms and biases are not
(https://kellerjordan.github.io/posts/muon).
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from .parts import part_of


class MuonWithAdamW(Optimizer):
    """Steps both; a learning rate schedule scales the parameter groups of both.

    Args:
        matrices: Parameter groups of two-dimensional parameters for Muon.
        others: Parameter groups for AdamW.
        momentum: Of Muon.
        **adamw_settings: `betas`, `eps`, ... of AdamW.

    Raises:
        ImportError: if torch has no Muon.
    """

    def __init__(self, matrices: list[dict], others: list[dict], *, momentum: float = 0.95, **adamw_settings) -> None:
        try:
            from torch.optim import Muon
        except ImportError as error:
            raise ImportError(
                f"torch {torch.__version__} has no Muon; pip install 'torch>=2.9', or take muon_learning_rate out"
            ) from error
        # "match_rms_adamw" makes its updates as large as AdamW's, so that rates of both are alike.
        self.muon = Muon(matrices, momentum=momentum, adjust_lr_fn="match_rms_adamw")
        self.adamw = AdamW(others, **adamw_settings)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})
        self._share_groups()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        if closure is not None:
            raise ValueError("got a closure; expected none: call backward before step")
        self.muon.step()
        self.adamw.step()

    def state_dict(self) -> dict:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        self.muon.load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])
        self._share_groups()

    def _share_groups(self) -> None:
        # The very same dicts: what a schedule writes into them is what both step with.
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]


def split_for_muon(model: nn.Module, groups: list[dict], *, rate: float) -> tuple[list[dict], list[dict]]:
    """Parameter groups for Muon, with its learning rate, and those that are left for AdamW.

    Muon takes matrices of the language model's layers and of the projector; embeddings are tables, not matrices.
    """
    chosen = {
        id(parameter)
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and (part_of(name) == "mm_projector" or "language_model.layers." in name)
    }
    matrices, others = [], []
    for group in groups:
        kept = [parameter for parameter in group["params"] if id(parameter) not in chosen]
        taken = [parameter for parameter in group["params"] if id(parameter) in chosen]
        if kept:
            others.append(group | {"params": kept})
        if taken:
            matrices.append(group | {"params": taken, "lr": rate})
    return matrices, others
