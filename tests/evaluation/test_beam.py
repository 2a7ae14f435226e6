"""Beam search against every possible text of a small model, and against a plain loop."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.evaluation.beam import beam_search, length_penalty

V, END, N = 4, 0, 4


def tables(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of the first token [B V], and of one after the two before it [V V V]."""
    rng = np.random.default_rng(seed)
    draw = [2.0 * rng.normal(size=(3, V)), 2.0 * rng.normal(size=(V, V, V))]
    return tuple(a - np.log(np.exp(a).sum(axis=-1, keepdims=True)) for a in draw)


@functools.partial(jax.jit, static_argnums=(3, 4))
def search(first, later, alpha, width, length=N, live=None):
    """The model's memory of the token before the last shows whether the cache follows hypotheses."""

    def step(tokens, origin, before, index, live):
        before = jnp.take_along_axis(before, origin, axis=1)
        return later[before, tokens], tokens

    live = jnp.ones(len(first), bool) if live is None else live
    before = jnp.full((len(first), width), END)
    return beam_search(step, first, before, live, width, length, alpha, jnp.int32(END))


def log_prob(text: tuple[int, ...], first: np.ndarray, later: np.ndarray) -> float:
    total, before, last = first[text[0]], END, text[0]
    for token in text[1:]:
        total, before, last = total + later[before, last, token], last, token
    return float(total)


def penalised(text, first, later, alpha) -> float:
    return log_prob(text, first, later) / float(length_penalty(len(text), alpha))


def all_texts(length: int) -> list[tuple[int, ...]]:
    """Those that end, and those that the length cuts off."""
    texts = []
    for size in range(1, length + 1):
        for text in itertools.product(range(V), repeat=size):
            if END not in text[:-1] and (text[-1] == END or size == length):
                texts.append(text)
    return texts


def padded(text: tuple[int, ...], length: int = N) -> list[int]:
    return [*text, *[END] * (length - len(text))]


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
def test_a_beam_with_room_for_everything_finds_the_best_text(alpha):
    chosen = set()
    for seed in range(6):
        first, later = tables(seed)
        found = np.asarray(search(first, later, jnp.float32(alpha), 128))
        for row in range(3):
            best = max(all_texts(N), key=lambda t: penalised(t, first[row], later, alpha))
            assert found[row].tolist() == padded(best)
            chosen.add(len(best))
    assert len(chosen) > 1


def plain(first: np.ndarray, later: np.ndarray, width: int, alpha: float) -> list[int]:
    """The same search for one row, in lists."""
    going, ended = [()], []
    for _ in range(N):
        grown = [(*text, token) for text in going for token in range(V)]
        grown.sort(key=lambda text: -log_prob(text, first, later))
        ended += [text for text in grown[:width] if text[-1] == END]
        ended.sort(key=lambda text: -penalised(text, first, later, alpha))
        ended = ended[:width]
        going = [text for text in grown[: 2 * width] if text[-1] != END][:width]
        reach = log_prob(going[0], first, later) / float(length_penalty(N, alpha))
        best = penalised(ended[0], first, later, alpha) if ended else -np.inf
        if len(ended) == width or best >= reach:
            going = []
            break
    return padded(max(ended + going, key=lambda t: penalised(t, first, later, alpha)))


@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_narrow_beam_is_the_plain_loop(width, alpha):
    for seed in range(8):
        first, later = tables(seed)
        found = np.asarray(search(first, later, jnp.float32(alpha), width))
        expected = [plain(first[row], later, width, alpha) for row in range(3)]
        assert found.tolist() == expected


def test_width_1_is_greedy():
    lengths = set()
    for seed in range(8):
        first, later = tables(seed)
        found = np.asarray(search(first, later, jnp.float32(0.6), 1))
        for row in range(3):
            text, before = [int(first[row].argmax())], END
            while text[-1] != END and len(text) < N:
                following = int(later[before, text[-1]].argmax())
                before = text[-1]
                text.append(following)
            assert found[row].tolist() == padded(tuple(text))
            lengths.add(len(text))
    assert len(lengths) > 1


def test_a_wider_beam_is_as_good_or_better_here():
    """Greedy takes 1 (0.6) and then has nothing likely; the beam goes by 2 (0.4)."""
    first = np.log(np.array([[1e-6, 0.6, 0.4, 1e-6]]))
    later = np.full((V, V, V), 0.25)
    later[:, 2] = [0.97, 0.01, 0.01, 0.01]
    later = np.log(later)
    assert search(first, later, jnp.float32(0.0), 1)[0, 0] == 1
    assert search(first, later, jnp.float32(0.0), 2)[0].tolist() == [2, END, END, END]


def test_the_penalty_prefers_longer_texts():
    first = np.log(np.array([[0.4, 0.6 - 2e-6, 1e-6, 1e-6]]))
    later = np.full((V, V, V), 1e-6)
    later[:, 1, 1] = 0.8  # four times 1: probability 0.6 x 0.8^3 = 0.31
    later[:, 1, END] = 0.2 - 2e-6
    later = np.log(later)
    assert search(first, later, jnp.float32(0.0), 8)[0].tolist() == [END] * N
    assert search(first, later, jnp.float32(1.0), 8)[0].tolist() == [1] * N


def test_rows_that_are_not_live_stay_empty_and_cost_nothing():
    first, later = tables(0)
    live = jnp.array([True, False, True])
    found = np.asarray(search(first, later, jnp.float32(0.6), 2, N, live))
    alone = np.asarray(search(first, later, jnp.float32(0.6), 2))
    np.testing.assert_array_equal(found[1], END)
    np.testing.assert_array_equal(found[[0, 2]], alone[[0, 2]])


def test_the_penalty_of_wu():
    assert length_penalty(1, 0.6) == pytest.approx(1.0)
    assert length_penalty(7, 1.0) == pytest.approx(2.0)
    assert length_penalty(7, 0.0) == 1.0
