"""Every registered model: forward, backward, training against inference, auxiliary heads.

New families are found by themselves. Networks that differ only in depth or width are made small
and, where that makes them equal, run once.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from cnnlab import models, registry

IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(2, 32, 32, 3)), jnp.float32)
KEY = jax.random.key(0)
NAMES = list(registry.plugins("models"))


def shrink(name: str) -> dict:
    """Fields that make a variant small without changing what it is."""
    fields = registry.get("models", name).parameters
    small = {}
    if "width" in fields:
        small["width"] = 4
    if "stage_sizes" in fields:
        small["stage_sizes"] = (1,) * len(fields["stage_sizes"])
    if "head_width" in fields:
        small["head_width"] = 16
    if fields.get("groups", 1) > 1:
        small |= {"groups": 2, "base_width": 32}
    if fields.get("widen", 1) > 2:
        small["widen"] = 2
    if "depth" in fields:
        small["depth"] = 8 + (fields["depth"] - 8) % 6
    if "squeeze_ratio" in fields:  # of so few channels that all may be dead
        small["width"] = 32
    if "width_factor" in fields:
        small |= {"width_factor": 0.1, "depth_factor": 1.0}
    if "width_slope" in fields:
        small |= {"depth": 4, "initial_width": 16, "width_slope": 16.0,
                  "width_multiplier": 2.0, "group_width": 4}  # fmt: skip
    return small


def create_small(name: str, **fields) -> nn.Module:
    return models.create(name, num_outputs=7, **{**shrink(name), **fields})


def own_heads(name: str) -> int:
    """Auxiliary heads that a variant has by itself once it is small: one, for one block a stage."""
    return 1 if registry.get("models", name).parameters.get("aux_heads") else 0


# One name for each network that is still different once it is small.
DISTINCT = list({create_small(name): name for name in reversed(NAMES)}.values())


def probe(tree: tuple) -> jax.Array:
    """A sum with a different weight for each number, so that nothing cancels."""
    rng = np.random.default_rng(2)
    return sum(
        jnp.sum(leaf * rng.normal(size=leaf.shape).astype(np.float32))
        for leaf in jax.tree.leaves(tree)
    )


@pytest.fixture(scope="session")
def train_once(draw_variables):
    """A function module -> variables, outputs, moved statistics, gradients of one training pass."""

    @functools.cache
    def run(module: nn.Module) -> tuple:
        variables = draw_variables(module, IMAGES)
        rest = {name: value for name, value in variables.items() if name != "params"}

        def forward(params):
            outputs, moved = module.apply(
                {"params": params, **rest},
                IMAGES,
                train=True,
                rngs={"dropout": KEY},
                mutable=["batch_stats"],
            )
            return probe((outputs.logits, outputs.aux)), (outputs, moved)

        # Unoptimised code: each network runs once, so compiling is all that it costs.
        lowered = jax.jit(jax.grad(forward, has_aux=True)).lower(variables["params"])
        compiled = lowered.compile({"xla_backend_optimization_level": 0})
        gradients, (outputs, moved) = jax.device_get(compiled(variables["params"]))
        return variables, outputs, moved, gradients

    return run


@pytest.mark.parametrize("name", NAMES)
def test_takes_a_step_with_finite_gradients_everywhere(name, train_once):
    variables, outputs, moved, gradients = train_once(create_small(name))
    assert outputs.logits.shape == (2, 7)
    assert outputs.logits.dtype == jnp.float32
    assert [head.shape for head in outputs.aux] == [(2, 7)] * own_heads(name)
    assert outputs.features
    assert all(f.ndim == 4 and f.shape[0] == 2 for f in outputs.features.values())
    for path, gradient in jax.tree_util.tree_flatten_with_path(gradients)[0]:
        where = jax.tree_util.keystr(path)
        # Automatic names (Conv_0) change under remat, and with them the parameter tree.
        assert not any(key.key[:1].isupper() for key in path), f"unnamed block in {where}"
        assert np.isfinite(gradient).all(), where
        assert (gradient != 0).any(), where
    before = variables.get("batch_stats", {})
    after = moved.get("batch_stats", {})
    assert jax.tree.structure(before) == jax.tree.structure(after)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert np.isfinite(new).all()
        assert (old != new).any()


@pytest.mark.parametrize("name", DISTINCT)
def test_is_traced_once_however_often_it_is_called(name):
    module, traces = create_small(name), []

    @jax.jit
    def statistics(variables):
        traces.append(name)
        moved = module.apply(
            variables, IMAGES, train=True, rngs={"dropout": KEY}, mutable=["batch_stats"]
        )[1]
        return variables | dict(moved)

    variables = jax.eval_shape(lambda: module.init(KEY, IMAGES, train=True))
    # What a pass gives back (dtypes, weak types and all) is what the next one takes.
    for _ in range(3):
        variables = jax.eval_shape(statistics, variables)
    assert traces == [name]


@pytest.mark.parametrize("name", DISTINCT)
def test_heads_at_each_feature_train_and_vanish(name):
    plain = create_small(name)
    shapes = jax.eval_shape(lambda: plain.init_with_output(KEY, IMAGES, train=False)[0].features)
    aux = tuple(shapes)
    module = create_small(name, aux=aux)
    abstract = jax.eval_shape(lambda: module.init(KEY, IMAGES, train=False))
    assert set(abstract["params"]) == {"net", *(f"aux_{feature}" for feature in aux)}

    def apply(variables, train):
        return module.apply(
            variables, IMAGES, train=train, rngs={"dropout": KEY}, mutable=["batch_stats"]
        )[0]

    trained = jax.eval_shape(lambda v: apply(v, train=True), abstract)
    assert [head.shape for head in trained.aux] == [(2, 7)] * (own_heads(name) + len(aux))
    assert {head.dtype for head in trained.aux} == {jnp.dtype("float32")}
    stripped = {
        name: {"net": tree["net"]} if "net" in tree else tree for name, tree in abstract.items()
    }
    for variables in (abstract, stripped):
        assert jax.eval_shape(lambda v: apply(v, train=False), variables).aux == ()


@pytest.mark.parametrize("name", ["lenet5_modern", "vgg_small", "resnet8"])
def test_heads_get_gradients_and_logits_stay_those_of_the_net(name, train_once):
    aux = ("stage2", "stage1")
    module, plain = create_small(name, aux=aux, aux_hidden=5), create_small(name)
    variables, outputs, _, gradients = train_once(module)
    for gradient in jax.tree.leaves(gradients):
        assert np.isfinite(gradient).all()
    for feature in aux:
        assert all((g != 0).any() for g in jax.tree.leaves(gradients[f"aux_{feature}"]))
    heads = [
        np.maximum(
            np.asarray(outputs.features[feature]).mean((1, 2)) @ head["hidden"]["kernel"]
            + head["hidden"]["bias"][None],
            0,
        )
        @ head["logits"]["kernel"]
        + head["logits"]["bias"][None]
        for feature in aux
        for head in [variables["params"][f"aux_{feature}"]]
    ]
    np.testing.assert_allclose(outputs.aux, heads, rtol=1e-3, atol=1e-4)
    inner = {name: tree["net"] for name, tree in variables.items()}
    wrapped, bare = (
        jax.jit(functools.partial(m.apply, train=False))(v, IMAGES).logits
        for m, v in ((module, variables), (plain, inner))
    )
    np.testing.assert_array_equal(wrapped, bare)


@pytest.mark.parametrize("name", DISTINCT)
def test_bfloat16_gives_float32_logits_and_parameters(name):
    if "dtype" not in registry.get("models", name).parameters:
        pytest.fail(f"{name} takes no dtype")
    module = create_small(name, dtype="bfloat16")
    outputs, variables = jax.eval_shape(lambda: module.init_with_output(KEY, IMAGES, train=False))
    assert outputs.logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert any(f.dtype == jnp.bfloat16 for f in outputs.features.values())


@pytest.mark.parametrize("name", DISTINCT)
def test_train_has_no_default(name):
    with pytest.raises(TypeError, match="train"):
        jax.eval_shape(lambda: create_small(name).init(KEY, IMAGES))


@pytest.mark.parametrize("field", ["dropout", "spatial_dropout"])
@pytest.mark.parametrize("name", ["lenet5", "simple_conv", "vgg11", "resnet8", "dilated_stack"])
def test_dropout_draws_in_training_only(name, field):
    module = create_small(name, **{field: 0.5})
    variables = jax.eval_shape(lambda: module.init(KEY, IMAGES, train=False))

    def forward(train):
        return jax.make_jaxpr(
            lambda v, k: (
                module.apply(v, IMAGES, train=train, rngs={"dropout": k}, mutable=["batch_stats"])[
                    0
                ].logits
            )
        )(variables, KEY)

    assert "random_bits" in str(forward(train=True))
    assert "random_bits" not in str(forward(train=False))
