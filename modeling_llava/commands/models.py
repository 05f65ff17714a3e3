"""`llava assemble`, `llava merge` and `llava doctor`."""

import argparse
from pathlib import Path


def add_commands(commands) -> None:
    assemble = commands.add_parser("assemble", help="make a new LLaVA from a vision tower and a language model")
    assemble.add_argument("--vision-tower", required=True, help="folder or Hub id")
    assemble.add_argument("--language-model", required=True, help="folder or Hub id")
    assemble.add_argument("--projector", default="mlp2x_gelu", help="linear, mlpNx_gelu or identity")
    assemble.add_argument("--template", required=True, help="conversation format, e.g. vicuna_v1")
    assemble.add_argument(
        "--vision-feature-layer", type=int, nargs="+", default=[-2], help="hidden state that is projected, or several"
    )
    assemble.add_argument("--image-aspect-ratio", default="pad", help="pad, square or anyres")
    assemble.add_argument(
        "--image-grid-pinpoints",
        type=_parse_size,
        nargs="+",
        metavar="HEIGHTxWIDTH",
        help="with anyres: sizes in pixels that a picture may be cut into tiles at",
    )
    assemble.add_argument("--patch-merge-type", default="flat", help="of tiles: flat, spatial or spatial_unpad")
    assemble.add_argument("--seed", type=int, default=0, help="of the projector's initial weights")
    assemble.add_argument("--out", required=True, help="folder to write")
    assemble.set_defaults(run=run_assemble)

    merge = commands.add_parser("merge", help="make one model of an adapter and its base")
    merge.add_argument("adapter", metavar="ADAPTER", help="folder or Hub id")
    merge.add_argument("--out", required=True, help="folder to write")
    merge.add_argument("--base-model", help="folder or Hub id to use instead of the one that the adapter names")
    merge.add_argument("--base-bits", type=int, help="4 if it was trained on a 4-bit base (default: see its record)")
    merge.set_defaults(run=run_merge)

    doctor = commands.add_parser("doctor", help="versions, device, cached models, and the memory that a model needs")
    doctor.add_argument("--parameters", type=float, default=7e9, help="size of a model in parameters, e.g. 7e9")
    doctor.add_argument("--model", help="folder or Hub id; nothing but its config.json is read")
    doctor.add_argument("--images", type=int, default=1, help="in each prompt to the model")
    doctor.add_argument("--new-tokens", type=int, default=256, help="of each answer of the model")
    doctor.add_argument("--rows", type=int, default=1, help="answers of the model at a time")
    doctor.add_argument("--quantization", help="of the model: int8 on a processor; int4, fp8 or nf4 on a GPU")
    doctor.add_argument("--visual-tokens", type=int, help="most tokens of a picture that the model sees")
    doctor.set_defaults(run=run_doctor)


def _parse_size(text: str) -> list[int]:
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a height and a width in pixels, e.g. 336x672")
    return [int(height), int(width)]


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
    from modeling_llava.doctor import report

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
