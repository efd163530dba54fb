"""A tokenizer learned from text, by the library ``tokenizers`` (extra ``lm``)."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from recollect.core.errors import ConfigError, RecollectError
from recollect.text.tokenizer import EOS, TextTokenizer, load_tokenizer

SMALLEST = 257
"""Every byte, and the end of a document."""


def learn_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> TextTokenizer:
    """Byte-level byte-pair encoding (Sennrich et al. 2016) of ``vocab_size`` tokens, learned from ``texts`` and saved.

    Digits stand alone, so that numbers are spelt and not remembered. Deterministic. Raises ConfigError for fewer than
    257 tokens, RecollectError without ``tokenizers`` and ``transformers``. Memory: the distinct words of the texts.
    """
    if vocab_size < SMALLEST:
        raise ConfigError(
            f"a byte-level tokenizer has at least {SMALLEST} tokens, got {vocab_size}; for bytes: 'bytes'"
        )
    try:
        library, transformers = importlib.import_module("tokenizers"), importlib.import_module("transformers")
    except ImportError:
        raise RecollectError("learning a tokenizer needs transformers: pip install 'recollect[lm]'") from None
    learned: Any = library.Tokenizer(library.models.BPE())
    split = library.pre_tokenizers
    learned.pre_tokenizer = split.Sequence(
        [split.Digits(individual_digits=True), split.ByteLevel(add_prefix_space=False)]
    )
    learned.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=sorted(split.ByteLevel.alphabet()),
        show_progress=False,
    )
    learned.train_from_iterator(texts, trainer)
    special = {f"{name}_token": EOS for name in ("bos", "eos", "pad")}
    transformers.PreTrainedTokenizerFast(tokenizer_object=learned, **special).save_pretrained(str(folder))
    return load_tokenizer(folder)
