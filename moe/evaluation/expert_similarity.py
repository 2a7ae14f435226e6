"""How alike experts are (M16): by the router's columns, by their weights, by what they answer.

Similar outputs mean that experts have not specialised; similar weights alone do not, because an
expert computes the same with its hidden units in any order. `weight_similarity(matched=True)`
therefore finds the best order for each pair first, which costs O(F^3) a pair.
"""

from jaxtyping import Float
import numpy as np
from scipy.optimize import linear_sum_assignment


def router_similarity(kernel: Float[np.ndarray, "*L D E"]) -> Float[np.ndarray, "*L E E"]:
    """Cosines of the columns of the gate."""
    return _cosines(np.asarray(kernel, np.float64).swapaxes(-2, -1))


def units(wi: Float[np.ndarray, "E D P F"], wo: Float[np.ndarray, "E F D"]) -> np.ndarray:
    """`[E F X]`: all weights of each hidden unit in one row, what goes in and what comes out."""
    wi, wo = np.asarray(wi, np.float64), np.asarray(wo, np.float64)
    into = np.moveaxis(wi, 3, 1).reshape(wi.shape[0], wi.shape[3], -1)
    return np.concatenate([into, wo], axis=-1)


def weight_similarity(
    wi: Float[np.ndarray, "E D P F"], wo: Float[np.ndarray, "E F D"], *, matched: bool = False
) -> Float[np.ndarray, "E E"]:
    """Cosines of the flattened weights of one layer's experts.

    Args:
        wi: input projections.
        wo: output projections.
        matched: first permutes the hidden units of one of each pair so that the cosine is largest
            (the assignment problem, Kuhn 1955).
    """
    rows = units(wi, wo)
    if not matched:
        return _cosines(rows.reshape(len(rows), -1))
    size = np.linalg.norm(rows, axis=(1, 2))
    out = np.eye(len(rows))
    for i in range(len(rows)):
        for j in range(i):
            gain = rows[i] @ rows[j].T  # [F F]
            at = linear_sum_assignment(gain, maximize=True)
            out[i, j] = out[j, i] = gain[at].sum() / max(size[i] * size[j], 1e-30)
    return out


def linear_cka(outputs: Float[np.ndarray, "E T D"]) -> Float[np.ndarray, "E E"]:
    """Linear centred kernel alignment of what experts answer to the same tokens.

    `||Y'X||^2 / (||X'X|| ||Y'Y||)` with centred columns (Kornblith et al. 2019, arXiv:1905.00414):
    1 for outputs that differ by a rotation and a scale. 0 for an expert whose output is constant.
    """
    x = np.asarray(outputs, np.float64)
    x = x - x.mean(axis=1, keepdims=True)
    cross = np.einsum("itd,jtf->ijdf", x, x)
    alike = np.square(cross).sum(axis=(2, 3))
    own = np.sqrt(np.diagonal(alike))
    return alike / np.maximum(own[:, None] * own[None, :], 1e-30)


def output_similarity(outputs: Float[np.ndarray, "E T D"]) -> Float[np.ndarray, "E E"]:
    """Mean over tokens of the cosine between two experts' answers (Omi et al. 2025, arXiv:2506.14038)."""
    return _cosines(np.asarray(outputs, np.float64).swapaxes(0, 1)).mean(axis=0)


def mean_of_pairs(similarity: Float[np.ndarray, "*L E E"]) -> Float[np.ndarray, "*L"]:
    """Mean over pairs of different experts; 0 with a single one."""
    E = similarity.shape[-1]
    off = similarity.sum(axis=(-2, -1)) - np.trace(similarity, axis1=-2, axis2=-1)
    return np.asarray(off / max(E * (E - 1), 1))


def _cosines(rows: Float[np.ndarray, "*A E X"]) -> Float[np.ndarray, "*A E E"]:
    size = np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-30)
    return (rows / size) @ (rows / size).swapaxes(-2, -1)
