"""Which features of an image the language model gets to see, where `visual_tokens` asks for fewer than there are.

The choice is DivPrune's (Alvar et al., "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models",
CVPR 2025, arXiv:2503.02175): one after the other the feature that is least like those kept so far, in cosine distance.
It needs no training, no attention weights and not the question, so it fits any tower and leaves prefixes cacheable.

The rules, so that anyone gets the same features: the first one is that whose nearest other feature is farthest, as in
the authors' code; of equals the first in reading order is taken; numbers are float32 whatever the model computes in.
What is surprising: newlines are features like the others. They are all one vector, so the rule keeps a single one
until nothing else is left; between chosen features they could not mark the ends of rows anyway.
"""

# I images · N features of one image · K features kept · D text width

from collections.abc import Sequence

import torch
from torch.nn.functional import normalize


def choose_features(images: Sequence[torch.Tensor], visual_tokens: int | None) -> list[torch.Tensor]:
    """The places of the features that are kept of each image, ascending.

    Args:
        images: Features of each image, `[N, D]`; N may differ.
        visual_tokens: How many are kept at most; None for all.

    Returns:
        For each image `[K]` int64, K the smaller of N and `visual_tokens`. It depends on no other image.
    """
    kept = [torch.arange(len(features_ND), device=features_ND.device) for features_ND in images]
    rows_of_length: dict[int, list[int]] = {}
    for row, features_ND in enumerate(images):
        if visual_tokens is not None and len(features_ND) > visual_tokens:
            rows_of_length.setdefault(len(features_ND), []).append(row)
    for rows in rows_of_length.values():
        chosen_IK = choose_diverse(torch.stack([images[row] for row in rows]), visual_tokens)
        for row, chosen_K in zip(rows, chosen_IK):
            kept[row] = chosen_K
    return kept


@torch.no_grad()
def choose_diverse(features_IND: torch.Tensor, num_kept: int) -> torch.Tensor:
    """DivPrune's choice among the features of images of equal length, `[I, K]`, ascending.

    One product of all pairs of an image, then one pass over its features for each that is kept.
    """
    with torch.autocast(features_IND.device.type, enabled=False):
        units_IND = normalize(features_IND.float(), dim=-1)
        # Image by image: a product over the batch may round otherwise, and what follows only compares.
        similarity_INN = torch.stack([units_ND @ units_ND.T for units_ND in units_IND])
        # A product can round the two halves otherwise, and two features that are nearest to each other must be equals.
        similarity_INN = (similarity_INN + similarity_INN.mT).div_(2)
    similarity_INN.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    images_I = torch.arange(len(features_IND), device=features_IND.device)
    closest_IN = similarity_INN.amax(dim=2)
    chosen: list[torch.Tensor] = []
    for _ in range(num_kept):
        # argmin gives the first of equals.
        chosen.append(closest_IN.argmin(dim=1))
        to_chosen_IN = similarity_INN[images_I, chosen[-1]]
        closest_IN = to_chosen_IN if len(chosen) == 1 else torch.maximum(closest_IN, to_chosen_IN)
        closest_IN = closest_IN.scatter(1, chosen[-1][:, None], torch.inf)
    return torch.stack(chosen, dim=1).sort(dim=1).values
