"""The command line; `cnnlab --help` names the commands.

Nothing heavy is imported until a command runs, so `--help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

LISTS = ("models", "data", "augment", "attacks", "tasks", "configs", "experiments", "runs")

STRATEGIES = ("auto", "sequential", "vmap", "map", "unrolled", "devices")
"""Those of `cnnlab.training.strategies`, which imports JAX; a test compares them."""

ENVIRONMENT = {
    "data_dir": "CNNLAB_DATA",
    "resident": "CNNLAB_RESIDENT",
    "workers": "CNNLAB_WORKERS",
}
"""Options that change no result, and the variables that say the same."""

USER_ERROR = 2
DOUBTFUL = 3
STOPPING = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM

CODES = """exit codes:
  0    done
  1    an error that should not happen (--traceback shows where)
  2    a mistake or a fault that the message explains
  3    attack found a reason not to believe an accuracy
  130  interrupted by SIGINT (Ctrl-C), 143 by SIGTERM: training runs are checkpointed first, and
       the same command goes on; a second signal leaves at once, which loses no more than the
       steps since the last checkpoint"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code.

    See `CODES`; an unexpected error is raised, with its traceback, if `--traceback` is given.
    """
    warnings.showwarning = _show_warning
    parser = _parser()
    options, rest = parser.parse_known_args(
        _joined(sys.argv[1:] if arguments is None else arguments)
    )
    options.stop = _Stop()
    try:
        for option, variable in ENVIRONMENT.items():
            if getattr(options, option, None) not in (None, ""):
                os.environ[variable] = str(getattr(options, option))
        changes = _changes(rest, options)
        if not hasattr(options, "command"):
            parser.print_help()
            return USER_ERROR
        with options.stop:
            return int(options.command(options, changes))
    except KeyboardInterrupt:
        return _complain(
            "interrupted; the same command goes on where it was",
            options.stop.code,
        )
    except BrokenPipeError:  # the reader of our output has gone, as in `cnnlab list models | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if getattr(options, "traceback", False):
            raise
        return _explain(error)


def _joined(words: Sequence[str]) -> list[str]:
    """Writes `--config.a.b c` as `--config.a.b=c`: argparse would take `c` for a positional."""
    joined: list[str] = []
    for word in words:
        last = joined[-1] if joined else ""
        setting = last.startswith(("--config.", "--model.", "--data.")) and "=" not in last
        if setting and not word.startswith("--"):
            joined[-1] = f"{last}={word}"
        else:
            joined.append(word)
    return joined


def _explain(error: Exception) -> int:
    from cnnlab.types import CnnlabError

    if isinstance(error, CnnlabError):
        return _complain(str(error), USER_ERROR)
    from cnnlab import faults

    if (full := faults.disk_full(error)) is not None:
        # One that a thread of a library met in its own words has no file name.
        file = getattr(error, "filename", None) or "a file"
        return _complain(
            f"no disk space left to write {file} ({os.strerror(full)}); all finished runs and "
            "checkpoints are intact: free some space and give the same command again",
            USER_ERROR,
        )
    if isinstance(error, OSError) and error.errno is not None:
        return _complain(f"{error.filename or 'file'}: {error.strerror}", USER_ERROR)
    return _complain(
        f"unexpected {type(error).__name__}: {error}\n(--traceback shows where; please report it)",
        1,
    )


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning of ours is a sentence for the user; others say where they come from."""
    if category.__name__ == "CnnlabWarning":  # by its name: its module imports JAX
        print(f"cnnlab: {message}", file=sys.stderr)
    else:
        told = warnings.formatwarning(message, category, filename, lineno, line)
        print(told, end="", file=file or sys.stderr)


def _complain(message: str, code: int) -> int:
    print(f"cnnlab: {message}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    # Options that every command takes, before or after its own.
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--traceback", action="store_true", help="show where an error came from")
    common.add_argument(
        "--data-dir", metavar="DIR", help="where data sets lie (or set CNNLAB_DATA)"
    )
    common.add_argument(
        "--runs", metavar="DIR", default=Path("runs"), type=Path, help="runs' folders"
    )
    common.add_argument(
        "--resident",
        type=float,
        metavar="GIB",
        help="data sets of more images than this are read while training; default 1",
    )
    common.add_argument(
        "--workers", type=int, metavar="N", help="processes that read them; default 0: threads"
    )

    parser = argparse.ArgumentParser(
        prog="cnnlab",
        epilog=CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="From one experiment file to a paper-style table.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def add(name: str, command: Callable[..., int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=text, description=text, parents=[common], allow_abbrev=False
        )
        sub.set_defaults(command=command)
        return sub

    table = add("table", _table, "train what is missing of an experiment and write its table")
    table.add_argument("file", type=Path, help="a file of experiments/")
    table.add_argument(
        "--rows",
        nargs="+",
        default=[],
        metavar="ROW",
        help="only these rows (of a benchmark also patterns, as in 'depthwise*')",
    )
    table.add_argument("--seeds", nargs="+", default=[], metavar="SEED", help="only these seeds")
    table.add_argument("--results", type=Path, default=Path("results"), metavar="DIR")
    table.add_argument("--dry-run", action="store_true", help="say what would run, and how long")
    table.add_argument(
        "--render", action="store_true", help="train nothing: rebuild the table from --results"
    )
    table.add_argument(
        "--without", nargs="+", default=[], metavar="NAME", help="leave out a benchmark's contender"
    )
    table.add_argument(
        "--together",
        type=int,
        default=1,
        metavar="N",
        help="train up to N runs of one program at once (0: all), which suits an accelerator; "
        "scores equal those of single runs up to rounding",
    )
    table.add_argument(
        "--strategy",
        choices=STRATEGIES,
        default="auto",
        help="how --together trains them; auto, the default, measures and records what is fastest; "
        "name one to repeat a table to the bit",
    )

    _add_sweep(add("sweep", _sweep, "the same by several workers, here or on a cluster"))

    train = add("train", _train, "train one run of a config file")
    train.add_argument("--config", type=Path, required=True, metavar="FILE[:ARG]")
    for command in (table, train):
        _add_trackers(command)
        _add_processes(command)
    train.add_argument("--folder", type=Path, metavar="DIR", help="instead of one under --runs")
    train.epilog = "Any setting: --config.SECTION.KEY=VALUE, as in --config.optim.learning_rate=0.3"

    show = add("show", _show, "draw what training sees: images before and after their transforms")
    show.add_argument("--config", type=Path, required=True, metavar="FILE[:ARG]")
    show.add_argument("--output", type=Path, default=Path("show.png"), metavar="FILE")
    show.add_argument("--images", type=int, default=8, metavar="N", help="rows; default 8")
    show.add_argument("--epochs", type=int, default=6, metavar="N", help="columns; default 6")
    show.epilog = train.epilog

    evaluate = add("eval", _eval, "score a trained run again")
    evaluate.add_argument("run", type=Path, help="a run's folder, or its name under --runs")
    evaluate.add_argument("--split", choices=("test", "train", "validation"), default="test")
    evaluate.add_argument("--json", action="store_true", help="all scores as JSON")

    attack = add("attack", _attack, "the accuracy of a trained run under an attack")
    attack.add_argument("run", type=Path, help="a run's folder, or its name under --runs")
    attack.add_argument("--attack", required=True, metavar="NAME", help="`cnnlab list attacks`")
    attack.add_argument(
        "--eps",
        nargs="+",
        required=True,
        help="radius: 0.1, 8/255 or 8px (of 255); several make a curve",
    )
    attack.add_argument("--norm", default="linf", help="linf (default), l2 or l1")
    attack.add_argument("--steps", type=int, help="default: the attack's own")
    attack.add_argument(
        "--examples", type=int, default=1000, help="of the test split; default 1000"
    )
    attack.add_argument(
        "--source",
        type=Path,
        metavar="RUN",
        help="make the attack for this run beside it, and see what RUN makes of it (transfer)",
    )
    attack.add_argument(
        "--checklist",
        action="store_true",
        help="also attack some examples in other ways, to see whether the accuracy can be believed",
    )
    attack.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="NAME",
        help="accept what a check finds, which else ends the command with code 3; repeatable",
    )
    attack.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw accuracy against eps (.png, .svg or .pdf)"
    )
    attack.add_argument(
        "--gallery",
        type=Path,
        metavar="FILE",
        help="draw examples, their perturbations and predictions (.png, .svg or .pdf)",
    )
    attack.add_argument("--json", action="store_true")

    certify = add("certify", _certify, "the certified accuracy of a run, by randomised smoothing")
    certify.add_argument("run", type=Path, help="a run's folder, or its name under --runs")
    certify.add_argument(
        "--sigma", type=float, required=True, help="standard deviation of the noise on [0, 1]"
    )
    certify.add_argument(
        "--samples", type=int, default=1000, metavar="N", help="draws an example; default 1000"
    )
    certify.add_argument(
        "--select", type=int, default=100, metavar="N", help="more, to choose the class; 100"
    )
    certify.add_argument(
        "--alpha", type=float, default=0.001, help="probability of an error; default 0.001"
    )
    certify.add_argument(
        "--examples", type=int, default=500, metavar="N", help="of the test split; default 500"
    )
    certify.add_argument(
        "--radii", type=float, nargs="+", metavar="R", help="default 0, sigma/2, sigma, ..."
    )
    certify.add_argument(
        "--batch-size", type=int, metavar="N", help="noisy images at once; default eval.batch_size"
    )
    certify.add_argument("--plot", type=Path, metavar="FILE", help="draw accuracy against radius")
    certify.add_argument("--json", action="store_true")

    lists = add("list", _list, "list what there is")
    lists.add_argument("what", choices=LISTS)
    lists.add_argument(
        "--published", action="store_true", help="only models that published weights fit"
    )

    describe = add(
        "describe", _describe, "layers, output sizes, receptive fields and costs of a model"
    )
    describe.add_argument("model")
    describe.add_argument(
        "--input",
        metavar="HxWxC",
        help="default 224x224x3 for networks with published weights, otherwise 32x32x3",
    )
    describe.add_argument("--classes", type=int, help="default 1000 and 10 likewise")
    describe.add_argument("--json", action="store_true", help="all of it as JSON")
    describe.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw feature-map sizes and receptive fields, theoretical and effective "
        "(.png, .svg or .pdf)",
    )
    describe.epilog = "Fields of the model: --model.FIELD=VALUE, as in --model.width=8"

    predict = add("predict", _predict, "the likeliest classes of photographs")
    predict.add_argument("images", nargs="+", metavar="IMAGE")
    which = predict.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", metavar="NAME", help="`cnnlab list models --published`")
    which.add_argument("--exported", metavar="FILE", help="what `cnnlab export` wrote")
    predict.add_argument("--top", type=int, default=5, metavar="N", help="default 5")
    predict.add_argument(
        "--crop",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="of the shorter side that the central square covers; default 1",
    )
    predict.add_argument(
        "--classes", metavar="FILE", help="names of the classes, one a line; default ImageNet's"
    )
    predict.add_argument("--json", action="store_true")

    doctor = add("doctor", _doctor, "what this machine has, how fast it is, and what is missing")
    doctor.add_argument("--json", action="store_true", help="all of it as JSON")
    doctor.epilog = "Exit code 0: cnnlab can run here; 1: something that it names keeps it from it."

    about = "look image files through, or pack them into shards"
    data = commands.add_parser("data", help=about, description=about, allow_abbrev=False)
    actions = data.add_subparsers(title="actions", metavar="ACTION", required=True)
    for name, action, text in (
        ("scan", _data_scan, "classes, sizes and damaged files of a folder or archive of images"),
        ("pack", _data_pack, "write such images as shards, for the data set array_record"),
    ):
        sub = actions.add_parser(
            name, help=text, description=text, parents=[common], allow_abbrev=False
        )
        sub.set_defaults(command=action)
        sub.add_argument("folder", type=Path, help="with train/CLASS/ or CLASS/ in it, or a zip")
        sub.epilog = "Fields of image_folder: --data.FIELD=VALUE, as in --data.labels=train.csv"
    sub.add_argument("output", type=Path, help="the folder to make")
    sub.add_argument(
        "--size", type=int, default=0, metavar="N", help="resize now; default: keep the files"
    )
    sub.add_argument(
        "--shard-size", type=float, default=256, metavar="MB", help="of a file; default 256"
    )
    kept = sub.add_mutually_exclusive_group()
    kept.add_argument("--raw", action="store_true", help="with --size: keep pixels, quick to read")
    kept.add_argument(
        "--jpeg-quality", type=int, default=0, metavar="Q", help="with --size: keep JPEGs; 1 to 100"
    )

    export = add("export", _export, "write a model with its weights as one file of jax.export")
    export.add_argument("--model", required=True, metavar="NAME")
    export.add_argument("--output", required=True, type=Path, metavar="FILE")
    export.add_argument(
        "--platforms", nargs="+", default=["cpu", "cuda", "tpu"], metavar="PLATFORM"
    )
    for command in (predict, export):
        command.add_argument(
            "--weights",
            metavar="FILE|OWNER/NAME",
            help="a .safetensors file or a repository of the hub; default: timm's repository",
        )
        command.add_argument("--size", type=int, help="of images in pixels; default: as published")
        command.epilog = "Fields of the model: --model.FIELD=VALUE, as in --model.dtype=bfloat16"
    return parser


def _add_processes(command: argparse.ArgumentParser) -> None:
    several = command.add_argument_group(
        "several machines", "the same command on each, with a folder of runs that all of them see"
    )
    several.add_argument(
        "--distributed",
        action="store_true",
        help="find the others: on a TPU slice, under Slurm or Open MPI",
    )
    several.add_argument("--coordinator", metavar="HOST:PORT", help="or: where process 0 listens")
    several.add_argument("--num-processes", type=int, metavar="N", help="how many there are")
    several.add_argument("--process-id", type=int, metavar="I", help="which this is, from 0")


def _add_trackers(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--tracker",
        action="append",
        default=[],
        metavar="NAME[:PROJECT]",
        help="also log to wandb or mlflow, which may fail without harm; repeatable",
    )
    command.add_argument("--wandb", metavar="PROJECT", help="short for --tracker wandb:PROJECT")


def _add_sweep(sweep: argparse.ArgumentParser) -> None:
    _add_trackers(sweep)
    sweep.add_argument("file", type=Path, help="a file of experiments/")
    sweep.add_argument("--rows", nargs="+", default=[], metavar="ROW", help="only these rows")
    sweep.add_argument("--seeds", nargs="+", default=[], metavar="SEED", help="only these seeds")
    sweep.add_argument("--results", type=Path, default=Path("results"), metavar="DIR")
    sweep.add_argument("--launcher", choices=("local", "ray", "slurm"), default="local")
    sweep.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="how many workers train at once; default: one an accelerator or four cores (local), "
        "one a cohort of runs that share a program (ray, slurm)",
    )
    sweep.add_argument(
        "--together", type=int, default=1, metavar="N", help="as of `cnnlab table`, by a worker"
    )
    sweep.add_argument(
        "--strategy", choices=STRATEGIES, default="auto", help="as of `cnnlab table`"
    )
    sweep.add_argument(
        "--store",
        default="",
        metavar="DIR|gs://...",
        help="keep leases and finished runs there; --runs is then scratch space of each machine",
    )
    sweep.add_argument(
        "--lease-seconds",
        type=float,
        default=60.0,
        metavar="S",
        help="a worker that is silent for so long counts as dead; default 60",
    )
    local = sweep.add_argument_group("--launcher local")
    local.add_argument(
        "--cores",
        type=int,
        metavar="N",
        help="of each worker's own on CPU, which is faster; equal to all cores up to rounding",
    )
    ray = sweep.add_argument_group("--launcher ray")
    ray.add_argument("--address", metavar="HOST:PORT", help="of the cluster; auto: this machine's")
    ray.add_argument("--num-cpus", type=float, default=1, metavar="N", help="a task; default 1")
    ray.add_argument("--num-gpus", type=float, default=0, metavar="N", help="a task; default 0")
    ray.add_argument(
        "--resources", nargs="+", default=[], metavar="NAME=N", help="a task's, as in TPU=4"
    )
    ray.add_argument(
        "--max-retries", type=int, default=3, metavar="N", help="of a task whose node died; -1: all"
    )
    slurm = sweep.add_argument_group("--launcher slurm")
    slurm.add_argument(
        "--slurm",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="settings of submitit, as in timeout_min=120 gpus_per_node=1 slurm_partition=long",
    )
    slurm.add_argument("--detach", action="store_true", help="submit, and return at once")
    # What `cnnlab.sweep.launchers.local` starts its workers with.
    sweep.add_argument("--worker", help=argparse.SUPPRESS)
    sweep.add_argument("--pin", help=argparse.SUPPRESS)


def _changes(rest: Sequence[str], options: argparse.Namespace) -> dict[str, str]:
    """Reads `--config.a.b=c` (`--model.a=b` and `--data.a=b` where those are all)."""
    if not rest:
        return {}  # without importing JAX, which `doctor` finds out whether it can
    from cnnlab.types import CnnlabError

    prefixes: dict[Any, str] = {
        **dict.fromkeys((_train, _show), "--config."),
        **dict.fromkeys((_describe, _predict, _export), "--model."),
        **dict.fromkeys((_data_scan, _data_pack), "--data."),
    }
    prefix = prefixes.get(getattr(options, "command", None))
    changes: dict[str, str] = {}
    for word in rest:
        if prefix is None or not word.startswith(prefix):
            hint = ""
            if prefix:
                hint = f"; settings are given as {prefix}KEY=VALUE"
            raise CnnlabError(f"unknown argument {word!r}{hint}. See cnnlab --help")
        key, equals, value = word.removeprefix(prefix).partition("=")
        if not equals:
            raise CnnlabError(f"{word}: expected a value, as in {word}=VALUE")
        if key in changes:
            raise CnnlabError(f"{prefix}{key} is given twice")
        changes[key] = value
    return changes


def _start_jax() -> None:
    """Makes JAX fast, and turns on the compilation cache: a second process starts in seconds."""
    from cnnlab import backend

    backend.start()


def _join(options: argparse.Namespace) -> None:
    """Joins the processes of several machines, of which the first alone speaks."""
    if options.distributed or options.coordinator:
        _start_jax()  # before JAX has threads
    from cnnlab import parallel

    parallel.start(
        options.coordinator,
        options.num_processes,
        options.process_id,
        automatic=options.distributed,
    )
    if not parallel.is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends


class _Stop:
    """What the first SIGINT or SIGTERM of a command does; a second one leaves at once.

    The first ends the command as Ctrl-C ends a Python program (`KeyboardInterrupt`); within
    `gently`, it only sets a flag.

    Python calls a signal's handler when the main thread is back from the call that it is in, which
    is a minute later where that call compiles a network. The number of a signal, though, is
    written into a pipe as it comes, and here a thread of its own reads there.
    """

    listening = False

    def __init__(self) -> None:
        self.signal = 0
        self._say: Callable[[str], object] | None = None

    def __call__(self) -> bool:
        return bool(self.signal)

    @property
    def code(self) -> int:
        """The exit code of a command that was interrupted."""
        return 128 + (self.signal or signal.SIGINT)

    @contextlib.contextmanager
    def gently(self, say: Callable[[str], object]) -> Iterator[_Stop]:
        """Here the first signal is told, and makes this object true; who trains asks for that."""
        self._say = say
        try:
            yield self
        finally:
            self._say = None

    def __enter__(self) -> _Stop:
        self._before = {s: signal.getsignal(s) for s in STOPPING}
        self._hears, self._speaks = os.pipe()
        os.set_blocking(self._speaks, False)
        self._earlier = signal.set_wakeup_fd(self._speaks, warn_on_full_buffer=False)
        _Stop.listening = True
        for number in self._before:
            signal.signal(number, self._handle)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._earlier)
        _Stop.listening = False
        os.close(self._speaks)  # which ends the thread
        self._thread.join()
        os.close(self._hears)

    def _listen(self) -> None:
        first = True
        while heard := os.read(self._hears, 1):
            number = heard[0]
            if number not in self._before:
                continue
            if not first:
                os._exit(128 + number)
            first, self.signal = False, number
            if self._say is not None:
                self._say("stopping after this step, with a checkpoint; once more to leave at once")

    def _handle(self, number: int, _frame: Any) -> None:
        if self._say is None:
            self.signal = self.signal or number  # the thread may not have come to it yet
            raise KeyboardInterrupt


def _hold_signals(how: int = signal.SIG_BLOCK) -> None:
    if _Stop.listening:
        signal.pthread_sigmask(how, STOPPING)


def _forget_signals() -> None:
    """A forked child shares the pipe, but what ends the child is not meant for us."""
    if _Stop.listening:
        signal.set_wakeup_fd(-1)
        for number in STOPPING:
            signal.signal(number, signal.SIG_DFL)
        _hold_signals(signal.SIG_UNBLOCK)


os.register_at_fork(
    before=_hold_signals,
    after_in_parent=functools.partial(_hold_signals, signal.SIG_UNBLOCK),
    after_in_child=_forget_signals,
)


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False, markup=False)  # a row may be called "[a]"


def _numbers(words: Sequence[str]) -> list[int]:
    """Reads `0 1 2`, `0,1,2` and `0-4`."""
    from cnnlab.types import CnnlabError

    found: list[int] = []
    for part in ",".join(words).split(","):
        first, dash, last = part.partition("-")
        try:
            found += range(int(first), int(last if dash else first) + 1) if part else []
        except ValueError:
            raise CnnlabError(
                f"--seeds: expected numbers such as 0 1 2 or 0-4, got {part!r}"
            ) from None
    return found


def _trackers(options: argparse.Namespace) -> tuple[str, ...]:
    """The trackers that were asked for."""
    return (*options.tracker, *([f"wandb:{options.wandb}"] if options.wandb else []))


def _tracker(options: argparse.Namespace) -> Callable[[Any], Any]:
    """What gives a run their callbacks."""
    from cnnlab.sweep import executor

    return functools.partial(executor.tracked, _trackers(options))


def _table(options: argparse.Namespace, changes: dict[str, str]) -> int:
    _join(options)
    from cnnlab import parallel
    from cnnlab.sweep import benchmark, experiment
    from cnnlab.types import CnnlabError

    module, made = experiment.read(options.file)
    if isinstance(made, benchmark.Benchmark):
        if parallel.several():
            raise CnnlabError("a benchmark times one machine: give the command on one alone")
        return _times(options, module, made)
    if options.without:
        raise CnnlabError("--without is for benchmarks: only they have contenders")
    _start_jax()
    from cnnlab import faults
    from cnnlab.sweep import executor, results
    from cnnlab.sweep.progress import LiveProgress
    from cnnlab.training import loop
    from cnnlab.training.step import Programs

    console = _console()
    loaded = experiment.expand(options.file, module, made)
    chosen = experiment.select(loaded, options.rows, _numbers(options.seeds))
    folder = options.results / loaded.name
    if options.render:
        records = results.read(loaded, folder)
    else:
        programs = Programs()
        if options.dry_run:
            results.print_plan(console, executor.plan(chosen, options.runs, programs))
            return 0
        parallel.from_first(lambda: faults.require_writable(options.results, "--results"))
        parallel.from_first(lambda: faults.require_writable(options.runs, "--runs"))
        try:
            with (
                options.stop.gently(console.print) as stop,
                LiveProgress(console, chosen, options.runs) as progress,
            ):
                executor.execute(
                    chosen,
                    options.runs,
                    programs=programs,
                    progress=progress,
                    track=_tracker(options),
                    should_stop=stop,
                    together=options.together,
                    strategy=options.strategy,
                    extras=loaded.extras,
                    allow=loaded.allow,
                )
        except loop.Interrupted:
            return _complain("interrupted; the same command goes on where it was", stop.code)
        records = parallel.from_first(lambda: _finished(options, loaded))
    # The others wait: who leaves early would be missed.
    parallel.from_first(lambda: _write_table(console, loaded, records, folder))
    return 0


def _finished(options: argparse.Namespace, loaded: Any) -> list[dict[str, Any]]:
    """The records of an experiment's finished runs."""
    from cnnlab.sweep import executor, results

    done = (executor.finished(run, options.runs) for run in loaded.runs)
    # What was not asked for now may lack a score that the table wants: it is missing, then.
    here = {
        (r["row"], r["seed"]): r
        for r in done
        if r is not None and (r["status"] != "done" or {*loaded.extras} <= {*r["scores"]})
    }
    # Cells that were run elsewhere, with these very settings, keep their place in the table.
    there = results.read(loaded, options.results / loaded.name, skip_others=True)
    kept = {(r["row"], r["seed"]): r for r in there}
    return list((kept | here).values())


def _write_table(
    console: Console, loaded: Any, records: Sequence[dict[str, Any]], folder: Path
) -> None:
    from cnnlab.sweep import results

    table, written = results.write(loaded, records, folder)
    results.show(console, table)
    for path in written:
        console.print(f"wrote {path}", soft_wrap=True)


def _sweep(options: argparse.Namespace, changes: dict[str, str]) -> int:
    if options.pin:  # before XLA counts the cores
        os.sched_setaffinity(0, {int(core) for core in options.pin.split(",")})
    _start_jax()
    from cnnlab import faults
    from cnnlab.sweep import launchers
    from cnnlab.training import loop
    from cnnlab.types import CnnlabError

    for name, least in (("jobs", 1), ("together", 0), ("cores", 1)):
        if (value := getattr(options, name)) is not None and value < least:
            raise CnnlabError(f"--{name}: expected at least {least}, got {value}")
    console, store = _console(), options.store
    tell = functools.partial(console.print, soft_wrap=True)
    faults.require_writable(options.results, "--results")
    faults.require_writable(options.runs, "--runs")
    task = launchers.Work(
        options.file.absolute(),
        options.runs.absolute(),
        tuple(options.rows),
        tuple(_numbers(options.seeds)),
        options.together,
        options.strategy,
        options.lease_seconds,
        store if "://" in store or not store else str(Path(store).absolute()),
        _trackers(options),
    )
    try:
        with options.stop.gently(tell) as stop:
            if options.worker:
                index, _, of = options.worker.partition("/")
                launchers.work(
                    task, index=int(index), of=int(of), should_stop=stop, console=console
                )
                return 0
            if launchers.unfinished(task):
                _launch(options, task, stop, tell)
    except loop.Interrupted:
        return _complain("interrupted; the same command goes on where it was", stop.code)
    if options.launcher == "slurm" and options.detach:
        tell(
            f"when they have ended: cnnlab sweep {options.file} --runs {options.runs} --results "
            f"{options.results}{f' --store {store}' if store else ''}\n"
            "(which writes the table, and trains here what is missing)"
        )
        return 0
    loaded, chosen = task.load()
    launchers.fetch(task, chosen)
    missing = [f"{run.row!r} seed {run.seed}" for run in launchers.unfinished(task)]
    if missing:
        raise CnnlabError(
            f"all workers have ended, but {len(missing)} of {len(chosen)} runs are not finished: "
            f"{', '.join(missing[:5])}; the same command goes on"
        )
    _write_table(console, loaded, _finished(options, loaded), options.results / loaded.name)
    return 0


def _launch(
    options: argparse.Namespace, task: Any, stop: _Stop, tell: Callable[[str], None]
) -> None:
    """Hands a sweep's work to its launcher, with the settings that are for it."""
    common: dict[str, Any] = {"workers": options.jobs, "should_stop": stop, "tell": tell}
    if options.launcher == "local":
        from cnnlab.sweep.launchers import local

        local.launch(task, cores=options.cores, **common)
    elif options.launcher == "ray":
        from cnnlab.sweep.launchers import ray

        amounts = {k: float(v) for k, v in _pairs("resources", options.resources, float).items()}
        ray.launch(
            task,
            address=options.address,
            num_cpus=options.num_cpus,
            num_gpus=options.num_gpus,
            resources=amounts,
            max_retries=options.max_retries,
            **common,
        )
    else:
        from cnnlab.sweep.launchers import slurm

        settings = _pairs("slurm", options.slurm)
        slurm.launch(task, settings=settings, detach=options.detach, **common)


def _pairs(option: str, words: Sequence[str], read: Callable[[str], Any] = str) -> dict[str, str]:
    """Reads `a=1 b=2`; `read` raises a ValueError where a value won't do."""
    from cnnlab.types import CnnlabError

    found = {}
    for word in words:
        key, equals, value = word.partition("=")
        try:
            read(value)
        except ValueError:
            equals = ""
        if not key or not equals or not value:
            raise CnnlabError(f"--{option}: expected NAME=VALUE, got {word!r}")
        found[key] = value
    return found


def _times(options: argparse.Namespace, module: Any, made: Any) -> int:
    """`table` for a benchmark."""
    from cnnlab.sweep import results, timing
    from cnnlab.types import CnnlabError

    for name in ("seeds", "wandb", "tracker"):
        if getattr(options, name):
            raise CnnlabError(f"--{name}: a benchmark trains nothing, so it has no use for it")
    console = _console()
    loaded = timing.expand(options.file, module, made)
    cases, contenders = timing.select(loaded, options.rows, options.without)
    folder = options.results / loaded.spec.name
    if options.dry_run:
        there = timing.read(loaded, folder)
        for case in cases:
            reason = timing.outdated(loaded, case, contenders, there.get(case))
            console.print(f"{case}: {f'to measure ({reason})' if reason else 'done'}")
        return 0
    if not options.render:
        try:
            tell = functools.partial(console.print, soft_wrap=True)
            timing.execute(loaded, cases, contenders, folder, tell=tell)
        except KeyboardInterrupt:
            return _complain(
                "interrupted; the same command goes on with the case that it was at",
                options.stop.code,
            )
    records = timing.read(loaded, folder)
    if not records:
        raise CnnlabError(f"{folder}/runs holds no results yet; measure without --render")
    grid, written = timing.write(loaded, records, folder)
    results.show(console, grid)
    for path in written:
        console.print(f"wrote {path}", soft_wrap=True)
    return 0


def _train(options: argparse.Namespace, changes: dict[str, str]) -> int:
    _start_jax()
    _join(options)
    from cnnlab import config as config_lib
    from cnnlab.sweep import experiment, results
    from cnnlab.sweep.progress import LiveProgress
    from cnnlab.training import loop, run, trackers
    from cnnlab.training.step import Programs

    console = _console()
    name, _, argument = str(options.config).partition(":")
    config = experiment.load_config(Path(name), argument)
    config = config_lib.override(config, changes, "command line")
    config = config_lib.resolve(config, name)
    this = experiment.Run(Path(name).stem, config.seed, config, config_lib.identity(config))
    folder = options.folder or options.runs / this.folder
    try:
        with (
            options.stop.gently(console.print) as stop,
            LiveProgress(console, [this], folder.parent) as progress,
        ):
            callbacks = trackers.merge(progress.begin(this), _tracker(options)(this))
            job = run.Job(config, folder, this.row, callbacks)
            (record,) = run.train([job], programs=Programs(), should_stop=stop)
    except loop.Interrupted:
        return _complain("interrupted; the same command goes on where it was", stop.code)
    results.show_scores(console, record, folder)
    return 0


def _show(options: argparse.Namespace, changes: dict[str, str]) -> int:
    _start_jax()
    import jax
    import jax.numpy as jnp
    import numpy as np

    from cnnlab import augment, keys
    from cnnlab import config as config_lib
    from cnnlab.reporting import samples
    from cnnlab.sweep import experiment
    from cnnlab.training import run
    from cnnlab.types import Batch, CnnlabError

    name, _, argument = str(options.config).partition(":")
    config = experiment.load_config(Path(name), argument)
    config = config_lib.resolve(config_lib.override(config, changes, "command line"), name)
    split = run.load_split(config, "train")
    stream = run.make_stream(config, split)
    for option in ("images", "epochs"):
        if not 1 <= getattr(options, option) <= 64:
            raise CnnlabError(f"--{option}: expected 1 to 64, got {getattr(options, option)}")
    info, channels = split.info, split.info.image_shape[-1]
    if channels not in (1, 3):
        raise CnnlabError(f"{info.name} has images of {channels} channels; 1 or 3 can be drawn")
    positions = stream.epoch(0)[: options.images]
    images, labels = split.get(positions)
    originals = jnp.asarray(images, jnp.float32) / 255
    targets = jax.nn.one_hot(labels, info.num_classes)
    transforms = tuple(config.augment.transforms)
    given = targets if augment.soft_labels(transforms) else jnp.asarray(labels)
    transform = jax.jit(augment.compose(transforms))
    columns, chances = [np.asarray(originals)], [np.asarray(targets)]
    for epoch in range(options.epochs):
        step = epoch * len(stream.train) // config.train.batch_size
        batch = Batch(originals, given, jnp.ones(len(positions)))
        made = transform(keys.key(config.seed, "augment", step), batch)
        columns.append(np.asarray(made.images))
        chances.append(np.asarray(made.labels if made.labels.ndim == 2 else targets))
    written = samples.sheet(
        np.stack(columns),
        [[samples.caption(one, info.class_names) for one in of_column] for of_column in chances],
        ["as it is", *(f"epoch {epoch + 1}" for epoch in range(options.epochs))],
        f"{info.name}: {', '.join(transforms) or 'no transforms'}",
        options.output,
    )
    _console().print(f"wrote {written}", soft_wrap=True)
    return 0


def _run_folder(options: argparse.Namespace) -> Path:
    from cnnlab.types import CnnlabError

    folder: Path = options.run if options.run.is_dir() else options.runs / options.run
    if not folder.is_dir():
        raise CnnlabError(f"no run {str(options.run)!r}; `cnnlab list runs` shows all")
    return folder


def _attack(options: argparse.Namespace, changes: dict[str, str]) -> int:
    _start_jax()
    import json

    from cnnlab import attacks, encoding
    from cnnlab.evaluation import checklist, robustness
    from cnnlab.reporting import adversarial
    from cnnlab.training import run
    from cnnlab.training.step import Programs
    from cnnlab.types import CnnlabError

    if options.examples < 1:
        raise CnnlabError(f"--examples: expected at least 1, got {options.examples}")
    checklist.check_names(options.allow)
    strengths = sorted(attacks.strength(eps) for eps in options.eps)
    if len(set(strengths)) < len(strengths):
        raise CnnlabError(f"--eps: expected different radii, got {' '.join(options.eps)}")
    if options.plot and len(strengths) < 2:
        raise CnnlabError("--plot draws accuracy against eps: give several, as in --eps 0 0.05 0.1")
    middle = strengths[len(strengths) // 2]
    if options.checklist and not middle:
        raise CnnlabError("--checklist: expected an eps above 0, got 0")
    if options.gallery and len(strengths) > 1:
        raise CnnlabError(f"--gallery shows one eps, got {len(strengths)}")
    steps = {} if options.steps is None else {"steps": options.steps}
    texts = []
    for eps in strengths:
        given = {"eps": eps, "norm": options.norm, **steps}
        texts.append(f"{options.attack}({', '.join(f'{k}={v!r}' for k, v in given.items())})")
        robustness.parse(texts[-1])
    path, programs = _run_folder(options), Programs()
    source = ""
    if options.source:
        other = _run_folder(argparse.Namespace(run=options.source, runs=options.runs))
        if other.resolve().parent != path.resolve().parent:
            raise CnnlabError(
                f"--source: expected a run in {path.parent}, beside the attacked one, got {other}"
            )
        if options.gallery:
            raise CnnlabError("--gallery shows a run's own attack; leave out --source")
        source = f" from {other.name}"
    names = [f"{text}{source}, first {options.examples}" for text in texts]
    how = "give --allow NAME"
    try:
        if options.checklist:
            found = _checked(path, middle, options.norm, options.examples, programs)
            checklist.require(found, options.allow, how)
        result = run.extend(path, names, programs, allow=options.allow)
        if not {*names} <= {*result["scores"]}:
            step = result["diverged_step"]
            raise CnnlabError(f"{path} diverged at step {step}: nothing to attack")
        scores = [result["scores"][name] for name in names]
        robust = [encoding.decode_labels(score["robust"]).astype(bool) for score in scores]
        lines = [
            {"attack": f"{text}{source}", "examples": options.examples}
            | {key: score[key] for key in ("clean", "top1")}
            | dict(zip(("low", "high"), robustness.interval(each), strict=True))
            | {"findings": score.get("findings", [])}
            for text, score, each in zip(texts, scores, robust, strict=True)
        ]
        if options.json:
            print(json.dumps(lines if len(lines) > 1 else lines[0]))
        else:
            _print_attacks(path.name, lines, strengths)
        if options.plot:
            points = [
                adversarial.Point(eps, line["top1"], line["low"], line["high"])
                for eps, line in zip(strengths, lines, strict=True)
            ]
            title = f"{options.attack}, first {len(robust[0])} test examples"
            clean = scores[0]["clean"]
            adversarial.curve(points, clean, options.plot, title=title, norm=options.norm)
            print(f"wrote {options.plot}", file=sys.stderr)
        if options.gallery:
            _draw_gallery(options, path, texts[0], robust[0], programs)
            print(f"wrote {options.gallery}", file=sys.stderr)
        if not source:  # what is stronger for another run may be weaker here
            curve = checklist.monotone(dict(zip(strengths, robust, strict=True)))
            checklist.require(curve, options.allow, how)
    except checklist.UntrustworthyError as error:
        return _complain(str(error), DOUBTFUL)
    return 0


def _checked(path: Path, eps: float, norm: str, examples: int, programs: Any) -> list[Any]:
    """What the whole checklist finds of a run; also told, allowed or not."""
    from cnnlab.evaluation import checklist
    from cnnlab.training import loop, run

    config, program, state, _ = run.restore(path, programs)
    images, labels = run.load_split(config, "test").first(examples)
    found = checklist.full(
        program.logits_of, loop.scored(state), images, labels, eps=eps, norm=norm, seed=config.seed
    )
    looked = min(len(images), checklist.EXAMPLES)
    names = ", ".join(finding.name for finding in found) or "no finding"
    told = f"checklist of {len(checklist.CHECKS)}, {looked} examples, eps {eps:g}: {names}"
    print(f"cnnlab: {told}", file=sys.stderr)
    return found


def _print_attacks(name: str, lines: Sequence[dict[str, Any]], strengths: Sequence[float]) -> None:
    """One attack as a sentence, several strengths as a table."""
    from rich.table import Table

    console = _console()
    first = lines[0]
    if len(lines) == 1:
        console.print(
            f"{name}: {first['attack']}, {first['examples']} examples: "
            f"{100 * first['clean']:.2f} % clean, {100 * first['top1']:.2f} % under attack",
            highlight=False,
            soft_wrap=True,
        )
        return
    attack, _, source = first["attack"].partition(" from ")
    told = f"{name}: {attack.partition('(')[0]}{source and f' from {source}'}"
    told += f", {first['examples']} examples"
    console.print(f"{told}, {100 * first['clean']:.2f} % clean", soft_wrap=True)
    table = Table()
    for heading in ("eps", "under attack (%)", "95 % interval"):
        table.add_column(heading, justify="right")
    for eps, line in zip(strengths, lines, strict=True):
        interval = f"{100 * line['low']:.2f} to {100 * line['high']:.2f}"
        table.add_row(f"{eps:.4g}", f"{100 * line['top1']:.2f}", interval)
    console.print(table)


def _draw_gallery(
    options: argparse.Namespace, path: Path, text: str, robust: Any, programs: Any
) -> None:
    """Attacks a few of the examples again, with the same draws, and draws what came of it."""
    import numpy as np

    from cnnlab import backend
    from cnnlab.evaluation import robustness
    from cnnlab.reporting import adversarial
    from cnnlab.training import loop, run
    from cnnlab.types import CnnlabError

    config, program, state, _ = run.restore(path, programs)
    split, variables = run.load_split(config, "test"), loop.scored(state)
    logits_of = backend.jit(program.logits_of)
    given, labels = split.first(len(robust))
    pixels = given.astype(np.float32) / 255
    clean = np.asarray(logits_of(variables, pixels))
    kinds = {
        "fooled": (clean.argmax(1) == labels) & ~robust,
        "right all the same": robust,
    }
    rows = np.concatenate([np.flatnonzero(k)[: adversarial.ROWS] for k in kinds.values()])
    if not len(rows):
        raise CnnlabError("--gallery: the model is wrong on all examples as they are")
    images = given[rows]
    made = robustness.attack(
        text, program.logits_of, variables, images, labels[rows], seed=config.seed, positions=rows
    ).images
    assert made is not None
    after = np.asarray(logits_of(variables, made))
    groups = []
    for kind, of_kind in kinds.items():
        these = of_kind[rows]
        heading = f"{kind}: {of_kind.sum()} of {len(robust)}"
        shown = (pixels[rows], made, labels[rows], clean[rows], after)
        groups.append(adversarial.Shown(heading, *(each[these] for each in shown)))
    title = f"{path.name}: {text}"
    adversarial.gallery(
        groups, split.info.class_names, options.gallery, title=title, norm=options.norm
    )


def _certify(options: argparse.Namespace, changes: dict[str, str]) -> int:
    _start_jax()
    import json

    import numpy as np

    from cnnlab.evaluation import certification
    from cnnlab.reporting import figures
    from cnnlab.sweep import results
    from cnnlab.training import run
    from cnnlab.training.step import Programs
    from cnnlab.types import CnnlabError

    smoothing = certification.Smoothing(
        options.sigma, options.select, options.samples, options.alpha
    )
    for name, value in (("examples", options.examples), ("batch-size", options.batch_size)):
        if value is not None and value < 1:
            raise CnnlabError(f"--{name}: expected at least 1, got {value}")
    at = np.array(options.radii or smoothing.radii)
    if not (at >= 0).all():
        raise CnnlabError(f"--radii: expected numbers of at least 0, got {options.radii}")
    path = _run_folder(options)
    found = run.certify(
        path, smoothing, options.examples, Programs(), batch_size=options.batch_size
    )
    radii, right = np.array(found["radii"]), np.array(found["right"])
    accuracy = certification.certified_accuracy(radii, right, at).tolist()
    certified = {f"{each:g}": value for each, value in zip(at, accuracy, strict=True)}
    names = ("top1", "top1_abstained", "abstained", "average_radius", "seconds")
    scores = {name: found[name] for name in names}
    if options.plot:
        figures.certified_accuracy({path.name: (radii, right)}, options.plot)
    if options.json:
        print(json.dumps(found["about"] | scores | {"certified": certified}, indent=1))
    else:
        scores |= {f"certified at {each}": value for each, value in certified.items()}
        title = f"{path.name}\nfirst {len(radii)} test examples, {smoothing}"
        results.print_scores(_console(), title, scores)
    return 0


def _eval(options: argparse.Namespace, changes: dict[str, str]) -> int:
    _start_jax()
    import json

    import numpy as np

    from cnnlab.sweep import results
    from cnnlab.training import run
    from cnnlab.training.step import Programs
    from cnnlab.types import CnnlabError

    folder = _run_folder(options)
    config, program, state, which = run.restore(folder, Programs())
    split = run.load_split(config, "test" if options.split == "test" else "train")
    stream = run.make_stream(config, run.load_split(config, "train"))
    positions = {
        "test": np.arange(len(split), dtype=np.int32),
        "train": stream.train,
        "validation": stream.validation,
    }[options.split]
    if not len(positions):
        raise CnnlabError(f"{folder}: data.validation is 0, so there is no validation split")
    measured, _ = run.score(config, program, state, split, positions)
    if options.json:
        print(json.dumps(measured, indent=1, sort_keys=True))
    else:
        title = f"{folder.name}\n{options.split} split, {which}"
        results.print_scores(_console(), title, measured)
    return 0


def _list(options: argparse.Namespace, changes: dict[str, str]) -> int:
    from cnnlab.sweep import listing
    from cnnlab.types import CnnlabError

    if options.published and options.what != "models":
        raise CnnlabError("--published is for models: cnnlab list models --published")
    if options.published:
        from cnnlab import pretrained

        for name in pretrained.published_models():
            print(name)
        return 0
    listing.show(_console(), options.what, options.runs)
    return 0


def _describe(options: argparse.Namespace, changes: dict[str, str]) -> int:
    _start_jax()
    import dataclasses
    import json

    from cnnlab import config as config_lib
    from cnnlab import describe, models, registry
    from cnnlab.types import CnnlabError

    registry.get("models", options.model)
    config = config_lib.base(model=options.model)
    config = config_lib.override(
        config, {f"model.{key}": value for key, value in changes.items()}, "command line"
    )
    fields = {k: v for k, v in config.model.items() if k != "name"}
    shape, classes = describe.usual_input(
        options.model, **{k: v for k, v in fields.items() if k not in ("aux", "aux_hidden")}
    )
    defaults = []
    if options.input is None:
        defaults.append(f"--input {'x'.join(map(str, shape))}")
    else:
        try:
            height, width, channels = (int(part) for part in options.input.split("x"))
            if min(height, width, channels) < 1:
                raise ValueError
        except ValueError:
            raise CnnlabError(
                f"--input: expected HxWxC such as 28x28x1, got {options.input!r}"
            ) from None
        shape = (height, width, channels)
    if options.classes is None:
        defaults.append(f"--classes {classes}")
    elif options.classes < 1:
        raise CnnlabError(f"--classes: expected at least 1, got {options.classes}")
    else:
        classes = options.classes
    if defaults:
        print(f"cnnlab: taking {' and '.join(defaults)}, as none was given", file=sys.stderr)
    module = models.create(options.model, num_outputs=classes, **fields)
    summary = describe.describe(module, shape)
    if options.json:
        print(json.dumps(dataclasses.asdict(summary), indent=1))
    else:
        console, table = _console(), describe.render(summary)
        needed = console.measure(table, options=console.options.update(max_width=1000))
        # A terminal folds names of layers, never numbers; a file has room for all.
        least = needed.minimum if console.is_terminal else needed.maximum
        console.width = max(console.width, least)
        console.print(table)
    if options.plot:
        from cnnlab.reporting import fields as field_figures

        path = field_figures.draw(module, summary, options.plot, title=options.model)
        print(f"wrote {path}", file=sys.stderr)
    return 0


def _weights(options: argparse.Namespace, changes: dict[str, str]) -> tuple[dict, dict]:
    """The fields of the model that `--model` names, and its variables."""
    from cnnlab import config as config_lib
    from cnnlab import pretrained, registry

    registry.get("models", options.model)
    config = config_lib.base(model=options.model)
    config = config_lib.override(
        config, {f"model.{key}": value for key, value in changes.items()}, "command line"
    )
    fields = {key: config.model[key] for key in changes}
    source = options.weights or pretrained.repository(options.model)
    return fields, pretrained.load(options.model, source, **fields)


def _predict(options: argparse.Namespace, changes: dict[str, str]) -> int:
    _start_jax()
    import dataclasses
    import json

    from cnnlab import exporting, predict, pretrained
    from cnnlab.types import CnnlabError

    if options.top < 1:
        raise CnnlabError(f"--top: expected at least 1, got {options.top}")
    if options.exported and (options.weights or options.size or changes):
        raise CnnlabError("--exported has its weights, size and fields in it: leave them out")
    classify: Callable[[Any], Any]
    if options.exported:
        program = exporting.load(options.exported)
        classify, name = program, program.name
        *size, channels = program.input_shape
        outputs = program.num_outputs
    else:
        fields, variables = _weights(options, changes)
        name = options.model
        size = [options.size or pretrained.preprocessing(name).size] * 2
        outputs, channels = pretrained.num_outputs(variables), 3
        classify = pretrained.predictor(name, variables, **fields)
    names = predict.class_names(outputs, options.classes)
    images = [
        predict.read_image(
            path,
            (size[0], size[1]),
            channels=channels,
            crop=options.crop,
            interpolation=pretrained.preprocessing(name).interpolation,
        )
        for path in options.images
    ]
    found = [
        (path, predict.top(scores, names, options.top))
        for path, scores in zip(options.images, predict.logits(classify, images), strict=True)
    ]
    if options.json:
        entries = [
            {"image": path, "top": [dataclasses.asdict(entry) for entry in ranked]}
            for path, ranked in found
        ]
        print(json.dumps(entries, indent=1))
    else:
        for path, ranked in found:
            _console().print(predict.render(path, ranked))
    return 0


def _layout(changes: dict[str, str], *fixed: str) -> dict[str, Any]:
    """The fields of `image_folder` that are given, but for those that the command has itself."""
    from cnnlab import config as config_lib
    from cnnlab.types import CnnlabError

    for name in ("name", "validation", "folder", "size", *fixed):
        if name in changes:
            raise CnnlabError(f"--data.{name} has no meaning here; see cnnlab data --help")
    config = config_lib.override(
        config_lib.base(data="image_folder"),
        {f"data.{name}": value for name, value in changes.items()},
        "command line",
    )
    return {name: config.data[name] for name in changes}


def _data_scan(options: argparse.Namespace, changes: dict[str, str]) -> int:
    from cnnlab import packing

    layout = _layout(changes, "bad", "channels", "fit", "interpolation")
    found = packing.scan(options.folder, **layout)
    for table in packing.render(found):
        _console().print(table)
    return USER_ERROR if found.bad else 0


def _data_pack(options: argparse.Namespace, changes: dict[str, str]) -> int:
    from cnnlab import packing

    packed = packing.pack(
        options.folder,
        options.output,
        size=options.size,
        raw=options.raw,
        jpeg_quality=options.jpeg_quality,
        shard_size=options.shard_size,
        **_layout(changes),
    )
    counts = " and ".join(f"{count} {split}" for split, count in packed.examples.items())
    _console().print(
        f"wrote {packed.folder}: {counts} images in {sum(packed.shards.values())} shards, "
        f"{packed.bytes / packing.MEGABYTE:.1f} MB, {len(packed.left_out)} left out. Train with "
        f"data.name=array_record data.folder={packed.folder}",
        soft_wrap=True,
    )
    return 0


def _export(options: argparse.Namespace, changes: dict[str, str]) -> int:
    _start_jax()
    from cnnlab import exporting

    fields, variables = _weights(options, changes)
    program = exporting.make(
        options.model, variables, size=options.size, platforms=options.platforms, **fields
    )
    exporting.save(options.output, program)
    shape = ", ".join(map(str, program.input_shape))
    _console().print(
        f"wrote {options.output}: images [B, {shape}] in [0, 1] to {program.num_outputs} logits, "
        f"for {', '.join(program.platforms)}",
        soft_wrap=True,
    )
    return 0


def _doctor(options: argparse.Namespace, changes: dict[str, str]) -> int:
    from cnnlab import backend, doctor

    backend.keep_heap()  # but JAX is not started here: that it can't be is a finding
    facts = doctor.examine(options.runs)
    findings = doctor.diagnose(facts)
    report = doctor.report(facts, findings)
    if options.json:
        import json

        print(json.dumps(report, indent=1))
    else:
        doctor.render(facts, findings, _console())
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
