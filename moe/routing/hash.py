"""Hash layers: the token's id decides, by a fixed table (Roller et al. 2021, arXiv:2106.04426).

One frequent id caps the balance of any such table: its tokens cannot be split.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped
import numpy as np

from moe.errors import ConfigError
from moe.routing.router import Router
from moe.routing.selection import choices
from moe.routing.types import Routing, State

KINDS = ("random", "balanced")


def route(
    logits: Float[Array, "B S E"],
    valid: Bool[Array, "B S"],
    *,
    k: int,
    state: State | None = None,
    token_ids: Int[Array, "B S"] | None = None,
) -> Routing:
    """Sends each token to the `k` experts that the table lists for its id, with gate 1/k each.

    Args:
        logits: only the shape `[B S E]` is read; a layer without a gate passes zeros.
        valid: `[B S]`, True for a real token.
        k: experts a token, the width of the table.
        state: `{"table": int32 [V K]}`.
        token_ids: int32 `[B S]`, ids of the input tokens. The id of the next token would leak
            the target. Ids outside the table use its nearest end.

    Returns:
        The decision; `logits` are zeros, `probs` is 1/k on the chosen experts.

    Raises:
        ValueError: no table, no ids, or a table of another width.
    """
    if state is None or token_ids is None:
        raise ValueError("hash routing needs its table (state) and token_ids")
    if state["table"].shape[-1] != k:
        raise ValueError(f"the hash table lists {state['table'].shape[-1]} experts an id, not {k}")
    logits = jnp.zeros_like(logits)
    expert = jnp.take(state["table"], token_ids, axis=0, mode="clip")
    gate = jnp.full(expert.shape, 1.0 / k)
    chosen = jax.nn.one_hot(expert, logits.shape[-1])  # [B S K E]
    return Routing(logits, chosen.sum(axis=-2) / k, choices(expert, gate, valid))


def init_state(
    num_experts: int,
    vocab_size: int,
    k: int,
    key: PRNGKeyArray,
    token_counts: Shaped[np.ndarray, " V"] | None = None,
    *,
    kind: str = "random",
) -> State:
    """Draws the table.

    Args:
        num_experts: `E`.
        vocab_size: `V`.
        k: different experts listed for each id.
        key: decides the random table, and ties in the balanced one: layers differ by key.
        token_counts: how often each id occurs in the training text; `balanced` needs it.
        kind: `random`, or `balanced`: ids by falling count, each into its k emptiest experts.

    Returns:
        `{"table": int32 [V K]}`; belongs in the checkpoint.

    Raises:
        ValueError: `balanced` without counts for every id.
    """
    if kind == "random":
        return {"table": jax.lax.top_k(jax.random.uniform(key, (vocab_size, num_experts)), k)[1]}
    if token_counts is None or token_counts.shape != (vocab_size,):
        raise ValueError(f"a balanced hash table needs token_counts of shape ({vocab_size},)")
    return {"table": balanced_table(num_experts, k, key, token_counts)}


def balanced_table(
    num_experts: int, k: int, key: PRNGKeyArray, token_counts: Shaped[np.ndarray, " V"]
) -> Int[Array, "V K"]:
    """Fills experts greedily by falling count, as a Huffman-like packing.

    Ids that never occur count as 1, or all of them would share the emptiest expert. Counts are
    scaled to a sum below 2^30, so that loads add up exactly in int32.
    """
    counts = np.asarray(token_counts, np.int64)
    weight = jnp.asarray(np.maximum(counts // (counts.sum() // 2**30 + 1), 1), jnp.int32)
    order_key, label_key = jax.random.split(key)
    order = jnp.lexsort((jax.random.uniform(order_key, weight.shape), -weight))

    def seat(load: Int[Array, " E"], token_id: Int[Array, ""]):
        chosen = jax.lax.top_k(-load, k)[1]
        return load.at[chosen].add(weight[token_id]), chosen

    _, chosen = jax.lax.scan(seat, jnp.zeros(num_experts, jnp.int32), order)  # [V K]
    label = jax.random.permutation(label_key, num_experts)
    return jnp.zeros_like(chosen).at[order].set(label[chosen])


def check(num_experts: int, *, k: int, kind: str = "random") -> None:
    """Refuses unknown tables.

    Raises:
        ConfigError: `kind` is unknown.
    """
    del num_experts, k
    if kind not in KINDS:
        raise ConfigError(f"router.kind={kind!r} is not one of {', '.join(KINDS)}; choose one.")


ROUTER = Router(
    route,
    paper="Roller et al. 2021, arXiv:2106.04426",
    equation="S = table[token id], gate = 1/k",
    cost="k experts",
    use="The second control: routing that knows which token it is and has learned nothing.",
    check=check,
    gate=None,
    stateful=True,
    init_state=init_state,
)
