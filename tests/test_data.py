"""Text to samples: nothing is lost, every sample is known by its id and source, the order is a pure function."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter

import numpy as np
import pytest

from inrun import data
from inrun.data import IGNORE, Document, batch_at, cut, epoch_order, read_text, split, without
from inrun.demo import demo_corpus


def document(text: str | bytes, id_: str = "d", source: str = "s") -> Document:
    return Document(id_, source, text if isinstance(text, bytes) else text.encode())


@pytest.mark.parametrize("length", [2, 7, 8, 9, 16, 17, 18])
def test_every_byte_but_the_first_is_predicted_exactly_once(length):
    text = bytes(range(length))
    samples = cut([document(text)], block_size=8)
    x, y = samples.batch(range(len(samples)))
    assert x.shape == y.shape == (len(samples), 8)
    assert bytes(y[y != IGNORE].tolist()) == text[1:]
    assert bytes(x[y != IGNORE].tolist()) == text[:-1]
    assert samples.ids == ["d"] + [f"d#{k}" for k in range(1, len(samples))]


def test_padding_is_no_target_even_where_the_text_holds_the_padding_byte():
    samples = cut([document(b"a\0\0")], block_size=8)
    _, y = samples.batch([0])
    assert y.tolist() == [[0, 0] + [IGNORE] * 6]
    assert samples.text(0) == "a\0\0"


def test_a_sample_gives_its_text_back_and_bytes_that_are_no_utf8_are_kept():
    samples = cut([document("naïve"), document(b"\xff\xfeok", "e")], block_size=16)
    assert [samples.text(i) for i in range(2)] == ["naïve", "\ufffd\ufffdok"]
    assert samples.tokens[1, :4].tolist() == [0xFF, 0xFE, ord("o"), ord("k")]


def test_take_keeps_ids_sources_and_tokens_together():
    samples = cut([document("first", "a", "x"), document("second", "b", "y")], block_size=8)
    turned = samples.take([1, 0])
    assert [turned.text(0), turned.ids[0], turned.sources[0]] == ["second", "b", "y"]
    assert turned.fingerprint() != samples.fingerprint() == samples.take([0, 1]).fingerprint()


def test_samples_are_told_apart_by_their_length_and_runs_by_their_ids_too():
    long, short, renamed = (
        cut([document(b, i)], block_size=8) for b, i in ((b"a\0\0", "d"), (b"a\0", "d"), (b"a\0", "e"))
    )
    assert long.keys() != short.keys() == renamed.keys()
    assert len({samples.fingerprint() for samples in (long, short, renamed)}) == 3


def test_folders_files_and_jsonl_become_documents_with_ids_and_sources(tmp_path):
    corpus = tmp_path / "corpus"
    (corpus / "prose" / "deep").mkdir(parents=True)
    (corpus / "prose" / "deep" / "a.txt").write_text("prose")
    (corpus / "top.md").write_text("top")
    (corpus / ".hidden").write_text("no")
    (corpus / "binary.bin").write_bytes(b"\0\1")
    lines = [{"text": "one", "id": 7, "source": "web"}, {"text": "two"}, {"text": "three", "id": None, "source": None}]
    (corpus / "prose" / "b.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    (tmp_path / "single.txt").write_text("single")
    found = {(d.id, d.source, d.data.decode()) for d in read_text([corpus, tmp_path / "single.txt"])}
    assert found == {
        ("corpus/prose/deep/a.txt", "prose", "prose"),
        ("corpus/top.md", "corpus", "top"),
        ("7", "web", "one"),
        ("corpus/prose/b.jsonl:2", "prose", "two"),
        ("corpus/prose/b.jsonl:3", "prose", "three"),
        ("single.txt", "single.txt", "single"),
    }


def test_lone_surrogates_in_json_do_not_stop_a_run(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b", "id": "\\ud800", "source": "\\udc00"}\n')
    (found,) = read_text([tmp_path / "a.jsonl"])
    assert (found.data, found.id, found.source) == (b"a?b", r"\ud800", r"\udc00")


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes on Linux")
def test_file_names_that_are_no_utf8_are_escaped(tmp_path):
    for name in (b"\xe9.txt", b"\xe8.txt"):
        (tmp_path / os.fsdecode(name)).write_text("text")
    found = read_text([tmp_path])
    assert [document.id for document in found] == [rf"{tmp_path.name}/\udce{digit}.txt" for digit in "89"]
    assert cut(found, block_size=8).fingerprint()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "ok"}\n{"text": \n', r"a\.jsonl, line 2: expected JSON"),
        ('["text"]\n', r'line 1: expected an object with a string "text"'),
        ('{"text": 3}\n', r'line 1: expected an object with a string "text"'),
        ("", r"expected some text in .*a\.jsonl, got none"),
    ],
)
def test_bad_jsonl_is_named_with_its_line(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_text([tmp_path / "a.jsonl"])


def test_missing_path_repeated_id_and_empty_text_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*nowhere"):
        read_text([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="got 'd' more than once"):
        cut([document("aa"), document("bb")], block_size=4)
    with pytest.raises(ValueError, match="at least two tokens"):
        cut([document("a")], block_size=4)


@pytest.mark.parametrize("documents", [1, 5])
def test_holding_out_divides_one_source_and_loses_nothing(documents):
    texts = [document(f"{i}" * 100, f"d{i}", "held") for i in range(documents)]
    others = [document("other" * 10, "o", "kept")]
    training, held_out = split(texts + others, "held", 0.25, seed=3)
    assert {d.source for d in held_out} == {"held"}
    assert sum(len(d.data) for d in held_out) == 25 * documents
    assert Counter(b"".join(d.data for d in training + held_out)) == Counter(b"".join(d.data for d in texts + others))
    assert training[-1] == others[0]
    assert split(texts + others, "held", 0.25, seed=3) == (training, held_out)


def test_holding_out_of_an_unknown_source_names_the_known_ones():
    with pytest.raises(ValueError, match="expected one of the sources a, b; got 'c'"):
        split([document("x", source="a"), document("y", source="b")], "c", 0.1, seed=0)
    with pytest.raises(ValueError, match="holdout_fraction"):
        split([document("x", source="a")], "a", 1.0, seed=0)


def test_what_is_validated_on_is_not_trained_on():
    training = cut([document("same", "a"), document("other", "b"), document("sam", "c")], block_size=8)
    validation = cut([document("same", "v")], block_size=8)
    assert without(training, validation).ids == ["b", "c"]
    with pytest.raises(ValueError, match="every training sample is also validation text"):
        without(training.take([0]), validation)


@pytest.mark.parametrize(("n", "batch_size"), [(10, 4), (7, 7), (3, 8)])
def test_epochs_are_permutations_that_follow_one_another(n, batch_size):
    stream = np.concatenate([batch_at(step, batch_size, n, seed=1) for step in range(3 * n)])
    epochs = stream[: len(stream) // n * n].reshape(-1, n)
    assert (np.sort(epochs, axis=1) == np.arange(n)).all()
    for epoch, order in enumerate(epochs[:3]):
        assert (order == epoch_order(n, 1, epoch)).all()
    assert len({tuple(order) for order in epochs.tolist()}) > 1
    assert (batch_at(2, batch_size, n, seed=1) == stream[2 * batch_size : 3 * batch_size]).all()
    assert (batch_at(0, 9, 99, seed=1) != batch_at(0, 9, 99, seed=2)).any()


def test_demo_corpus_is_balanced_repeatable_and_apart_from_its_validation_text():
    training, validation = demo_corpus(block_size=64, per_source=30, planted=5, validation=8)
    again, _ = demo_corpus(block_size=64, per_source=30, planted=5, validation=8)
    assert training.fingerprint() == again.fingerprint()
    assert Counter(zip(training.sources, training.planted, strict=True)) == {
        **{(source, ""): 30 for source in ("python", "docs", "cpp", "licenses")},
        ("python", "shuffled"): 5,
        ("python", "duplicate"): 5,
    }
    assert (training.lengths == 65).all()
    files = [{i.split("#")[0] for i in samples.ids} for samples in (training, validation)]
    assert len(validation) == 8 and not files[0] & files[1]
    assert not set(training.keys()) & set(validation.keys())


def test_planted_copies_hold_the_bytes_of_their_originals():
    training, _ = demo_corpus(block_size=64, per_source=30, planted=5, validation=8)
    row = dict(zip(training.ids, training.tokens, strict=True))
    for id_, kind in zip(training.ids, training.planted, strict=True):
        if kind:
            original = row[id_.removesuffix(f"~{kind}")]
            assert (row[id_] == original).all() == (kind == "duplicate")
            assert (np.sort(row[id_]) == np.sort(original)).all()


def test_a_tokenizer_file_gives_tokens_and_text_back(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["the cat and the hat"] * 9, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    codec = data.TokenizerCodec(tmp_path / "tokenizer.json")
    samples = cut([document("the hat and the cat")], block_size=64, codec=codec)
    assert samples.text(0) == "the hat and the cat"
    assert samples.lengths[0] < len("the hat and the cat") and samples.tokens.max() < codec.vocab_size
    with pytest.raises(FileNotFoundError, match="tokenizer: no such file"):
        data.TokenizerCodec(tmp_path / "none.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer: expected a tokenizer\.json, got .*: "):
        data.TokenizerCodec(tmp_path / "tokenizer.json")
