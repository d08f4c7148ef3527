"""AutoAttack: an ensemble of attacks without parameters to choose.

Croce & Hein 2020, "Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks", section 5; for L1 Croce & Hein 2021, "Mind the box: l1-APGD for sparse
adversarial attacks on image classifiers", section 5. An example is robust if no part fools the
model on it, and each part sees only what the parts before it left standing.

`perturb` is one pure function of all examples. `run` finds the same on the host's lead: it drops
examples as they fall, so that what is left is attacked in ever smaller batches.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cnnlab import backend
from cnnlab.attacks import LogitsFn, _balls, _losses, _search, apgd, fab, square
from cnnlab.registry import Range, did_you_mean
from cnnlab.types import CnnlabError, PyTree

VARIANTS: dict[str, dict] = {
    "autoattack": {"version": "standard"},
    "autoattack_plus": {"version": "plus"},
    "autoattack_rand": {"version": "rand"},
}


class Part(NamedTuple):
    """One attack of the ensemble.

    Attributes:
        name: in the registry.
        settings: other than the attack's defaults.
    """

    name: str
    settings: tuple[tuple[str, Any], ...] = ()


def _part(name: str, **settings: Any) -> Part:
    return Part(name, tuple(settings.items()))


_STANDARD = (_part("apgd_ce"), _part("apgd_t"), _part("fab_t"), _part("square"))
_STANDARD_L1 = (
    _part("apgd_ce", restarts=5, shrinking=True),
    _part("apgd_t", targets=5, shrinking=True),
    _part("fab_t"),
    _part("square"),
)
_PLUS = (
    _part("apgd_ce", restarts=5),
    _part("apgd_dlr", restarts=5),
    _part("fab", restarts=5),
    _part("square"),
    _part("apgd_t"),
    _part("fab_t"),
)
_RAND = (_part("apgd_ce", draws=20), _part("apgd_dlr", draws=20))

VERSIONS = {"standard": _STANDARD, "plus": _PLUS, "rand": _RAND}

SMALLEST = 16
"""Batches are not made smaller than this: a program for each size takes seconds to compile."""

_BLOCKS = 50
"""A round is looked at that many times to drop what has fallen, but not within `_BLOCK` steps."""

_BLOCK = 5


def parts(version: str, norm: str) -> tuple[Part, ...]:
    """The attacks of a version, in order.

    Args:
        version: `"standard"`; `"plus"`, with more restarts and the untargeted attacks too; or
            `"rand"`, for randomised models.
        norm: `"linf"`, `"l2"` or `"l1"`.

    Raises:
        CnnlabError: unknown version or norm.
    """
    if version not in VERSIONS:
        raise CnnlabError(
            f"version: expected one of {', '.join(VERSIONS)}, got {version!r}"
            f"{did_you_mean(version, VERSIONS)}"
        )
    _balls.check_norm(norm)
    return _STANDARD_L1 if (version, norm) == ("standard", "l1") else VERSIONS[version]


def perturb(
    key: jax.Array,
    logits_fn: LogitsFn,
    images: jax.Array,
    labels: jax.Array,
    *,
    eps: Annotated[float | jax.Array, Range(0)],
    norm: str = "linf",
    version: str = "standard",
) -> jax.Array:
    """Misclassified images in the ball, where any part of the ensemble finds one.

    All parts attack all examples, which is what one compiled function can do; `run` is faster.

    Args:
        key: one key, or one an example, [B].
        logits_fn: pixels [B, H, W, C] in [0, 1] to logits [B, K]; for version `"rand"` a function
            of pixels and a key.
        images: [B, H, W, C] in [0, 1].
        labels: [B] int32.
        eps: the ball's radius; may be traced.
        norm: `"linf"`, `"l2"` or `"l1"`.
        version: as in `parts`.

    Returns:
        [B, H, W, C] float32; the images themselves where the model is wrong already, and what the
        first part found where no part succeeds.

    Raises:
        CnnlabError: unknown norm or version, or too few classes.
    """
    keys = _balls.example_keys(key, len(images))
    found, standing = images, jnp.ones(len(images), bool)
    for index, part in enumerate(parts(version, norm)):
        judge, search = _search_of(part, logits_fn, images, eps, norm, keys)
        new, score = _search.best(search, _part_keys(keys, part), judge, images, labels)
        fallen = score == _search.FALLEN
        taken = standing & (fallen | (index == 0))
        found = jnp.where(_balls.per_example(taken), new, found)
        standing &= ~fallen
    return found


def _part_keys(keys: jax.Array, part: Part) -> jax.Array:
    return _search.round_keys(keys, zlib.crc32(part.name.encode()) & 0x7FFFFFFF)


def _search_of(
    part: Part,
    logits_fn: Any,
    images: jax.Array,
    eps: float | jax.Array,
    norm: str,
    keys: jax.Array,
) -> tuple[LogitsFn, _search.Search]:
    """The model's verdict and the part's search."""
    settings = dict(part.settings) | {"eps": eps, "norm": norm}
    if part.name == "square":
        return logits_fn, square.search(logits_fn, **settings)
    if part.name in fab.VARIANTS:
        settings |= fab.VARIANTS[part.name]
        classes = _search.classes(logits_fn, images)
        return logits_fn, fab.search(logits_fn, classes=classes, **settings)
    settings |= apgd.VARIANTS[part.name]
    model = _search.model(logits_fn, settings.get("draws", 1))

    def judge(images: jax.Array) -> jax.Array:
        return model(images, keys[0])

    return judge, apgd.search(model, classes=_search.classes(judge, images), **settings)


# --- on the host's lead -------------------------------------------------------------------------


class Result(NamedTuple):
    """What `run` gives back.

    Attributes:
        images: [N, H, W, C] float32, adversarial where not `robust`.
        correct: [N] bool, the model's verdict on the clean images.
        robust: [N] bool, still right after all parts.
        after: part -> [N] bool, still right after it and those before.
        seconds: part -> of wall clock, compilation included.
    """

    images: np.ndarray
    correct: np.ndarray
    robust: np.ndarray
    after: dict[str, np.ndarray]
    seconds: dict[str, float]


def run(
    key: jax.Array,
    logits_fn: Callable[[PyTree, jax.Array], jax.Array],
    variables: PyTree,
    images: np.ndarray | jax.Array,
    labels: np.ndarray | jax.Array,
    *,
    eps: float,
    norm: str = "linf",
    version: str = "standard",
    only: tuple[str, ...] = (),
    chunk: int = 512,
    workers: int = 0,
    sharding: jax.sharding.Sharding | None = None,
) -> Result:
    """The same as `perturb`, on the examples still standing only, in chunks.

    On CPU several chunks are attacked at a time, as XLA runs most of a loop's body on one core. An
    example's result depends on none of this, unless the model is random.

    Programs are compiled once for each function `logits_fn`, part and batch size, so models of one
    architecture share them.

    Args:
        key: one key, or one an example, [N].
        logits_fn: (variables, pixels [B, H, W, C] in [0, 1]) to logits [B, K], evaluation mode;
            for version `"rand"` it takes a key as well.
        variables: the model's.
        images: [N, H, W, C] in [0, 1].
        labels: [N] int32.
        eps: the ball's radius.
        norm: `"linf"`, `"l2"` or `"l1"`.
        version: as in `parts`.
        only: the parts to run, by name; all if empty.
        chunk: the most examples in a batch. Smaller batches are its halves, quarters, ...
        workers: batches at a time; 0 for one a core on CPU, one elsewhere.
        sharding: of a batch over a mesh, whose device count divides `SMALLEST` or `chunk`.

    Returns:
        What fell to which part.

    Raises:
        CnnlabError: unknown norm, version or part, or too few classes.
    """
    chosen = parts(version, norm)
    if unknown := sorted(set(only) - {part.name for part in chosen}):
        raise CnnlabError(
            f"only: expected parts of version {version!r} "
            f"({', '.join(part.name for part in chosen)}), got {', '.join(unknown)}"
        )
    if not workers:
        alone = sharding is not None or jax.default_backend() != "cpu"
        workers = 1 if alone else os.cpu_count() or 1
    images = np.asarray(images, np.float32)
    labels = np.asarray(labels, np.int32)
    keys = _balls.example_keys(key, len(images))
    found = images.copy()
    after, seconds = {}, {}

    def send(rows: np.ndarray) -> tuple[jax.Array, ...]:
        arrays = (keys[rows], images[rows], labels[rows])
        return jax.tree.map(lambda a: jax.device_put(a, sharding), arrays)

    standing = np.zeros(len(images), bool)
    for rows in _chunks(np.arange(len(images)), chunk):
        padded = _padded(rows, chunk)
        own, pixels, classes = send(padded)
        right = _clean_verdict(logits_fn, version == "rand")(variables, own, pixels, classes)
        standing[rows] = np.asarray(right)[: len(rows)]
    correct = standing.copy()

    for index, part in enumerate(chosen):
        if only and part.name not in only:
            continue
        started = time.perf_counter()
        model = functools.partial(logits_fn, variables)
        _, search = _search_of(part, model, jnp.asarray(images[:1]), eps, norm, keys[:1])
        attack = functools.partial(
            _attack, _programs(logits_fn, part, norm), variables, eps, search.steps, send, chunk
        )
        # Where no part succeeds, the first part's highest loss is handed back.
        best = np.full(len(images), -np.inf if index == 0 else _search.HIGHEST, np.float32)
        for number in range(search.rounds):
            rows = np.flatnonzero(standing)
            each = min(chunk, max(-(-len(rows) // workers), SMALLEST))
            with ThreadPoolExecutor(workers) as pool:
                rounds = pool.map(functools.partial(attack, number), _chunks(rows, each))
                for done, new, score in itertools.chain.from_iterable(rounds):
                    taken = score > best[done]
                    found[done[taken]] = new[taken]
                    best[done] = np.maximum(score, best[done])
                    standing[done[score == _search.FALLEN]] = False
        after[part.name] = standing.copy()
        seconds[part.name] = time.perf_counter() - started
    return Result(found, correct, standing, after, seconds)


def _attack(
    programs: _Programs,
    variables: PyTree,
    eps: float,
    steps: int,
    send: Callable[[np.ndarray], tuple[jax.Array, ...]],
    chunk: int,
    number: int,
    rows: np.ndarray,
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """One round on these rows: (rows, images, scores) as examples fall, then of the rest."""
    found = []
    sent = send(_padded(rows, chunk))
    with programs.first_of(len(sent[-1])):
        state = programs.start(variables, eps, *sent, number)
        programs.outcome(variables, eps, programs.block(variables, eps, state, 0, 0))
    block = max(steps // _BLOCKS, _BLOCK)
    for low in range(0, steps, block):
        state = programs.block(variables, eps, state, low, min(low + block, steps))
        images, scores = programs.outcome(variables, eps, state)
        score = np.asarray(scores)[: len(rows)]
        last = low + block >= steps
        kept = np.flatnonzero((score < _search.FALLEN) & (not last))
        if last or _size(len(kept), chunk) < len(scores):
            out = np.setdiff1d(np.arange(len(rows)), kept)
            found.append((rows[out], np.asarray(images)[out], score[out]))
            if not len(kept):
                break
            chosen = _padded(kept, chunk)
            rows = rows[kept]
            with programs.first_of(len(chosen)):
                state = programs.take(state, chosen)
                programs.outcome(variables, eps, programs.block(variables, eps, state, 0, 0))
    return found


@dataclasses.dataclass(frozen=True)
class _Programs:
    """The compiled steps of a part; `take` drops examples."""

    start: Callable[..., Any]
    block: Callable[..., Any]
    outcome: Callable[..., tuple[jax.Array, jax.Array]]
    take: Callable[..., Any]
    sizes: set[int] = dataclasses.field(default_factory=set)
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    @contextlib.contextmanager
    def first_of(self, size: int) -> Iterator[None]:
        """Lets one thread compile for a batch size, while the others wait for it."""
        if size in self.sizes:
            yield
            return
        with self.lock:
            yield
            self.sizes.add(size)


@functools.lru_cache(maxsize=64)
def _programs(logits_fn: Callable[..., jax.Array], part: Part, norm: str) -> _Programs:
    def searching(
        variables: PyTree, eps: jax.Array, images: jax.Array, keys: jax.Array
    ) -> _search.Search:
        model = functools.partial(logits_fn, variables)
        return _search_of(part, model, images, eps, norm, keys)[1]

    def start(
        variables: PyTree,
        eps: jax.Array,
        keys: jax.Array,
        images: jax.Array,
        labels: jax.Array,
        number: jax.Array,
    ) -> Any:
        own = _search.round_keys(_part_keys(keys, part), number)
        return searching(variables, eps, images, keys).start(own, images, labels, number)

    def block(
        variables: PyTree, eps: jax.Array, state: Any, low: jax.Array, high: jax.Array
    ) -> Any:
        step = searching(variables, eps, state.clean, state.keys).step
        return lax.fori_loop(low, high, lambda i, s: step(s, i), state)

    def outcome(variables: PyTree, eps: jax.Array, state: Any) -> tuple[jax.Array, jax.Array]:
        return searching(variables, eps, state.clean, state.keys).outcome(state)

    def take(state: Any, rows: jax.Array) -> Any:
        return jax.tree.map(lambda each: each[rows], state)

    return _Programs(*(backend.jit(each, often=True) for each in (start, block, outcome, take)))


@functools.lru_cache(maxsize=64)
def _clean_verdict(logits_fn: Callable[..., jax.Array], random: bool) -> Callable[..., jax.Array]:
    def right(
        variables: PyTree, keys: jax.Array, images: jax.Array, labels: jax.Array
    ) -> jax.Array:
        drawn = (keys[0],) if random else ()
        return ~_losses.wrong(logits_fn(variables, images, *drawn), labels)

    verdict: Callable[..., jax.Array] = backend.jit(right)
    return verdict


def _chunks(rows: np.ndarray, chunk: int) -> list[np.ndarray]:
    return [rows[i : i + chunk] for i in range(0, len(rows), chunk)]


def _size(count: int, chunk: int) -> int:
    """The batch size for this many examples: `chunk`, or the smallest half, quarter, ... of it."""
    size = chunk
    while size % 2 == 0 and size // 2 >= max(count, SMALLEST):
        size //= 2
    return size


def _padded(rows: np.ndarray, chunk: int) -> np.ndarray:
    """The rows, and the first again and again, up to a batch size."""
    return np.concatenate([rows, np.repeat(rows[:1], _size(len(rows), chunk) - len(rows))])
