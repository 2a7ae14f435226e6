import collections
import itertools

import numpy as np
import pytest

from moe.data.corrupt import CORRUPTIONS, corrupt
from moe.errors import ConfigError

TEXT = "the quick brown fox jumps over the lazy dog and runs far away from here " * 4
IMAGE = np.random.default_rng(0).integers(0, 256, (16, 12, 3)).astype(np.uint8)
SOUND = (8000 * np.sin(np.arange(4000) / 7)).astype(np.int16)
VALUES = {"text": TEXT, "image": IMAGE, "audio": SOUND}
SEVERITY = {
    "typos": 0.1,
    "shuffle_words": 0.5,
    "noise": 0.1,
    "occlude": 0.5,
    "white_noise": 10,
    "gain": -6,
}


def made(kind, seed=1, index=2, severity=None, value=None):
    value = VALUES[CORRUPTIONS[kind].kind] if value is None else value
    return corrupt(kind, value, severity=severity or SEVERITY[kind], seed=seed, index=index)


def same(a, b):
    return a == b if isinstance(a, str) else np.array_equal(a, b)


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_seed_and_index_decide(kind):
    value = VALUES[CORRUPTIONS[kind].kind]
    before = value if isinstance(value, str) else value.copy()
    assert same(made(kind), made(kind))
    assert not same(made(kind), value)
    assert same(value, before)
    assert type(made(kind)) is type(value)
    if not isinstance(value, str):
        assert (made(kind).dtype, made(kind).shape) == (value.dtype, value.shape)
    if kind != "gain":
        assert not same(made(kind), made(kind, seed=3))
        assert not same(made(kind), made(kind, index=3))


@pytest.mark.parametrize("kind", sorted(set(CORRUPTIONS) - {"white_noise"}))
def test_nothing_at_severity_zero(kind):
    value = VALUES[CORRUPTIONS[kind].kind]
    expected = " ".join(value.split()) if kind == "shuffle_words" else value
    assert same(corrupt(kind, value, severity=0, seed=0, index=0), expected)


def test_typos_change_about_their_share():
    found = made("typos", value="abcdefghij" * 1000)
    assert abs(len(found) - 10000) < 200  # deleted about as often as doubled
    doubled = sum(a == b for a, b in itertools.pairwise(found))
    assert 250 < doubled < 450  # a third of a tenth
    assert set(found) <= set("abcdefghij")
    for index in range(20):
        assert corrupt("typos", "x", severity=1, seed=0, index=index) in ("x", "xx")
        assert corrupt("typos", "", severity=1, seed=0, index=index) == ""


def test_words_keep_their_number():
    words = [str(i) for i in range(100)]
    found = made("shuffle_words", value=" ".join(words)).split()
    assert collections.Counter(found) == collections.Counter(words)
    moved = sum(a != b for a, b in zip(found, words, strict=True))
    assert 40 <= moved <= 50


def test_noise_has_its_deviation():
    grey = np.full((64, 64, 1), 128, np.uint8)
    assert abs(made("noise", value=grey).std() - 25.5) < 1
    assert made("noise", value=grey, severity=1).min() == 0


def test_occluded_part_is_black_and_the_rest_untouched():
    image = np.full((16, 12, 3), 200, np.uint8)
    found = made("occlude", value=image)
    black = (found == 0).all(axis=2)
    assert black.sum() == 8 * 6
    assert black.any(axis=1).sum() == 8
    assert (found[~black] == 200).all()
    assert (made("occlude", value=image, severity=1) == 0).all()


@pytest.mark.parametrize("sound", [SOUND, (SOUND / 32768).astype(np.float32)], ids=["int", "float"])
def test_noise_to_signal_in_decibels(sound):
    noise = made("white_noise", value=sound).astype(np.float64) - sound
    ratio = 10 * np.log10(np.square(sound.astype(np.float64)).mean() / np.square(noise).mean())
    assert abs(ratio - 10) < 0.3
    quieter = made("gain", value=sound).astype(np.float64)
    np.testing.assert_allclose(np.abs(quieter).max() / np.abs(sound).max(), 0.501, atol=1e-3)
    loud = made("gain", value=sound, severity=40)
    full = (-1, 1) if sound.dtype == np.float32 else (-32768, 32767)
    assert (loud.min(), loud.max()) == full


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match=r"'typo' is no corruption \(did you mean 'typos'\?\)"):
        corrupt("typo", TEXT, severity=0.1, seed=0, index=0)
    with pytest.raises(
        ConfigError, match=r"'typos' with severity 2.*characters changed, from 0 to 1"
    ):
        corrupt("typos", TEXT, severity=2, seed=0, index=0)
    with pytest.raises(ConfigError, match=r"'noise' is for image, not for <class 'str'>"):
        corrupt("noise", TEXT, severity=0.1, seed=0, index=0)
    with pytest.raises(ConfigError, match=r"'gain' is for audio, not for float64 \(3,\)"):
        corrupt("gain", np.zeros(3), severity=1, seed=0, index=0)
