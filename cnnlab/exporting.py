"""A network with its weights as one file of `jax.export`: from pixels to logits, without cnnlab.

The file is what `jax.export` writes, nothing around it: a machine with JAX alone runs it by
`jax.export.deserialize(bytearray(content)).call(images)`. The batch size is left open, and the
program holds the code of several platforms. JAX promises to read such a file for six months of
its releases; to keep weights for longer, use `pretrained.export`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from cnnlab import backend, pretrained, record
from cnnlab.registry import did_you_mean
from cnnlab.types import CnnlabError

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
DEFAULT_PLATFORMS = ("cpu", "cuda", "tpu")


@dataclasses.dataclass(frozen=True)
class Program:
    """An exported network.

    Attributes:
        exported: what `jax.export` holds.
    """

    exported: jax.export.Exported

    @property
    def name(self) -> str:
        """The model's name."""
        return str(self.exported.fun_name)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of one image."""
        height, width, channels = self.exported.in_avals[0].shape[1:]
        return height, width, channels

    @property
    def num_outputs(self) -> int:
        """The number of logits."""
        return int(self.exported.out_avals[0].shape[-1])

    @property
    def platforms(self) -> tuple[str, ...]:
        """Where it runs."""
        return tuple(self.exported.platforms)

    def __call__(self, images: jax.Array | np.ndarray) -> jax.Array:
        """Images [B, H, W, C] in [0, 1] to logits [B, num_outputs], float32.

        Raises:
            CnnlabError: it was not exported for this platform, or for images of this shape.
        """
        if images.ndim != 4 or tuple(images.shape[1:]) != self.input_shape:
            raise CnnlabError(
                f"{self.name} was exported for images [B, "
                f"{', '.join(map(str, self.input_shape))}], got {tuple(images.shape)}"
            )
        here = jax.export.default_export_platform()
        if here not in self.platforms:
            raise CnnlabError(
                f"{self.name} was exported for {', '.join(self.platforms)}; this is {here}: "
                f"export it again with --platforms {here}"
            )
        logits: jax.Array = self._compiled(jnp.asarray(images, jnp.float32))
        return logits

    @functools.cached_property
    def _compiled(self) -> Any:
        return backend.jit(self.exported.call)  # which is a new function each time it is asked for


def make(
    name: str,
    variables: Mapping[str, Any],
    *,
    size: int | tuple[int, int] | None = None,
    platforms: Sequence[str] = DEFAULT_PLATFORMS,
    **fields: Any,
) -> Program:
    """A network with its weights as a program, preprocessing included, for any batch size.

    Args:
        name: a registered model with published weights.
        variables: `{"params": ..., "batch_stats": ...}`.
        size: of the images, height and width or one number for both; the published one if None.
        platforms: some of `PLATFORMS`.
        **fields: as for `models.create`.

    Raises:
        CnnlabError: an unknown platform, or these are not the model's variables.
    """
    for platform in platforms:
        if platform not in PLATFORMS:
            raise CnnlabError(
                f"unknown platform {platform!r}{did_you_mean(platform, PLATFORMS)}. "
                f"Valid: {', '.join(PLATFORMS)}"
            )
    channels = pretrained.input_channels(name, variables, **fields)
    outputs = pretrained.num_outputs(variables)
    classify = pretrained.classifier(name, num_outputs=outputs, **fields)

    def function(images: jax.Array) -> jax.Array:
        return classify(variables, images)

    function.__name__ = name  # which the file keeps
    if size is None:
        size = pretrained.preprocessing(name).size
    height, width = (size, size) if isinstance(size, int) else size
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, height, width, channels), jnp.float32)
    return Program(jax.export.export(jax.jit(function), platforms=platforms)(images))


def save(path: str | Path, program: Program) -> None:
    """Writes a program to a file, whole or not at all."""
    record.write_atomic(Path(path), bytes(program.exported.serialize()))


def load(path: str | Path) -> Program:
    """Reads what `save` wrote; the program gives the same bits on the same platform.

    Raises:
        CnnlabError: the file can't be read, is cut off, or is no program from images to logits.
    """
    try:
        content = bytearray(Path(path).read_bytes())
    except OSError as error:
        raise CnnlabError(f"cannot read the program {path}: {error.strerror or error}") from error
    try:
        exported = jax.export.deserialize(content)
    # Whatever its parser stumbles over first: struct.error, ValueError, AssertionError, ...
    except Exception as error:
        raise CnnlabError(
            f"{path} is cut off, or is no program of `cnnlab export` ({type(error).__name__})"
        ) from error
    shapes = [len(aval.shape) for aval in (*exported.in_avals, *exported.out_avals)]
    if shapes != [4, 2]:
        raise CnnlabError(
            f"{path} is no program from images [B, H, W, C] to logits [B, K], as `cnnlab export` "
            "writes them"
        )
    return Program(exported)
