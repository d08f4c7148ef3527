"""Named tensors from files and from the hub; nothing is ever unpickled.

Three sources: a `.safetensors` file; a repository of the hub where timm publishes, such as
`timm/resnet18.a1_in1k`, of which `model.safetensors` is fetched; and PyTorch's `.pth`, `.pt` and
`.bin`, which are pickles, only by `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from cnnlab import record
from cnnlab.types import CnnlabError

HUB_FILE = "model.safetensors"
"""The file of a repository that is read."""

TORCH_SUFFIXES = (".pth", ".pt", ".bin")

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
# Before 2.6 weights_only=True could be made to run code (CVE-2025-32434).
_SAFE_TORCH = (2, 6)
_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
}


def read(source: str | Path) -> dict[str, np.ndarray]:
    """All tensors of a file or of a repository of the hub.

    Args:
        source: a `.safetensors` file; a repository `OWNER/NAME`, or `OWNER/NAME@REVISION` for a
            commit or tag of it; or a `.pth`, `.pt` or `.bin` file of PyTorch.

    Raises:
        CnnlabError: there is no such file or repository, it can't be reached, its content is
            something else or not whole, or an optional package is missing.
    """
    path, text = Path(source), str(source)
    if path.suffix in TORCH_SUFFIXES:
        return _read_torch(path)
    if path.suffix == ".safetensors" or path.exists():
        return read_safetensors(path)
    if isinstance(source, str) and _REPOSITORY.fullmatch(text):
        return read_safetensors(download(text))
    raise CnnlabError(
        f"no file {text}; weights come from a .safetensors file, or from a repository of the hub "
        "such as timm/resnet18.a1_in1k"
    )


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file, in the dtypes that it holds.

    Raises:
        CnnlabError: the file can't be read, is no safetensors file, is not whole, or holds a dtype
            that no published network has.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CnnlabError(f"cannot read the weights {path}: {error.strerror or error}") from error
    try:
        found = safetensors.deserialize(content)
    except safetensors.SafetensorError as error:
        # The length of the header, then the header: JSON.
        if content[8:9] == b"{":
            problem = f"is cut off or damaged ({error}); fetch or write it again"
        else:
            problem = "is no safetensors file"
            if len(content) < 1024:
                problem += f", and only {len(content)} bytes long: fetch it again"
        raise CnnlabError(f"{path} {problem}") from error
    tensors = {}
    for name, tensor in found:
        if tensor["dtype"] not in _DTYPES:
            raise CnnlabError(
                f"{path}: {name} has dtype {tensor['dtype']}; expected one of {', '.join(_DTYPES)}"
            )
        array = np.frombuffer(tensor["data"], _DTYPES[tensor["dtype"]])
        tensors[name] = array.reshape(tensor["shape"])
    return tensors


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes tensors to a safetensors file, whole or not at all.

    Args:
        path: of the file; folders are made.
        tensors: arrays by name.
    """
    arrays = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    # Readers of PyTorch's side ask for the format.
    record.write_atomic(path, safetensors.numpy.save(arrays, metadata={"format": "pt"}))


def download(repository: str) -> Path:
    """Fetches a repository's `model.safetensors`, once: it is kept in the hub client's cache.

    An interrupted download goes on where it was. `HF_HOME` moves the cache, `HF_HUB_OFFLINE=1`
    keeps the client from the network.

    Args:
        repository: `OWNER/NAME` or `OWNER/NAME@REVISION`.

    Returns:
        The file in the cache.

    Raises:
        CnnlabError: the client is not installed, the hub can't be reached, or it has no such
            repository, revision or file.
    """
    try:
        import huggingface_hub as hub
        from huggingface_hub import errors
    except ImportError as error:
        raise CnnlabError(
            f"{repository}: weights from the hub need its client: pip install 'cnnlab[hub]'; or "
            "give a .safetensors file"
        ) from error
    name, _, revision = repository.partition("@")
    try:
        return Path(hub.hf_hub_download(name, HUB_FILE, revision=revision or None))
    except errors.LocalEntryNotFoundError as error:  # neither in the cache nor to be had
        if hub.constants.HF_HUB_OFFLINE:
            why = "HF_HUB_OFFLINE is set and it is not in the cache: fetch it once without"
        else:
            why = "the hub can't be reached and it is not in the cache: try again with a network"
        raise CnnlabError(f"{repository}: {why}, or give a .safetensors file") from error
    except errors.RevisionNotFoundError as error:
        raise CnnlabError(f"the repository {name} has no revision {revision!r}") from error
    except errors.EntryNotFoundError as error:
        raise CnnlabError(f"the repository {repository} has no file {HUB_FILE}") from error
    except errors.RepositoryNotFoundError as error:
        raise CnnlabError(
            f"the hub has no repository {name}, or shows it only to those who log in"
        ) from error
    # The client's transport has exceptions of its own, others in each of its versions.
    except Exception as error:
        raise CnnlabError(
            f"{repository}: the download failed ({type(error).__name__}: {error}); the same "
            "command goes on where it was"
        ) from error


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise CnnlabError(
            f"{path}: a {path.suffix} file needs PyTorch: pip install 'cnnlab[torch]'; a "
            ".safetensors file of the same weights needs nothing"
        ) from error
    version = str(torch.__version__)
    if tuple(int(part) for part in version.split(".")[:2]) < _SAFE_TORCH:
        raise CnnlabError(
            f"{path}: PyTorch {version} can be made to run what such a file says; expected 2.6 or "
            "newer: pip install -U 'cnnlab[torch]'"
        )
    if not path.is_file():
        raise CnnlabError(f"cannot read the weights {path}: there is no such file")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    # A pickle that wants more than tensors, or a file that is cut off: each has its exception.
    except Exception as error:
        raise CnnlabError(
            f"{path} is not whole, or holds more than tensors, which is never unpickled; give a "
            f".safetensors file of the weights ({type(error).__name__})"
        ) from error
    for key in ("state_dict", "model"):  # as training scripts wrap it
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(t, torch.Tensor) for t in found.values()):
        raise CnnlabError(f"{path} holds no state dict: expected tensors by name")
    return {
        str(name): (tensor.float() if tensor.is_floating_point() else tensor).numpy()
        for name, tensor in found.items()
    }
