"""Train the tiny LLaVA as `llava train` would, but with Muon for the matrices inside the layers.

    python -m modeling_llava.tiny_llava.train RECIPE.yaml [KEY=VALUE ...]

RECIPE is one of modeling_llava/tiny_llava/recipes; torchrun starts it in several processes. Muon is made for matrices
that map hidden states to hidden states, here those of a language model that starts from random weights. Embeddings,
norms and biases are not (https://kellerjordan.github.io/posts/muon): AdamW trains everything else.
"""

import argparse
from collections.abc import Callable

import torch
from accelerate import PartialState
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from modeling_llava.training.recipe import read_recipe
from modeling_llava.training.run import train
from modeling_llava.training.starting_model import part_of
from modeling_llava.training.trainer import LlavaTrainer

MUON_LEARNING_RATE = 2e-3
"""Learning rate of the matrices; `trainer.learning_rate` of the recipe is that of the others."""


class MuonTrainer(LlavaTrainer):
    """LlavaTrainer whose optimizer is Muon beside AdamW.

    Raises:
        ValueError: if the model is sharded, since Muon takes whole matrices.
    """

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("got Muon for a model that is sharded; expected a whole one: launch with torchrun alone")
        if self.optimizer is None:
            model = model or self.model
            _, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
            matrices, others = split_for_muon(model, self.group_parameters(model), rate=MUON_LEARNING_RATE)
            self.optimizer = MuonWithAdamW(matrices, others, **settings)
        return self.optimizer


class MuonWithAdamW(Optimizer):
    """Steps both; a learning rate schedule scales the parameter groups of both.

    Args:
        matrices: Parameter groups of two-dimensional parameters for Muon.
        others: Parameter groups for AdamW.
        momentum: Momentum of Muon.
        **adamw_settings: `betas`, `eps`, ... of AdamW.
    """

    def __init__(self, matrices: list[dict], others: list[dict], *, momentum: float = 0.95, **adamw_settings) -> None:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="as of `llava train`")
    arguments = parser.parse_args()
    print(train(read_recipe(arguments.recipe, arguments.settings), trainer_class=MuonTrainer))
    # A process that ends while torch's threads still hold its tensors can abort, and the launcher calls it a failure.
    state = PartialState()
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    main()
