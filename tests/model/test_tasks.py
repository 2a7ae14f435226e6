"""Models of tasks other than language: rules, sizes by hand, frames in the first positions."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from moe.axes import BATCH_AXES
from moe.errors import ConfigError
from moe.model.build import matrices, model_size, model_spec, takes_padding
from moe.model.layer import Call
from moe.model.spec import ModelSpec, Stem
from moe.parallel.mesh import make_mesh
from moe.parallel.rules import RULES, TOKEN_SPEC, parameter_shardings
from moe.training.state import bind, make_skeleton
from tests import tiny
from tests.model import wired

PATCHES = Stem("patches", frames=4, size=6)
SOUND = Stem("conv", frames=64, size=6)
DENSE = ("model.pattern=('dense',)", "data.sequence_length=16")
# Of models.tiny() with dense layers: layers, width, heads, heads of keys, of a head, hidden.
L, D, H, KV, X, F, V, S = 2, 32, 4, 2, 8, 64, 48, 16
LAYERS = L * (D * H * X + 2 * D * KV * X + H * X * D + 3 * D * F)
NORMS = L * 2 * D + D
BOTH_WAYS = L * 2 * H * X * S  # two products with all keys


def spec_of(*overrides: str, **more) -> ModelSpec:
    return model_spec(tiny.config(*overrides), V, **more)


def made(*overrides: str, classes: int = 0, stem: Stem | None = None) -> tiny.Model:
    spec = spec_of("data.sequence_length=16", *overrides, classes=classes, stem=stem)
    skeleton = make_skeleton(spec)
    return tiny.Model(spec, skeleton, *tiny.numbers(skeleton), tiny.run_of(skeleton, wired.EXACT))


def frames_of(stem: Stem, batch, counts) -> dict[str, jax.Array]:
    """Fields of a call: the first `counts` positions of each row are made of frames."""
    frames = np.random.default_rng(5).normal(size=(tiny.B, stem.frames, stem.size))
    modality = jnp.arange(tiny.S)[None] < jnp.asarray(counts)[:, None]
    return {
        "frames": jnp.asarray(frames, jnp.float32),
        "modality": (modality & batch.valid).astype(jnp.int32),
    }


@pytest.mark.parametrize(
    ("task", "output", "causal"),
    [
        ("language", "tokens", True),
        ("seq2seq", "tokens", True),
        ("ctc", "tokens", False),
        ("classify", "classes", False),
        ("match", "pair", False),
    ],
)
def test_a_task_says_what_comes_out_and_who_sees_ahead(task, output, causal):
    spec = spec_of(*DENSE, f"task.name={task}", classes=3 * (task == "classify"))
    assert (spec.output, spec.causal) == (output, causal)


def test_pairs_of_pictures_by_hand():
    spec = spec_of(*DENSE, "task.name=match", stem=PATCHES)
    stem, pair = 6 * D, D * D
    size = model_size(spec, S)
    assert size.parameters_total == V * D + LAYERS + NORMS + stem + 4 * D + pair + 1
    # A quarter of the positions are patches, and a row has two vectors.
    products = LAYERS + stem * 4 / S + pair * 2 / S
    assert size.flops_per_token == 2 * (products + BOTH_WAYS)


def test_the_hidden_layer_of_patches_by_hand():
    plain, deep = (
        model_size(spec_of(*DENSE, "task.name=match", stem=PATCHES._replace(hidden=h)), S)
        for h in (0, 10)
    )
    more = 6 * 10 + 10 * D - 6 * D
    assert deep.parameters_total - plain.parameters_total == more
    assert deep.flops_per_token - plain.flops_per_token == 2 * more * 4 / S


def test_labels_of_sounds_by_hand():
    spec = spec_of(*DENSE, "task.name=classify", stem=SOUND, classes=5)
    first, second, head = 3 * 6 * D, 3 * D * D, 5 * D
    size = model_size(spec, S)
    biases = 2 * D
    assert size.parameters_total == V * D + LAYERS + NORMS + first + second + biases + head
    # All 16 positions are of the stem, whose first convolution runs twice for each.
    products = LAYERS + 2 * first + second + head / S
    assert size.flops_per_token == 2 * (products + BOTH_WAYS)


def test_only_models_that_predict_tokens_multiply_by_tied_embeddings():
    tied = (*DENSE, "model.tie_embeddings=true")
    for task, count in (("ctc", 1), ("language", 1), ("match", 0), ("classify", 0)):
        found = matrices(spec_of(*tied, f"task.name={task}", classes=2), S)
        assert (("embedding",) in found) == count, task


def test_a_prefix_counts_as_causal():
    causal, prefix = (
        model_size(spec_of(*DENSE, f"task.name={task}"), S) for task in ("language", "seq2seq")
    )
    assert prefix == causal


@pytest.mark.parametrize("attention", ["block", "kmeans", "segment", "routed_heads"])
def test_only_full_attention_sees_a_source_both_ways(attention):
    task = ("task.name=seq2seq", "data.sequence_length=64", f"attention.name={attention}")
    with pytest.raises(ConfigError, match=f"attention.name='{attention}' .* task.prefix='causal'"):
        spec_of(*task)
    assert spec_of(*task, "task.prefix=causal").causal


def test_sources_and_targets_may_not_see_ahead_by_their_routing():
    depth = "model.pattern=('depth','dense')"
    with pytest.raises(ConfigError, match="noncausal in training"):
        spec_of("task.name=seq2seq", depth)
    assert spec_of("task.name=ctc", depth).has_depth


def test_a_stem_must_fit_its_rows():
    with pytest.raises(ConfigError, match="less than the 32 positions"):
        spec_of(*DENSE, "task.name=ctc", stem=SOUND._replace(frames=128))


def test_who_may_pad_prompts():
    assert takes_padding(spec_of())
    for more in ("router.name=segment", "attention.name=block", "model.conv_experts=1"):
        assert not takes_padding(spec_of("data.sequence_length=64", more)), more


@pytest.mark.parametrize("stem", [PATCHES, SOUND._replace(frames=16)], ids=["patches", "conv"])
def test_frames_stand_where_the_row_says(stem):
    model, batch = made("task.name=ctc", "model.num_layers=1", stem=stem), tiny.batch()
    fields = frames_of(stem, batch, (4, 2, 0))
    out = model(batch, **fields).logits
    taken = np.asarray(fields["modality"]) == 1
    # Which token stands below a frame is the same, and so is a frame that no position takes.
    other = jnp.where(taken, (batch.tokens + 3) % tiny.VOCAB, batch.tokens)
    np.testing.assert_array_equal(model(batch._replace(tokens=other), **fields).logits, out)
    group = stem.frames // 4
    frames = np.array(fields["frames"])
    frames[1, 2 * group :] = np.nan
    frames[2] = np.nan
    unused = fields | {"frames": jnp.asarray(frames)}
    np.testing.assert_array_equal(model(batch, **unused).logits, out)
    # A row without frames is what it is to a model of tokens.
    np.testing.assert_allclose(model(batch).logits[2], out[2], atol=1e-5)
    assert np.abs(model(batch).logits[0] - out[0]).max() > 0.1


def test_everything_learns_from_pairs_of_a_picture_and_a_word():
    """With experts of each kind of position, and tokens in both segments of the last row."""
    pools = ("router.name=modality_pools", "router.pools=(5,3)", "model.num_layers=1")
    model = made("task.name=match", *pools, stem=PATCHES)
    batch = tiny.batch(((4, 7), (4, 3), (6, 5)))
    fields = frames_of(PATCHES, batch, (4, 4, 0))

    @jax.jit
    def step(params):
        def loss(params):
            call = Call(batch.tokens, batch.valid, wired.EXACT, **fields)
            out = bind(model.skeleton, params, model.router)(batch.positions, batch.segments, call)
            similar = out.scale * jnp.einsum("bd,cd->bc", out.pair[:, 0], out.pair[:, 1])
            return -jax.nn.log_softmax(similar)[jnp.arange(tiny.B), jnp.arange(tiny.B)].sum(), out

        return jax.grad(loss, has_aux=True)(params)

    gradient, out = step(model.params)
    wired.assert_learns({n: gradient[n] for n in ("stem", "pair", "embedding", "blocks")})
    expert, valid = np.asarray(out.reports.expert)[0], np.asarray(batch.valid)
    of_frames = (np.asarray(fields["modality"]) == 1) & valid
    assert (expert[of_frames] >= 5).all()
    assert (expert[valid & ~of_frames] < 5).all()


@pytest.mark.parametrize("pool", ["mean", "segment"])
def test_rows_of_frames_are_classified_by_those_that_are_real(pool):
    stem = SOUND
    model = made(
        "task.name=classify", f"task.pool={pool}", "model.num_layers=1", classes=3, stem=stem
    )
    batch = tiny.batch(((16,), (13,), (5,)))
    fields = frames_of(stem, batch, (16, 16, 16))
    out = model(batch, **fields).logits
    junk = jnp.where(batch.valid.repeat(4, axis=1)[..., None], fields["frames"], jnp.nan)
    np.testing.assert_array_equal(model(batch, **fields | {"frames": junk}).logits, out)
    assert out.shape == (tiny.B, 3)
    assert np.isfinite(out).all()
    last = fields["frames"].at[1, 48:].add(1.0)  # of the last real position
    moved = np.abs(model(batch, **fields | {"frames": last}).logits - out).max(axis=-1)
    np.testing.assert_array_equal(moved > 1e-4, [False, True, False])


def test_long_texts_are_matched_by_segments():
    long = ("attention.name=segment", "attention.segment=4", "router.name=segment")
    model = made("task.name=match", *long, "router.segment_size=4", "model.num_layers=1")
    batch = tiny.batch(((7, 9), (4, 6), (8, 8)))
    pair = model(batch).pair
    np.testing.assert_allclose(jnp.square(pair).sum(axis=-1), 1.0, rtol=1e-5)
    end = model(batch._replace(tokens=batch.tokens.at[0, 15].add(1))).pair
    moved = np.abs(end - pair).max(axis=-1)
    assert moved[0, 1] > 1e-4


def test_frames_and_a_prefix_on_a_mesh():
    spec = spec_of("model.num_layers=1", *DENSE, "task.name=seq2seq", stem=PATCHES)
    skeleton = make_skeleton(spec)
    params, router = tiny.numbers(skeleton)
    one = tiny.batch(((16,), (7,), (11,), (16,)))
    frames = np.random.default_rng(5).normal(size=(4, 4, 6)).astype(np.float32)
    modality = (jnp.arange(tiny.S)[None] < jnp.asarray([4, 4, 0, 2])[:, None]).astype(jnp.int32)
    tokens = {"modality": modality, "prefix": one.valid & (one.positions < 6)}

    @jax.jit
    def run(params, batch, fields):
        model = bind(skeleton, params, router)
        return model(
            batch.positions, batch.segments, Call(batch.tokens, batch.valid, wired.EXACT, **fields)
        ).logits

    whole = run(params, one, tokens | {"frames": frames})
    mesh = make_mesh(data=2, sequence=2, tensor=2)
    cut, rows = NamedSharding(mesh, TOKEN_SPEC), NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    spread = jax.device_put(params, parameter_shardings(skeleton.params, mesh, RULES["separate"]))
    batch = type(one)(*jax.device_put(one[:5], cut), jax.device_put(one.domain, rows))
    fields = jax.device_put(tokens, cut) | {"frames": jax.device_put(frames, rows)}
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(run(spread, batch, fields), whole, atol=1e-4)


@pytest.mark.parametrize(
    ("stem", "without", "words"),
    [
        (None, (), r"frames need ModelSpec\.stem"),
        (PATCHES, ("modality",), r"frames need ModelSpec\.stem and Call\.modality"),
        (PATCHES._replace(frames=20), (), "16 positions cannot hold 20 of the stem"),
    ],
)
def test_frames_need_a_stem_kinds_and_room(stem, without, words):
    spec = spec_of(*DENSE[:1], stem=stem)
    skeleton = make_skeleton(spec)
    batch = tiny.batch()
    fields = frames_of(PATCHES if stem is None else stem, batch, (4, 4, 4))
    fields = {name: value for name, value in fields.items() if name not in without}

    def run(params, router):
        call = Call(batch.tokens, batch.valid, wired.EXACT, **fields)
        return bind(skeleton, params, router)(batch.positions, batch.segments, call)

    with pytest.raises(ValueError, match=words):
        jax.eval_shape(run, *tiny.numbers(skeleton))
