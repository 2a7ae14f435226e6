"""Sound as features: PCM samples to log-mel frames, on the host, and the rate that a data set stores.

Prepared data sets hold mono PCM as int16 of any length. TFDS's own audio feature cannot be made
without TensorFlow, so ours are tensors, and the rate is in the data set's metadata.
"""

from collections.abc import Sequence
import functools
from typing import Any

from jaxtyping import Float32, Int
import numpy as np
import scipy.fft
import scipy.sparse
import tensorflow_datasets as tfds

from moe.errors import ConfigError, DataError

FULL_SCALE = 32768.0  # of int16
_RATES = "sample_rate"  # key of the metadata: feature -> Hz
_FLOOR = 1e-10  # of an energy before its logarithm: far below one step of 16-bit samples
_SMALLEST_DEVIATION = 1e-3  # of a band that never changes, in nats


def audio_feature() -> tfds.features.Tensor:
    """The feature of mono PCM: int16 of any length, stored as bytes."""
    return tfds.features.Tensor(shape=(None,), dtype=np.int16, encoding="bytes")


def rate_metadata(rate: int, feature: str = "audio") -> tfds.core.MetadataDict:
    """The metadata that `sample_rate` reads."""
    return tfds.core.MetadataDict({_RATES: {feature: rate}})


def sample_rate(builder_info: tfds.core.DatasetInfo, feature: str = "audio") -> int:
    """Samples a second of an audio feature, from the metadata or from TFDS's own feature.

    Raises:
        DataError: the data set does not say.
    """
    rates = (builder_info.metadata or {}).get(_RATES, {})
    rate = rates.get(feature) or getattr(builder_info.features[feature], "sample_rate", None)
    if not rate:
        raise DataError(
            f"The data set {builder_info.name!r} does not say how many samples a second its "
            f"feature {feature!r} has. Write it when preparing: metadata=rate_metadata(8000), of "
            "moe.data.audio, in the builder's DatasetInfo."
        )
    return int(rate)


def read_pcm(samples: Any, *, rate: int, expected: int, where: str) -> Float32[np.ndarray, " T"]:
    """Checks the sound of one record and scales it to [-1, 1).

    Args:
        samples: int16, one channel.
        rate: of the record, Hz.
        expected: of the config, Hz.
        where: the record, for messages: data set, split and number.

    Raises:
        DataError: another rate or kind of samples, no samples, or nothing but silence.
    """
    if rate != expected:
        raise DataError(
            f"{where} has {rate} samples a second where the config says {expected}. Give the rate "
            "of the data set, or prepare it again with its sound resampled."
        )
    samples = np.asarray(samples)
    if samples.dtype != np.int16 or samples.ndim != 1:
        raise DataError(
            f"{where} has sound of type {samples.dtype} and shape {samples.shape}; it must be "
            "int16 samples of one channel."
        )
    if not samples.size:
        raise DataError(f"{where} has no samples. Leave it out when preparing the data set.")
    if samples.min() == samples.max():
        raise DataError(
            f"{where} is silent: all of its {samples.size} samples are {samples[0]}. Leave it out "
            "when preparing the data set."
        )
    return samples.astype(np.float32) / np.float32(FULL_SCALE)


def frame_sizes(rate: int, window_ms: int | float, hop_ms: int | float) -> tuple[int, int]:
    """Samples of a window and from one window to the next, each to the nearest sample.

    Raises:
        ConfigError: less than a sample.
    """
    window, hop = round(rate * window_ms / 1000), round(rate * hop_ms / 1000)
    if min(window, hop) < 1:
        raise ConfigError(
            f"A window of {window_ms} ms and a hop of {hop_ms} ms are {window} and {hop} samples "
            f"at {rate} Hz; each needs one at least. Common are 25 and 10 ms."
        )
    return window, hop


def num_frames(
    samples: Int[np.ndarray, " N"],
    *,
    rate: int,
    window_ms: int | float = 25,
    hop_ms: int | float = 10,
) -> Int[np.ndarray, " N"]:
    """Frames that `log_mel` makes of so many samples: whole windows, and one of anything shorter."""
    window, hop = frame_sizes(rate, window_ms, hop_ms)
    return 1 + (np.maximum(samples, window) - window) // hop


def log_mel(
    pcm: Float32[np.ndarray, " T"],
    *,
    rate: int,
    mels: int = 40,
    window_ms: int | float = 25,
    hop_ms: int | float = 10,
    normalise: bool = True,
) -> Float32[np.ndarray, "N F"]:
    """Logarithms of mel energies, one row for each window.

    Periodic Hann window, power spectrum by a real FFT of the next power of two, triangles on the
    mel scale of HTK (`mel_bank`), natural logarithm with a floor.

    Args:
        pcm: samples in [-1, 1), at least one; fewer than a window are filled up with zeros.
        rate: samples a second.
        mels: bands.
        window_ms: length of a window, milliseconds.
        hop_ms: from the start of one window to the next, milliseconds.
        normalise: subtract the mean of each band over this sound and divide by its deviation, so
            that loudness and the line's colour do not count.

    Returns:
        `num_frames` rows of `mels` numbers.

    Raises:
        ConfigError: windows below a sample, or more bands than the spectrum has places for.
    """
    window, hop = frame_sizes(rate, window_ms, hop_ms)
    size = 1 << (window - 1).bit_length()
    padded = np.pad(pcm, (0, max(window - pcm.size, 0)))
    frames = np.lib.stride_tricks.sliding_window_view(padded, window)[::hop] * _hann(window)
    spectrum = scipy.fft.rfft(frames, size, axis=1)  # on float32 far faster than NumPy's
    power = np.square(spectrum.real) + np.square(spectrum.imag)
    energies = (_sparse_bank(rate, size, mels) @ power.T).T
    logs = np.log(np.maximum(energies, np.float32(_FLOOR)))
    if normalise:
        deviation = np.maximum(logs.std(axis=0), np.float32(_SMALLEST_DEVIATION))
        logs = (logs - logs.mean(axis=0)) / deviation
    return logs


@functools.lru_cache(maxsize=8)
def _hann(window: int) -> Float32[np.ndarray, " W"]:
    phase = 2 * np.pi * np.arange(window) / window
    return (0.5 - 0.5 * np.cos(phase)).astype(np.float32)


@functools.lru_cache(maxsize=8)
def _sparse_bank(rate: int, size: int, mels: int) -> scipy.sparse.csr_array:
    """`mel_bank`, where a frequency is in two bands at most; a dense product would wake BLAS threads."""
    return scipy.sparse.csr_array(mel_bank(rate, size, mels))


def mel_bank(rate: int, size: int, mels: int) -> Float32[np.ndarray, "F Q"]:
    """Weights of the frequencies of an FFT in each band: triangles of height 1 on the mel scale.

    The scale is 2595 log10(1 + f / 700), the centres are equally far apart from 0 Hz to half the
    rate (HTK Book 3.4, section 5.4). `Q` is `size // 2 + 1`.

    Raises:
        ConfigError: a band lies between two frequencies of the FFT.
    """
    frequencies = np.arange(size // 2 + 1) * rate / size
    places = _mel(frequencies) * (mels + 1) / _mel(rate / 2)  # in widths of half a triangle
    centres = np.arange(1, mels + 1)
    bank = np.maximum(1 - np.abs(places[None, :] - centres[:, None]), 0)
    empty = np.flatnonzero(bank.sum(axis=1) == 0)
    if empty.size:
        raise ConfigError(
            f"{mels} mel bands are too many for windows of {size} samples at {rate} Hz: no "
            f"frequency falls into band {empty[0] + 1}. Ask for fewer bands or longer windows."
        )
    return bank.astype(np.float32)


def _mel(frequency: Any) -> Any:
    return 2595 * np.log10(1 + np.asarray(frequency) / 700)


def alignment_frames(labels: Sequence[int] | np.ndarray) -> int:
    """Frames that CTC needs at least: one a label, and a blank between equal neighbours."""
    labels = np.asarray(labels)
    return int(labels.size + np.count_nonzero(labels[1:] == labels[:-1]))
