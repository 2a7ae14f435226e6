"""Decoding with a cache: prompts of unequal length, against full forward passes and against each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.dispatch.reference import reference
from moe.dispatch.table import make_dispatch
from moe.errors import ConfigError
from moe.evaluation.beam import length_penalty
from moe.evaluation.decode import Decoding, Prompts, decode, prompts_of
from moe.model.build import model_spec
from moe.model.layer import Call
from moe.model.spec import Stem
from moe.parallel.mesh import make_mesh
from moe.training.state import bind, make_skeleton
from tests import tiny

P, N, END = 6, 5, 7
GREEDY = Decoding("greedy", length=N)
SIZES = np.array([4, 6, 1, 3], np.int32)


@functools.cache
def bound(*overrides: str):
    """A model whose next token is the boundary often enough."""
    model = tiny.model("model.num_layers=2", *overrides)
    params = dict(model.params)
    params["head"] = params["head"].at[:, END].multiply(3.0)
    return model, params, bind(model.skeleton, params, model.router)


def prompts(sizes=SIZES, seed: int = 0, width: int = P, garbage: int = 0) -> Prompts:
    tokens = np.random.default_rng(seed).integers(8, tiny.VOCAB, (len(sizes), width))
    inside = np.arange(width) < np.asarray(sizes)[:, None]
    return Prompts(np.where(inside, tokens, garbage).astype(np.int32), np.asarray(sizes, np.int32))


def run(given: Prompts, decoding: Decoding = GREEDY, *overrides: str, boundary=END, seed: int = 0):
    whole = bound(*overrides)[2]
    return decode(whole, reference, given, decoding, jax.random.key(seed), boundary=boundary)


@functools.cache
def full_pass(*overrides: str):
    """Logits [V] behind one text without padding or cache: compiled once, for rows of P + N."""
    model, params, _ = bound(*overrides)

    @jax.jit
    def logits(tokens, size, prefix):
        places = jnp.arange(P + N)[None]
        inside = places < size
        call = Call(tokens, inside, reference, prefix=prefix, key=jax.random.key(0))
        out = bind(model.skeleton, params, model.router)(
            places * inside, inside.astype(jnp.int32), call
        )
        return jax.nn.log_softmax(out.logits[0])

    def of(text, prefix=0):
        padded = np.zeros((1, P + N), np.int32)
        padded[0, : len(text)] = text
        seen = np.arange(P + N)[None] < prefix
        return np.asarray(logits(padded, np.int32(len(text)), seen))

    return of


def greedy(text: list[int], *overrides: str, prefix: int = 0) -> list[int]:
    """The most likely next token, again and again, each by a full pass over the text."""
    new = []
    while len(new) < N and END not in new:
        both = [*text, *new]
        new.append(int(full_pass(*overrides)(both, prefix)[len(both) - 1].argmax()))
    return [*new, *[END] * (N - len(new))]


def texts(given: Prompts) -> list[list[int]]:
    return [row[:size].tolist() for row, size in zip(given.tokens, given.size, strict=True)]


VARIANTS = {
    "topk": (),
    "moa": ("attention.name=projection_experts", "model.first_dense=1"),
    "expert_choice": ("router.name=expert_choice",),  # by its causal form
}


@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_is_the_argmax_of_full_passes_at_every_length(name):
    given = prompts()
    found = run(given, GREEDY, *VARIANTS[name])
    expected = [greedy(text, *VARIANTS[name]) for text in texts(given)]
    assert found.tolist() == expected


def test_some_rows_end_and_some_do_not():
    found = run(prompts(np.full(24, 4), width=4, seed=3))
    ends = (found == END).any(axis=1)
    assert ends.any()
    assert not ends.all()
    for row in found[ends]:
        assert (row[row.tolist().index(END) :] == END).all()


def test_a_prefix_sees_itself_both_ways():
    given = prompts()
    inside = np.arange(P)[None] < SIZES[:, None]
    found = run(given._replace(prefix=inside))
    assert found.tolist() == [greedy(text, prefix=len(text)) for text in texts(given)]
    assert found.tolist() != run(given).tolist()


def test_goes_on_from_a_picture():
    """Prompts of 3 patches and a boundary, as captions have them."""
    spec = model_spec(
        tiny.config("task.name=seq2seq", "model.num_layers=1"),
        tiny.VOCAB,
        stem=Stem("patches", 3, 4),
    )
    skeleton = make_skeleton(spec)
    params, router = tiny.numbers(skeleton)
    whole = bind(skeleton, params, router)
    frames = np.random.default_rng(1).normal(size=(2, 3, 4)).astype(np.float32)
    tokens = np.array([[0, 0, 0, END, 0]] * 2, np.int32)
    modality = np.array([[1, 1, 1, 0, 0]] * 2, np.int32)
    given = Prompts(tokens, np.full(2, 4, np.int32), modality > 0, modality, frames)
    found = decode(whole, reference, given, GREEDY, jax.random.key(0), boundary=None)

    @jax.jit
    def full(tokens):
        at = jnp.broadcast_to(jnp.arange(4 + N), tokens.shape)
        is_frame = at < 3
        call = Call(
            tokens,
            at >= 0,
            reference,
            modality=is_frame.astype(jnp.int32),
            prefix=is_frame,
            frames=jnp.asarray(frames),
            key=jax.random.key(0),
        )
        return whole(at, jnp.ones_like(at), call).logits

    predicted = full(np.concatenate([tokens[:, :4], found], axis=1)).argmax(axis=-1)
    np.testing.assert_array_equal(found, predicted[:, 3:-1])
    assert (found[0] != found[1]).any()


def test_padding_changes_nothing():
    given = prompts()
    found = run(given)
    np.testing.assert_array_equal(found, run(prompts(garbage=11)))  # whatever stands there
    wider = Prompts(np.pad(given.tokens, [(0, 0), (0, 3)]), given.size)
    np.testing.assert_array_equal(found, run(wider))
    alone = run(Prompts(given.tokens[1:2], given.size[1:2]))
    np.testing.assert_array_equal(found[1:2], alone)


def test_an_empty_row_stays_empty():
    given = prompts(np.array([4, 0, 1], np.int32))
    found = run(given)
    assert (found[1] == END).all()
    np.testing.assert_array_equal(found[[0, 2]], run(prompts(np.array([4, 2, 1])))[[0, 2]])


def test_beam_of_1_is_greedy():
    given = prompts()
    one = run(given, Decoding("beam", length=N, beam=1))
    np.testing.assert_array_equal(one, run(given))


def score(text: list[int], new: list[int], alpha: float) -> float:
    """Of new tokens up to the boundary, by one full pass."""
    size = new.index(END) + 1 if END in new else N
    both = [*text, *new[:size]]
    logits = full_pass()(both)
    places = range(len(text) - 1, len(both) - 1)
    return sum(logits[i, both[i + 1]] for i in places) / length_penalty(size, alpha)


def plain_beam(text: list[int], width: int, alpha: float) -> list[int]:
    """The search of `beam_search`, each step by full passes over every hypothesis."""
    going, ended = [((), 0.0)], []
    for size in range(1, N + 1):
        grown = []
        for new, total in going:
            both = [*text, *new]
            logits = full_pass()(both)[len(both) - 1]
            best = np.argsort(-logits)[: 2 * width]
            grown += [((*new, int(token)), total + logits[token]) for token in best]
        grown = sorted(grown, key=lambda h: -h[1])[: 2 * width]
        ended += [
            (new, total / length_penalty(size, alpha))
            for new, total in grown[:width]
            if new[-1] == END
        ]
        ended = sorted(ended, key=lambda h: -h[1])[:width]
        going = [h for h in grown if h[0][-1] != END][:width]
        reach = going[0][1] / length_penalty(N, alpha)
        if len(ended) == width or (ended and ended[0][1] >= reach):
            going = []
            break
    ended += [(new, total / length_penalty(N, alpha)) for new, total in going]
    new = max(ended, key=lambda h: h[1])[0]
    return [*new, *[END] * (N - len(new))]


def test_beam_is_the_plain_search_without_a_cache():
    given = prompts()
    found = run(given, Decoding("beam", length=N, beam=3, alpha=0.6))
    assert found.tolist() == [plain_beam(text, 3, 0.6) for text in texts(given)]
    first = run(given)
    scores = [
        (score(text, a.tolist(), 0.6), score(text, b.tolist(), 0.6))
        for text, a, b in zip(texts(given), found, first, strict=True)
    ]
    assert any(wide > narrow + 1e-4 for wide, narrow in scores)


def test_sampling_is_drawn_by_row_and_key():
    given = prompts()
    hot = Decoding("sample", length=N, temperature=2.0)
    found = run(given, hot)
    np.testing.assert_array_equal(found, run(given, hot))
    assert not np.array_equal(found, run(given, hot, seed=1))
    fewer = Prompts(given.tokens[:2], given.size[:2])
    np.testing.assert_array_equal(found[:2], run(fewer, hot))
    same = prompts(np.full(4, 3))
    same = same._replace(tokens=np.tile(same.tokens[:1], (4, 1)))
    assert len(np.unique(run(same, hot), axis=0)) > 1  # rows differ although prompts do not
    cold = hot._replace(temperature=0.0)
    np.testing.assert_array_equal(run(given, cold), run(given))


@pytest.mark.parametrize("method", ["beam", pytest.param("sample", marks=pytest.mark.slow)])
def test_eight_devices_say_what_one_says(method):
    given = prompts(np.array([4, 6, 1, 3, 2], np.int32))  # 5 rows do not divide among 8
    decoding = Decoding(method, length=N, beam=2)
    model, params, _ = bound()
    alone = run(given, decoding)
    mesh = make_mesh(data=2, fsdp=2, expert=2, sequence=1, tensor=1)
    with jax.set_mesh(mesh):
        dispatch = make_dispatch("grouped", mesh, expert_axes=("expert",))
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        whole = bind(model.skeleton, jax.device_put(params, everywhere), model.router)
        found = decode(whole, dispatch, given, decoding, jax.random.key(0), boundary=END)
    np.testing.assert_array_equal(found, alone)


def test_compiles_once_for_all_batches(caplog):
    run(prompts(seed=0))
    with jax.log_compiles():
        run(prompts(seed=1))
    assert not [r for r in caplog.records if "_decode" in r.getMessage()]


@pytest.mark.parametrize("name", ["bigram_hash", "segment"])
def test_routers_that_look_back_need_equal_prompts(name):
    overrides = (f"router.name={name}", *(["router.segment_size=4"] * (name == "segment")))
    with pytest.raises(ConfigError, match=f"prompts of 1 to 6 tokens.*router.name='{name}'"):
        run(prompts(), GREEDY, *overrides)
    even = prompts(np.array([4, 4, 0, 4]))  # wider than they are
    found = run(even, GREEDY, *overrides)
    expected = [greedy(text, *overrides) for text in texts(even) if text]
    assert found[[0, 1, 3]].tolist() == expected


def test_attentions_that_know_no_padding_need_equal_prompts():
    overrides = ("attention.name=segment", "attention.segment=4")
    with pytest.raises(ConfigError, match=r"attention\.name='segment' looks back"):
        run(prompts(), GREEDY, *overrides)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "beem"}, r"evaluation.decode='beem'.*did you mean 'beam'"),
        ({"length": 0}, "length=0"),
        ({"beam": 0}, "beam=0"),
        ({"alpha": -1.0}, r"length_penalty=-1\.0"),
        ({"temperature": -0.1}, r"temperature=-0\.1"),
        ({"top_p": 0.0}, r"top_p=0\.0"),
    ],
)
def test_refuses_numbers_out_of_range(changes, message):
    with pytest.raises(ConfigError, match=message):
        run(prompts(), GREEDY._replace(**changes))


def test_refuses_what_has_no_prompt():
    with pytest.raises(ConfigError, match="at least one token"):
        run(prompts(np.zeros(2)))
    with pytest.raises(ConfigError, match="boundary=48 is not one of the 48 ids"):
        run(prompts(), boundary=tiny.VOCAB)
    with pytest.raises(ConfigError, match="seq2seq"):
        prompts_of(jax.tree.map(np.asarray, tiny.batch()))


def test_prompts_end_with_the_first_scored_position():
    batch = jax.tree.map(np.asarray, tiny.batch(((9,), (5,), ())))
    scored = np.zeros((3, tiny.S), bool)
    scored[0, 4:9], scored[1, 2:5] = True, True
    batch = batch._replace(scored=scored, prefix=np.arange(tiny.S) <= np.array([[4], [2], [-1]]))
    found = prompts_of(batch)
    assert found.size.tolist() == [5, 3, 0]
    assert found.tokens.shape == (3, tiny.S)
    np.testing.assert_array_equal(found.tokens[0, :5], batch.tokens[0, :5])
    assert not found.tokens[0, 5:].any()
    assert found.prefix.sum(axis=1).tolist() == [5, 3, 0]
    assert found.modality is None
