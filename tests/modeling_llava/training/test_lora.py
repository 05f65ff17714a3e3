"""LoRA runs: what trains, what is saved, and that it loads to the same logits."""

import importlib.util
import json

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoProcessor

from modeling_llava import AutoModelForVision2Seq
from modeling_llava.training.recipe import read_recipe
from modeling_llava.training.run import build_trainer, train
from modeling_llava.training.starting_model import add_lora, count_parameters, find_targets, load_model, part_of
from modeling_llava.training.trainer import LlavaTrainer
from tests import original_folders as folders
from tests.modeling_llava.training.conftest import write_recipe
from tests.tiny import PINPOINTS, text_ids, tiny_model

pytestmark = pytest.mark.core

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes, which has no wheel for every machine"
)
TRAINER = {"learning_rate": 5e-3, "per_device_train_batch_size": 6, "max_steps": 3, "disable_tqdm": True}


@pytest.mark.parametrize("text", ["llama", "phi", "mpt"])
def test_adapters_lie_in_the_language_model_alone(text):
    wrapped = add_lora(tiny_model(text=text), {"r": 2}, trained_parts=("mm_projector",))
    adapted = {name for name, parameter in wrapped.named_parameters() if "lora_" in name}
    assert adapted and all(part_of(name) == "language_model" for name in adapted)
    trained = {part_of(name) for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    assert trained == {"language_model", "mm_projector"}
    assert "vision_tower" not in find_targets(tiny_model(text=text))


@pytest.mark.parametrize("tokens_per_batch", [None, 400])
def test_run(workspace, tmp_path, tokens_per_batch):
    trainer = {key: value for key, value in TRAINER.items() if not tokens_per_batch or "batch_size" not in key}
    fields = {"stage": "lora", "lora": {"r": 4, "lora_alpha": 8}, "output_dir": str(tmp_path / "out")}
    recipe = write_recipe(workspace, **fields, trainer=trainer, tokens_per_batch=tokens_per_batch)
    kept = {}
    original = LlavaTrainer.train

    def train_and_keep(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        kept["model"] = self.model
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlavaTrainer, "train", train_and_keep)
        out = train(read_recipe(recipe))
    assert not (out / "model.safetensors").exists()
    names = load_file(out / "adapter_model.safetensors")
    assert {part_of(name) for name in names} == {"language_model", "mm_projector"}

    start = AutoModelForVision2Seq.from_pretrained(workspace / "start")
    loaded = AutoModelForVision2Seq.from_pretrained(out)
    AutoProcessor.from_pretrained(out)
    inputs = folders.example_inputs(start)
    expected = folders.logits_of(kept["model"].eval(), inputs)
    torch.testing.assert_close(folders.logits_of(loaded, inputs), expected, rtol=1e-4, atol=1e-5)
    assert (expected - folders.logits_of(start, inputs)).abs().max() > 1e-3
    merged = kept["model"].merge_and_unload()
    torch.testing.assert_close(folders.logits_of(merged, inputs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_other_kinds_of_adapters_load_as_they_were_trained(workspace, tmp_path, settings):
    fields = {"stage": "lora", "lora": {"r": 4, "lora_dropout": 0.0} | settings, "output_dir": str(tmp_path)}
    trainer = build_trainer(read_recipe(write_recipe(workspace, **fields, trainer=TRAINER)))
    trainer.train()
    trainer.save_trained()
    start, trained = AutoModelForVision2Seq.from_pretrained(workspace / "start"), trainer.model.eval()
    inputs = folders.example_inputs(start)
    expected = folders.logits_of(trained, inputs)
    assert torch.equal(folders.logits_of(AutoModelForVision2Seq.from_pretrained(tmp_path), inputs), expected)
    assert torch.equal(folders.logits_of(PeftModel.from_pretrained(start, tmp_path), inputs), expected)


def test_tower_and_newline_train_beside_the_adapter(workspace, tiled_start, tmp_path):
    """Both are in every checkpoint, and what loads it computes what was trained."""
    fields = {"stage": "lora", "lora": {"r": 4, "lora_dropout": 0.0}, "train_vision_tower": True}
    trainer = TRAINER | {"save_strategy": "steps", "save_steps": 2}
    recipe = write_recipe(workspace, **fields, model=str(tiled_start), output_dir=str(tmp_path), trainer=trainer)
    trainer = build_trainer(read_recipe(recipe))
    trainer.train()
    trainer.save_trained()
    checkpoint = tmp_path / "checkpoint-2"
    assert AutoModelForVision2Seq.from_pretrained(checkpoint).peft_config
    assert {path.name for path in checkpoint.iterdir()} >= {"optimizer.pt", "scheduler.pt", "trainer_state.json"}
    assert AutoProcessor.from_pretrained(checkpoint).chat_template == trainer.processing_class.chat_template
    names = load_file(checkpoint / "adapter_model.safetensors")
    assert {part_of(name) for name in names} == {"language_model", "mm_projector", "image_newline", "vision_tower"}

    start, trained = AutoModelForVision2Seq.from_pretrained(tiled_start), trainer.model.eval()
    inputs = folders.example_inputs(start)
    expected = folders.logits_of(trained, inputs)
    assert torch.equal(folders.logits_of(AutoModelForVision2Seq.from_pretrained(tmp_path), inputs), expected)
    by_peft = PeftModel.from_pretrained(start, tmp_path)
    assert torch.equal(folders.logits_of(by_peft, inputs), expected)
    merged, expected = by_peft.merge_and_unload(), trained.merge_and_unload()
    assert torch.equal(folders.logits_of(merged, inputs), folders.logits_of(expected, inputs))

    start = AutoModelForVision2Seq.from_pretrained(tiled_start).state_dict()
    changed = {part_of(name) for name, value in merged.state_dict().items() if not torch.equal(value, start[name])}
    assert changed == {"language_model", "mm_projector", "image_newline", "vision_tower"}


def test_each_part_has_its_own_rate(workspace):
    tiles = {"image_grid_pinpoints": PINPOINTS, "patch_merge_type": "spatial_unpad"}
    fields = {"stage": "lora", "projector_learning_rate": 2.0, "vision_tower_learning_rate": 3.0}
    recipe = read_recipe(write_recipe(workspace, **fields, train_vision_tower=True))
    wrapped = add_lora(tiny_model(**tiles), {"r": 2}, trained_parts=recipe.trained_parts)
    trainer = object.__new__(LlavaTrainer)
    trainer.recipe = recipe
    trainer.args = type("Arguments", (), {"learning_rate": 1.0, "weight_decay": 0.0})()
    rates = {id(item): group["lr"] for group in trainer.group_parameters(wrapped) for item in group["params"]}
    trained = {name: parameter for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    found = {part_of(name): rates[id(parameter)] for name, parameter in trained.items()}
    assert found == {"language_model": 1.0, "mm_projector": 2.0, "image_newline": 2.0, "vision_tower": 3.0}


def adapted_layers(**settings) -> set[str]:
    wrapped = add_lora(tiny_model(), {"r": 2, **settings}, trained_parts=("mm_projector",))
    adapted = {name for name, _ in wrapped.named_parameters() if "lora_A" in name}
    return {name.removeprefix("base_model.model.model.").split(".lora_A")[0] for name in adapted}


def test_any_field_of_peft_can_be_set():
    settings = {"r": 2, "target_modules": "all-linear", "modules_to_save": ["lm_head"], "use_rslora": True}
    wrapped = add_lora(tiny_model(), settings, trained_parts=("mm_projector",))
    assert wrapped.peft_config["default"].use_rslora
    trained = {part_of(name) for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    assert trained == {"language_model", "mm_projector", "lm_head"}


@pytest.mark.parametrize("trained_parts", [("mm_projector",), ("mm_projector", "vision_tower")])
def test_all_biases_are_those_of_what_trains(trained_parts):
    wrapped = add_lora(tiny_model(text="phi"), {"r": 2, "bias": "all"}, trained_parts=trained_parts)
    trained = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    assert {part_of(name) for name in trained} == {"language_model", "lm_head", *trained_parts}
    assert not any("original_module" in name for name in trained)
    assert any("fc1.base_layer.bias" in name for name in trained)


def test_words_that_the_tower_has_too_mean_the_language_model():
    expected = {
        f"language_model.layers.{layer}.self_attn.{name}" for layer in range(2) for name in ("q_proj", "v_proj")
    }
    assert adapted_layers(target_modules=["q_proj", "v_proj"]) == expected
    of_first = {name for name in expected if "layers.0" in name}
    assert adapted_layers(target_modules=["q_proj", "v_proj"], layers_to_transform=[0]) == of_first
    without_v = {name for name in expected if name.endswith("q_proj")}
    assert adapted_layers(target_modules=["q_proj", "v_proj"], exclude_modules=["v_proj"]) == without_v
    by_default = {name for name in adapted_layers() if "layers.1." in name}
    assert adapted_layers(layers_to_transform=1) == by_default
    assert adapted_layers(target_modules="all-linear", layers_to_transform=[1]) == by_default
    assert adapted_layers(target_modules=r".*vision_tower.*\.layers\.0\..*\.q_proj") == {
        "vision_tower.encoder.layers.0.self_attn.q_proj"
    }


def step_in_16_bits(*, autocast: bool) -> tuple[float, torch.Tensor, int]:
    """Loss, gradients of all adapters, and bytes that are kept for the backward pass."""
    torch.manual_seed(0)
    settings = {"r": 4, "lora_dropout": 0.0, "init_lora_weights": False}
    model = add_lora(tiny_model().bfloat16(), settings, trained_parts=("mm_projector",), autocast=autocast)
    ids, kept = torch.tensor([text_ids(40)]), {}
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.update({tensor.data_ptr(): tensor.nbytes}) or tensor, lambda tensor: tensor
    )
    with torch.autocast("cpu", dtype=torch.bfloat16), hooks:
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    gradients = [parameter.grad.flatten() for name, parameter in model.named_parameters() if "lora_" in name]
    return loss.item(), torch.cat(gradients), sum(kept.values())


def test_under_autocast_no_copies_in_32_bits_are_kept():
    loss, gradients, num_bytes = step_in_16_bits(autocast=True)
    expected_loss, expected, num_bytes_of_peft = step_in_16_bits(autocast=False)
    assert loss == expected_loss
    torch.testing.assert_close(gradients, expected, rtol=0, atol=1e-2 * expected.abs().max().item())
    assert num_bytes < num_bytes_of_peft


def test_a_run_in_16_bits_trains_under_autocast(workspace, tmp_path):
    fields = {"stage": "lora", "lora": {"r": 2}, "output_dir": str(tmp_path / "out")}
    for bf16 in (True, False):
        recipe = read_recipe(write_recipe(workspace, **fields, trainer=TRAINER | {"bf16": bf16}))
        adapters = [module for module in load_model(recipe, bf16=bf16).modules() if isinstance(module, LoraLayer)]
        assert adapters and {adapter.cast_input_dtype_enabled for adapter in adapters} == {not bf16}


def test_the_projector_is_counted_once(workspace):
    wrapped = add_lora(tiny_model(), {"r": 2}, trained_parts=("mm_projector",))
    number = sum(parameter.numel() for parameter in tiny_model().model.mm_projector.parameters())
    assert count_parameters(wrapped)["mm_projector"] == (number, number)


@pytest.mark.parametrize("stage", ["lora", "finetune"])
def test_an_adapter_as_model_is_refused(workspace, tmp_path, stage):
    fields = {"stage": "lora", "lora": {"r": 2}, "trainer": TRAINER | {"max_steps": 1}}
    adapter = train(read_recipe(write_recipe(workspace, **fields, output_dir=str(tmp_path / "adapter"))))
    recipe = write_recipe(workspace, stage=stage, model=str(adapter), output_dir=str(tmp_path / "again"))
    with pytest.raises(ValueError, match="adapter', which is an adapter; .* `llava merge .*adapter --out FOLDER`"):
        train(read_recipe(recipe))


def test_over_an_original_checkpoint(workspace, tmp_path):
    """The adapter names the original folder as its base, and loads over it."""
    folders.write_v15(tmp_path)
    fields = {"stage": "lora", "lora": {"r": 4}, "output_dir": str(tmp_path / "out")}
    fields["model"] = str(tmp_path / "checkpoint")
    out = train(read_recipe(write_recipe(workspace, **fields, trainer=TRAINER)))
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "checkpoint")
    loaded = AutoModelForVision2Seq.from_pretrained(out)
    assert any("lora_" in name for name, _ in loaded.named_parameters())
    base = AutoModelForVision2Seq.from_pretrained(tmp_path / "checkpoint")
    inputs = folders.example_inputs(base)
    assert not torch.equal(folders.logits_of(loaded, inputs), folders.logits_of(base, inputs))


@needs_bitsandbytes
@pytest.mark.parametrize("train_vision_tower", [False, True])
def test_four_bits(workspace, tmp_path, train_vision_tower):
    """What trains beside the adapters is float32: bfloat16 weights would take up no step of this rate."""
    fields = {"stage": "qlora", "train_vision_tower": train_vision_tower, "output_dir": str(tmp_path / "out")}
    settings = TRAINER | {"learning_rate": 1e-6, "max_steps": 1, "lr_scheduler_type": "constant", "warmup_steps": 0}
    trainer = build_trainer(read_recipe(write_recipe(workspace, **fields, lora={"r": 2}, trainer=settings)))
    beside = {
        name: parameter
        for name, parameter in trainer.model.named_parameters()
        if parameter.requires_grad and "lora_" not in name
    }
    parts = {"mm_projector", "vision_tower"} if train_vision_tower else {"mm_projector"}
    assert {part_of(name) for name in beside} == parts
    assert {parameter.dtype for parameter in beside.values()} == {torch.float32}
    before = {name: parameter.clone() for name, parameter in beside.items()}
    trainer.train()
    trainer.save_trained()
    changed = {part_of(name) for name, parameter in beside.items() if not torch.equal(parameter, before[name])}
    assert changed == parts
    names = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {part_of(name) for name in names} == {"language_model", *parts}


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"lora": {"r": 4}}, "got lora settings for stage 'finetune'"),
        ({"images_per_batch": 3}, "got images_per_batch without tokens_per_batch"),
        ({"tokens_per_batch": 100, "attn_implementation": "eager"}, "got attn_implementation='eager' with tokens"),
        (
            {"tokens_per_batch": 100},
            "got trainer.per_device_train_batch_size, which has no effect beside tokens_per_batch",
        ),
    ],
)
def test_recipes_that_cannot_work(workspace, fields, message):
    with pytest.raises(ValueError, match=message):
        read_recipe(write_recipe(workspace, **fields))
