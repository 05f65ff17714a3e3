"""load_for_inference: where models go, in the best precision that fits and never in silence, and what is refused."""

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model

from modeling_llava import AnyLlavaForConditionalGeneration
from modeling_llava.acceleration import devices
from modeling_llava.inference import generation_memory, loading
from modeling_llava.inference.generation_memory import (
    build_without_memory,
    count_weight_bytes,
    predict_generation,
    predict_loading,
)
from modeling_llava.inference.loading import (
    EMBEDDED_MODEL,
    HEADROOM,
    Precision,
    choose_precision,
    load_for_inference,
    parse_memory,
)
from tests.modeling_llava.checkpoints.folder_changes import LAYOUTS, change_text
from tests.modeling_llava.inference.session_models import build_transformers_own
from tests.tiny import save_tiny_checkpoint, tiny_config, tiny_processor

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "device, message",
    [("gpu", "got device='gpu'; expected cpu, or cuda:N"), ("cuda", "expected cpu, or cuda:N below the 0 GPUs")],
)
def test_a_device_that_is_not_there_is_refused(device, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=message):
        load_for_inference(device=device)


def test_an_adapter_says_which_base_was_not_found(tmp_path, monkeypatch):
    save_tiny_checkpoint(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    model = AnyLlavaForConditionalGeneration.from_pretrained("base")
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained("adapter")
    tiny_processor().save_pretrained("adapter")
    load_for_inference(str(tmp_path / "adapter"))
    monkeypatch.chdir(tmp_path / "adapter")
    with pytest.raises(ValueError, match="it is an adapter of 'base', to be found from"):
        load_for_inference(str(tmp_path / "adapter"))


def test_visual_tokens_of_a_checkpoint_of_transformers(tmp_path):
    for part in build_transformers_own():
        part.save_pretrained(tmp_path)
    model, processor = load_for_inference(str(tmp_path), visual_tokens=4)
    assert (model.config.visual_tokens, processor.visual_tokens) == (4, 4)


@pytest.mark.parametrize("visual_tokens", [None, 4])
def test_the_precision_is_chosen_for_the_visual_tokens_that_are_seen(visual_tokens, tmp_path, monkeypatch):
    save_tiny_checkpoint(tmp_path)
    seen = []

    def choose(config, device, **settings) -> Precision:
        seen.append(config.visual_tokens)
        return Precision(torch.float32, None)

    monkeypatch.setattr(loading, "choose_precision", choose)
    model, _ = load_for_inference(str(tmp_path), visual_tokens=visual_tokens)
    assert seen == [visual_tokens] == [model.config.visual_tokens]


def test_loading_goes_where_it_is_told():
    model, _ = load_for_inference(EMBEDDED_MODEL, device="cpu")
    assert (type(model), model.device.type, model.dtype) == (AnyLlavaForConditionalGeneration, "cpu", torch.float32)
    assert not model.training


def needed(config, dtype: torch.dtype, quantization: str | None = None) -> int:
    settings = {"dtype": dtype, "quantization": quantization}
    loading = predict_loading(config, **settings, num_threads=torch.get_num_threads())
    return max(predict_generation(config, **settings).total, loading) + HEADROOM


@pytest.fixture(params=[False, True], ids=["no units for bfloat16", "units for bfloat16"])
def has_units(request, monkeypatch):
    def is_slow(dtype) -> bool:
        name = str(dtype).removeprefix("torch.")
        return name == "float16" or (name == "bfloat16" and not request.param)

    monkeypatch.setattr(loading, "is_slow_on_cpu", is_slow)
    return request.param


@pytest.fixture
def config():
    config = tiny_config()
    config.dtype = torch.float16
    # So large that weights decide.
    config.text_config.num_hidden_layers, config.text_config.intermediate_size = 8, 20_000
    return config


def test_the_best_that_fits(config, has_units, caplog):
    options = [Precision(torch.float32, None), Precision(torch.bfloat16, None), Precision(torch.float32, "int8")]
    if not has_units:
        del options[1]
    needs = [needed(config, option.dtype, option.quantization) for option in options]
    assert needs == sorted(needs, reverse=True)
    for option, need in zip(options, needs):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="transformers"):
            assert choose_precision(config, CPU, name="it", memory=need) == option
        lines = [record.message for record in caplog.records if "it is loaded in" in record.message]
        assert len(lines) == (0 if option is options[0] else 1)
        assert all(f"loaded in {option}: float32 takes" in line for line in lines)
    with pytest.raises(ValueError, match=r"got .* of memory on cpu for it; expected more, since float32 takes .*int8"):
        choose_precision(config, CPU, name="it", memory=needs[-1] - 1)


def test_what_is_far_below_is_not_predicted(config, monkeypatch):
    monkeypatch.setattr(loading, "predict_generation", None)
    weights = count_weight_bytes(build_without_memory(config, torch.float32))
    assert choose_precision(config, CPU, name="it", memory=2 * weights + 2 * HEADROOM).quantization is None


@pytest.mark.parametrize(
    "chosen", [{"dtype": "bfloat16"}, {"dtype": torch.float16}, {"quantization": "int8"}], ids=str
)
def test_who_chooses_gets_it(config, chosen):
    found = choose_precision(config, CPU, name="it", memory=1, **chosen)
    assert str(found) == str(next(iter(chosen.values()))).removeprefix("torch.")


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"dtype": "int8"}, "got dtype='int8'; expected one of float32"),
        ({"quantization": "nf4"}, "got quantization='nf4' on cpu"),
        ({"dtype": "float32", "quantization": "int8"}, "expected one of them"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(config, chosen, message):
    with pytest.raises(ValueError, match=message):
        choose_precision(config, CPU, name="it", **chosen)


@pytest.mark.parametrize(
    ("text", "size"), [("8GiB", 2**33), ("7.5 GB", 7_500_000_000), ("100", 100), ("1k", 1000), ("2 MiB", 2**21)]
)
def test_sizes(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1GiB", "GiB", "8 potatoes", "1e9", "inf"])
def test_no_sizes(text):
    with pytest.raises(ValueError, match="expected a size such as 8GiB"):
        parse_memory(text)


def test_loading_obeys(tmp_path):
    save_tiny_checkpoint(tmp_path)
    assert load_for_inference(str(tmp_path), device="cpu")[0].dtype == torch.float32
    assert load_for_inference(str(tmp_path), device="cpu", dtype="bfloat16")[0].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="int8 takes"):
        load_for_inference(str(tmp_path), device="cpu", memory="1MiB")


@pytest.mark.parametrize("layout", ["any_llava", "llava", "original", "adapter"])
def test_files_are_named_before_memory_is(layout, tmp_path):
    LAYOUTS[layout](tmp_path)
    change_text(tmp_path / ("base" if layout == "adapter" else "model"), hidden_size=10**5)
    with pytest.raises(ValueError, match=r"^got [^\n]*\.weight of shape [^\n]*safetensors; expected \["):
        load_for_inference(str(tmp_path / "model"), device="cpu", memory="1GiB")


def test_a_model_is_built_once_for_each_precision(config, monkeypatch):
    built = []

    def build(*arguments):
        built.append(arguments)
        return build_without_memory(*arguments)

    monkeypatch.setattr(loading, "build_without_memory", build)
    monkeypatch.setattr(generation_memory, "build_without_memory", None)
    with pytest.raises(ValueError, match="int8 takes"):
        choose_precision(config, CPU, name="it", memory=1)
    assert len(built) == len(loading._list_precisions(config, CPU))


def test_mapped_files_give_their_memory_back(tmp_path):
    numbers = torch.arange(2**20, dtype=torch.float32)
    torch.save({"a": numbers}, tmp_path / "a.bin")
    mapped = torch.load(tmp_path / "a.bin", mmap=True)["a"]
    before = read_file_pages()
    mapped.sum()
    assert read_file_pages() - before > 3 * 2**20
    devices.release_mapped([mapped, numbers])
    assert read_file_pages() - before < 2**20
    assert mapped.equal(numbers)


def read_file_pages() -> int:
    """Bytes of mapped files that count to this process."""
    with open("/proc/self/status") as lines:
        (line,) = (line for line in lines if line.startswith("RssFile:"))
    return int(line.split()[1]) * 1024
