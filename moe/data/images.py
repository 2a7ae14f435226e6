"""Pictures as patches: squares of pixels, each a vector that a model takes as one position."""

from jaxtyping import Float32, UInt8
import numpy as np

from moe.errors import ConfigError


def patches(
    image: UInt8[np.ndarray, "H W channels"], patch: int, stride: int
) -> Float32[np.ndarray, "N F"]:
    """Cuts a picture into patches, row by row from the top left.

    Args:
        image: pixels of 0 to 255.
        patch: side of a patch, pixels.
        stride: from one patch to the next; below `patch` they overlap.

    Returns:
        Numbers in [-1, 1]; `F` is `patch * patch * channels`, rows of pixels one after another.

    Raises:
        ConfigError: patches that do not fill the picture.
    """
    num_patches(image.shape, patch, stride)
    windows = np.lib.stride_tricks.sliding_window_view(image, (patch, patch), axis=(0, 1))
    windows = windows[::stride, ::stride]  # [rows columns channels patch patch]
    flat = np.moveaxis(windows, 2, -1).reshape(-1, patch * patch * image.shape[2])
    return flat.astype(np.float32) / np.float32(127.5) - np.float32(1)


def num_patches(shape: tuple[int, ...], patch: int, stride: int) -> int:
    """How many patches a picture of this shape has.

    Raises:
        ConfigError: patches that do not fill the picture.
    """
    if min(patch, stride) < 1:
        raise ConfigError(f"data.patch={patch} and data.stride={stride} must be greater than 0.")
    height, width = shape[:2]
    for side in (height, width):
        if patch > side or (side - patch) % stride:
            raise ConfigError(
                f"Pictures of {height} x {width} pixels cannot be cut into patches of data.patch={patch} "
                f"every data.stride={stride} pixels: {side} - {patch} must be a multiple of {stride}, "
                "and not negative."
            )
    return ((height - patch) // stride + 1) * ((width - patch) // stride + 1)
