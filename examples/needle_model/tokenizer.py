"""The tokenizer of the needle model: one token per known word, byte pairs for anything else.

Numbers are cut into pairs of digits, so a code is two tokens, and text is lower-cased and
single-spaced, so that a fact reads the same wherever it stands.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from needle_model import text

BEGIN, USER, ASSISTANT, SYSTEM, END = SPECIAL = (
    "<|begin|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|end|>",
)
CHAT_TEMPLATE = (
    "{{ '<|begin|>' }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer(context: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose merges make every word of ``text.words`` one token.

    Args:
        context: tokens that the model is made for, written into the tokenizer's settings.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
            normalizers.Prepend(" "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\d{1,2}| ?\p{L}+| ?[^\s\p{L}\d]|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1_000_000,
        min_frequency=1,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pairs = [f"{i:02d}" for i in range(100)]
    tokenizer.train_from_iterator([*text.words(), *pairs, *(f"{p}{p}" for p in pairs)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=END,
        chat_template=CHAT_TEMPLATE,
        model_max_length=context,
    )


def save_tokenizer(path: Path, context: int) -> None:
    """Write the tokenizer beside the weights."""
    build_tokenizer(context).save_pretrained(path)
