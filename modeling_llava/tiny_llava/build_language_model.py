"""Build the fresh language model of the tiny LLaVA: a small Llama with random weights and the tokenizer of build_data.

    python -m modeling_llava.tiny_llava.build_language_model --tokenizer DIR/tokenizer --out DIR [--seed 0]

Most of the checkpoint's 24 MB go to the vision tower, where more layers bring more names; answers of a few words need
little.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

INITIALIZER_RANGE = 0.06
"""About 1 / sqrt(192). The usual 0.02 is made for wide models."""


def build_language_model(vocabulary: int, eos: int, pad: int) -> LlamaForCausalLM:
    """Return a Llama with random weights for the given vocabulary size and special token ids."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=INITIALIZER_RANGE,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=pad,
    )
    return LlamaForCausalLM(config)


def main() -> None:
    """Build the language model that the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    language_model = build_language_model(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id)
    language_model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    print(f"{sum(parameter.numel() for parameter in language_model.parameters()):,} parameters in {arguments.out}")


if __name__ == "__main__":
    main()
