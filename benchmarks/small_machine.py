"""A 7B checkpoint of 2023 on a machine without GPU: its float16 files are loaded in int8, and it answers.

    python -m benchmarks.small_machine [--size 7b] [--rounds 3] [--folder FOLDER]

Two .bin shards in the original layout are written with random weights, tower included; "7b" takes 14 GB of disk, and
as much memory once. Loading, on all cores and on the wall clock, is compared with reading the same files; the kernel
drops their pages before each of them. Its peak (mapped files included, above what the process had) is compared with
what `llava doctor` predicts. The answer is measured on one thread of a process that has loaded: 640 tokens to read, as
many as an image of 576 and a question, and 16 to write, beside llama.cpp with Q8_0 of the same weights where
llama-cpp-python and gguf are installed.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from .llama_cpp import NUM_PROMPT_TOKENS, LlamaCpp, is_installed, write_gguf
from .loading import LOADED_MODELS, build_config
from .peak_memory import read_peak, start_peak
from .report import render_table
from .timing import Row, build_parser, compare, run_apart

NUM_NEW_TOKENS = 16


def write_checkpoint(folder: Path, size: str) -> None:
    """A LLaVA in the original layout with its tower, float16, in two shards of random weights."""
    from modeling_llava import AnyLlavaForConditionalGeneration
    from modeling_llava.checkpoints.layouts import write_original_config
    from modeling_llava.checkpoints.weight_names import rename_from_ours

    config = build_config(*LOADED_MODELS[size][:2])
    with torch.device("meta"):
        model = AnyLlavaForConditionalGeneration._from_config(config, dtype=torch.float16)
    written = write_original_config(model.config) | {"unfreeze_mm_vision_tower": True}
    (folder / "config.json").write_text(json.dumps(written, indent=2))
    shapes = {rename_from_ours(name, "original"): weight.shape for name, weight in model.state_dict().items()}
    noise = torch.randn(2**24, generator=torch.Generator().manual_seed(0)).mul_(0.02).half()
    weight_map = {}
    for shard in range(2):
        names = list(shapes)[shard::2]
        filename = f"pytorch_model-{shard + 1:05}-of-00002.bin"
        torch.save({name: make_weight(shapes[name], noise) for name in names}, folder / filename)
        weight_map |= dict.fromkeys(names, filename)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def make_weight(shape: torch.Size, noise: torch.Tensor) -> torch.Tensor:
    """Ones for a vector, since norms near 0 would be those of a delta; else as much noise as it takes."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=noise.dtype)
    return noise.repeat(-(-shape.numel() // len(noise)))[: shape.numel()].view(shape).clone()


def forget_pages(folder: Path) -> None:
    """Have the kernel drop what it keeps of the files."""
    for path in folder.glob("*.bin"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def time_reading(folder: Path) -> float:
    forget_pages(folder)
    buffer = bytearray(2**24)
    start = time.perf_counter()
    for path in folder.glob("*.bin"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def load_and_answer(folder: Path, rounds: int) -> dict[str, Any]:
    """Load in this process, and answer; seconds and bytes."""
    from modeling_llava import AnyLlavaForConditionalGeneration
    from modeling_llava.inference.generation_memory import predict_loading, read_config
    from modeling_llava.inference.loading import prepare_for_answering

    from .generation_times import time_decoding, time_prefill

    config = read_config(str(folder))
    num_threads = torch.get_num_threads()
    predicted = predict_loading(config, dtype=torch.float32, quantization="int8", num_threads=num_threads)
    forget_pages(folder)
    before, start = start_peak("cpu"), time.perf_counter()
    model = AnyLlavaForConditionalGeneration.from_pretrained(folder, quantization="int8").eval()
    prepare_for_answering(model)
    found = {"seconds": time.perf_counter() - start, "peak": read_peak("cpu") - before, "predicted": predicted}
    torch.set_num_threads(1)
    prompt = {"input_ids": make_prompt(), "attention_mask": torch.ones(1, NUM_PROMPT_TOKENS, dtype=torch.long)}
    prefills = [time_prefill(model, prompt, "cpu") for _ in range(rounds + 1)]
    decodings = [time_decoding(model, prompt, NUM_NEW_TOKENS, "cpu") for _ in range(rounds + 1)]
    return found | {"prefill": prefills[1:], "decoding": decodings[1:]}


def answer_with_llama_cpp(folder: Path, rounds: int) -> dict[str, Any]:
    """The same answer by llama.cpp, from a file that is written here."""
    from modeling_llava import AnyLlavaForConditionalGeneration

    path = folder / "Q8_0.gguf"
    if not path.exists():
        # Its weights are mapped, and take no memory.
        model = AnyLlavaForConditionalGeneration.from_pretrained(folder, dtype="auto")
        write_gguf(model, path, weights="Q8_0")
        del model
    torch.set_num_threads(1)
    llama, ids = LlamaCpp(path, device="cpu", cache_type="F32"), make_prompt()[0].tolist()
    prefills = [llama.time_prefill(ids) for _ in range(rounds + 1)]
    decodings = [llama.time_decoding(ids, NUM_NEW_TOKENS) for _ in range(rounds + 1)]
    return {"prefill": prefills[1:], "decoding": decodings[1:]}


def make_prompt() -> torch.Tensor:
    return torch.randint(3, 32000, (1, NUM_PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))


def measure(device: str, size: str, rounds: int, *, folder: Path | None = None) -> list[Row]:
    """Rows as `benchmarks.timing` describes them; none on a GPU.

    Args:
        folder: Where the checkpoint is, or is written to and stays; a temporary folder by default.
    """
    if device != "cpu":
        return []
    if folder is None:
        with tempfile.TemporaryDirectory() as name:
            return measure(device, size, rounds, folder=Path(name))
    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_checkpoint(folder, size)
    readings, loadings = [], []
    for number in range(rounds):
        readings.append(time_reading(folder))
        answers = rounds if number == rounds - 1 else 1
        loadings.append(
            run_apart("benchmarks.small_machine", "--measure", "ours", str(folder), "--rounds", str(answers))
        )
    title = f"{size} of float16 in int8"
    peaks, predicted = ([loading[key] for loading in loadings] for key in ("peak", "predicted"))
    rows = [
        compare(
            f"loading {title}", [loading["seconds"] for loading in loadings], readings, peer_name="reading the files"
        ),
        compare(f"peak of loading {title}", peaks, predicted, unit="MB", peer_name="as llava doctor predicts"),
    ]
    ours = loadings[-1]
    peer, peer_name = ours, "itself: llama.cpp is not installed"
    if is_installed(device):
        peer = run_apart("benchmarks.small_machine", "--measure", "llama.cpp", str(folder), "--rounds", str(rounds))
        peer_name = "llama.cpp, Q8_0"
    text = build_config(*LOADED_MODELS[size][:2]).text_config
    layers = text.num_hidden_layers * text.hidden_size * (4 * text.hidden_size + 3 * text.intermediate_size)
    cached = 8 * text.num_hidden_layers * text.hidden_size * (NUM_PROMPT_TOKENS + NUM_NEW_TOKENS / 2)
    # One byte for each weight of the layers, four for those of the output layer and for the KV cache.
    decoding = {"bytes": layers + 4 * text.vocab_size * text.hidden_size + cached, "dtype": "float32"}
    prefill = {"operations": 2 * layers * NUM_PROMPT_TOKENS, "dtype": "float32"}
    name = f"prefill, {NUM_PROMPT_TOKENS} tokens, {size} in int8"
    rows.append(compare(name, ours["prefill"], peer["prefill"], unit="s", peer_name=peer_name, **prefill))
    name, amount = f"decode, batch 1, {size} in int8", NUM_NEW_TOKENS - 1
    settings = {"unit": "tokens/s", "amount": amount, "peer_name": peer_name}
    rows.append(compare(name, ours["decoding"], peer["decoding"], **settings, **decoding))
    return rows


def main() -> None:
    parser = build_parser(__doc__)
    parser.set_defaults(size="7b")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is, or is written to and stays")
    parser.add_argument("--measure", nargs=2, metavar=("WHAT", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        what, folder = arguments.measure
        run = {"ours": load_and_answer, "llama.cpp": answer_with_llama_cpp}[what]
        print(json.dumps(run(Path(folder), arguments.rounds)))
        return
    print(render_table(measure(arguments.device, arguments.size, arguments.rounds, folder=arguments.folder)))


if __name__ == "__main__":
    main()
