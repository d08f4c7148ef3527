"""The thousand classes of ImageNet-1k, in the order of the logits of all published networks.

A class is a synset of WordNet 3.0 and named by its first word; two that share theirs have one more.
"""

from __future__ import annotations

import functools

from cnnlab.data import _embedded
from cnnlab.types import CnnlabError

CLASSES = 1000


@functools.cache
def class_names() -> tuple[str, ...]:
    """The names of the classes, all different.

    Raises:
        CnnlabError: the file that ships with the package is missing or damaged.
    """
    path = _embedded.FOLDER / "imagenet_classes.txt"
    names = tuple(path.read_text(encoding="utf-8").splitlines()) if path.exists() else ()
    if len(names) != CLASSES or len(set(names)) != CLASSES or "" in names:
        raise CnnlabError(
            f"the embedded file {path} is damaged: expected {CLASSES} different names, one a line, "
            f"got {len(names)}. Reinstall cnnlab (pip install --force-reinstall cnnlab, or git "
            "checkout the file)"
        )
    return names
