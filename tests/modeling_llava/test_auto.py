"""Registration: every way in which others look models up finds ours. Claims about imports run in new processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModel, AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    LlavaConfig,
    pipeline,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from modeling_llava import AnyLlavaConfig, AnyLlavaForConditionalGeneration, AnyLlavaModel, AutoModelForVision2Seq
from processing_llava import AnyLlavaImageProcessorPil, AnyLlavaProcessor
from tests.tiny import TEXT_CONFIGS, VISION_CONFIGS, random_images, save_tiny_checkpoint, tiny_config

pytestmark = pytest.mark.core

REPOSITORY = Path(__file__).parents[2]


def run_python(code: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.mark.parametrize(
    "auto_class",
    [AutoModelForVision2Seq, AutoModelForImageTextToText, AutoModelForMultimodalLM],
    ids=lambda auto_class: auto_class.__name__,
)
def test_auto_classes_load_and_build(checkpoint, auto_class):
    assert type(auto_class.from_pretrained(checkpoint)) is AnyLlavaForConditionalGeneration
    assert type(auto_class.from_config(tiny_config())) is AnyLlavaForConditionalGeneration


def test_parts_load(checkpoint):
    assert type(AutoConfig.from_pretrained(checkpoint)) is AnyLlavaConfig
    assert type(AutoModel.from_pretrained(checkpoint)) is AnyLlavaModel
    assert type(AutoProcessor.from_pretrained(checkpoint)) is AnyLlavaProcessor
    assert type(AutoImageProcessor.from_pretrained(checkpoint)) is AnyLlavaImageProcessorPil


def test_vision2seq_builds_the_models_of_transformers_too():
    config = LlavaConfig(vision_config=VISION_CONFIGS["clip"](), text_config=TEXT_CONFIGS["llama"]())
    assert type(AutoModelForVision2Seq.from_config(config)).__name__ == "LlavaForConditionalGeneration"


def test_vision2seq_loads_an_adapter_folder(checkpoint, tmp_path):
    model = AutoModelForVision2Seq.from_pretrained(checkpoint)
    lora = LoraConfig(target_modules=r"model\.language_model\..*\.(q_proj|v_proj)", init_lora_weights=False)
    adapted = get_peft_model(model, lora).eval()
    adapted.save_pretrained(tmp_path)
    loaded = AutoModelForVision2Seq.from_pretrained(tmp_path)
    ids = torch.tensor([[1, 5, 6]])
    torch.testing.assert_close(loaded(ids).logits, adapted(ids).logits)


def test_auto_peft_model(checkpoint, tmp_path):
    """Its error says how; and it gives the image token no embedding, though the tokenizer lies beside the adapter."""
    model = AutoModelForVision2Seq.from_pretrained(checkpoint)
    lora = LoraConfig(target_modules=["q_proj", "embed_tokens"], init_lora_weights=False)
    adapted = get_peft_model(model, lora).eval()
    adapted.save_pretrained(tmp_path, save_embedding_layers=True)
    AutoProcessor.from_pretrained(checkpoint).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"specify `import_allowlist=\['modeling_llava.modeling_llava'\]` in"):
        AutoPeftModel.from_pretrained(tmp_path)
    loaded = AutoPeftModel.from_pretrained(tmp_path, import_allowlist=["modeling_llava"])
    ids = torch.tensor([[1, 5, 6]])
    torch.testing.assert_close(loaded(ids).logits, adapted(ids).logits)


@pytest.mark.parametrize(
    "imports",
    [
        "import modeling_llava, transformers.processing_utils",
        "import transformers.processing_utils, modeling_llava",
        "import transformers; held = transformers; import modeling_llava; held.AutoModelForVision2Seq",
        "import transformers; transformers.AutoProcessor; import modeling_llava",
        "import transformers as held; held.AutoProcessor; import modeling_llava; held.AutoModelForVision2Seq",
    ],
)
def test_vision2seq_is_importable_whatever_came_first(imports):
    code = f"{imports}\nfrom transformers import AutoModelForVision2Seq as found\n"
    code += "import transformers, transformers.models.auto as auto\n"
    code += "assert found is transformers.AutoModelForVision2Seq is auto.AutoModelForVision2Seq\n"
    code += "assert transformers.AnyLlavaForConditionalGeneration is modeling_llava.AnyLlavaForConditionalGeneration\n"
    code += "print(found.__name__)"
    assert run_python(f"import modeling_llava\n{code}" if "modeling_llava" not in imports else code) == (
        "AutoModelForVision2Seq"
    )


ENTRIES = {
    "AutoConfig": ("from transformers import AutoConfig", "AutoConfig.from_pretrained(folder)", "AnyLlavaConfig"),
    "AutoModel": ("from transformers import AutoModel", "AutoModel.from_pretrained(folder)", "AnyLlavaModel"),
    "AutoModelForImageTextToText": (
        "from transformers import AutoModelForImageTextToText as Auto", "Auto.from_pretrained(folder)",
        "AnyLlavaForConditionalGeneration",
    ),
    "AutoProcessor": (
        "from transformers import AutoProcessor", "AutoProcessor.from_pretrained(folder)", "AnyLlavaProcessor",
    ),
    "AutoImageProcessor": (
        "from transformers.models.auto.image_processing_auto import AutoImageProcessor",
        "AutoImageProcessor.from_pretrained(folder)", "AnyLlavaImageProcessorPil",
    ),
    "AutoTokenizer": (
        "from transformers import AutoTokenizer", "AutoTokenizer.from_pretrained(folder)", "TokenizersBackend",
    ),
    "pipeline": (
        "from transformers import pipeline", "pipeline('image-text-to-text', model=folder).processor",
        "AnyLlavaProcessor",
    ),
    "attribute": (
        "import transformers", "transformers.AnyLlavaProcessor.from_pretrained(folder)", "AnyLlavaProcessor",
    ),
    "submodule": (
        "from modeling_llava.modeling_llava import AnyLlavaForConditionalGeneration as Ours",
        "Ours.from_pretrained(folder)", "AnyLlavaForConditionalGeneration",
    ),
}  # fmt: skip
ENTER = """
import json, os, sys
import torch
folder, ours, entries = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
for name, (imports, use, _) in entries.items():
    if os.fork() == 0:
        exec({"first": f"import modeling_llava; {imports}", "last": f"{imports}; import modeling_llava"}[ours])
        print(name, type(eval(use)).__name__, flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.slow
@pytest.mark.parametrize("ours", ["first", "last"])
def test_every_entry_of_transformers_leads_to_our_classes(checkpoint, ours):
    """Each in a process of its own, which has imported nothing of ours and nothing else of transformers."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    arguments = [sys.executable, "-c", ENTER, str(checkpoint), ours, json.dumps(ENTRIES)]
    result = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    found = dict(line.split() for line in result.stdout.splitlines())
    assert found == {name: expected for name, (*_, expected) in ENTRIES.items()}, result.stderr


def test_importing_loads_none_of_the_classes():
    heavy = "{'transformers.modeling_utils', 'transformers.processing_utils', 'modeling_llava.auto'}"
    assert run_python(f"import sys, modeling_llava, processing_llava; print({heavy} & set(sys.modules))") == "set()"


def test_importing_does_not_import_the_extras():
    extras = "{'trl', 'peft', 'datasets', 'gradio'}"
    assert run_python(f"import sys, modeling_llava, processing_llava; print({extras} & set(sys.modules))") == "set()"


def test_tables_that_others_read_by_name(checkpoint):
    from transformers.models.auto import modeling_auto

    tables = (
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    )
    for table in tables:
        assert table["any_llava"] == "AnyLlavaForConditionalGeneration"


def test_trl_finds_the_class_of_a_path(checkpoint):
    from trl.trainer.utils import create_model_from_path

    assert type(create_model_from_path(str(checkpoint))) is AnyLlavaForConditionalGeneration


def test_pipeline_answers(checkpoint):
    import PIL.Image

    pipe = pipeline("image-text-to-text", model=str(checkpoint))
    picture = PIL.Image.new("RGB", (40, 30), "red")
    messages = [
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What is this?"}]}
    ]
    settings = {"max_new_tokens": 3, "do_sample": False}
    (result,) = pipe(text=messages, return_full_text=False, generate_kwargs=settings)
    inputs = pipe.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    generated = pipe.model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :]
    assert result["generated_text"] == pipe.processor.decode(generated, skip_special_tokens=True)


def test_import_order_of_processor_and_model_in_one_forward(checkpoint):
    model, processor = AutoModelForVision2Seq.from_pretrained(checkpoint), AutoProcessor.from_pretrained(checkpoint)
    assert processor.image_token_id == model.config.image_token_id
    assert model.get_image_features(random_images(1)).pooler_output[0].shape[0] == 16


@pytest.mark.parametrize("auto_class", [AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoPeftModelForCausalLM])
def test_auto_classes_of_language_models_name_the_right_one(checkpoint, tmp_path, auto_class):
    lora = LoraConfig(target_modules=["up_proj"], task_type="CAUSAL_LM")
    model = AutoModelForVision2Seq.from_pretrained(checkpoint)
    get_peft_model(model, lora).save_pretrained(tmp_path)
    name = tmp_path if auto_class is AutoPeftModelForCausalLM else checkpoint
    with pytest.raises(ValueError, match="expected AutoModelForVision2Seq") as error:
        auto_class.from_pretrained(str(name))
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)
    if auto_class is not AutoPeftModelForCausalLM:
        with pytest.raises(ValueError, match="expected AutoModelForVision2Seq"):
            auto_class.from_config(tiny_config())


def test_the_tower_is_where_scripts_for_the_original_look(checkpoint):
    model = AutoModelForVision2Seq.from_pretrained(checkpoint)
    assert model.vision_tower is model.model.vision_tower
    assert not any(name.startswith("vision_tower") for name, _ in model.named_parameters())


@pytest.mark.parametrize("auto_class", [AutoConfig, AutoModelForVision2Seq, AutoModelForImageTextToText])
@pytest.mark.parametrize(
    ("place", "fields", "message"),
    [
        (None, {"num_labels": 10**9}, "got num_labels=1000000000 in .*; expected at most 10000"),
        ("text_config", {"num_labels": 10**7}, "got text_config.num_labels=10000000 in"),
        (None, {"_attn_implementation": "evil/kernel"}, "which would run code of the Hub"),
        ("text_config", {"attn_implementation": "kernels-community/flash-attn2"}, "which would run code of the Hub"),
    ],
)
def test_a_config_can_ask_for_no_memory_and_no_code(tmp_path, auto_class, place, fields, message):
    folder = save_tiny_checkpoint(tmp_path)
    raw = json.loads((folder / "config.json").read_text())
    (raw if place is None else raw[place]).update(fields)
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=message):
        auto_class.from_pretrained(folder)
