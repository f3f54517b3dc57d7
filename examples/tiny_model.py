"""Make a small model with random weights that SGLang serves: no download, a few seconds.

    python examples/tiny_model.py OUT [--arch llama] [--layers 4] [--kv-heads 2] [--head-dim 64]

It speaks bytes (a byte-level tokenizer and a minimal chat template) and says nonsense, but the
same nonsense every time: enough to show what a cache policy does to it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral")
CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def make_tokenizer(out: Path) -> int:
    """Write a byte-level tokenizer to ``out``; returns its vocabulary size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        chat_template=CHAT_TEMPLATE,
    )
    fast.save_pretrained(out)
    return len(vocabulary)


def make_model(
    out: Path,
    arch: str = "llama",
    layers: int = 4,
    heads: int = 8,
    kv_heads: int = 2,
    head_dim: int = 64,
    context: int = 131072,
    dtype: str = "bfloat16",
    seed: int = 0,
) -> Path:
    """Write a random model and its tokenizer to ``out``, unless it is there already.

    Weights are larger than usual so that attention is peaked and logits are far apart: what the
    model says then depends on pages all over the context.
    """
    if (out / "model.safetensors").exists():
        return out
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    out.mkdir(parents=True, exist_ok=True)
    vocabulary = make_tokenizer(out)
    options = {"sliding_window": None} if arch == "mistral" else {}
    config = AutoConfig.for_model(
        arch,
        vocab_size=vocabulary,
        hidden_size=heads * head_dim if arch == "qwen2" else 256,  # its head size is derived
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=context,
        rope_theta=1e6,
        tie_word_embeddings=False,
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        **options,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype))
    model.save_pretrained(out)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--arch", choices=ARCHITECTURES, default="llama")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--context", type=int, default=131072)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(make_model(**vars(options)))


if __name__ == "__main__":
    main()
