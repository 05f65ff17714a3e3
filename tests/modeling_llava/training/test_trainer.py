"""What the trainer writes at the end of a run."""

import pytest
import torch
from safetensors.torch import load_file

from modeling_llava import AutoModelForVision2Seq
from modeling_llava.training.recipe import read_recipe
from modeling_llava.training.run import build_trainer, train
from tests import original_folders as folders
from tests.modeling_llava.training.conftest import write_recipe
from tests.tiny import save_tiny_checkpoint


@pytest.mark.parametrize("text, is_tied", [("llama", False), ("qwen2", True)])
def test_weights_have_the_output_type_and_tied_ones_are_written_once(workspace, tmp_path, text, is_tied):
    start = save_tiny_checkpoint(tmp_path / "start", text)
    fields = {"model": str(start), "output_dir": str(tmp_path / "out"), "output_dtype": "float16"}
    out = train(read_recipe(write_recipe(workspace, **fields)))
    weights = load_file(out / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16}
    assert ("lm_head.weight" not in weights) == is_tied
    loaded = AutoModelForVision2Seq.from_pretrained(out, dtype="auto")
    assert loaded.dtype == torch.float16
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == is_tied


# torch's compiler warns of its own code
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stage", ["finetune", "lora"])
def test_a_compiled_model_is_written_under_its_own_names(workspace, tmp_path, stage):
    settings = {"max_steps": 1, "torch_compile": True, "torch_compile_backend": "eager", "disable_tqdm": True}
    recipe = write_recipe(workspace, stage=stage, output_dir=str(tmp_path), trainer=settings)
    trainer = build_trainer(read_recipe(recipe))
    trainer.train()
    trainer.save_trained()
    loaded, trained = AutoModelForVision2Seq.from_pretrained(tmp_path), trainer.model.eval()
    inputs = folders.example_inputs(loaded)
    torch.testing.assert_close(folders.logits_of(loaded, inputs), folders.logits_of(trained, inputs))
