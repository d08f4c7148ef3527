"""What goes wrong around a run through nobody's program: full disks, locked folders, no memory.

Each is told as what happened, what it leaves whole, and what to do.
"""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import jax
from ml_collections import ConfigDict

from cnnlab.types import CnnlabError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No space, a quota that is used up, a limit to the size of files: freeing space cures each."""


def disk_full(error: Exception) -> int | None:
    """Which of `DISK_FULL` an error tells of, or `None`.

    Storage libraries that write with threads of their own raise whatever type they like, and the
    system's words stand in its text alone.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in DISK_FULL else None
    return next((number for number in DISK_FULL if os.strerror(number) in str(error)), None)


def require_writable(folder: Path, option: str) -> None:
    """Tries to write into a folder, or where it would be made, and leaves nothing there.

    Args:
        folder: need not exist.
        option: with which option of the command another folder is chosen.

    Raises:
        CnnlabError: no file can be made there.
    """
    there = folder.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"0")
    except OSError as error:
        raise CnnlabError(
            f"{folder}: can't write there ({error.strerror}); nothing was begun. Make it "
            f"writable, or choose another folder: {option} DIR"
        ) from None


def explain_memory(error: BaseException, config: ConfigDict) -> CnnlabError | None:
    """What to tell of an error that means that memory ran out, of the device or of the host.

    Args:
        error: as JAX (or Python) raised it.
        config: of the run that it ended.

    Returns:
        An error that says which batch size to try, and what else there is; `None` for any other
        error.
    """
    text = str(error).strip().partition("\n")[0]
    if isinstance(error, MemoryError):
        where = "the host"
    elif isinstance(error, jax.errors.JaxRuntimeError) and (
        "RESOURCE_EXHAUSTED" in text or "OUT_OF_MEMORY" in text
    ):
        where = f"the {jax.default_backend()} device"
    else:
        return None
    devices = config.parallel.devices or jax.device_count()
    smaller = {section: _half(config[section].batch_size, devices) for section in ("train", "eval")}
    advice = []
    if smaller["train"]:
        # The same updates, so that the numbers stay comparable; a smaller batch is another recipe.
        parts = 2 * config.train.accumulate
        if config.train.batch_size % (parts * devices) == 0:
            advice.append(f"train.accumulate={parts} (the same batch in smaller parts)")
        advice.append(f"train.batch_size={smaller['train']} (now {config.train.batch_size})")
    if "remat" in config.model and not config.model.remat:
        advice.append("model.remat=true (activations are computed again, not kept)")
    if smaller["eval"]:
        advice.append(
            f"if it was scoring, eval.batch_size={smaller['eval']} (now {config.eval.batch_size})"
        )
    if not advice:
        advice.append("a smaller model, or a device with more memory: the batches are minimal")
    return CnnlabError(
        f"{where} is out of memory ({text[:200] or type(error).__name__}). "
        f"Checkpoints are intact. Try {'; or '.join(advice)}"
    )


def _half(batch_size: int, devices: int) -> int:
    """About half of a batch size, a multiple of the devices; 0 where there is none."""
    return batch_size // (2 * devices) * devices
