"""Text to token ids and back: the built-in bytes, or any tokenizer that ``transformers`` reads (extra ``lm``).

``load_tokenizer`` is the one way in: "bytes", a folder, a ``tokenizer.json``, or a name on the Hugging Face hub.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from recollect.core.errors import ConfigError, DataError, RecollectError, described, nearest
from recollect.core.files import write_atomically

Ints: TypeAlias = npt.NDArray[np.int64]
Tokens: TypeAlias = npt.NDArray[np.uint16 | np.uint32]

EOS = "<|endoftext|>"
BYTES = "bytes"
"""What ``load_tokenizer`` calls the built-in tokenizer."""


class EncodedDocuments(NamedTuple):
    """Documents one after the other, each ending with ``eos_id``."""

    tokens: Tokens
    """(N,) of the narrowest type that holds the vocabulary: see ``token_dtype``."""
    lengths: Ints
    """(documents,) tokens of each, its ``eos_id`` included; they sum to N."""


class TextTokenizer(Protocol):
    """What the text room asks of a tokenizer. Instances pickle: they travel to the processes that tokenise."""

    @property
    def name(self) -> str:
        """What ``load_tokenizer`` was given."""
        ...

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included."""
        ...

    @property
    def eos_id(self) -> int:
        """The id that ends a document."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 of its definition and ``eos_id``, in hex: equal fingerprints, equal ids for every text."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of a text; no special token is added. Raises DataError for half a surrogate pair, which is no text."""
        ...

    def encode_documents(self, texts: Sequence[str]) -> EncodedDocuments:
        """Ids of every text with ``eos_id`` after each. Errors as ``encode``."""
        ...

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer[Any]]) -> str:
        """The text of ids, special tokens written out.

        Bytes that are no UTF-8 become U+FFFD; an id without a token, such as one that only pads a model's vocabulary,
        becomes nothing.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write the files with which ``transformers.AutoTokenizer.from_pretrained(folder)`` gives the same ids."""
        ...


class ByteTokenizer:
    """Ids 0..255 are the bytes of UTF-8; 256 is ``<|endoftext|>`` (end, beginning and padding). Needs no package."""

    name = BYTES
    vocab_size = 257
    eos_id = 256

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the definition that ``save`` writes, and of ``eos_id``."""
        return _byte_fingerprint()

    def encode(self, text: str) -> list[int]:
        """The bytes of the text. Raises DataError for half a surrogate pair."""
        return list(_utf8(text))

    def encode_documents(self, texts: Sequence[str]) -> EncodedDocuments:
        """Bytes of every text with 256 after each. Cost: three passes over the bytes, some GB/s each."""
        try:
            data = [text.encode() for text in texts]
        except UnicodeEncodeError:
            data = [_utf8(text) for text in texts]
        lengths = np.fromiter(map(len, data), dtype=np.int64, count=len(data)) + 1
        # One placeholder byte after every document, overwritten by what no byte can be.
        tokens = np.frombuffer(b"\0".join([*data, b""]), dtype=np.uint8).astype(np.uint16)
        tokens[np.cumsum(lengths) - 1] = self.eos_id
        return EncodedDocuments(tokens, lengths)

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer[Any]]) -> str:
        """The text of ids; see ``TextTokenizer.decode``."""
        n = len(_BYTES_OF)
        return b"".join([_BYTES_OF[i] for i in ids if 0 <= i < n]).decode(errors="replace")

    def save(self, folder: Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``: see ``TextTokenizer.save``."""
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": EOS,
            "bos_token": EOS,
            "pad_token": EOS,
            "clean_up_tokenization_spaces": False,
            # A text that spells the token out is a text about it, not the end of a document.
            "split_special_tokens": True,
        }
        write_atomically(Path(folder) / "tokenizer.json", json.dumps(_byte_definition(), ensure_ascii=False).encode())
        write_atomically(Path(folder) / "tokenizer_config.json", json.dumps(config, indent=2).encode())


class PretrainedTokenizer:
    """A tokenizer of ``transformers``. What it makes of special tokens that a text spells out is its own rule."""

    def __init__(self, tokenizer: Any, name: str, eos: str | int | None = None) -> None:
        """``eos``: the token, or its id, that ends documents where the tokenizer has none, or another than wanted.

        Raises ConfigError if there is none, or not that one.
        """
        self.name = name
        self.tokenizer = tokenizer
        vocabulary: Mapping[str, int] = tokenizer.get_vocab()
        self.vocab_size = 1 + max(vocabulary.values())
        if eos is not None:
            tokenizer.eos_token = _known_token(eos, vocabulary, name)
        if tokenizer.eos_token_id is None:
            special = sorted(map(str, getattr(tokenizer, "all_special_tokens", [])))
            example = next((token for token in (EOS, "</s>") if token in vocabulary), (special or ["TOKEN"])[0])
            raise ConfigError(f"tokenizer '{name}' has no token that ends a document: choose one, eos='{example}'")
        self.eos_id = int(tokenizer.eos_token_id)
        # A slow tokenizer has no definition in one piece: its class and vocabulary stand for it.
        backend = getattr(tokenizer, "backend_tokenizer", None)
        slow = {"class": type(tokenizer).__name__, "vocabulary": dict(vocabulary)}
        self.fingerprint = _fingerprint(slow if backend is None else json.loads(backend.to_str()), self.eos_id)

    def encode(self, text: str) -> list[int]:
        """Ids of a text; no special token is added. Raises DataError for half a surrogate pair."""
        return self._ids([text])[0]

    def encode_documents(self, texts: Sequence[str]) -> EncodedDocuments:
        """Ids of every text with ``eos_id`` after each; a fast tokenizer uses every core."""
        documents = self._ids(texts)
        lengths = np.fromiter(map(len, documents), dtype=np.int64, count=len(documents)) + 1
        flat = chain.from_iterable(chain(ids, (self.eos_id,)) for ids in documents)
        return EncodedDocuments(
            np.fromiter(flat, dtype=token_dtype(self.vocab_size), count=int(lengths.sum())), lengths
        )

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer[Any]]) -> str:
        """The text of ids; see ``TextTokenizer.decode``."""
        listed = [int(i) for i in ids]
        return self.tokenizer.decode(listed, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def save(self, folder: Path) -> None:
        """Write what ``save_pretrained`` writes. Raises RecollectError where that is impossible."""
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.tokenizer.save_pretrained(str(folder))
        except OSError as error:
            raise RecollectError(f"'{folder}' cannot be written: {error.strerror or error}") from None

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        for text in texts:
            _utf8(text)
        options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
        return self.tokenizer(list(texts), add_special_tokens=False, **options)["input_ids"]


def load_tokenizer(name: str | Path, *, eos: str | int | None = None) -> TextTokenizer:
    """The tokenizer of a name: "bytes", a folder, a ``tokenizer.json``, or a model on the hub. Runs no code of theirs.

    ``eos`` chooses the token, or the id, that ends documents. What ``ByteTokenizer.save`` wrote is read back as one.
    Raises RecollectError without ``transformers`` where it is needed, or where the tokenizer cannot be found or read;
    ConfigError if it has no end token.
    """
    name = str(name)
    if name == BYTES:
        return _bytes(eos)
    path = Path(name).expanduser()
    if not path.exists() and (name.startswith((".", "/", "~")) or name.endswith(".json") or name.count("/") > 1):
        raise RecollectError(f"'{name}': no such tokenizer file or folder; 'bytes' needs none")
    definition = path / "tokenizer.json" if path.is_dir() else path
    if definition.is_file() and _is_bytes(definition):
        return _bytes(eos)
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        raise RecollectError(f"tokenizer '{name}' needs transformers: pip install 'recollect[lm]'") from None
    try:
        if path.is_file():
            tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
        else:
            source = str(path) if path.is_dir() else name
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # of transformers, tokenizers, huggingface_hub and their HTTP client: no common base
        why = described(error).rstrip(".:")
        raise RecollectError(
            f"tokenizer '{name}' cannot be read ({why}): give 'bytes', a folder or a hub name"
        ) from None
    return PretrainedTokenizer(tokenizer, name, eos)


def check_vocabulary(tokenizer: TextTokenizer, vocab_size: int, what: str = "the model") -> None:
    """Raise ConfigError when the tokenizer has ids at or beyond ``vocab_size``; a larger vocabulary is padding."""
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"tokenizer '{tokenizer.name}' has {tokenizer.vocab_size} ids, but the vocabulary of {what} has "
            f"{vocab_size}: use the tokenizer it was made for, or a vocab_size of {tokenizer.vocab_size} or more"
        )


def token_dtype(vocab_size: int) -> np.dtype[np.uint16 | np.uint32]:
    """The type that ids below ``vocab_size`` are stored in."""
    return np.dtype(np.uint16) if vocab_size <= 1 << 16 else np.dtype(np.uint32)


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"a text has half a surrogate pair (U+{ord(text[error.start]):04X}) at character {error.start}, which no "
            f"UTF-8 can hold: clean the text"
        ) from None


def _bytes(eos: str | int | None) -> ByteTokenizer:
    if eos not in (None, EOS, ByteTokenizer.eos_id):
        raise ConfigError(f"the byte tokenizer ends documents with '{EOS}' ({ByteTokenizer.eos_id}), not with {eos!r}")
    return ByteTokenizer()


def _known_token(eos: str | int, vocabulary: Mapping[str, int], name: str) -> str:
    token = eos if isinstance(eos, str) else next((token for token, i in vocabulary.items() if i == eos), None)
    if token is None or token not in vocabulary:
        hint = nearest(eos, vocabulary) if isinstance(eos, str) and len(vocabulary) < 1 << 18 else ""
        raise ConfigError(f"tokenizer '{name}' has no token {eos!r} to end documents with{hint}")
    return token


def _byte_alphabet() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary (the published alphabet of GPT-2).

    It is the byte itself where that is printable in Latin-1, else the next character from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _byte_definition() -> dict[str, Any]:
    """The byte tokenizer in the format of ``tokenizers``: byte-level BPE that has nothing to merge."""
    token = {"id": ByteTokenizer.eos_id, "content": EOS, "special": True, "normalized": False}
    token |= {"single_word": False, "lstrip": False, "rstrip": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    vocabulary = {character: byte for byte, character in enumerate(_byte_alphabet())}
    return {
        "version": "1.0",
        "added_tokens": [token],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }


@cache
def _byte_fingerprint() -> str:
    return _fingerprint(_byte_definition(), ByteTokenizer.eos_id)


def _is_bytes(path: Path) -> bool:
    """Whether a ``tokenizer.json`` defines what ``ByteTokenizer`` is, as written here or again by ``transformers``."""
    try:
        found, ours = json.loads(path.read_text("utf-8")), _byte_definition()
        same = all(found.get(key) == ours[key] for key in ("added_tokens", "normalizer", "pre_tokenizer"))
        return same and all(found["model"].get(key) == value for key, value in ours["model"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _fingerprint(definition: Mapping[str, Any], eos_id: int) -> str:
    # These do not change the ids of a text, and saving a tokenizer may; what is null may be a field of a newer version.
    kept = {key: definition[key] for key in definition.keys() - {"truncation", "padding", "post_processor", "decoder"}}
    text = json.dumps([_without_null(kept), eos_id], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    return [_without_null(item) for item in value] if isinstance(value, list) else value


_BYTES_OF = [bytes([byte]) for byte in range(256)] + [EOS.encode()]
