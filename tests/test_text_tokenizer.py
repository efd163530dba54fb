"""Tokenizers: the bytes say the same as their form on disk, and what is wrong with another is told in one line."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from recollect.core.errors import ConfigError, DataError, RecollectError
from recollect.text.tokenizer import (
    EOS,
    ByteTokenizer,
    PretrainedTokenizer,
    TextTokenizer,
    check_vocabulary,
    load_tokenizer,
    token_dtype,
)

BYTES = ByteTokenizer()
TEXTS = st.lists(
    st.one_of(st.text(), st.sampled_from([EOS, " ", "\n\n", "don't", "\x00", "\ufeff", "é", "\U0010ffff"]))
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The byte tokenizer as files."""
    folder = tmp_path_factory.mktemp("bytes")
    BYTES.save(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(saved: Path) -> Any:
    """The same, as transformers reads it."""
    return transformers.AutoTokenizer.from_pretrained(saved)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small trained byte-pair tokenizer whose end is ``</s>``."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["</s>", "<s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the cat sat on the mat, the dog on the log"] * 3, trainer)
    folder = tmp_path_factory.mktemp("words")
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    wrapped.save_pretrained(folder)
    return folder


@given(TEXTS)
def test_transformers_gives_the_same_ids_for_every_text(theirs: Any, parts: list[str]) -> None:
    text = "".join(parts)
    ids = BYTES.encode(text)
    assert ids == list(text.encode())
    assert theirs(text)["input_ids"] == ids
    assert theirs.encode(text, add_special_tokens=False) == ids
    assert theirs.decode(ids) == BYTES.decode(ids) == text


@given(st.lists(st.integers(0, 300)))
def test_transformers_reads_any_ids_alike(theirs: Any, ids: list[int]) -> None:
    """Broken UTF-8, ends in the middle of a letter, and ids beyond the vocabulary, which a padded model may say."""
    assert BYTES.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)
    assert BYTES.decode(np.array(ids, dtype=np.int64)) == BYTES.decode(ids)


def test_transformers_knows_the_ids_with_a_meaning(theirs: Any) -> None:
    assert theirs.eos_token_id == theirs.bos_token_id == theirs.pad_token_id == BYTES.eos_id == 256
    assert len(theirs) == BYTES.vocab_size == 257
    assert theirs(["ab", "c"], padding=True, padding_side="left")["input_ids"] == [[97, 98], [256, 99]]


@pytest.mark.parametrize("model_type", ["mamba2", "gpt2", "llama"])
def test_the_folder_of_a_model_may_hold_it(tmp_path: Path, model_type: str) -> None:
    """transformers chooses some tokenizer classes by the kind of model: ours must not be replaced."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    BYTES.save(tmp_path)
    read = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert read("hé l")["input_ids"] == list("hé l".encode())


@given(st.lists(st.text(), min_size=1))
def test_documents_lie_one_after_the_other_with_their_ends(texts: list[str]) -> None:
    tokens, lengths = BYTES.encode_documents(texts)
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == [i for text in texts for i in (*text.encode(), 256)]
    assert lengths.tolist() == [len(text.encode()) + 1 for text in texts]


def test_documents_of_a_trained_tokenizer(words: Path) -> None:
    tokenizer = load_tokenizer(words)
    texts = ["the cat", "", "on the mat é"]
    tokens, lengths = tokenizer.encode_documents(texts)
    documents = np.split(tokens, np.cumsum(lengths)[:-1])
    assert [document.tolist() for document in documents] == [[*tokenizer.encode(text), 0] for text in texts]
    assert len(tokenizer.encode("the cat")) < len("the cat")
    assert tokenizer.decode(documents[2]) == "on the mat é</s>"
    assert (tokenizer.eos_id, tokenizer.vocab_size, tokenizer.name) == (0, len(tokenizer.tokenizer), str(words))  # type: ignore[attr-defined]


def test_large_vocabularies_take_wider_tokens() -> None:
    assert token_dtype(65_536) == np.uint16
    assert token_dtype(65_537) == np.uint32
    vocabulary = {f"w{i}": i for i in range(70_000)}
    model = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PretrainedTokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=model), "words", eos=69_999)
    tokens, _ = tokenizer.encode_documents(["w3 w68000"])
    assert tokens.dtype == np.uint32
    assert tokens.tolist() == [3, 68_000, 69_999]


def test_what_was_saved_is_read_back_as_the_byte_tokenizer(saved: Path, theirs: Any, tmp_path: Path) -> None:
    """Also after transformers saved it again: stores name it by its fingerprint."""
    theirs.save_pretrained(tmp_path / "again")
    for name in ("bytes", saved, saved / "tokenizer.json", tmp_path / "again"):
        read = load_tokenizer(name)
        assert isinstance(read, ByteTokenizer)
        assert read.fingerprint == BYTES.fingerprint
    changed = json.loads((saved / "tokenizer.json").read_text())
    changed["model"]["vocab"]["a"], changed["model"]["vocab"]["b"] = 98, 97
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
    other = load_tokenizer(tmp_path / "tokenizer.json", eos=EOS)
    assert other.encode("ab") == [98, 97]
    assert other.fingerprint != BYTES.fingerprint
    changed = json.loads((saved / "tokenizer.json").read_text())
    changed["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
    assert load_tokenizer(tmp_path / "tokenizer.json", eos=EOS).encode("AB") == [97, 98]


def test_fingerprints_follow_ids_and_nothing_else(words: Path, tmp_path: Path) -> None:
    first = load_tokenizer(words)
    first.save(tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    assert isinstance(again, PretrainedTokenizer)
    assert again.fingerprint == first.fingerprint
    backend = again.tokenizer.backend_tokenizer
    backend.enable_truncation(5)
    backend.enable_padding(length=8)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert PretrainedTokenizer(again.tokenizer, "other name").fingerprint == first.fingerprint
    assert load_tokenizer(words, eos="<s>").fingerprint != first.fingerprint
    definition = json.loads((words / "tokenizer.json").read_text())
    definition["model"]["merges"].pop()
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    assert load_tokenizer(tmp_path / "tokenizer.json", eos="</s>").fingerprint != first.fingerprint


def test_the_end_can_be_chosen(words: Path) -> None:
    file = words / "tokenizer.json"
    with pytest.raises(ConfigError, match=r"no token that ends a document: choose one, eos='</s>'"):
        load_tokenizer(file)
    assert load_tokenizer(file, eos="</s>").eos_id == 0
    assert load_tokenizer(file, eos=1).eos_id == load_tokenizer(words, eos="<s>").eos_id == 1
    with pytest.raises(ConfigError, match=r"has no token '</S>' to end documents with; did you mean '</s>'\?"):
        load_tokenizer(file, eos="</S>")
    with pytest.raises(ConfigError, match="has no token 5000"):
        load_tokenizer(file, eos=5000)
    assert load_tokenizer("bytes", eos=EOS).eos_id == load_tokenizer("bytes", eos=256).eos_id == 256
    with pytest.raises(ConfigError, match="ends documents with"):
        load_tokenizer("bytes", eos="</s>")


def test_missing_ones_are_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (tmp_path / "none", "./none", "none/tokenizer.json", "a/b/c"):
        with pytest.raises(RecollectError, match=r"no such tokenizer file or folder; 'bytes' needs none"):
            load_tokenizer(name)
    with pytest.raises(RecollectError, match=r"cannot be read \(.*\): give 'bytes'") as empty:
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(RecollectError, match=r"cannot be read \(.*\): give 'bytes'") as damaged:
        load_tokenizer(tmp_path / "tokenizer.json")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no such model on the hub.\nPlease check\nthis and that")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(RecollectError, match="'some/model' cannot be read") as hub:
        load_tokenizer("some/model")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(RecollectError, match=r"needs transformers: pip install 'recollect\[lm\]'") as extra:
        load_tokenizer("some/model")
    assert all("\n" not in str(error.value) for error in (empty, damaged, hub, extra))
    assert load_tokenizer("bytes").vocab_size == 257


def test_a_vocabulary_must_hold_every_id(words: Path) -> None:
    tokenizer = load_tokenizer(words)
    check_vocabulary(tokenizer, tokenizer.vocab_size)
    check_vocabulary(BYTES, 264)
    with pytest.raises(ConfigError, match=r"tokenizer 'bytes' has 257 ids, but the vocabulary of m\.json has 256: use"):
        check_vocabulary(BYTES, 256, "m.json")


def test_half_a_surrogate_pair_is_no_text(words: Path) -> None:
    for tokenizer in (BYTES, load_tokenizer(words)):
        for encode in (tokenizer.encode, lambda text, t=tokenizer: t.encode_documents(["fine", text])):
            with pytest.raises(DataError, match=r"half a surrogate pair \(U\+D800\) at character 2"):
                encode("ab\ud800")


def test_they_travel_to_other_processes(words: Path) -> None:
    for tokenizer in (BYTES, load_tokenizer(words)):
        copy: TextTokenizer = pickle.loads(pickle.dumps(tokenizer))  # noqa: S301
        assert copy.encode("the cat é") == tokenizer.encode("the cat é")
        assert copy.fingerprint == tokenizer.fingerprint


def test_bytes_need_no_package() -> None:
    code = (
        "import sys; from recollect.text.tokenizer import load_tokenizer as load; t = load('bytes'); "
        "t.encode_documents(['a']); t.fingerprint; "
        "print(sorted({'torch', 'transformers', 'tokenizers', 'pyarrow', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
