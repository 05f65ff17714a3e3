"""Encoding an image, reading a prompt, and decoding: ours, compiled on a GPU and in int8 on a CPU, and transformers'.

    python -m benchmarks.decoding [--device cpu] [--size mid] [--rounds 3] [--new-tokens 32]

Same weights and prompt for both: an image of 576 tokens (or 2928, those of a large one in tiles) and 64 tokens of
text. Prefill is timed with the features given, decoding from the first new token to the last; `generate` runs for
both. The limit of decoding counts the weights once for a step, and the KV cache of every row; that of int8 is not
computed. A compiled peer is compared with ours compiled, or on a CPU, where ours does not need it, with ours as it is;
there only batch 1 is compiled, since compiling takes a minute for each batch.
"""

import copy
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from modeling_llava.acceleration.devices import is_slow_on_cpu
from modeling_llava.acceleration.quantization import quantize_to_int8
from modeling_llava.inference.loading import prepare_for_answering

from .generation_times import (
    build_prompt,
    compile_ours,
    compile_peer,
    generate,
    time_decoding,
    time_encoding,
    time_prefill,
)
from .models import NUM_TEXT_TOKENS, TILE_SIZE, build_config, build_model, build_pair
from .report import render_table
from .roofline import count_operations, count_weights
from .timing import PEER, Row, build_parser, compare, default_dtype, prepare, release_memory, take_turns

BATCHES = (1, 8, 32)
PREFILLED_TOKENS = (576, 2928)
"""Tokens of an image: of one tile, and the most that LLaVA-NeXT keeps of five, newlines included."""
COMPILED = "peer, compiled"


def complete_tower(peer: PreTrainedModel) -> None:
    """Put back the last layer, which published checkpoints have and ours drop: nothing reads what it computes."""
    layers = peer.model.vision_tower.encoder.layers
    layers.append(copy.deepcopy(layers[-1]))
    peer.config.vision_config.num_hidden_layers += 1
    peer.config.vision_feature_layer = -2


def choose_dtypes(device: str) -> tuple[torch.dtype, ...]:
    """The dtypes that are measured: on a CPU with units for bfloat16 that too, since checkpoints are loaded in it."""
    if device == "cpu" and not is_slow_on_cpu(torch.bfloat16):
        return (torch.float32, torch.bfloat16)
    return (default_dtype(device),)


def build_models(size: str, device: str, dtype: torch.dtype) -> dict[str, PreTrainedModel]:
    """Models by their names in the results; "peer" and "ours" hold the same weights."""
    ours, peer = build_pair(size, device=device, dtype=dtype)
    complete_tower(peer)
    models = {"peer": peer, "ours": ours}
    if device == "cpu" and dtype == torch.float32:
        # The same seed makes the same weights.
        models["int8"] = build_model(build_config(size), device=device, dtype=dtype)
        quantize_to_int8(models["int8"])
        prepare_for_answering(models["int8"])
    return models


def measure(
    device: str, size: str, rounds: int, *, num_tokens: int = 32, batches: Sequence[int] = BATCHES
) -> Iterator[Row]:
    """Rows of encoding, prefill and decoding, one after the other.

    Raises:
        ValueError: if the two classes do not give the same tokens.
    """
    prepare(device)
    for dtype in choose_dtypes(device):
        models = build_models(size, device, dtype)
        shape = (1, 3, TILE_SIZE, TILE_SIZE)
        pixels = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        with torch.no_grad():
            features = list(models["ours"].get_image_features(pixels, return_dict=True).pooler_output)
        check_tokens(models, build_prompt(1, features, device), num_tokens, device=device)
        yield measure_encoding(models, pixels, rounds, device=device)
        for num_image_tokens in PREFILLED_TOKENS:
            repeated = features[0].repeat(-(-num_image_tokens // len(features[0])), 1)
            yield from measure_prefill(models, [repeated[:num_image_tokens]], rounds, device=device)
        for batch in batches:
            yield from measure_decoding(models, features, rounds, batch=batch, num_tokens=num_tokens, device=device)
        del models
        release_memory()


def check_tokens(models: dict[str, PreTrainedModel], prompt: dict, num_tokens: int, *, device: str) -> None:
    # In 16 bits, which of two almost equal logits is larger depends on the kernel.
    num_compared = num_tokens if models["ours"].dtype == torch.float32 else 1
    ours, peer = (generate(models[name], prompt, num_compared, device)[1] for name in ("ours", "peer"))
    if ours != peer:
        raise ValueError(
            "got other tokens from ours than from transformers' class; expected the same: nothing measured"
        )


def measure_encoding(models: dict[str, PreTrainedModel], pixels: torch.Tensor, rounds: int, *, device: str) -> Row:
    """Time from pixels to features for the language model; towers are never in int8."""
    jobs = {name: partial(time_encoding, models[name], pixels, device) for name in ("peer", "ours")}
    parts = models["ours"].model
    work = {
        "bytes": count_weights(parts.vision_tower, parts.mm_projector),
        "operations": count_operations(jobs["ours"]),
    }
    (row,) = _rows("encode, 1 image", take_turns(jobs, rounds), models=models, work=work, unit="ms")
    return row


def measure_prefill(
    models: dict[str, PreTrainedModel], features: list[torch.Tensor], rounds: int, *, device: str
) -> list[Row]:
    """Time from features and text to the first token."""
    prompt = build_prompt(1, features, device)
    jobs = {name: partial(time_prefill, model, prompt, device) for name, model in models.items()}
    ours = models["ours"]
    work = {
        "bytes": count_weights(ours.model.language_model.layers, ours.lm_head),
        "operations": count_operations(partial(generate, ours, prompt, 1, device)),
    }
    name = f"prefill, {sum(map(len, features))} + {NUM_TEXT_TOKENS} tokens"
    return _rows(name, take_turns(jobs, rounds), models=models, work=work, unit="ms")


def measure_decoding(
    models: dict[str, PreTrainedModel],
    features: list[torch.Tensor],
    rounds: int,
    *,
    batch: int,
    num_tokens: int,
    device: str,
) -> list[Row]:
    """Time from the first token to the last one, for a batch of equal rows."""
    prompt = build_prompt(batch, features, device)
    decode = partial(time_decoding, prompt=prompt, num_tokens=num_tokens, device=device)
    jobs = {name: partial(decode, model) for name, model in models.items()}
    if device != "cpu" or batch == 1:
        jobs[COMPILED] = partial(decode, models["peer"], **compile_peer(models["peer"]))
    if device != "cpu":
        jobs["ours, compiled"] = partial(decode, models["ours"], **compile_ours(models["ours"]))
    amount = batch * (num_tokens - 1)
    ours = models["ours"]
    # Work of one token: its part of the weights, the KV cache of its row, and the operations after the prefill.
    first, all_tokens = (count_operations(partial(generate, ours, prompt, count, device)) for count in (1, num_tokens))
    text = ours.config.text_config
    cache_bytes = 2 * text.num_hidden_layers * text.hidden_size * ours.dtype.itemsize
    weight_bytes = count_weights(ours.model.language_model.layers, ours.lm_head)
    work = {
        "bytes": weight_bytes / batch + cache_bytes * (prompt["input_ids"].shape[1] + num_tokens / 2),
        "operations": (all_tokens - first) / amount,
    }
    settings = {"unit": "tokens/s", "amount": amount}
    return _rows(f"decode, batch {batch}", take_turns(jobs, rounds), models=models, work=work, **settings)


def _rows(
    name: str,
    seconds: dict[str, list[float]],
    *,
    models: dict[str, PreTrainedModel],
    work: dict[str, float],
    **settings: Any,
) -> list[Row]:
    """All of ours beside the eager peer, and our fastest with the same results beside the compiled one.

    Args:
        work: Bytes and operations without quantization; the limits say nothing of int8.
    """
    rows = []
    dtype = str(models["ours"].dtype).removeprefix("torch.")
    fastest = "ours, compiled" if "ours, compiled" in seconds else "ours"
    for ours, values in seconds.items():
        if ours.startswith("peer"):
            continue
        extras = settings if ours == "int8" else settings | work | {"dtype": dtype}
        label = f"{name}, {ours.replace('ours', dtype)}"
        rows.append(compare(label, values, seconds["peer"], **extras))
        if ours == fastest and COMPILED in seconds:
            rows.append(compare(label, values, seconds[COMPILED], peer_name=f"{PEER}, compiled", **extras))
    return rows


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--new-tokens", type=int, default=32)
    arguments = parser.parse_args()
    rows = measure(arguments.device, arguments.size, arguments.rounds, num_tokens=arguments.new_tokens)
    print(render_table(list(rows)))


if __name__ == "__main__":
    main()
