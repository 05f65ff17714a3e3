"""Image tokens and image features: that each token has its feature, and which features there are.

An image has all features that the projector gives, or fewer where the config sets `visual_tokens`. The choice is
DivPrune's (Alvar et al., "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models",
CVPR 2025, arXiv:2503.02175): one after the other the feature that is least like those kept so far, in cosine distance.
It needs no training, no attention weights and not the question, so it fits any tower and leaves prefixes cacheable.

The rules, so that anyone gets the same features: the first one is that whose nearest other feature is farthest, as in
the authors' code; of equals the first in reading order is taken; distances are float32 whatever dtype the model has.
What is surprising: newlines are features like the others. They are all one vector, so the rule keeps a single one
until nothing else is left; between chosen features they could not mark the ends of rows anyway.
"""

# B rows, L tokens, I images, N features of one image or of all, K features kept, D text width

from collections.abc import Sequence

import torch
from torch.nn.functional import normalize

MISMATCH = "Image features and image tokens do not match"
"""Words of transformers, by which TRL recognises that its `max_length` has cut an image (TRL 1.16,
trainer/sft_trainer.py)."""


def check_image_tokens(
    image_mask_BL: torch.Tensor, features_per_image: list[int], *, visual_tokens: int | None
) -> list[int]:
    """Refuse rows whose image tokens are not those of whole images, so that no row gets another row's image.

    Args:
        image_mask_BL: Where the image tokens are.
        features_per_image: Numbers of features of all images, in reading order.
        visual_tokens: That of the model, for the error message.

    Returns:
        The number of images of each row; an empty list while this is compiled.

    Raises:
        ValueError: with the counts of the first row that disagrees.
    """
    num_features_of_all = sum(features_per_image)
    if torch.compiler.is_compiling():
        # Reading a number on the host waits for the GPU, which a CUDA graph cannot hold.
        torch._assert_async(image_mask_BL.sum() == num_features_of_all, "image tokens and features disagree")
        return []
    remaining = list(reversed(features_per_image))
    images_per_row = []
    for row, num_tokens in enumerate(image_mask_BL.sum(dim=1).tolist()):
        num_features, num_left = 0, len(remaining)
        while num_features < num_tokens and remaining:
            num_features += remaining.pop()
        images_per_row.append(num_left - len(remaining))
        if num_features != num_tokens:
            if not features_per_image:
                raise ValueError(
                    f"got {num_tokens} image tokens in row {row} and no image features; expected equal numbers: "
                    f"pass pixel_values or mm_encoder_outputs ({MISMATCH})"
                )
            raise ValueError(
                f"got {num_tokens} image tokens in row {row} and images with {num_features} features; expected "
                "equal numbers: let the processor expand the prompt, do not cut it, and load the processor with "
                f"visual_tokens={visual_tokens}, as this model ({MISMATCH})"
            )
    if remaining:
        raise ValueError(
            f"got {len(features_per_image)} images with {num_features_of_all} features and "
            f"{num_features_of_all - sum(remaining)} image tokens; expected equal numbers: "
            f"{len(remaining)} images have no place in the text ({MISMATCH})"
        )
    return images_per_row


def splice_features(
    embeds_BLD: torch.Tensor, image_mask_BL: torch.Tensor, features_ND: torch.Tensor, *, in_place: bool
) -> torch.Tensor:
    """Embeddings with the features of all images, in reading order, where the mask is set."""
    if torch.compiler.is_compiling():
        # The number of positions depends on the data, which a whole graph cannot hold.
        return embeds_BLD.masked_scatter(image_mask_BL[..., None], features_ND)
    # A mask would be compared with every element of the embeddings.
    flat_TD, positions_N = embeds_BLD.flatten(0, 1), image_mask_BL.flatten().nonzero()[:, 0]
    copy = flat_TD.index_copy_ if in_place else flat_TD.index_copy
    return copy(0, positions_N, features_ND).view_as(embeds_BLD)


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
