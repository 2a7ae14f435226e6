import cmath
import math

import numpy as np
import pytest
import tensorflow_datasets as tfds

from moe.data.audio import (
    alignment_frames,
    audio_feature,
    log_mel,
    mel_bank,
    num_frames,
    rate_metadata,
    read_pcm,
    sample_rate,
)
from moe.errors import ConfigError, DataError

RATE = 1000


def tone(samples: int, *hertz: float, rate: int = RATE) -> np.ndarray:
    time = np.arange(samples) / rate
    noise = np.random.default_rng(0).normal(0, 1e-3, samples)
    return (sum(0.2 * np.sin(2 * np.pi * f * time) for f in hertz) + noise).astype(np.float32)


def slow_log_mel(pcm, rate, mels, window, hop, size):
    """Term by term: Hann, a discrete Fourier transform by its sum, triangles on the mel scale."""
    rows = []
    for start in range(0, len(pcm) - window + 1, hop):
        frame = [
            float(pcm[start + n]) * (0.5 - 0.5 * math.cos(2 * math.pi * n / window))
            for n in range(window)
        ]
        bands = [0.0] * mels
        for q in range(size // 2 + 1):
            terms = (x * cmath.exp(-2j * math.pi * q * n / size) for n, x in enumerate(frame))
            power = abs(sum(terms)) ** 2
            mel = 2595 * math.log10(1 + q * rate / size / 700)
            width = 2595 * math.log10(1 + rate / 2 / 700) / (mels + 1)
            for band in range(mels):
                bands[band] += power * max(0.0, 1 - abs(mel - (band + 1) * width) / width)
        rows.append([math.log(max(energy, 1e-10)) for energy in bands])
    return np.array(rows)


def test_log_mel_agrees_with_its_readable_twin():
    pcm = tone(300, 60, 210, 430)
    slow = slow_log_mel(pcm, RATE, mels=8, window=50, hop=20, size=64)
    sizes = {"rate": RATE, "mels": 8, "window_ms": 50, "hop_ms": 20}
    fast = log_mel(pcm, **sizes, normalise=False)
    assert fast.dtype == np.float32
    assert fast.shape == (13, 8)
    np.testing.assert_allclose(fast, slow, atol=2e-3)
    normal = (slow - slow.mean(axis=0)) / slow.std(axis=0)
    np.testing.assert_allclose(log_mel(pcm, **sizes), normal, atol=5e-3)


def test_a_tone_is_in_its_band():
    centre = 700 * (10 ** (20 * 2595 * math.log10(1 + 4000 / 700) / 41 / 2595) - 1)  # of band 20
    bands = log_mel(tone(4000, centre, rate=8000), rate=8000, normalise=False).mean(axis=0)
    assert bands.argmax() == 19


def test_normalised_frames_do_not_depend_on_loudness():
    pcm = tone(2000, 60, 210)
    quiet, loud = (log_mel(pcm * np.float32(gain), rate=RATE, mels=8) for gain in (0.3, 1.0))
    np.testing.assert_allclose(quiet, loud, atol=1e-3)
    assert np.abs(loud.mean(axis=0)).max() < 1e-4
    np.testing.assert_allclose(loud.std(axis=0), 1, atol=1e-3)


def test_one_frame_is_finite():
    made = log_mel(np.zeros(10, np.float32), rate=8000)
    assert made.shape == (1, 40)
    assert np.isfinite(made).all()


def test_num_frames():
    sizes = np.array([1, 199, 200, 201, 279, 280, 5000])
    made = [len(log_mel(np.ones(size, np.float32), rate=8000)) for size in sizes]
    assert num_frames(sizes, rate=8000).tolist() == made == [1, 1, 1, 1, 1, 2, 61]


@pytest.mark.parametrize(("rate", "size"), [(8000, 256), (11025, 512), (16000, 512)])
def test_every_frequency_between_the_outer_centres_counts_once(rate, size):
    bank = mel_bank(rate, size, 40)
    assert bank.shape == (40, size // 2 + 1)
    inside = slice(bank[0].argmax() + 1, bank[-1].argmax())
    np.testing.assert_allclose(bank.sum(axis=0)[inside], 1, atol=1e-6)


def test_impossible_windows_and_bands():
    with pytest.raises(ConfigError, match="120 mel bands are too many for windows of 256"):
        log_mel(tone(500, 60), rate=8000, mels=120)
    with pytest.raises(ConfigError, match=r"a hop of 0\.1 ms are 25 and 0 samples at 1000 Hz"):
        log_mel(tone(500, 60), rate=RATE, hop_ms=0.1)


@pytest.mark.parametrize(
    ("samples", "rate", "message"),
    [
        (np.arange(9, dtype=np.int16), 16000, r"test 7 has 16000 .* the config says 8000"),
        (np.zeros(0, np.int16), 8000, "test 7 has no samples"),
        (np.zeros(9, np.int16), 8000, "test 7 is silent: all of its 9 samples are 0"),
        (np.arange(9, dtype=np.int32), 8000, r"test 7 has sound of type int32 and shape \(9,\)"),
        (np.ones((9, 2), np.int16), 8000, r"type int16 and shape \(9, 2\)"),
    ],
)
def test_sound_that_cannot_be_used_is_named(samples, rate, message):
    with pytest.raises(DataError, match=message):
        read_pcm(samples, rate=rate, expected=8000, where="clips, test 7")


def test_pcm_is_scaled():
    pcm = read_pcm(np.array([-32768, 0, 16384], np.int16), rate=8, expected=8, where="x")
    assert pcm.dtype == np.float32
    assert pcm.tolist() == [-1, 0, 0.5]


class TinySounds(tfds.core.GeneratorBasedBuilder):
    """Two sounds; the second config does not say its rate."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = tuple(tfds.core.BuilderConfig(name=name) for name in ("said", "unsaid"))

    def _info(self):
        said = rate_metadata(8000) if self.builder_config.name == "said" else None
        features = tfds.features.FeaturesDict({"audio": audio_feature()})
        return tfds.core.DatasetInfo(builder=self, features=features, metadata=said)

    def _split_generators(self, dl_manager):
        del dl_manager
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(2):
            yield i, {"audio": np.arange(-5, 300 + i, dtype=np.int16)}


def test_sound_and_rate_come_back_without_the_builder(tmp_path):
    for config in ("said", "unsaid"):
        builder = TinySounds(data_dir=tmp_path, config=config, file_format="array_record")
        builder.download_and_prepare(download_dir=tmp_path / "downloads")
        read = tfds.builder_from_directory(builder.data_path)
        if config == "unsaid":
            with pytest.raises(DataError, match=r"'tiny_sounds' does not say.*metadata="):
                sample_rate(read.info)
            continue
        assert sample_rate(read.info) == 8000
        for i, example in enumerate(read.as_data_source("train")):
            assert example["audio"].dtype == np.int16
            np.testing.assert_array_equal(np.sort(example["audio"])[:3], [-5, -4, -3])
            assert len(example["audio"]) in (305, 306), i


@pytest.mark.parametrize(
    ("labels", "frames"), [([], 0), ([3], 1), ([3, 4, 3], 3), ([3, 3], 3), ([1, 1, 1, 2, 2], 8)]
)
def test_alignment_frames(labels, frames):
    assert alignment_frames(labels) == frames
