"""1,769 hostile model files: nothing in them runs, one line says what is refused, and nothing on the disk changes."""

import io
import os
import pickle
import pickletools
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hostile
import numpy as np
import pytest
import safetensors.torch
import torch
from hostile import Hostile

from unplant.cli import main
from unplant.cli.app import app
from unplant.data import digits, write_folder
from unplant.errors import ModelFileError
from unplant.files import load_checkpoint
from unplant.models import build

pytestmark = pytest.mark.timeout(120)

SECONDS = 2.0
"""Processor time that one file may take."""

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Watch:
    """Python's audit events while a file is loaded; an audit hook can't be taken away, so there is one."""

    def __init__(self) -> None:
        self.seen: list[str] | None = None
        self.path = ""
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple) -> None:
        if self.seen is None:
            return
        # All that an honest file causes, once everything is imported: it is opened for reading.
        if event == "open" and str(arguments[0]) == self.path and not (arguments[2] & WRITING):
            return
        self.seen.append(f"{event} {str(arguments)[:80]}")

    @contextmanager
    def over(self, path: Path) -> Iterator[list[str]]:
        self.seen, self.path = [], str(path)
        try:
            yield self.seen
        finally:
            self.seen = None


watch = Watch()


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Path:
    """A folder for the files; `workshop / "marker"` is what the payloads make."""
    folder = tmp_path_factory.mktemp("hostile")
    honest = hostile.weights()
    safetensors.torch.save_file(honest, folder / "honest.safetensors")
    (folder / "honest.pth").write_bytes(hostile.saved(honest))
    (folder / "legacy.pth").write_bytes(hostile.saved(honest, legacy=True))
    (folder / "packed.pth").write_bytes(hostile.zipped({"a/data.pkl": b"."}, zipfile.ZIP_LZMA))
    (folder / "text.pth").write_bytes(hostile.as_zip(hostile.glob("posix", "mkdir")))
    for _ in range(2):  # once for what is imported at the first use
        for path in sorted(folder.iterdir()):
            with watch.over(path) as seen:
                try:
                    assert torch.equal(load_checkpoint(path).weights["w"], honest["w"])
                except ModelFileError:
                    assert path.stem in {"packed", "text"}
    assert seen == [], "an honest file causes other events than its opening: the watch is too strict"
    return folder


@pytest.fixture(scope="module")
def corpus(workshop) -> dict[str, list[Hostile]]:
    marker = str(workshop / "marker")
    return {family: list(maker(marker)) for family, maker in hostile.FAMILIES.items()}


def test_the_corpus_is_large_and_without_repetition(corpus):
    files = [file for family in corpus.values() for file in family]
    assert len(files) == 1769  # the number in the title and the documentation
    assert len({file.name for file in files}) == len(files)
    assert len({(file.content, file.suffix) for file in files}) >= 0.98 * len(files)
    assert len(corpus["generated"]) == 200


def test_every_opcode_of_pickle_is_in_the_corpus():
    fragments = hostile.opcodes("/marker")
    assert {*fragments, "STOP"} == {opcode.name for opcode in pickletools.opcodes}
    for name, fragment in fragments.items():
        assert name in {opcode.name for opcode, _, _ in pickletools.genops(fragment + b".")}


def test_before_check_plain_unpickling_runs_nearly_all_live_payloads(workshop, corpus):
    """Else the test below could not fail. In a process of its own: payloads break interpreters."""
    folder, marker = workshop / "live", workshop / "marker"
    folder.mkdir()
    names = {}
    for file in (file for family in corpus.values() for file in family if file.live):
        path = folder / f"{'tar' if 'tar' in file.name else 'file'}{len(names)}{file.suffix}"
        names[path.name] = file.name
        path.write_bytes(file.content)
    command = [sys.executable, "-W", "ignore", hostile.__file__, str(folder), str(marker)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=workshop, timeout=100)
    alive = done.stdout.rpartition("ALIVE ")[2].split()
    dead = [names[name] for name in names if name not in alive]
    assert len(alive) >= 900, f"{done.stderr[-500:]}; dead: {dead}"
    assert len(alive) >= 0.95 * len(names), dead  # some callables leave Python with its later versions


def test_before_check_the_watch_sees_what_payloads_do(workshop):
    """Each of these events would be noticed, also those that make no marker."""
    marker = workshop / "marker"
    gadgets = hostile.gadgets(str(marker))
    expected = {
        "os.system": "os.system", "subprocess.run": "subprocess.Popen", "pathlib.Path.write_text": "open",
        "os.symlink": "os.symlink", "os.makedirs": "os.mkdir", "ctypes.CDLL": "ctypes.dlopen", "os.spawnv": "os.fork",
        "builtins.compile": "compile", "builtins.eval": "exec", "shutil.copyfile": "shutil.copyfile",
        "CodeType and FunctionType": "code.__new__", "marshal and FunctionType": "marshal.loads",
    }  # fmt: skip
    for name, event in expected.items():
        with watch.over(workshop / "honest.pth") as seen:
            pickle.loads(hostile.as_bare(gadgets[name]))
        assert hostile.remove(marker), name
        events = {entry.split()[0] for entry in seen}
        assert {event, "pickle.find_class"} <= events, name


def problem(path: Path, file: Hostile, marker: Path) -> str | None:
    """What is wrong with how a file is treated, or None."""
    refused = ""
    started = time.process_time()
    with watch.over(path) as seen:
        try:
            loaded = load_checkpoint(path)
        except ModelFileError as error:
            refused = str(error)
        except Exception as error:
            return f"raises {error!r:.200}"
    took = time.process_time() - started
    if hostile.remove(marker):
        return "RAN: the marker is there"
    if seen:
        return f"events: {seen[:3]}"
    if path.read_bytes() != file.content:
        return "the file has changed"
    if took > SECONDS:
        return f"took {took:.1f} s"
    if refused:
        if str(path) not in refused or not refused.isprintable() or len(refused.replace(str(path), "")) > 600:
            return f"bad message: {refused!r}"
        return None
    if not file.may_load:
        return f"is loaded: {list(loaded.weights)[:5]}"
    if not all(value.device.type == "cpu" and value.layout == torch.strided for value in loaded.weights.values()):
        return "is loaded with tensors that aren't dense and on the CPU"
    return None


@pytest.mark.parametrize("family", hostile.FAMILIES)
def test_hostile_files_run_nothing_and_are_refused_in_one_line(workshop, corpus, family):
    problems, marker = {}, workshop / "marker"
    before = sorted(workshop.iterdir())
    for file in corpus[family]:
        path = workshop / f"model{file.suffix}"
        path.write_bytes(file.content)
        wrong = problem(path, file, marker)
        path.unlink()
        if wrong is not None:
            problems[file.name] = wrong
    assert problems == {}, f"{len(problems)} of {len(corpus[family])}"
    assert sorted(workshop.iterdir()) == before, "something was written"


LIARS = {file.name: file for file in hostile.liars()}


@pytest.mark.parametrize("name", LIARS)
def test_lies_neither_spoil_the_message_nor_get_through(workshop, name):
    path = workshop / "liar.pth"
    path.write_bytes(LIARS[name].content)
    assert problem(path, LIARS[name], workshop / "marker") is None


LOAD = """
import sys
from pathlib import Path
from unplant.errors import ModelFileError
from unplant.files import load_checkpoint
for path in map(Path, sys.argv[1:]):
    print(path.stem, flush=True)
    try:
        load_checkpoint(path)
    except ModelFileError:
        pass
"""


def last_words(folder: Path, names: list[str], timeout: float, cpu_seconds: int = 100) -> tuple[int, str]:
    """Exit code and last name of a process that loads these deep files: a full C stack ends it without a traceback.

    A signal ends it, too, after so many seconds of work, however busy the machine is.
    """
    deep, paths = hostile.depths(), [folder / f"{name}.pth" for name in names]
    for path in paths:
        path.write_bytes(deep[path.stem])
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_CPU, ({cpu_seconds}, {cpu_seconds}))\n"
    command = [sys.executable, "-W", "error", "-c", limit + LOAD, *map(str, paths)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=timeout)
    return done.returncode, done.stdout.splitlines()[-1]


def test_deep_nesting_does_not_end_the_process(tmp_path):
    names = [name for name in hostile.depths(1) if "key" not in name or "storage" in name]
    assert len(names) == 6
    assert last_words(tmp_path, names, timeout=100) == (0, names[-1])


@pytest.mark.parametrize("name", ["tuple as a key", "doubled tuple as a key"])
def test_a_deep_key_does_not_end_the_process_or_hang_it(tmp_path, name):
    assert last_words(tmp_path, [name], timeout=60, cpu_seconds=15) == (0, name)


def test_hostile_files_stop_the_command_line_with_exit_code_3(workshop, corpus, capsys):
    folder = workshop / "command"
    (folder / "data").mkdir(parents=True)
    write_folder(digits("test").sample(40, torch.Generator().manual_seed(0)), folder / "data")
    files = [file for family in corpus.values() for file in family if not file.may_load]
    for file in files[::45]:
        path = folder / f"model{file.suffix}"
        path.write_bytes(file.content)
        before = sorted(folder.rglob("*"))
        with pytest.raises(SystemExit) as stop:
            main(
                [
                    "erase",
                    str(path),
                    "--arch",
                    "small_cnn",
                    "--suspect",
                    str(folder / "data"),
                    "-o",
                    str(folder / "out"),
                ]
            )
        message = capsys.readouterr().err.strip()
        assert stop.value.code == 3, f"{file.name}: {message}"
        assert str(path) in message
        assert "Traceback" not in message
        assert path.read_bytes() == file.content
        assert not hostile.remove(workshop / "marker"), file.name
        assert sorted(folder.rglob("*")) == before, f"{file.name}: something was written"
        path.unlink()


HAS_INSPECT = any(command.callback and command.callback.__name__ == "inspect" for command in app.registered_commands)


@pytest.mark.skipif(not HAS_INSPECT, reason="there is no unplant inspect yet")
def test_inspecting_hostile_files_runs_nothing_and_writes_only_what_it_is_told_to(workshop, corpus, capsys):
    folder = workshop / "inspected"
    folder.mkdir()
    out, codes = folder / "out.safetensors", set()
    for file in [file for family in corpus.values() for file in family][::20]:
        path = folder / f"model{file.suffix or '.bin'}"
        path.write_bytes(file.content)
        try:
            main(["inspect", str(path), "--weights", str(out)])
        except SystemExit as stop:
            codes.add(stop.code)
        text = "".join(capsys.readouterr())
        assert "Traceback" not in text, file.name
        assert all(line.isprintable() for line in text.splitlines()), file.name
        assert path.read_bytes() == file.content
        assert not hostile.remove(workshop / "marker"), file.name
        if out.exists():  # a safetensors file of dense tensors, whatever it was taken from
            assert all(value.layout == torch.strided for value in safetensors.torch.load_file(out).values())
        assert {item.name for item in folder.iterdir()} <= {path.name, out.name}, file.name
        out.unlink(missing_ok=True)
        path.unlink()
    assert codes <= {0, 3}


def test_a_thousand_of_a_thousand_flipped_bits_are_detected(tmp_path):
    """Plain torch loads such files without a word: that is the before-check."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = dict(build("small_cnn:width=2", num_classes=3, channels=1).state_dict())
    path = tmp_path / "flipped.pth"
    content = hostile.saved(state)
    path.write_bytes(content)
    assert load_checkpoint(path).weights.keys() == state.keys()
    places = []
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for entry in archive.infolist():
            if "/data/" in entry.filename:
                head = content[entry.header_offset : entry.header_offset + 30]
                start = (
                    entry.header_offset
                    + 30
                    + int.from_bytes(head[26:28], "little")
                    + int.from_bytes(head[28:30], "little")
                )
                assert content[start : start + entry.file_size] == archive.read(entry)
                places.extend(range(start, start + entry.file_size))
    assert len(places) == sum(value.numel() * value.element_size() for value in state.values())
    random = np.random.default_rng(0)
    refused = taken = 0
    for count in range(1000):
        damaged = bytearray(content)
        damaged[places[random.integers(len(places))]] ^= 1 << int(random.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(ModelFileError) as caught:
            load_checkpoint(path)
        assert str(path) in str(caught.value)
        refused += 1
        if count % 50 == 0:
            loaded = torch.load(path, weights_only=True)
            taken += any(loaded[key].numpy().tobytes() != value.numpy().tobytes() for key, value in state.items())
    assert (refused, taken) == (1000, 20)
