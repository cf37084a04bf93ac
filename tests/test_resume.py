"""Runs of the command line that are killed, interrupted, locked out or short of disk, at any instant.

`UNPLANT_SOAK_KILLS` sets the number of kills: 12 by default, 200 in `make soak`.
"""

import errno
import fcntl
import json
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest

from unplant.cli import main
from unplant.data import digits
from unplant.errors import WriteError
from unplant.files import OutputFolder
from unplant.planting import TrainConfig, parse_attack, plant
from unplant.runs import ModelCard, save_classifier

KILLS = int(os.environ.get("UNPLANT_SOAK_KILLS", "12"))
PATIENCE = 120

# Forks of a process that has only imported what a run needs: a second a run instead of five.
forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["unplant.cli.erase", "unplant.cli.plant"])


def command(model, out, *more):
    quick = ["--set", "steps=25", "--set", "final_steps=12", "--set", "rounds=1", "--set", "batch_size=64"]
    if "--preset" in more:
        quick = quick[4:]
    data = ["--suspect", str(model / "suspect.npz"), "--max-images", "500"]
    return ["erase", str(model), *data, "-o", str(out), "--threads", "1", *quick, *more]


def child(arguments, errors):
    """In a process of its own."""
    descriptor = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 2)
    os.dup2(descriptor, 1)
    main(arguments)


def start(arguments, folder):
    process = forks.Process(target=child, args=(arguments, str(folder / "stderr")))
    process.start()
    return process


def finish(process):
    process.join(PATIENCE)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


@pytest.fixture(scope="module")
def infected(tmp_path_factory):
    """A folder with an infected model, in which PBE finds something, and its training set."""
    import numpy as np

    root = tmp_path_factory.mktemp("infected")
    config = TrainConfig(epochs=8, batch_size=32)
    planted = plant(digits("train"), parse_attack("badnets"), "small_cnn:width=8", config, seed=0)
    data = planted.training_set.data
    np.savez(root / "suspect.npz", images=data.images.numpy(), labels=data.labels.numpy())
    save_classifier(root / "model.safetensors", planted.model, ModelCard.of(planted.model, "small_cnn:width=8", data))
    return root


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(infected, tmp_path_factory):
    """What an uninterrupted run writes, and how long it takes."""
    folder = tmp_path_factory.mktemp("whole")
    begin = time.monotonic()
    assert finish(start(command(infected, folder / "out"), folder)) == 0, (folder / "stderr").read_text()
    seconds = time.monotonic() - begin
    written = contents(folder / "out")
    assert json.loads(written["result.json"])["findings"]["infected"], "the run returned early: too little to interrupt"
    assert not any(name.startswith(".") for name in written)
    return written, seconds


def test_two_runs_write_the_same_bytes(infected, whole, tmp_path):
    assert finish(start(command(infected, tmp_path / "out"), tmp_path)) == 0
    assert contents(tmp_path / "out") == whole[0]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_runs_killed_at_random_instants_end_with_the_same_bytes(infected, whole, tmp_path):
    """SIGKILL at random instants, each followed by a run that goes on; until `KILLS` were done."""
    written, seconds = whole
    before, dice = contents(infected), random.Random(0)
    kills = resumed = 0
    while kills < KILLS:
        process = start(command(infected, tmp_path / "out", "--save-every", "0.1"), tmp_path)
        process.join(dice.uniform(0, seconds))
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
        if (tmp_path / "out").exists():  # moved there in the last instant, or finished
            assert contents(tmp_path / "out").items() >= written.items()
            OutputFolder(tmp_path / "out", force=True).__exit__(None, KeyboardInterrupt(), None)
            assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "stderr"]
            for path in sorted((tmp_path / "out").rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            (tmp_path / "out").rmdir()
        else:
            resumed += any(tmp_path.glob(".out.part/.journal/*.page"))
    assert finish(start(command(infected, tmp_path / "out"), tmp_path)) == 0, (tmp_path / "stderr").read_text()
    assert contents(tmp_path / "out") == written
    assert resumed >= KILLS // 4, "hardly any kill left anything to go on from"
    assert contents(infected) == before, "inputs were changed"


def wait_for_a_page(folder, process):
    until = time.monotonic() + PATIENCE
    while not any(folder.glob(".out.part/.journal/*.page")):
        assert time.monotonic() < until
        assert process.exitcode is None, (folder / "stderr").read_text()
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("number", "times"),
    [
        (signal.SIGTERM, 1),
        pytest.param(signal.SIGINT, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 2, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 2, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_says_so_and_goes_on(infected, whole, tmp_path, number, times):
    process = start(command(infected, tmp_path / "out", "--save-every", "0"), tmp_path)
    wait_for_a_page(tmp_path, process)
    for _ in range(times):
        os.kill(process.pid, number)
    assert finish(process) == 130
    assert not (tmp_path / "out").exists()
    if times == 1:
        said = (tmp_path / "stderr").read_text()
        assert said == "unplant: interrupted; the same command goes on from here\n"
    assert finish(start(command(infected, tmp_path / "out"), tmp_path)) == 0
    assert "going on from where" in (tmp_path / "stderr").read_text()
    assert contents(tmp_path / "out") == whole[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "stderr"]


def test_an_interrupted_planting_goes_on_to_the_same_bytes(tmp_path):
    def planting(out):
        fast = ["--arch", "small_cnn:width=8", "--set", "epochs=3", "--set", "batch_size=32", "--threads", "1"]
        return ["plant", "digits:train", "--attack", "badnets", *fast, "--save-every", "0", "-o", str(out)]

    assert finish(start(planting(tmp_path / "whole"), tmp_path)) == 0, (tmp_path / "stderr").read_text()
    process = start(planting(tmp_path / "out"), tmp_path)
    wait_for_a_page(tmp_path, process)
    os.kill(process.pid, signal.SIGTERM)
    assert finish(process) == 130
    assert finish(start(planting(tmp_path / "out"), tmp_path)) == 0
    assert "going on from where" in (tmp_path / "stderr").read_text()
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_an_interrupt_before_anything_is_done_leaves_nothing(infected, tmp_path):
    process = start(command(infected, tmp_path / "out", "--save-every", "1000"), tmp_path)
    until = time.monotonic() + PATIENCE
    while not (tmp_path / ".out.part" / ".journal" / "lock").exists():
        assert time.monotonic() < until
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGINT)
    assert finish(process) == 130
    assert "unplant: interrupted" in (tmp_path / "stderr").read_text()
    assert not (tmp_path / "out").exists()
    rest = {path.name for path in tmp_path.rglob("*")} - {"stderr"}
    assert not {name for name in rest if not name.endswith((".part", ".page"))} - {".journal", "lock"}


def test_two_runs_on_one_output_are_told_apart(infected, whole, tmp_path, capsys):
    process = start(command(infected, tmp_path / "out"), tmp_path)
    until = time.monotonic() + PATIENCE
    while not (tmp_path / ".out.part" / ".journal" / "lock").exists():
        assert time.monotonic() < until
        time.sleep(0.001)
    with pytest.raises(SystemExit) as stop:
        main(command(infected, tmp_path / "out", "--force"))
    assert stop.value.code == 5
    assert f"another run is writing {tmp_path / 'out'}" in capsys.readouterr().err
    assert finish(process) == 0, "the first run was disturbed"
    assert contents(tmp_path / "out") == whole[0]


def test_a_lock_ends_with_its_process(tmp_path):
    """Not with its file: what a killed run leaves can be taken over."""
    folder = OutputFolder(tmp_path / "out")
    (folder.journal / "a.page").write_bytes(b"page")
    (folder.part / "half.json").write_text("{")
    copy = os.open(folder.journal / "lock", os.O_RDWR)
    with pytest.raises(BlockingIOError):
        fcntl.flock(copy, fcntl.LOCK_EX | fcntl.LOCK_NB)  # before-check: it is held
    os.close(copy)
    os.close(folder.lock)  # as the end of the process would
    again = OutputFolder(tmp_path / "out")
    assert again.resumed
    assert sorted(path.name for path in again.part.rglob("*")) == [".journal", "a.page", "lock"]
    again.__exit__(None, ValueError("x"), None)


def test_a_folder_that_somebody_else_put_there_is_not_used(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".out.part").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WriteError, match="belongs to somebody else"):
        OutputFolder(tmp_path / "out")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_read_only_place_is_told_of_before_anything_is_done(tmp_path, monkeypatch):
    def denied(self, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", denied)  # root may write everywhere
    with pytest.raises(WriteError, match=f"can't write {tmp_path / 'out'}: Permission denied"):
        OutputFolder(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_kill_between_the_last_two_steps_loses_neither_folder(tmp_path):
    for name, text in ((".out.old", "old"), (".out.part", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(text)
    folder = OutputFolder(tmp_path / "out", force=True)
    assert (tmp_path / "out" / "result.json").read_text() == "old"
    (folder.part / "result.json").write_text("newer")
    folder.__exit__(None, None, None)
    assert contents(tmp_path) == {"out/result.json": b"newer"}


OLD = {"result.json": b"{}", "model.safetensors": b"old weights"}


def put(folder, files):
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)


class FullDisk:
    """From the k-th sync or rename on, once or for good, there is no space left."""

    def __init__(self, monkeypatch, fails):
        self.calls, self.fails = 0, fails
        for owner, name in ((os, "fsync"), (Path, "replace"), (Path, "rename"), (tempfile, "mkstemp")):
            monkeypatch.setattr(owner, name, self.wrap(getattr(owner, name)))

    def wrap(self, function):
        def guarded(*arguments, **settings):
            self.calls += 1
            if self.fails(self.calls):
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*arguments, **settings)

        return guarded


def run_here(arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return stop.value.code


@pytest.mark.slow
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "for good"])
def test_a_full_disk_at_any_write_loses_no_old_file_and_no_work(infected, tmp_path, capsys, lasting):
    simple = ("--force", "--preset", "released", "--set", "steps=3", "--set", "epochs=1")
    assert run_here(command(infected, tmp_path / "undisturbed", *simple)) == 0
    expected, out = contents(tmp_path / "undisturbed"), tmp_path / "out"
    place = failed = 0
    while True:
        place += 1
        if contents(out) != OLD:
            shutil.rmtree(out, ignore_errors=True)
            put(out, OLD)
        with pytest.MonkeyPatch.context() as patch:
            disk = FullDisk(patch, lambda call, k=place: call >= k if lasting else call == k)
            code = run_here(command(infected, out, *simple))
        said = capsys.readouterr().err
        if disk.calls < place:
            break
        if code == 0:  # all was written, only the folder couldn't be synced
            assert contents(out) == expected
            continue
        failed += 1
        assert code == 5, said
        assert said.splitlines()[-1].startswith("unplant: can't write")
        assert "No space left" in said
        assert contents(out if out.exists() else tmp_path / ".out.old") == OLD
    assert failed > 10, "too few writes were seen"
    assert contents(out) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "undisturbed"]
