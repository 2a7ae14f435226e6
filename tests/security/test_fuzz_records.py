"""What a run leaves and reads again, after somebody has damaged or changed it."""

import contextlib
import io
import json
import math

from hypothesis import strategies as st
import numpy as np
import pytest

from moe.data import cache, store, tokenizers
from moe.data.examples import open_examples
from moe.data.features import find_fields
from moe.data.sources.files import files_source
from moe.data.sources.types import Document, Request, Source
from moe.errors import UserError
from moe.evaluation import kept_choices
from moe.report.records import read_metrics
from moe.training import history
from moe.training.recording import read_records
from moe.training.workdir import read_config
from tests.data import tiny_examples
from tests.report.fake_run import write_run
from tests.security.fuzz import DEEP, check, mutated_json, mutated_of, sizes


def text_source() -> Source:
    documents = [Document("some text, é", "one", "k"), Document("more", "two", "l")]
    return Source("x", "x", lambda split: iter(documents))


def bpe() -> tokenizers.Tokenizer:
    return tokenizers.train_bpe(["some text, some more text"] * 3, 270)


# ---- tokenizers


@sizes(60)
@pytest.mark.parametrize("kind", ["bytes", "characters", "bpe"])
def test_a_tokenizer_that_was_changed(examples, kind):
    made = {"bytes": tokenizers.byte_tokenizer(), "bpe": bpe()}
    made["characters"] = tokenizers.train_characters(["some text"], None)

    def holds(value):
        found = tokenizers.from_json(json.dumps(value))
        ids = found.encode_batch(["some text"])[0]
        assert (ids >= 0).all()
        assert (ids < found.vocab_size).all()
        found.decode(ids)
        assert len(found.token_bytes) == found.vocab_size

    check(examples, holds, mutated_json(json.loads(made[kind].to_json())))


@sizes(60)
def test_a_tokenizer_of_damaged_bytes(examples):
    texts = [one.to_json().encode() for one in (tokenizers.byte_tokenizer(), bpe())]
    check(examples, lambda data: tokenizers.from_json(data.decode("latin-1")), mutated_of(*texts))


# ---- token files and encoded examples


@st.composite
def saved(draw) -> bytes:
    """A file of `np.save`: of another type or shape, with other numbers."""
    dtype = draw(
        st.sampled_from(("i8", "i4", "u2", "u8", ">i8", "f8", "?", "U2", "M8[s]", "i8,i4"))
    )
    shape = draw(st.sampled_from(((0,), (1,), (2,), (3,), (3, 1), (), (2, 0))))
    numbers = st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 30)
    flat = draw(st.lists(numbers, min_size=math.prod(shape), max_size=math.prod(shape)))
    file = io.BytesIO()
    np.save(file, np.array(flat, np.int64).reshape(shape).astype(dtype, casting="unsafe"))
    return file.getvalue()


@st.composite
def promising(draw) -> bytes:
    """A header of an array, true or not, and some bytes."""
    shape = draw(
        st.sampled_from(("(3,)", "(-1,)", "(2**62,)", f"({10**15},)", "(1,)*99", "3", "("))
    )
    dtype = draw(st.sampled_from(("'<i8'", "'|O'", "None", "'<i8", "[('a', '<i8')]", "1")))
    text = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}"
    header = text.encode().ljust(117) + b"\n"
    version = draw(st.sampled_from((b"\1\0v\0", b"\2\0v\0\0\0", b"\3\0v\0\0\0", b"\7\0")))
    return b"\x93NUMPY" + version + header + draw(st.binary(max_size=40))


arrays = saved() | promising()


def damaged(path, examples, opened):
    """Every file of a folder, damaged in turn, with checksums that hold and with those that do not."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    assert len(files) > 3
    for file in files:
        original = file.read_bytes()

        def holds(given, file=file):
            data, renewed = given
            file.write_bytes(data)
            if renewed:
                cache.write_sums(file.parent)
            opened()

        renews = st.sampled_from((True, True, False))
        check(examples, holds, st.tuples(mutated_of(original) | arrays, renews))
        file.write_bytes(original)
        cache.write_sums(file.parent)


def changed(folder, examples, opened):
    """The list of a folder's files, with checksums that hold: what it says has to be looked at."""
    (path,) = folder.glob("*/meta.json")
    original = json.loads(path.read_text())

    def holds(value):
        path.write_text(json.dumps(value))
        cache.write_sums(path.parent)
        opened()

    check(examples, holds, mutated_json(original))


@sizes(6)
def test_token_files(tmp_path, examples):
    def opened():
        found = store.open_tokens(text_source(), tmp_path, tokenizers.byte_tokenizer())
        for split in found.splits.values():
            for d in range(len(split.domain)):
                split.ids[split.starts[d] : split.starts[d + 1]].sum()
                assert found.domains[split.domain[d]]

    opened()
    damaged(tmp_path, examples, opened)


@sizes(150)
def test_the_list_of_token_files(tmp_path, examples):
    def opened():
        return store.open_tokens(text_source(), tmp_path, tokenizers.byte_tokenizer())

    opened()
    changed(tmp_path / "tokens", examples, opened)


@sizes(6)
def test_encoded_examples(tmp_path, examples):
    records = tiny_examples.pairs()
    fields = find_fields("seq2seq", records.features)

    def opened():
        found = open_examples(records, fields, tmp_path, tokenizers.byte_tokenizer())
        for split in found.splits.values():
            for i in range(len(split)):
                assert found.domains[split.domain[i]]
                assert split.text(i) is not None
                for field in split.fields.values():
                    field[i].sum()

    opened()
    damaged(tmp_path, examples, opened)


@sizes(150)
def test_the_list_of_encoded_examples(tmp_path, examples):
    records = tiny_examples.pictures()
    fields = find_fields("classify", records.features)

    def opened():
        found = open_examples(records, fields, tmp_path, tokenizers.byte_tokenizer())
        for split in found.splits.values():
            for field in split.fields.values():
                field[0].sum()

    opened()
    changed(tmp_path / "examples", examples, opened)


# ---- the user's own text


@sizes(150)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_text_files(tmp_path, examples, suffix):
    path = tmp_path / f"x{suffix}"

    def holds(data):
        path.write_bytes(data)
        source = files_source(Request("", tmp_path, str(path), "text"))
        for split in ("train", "valid", "test"):
            [*source.documents(split)]

    check(examples, holds, mutated_of(b'{"text": "a", "domain": "b"}\n{"text": "c"}\n'))
    for data in DEEP:
        with pytest.raises(UserError):
            holds(data) if suffix == ".jsonl" else holds(b"\xff")


# ---- the workdir


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path / "run", steps=40, every=10, layers=2, experts=3)


@sizes(150)
def test_metrics(folder, examples):
    path = folder / "metrics.jsonl"
    original = path.read_bytes()[:3000]

    def holds(data):
        path.write_bytes(data)
        read_records(folder)
        read_metrics(path)

    check(examples, holds, mutated_of(original))
    for data in DEEP:
        path.write_bytes(data + b"\n" + original)
        assert len(read_records(folder)) == original.count(b"\n")
        assert read_metrics(path)[1] >= 1


@sizes(150)
def test_config_json(folder, examples):
    path = folder / "config.json"
    original = path.read_bytes()

    def holds(data):
        path.write_bytes(data)
        read_config(folder)

    check(examples, holds, mutated_of(original))
    for data in DEEP:
        path.write_bytes(data)
        with pytest.raises(UserError, match="cannot be read"):
            read_config(folder)


@sizes(150)
def test_history(folder, examples):
    path = folder / history.HISTORY_FILE
    for step in range(3):
        history.append(folder, "rewind", step=step, next_row=9)
    original = path.read_bytes()

    def holds(data):
        path.write_bytes(data)
        history.read(folder)

    check(examples, holds, mutated_of(original))
    for data in DEEP:
        path.write_bytes(data + b"\n")
        with contextlib.suppress(UserError):  # or a line that was cut
            history.read(folder)


@sizes(60)
def test_kept_choices(folder, examples):
    kept = kept_choices.Kept(3, np.ones((2, 3, 4, 2), np.int32), 4)
    kept_choices.keep(folder, "valid", kept)
    (path,) = folder.glob("choices/*.npz")

    def holds(data):
        path.write_bytes(data)
        kept_choices.read(folder, "valid")

    check(examples, holds, mutated_of(path.read_bytes()))
