"""Deterministic weights and images for parity checks: numpy alone, the same on every machine.

A tensor depends on its name and its shape, nothing else, so that a reference model and a port
can be filled alike without shipping any file of weights.
"""

import zlib

import numpy as np


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 tensor of PyTorch's state-dict entry `name`, in its layout: OIHW, [out, in]."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("running_var"):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    noise = rng.standard_normal(shape)
    if len(shape) >= 2:  # convolution or linear kernel: He scaling keeps activations of order one
        return (noise * np.sqrt(2.0 / np.prod(shape[1:]))).astype(np.float32)
    if name.endswith(("weight", "gamma")):  # a norm's scale, or a layer scale
        return (1.0 + 0.1 * noise).astype(np.float32)
    return (0.1 * noise).astype(np.float32)


def images(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Float32 images in [0, 1], NHWC, smooth enough to resemble photographs."""
    rng = np.random.default_rng(seed)
    n, h, w, c = shape
    coarse = rng.uniform(0.0, 1.0, (n, 8, 8, c))
    rows, cols = np.linspace(0, 7, h), np.linspace(0, 7, w)
    r0, c0 = np.minimum(rows.astype(int), 6), np.minimum(cols.astype(int), 6)
    fr, fc = (rows - r0)[None, :, None, None], (cols - c0)[None, None, :, None]
    top = coarse[:, r0][:, :, c0] * (1 - fc) + coarse[:, r0][:, :, c0 + 1] * fc
    low = coarse[:, r0 + 1][:, :, c0] * (1 - fc) + coarse[:, r0 + 1][:, :, c0 + 1] * fc
    return (top * (1 - fr) + low * fr).astype(np.float32)
