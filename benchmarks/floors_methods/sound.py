"""What a recording sounds like on average: means and deviations of a log-mel spectrogram."""

import numpy as np
from scipy.signal import stft

MELS, WINDOW, HOP = 40, 0.025, 0.010  # bands; seconds


def mel(hertz):
    """Frequency on the mel scale (O'Shaughnessy 1987)."""
    return 2595 * np.log10(1 + np.asarray(hertz) / 700)


def mel_filters(bins: np.ndarray, bands: int) -> np.ndarray:
    """Triangles of equal width in mel, from 0 to the highest bin.

    Args:
        bins: frequencies of the spectrum in Hz, rising from 0 [W].
        bands: number of triangles F.

    Returns:
        Weights [F W] in 0..1.
    """
    edges = np.linspace(0, mel(bins[-1]), bands + 2)[:, None]  # [F+2 1]
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    at = mel(bins)
    rising, falling = (at - left) / (centre - left), (right - at) / (right - centre)
    return np.clip(np.minimum(rising, falling), 0, None)


def log_mel(pcm: np.ndarray, rate: int) -> np.ndarray:
    """Log energy by band: int16 PCM [T] at `rate` Hz -> float32 [frames MELS]."""
    window = int(WINDOW * rate)
    sound = np.pad(pcm.astype(np.float32) / 32768, (0, max(0, window - len(pcm))))
    bins, _, spectrum = stft(sound, rate, nperseg=window, noverlap=window - int(HOP * rate))
    energy = mel_filters(bins, MELS) @ np.abs(spectrum) ** 2  # [MELS frames]
    return np.log(energy + 1e-10).T.astype(np.float32)


def summary(pcm: np.ndarray, rate: int) -> np.ndarray:
    """Mean and deviation over time of each band [2 MELS]."""
    bands = log_mel(pcm, rate)
    return np.concatenate([bands.mean(0), bands.std(0)])
