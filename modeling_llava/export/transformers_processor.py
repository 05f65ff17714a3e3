"""Our processor as transformers' own LlavaProcessor or LlavaNextProcessor, for repositories that need no code of ours.

What is surprising: transformers' processors tokenise the whole prompt at once. On a SentencePiece tokenizer the text
after an image then begins with other pieces than the original LLaVA's, so `changes_ids` says whether the model will
see the ids that it was trained on.
"""

from pathlib import Path

from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    LlavaImageProcessorPil,
    LlavaNextConfig,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedConfig,
    ProcessorMixin,
    SiglipImageProcessorPil,
)

from processing_llava.processing_llava import AnyLlavaProcessor

_IMAGE_FIELDS = (
    "size", "crop_size", "do_center_crop", "resample", "image_mean", "image_std", "do_normalize", "do_rescale",
    "rescale_factor", "do_convert_rgb",
)  # fmt: skip


def build_transformers_processor(processor: AnyLlavaProcessor, config: PreTrainedConfig) -> ProcessorMixin:
    """The processor of transformers that prepares the same pixels.

    Args:
        processor: Ours.
        config: What `write_transformers_config` made of the model's configuration.
    """
    ours = processor.image_processor
    fields = {name: getattr(ours, name) for name in _IMAGE_FIELDS}
    is_tiled = isinstance(config, LlavaNextConfig)
    if is_tiled:
        image_processor = LlavaNextImageProcessorPil(**fields, image_grid_pinpoints=ours.image_grid_pinpoints)
    elif ours.image_aspect_ratio == "pad":
        image_processor = LlavaImageProcessorPil(**fields, do_pad=True)
    elif ours.do_center_crop:
        image_processor = CLIPImageProcessorPil(**fields)
    else:
        image_processor = SiglipImageProcessorPil(**fields)
    drops_class_token = config.vision_feature_select_strategy == "default"
    return (LlavaNextProcessor if is_tiled else LlavaProcessor)(
        image_processor,
        processor.tokenizer,
        patch_size=processor.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=processor.chat_template,
        image_token=processor.image_token,
        num_additional_image_tokens=1 if drops_class_token else processor.num_prefix_tokens,
    )


def save_transformers_processor(processor: ProcessorMixin, folder: Path) -> None:
    """Save it; engines on transformers 4 look for the settings of pictures in a file of their own."""
    processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)


def changes_ids(ours: AnyLlavaProcessor, theirs: ProcessorMixin) -> bool:
    """Whether the two make other ids of one question about one picture."""
    picture = Image.new("RGB", (64, 48))
    question = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]}]
    ids = [
        processor.apply_chat_template(
            question, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )["input_ids"].tolist()
        for processor in (ours, theirs)
    ]
    return ids[0] != ids[1]
