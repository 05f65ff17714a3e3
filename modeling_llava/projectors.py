"""Projectors: vision features [..., in_size] -> text embeddings [..., out_size].

The parameters carry the names of the published checkpoints: `mm_projector.weight` for the linear one,
`mm_projector.0.weight`, `mm_projector.2.weight`, ... for the others (the odd indices are activations).
"""

import re

from torch import nn

MLP_PATTERN = re.compile(r"mlp([1-9]\d?)x_gelu")


def check_projector_type(projector_type: str, *, in_size: int, out_size: int) -> None:
    """Refuse a projector that does not exist or does not fit.

    Raises:
        ValueError: for an unknown type, or "identity" between different sizes.
    """
    if projector_type == "identity":
        if in_size != out_size:
            raise ValueError(
                f"got projector_type='identity' with vision features of size {in_size} and a text model of size "
                f"{out_size}; expected equal sizes: use 'linear' or 'mlp2x_gelu'"
            )
    elif projector_type != "linear" and MLP_PATTERN.fullmatch(projector_type) is None:
        raise ValueError(
            f"got projector_type={projector_type!r}; expected 'linear', 'identity' or 'mlpNx_gelu' with N from 1 to 99"
        )


def build_projector(projector_type: str, *, in_size: int, out_size: int) -> nn.Module:
    """The projector of that type, with `projector_type` as `check_projector_type` accepts it."""
    check_projector_type(projector_type, in_size=in_size, out_size=out_size)
    if projector_type == "identity":
        return nn.Identity()
    if projector_type == "linear":
        return nn.Linear(in_size, out_size)
    depth = int(MLP_PATTERN.fullmatch(projector_type).group(1))
    layers = [nn.Linear(in_size, out_size)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(out_size, out_size)]
    return nn.Sequential(*layers)
