"""What a run leaves behind, and that it is written whole."""

import errno
import json
import os
import struct

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from cnnlab import config, record
from cnnlab.types import CnnlabError, CnnlabWarning


@pytest.fixture
def made():
    return config.base(data="digits")


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    record.write_atomic(file, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        record.write_atomic(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_json_has_one_line_an_entry_and_no_nan():
    text = record.dump_json({"b": [1, 2], "a": {"x": 0.1}})
    assert text == '{\n "a": {"x": 0.1},\n "b": [1, 2]\n}\n'
    assert json.loads(text) == {"b": [1, 2], "a": {"x": 0.1}}
    with pytest.raises(ValueError, match="JSON compliant"):
        record.dump_json({"a": float("nan")})


def test_rewinding_forgets_what_came_after(tmp_path, made):
    with record.RunFolder(tmp_path, made) as folder:
        for step in (5, 10, 15):
            folder.log({"step": step, "train/loss": 0.1 * step}, seconds=float(step))
        folder.rewind(10)
        assert [line["step"] for line in folder.metrics()] == [5, 10]
        seconds = (tmp_path / "seconds.jsonl").read_text().splitlines()
        assert [json.loads(line)["seconds"] for line in seconds] == [5.0, 10.0]
        folder.rewind(0)
        assert folder.metrics() == []


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path, made):
    with record.RunFolder(tmp_path, made) as folder:
        (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
        with pytest.raises(CnnlabError, match="line 2 is damaged"):
            folder.metrics()


def test_what_a_killed_process_had_begun_to_write_is_removed(tmp_path, made):
    (tmp_path / ".result.json.123.tmp").write_text("{")
    with record.RunFolder(tmp_path, made):
        assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "config.json"]


def test_events_are_those_that_were_logged_however_often_a_run_goes_on(tmp_path, made):
    """Within one second, too, by which tensorboardX names its files."""
    for step in (1, 2):
        with record.RunFolder(tmp_path, made) as folder:
            folder.log({"step": step, "train/loss": 0.5 / step}, seconds=0.0)
    files = sorted((tmp_path / "events").iterdir())
    assert [file.name[:11] for file in files] == ["events00000", "events00001"]
    for step, file in enumerate(files, 1):
        _, begin, logged = events(file.read_bytes())
        assert (begin.step, begin.session_log.status) == (step, begin.session_log.START)
        assert logged.step == step
        (value,) = logged.summary.value
        assert (value.tag, value.simple_value) == ("train/loss", 0.5 / step)


def events(content):
    """TFRecords: length, its checksum, the event, its checksum."""
    found = []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        found.append(event_pb2.Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    return found


def test_a_failed_write_names_the_file(tmp_path, made, monkeypatch):
    with record.RunFolder(tmp_path, made) as folder:
        (tmp_path / "metrics.jsonl").mkdir()
        with pytest.raises(OSError, match=r"metrics\.jsonl"):
            folder.log({"step": 1}, seconds=0.0)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*a\.json"):
        record.write_atomic(tmp_path / "a.json", "new")


def test_the_lock_goes_with_its_holder(tmp_path, made):
    holder = f"process {os.getpid()}"
    with record.RunFolder(tmp_path, made), pytest.raises(CnnlabError, match=holder):
        record.RunFolder(tmp_path, made)
    with record.RunFolder(tmp_path, made):
        pass


def test_a_refused_folder_is_not_left_locked(tmp_path, made):
    with record.RunFolder(tmp_path, made):
        pass
    other = config.override(made, {"optim.learning_rate": 0.3}, "t")
    for _ in range(2):
        with pytest.raises(CnnlabError, match=r"another config: optim\.learning_rate \(0\.1 there"):
            record.RunFolder(tmp_path, other)


def test_results_of_another_schema_are_refused(tmp_path):
    assert record.read_result(tmp_path) is None
    (tmp_path / "result.json").write_text('{"schema": 99}')
    with pytest.raises(CnnlabError, match="expected schema 1, got 99"):
        record.read_result(tmp_path)
    (tmp_path / "result.json").write_text('{"schema": 1, "ro')
    with pytest.raises(CnnlabError, match="is damaged"):
        record.read_result(tmp_path)


def test_the_hash_of_parameters_sees_names_shapes_and_every_bit():
    tree = {"a": np.zeros((2, 3), np.float32), "b": {"c": np.ones(4, np.float32)}}
    base = record.parameters_sha256(tree)
    assert record.parameters_sha256({"b": tree["b"], "a": tree["a"]}) == base
    flipped = np.nextafter(np.float32(1), np.float32(2)) * np.ones(4, np.float32)
    for other in (
        {"x": tree["a"], "b": tree["b"]},
        {"a": tree["a"].T, "b": tree["b"]},
        {"a": tree["a"], "b": {"c": flipped}},
    ):
        assert record.parameters_sha256(other) != base


def test_the_code_version_names_the_sources():
    version = record.code_version()
    assert version["version"] == "0.1.0"
    assert len(version["digest"]) == 12
    assert version["commit"] is None or len(version["commit"]) >= 7


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(record.fcntl, "flock", none)
    with (
        pytest.warns(CnnlabWarning, match="has no locks"),
        record.RunFolder(tmp_path / "run", config.base()),
    ):
        pass
