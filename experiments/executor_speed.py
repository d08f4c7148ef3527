"""How several seeds are trained fastest: one after another, vmapped, in a loop, or unrolled.

    cnnlab table experiments/executor_speed.py

About fifteen minutes on two CPU cores, most of it ResNet-20 and compilation; `--rows 'LeNet*'`
takes two. Each contender makes one update of every seed at batch 128, by the very function that
`cnnlab table --together N --strategy NAME` runs; the ratio is that of one after another to each
other strategy. `devices` needs several devices and is left out.
"""

from __future__ import annotations

import functools
from typing import Any

from cnnlab import backend
from cnnlab.sweep import Benchmark, Contender, Workload

Case = dict[str, Any]

NETWORKS = {"LeNet-5": "lenet5_fashion_mini", "ResNet-20": "resnet20_fashion_mnist"}
SEEDS = (1, 2, 4, 8)


def updates(case: Case, *, strategy: str) -> Workload | None:
    import importlib

    import jax
    import jax.numpy as jnp
    import numpy as np

    from cnnlab import config as config_lib
    from cnnlab.training import optim, run, strategies
    from cnnlab.training import step as step_lib

    seeds = case["seeds"]
    if seeds == 1 and strategy != strategies.SEQUENTIAL:
        return None
    config = importlib.import_module(f"configs.{case['config']}").get_config()
    chosen = {"data.name": "fashion_mini", "train.batch_size": 128}
    config = config_lib.override(config, chosen, "executor_speed")
    config = config_lib.resolve(config, "executor_speed")
    split = run.load_split(config, "train")
    program = step_lib.make_program(config, split.info)
    hyper = optim.hyper(config, examples=len(split))
    states = [program.init(seed, hyper) for seed in range(seeds)]
    indices = [np.arange(128, dtype=np.int32) + 128 * seed for seed in range(seeds)]
    if strategy == strategies.SEQUENTIAL:

        def once() -> None:
            for seed in range(seeds):
                states[seed], packed = program.train_step(
                    states[seed], split.fed(indices[seed]), jnp.int32(seed), hyper
                )
                jax.block_until_ready(packed)

    else:
        ways = program.together(strategy, seeds)
        fed = ways.spread(split.fed(np.stack(indices)))
        state = ways.place(program.stack(states))
        hypers = ways.place(jax.tree.map(lambda x: jnp.stack([x] * seeds), hyper))
        numbers = ways.place(jnp.arange(seeds, dtype=jnp.int32))

        def once() -> None:
            nonlocal state
            state, packed = ways.step(state, fed, numbers, hypers)
            jax.block_until_ready(packed)

    device = jax.devices()[0]
    kind = "cpu" if device.platform == "cpu" else device.device_kind
    return Workload(
        once,
        lambda _: [],  # that they agree is a test
        kind,
        backend.compiler_options(),
        items=128 * seeds,
    )


def get_experiment() -> Benchmark:
    """One update of 1, 2, 4 and 8 seeds by each strategy."""
    shared = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | backend.environment()
    return Benchmark(
        cases={
            f"{name}, {seeds} seed{'s' * (seeds > 1)}": {"config": config, "seeds": seeds}
            for name, config in NETWORKS.items()
            for seeds in SEEDS
        },
        contenders={
            name: Contender(
                functools.partial(updates, strategy=name), ("jax", "flax"), shared, keep_heap=True
            )
            for name in ("sequential", "vmap", "map", "unrolled")
        },
        columns=("ms", "ratio", "items"),
        build_together=True,
    )
