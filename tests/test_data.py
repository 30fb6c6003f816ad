# python -m pytest tests/test_data.py
"""Contracts of qtlm.data: round trips, the permutation, batches as a pure function of (seed, i), the cache under damage, bad inputs."""
import json
import math
import os
import pickle
import stat
import subprocess
import sys
import warnings
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qtlm import data
from qtlm.data import (
    Batches,
    BPEVocab,
    ByteVocab,
    CharVocab,
    DataError,
    DataWarning,
    SequentialBatches,
    Tokens,
    Vocab,
    VocabError,
    check_split,
    load_text,
    load_vocab,
    permute,
    stdlib_text,
)

TEXT = "It was the best of times, it was the worst of times,\n\n\nit was the age of wisdom … größer 日本 🙂\r\n" * 40
texts = st.text(st.characters(exclude_categories=["Cs"]))
fast = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def bpe():
    return BPEVocab.train(TEXT + stdlib_text(50_000), 500)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QTLM_CACHE", str(tmp_path / "cache"))


def one_line(error):
    message = str(error.value)
    assert "\n" not in message and len(message) <= 300, message
    return message


# ---- vocabularies ----

@fast
@given(text=texts)
def test_byte_and_bpe_round_trip(text, bpe):
    for vocab in (ByteVocab(), bpe):
        ids = vocab.encode(text)
        assert ids.dtype == torch.int64 and ids.dim() == 1
        assert vocab.decode(ids) == vocab.decode(ids.tolist()) == text
        assert sum(len(vocab.pieces[i]) for i in ids) == len(text.encode())


@fast
@given(text=texts)
def test_char_round_trip(text):
    if text:
        vocab = CharVocab(sorted(set(text)))
        assert vocab.decode(vocab.encode(text)) == text and len(vocab) == len(set(text))


@fast
@given(ids=st.lists(st.integers(0, 255)))
def test_any_bytes_decode(ids):
    assert ByteVocab().decode(ids) == bytes(ids).decode(errors="replace")


@fast
@given(text=st.text(st.sampled_from("ab \n\t.\x1c\u2028\xa0'é1"), max_size=60), size=st.integers(1, 8))
def test_cutting_text_for_bpe_changes_nothing(text, size, bpe):
    parts = list(data._chunks(text, size))
    assert "".join(parts) == text
    assert [i for part in parts for i in bpe._encoder.encode(part).ids] == bpe._encoder.encode(text).ids


def test_bpe_agrees_with_the_library(bpe):
    library = pytest.importorskip("tokenizers")
    assert bpe._encoder.encode(TEXT).ids == bpe.encode(TEXT).tolist()
    bpe._encoder.decoder = library.decoders.ByteLevel()
    assert bpe._encoder.decode(bpe.encode(TEXT).tolist()) == TEXT


def test_bpe_small_and_empty_text():
    assert len(BPEVocab.train("", 300)) == 256
    vocab = BPEVocab.train("ab" * 10, 300)
    assert 256 < len(vocab) < 300 and vocab.decode(vocab.encode("abab")) == "abab"
    with pytest.raises(DataError, match="vocab_size 255; expected a whole number of at least 256"):
        BPEVocab.train("ab", 255)


def test_bpe_without_the_library(monkeypatch, bpe):
    saved = load_vocab(json.loads(json.dumps(bpe.to_dict())))
    ids = bpe.encode(TEXT)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert saved.decode(ids) == TEXT
    for attempt in (lambda: saved.encode("a"), lambda: BPEVocab.train("a", 256)):
        with pytest.raises(VocabError, match=r"pip install qtlm\[bpe\]") as error:
            attempt()
        one_line(error)


@pytest.mark.parametrize("make", [ByteVocab, lambda: CharVocab(["a", "../x", "\x00", "\u202e", "<unk>"], "<unk>"),
                                  lambda: BPEVocab.train(TEXT, 300)])
def test_vocab_is_kept(make, tmp_path):
    vocab = make()
    vocab.save(tmp_path / "new folder" / "vocab.json")
    for again in (load_vocab(tmp_path / "new folder" / "vocab.json"), load_vocab(str(tmp_path / "new folder" / "vocab.json")),
                  load_vocab(vocab.to_dict()), load_vocab(vocab), pickle.loads(pickle.dumps(vocab))):
        assert again == vocab and again.digest == vocab.digest and hash(again) == hash(vocab) and type(again) is type(vocab)
    assert os.listdir(tmp_path / "new folder") == ["vocab.json"]
    assert vocab.to_dict()["version"] == 1 and vocab.to_dict()["kind"] == vocab.kind
    assert isinstance(vocab, Vocab) and len(vocab.digest) == 64


def test_vocabularies_differ():
    kinds = [ByteVocab(), CharVocab(["a", "b"]), CharVocab(["b", "a"]), CharVocab(["a", "b"], "a"), BPEVocab.train(TEXT, 300)]
    assert len(set(kinds)) == len({v.digest for v in kinds}) == 5
    assert ByteVocab() != 256


def test_user_vocabularies():
    assert load_vocab(["a", "b"]) == load_vocab({"b": 1, "a": 0}) == CharVocab(("a", "b"))
    vocab = load_vocab({"<pad>": 0, "<unk>": 1, "h": 2, "i": 3, "kind": 4})
    assert vocab.decode([0, 2, 3]) == "<pad>hi" and vocab.encode("hi").tolist() == [2, 3]
    with pytest.raises(VocabError, match=r"'\?' \(U\+003F\) at position 2"):
        vocab.encode("hi?")


BAD_VOCABS = {
    "list of numbers": [1, 2], "none": None, "number": 3, "text": "abc", "set": {"a"}, "empty": [], "empty dict": {},
    "duplicate": ["a", "a"], "empty token": ["a", ""], "ids with a gap": {"a": 0, "b": 2}, "ids from 1": {"a": 1}, "negative": {"a": -1},
    "same id": {"a": 0, "b": 0}, "float id": {"a": 0.0}, "bool id": {"a": False}, "text id": {"a": "0"}, "number as token": {1: 0},
    "none as token": [None], "long token": ["a" * 1001], "surrogate": ["\ud800"], "too many": [str(i) for i in range(1_000_001)],
    "unknown kind": {"kind": "word", "version": 1}, "no version": {"kind": "byte"}, "newer": {"kind": "byte", "version": 2},
    "version true": {"kind": "byte", "version": True}, "version text": {"kind": "byte", "version": "1"},
    "extra field": {"kind": "byte", "version": 1, "path": "/etc"}, "missing field": {"kind": "char", "version": 1, "tokens": ["a"]},
    "unknown not there": {"kind": "char", "version": 1, "tokens": ["a"], "unknown": "<unk>"},
    "unknown is a list": {"kind": "char", "version": 1, "tokens": ["a"], "unknown": ["a"]},
    "bytes missing": {"kind": "bpe", "version": 1, "tokens": ["a"], "merges": []},
    "long key": {"k" * 10_000: 1.5},
}


@pytest.mark.parametrize("name", BAD_VOCABS)
def test_bad_vocab(name):
    with pytest.raises(VocabError) as error:
        load_vocab(BAD_VOCABS[name])
    one_line(error)


@pytest.mark.parametrize("change", [
    {"tokens": lambda tokens: tokens[1:]}, {"tokens": lambda tokens: [*tokens, "日"]}, {"tokens": lambda tokens: [*tokens, "a b"]},
    {"merges": lambda merges: [["a", "b", "c"]]}, {"merges": lambda merges: [*merges, ["zq", "qz"]]}, {"merges": lambda merges: {"a": "b"}},
    {"merges": lambda merges: [1]}, {"merges": lambda merges: [[1, 2]]}, {"merges": lambda merges: ["a b"]}, {"merges": lambda merges: None},
], ids=repr)
def test_bad_bpe(change, bpe):
    good = bpe.to_dict()
    assert load_vocab(good) == bpe
    with pytest.raises(VocabError) as error:
        load_vocab(good | {name: edit(good[name]) for name, edit in change.items()})
    one_line(error)


@pytest.mark.parametrize("content", [b"", b"[", b'{"a": 0, "b": 1, "a": 0}', b"\xff\xfe", b"[" * 100_000, b"17", b"null", b'["a", NaN]', b"[" + b"9" * 5000 + b"]"])
def test_bad_vocab_file(content, tmp_path):
    (tmp_path / "v.json").write_bytes(content)
    with pytest.raises(VocabError, match="v.json") as error:
        load_vocab(tmp_path / "v.json")
    one_line(error)


def test_vocab_file_that_is_none(tmp_path, monkeypatch):
    (tmp_path / "vocab.json").write_text("[]")
    for path in (tmp_path / "vocap.json", tmp_path, tmp_path / "no" / "v.json"):
        with pytest.raises(VocabError) as error:
            load_vocab(path)
        one_line(error)
    with pytest.raises(VocabError, match="Did you mean 'vocab.json'"):
        load_vocab(tmp_path / "vocap.json")
    with pytest.raises(VocabError, match="cannot be written"):
        ByteVocab().save(tmp_path / "vocab.json" / "below a file")
    monkeypatch.setattr(data, "_MAX_TOKENS", 0)
    with pytest.raises(VocabError, match="2 bytes; expected a vocabulary file of at most 0"):
        load_vocab(tmp_path / "vocab.json")


def test_unknown_text_and_ids():
    vocab = CharVocab(["a", "b"])
    with pytest.raises(VocabError, match=r"'é' \(U\+00E9\) at position 4"):
        vocab.encode("ababé")
    for v in (vocab, ByteVocab()):
        for wrong in (7, None, b"a", ["a"]):
            with pytest.raises(DataError) as error:
                v.encode(wrong)
            one_line(error)
        with pytest.raises(VocabError, match=r"U\+DFFF at position 1"):
            v.encode("a\udfff")
        with pytest.raises(DataError, match=f"id {len(v)} at position 1; vocab_size {len(v)}"):
            v.decode([0, len(v)])
        assert v.decode([]) == "" and v.encode("").tolist() == []


# ---- text ----

def test_stdlib_text_is_a_prefix_of_itself():
    whole = stdlib_text(None)
    assert len(whole) > 4_000_000 and "\0" not in whole
    for size in (1000, 65_537, 1_000_000):
        part = stdlib_text(size)
        assert whole.startswith(part) and size - 3 <= len(part.encode()) <= size
    assert len(stdlib_text().encode()) > 3_999_996


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "1", True])
def test_stdlib_text_size(wrong):
    with pytest.raises(DataError, match="max_bytes"):
        stdlib_text(wrong)


def test_stdlib_missing_or_partly_broken(tmp_path, monkeypatch):
    monkeypatch.setattr(data.sysconfig, "get_path", lambda name: str(tmp_path / "python.zip"))
    with pytest.raises(DataError, match="no Python source") as error:
        load_text()
    one_line(error)
    root = tmp_path / "python.zip"
    for name, content in {"a.py": b"x = 1\r\n", "b.py": b"\xff", "c.py": b"# coding: nonsense\n", "d.py": "# coding: latin-1\n#ü\n".encode("latin-1"),
                          "_sysconfigdata_x.py": b"no", "test/t.py": b"no", "site-packages/s.py": b"no", "e.txt": b"no"}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    assert sorted(stdlib_text().split("\n")) == sorted(["x = 1", "", "# coding: latin-1", "#ü", "", ""])[1:]
    assert stdlib_text() == load_text()


def test_stdlib_order_mixes_folders_and_is_not_the_disk_s(tmp_path, monkeypatch):
    names = [f"{folder}/{name}.py" for folder in "abcd" for name in "wxyz"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found, walk = data._stdlib_files(tmp_path), os.walk
    assert sorted(found) == names and len({name[0] for name in found[:6]}) > 2
    monkeypatch.setattr(os, "walk", lambda root: reversed(list(walk(root))))
    assert data._stdlib_files(tmp_path) == found


def test_load_text_paths(tmp_path, monkeypatch):
    for name, content in {"b.txt": b"b\r\n", "a/c.MD": b"\xef\xbb\xbfc", "a/__init__.py": b"i", ".git/x.txt": b"no", "__pycache__/x.py": b"no",
                          "x.png": b"\x89PNG\xff", "empty.txt": b"", "[1].txt": b"one"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert load_text(tmp_path) == "one\ni\nc\nb\r\n"
    assert load_text(str(tmp_path / "*.txt")) == "one\nb\r\n"
    assert load_text(tmp_path / "**" / "*.MD") == "c"
    assert load_text(tmp_path / "[1].txt") == "one"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert load_text("~/b.txt") == load_text("b.txt") == "b\r\n"


@pytest.mark.parametrize("content, message", [
    (b"", "empty"), (b" \n\t\r\n", "white space"), (b"ab\xffc", r"byte 2 is not UTF-8 \(0xff\)"), (b"a\x00b", "byte 1 is NUL"),
    (b"x" * 8123 + b"\xff", r"byte 8123 is not UTF-8 \(0xff\)"), (b"\xef\xbb\xbfab\xff", "byte 5 is not UTF-8"),
    (b"ab\xed\xa0\x80", "byte 2 is not UTF-8"), (b"ab\xe2\x82", "byte 2 is not UTF-8"), ("a".encode("utf-16"), "UTF-16"),
    (b"\xef\xbb\xbf", "empty"),
])
def test_bad_text(content, message, tmp_path):
    (tmp_path / "t.txt").write_bytes(content)
    for source in (tmp_path / "t.txt", tmp_path, str(tmp_path / "t.*")):
        with pytest.raises(DataError, match=message) as error:
            load_text(source)
        one_line(error)
    if "white" not in message and message != "empty":
        assert "\0" not in load_text(tmp_path / "t.txt", errors="replace")


@pytest.mark.parametrize("source", ["", "no.txt", "no/*.txt", "a\0b", 7, b"t.txt", ["t.txt"], "x" * 5000, "[", os.devnull])
def test_no_text(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as error:
        load_text(source)
    one_line(error)


def test_no_text_because_of_the_system(tmp_path, monkeypatch):
    (tmp_path / "t.txt").write_text("text")
    (tmp_path / "sub").mkdir()
    with pytest.raises(DataError, match="Did you mean 't.txt'"):
        load_text(tmp_path / "tt.txt")
    with pytest.raises(DataError, match="a folder without"):
        load_text(tmp_path / "sub")
    with pytest.raises(DataError, match="errors 'ignore'"):
        load_text(tmp_path, errors="ignore")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.txt")       # reading it would wait for ever
        assert load_text(tmp_path) == "text"
        with pytest.raises(DataError, match="not a regular file"):
            load_text(tmp_path / "pipe.txt")

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))
    monkeypatch.setattr(data.Path, "read_bytes", refuse)
    with pytest.raises(DataError, match="t.txt.*Permission denied") as error:
        load_text(tmp_path / "t.txt")
    one_line(error)


# ---- tokens ----

@fast
@given(text=texts, fraction=st.floats(0, 0.99))
def test_tokens_of_text(text, fraction, bpe, tmp_path):
    for vocab in (None, bpe) if text else ():
        tokens = Tokens.from_text(text, vocab, tmp_path / "cache")
        known = vocab or ByteVocab()
        assert tokens.ids.tolist() == known.encode(text).tolist() == list(tokens) and tokens.vocab_size == len(known)
        train, validation = tokens.split(fraction)
        assert torch.equal(torch.cat([train.ids, validation.ids]), tokens.ids) and train.bytes + validation.bytes == tokens.bytes == len(text.encode())
        assert Tokens(tokens.ids, len(known)).digest == tokens.digest


def test_bytes_of_a_multi_byte_character():
    tokens = Tokens.from_text("aé日🙂", CharVocab(list("aé日🙂")), cache_dir=False)
    assert [tokens.bytes_of(tokens[i:i + 1]) for i in range(4)] == [1, 2, 3, 4] and tokens.bytes == 10
    assert tokens.bytes_of(torch.tensor([[0, 1], [2, 3]])) == 10
    assert Tokens([0, 1]).bytes is None and Tokens([0, 1], vocab=ByteVocab()).bytes == 2


@pytest.mark.parametrize("size, dtype", [(256, "u1"), (257, "<u2"), (65536, "<u2"), (65537, "<u4")])
def test_smallest_type(size, dtype):
    tokens = Tokens(torch.tensor([0, size - 1]), size)
    assert tokens._array.dtype == np.dtype(dtype) and tokens[1] == tokens[-1] == size - 1 and tokens[0:2].tolist() == [0, size - 1]


@pytest.mark.parametrize("ids", [
    [3, 1, 2], (3, 1, 2), range(1, 4), np.array([1, 2, 3], ">i8"), np.array([1, 2, 3], np.uint64), torch.tensor([1, 2, 3], dtype=torch.int8),
    torch.tensor([1, 2, 3], dtype=torch.int32), torch.arange(10)[::3],
], ids=repr)
def test_ids_from_anywhere(ids):
    tokens = Tokens(ids)
    assert tokens.ids.tolist() == [int(i) for i in ids] and tokens.vocab_size == max(int(i) for i in ids) + 1


def test_tokens_do_not_follow_their_source():
    source = np.array([1, 2, 3], np.uint8)
    tokens, digest = Tokens(source, 256), Tokens(source, 256).digest
    source[0] = 9
    assert tokens[0] == 1 and tokens.digest == digest
    with pytest.raises(ValueError):
        tokens._array[0] = 9


@pytest.mark.parametrize("ids", [
    torch.zeros(3), torch.zeros(3, dtype=torch.bool), torch.zeros(2, 2, dtype=torch.long), torch.tensor(3), torch.zeros(3, dtype=torch.complex64),
    torch.zeros(3, dtype=torch.bfloat16), torch.zeros(0), np.zeros(3), np.array([True]), np.array([None]), np.array(["1"]), np.zeros((1, 3), int), np.zeros(0),
    [1.0], [True], [[1], [2, 3]], [2**70], ["1"], "1", b"1", None, 7, {1: 2}, object(), iter([1]),
    [0, -1], [0, 512], np.array([2**63], np.uint64), torch.tensor([2**40]), torch.ones(2, dtype=torch.long).to_sparse(),
], ids=lambda ids: f"{type(ids).__name__}-{str(ids)[:30]}")
def test_bad_ids(ids):
    for size in (512, None):
        if size or not isinstance(ids, list) or ids != [0, 512]:     # 512 is an id like any other where no size is given
            with pytest.raises(DataError) as error:
                Tokens(ids, size)
            one_line(error)


def test_bad_id_is_named():
    ids = torch.zeros(10_000, dtype=torch.long)
    ids[9041:] = 512
    with pytest.raises(DataError, match="id 512 at position 9041; vocab_size 512"):
        Tokens(ids, 512)
    for size in (0, -1, 1.5, "512", True):
        with pytest.raises(DataError, match="vocab_size"):
            Tokens([0], size)
    with pytest.raises(DataError, match="vocab_size 512; expected the vocabulary's 256"):
        Tokens([0], 512, vocab=ByteVocab())


@pytest.mark.parametrize("fraction", [-0.1, 1, 1.0, math.nan, math.inf, "0.1", None, True])
def test_bad_split(fraction):
    with pytest.raises(DataError, match="validation_fraction"):
        Tokens([1, 2, 3]).split(fraction)


def test_bad_token_text():
    for wrong in ("", None, 7, b"text"):
        with pytest.raises(DataError) as error:
            Tokens.from_text(wrong)
        one_line(error)


def test_token_files(tmp_path):
    ids = torch.randint(500, (1000,), generator=torch.Generator().manual_seed(0))
    ids.numpy().astype("<u2").tofile(tmp_path / "train.bin")
    np.save(tmp_path / "train.npy", ids.numpy())
    for name in ("train.bin", "train.npy"):
        tokens = Tokens.from_file(tmp_path / name, vocab_size=500)
        assert torch.equal(tokens.ids, ids) and tokens.digest == Tokens(ids, 500).digest
        assert isinstance(tokens._array, np.memmap) and isinstance(tokens.split()[1]._array, np.memmap)
        with pytest.raises(DataError, match="train.*vocab_size 256"):
            Tokens.from_file(tmp_path / name, vocab=ByteVocab())
    whole = (tmp_path / "train.npy").read_bytes()
    files = {"odd.bin": b"123", "empty.bin": b"", "cut.npy": whole[:-1], "lies.npy": whole.replace(b"1000", b"1001"), "head.npy": whole[:20], "empty.npy": b"",
             "text.npy": b"text", "pickle.npy": pickle.dumps([1])}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    np.save(tmp_path / "float.npy", np.zeros(3))
    np.save(tmp_path / "object.npy", np.array([None]), allow_pickle=True)
    np.save(tmp_path / "square.npy", np.zeros((2, 2), int))
    np.save(tmp_path / "fields.npy", np.zeros(2, [("a", int)]))
    for name in [*files, "float.npy", "object.npy", "square.npy", "fields.npy", "none.bin", "none.npy", "."]:
        with pytest.raises(DataError) as error:
            Tokens.from_file(tmp_path / name)
        one_line(error)
    for dtype in ("float32", "bool", "nonsense", "O"):
        with pytest.raises(DataError) as error:
            Tokens.from_file(tmp_path / "train.bin", dtype)
        one_line(error)


# ---- the cache ----

def cache_files(tmp_path):
    return sorted(p for p in (tmp_path / "cache").iterdir())


def test_cache_is_used(tmp_path, monkeypatch, bpe):
    for vocab in (ByteVocab(), bpe):
        first = Tokens.from_text(TEXT, vocab)
        with monkeypatch.context() as patch:
            patch.setattr(type(vocab), "_ids", lambda *_: pytest.fail("encoded again"))
            second = Tokens.from_text(TEXT, vocab)
        assert isinstance(second._array, np.memmap) and torch.equal(first.ids, second.ids) and first.digest == second.digest
    assert len(cache_files(tmp_path)) == 2
    Tokens.from_text(TEXT + "!", bpe)
    assert len(cache_files(tmp_path)) == 3
    Tokens.from_text(TEXT + "?", bpe, cache_dir=False)
    Tokens.from_text(TEXT + "?", bpe, cache_dir=tmp_path / "other")
    assert len(cache_files(tmp_path)) == 3 and len(list((tmp_path / "other").iterdir())) == 1
    assert (stat.S_IMODE(cache_files(tmp_path)[0].stat().st_mode) & 0o444) == (0o666 & ~_umask()) & 0o444


def _umask():
    now = os.umask(0)
    os.umask(now)
    return now


@fast
@given(damage=st.data())
def test_cache_damage_is_found_and_mended(damage, bpe, tmp_path):
    text = "some text that is not long"
    expected = bpe.encode(text)
    Tokens.from_text(text, bpe)
    (path,) = cache_files(tmp_path)
    whole = path.read_bytes()
    kind = damage.draw(st.sampled_from(["flip", "cut", "extend", "insert", "zero", "swap"]))
    at = damage.draw(st.integers(0, len(whole) - 1))
    broken = {
        "flip": whole[:at] + bytes([whole[at] ^ 1 << damage.draw(st.integers(0, 7))]) + whole[at + 1:], "cut": whole[:at], "extend": whole + b"\0" * (at + 1),
        "insert": whole[:at] + b"\0" + whole[at:], "zero": bytes(len(whole)), "swap": whole[at:] + whole[:at],
    }[kind]
    path.write_bytes(broken)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert torch.equal(Tokens.from_text(text, bpe).ids, expected)
    assert [str(w.message) for w in seen if "damaged" in str(w.message)] or broken == whole
    assert path.read_bytes() == whole and len(cache_files(tmp_path)) == 1


def test_cache_of_another_text_is_not_taken(tmp_path):
    Tokens.from_text("text one")
    (one,) = cache_files(tmp_path)
    Tokens.from_text("text two")
    (two,) = set(cache_files(tmp_path)) - {one}
    two.write_bytes(one.read_bytes())
    with pytest.warns(DataWarning, match="damaged"):
        assert ByteVocab().decode(Tokens.from_text("text two").ids) == "text two"


@pytest.mark.parametrize("operation", ["mkdir", "open", "write", "replace"])
def test_cache_that_cannot_be_written(operation, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    class Full:
        def __init__(self, *args): self.file = open(*args)
        def __enter__(self): return self
        def __exit__(self, *_): self.file.close()
        writelines = fail

    target = {"mkdir": (data.Path, "mkdir"), "open": (data, "open"), "write": (data, "open"), "replace": (data.os, "replace")}[operation]
    monkeypatch.setattr(*target, Full if operation == "write" else fail, raising=False)
    with pytest.warns(DataWarning, match="No space left on device.*going on without") as seen:
        tokens = Tokens.from_text(TEXT)
    assert len(seen) == 1 and ByteVocab().decode(tokens.ids) == TEXT
    assert not (tmp_path / "cache").exists() or not cache_files(tmp_path)


def test_cache_folder_that_is_none(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file")
    with pytest.warns(DataWarning, match="going on without"):
        assert ByteVocab().decode(Tokens.from_text(TEXT).ids) == TEXT
    monkeypatch.delenv("QTLM_CACHE")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data.Path, "expanduser", lambda _: (_ for _ in ()).throw(RuntimeError("Could not determine home directory.")))
    with pytest.warns(DataWarning, match="home directory"):
        assert ByteVocab().decode(Tokens.from_text(TEXT).ids) == TEXT
    assert os.listdir(tmp_path) == ["cache"]


def test_mapped_tokens_survive_the_end_of_their_file(tmp_path):
    tokens = Tokens.from_text(TEXT)
    (path,) = cache_files(tmp_path)
    path.unlink()
    assert ByteVocab().decode(tokens.ids) == TEXT


# ---- the permutation ----

@pytest.mark.parametrize("seed", [0, 1, -1, 2**200])
def test_permutation_is_a_bijection(seed):
    for n in [*range(1, 200), 255, 256, 257, 1023, 1024, 1025, 4099]:
        assert sorted(permute(i, n, seed) for i in range(n)) == list(range(n))


@fast
@given(n=st.integers(1, 2**70), seed=st.integers(), epoch=st.integers(0, 2**40), place=st.integers(0))
def test_permutation_of_large_ranges(n, seed, epoch, place):
    found = permute(place % n, n, seed, epoch)
    assert 0 <= found < n
    if n > 1:
        assert found != permute((place + 1) % n, n, seed, epoch)


def test_permutations_differ():
    orders = {tuple(permute(i, 50, seed, epoch) for i in range(50)) for seed in range(20) for epoch in range(20)}
    assert len(orders) == 400


def test_permutation_is_kept_for_ever():
    # A change of these numbers changes the text that a resumed run reads: it needs another "order" in `Batches.to_dict`.
    assert [permute(i, 10) for i in range(10)] == [4, 6, 7, 5, 8, 2, 0, 3, 1, 9]
    assert Batches(torch.arange(100), 7, 3, seed=5).starts(7) == [84, 49, 63]


# ---- batches ----

shapes = st.tuples(st.integers(2, 400), st.integers(1, 20), st.integers(1, 9), st.integers(-5, 5)).filter(lambda s: s[0] > s[1])


@fast
@given(shape=shapes)
def test_each_window_once_an_epoch(shape):
    length, block_size, batch_size, seed = shape
    batches = Batches(torch.arange(length), block_size, batch_size, seed)
    n = (length - 1) // block_size
    assert batches.windows == n and batches.steps_per_epoch == -(-n // batch_size)
    stream = (row for inputs, targets in batches for row in torch.cat([inputs, targets[:, -1:]], 1).tolist())
    for epoch in range(3):
        rows = sorted(islice(stream, n))
        first = rows[0][0]
        assert rows == [list(range(first + w * block_size, first + (w + 1) * block_size + 1)) for w in range(n)]
        assert rows[-1][-1] < length and (epoch or first == 0)


@fast
@given(shape=shapes, order=st.permutations(range(12)))
def test_batches_are_pure(shape, order):
    length, block_size, batch_size, seed = shape
    tokens = torch.arange(length)
    in_order = list(islice(Batches(tokens, block_size, batch_size, seed), 12))
    jumping = Batches(tokens, block_size, batch_size, seed)
    for i in order:
        inputs, targets = jumping[i]
        assert torch.equal(inputs, in_order[i][0]) and torch.equal(targets, in_order[i][1])
        assert inputs.shape == targets.shape == (batch_size, block_size) and inputs.dtype == targets.dtype == torch.int64
        assert inputs.is_contiguous() and targets.is_contiguous()
        assert torch.equal(targets, inputs + 1)


def test_another_process_gives_the_same(bpe):
    code = f"""if True:
        import torch
        from qtlm.data import BPEVocab, Batches, stdlib_text
        batches = Batches(torch.arange(5000), 16, 4, seed=3)
        print([batches.starts(i) for i in (0, 1, 500, 10**12)], batches.digest, BPEVocab.train({TEXT!r} + stdlib_text(50_000), 500).digest)"""
    here = Batches(torch.arange(5000), 16, 4, seed=3)
    env = {**os.environ, "PYTHONHASHSEED": "1", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "2", "PYTHONUTF8": "1"}
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout.strip()
    assert found == f"{[here.starts(i) for i in (0, 1, 500, 10**12)]} {here.digest} {bpe.digest}"


def test_batches_do_not_touch_random_state():
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    Batches(torch.arange(100), 8, 4)[3]
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == np.random.get_state()[1].tolist()


@fast
@given(shape=shapes, parts=st.integers(1, 4))
def test_ranks_and_accumulation_share_one_stream(shape, parts):
    length, block_size, batch_size, seed = shape
    large = Batches(torch.arange(length), block_size, batch_size * parts, seed)
    small = Batches(torch.arange(length), block_size, batch_size, seed)
    ranks = [Batches(torch.arange(length), block_size, batch_size, seed, rank=r, world_size=parts) for r in range(parts)]
    for i in range(4):
        together = torch.cat([b[i][0] for b in ranks])
        assert torch.equal(large[i][0], together)
        assert torch.equal(large[i][0], torch.cat([small[i * parts + j][0] for j in range(parts)]))


@fast
@given(shape=shapes)
def test_sequential_has_every_target_once(shape):
    length, block_size, batch_size, _ = shape
    batches = Batches.sequential(torch.arange(length), block_size, batch_size)
    assert isinstance(batches, SequentialBatches)
    assert torch.cat([inputs.flatten() for inputs, _ in batches]).tolist() == list(range(length - 1))
    assert torch.cat([targets.flatten() for _, targets in batches]).tolist() == list(range(1, length))
    assert len(batches) == len(list(batches)) and all(len(inputs) <= batch_size for inputs, _ in batches)
    for i in (-1, len(batches)):
        with pytest.raises(IndexError):
            batches[i]


def test_identity():
    tokens = Tokens.from_text(TEXT)
    same = Batches(tokens, 16, 4, 0)
    assert json.loads(json.dumps(same.to_dict())) == same.to_dict() == Batches(Tokens(tokens.ids, 256), 16, 4).to_dict()
    others = [Batches(tokens, 17, 4), Batches(tokens, 16, 5), Batches(tokens, 16, 4, 1), Batches(tokens, 16, 4, world_size=2),
              Batches(Tokens(tokens.ids, 257), 16, 4), Batches(tokens.split(0.01)[0], 16, 4)]
    assert len({b.digest for b in (same, *others)}) == 7
    assert Tokens([1, 2], 300).digest != Tokens([1, 2], 301).digest != Tokens([2, 1], 301).digest
    assert Batches(tokens, 16, 4, rank=1, world_size=2).digest == others[3].digest


@pytest.mark.parametrize("wrong", [
    {"block_size": 0}, {"block_size": 2.0}, {"block_size": True}, {"block_size": None}, {"batch_size": 0}, {"batch_size": "4"}, {"seed": None}, {"seed": 0.5},
    {"rank": -1}, {"rank": 1}, {"rank": 2, "world_size": 2}, {"world_size": 0}, {"rank": None}, {"tokens": "text"}, {"tokens": torch.zeros(100)}, {"tokens": None},
    {"block_size": 100}, {"tokens": []}, {"tokens": [1]},
], ids=repr)
def test_bad_batches(wrong):
    with pytest.raises(DataError) as error:
        Batches(**{"tokens": torch.arange(100), "block_size": 8, "batch_size": 2} | wrong)
    one_line(error)


def test_too_few_tokens_are_counted():
    for make in (Batches, Batches.sequential):
        with pytest.raises(DataError, match="37 tokens; block_size 64 needs at least 65"):
            make(torch.arange(37), 64, 2)
        assert make(torch.arange(65), 64, 2)[0][0].shape[1] == 64


@pytest.mark.parametrize("i", [-1, 1.0, "0", None, slice(0, 2)])
def test_bad_batch_number(i):
    with pytest.raises(DataError, match="batch"):
        Batches(torch.arange(100), 8, 2)[i]


# ---- training on the validation text ----

@pytest.mark.parametrize("size", [2, 256, 300, 70_000, 0x110000])
def test_overlap_is_seen(size):
    draw = torch.Generator().manual_seed(0)
    train, new = (Tokens(torch.randint(size, (5000,), generator=draw), size) for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_split(train, new) and check_split(*train.split(0.1)) and check_split(*train.split(0))
    for seen in (train, Tokens(train[1001:2000], size), Tokens(train[7:10], size)):
        with pytest.warns(DataWarning, match="validation text is in the training text too"):
            assert not check_split(train, seen)


# ---- arguments of other types ----

def test_numpy_numbers_are_numbers():
    "They become Python's own, so that the description stays JSON and the digest the same."
    tokens = Tokens(torch.arange(100), np.int64(100))
    given = Batches(tokens, block_size=np.int64(8), batch_size=np.int32(2), seed=np.int64(3))
    plain = Batches(tokens, block_size=8, batch_size=2, seed=3)
    assert given.digest == plain.digest and json.dumps(given.to_dict()) and given.starts(np.int64(5)) == plain.starts(5)
    assert torch.equal(SequentialBatches(tokens, np.int64(8), 2)[np.int64(1)][0], SequentialBatches(tokens, 8, 2)[1][0])
    assert len(tokens.split(np.float32(0.25))[1]) == 25 and len(stdlib_text(np.int64(1000))) <= 1000
    assert permute(np.int64(3), np.int64(9)) == permute(3, 9)


@pytest.mark.parametrize("arguments", [(0, 0), (5, 3), (3, 3), (-1, 3), (0, -1), (0.5, 3), (0, 3.0), (0, True), (0, 3, "x"), (0, 3, 0, -1)])
def test_permute_refuses_what_is_no_place(arguments):
    "Walking from outside the range might never end."
    with pytest.raises(DataError, match="^permute: ") as caught:
        permute(*arguments)
    one_line(caught)


def test_vocabulary_too_large_for_the_library():
    "tokenizers reserves memory for all of them at once, and aborts the process where there is none."
    pytest.importorskip("tokenizers")
    for size in (1_000_001, 10**9, 2**70):
        with pytest.raises(VocabError, match="BPEVocab: vocab_size .*; expected at most 1000000") as caught:
            BPEVocab.train("abc", size)
        one_line(caught)


@pytest.mark.parametrize("vocab", ["byte", 3, {"kind": "byte"}, ByteVocab])
def test_vocab_is_a_vocabulary(vocab, tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(5))
    for call in (lambda: Tokens([1], vocab=vocab), lambda: Tokens.from_text("abc", vocab, cache_dir=False),
                 lambda: Tokens.from_file(tmp_path / "ids.npy", vocab=vocab)):
        with pytest.raises(VocabError, match="expected a vocabulary, such as ByteVocab") as caught:
            call()
        one_line(caught)


@pytest.mark.parametrize("path", ["a\0b", "\ud800", b"bytes", 3, True])
def test_what_can_name_no_file(path):
    for call, error in ((load_text, DataError), (ByteVocab().save, VocabError), (Tokens.from_file, DataError),
                        (lambda p: Tokens.from_text("abc", cache_dir=p), DataError)):
        with pytest.raises(error, match="; expected ") as caught:
            call(path)
        one_line(caught)
    if isinstance(path, str):
        with pytest.raises(VocabError, match="^load_vocab: "):
            load_vocab(path)


@pytest.mark.parametrize("ids", [[-1], [256], [-100, 5], [1.5], [True], torch.tensor([[1, -1]]), torch.ones(2)])
def test_bytes_of_ids_that_are_none(ids):
    "NumPy would take -1 for the last piece and count its bytes."
    tokens = Tokens.from_text("hello", cache_dir=False)
    with pytest.raises(DataError, match="^bytes_of: ") as caught:
        tokens.bytes_of(ids)
    one_line(caught)
    assert tokens.bytes_of([]) == 0 and tokens.bytes_of([0, 255]) == 2


def test_strict_decoding_names_the_byte():
    with pytest.raises(VocabError, match=r"decode: byte 1 \(0xc3\) .*; expected UTF-8") as caught:
        ByteVocab().decode([65, 195], errors="strict")
    one_line(caught)
    with pytest.raises(DataError, match="decode: errors 'nope'"):
        ByteVocab().decode([200], errors="nope")


def test_files_that_are_no_ids(tmp_path):
    "None of the messages advises to load a pickle."
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    (tmp_path / "text.npy").write_bytes(b"hello world, hello world")
    np.save(tmp_path / "huge.npy", np.zeros((3, 2), int))
    raw = (tmp_path / "huge.npy").read_bytes()
    (tmp_path / "huge.npy").write_bytes(raw.replace(b"(3, 2), }" + b" " * 16, b"(9999999999999999999,), }"))
    assert b"9999999999999999999" in (tmp_path / "huge.npy").read_bytes()
    for name, told in {"a.npz": "a zip archive", "text.npy": "no array in NumPy's format", "huge.npy": "expected a file of token ids"}.items():
        with pytest.raises(DataError, match=told) as caught:
            Tokens.from_file(tmp_path / name)
        assert "pickle" not in one_line(caught)
    np.save(tmp_path / "b.npy", np.arange(4))
    (tmp_path / "b.npy").rename(tmp_path / "b.bin")
    assert Tokens.from_file(tmp_path / "b.bin").ids.tolist() == [0, 1, 2, 3]     # a header is not read as ids


def test_tokenizer_json_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}))
    with pytest.raises(VocabError, match="tokenizer.json of Hugging Face's; expected") as caught:
        load_vocab(tmp_path / "tokenizer.json")
    one_line(caught)


def test_link_to_nowhere_is_told(tmp_path):
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(DataError, match="a link that leads to no file; expected") as caught:
        load_text(tmp_path / "a.txt")
    assert "Did you mean" not in one_line(caught)


@pytest.mark.parametrize("raw, hint", [("ab".encode("utf-32"), "UTF-32"), ("ab".encode("utf-16"), "UTF-16"), (b"\x7fELF\0", "binary file"),
                                       ("grün".encode("latin-1"), "iconv")])
def test_hint_fits_the_bytes(tmp_path, raw, hint):
    (tmp_path / "a.txt").write_bytes(raw)
    with pytest.raises(DataError, match=hint) as caught:
        load_text(tmp_path / "a.txt")
    one_line(caught)


def test_check_split_takes_what_batches_take():
    ids = torch.arange(300) % 7
    with pytest.warns(DataWarning):
        assert not check_split(ids, ids[100:])
    with pytest.raises(DataError):
        check_split(None, ids)
    with pytest.raises(DataError, match="SequentialBatches: batch 'a'"):
        SequentialBatches(ids, 8)["a"]
