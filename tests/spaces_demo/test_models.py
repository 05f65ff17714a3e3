"""The menu: labels, loading on demand within the memory there is, answers with a visitor's settings."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import pytest
import torch
from PIL import Image

from modeling_llava.inference import loading
from modeling_llava.inference.chat_cache import ChatCache
from modeling_llava.inference.loading import EMBEDDED_MODEL, load_for_inference
from modeling_llava.serving import model_menu
from modeling_llava.serving.model_menu import GIB, HEADROOM, LoadedModel, estimate_bytes
from spaces_demo.models import DemoMenu, Settings
from tests.spaces_demo.checkpoints import save_adapter
from tests.tiny import PINPOINTS, TEXT_CONFIGS, VISION_CONFIGS, save_tiny_checkpoint, tiny_processor

CPU = torch.device("cpu")
QUESTION = [{"type": "image", "image": Image.new("RGB", (80, 40), "red")}, {"type": "text", "text": "What is this?"}]
MESSAGES = [{"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[str]:
    """Three checkpoints of the same size."""
    return [str(save_tiny_checkpoint(tmp_path_factory.mktemp(name))) for name in ("first", "second", "third")]


def build_menu(folders: list[str], *, room_for: float) -> DemoMenu:
    """A menu on a machine with memory for so many of these checkpoints."""
    size = estimate_bytes(folders[0], CPU)

    def count_free_bytes(device: torch.device) -> int:
        return int(room_for * size) - size * len(menu.loaded) + HEADROOM

    menu = DemoMenu(folders, device="cpu", free_bytes=count_free_bytes)
    return menu


def test_labels_tell_nothing_about_the_machine_and_are_unique(tmp_path):
    folders = [tmp_path / name / "llava" for name in "abc"]
    for folder in folders:
        folder.mkdir(parents=True)
    menu = DemoMenu([EMBEDDED_MODEL, *map(str, folders), "liuhaotian/llava-v1.5-7b"])
    assert menu.labels == ["embedded", "llava", "llava (2)", "llava (3)", "liuhaotian/llava-v1.5-7b"]
    assert DemoMenu([]).labels == ["embedded"]


def test_the_estimate_is_what_the_weights_take(folders, tmp_path, monkeypatch):
    for name in (EMBEDDED_MODEL, folders[0]):
        for settings in ({}, {"dtype": "bfloat16"}, {"quantization": "int8"}):
            model, processor = load_for_inference(name, device="cpu", **settings)
            found = LoadedModel(model, processor, ChatCache()).num_bytes
            # Rows of int8 have a scale each.
            assert estimate_bytes(name, CPU, **settings) == pytest.approx(found, rel=0.02 if settings else 0)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": folders[0]}))
    assert estimate_bytes(str(tmp_path), CPU) == estimate_bytes(folders[0], CPU)
    for is_slow in (True, False):
        monkeypatch.setattr(loading, "is_slow_on_cpu", Mock(return_value=is_slow))
        stored = estimate_bytes(EMBEDDED_MODEL, torch.device("cuda"))
        # Position embeddings stay in float32.
        assert estimate_bytes(EMBEDDED_MODEL, CPU) == pytest.approx(stored * (2 if is_slow else 1), rel=1e-4)
    with pytest.raises(ValueError, match="got model 'no/such-model'"):
        estimate_bytes("no/such-model", CPU)


def test_a_model_is_loaded_once_and_the_least_recently_used_makes_room(folders):
    menu = build_menu(folders, room_for=2)
    first, second, third = menu.labels
    loaded = menu.load(first)
    menu.load(second)
    assert menu.load(first) is loaded
    menu.load(third)
    assert list(menu.loaded) == [first, third]


def test_the_model_that_is_compared_with_stays(folders):
    menu = build_menu(folders, room_for=2)
    first, second, third = menu.labels
    menu.load(first)
    menu.load(second)
    menu.load(third, keep=[first])
    assert list(menu.loaded) == [first, third]


def test_too_little_memory_is_one_line_and_drops_nothing(folders):
    menu = build_menu(folders, room_for=1.5)
    first, second, _ = menu.labels
    menu.load(first)
    with pytest.raises(ValueError, match=f"of memory on cpu; {second} needs") as error:
        menu.load(second, keep=[first])
    assert "\n" not in str(error.value)
    assert list(menu.loaded) == [first]


def allocate_too_much(*arguments, **settings):
    torch.empty(2**50)


def run_out_on_a_gpu(*arguments, **settings):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


@pytest.mark.parametrize("run_out", [allocate_too_much, run_out_on_a_gpu])
def test_memory_that_runs_out_while_loading_leaves_the_others(folders, monkeypatch, run_out):
    menu = build_menu(folders, room_for=3)
    first, second, _ = menu.labels
    menu.load(first)
    monkeypatch.setattr(model_menu, "load_for_inference", run_out)
    with pytest.raises(ValueError, match="got too little memory"):
        menu.load(second)
    assert list(menu.loaded) == [first]
    assert list(menu.answer(first, MESSAGES, Settings(max_new_tokens=2)))


@pytest.mark.parametrize("run_out", [allocate_too_much, run_out_on_a_gpu])
def test_memory_that_runs_out_in_an_answer_is_found_in_the_cache(folders, run_out):
    menu = build_menu(folders, room_for=3)
    label = menu.labels[0]
    loaded = menu.load(label)
    list(menu.answer(label, MESSAGES, Settings(max_new_tokens=2)))
    assert loaded.cache.num_bytes > 0
    hook = loaded.model.lm_head.register_forward_hook(run_out)
    with pytest.raises(ValueError, match="got too little memory for this conversation"):
        list(menu.answer(label, MESSAGES, Settings(max_new_tokens=2)))
    hook.remove()
    assert loaded.cache.num_bytes == 0
    assert list(menu.answer(label, MESSAGES, Settings(max_new_tokens=2)))


def test_caches_share_what_the_weights_leave(folders):
    size = estimate_bytes(folders[0], CPU)
    menu = build_menu(folders, room_for=4)
    bounds = []
    for label in menu.labels:
        menu.load(label)
        bounds.append([loaded.cache.max_bytes for loaded in menu.loaded.values()])
    assert bounds == [[3 * size], [size] * 2, [size // 3] * 3]


def test_what_caches_keep_makes_room_for_a_model(folders):
    size = estimate_bytes(folders[0], CPU)

    def count_free_bytes(device: torch.device) -> int:
        return int(2.5 * size) - sum(loaded.num_bytes for loaded in menu.loaded.values()) + HEADROOM

    menu = DemoMenu(folders, device="cpu", free_bytes=count_free_bytes)
    first, second, _ = menu.labels
    cache = menu.load(first).cache
    cache.store_features(b"picture", torch.zeros(size * 3 // 4, dtype=torch.uint8))
    assert count_free_bytes(CPU) < size + HEADROOM
    menu.load(second, keep=[first])
    assert list(menu.loaded) == [first, second]
    assert cache.num_bytes == 0


def test_two_who_choose_a_model_at_once_load_it_once(folders, monkeypatch):
    """As when one leaves: Gradio then lets the next one in, while the thread that loads goes on."""
    menu = build_menu(folders, room_for=3)
    num_loads = []

    def load_slowly(name, **settings):
        num_loads.append(name)
        time.sleep(0.3)
        return load_for_inference(name, **settings)

    monkeypatch.setattr(model_menu, "load_for_inference", load_slowly)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(menu.load, menu.labels[:1] * 2)
    assert first is second and len(num_loads) == 1


def test_an_adapter_is_known_by_its_hub_id(tmp_path, monkeypatch):
    """From the cache of the Hub's files, where a marker says which file a repository does not have."""
    repository = tmp_path / "models--alice--adapter"
    snapshot, missing = (repository / name / "c0ffee" for name in ("snapshots", ".no_exist"))
    save_adapter(snapshot)
    missing.mkdir(parents=True)
    (missing / "config.json").touch()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c0ffee")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert estimate_bytes("alice/adapter", CPU) == estimate_bytes(EMBEDDED_MODEL, CPU)


def test_free_memory_is_a_plausible_number():
    assert GIB / 16 < model_menu.count_free_bytes(CPU) < 2**50


def test_an_answer_grows_and_ends_with_its_statistics():
    menu = DemoMenu([])
    steps = list(menu.answer("embedded", MESSAGES, Settings()))
    texts = [text for text, _ in steps]
    assert all(later.startswith(earlier) for earlier, later in zip(texts, texts[1:]))
    assert [statistics for _, statistics in steps[:-1]] == [None] * (len(steps) - 1)
    assert steps[-1][1].num_image_tokens == 64


def test_an_answer_that_is_left_stops_and_lets_others_in(folders):
    menu = build_menu(folders, room_for=3)
    label = menu.labels[0]
    answer = menu.answer(label, MESSAGES, Settings(max_new_tokens=10_000))
    next(answer)
    answer.close()
    assert not menu.loaded[label].cache.lock.locked()
    assert list(menu.answer(label, MESSAGES, Settings(max_new_tokens=2)))[-1][1].num_reused_tokens > 0


def test_settings_change_a_copy_of_the_processor():
    processor = tiny_processor(image_aspect_ratio="anyres", image_grid_pinpoints=PINPOINTS)
    adapted = Settings(template="qwen", tile_mode="pad").adapt(processor)
    assert adapted.chat_template != processor.chat_template
    assert adapted.image_processor.image_aspect_ratio == "pad"
    assert processor.image_processor.image_aspect_ratio == "anyres"
    with pytest.raises(ValueError, match="for a model of one tile"):
        Settings(tile_mode="anyres").adapt(tiny_processor())


def test_settings_reach_the_model():
    menu = DemoMenu([])

    def count_prompt(**settings) -> int:
        return list(menu.answer("embedded", MESSAGES, Settings(**settings)))[-1][1].num_prompt_tokens

    assert count_prompt(system="Answer in one word, please.") > count_prompt()
    assert count_prompt(template="vicuna_v1") != count_prompt()
    assert list(menu.answer("embedded", MESSAGES, Settings(max_new_tokens=1)))[-1][1].num_new_tokens == 1
    wild = [
        list(menu.answer("embedded", MESSAGES, Settings(temperature=2.0, seed=seed)))[-1][0]
        for seed in (1, 1, 2, 3, 4)
    ]
    assert wild[0] == wild[1] and len(set(wild)) > 1
    narrow = [
        list(menu.answer("embedded", MESSAGES, Settings(temperature=2.0, top_p=0.01, seed=seed)))[-1][0]
        for seed in (1, 2, 3)
    ]
    assert len(set(narrow)) == 1


def test_looking_follows_the_settings_of_the_answer():
    menu = DemoMenu([])
    messages = [*MESSAGES, {"role": "assistant", "content": [{"type": "text", "text": "a red square"}]}]
    attention = menu.look("embedded", messages, Settings(tile_mode="square", system="Be brief."))
    assert attention.words == ["a", "red", "square"]
    assert attention.weights[0].shape[-1] == 64


def test_a_checkpoint_of_transformers_own_class_answers_as_ours(tmp_path):
    from transformers import CLIPImageProcessorPil, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    tokenizer = tiny_processor().tokenizer
    text_config = TEXT_CONFIGS["llama"]()
    text_config.vocab_size = len(tokenizer)
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(
        vision_config=VISION_CONFIGS["clip"](), text_config=text_config, image_token_index=image_token_id
    )
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(
        images, tokenizer, patch_size=7, num_additional_image_tokens=1, vision_feature_select_strategy="default"
    )
    processor.chat_template = tiny_processor().chat_template
    processor.save_pretrained(tmp_path)

    menu = DemoMenu([str(tmp_path)], device="cpu")
    label = menu.labels[0]
    assert "million parameters in float32 on cpu" in menu.load(label).describe()
    assert list(menu.answer(label, MESSAGES, Settings(max_new_tokens=3)))[-1][1].num_image_tokens == 16
    assert list(menu.answer(label, MESSAGES, Settings(tile_mode="pad", max_new_tokens=3)))[-1][1] is not None
