"""`llava assemble`, `llava merge` and `llava doctor`."""

import argparse
from pathlib import Path


def run_assemble(options: argparse.Namespace) -> None:
    from modeling_llava.assemble import assemble

    layers = options.vision_feature_layer

    model, processor = assemble(
        vision_tower=options.vision_tower,
        language_model=options.language_model,
        template=options.template,
        projector_type=options.projector,
        image_aspect_ratio=options.image_aspect_ratio,
        image_grid_pinpoints=options.image_grid_pinpoints,
        patch_merge_type=options.patch_merge_type,
        vision_feature_layer=layers if len(layers) > 1 else layers[0],
        seed=options.seed,
    )
    model.save_pretrained(options.out)
    processor.save_pretrained(options.out)
    print(f"{options.out}: {model.num_parameters():,} parameters")


def run_merge(options: argparse.Namespace) -> None:
    from modeling_llava.export.merged_adapter import merge_adapter

    report = merge_adapter(
        options.adapter, Path(options.out), base_model=options.base_model, base_bits=options.base_bits
    )
    print(f"{options.out}: {report}")


def run_doctor(options: argparse.Namespace) -> None:
    from .doctor import report

    print(
        report(
            num_parameters=options.parameters,
            model=options.model,
            num_images=options.images,
            num_new_tokens=options.new_tokens,
            num_rows=options.rows,
            quantization=options.quantization,
            visual_tokens=options.visual_tokens,
        )
    )
