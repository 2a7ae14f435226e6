from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from moe.data.pack import PackedRows, padding_row
from moe.data.store import TokenSplit

BOUNDARY = 1000


def split_of(documents: list[list[int]], domains: list[int]) -> TokenSplit:
    stream = [token for document in documents for token in (BOUNDARY, *document)]
    starts = np.cumsum([0, *(len(document) + 1 for document in documents)])
    ids = np.array([*stream, BOUNDARY], np.uint16)
    return TokenSplit(ids, starts.astype(np.int64), np.array(domains, np.int32))


def packed_by_hand(documents: list[list[int]], length: int) -> list[list[tuple]]:
    """The readable twin: lists of (token, target, segment, position), without padding."""
    stream = []
    for number, document in enumerate(documents):
        inputs, targets = [BOUNDARY, *document], [*document, BOUNDARY]
        stream += [(number, *pair) for pair in zip(inputs, targets, strict=True)]
    rows = []
    for start in range(0, len(stream), length):
        part, row, seen = stream[start : start + length], [], []
        for number, token, target in part:
            position = seen.count(number)
            seen.append(number)
            row.append((token, target, number - part[0][0] + 1, position))
        rows.append(row)
    return rows


corpora = st.lists(
    st.tuples(st.lists(st.integers(0, 255), min_size=1, max_size=12), st.integers(0, 1)),
    min_size=1,
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(corpus=corpora, length=st.integers(1, 20), seed=st.none() | st.integers(0, 9))
def test_rows_equal_the_readable_twin(corpus, length, seed):
    documents = [document for document, _ in corpus]
    domains = [domain for _, domain in corpus]
    for domain in (0, 1):
        rows = PackedRows(split_of(documents, domains), domain, length, seed)
        own = [document for document, d in corpus if d == domain]
        if seed is not None:
            own = [own[i] for i in np.random.RandomState([seed, domain]).permutation(len(own))]
        by_hand = packed_by_hand(own, length)
        assert len(rows) == len(by_hand)
        for i, expected in enumerate(by_hand):
            row = rows[i]
            n = len(expected)
            assert row.domain == domain
            assert row.valid.tolist() == [True] * n + [False] * (length - n)
            fields = (row.tokens, row.targets, row.segments, row.positions)
            assert list(zip(*(field[:n].tolist() for field in fields), strict=True)) == expected
            assert all(field.shape == (length,) for field in fields)
            assert all(field.dtype == np.int32 for field in fields)
            assert not any(field[n:].any() for field in fields)


@settings(max_examples=100, deadline=None)
@given(corpus=corpora, length=st.integers(1, 20), seed=st.integers(0, 9))
def test_every_target_once_and_none_across_documents(corpus, length, seed):
    documents = [document for document, _ in corpus]
    # Distinct tokens: 100 * document + place, so that each can be told from all others.
    marked = [[100 * d + i for i in range(len(doc))] for d, doc in enumerate(documents)]
    rows = PackedRows(split_of(marked, [0] * len(marked)), 0, length, seed)
    targets = np.concatenate([rows[i].targets[rows[i].valid] for i in range(len(rows))])
    expected = [token for document in marked for token in (*document, BOUNDARY)]
    assert sorted(targets.tolist()) == sorted(expected)
    for i in range(len(rows)):
        row = rows[i]
        for segment in set(row.segments[row.valid].tolist()):
            own = row.segments == segment
            tokens = [*row.tokens[own], *row.targets[own]]
            assert len({t // 100 for t in tokens if t != BOUNDARY}) <= 1
            assert row.positions[own].tolist() == list(range(own.sum()))
    assert all(rows[i].valid.all() for i in range(len(rows) - 1))  # only the last row is padded


def test_seeds_change_the_order_and_none_keeps_it():
    documents = [[i] for i in range(50)]
    tokens = split_of(documents, [0] * 50)
    orders = [
        [PackedRows(tokens, 0, 2, seed)[i].tokens[1] for i in range(50)] for seed in (None, 0, 0, 1)
    ]
    assert orders[0] == list(range(50))
    assert orders[1] == orders[2]
    assert sorted(orders[1]) == orders[0] != orders[1] != orders[3]


def test_rows_out_of_range():
    rows = PackedRows(split_of([[1, 2]], [0]), 0, 2)
    assert len(rows) == 2
    for index in (2, -1):
        with pytest.raises(IndexError):
            rows[index]


def test_padding_row_is_all_padding():
    like = PackedRows(split_of([[1, 2]], [0]), 0, 2)[0]
    row = padding_row(like)
    assert [np.shape(field) for field in row[:6]] == [np.shape(field) for field in like[:6]]
    assert not any(np.any(field) for field in row[:6])
    assert padding_row(like._replace(index=np.int32(7))).index == -1
