"""Leases: one worker a run, whatever dies, sleeps, or is done to the clocks."""

import os
import random
import subprocess
import sys
import threading
import time

import pytest

from cnnlab.sweep import leases
from cnnlab.sweep.leases import LeaseLostError, Leases
from cnnlab.types import CnnlabError

RACER = """
import os, sys, time
from cnnlab.sweep.leases import Leases
folder, me = sys.argv[1:]
mine = Leases(folder + "/leases")
open(f"{folder}/ready{me}", "w").close()
while not os.path.exists(folder + "/go"):
    time.sleep(0.0005)
won = [name for name in (f"run{i}" for i in range(50)) if mine.acquire(name) is not None]
print(*won, flush=True)
sys.stdin.read()  # holds them until both have tried all
"""


class Clock:
    """A clock that a test turns."""

    def __init__(self, now=0.0):
        self.now = now

    def __call__(self):
        return self.now


class Bucket:
    """Objects in memory, a path of which looks like an `etils.epath.Path`."""

    def __init__(self, objects=None, key="", *, before_write=lambda: None):
        self.objects = {} if objects is None else objects
        self.key, self.before_write = key, before_write

    def __truediv__(self, name):
        return Bucket(self.objects, f"{self.key}/{name}", before_write=self.before_write)

    @property
    def name(self):
        return self.key.rpartition("/")[2]

    def iterdir(self):
        return [
            Bucket(self.objects, key)
            for key in list(self.objects)
            if key.startswith(self.key + "/")
        ]

    def read_text(self):
        if self.key not in self.objects:
            raise FileNotFoundError(self.key)
        return self.objects[self.key]

    def write_text(self, text):
        self.before_write()
        self.objects[self.key] = text

    def unlink(self, missing_ok):
        self.objects.pop(self.key, None)


def in_bucket(bucket, settle=0.2, clock=leases.clock):
    made = Leases("unused")
    made.clock, made.place = clock, leases.Objects(bucket, settle, clock)
    return made


def race(workers, name):
    """What those get who try for a lease at the same moment, and get one."""
    barrier, results = threading.Barrier(len(workers)), [None] * len(workers)

    def call(index):
        barrier.wait()
        results[index] = workers[index].acquire(name)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(workers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [lease for lease in results if lease is not None]


def test_two_processes_race_for_fifty_leases(tmp_path):
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(tmp_path), str(me)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for me in range(2)
    ]
    try:
        while not all((tmp_path / f"ready{me}").exists() for me in range(2)):
            assert all(racer.poll() is None for racer in racers)
            time.sleep(0.01)
        (tmp_path / "go").touch()
        won = [racer.stdout.readline().split() for racer in racers]
    finally:
        for racer in racers:
            racer.communicate("")
    assert sorted(won[0] + won[1]) == sorted(f"run{i}" for i in range(50))


def test_an_expired_lease_is_taken_over_once_though_four_try(tmp_path):
    for name in (f"run{i}" for i in range(20)):
        dead = Leases(tmp_path)
        assert dead.place.create(name, 1, "")  # its maker died before it wrote a word
        clocks = [Clock(random.Random(i).uniform(-1e6, 1e6)) for i in range(4)]
        thieves = [Leases(tmp_path, clock=clock) for clock in clocks]
        assert [thief.acquire(name) for thief in thieves] == [None] * 4
        for clock in clocks:
            clock.now += 59.9
        assert [thief.acquire(name) for thief in thieves] == [None] * 4
        for clock in clocks:
            clock.now += 0.2
        (lease,) = race(thieves, name)
        lease.release()


def test_one_who_looked_long_ago_does_not_take_what_others_have_had_since(tmp_path):
    slow, quick = Leases(tmp_path), Leases(tmp_path)
    for _ in range(2):
        with quick.acquire("run"):
            pass
    with quick.acquire("run") as third:
        # As if the slow one had looked when the first was let go: it would make the second.
        newest, looks = slow.place.newest, iter([1])
        slow.place.read = lambda name, generation: '{"released": true}'
        slow.place.newest = lambda name: next(looks, None) or newest(name)
        assert slow.acquire("run") is None
        third.confirm()
        assert newest("run") == 3


def test_a_holder_notices_that_it_was_taken_over_and_lets_the_new_one_be(tmp_path):
    clock, watch = Clock(), Clock()
    lease = Leases(tmp_path, clock=clock).acquire("run")
    thief = Leases(tmp_path, clock=watch)
    assert thief.acquire("run") is None
    watch.now = 60
    stolen = thief.acquire("run")
    lease.check()  # by its own clock it may still believe
    with pytest.raises(LeaseLostError, match="another worker has taken it over"):
        lease.confirm()
    with pytest.raises(LeaseLostError):  # for good
        lease.check()
    lease.release()
    stolen.confirm()
    assert Leases(tmp_path).acquire("run") is None
    stolen.release()
    with Leases(tmp_path).acquire("run"):
        pass


def test_a_holder_stops_believing_before_another_can_take_over(tmp_path):
    clock = Clock()
    lease = Leases(tmp_path, seconds=30, clock=clock).acquire("run")
    clock.now = 29.9
    lease.confirm()
    clock.now = 30.0
    with pytest.raises(LeaseLostError, match="no heartbeat was written for 30 s"):
        lease.check()
    lease.release()  # not its to let go any more
    assert Leases(tmp_path).acquire("run") is None


def test_a_watcher_waits_as_long_as_the_holder_has_said(tmp_path):
    watch = Clock()
    impatient = Leases(tmp_path, seconds=1, clock=watch)
    with Leases(tmp_path, seconds=100).acquire("run"):
        assert impatient.acquire("run") is None
        watch.now = 99
        assert impatient.acquire("run") is None
        watch.now = 100
        with impatient.acquire("run"):
            pass


def test_the_heartbeat_keeps_a_lease_and_the_end_lets_it_go(tmp_path):
    holder, watcher = Leases(tmp_path, seconds=1.5), Leases(tmp_path, seconds=1.5)
    with holder.acquire("run") as lease:
        end = time.monotonic() + 3
        while time.monotonic() < end:
            assert watcher.acquire("run") is None
            lease.confirm()
            time.sleep(0.05)
        assert watcher.holder("run") == f"process {os.getpid()} on {os.uname().nodename}"
    assert watcher.holder("run") is None
    with watcher.acquire("run"):
        pass


def test_what_is_done_to_the_time_of_day_does_not_matter(tmp_path, monkeypatch):
    watch = Clock()
    watcher = Leases(tmp_path, clock=watch)
    with Leases(tmp_path).acquire("run") as lease:
        assert watcher.acquire("run") is None
        for when in (0, 4e9, 1e9):
            monkeypatch.setattr(time, "time", lambda when=when: when)
            os.utime(tmp_path / "run" / "1", (when, when))
            watch.now += 10
            assert watcher.acquire("run") is None
            lease.confirm()
    before = leases.clock()
    time.sleep(0.01)
    assert 0.01 <= leases.clock() - before < 5


def test_a_storage_that_fails_costs_the_lease_and_says_why(tmp_path, monkeypatch):
    lease = Leases(tmp_path, seconds=0.3).acquire("run")

    def fail(*_):
        raise OSError("stale file handle")

    monkeypatch.setattr(lease._leases.place, "write", fail)
    time.sleep(0.4)
    with pytest.raises(LeaseLostError, match=r"no heartbeat .*stale file handle"):
        lease.check()
    lease.release()


def test_of_four_who_write_to_a_bucket_at_once_one_has_the_lease():
    bucket = Bucket()
    for name in ("a", "b", "c"):
        # All see that nobody has it before any has written.
        barrier = threading.Barrier(4)
        racing = Bucket(bucket.objects, before_write=lambda b=barrier: b.wait(5))
        workers = [in_bucket(racing, settle=0.3) for _ in range(4)]
        won = race(workers, name)
        assert len(won) == 1
        racing.before_write = lambda: None
        assert in_bucket(bucket).acquire(name) is None
        won[0]._leases.place._folder = bucket
        won[0].release()
        with in_bucket(bucket, settle=0.01).acquire(name):
            pass


def test_a_worker_whose_write_to_a_bucket_took_too_long_gives_up():
    clock = Clock()

    def stall():
        clock.now += 0.02

    assert in_bucket(Bucket(before_write=stall), settle=0.01, clock=clock).acquire("run") is None
    quicker = in_bucket(Bucket(before_write=stall), settle=0.03, clock=clock).acquire("run")
    quicker.release()


def test_bad_settings_are_told():
    with pytest.raises(CnnlabError, match="positive number of seconds, got 0"):
        Leases("somewhere", seconds=0)
    with pytest.raises(CnnlabError, match="starts with gs:// or s3://"):
        Leases("ftp://somewhere")
