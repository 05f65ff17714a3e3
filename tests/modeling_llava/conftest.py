"""What a training run of the original LLaVA leaves behind, for tests of its adapters."""

import pytest
from transformers import LlamaForCausalLM

from tests import original_folders as folders
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
