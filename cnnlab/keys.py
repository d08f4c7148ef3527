"""Every random key of a run: a pure function of (seed, stream, step).

A stream is a name (`"shuffle"`, `"dropout"`, ...). Its number is the CRC-32 of the name, so that
adding a stream never changes another's draws. Per-example keys come from `per_example`.
"""

from __future__ import annotations

import zlib

import jax
import jax.numpy as jnp


def key(seed: int | jax.Array, stream: str, step: int | jax.Array = 0) -> jax.Array:
    """The key of `stream` at `step` of the run with this seed.

    Args:
        seed: the run's seed, 0 to 2**31 - 1; may be traced.
        stream: what the draws are for.
        step: the training step (or epoch, for draws made once an epoch); may be traced.

    Returns:
        A typed PRNG key (threefry), scalar.
    """
    base = jax.random.fold_in(jax.random.key(seed), zlib.crc32(stream.encode()) & 0x7FFFFFFF)
    return jax.random.fold_in(base, step)


def per_example(step_key: jax.Array, count: int) -> jax.Array:
    """`count` keys, one for each position of the batch; [count] typed keys.

    Position i always gets the same key, whatever `count` is and however the batch is sharded.
    """
    return jax.vmap(lambda i: jax.random.fold_in(step_key, i))(jnp.arange(count))
