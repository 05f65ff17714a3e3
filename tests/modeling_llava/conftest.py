"""What a training run of the original LLaVA leaves behind, for tests of its adapters; and models that are watched."""

from types import SimpleNamespace

import pytest
from transformers import LlamaForCausalLM

from tests import original_folders as folders
from tests.modeling_llava.inference.session_models import SETTINGS, load
from tests.tiny import TEXT_CONFIGS


@pytest.fixture
def run(tmp_path):
    """The three folders of a training run: base language model, tower, and the place of the result."""
    tower = folders.make_tower("clip")
    folders.save_tower(tower, tmp_path / "tower")
    model = folders.make_model(tower)
    base = tmp_path / "base"
    save_base(model, base)
    folders.write_config(tmp_path / "result", model, vision_tower="../tower", text="llama")
    return tmp_path, model


def save_base(model, folder) -> None:
    config = TEXT_CONFIGS["llama"]()
    config.vocab_size = model.config.text_config.vocab_size
    base = LlamaForCausalLM(config)
    base.model.load_state_dict(model.model.language_model.state_dict())
    base.lm_head.load_state_dict(model.lm_head.state_dict())
    base.save_pretrained(folder)
    folders.write_sentencepiece(folder)


@pytest.fixture
def watched(monkeypatch):
    """Watch the model of a name: the ids of its last generation, how often its tower ran, and plain `generate`."""

    def watch(name: str) -> SimpleNamespace:
        model, processor = load(name)
        seen = SimpleNamespace(model=model, processor=processor, tower_runs=0, num_tiles=0, ids=None)
        generate = model.generate

        def record(**kwargs):
            output = generate(**kwargs)
            seen.ids = output[0, kwargs["input_ids"].shape[1] :].tolist()
            return output

        def expect(messages: list, **settings) -> list[int]:
            inputs = processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
            output = generate(**inputs, **{"do_sample": False} | SETTINGS | settings)
            seen.tower_runs = seen.num_tiles = 0
            return output[0, inputs["input_ids"].shape[1] :].tolist()

        def count(module, arguments, output) -> None:
            seen.tower_runs += 1
            seen.num_tiles += len(output.last_hidden_state)

        seen.expect = expect
        monkeypatch.setattr(model, "generate", record)
        hooks.append(model.model.vision_tower.register_forward_hook(count))
        return seen

    hooks = []
    yield watch
    for hook in hooks:
        hook.remove()
