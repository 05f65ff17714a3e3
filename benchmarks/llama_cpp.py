"""Reading a prompt and decoding one row: our language model, and llama.cpp on the same weights.

    python -m benchmarks.llama_cpp [--device cpu] [--size mid] [--rounds 3] [--new-tokens 32]

It needs llama-cpp-python and gguf, and measures nothing without them; on a GPU, a llama-cpp-python that was built for
it. llama.cpp's own LLaVA wants a tower in a file of its own kind, so both read 640 tokens of text, as many as an image
of 576 and a question. Logits must agree to a thousandth, or the benchmark fails. Weights of equal dtype are compared
(float32 on a CPU, bfloat16 on a GPU), and our int8 with llama.cpp's Q8_0, which has 8 bits and a scale for every 32
weights. The KV cache of both has the same dtype.
"""

import copy
import importlib.util
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from modeling_llava.acceleration.quantization import quantize_to_int8
from modeling_llava.export.gguf_text import interleave_halves
from modeling_llava.inference.loading import prepare_for_answering

from .generation_times import compile_ours, time_decoding, time_prefill
from .models import build_config, build_model
from .report import render_table
from .timing import Row, build_parser, clock, compare, default_dtype, prepare, take_turns

NUM_PROMPT_TOKENS = 640
CONTEXT_LENGTH = 1024
# Modules of a Llama, and their names in a GGUF file; "{}" is the number of a layer.
NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "layers.{}.input_layernorm": "blk.{}.attn_norm",
    "layers.{}.self_attn.q_proj": "blk.{}.attn_q",
    "layers.{}.self_attn.k_proj": "blk.{}.attn_k",
    "layers.{}.self_attn.v_proj": "blk.{}.attn_v",
    "layers.{}.self_attn.o_proj": "blk.{}.attn_output",
    "layers.{}.post_attention_layernorm": "blk.{}.ffn_norm",
    "layers.{}.mlp.gate_proj": "blk.{}.ffn_gate",
    "layers.{}.mlp.up_proj": "blk.{}.ffn_up",
    "layers.{}.mlp.down_proj": "blk.{}.ffn_down",
}


def is_installed(device: str) -> bool:
    """Whether llama.cpp can be measured on a device."""
    if not all(importlib.util.find_spec(name) for name in ("llama_cpp", "gguf")):
        return False
    import llama_cpp

    return device == "cpu" or llama_cpp.llama_supports_gpu_offload()


def write_gguf(model: PreTrainedModel, path: Path, *, weights: str) -> None:
    """The language model of a LLaVA on Llama, without a tokenizer.

    Args:
        weights: A name of `gguf.GGMLQuantizationType`, for the matrices; vectors have 32 bits.
    """
    import gguf

    config = model.config.text_config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(CONTEXT_LENGTH)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    matrix_type = gguf.GGMLQuantizationType[weights]
    tensors = {"output.weight": model.lm_head.weight}
    for name, weight in model.model.language_model.named_parameters():
        module = name.removesuffix(".weight")
        layer = next((part for part in module.split(".") if part.isdigit()), "")
        template = module.replace(f".{layer}.", ".{}.") if layer else module
        if template.endswith(("q_proj", "k_proj")):
            weight = interleave_halves(weight, config.hidden_size // config.num_attention_heads)
        tensors[f"{NAMES[template].format(layer)}.weight"] = weight
    for name, weight in tensors.items():
        array = weight.detach().float().cpu().numpy()
        kind = matrix_type if array.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """A model in a GGUF file, on as many threads as PyTorch has.

    Args:
        cache_type: A name of `gguf.GGMLQuantizationType`, for keys and values.
    """

    def __init__(self, path: Path, *, device: str, cache_type: str) -> None:
        import gguf
        from llama_cpp import Llama

        self.device = device
        kind = int(gguf.GGMLQuantizationType[cache_type])
        num_threads = torch.get_num_threads()
        self.llama = Llama(
            str(path),
            n_ctx=CONTEXT_LENGTH,
            n_batch=CONTEXT_LENGTH,
            n_ubatch=CONTEXT_LENGTH,
            n_threads=num_threads,
            n_threads_batch=num_threads,
            n_gpu_layers=0 if device == "cpu" else -1,
            type_k=kind,
            type_v=kind,
            flash_attn=device != "cpu",
            verbose=False,
        )

    def read(self, ids: list[int]) -> np.ndarray:
        """Logits `[vocabulary]` after the last of these tokens, which stand behind those that were read before."""
        from llama_cpp import llama_get_logits_ith

        self.llama.eval(ids)
        return np.ctypeslib.as_array(llama_get_logits_ith(self.llama.ctx, -1), shape=(self.llama.n_vocab(),))

    def time_prefill(self, ids: list[int]) -> float:
        start = clock(self.device)
        self.llama.reset()
        self.read(ids)
        return clock(self.device) - start

    def time_decoding(self, ids: list[int], num_tokens: int) -> float:
        """Seconds from the first new token to the last, as in `generation_times.time_decoding`."""
        self.llama.reset()
        token = int(self.read(ids).argmax())
        start = clock(self.device)
        for _ in range(num_tokens - 1):
            token = int(self.read([token]).argmax())
        return clock(self.device) - start


def measure(device: str, size: str, rounds: int, *, num_tokens: int = 32) -> list[Row]:
    """Rows as `benchmarks.timing` describes them; none where llama.cpp is not installed.

    Raises:
        RuntimeError: if the two do not compute the same.
    """
    if not is_installed(device):
        return []
    prepare(device)
    dtype = default_dtype(device)
    ours = build_model(build_config(size), device=device, dtype=dtype)
    ids = torch.randint(3, 32000, (1, NUM_PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    prompt = {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids, device=device)}
    models: dict[str, tuple[PreTrainedModel, dict[str, Any]]] = {"": (ours, {})}
    dtype_name = {"cpu": "F32", "cuda": "BF16"}[device]
    peers = {"": dtype_name}
    if device == "cpu":
        int8 = copy.deepcopy(ours)
        quantize_to_int8(int8)
        prepare_for_answering(int8)
        models[", int8"], peers[", int8"] = (int8, {}), "Q8_0"
    else:
        models[", compiled"], peers[", compiled"] = (ours, compile_ours(ours)), dtype_name
    with tempfile.TemporaryDirectory() as folder:
        others = {}
        for weights in dict.fromkeys(peers.values()):
            path = Path(folder) / f"{weights}.gguf"
            write_gguf(ours, path, weights=weights)
            others[weights] = LlamaCpp(path, device=device, cache_type=dtype_name)
        prepare_for_answering(ours)
        check_logits(ours, others[dtype_name], prompt)
        rows = []
        for label, (model, settings) in models.items():
            other, peer_name = others[peers[label]], f"llama.cpp, {peers[label]}"
            if label != ", compiled":
                jobs = {
                    "ours": partial(time_prefill, model, prompt, device),
                    "peer": partial(other.time_prefill, ids[0].tolist()),
                }
                seconds = take_turns(jobs, rounds)
                name = f"prefill, {NUM_PROMPT_TOKENS} tokens of text{label}"
                rows.append(compare(name, seconds["ours"], seconds["peer"], unit="ms", peer_name=peer_name))
            jobs = {
                "ours": partial(time_decoding, model, prompt, num_tokens, device, **settings),
                "peer": partial(other.time_decoding, ids[0].tolist(), num_tokens),
            }
            seconds = take_turns(jobs, rounds)
            rows.append(
                compare(
                    f"decode, batch 1{label}",
                    seconds["ours"],
                    seconds["peer"],
                    unit="tokens/s",
                    amount=num_tokens - 1,
                    peer_name=peer_name,
                )
            )
    return rows


def check_logits(ours: PreTrainedModel, other: LlamaCpp, prompt: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        expected = ours(**prompt, logits_to_keep=1).logits[0, -1].float().cpu()
    found = torch.from_numpy(other.read(prompt["input_ids"][0].tolist()).copy())
    error = (found - expected).abs().max() / expected.abs().max()
    tolerance = 1e-3 if ours.dtype == torch.float32 else 5e-2
    if error > tolerance:
        raise RuntimeError(f"llama.cpp computes other logits than ours: they differ by {error:.1e} of the largest")


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--new-tokens", type=int, default=32)
    arguments = parser.parse_args()
    rows = measure(arguments.device, arguments.size, arguments.rounds, num_tokens=arguments.new_tokens)
    print(render_table(rows) if rows else "llama-cpp-python or gguf is not installed for this device")


if __name__ == "__main__":
    main()
