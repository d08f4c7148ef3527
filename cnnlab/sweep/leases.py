"""Leases: any number of workers share a folder of runs, and no run is done twice at a time.

A lease on a run is a small file `FOLDER/RUN/GENERATION`, and the highest generation is the one that
counts. To take a run is to create the next generation, which only one worker can. Nobody but its
maker writes a generation, and none is removed before a higher one stands, so that there is no
moment at which two could take a run, and a worker that slept through its loss can't touch the lease
of whoever came after it.

The holder rewrites its generation every so often: its heartbeat. A worker may create the next one
where the holder has written that it let go, or where the file has not changed since this worker
first saw it so, for the `seconds` that it names, by this worker's own clock. Clocks of two machines
are never compared, nor a file's time; the clock is one that nobody sets, and it goes on while the
machine is suspended.

What is guaranteed:

- Two workers never take the same generation: on a file system by `O_CREAT | O_EXCL`, which NFS
  keeps too. In object storage reached through `etils.epath`, which has no exclusive create, by
  Fischer's protocol (Lamport 1987, "A Fast Mutual Exclusion Algorithm", section 1): see that the
  object is missing, write it, wait `settle` seconds, and read it back; the last writer has it. That
  is right if each write is done within `settle` seconds of the look before it. A worker measures
  its own, and gives up where it took longer. The storage must show at once what was written, as
  those of Google, Amazon and Microsoft do.
- A holder stops believing in its lease `seconds` after the start of its last heartbeat that was
  written, before anybody else can have seen the file unchanged for as long. So two workers hold a
  run at once only if a clock of one runs slower than another's, or stands still (a virtual machine
  that is frozen), or if one is cut off between `Lease.confirm` and the write that follows it. Then
  both write the same result, each whole: a run is a function of its config.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cnnlab import record
from cnnlab.types import CnnlabError

SECONDS = 60.0
"""How long a heartbeat may be missing."""

SETTLE = 5.0
"""How long a write to object storage may take, in seconds."""

BEATS = 6  # heartbeats in the time after which a lease is lost


class LeaseLostError(Exception):
    """This worker no longer holds the run that it works on; another may."""


def clock() -> float:
    """Seconds that go on steadily, whatever is done to the time of day, in sleep too."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


class Leases:
    """The leases in one folder, as one worker sees them.

    Args:
        folder: where they lie; a path, or an address of object storage such as `gs://bucket/runs`.
        seconds: how long a heartbeat of a lease taken here may be missing; written into it, so
            that workers may differ.
        settle: see `SETTLE`; for object storage only.
        clock: seconds that only grow.

    Raises:
        CnnlabError: `seconds` is not positive, or the address's scheme is unknown.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        seconds: float = SECONDS,
        settle: float = SETTLE,
        clock: Callable[[], float] = clock,
    ) -> None:
        if not seconds > 0:
            raise CnnlabError(f"lease: expected a positive number of seconds, got {seconds}")
        self.seconds, self.clock = seconds, clock
        remote = "://" in str(folder)
        self.place = (
            Objects(object_path(str(folder)), settle, clock) if remote else Files(Path(folder))
        )
        self._seen: dict[str, tuple[tuple[int, str | None], float]] = {}

    def acquire(self, name: str) -> Lease | None:
        """Takes the lease on a run, or looks once more at whoever has it.

        Args:
            name: the run's folder name.

        Returns:
            The lease, whose heartbeat goes on until it is released; or `None` if another worker
            has it, as far as this one has seen by now.
        """
        newest = self.place.newest(name)
        if newest:
            content = self.place.read(name, newest)
            now = self.clock()
            looked, since = self._seen.get(name, (None, now))
            if looked != (newest, content):
                self._seen[name] = (newest, content), now
                since = now
            about = _read(content)
            if "released" not in about and now - since < about.get("seconds", self.seconds):
                return None
        lease = Lease(self, name, newest + 1)
        if not lease.take():
            return None
        self._seen.pop(name, None)
        return lease

    def holder(self, name: str) -> str | None:
        """Who has taken a run and not let go of it, alive or not; `None` if nobody."""
        newest = self.place.newest(name)
        content = self.place.read(name, newest) if newest else None
        if content is None or "released" in _read(content):
            return None
        return str(_read(content).get("holder", "another worker"))


class Lease:
    """One run, held by this worker. As a context manager it is released at the end.

    It is taken by `Leases.acquire`.
    """

    def __init__(self, leases: Leases, name: str, generation: int) -> None:
        self.name = name
        self._leases, self._generation = leases, generation
        self._token = uuid.uuid4().hex
        self._beats = 0
        self._trouble = ""
        self._lost = ""
        self._end = threading.Event()
        self._guard = threading.Lock()  # a release must not come between a heartbeat's two halves
        self._thread = threading.Thread(target=self._beat, name=f"lease {name}", daemon=True)
        self._renewed = leases.clock()

    def take(self) -> bool:
        """Creates this generation; `False` if another worker was first."""
        place = self._leases.place
        self._renewed = self._leases.clock()
        if not place.create(self.name, self._generation, self._content()):
            return False
        # One that looked long ago may create a generation that came and went since.
        if place.newest(self.name) != self._generation:
            place.remove(self.name, self._generation)
            return False
        place.remove_below(self.name, self._generation)
        self._thread.start()
        return True

    def check(self) -> None:
        """Makes sure that the lease is not lost, as far as its heartbeat knows; costs nothing.

        Raises:
            LeaseLostError: it is lost, for good.
        """
        late = self._leases.clock() - self._renewed
        if not self._lost and late >= self._leases.seconds:
            self._lost = f"no heartbeat was written for {late:.0f} s{self._trouble}"
        if self._lost:
            raise LeaseLostError(f"{self.name}: {self._lost}")

    def confirm(self) -> None:
        """Like `check`, but looks; for right before something is written that others count on.

        Raises:
            LeaseLostError: it is lost, for good.
        """
        self.check()
        newest = self._leases.place.newest(self.name)
        if newest != self._generation and not self._lost:
            self._lost = "another worker has taken it over"
        self.check()

    def release(self) -> None:
        """Ends the heartbeat, and lets others take the run, unless the lease is lost."""
        self._end.set()
        with self._guard, contextlib.suppress(LeaseLostError):
            self.confirm()
            self._leases.place.write(self.name, self._generation, self._content(released=True))
        if self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _beat(self) -> None:
        while not self._end.wait(self._leases.seconds / BEATS):
            with self._guard:
                if self._end.is_set():
                    return
                now = self._leases.clock()
                try:
                    self.confirm()
                    self._beats += 1
                    self._leases.place.write(self.name, self._generation, self._content())
                except LeaseLostError:
                    return  # the worker learns it from `check`
                except Exception as error:  # whatever a storage raises while it can't be reached
                    self._trouble = f" ({type(error).__name__}: {error})"
                else:
                    self._renewed, self._trouble = now, ""

    def _content(self, *, released: bool = False) -> str:
        about: dict[str, Any] = {
            "holder": f"process {os.getpid()} on {platform.node()}",
            "token": self._token,
            "beat": self._beats,
            "seconds": self._leases.seconds,
        }
        return json.dumps(about | ({"released": True} if released else {}))


def _read(content: str | None) -> dict[str, Any]:
    # Empty for an instant after it was created, and for good if its maker died right then.
    return dict(json.loads(content)) if content else {}


class Files:
    """Generations in a folder of a file system, local or shared.

    Args:
        folder: a path.
    """

    def __init__(self, folder: Any) -> None:
        self._folder = folder

    def _generations(self, name: str) -> list[int]:
        try:
            names = [path.name for path in (self._folder / name).iterdir()]
        except FileNotFoundError:
            return []
        return [int(name) for name in names if name.isdecimal()]

    def newest(self, name: str) -> int:
        """The highest generation, 0 where there is none."""
        return max(self._generations(name), default=0)

    def read(self, name: str, generation: int) -> str | None:
        """What a generation says, `None` where it is missing."""
        try:  # opening it anew is what makes NFS ask its server
            return str((self._folder / name / str(generation)).read_text())
        except FileNotFoundError:
            return None

    def create(self, name: str, generation: int, content: str) -> bool:
        """Creates a generation; `False` if another worker did."""
        path = self._folder / name / str(generation)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(path, "x") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except FileExistsError:
            return False
        return True

    def write(self, name: str, generation: int, content: str) -> None:
        """Rewrites a generation whole; for its holder alone."""
        record.write_atomic(self._folder / name / str(generation), content)

    def remove(self, name: str, generation: int) -> None:
        """Removes a generation that counts no more, or never did."""
        (self._folder / name / str(generation)).unlink(missing_ok=True)

    def remove_below(self, name: str, generation: int) -> None:
        """Removes all earlier generations."""
        for earlier in self._generations(name):
            if earlier < generation:
                self.remove(name, earlier)


class Objects(Files):
    """Generations in object storage, which writes objects whole but creates none exclusively.

    Args:
        folder: an `etils.epath.Path`.
        settle: how long a write may take, in seconds.
        clock: seconds that only grow.
    """

    def __init__(self, folder: Any, settle: float, clock: Callable[[], float]) -> None:
        super().__init__(folder)
        self._settle, self._clock = settle, clock

    def create(self, name: str, generation: int, content: str) -> bool:
        """Creates a generation; `False` if another worker did. Takes `settle` seconds."""
        start = self._clock()
        if self.read(name, generation) is not None:
            return False
        self.write(name, generation, content)
        if self._clock() - start > self._settle:
            return False  # others may have read back already; nobody renews it, so it expires
        time.sleep(self._settle)
        return self.read(name, generation) == content

    def write(self, name: str, generation: int, content: str) -> None:
        """Rewrites a generation whole; for its holder alone."""
        (self._folder / name / str(generation)).write_text(content)


def object_path(address: str) -> Any:
    """An `etils.epath.Path` of an address such as `gs://bucket/folder`.

    Raises:
        CnnlabError: nothing is known of such addresses.
    """
    from etils import epath

    try:
        return epath.Path(address)
    except KeyError as error:
        raise CnnlabError(
            f"{address}: expected a folder, or an address that starts with gs:// or s3://"
        ) from error
