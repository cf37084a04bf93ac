"""Untrusted model files, and writing that never leaves half a file."""

import errno
import io
import json
import os
import pickle
import struct
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from file_helpers import F32, flipped, nested, npz, rezipped, safetensors_with, saved
from torch import nn

from unplant.classifier import Classifier
from unplant.errors import ModelFileError, NumericalError, UnplantError, UsageError, WriteError
from unplant.files import OutputFolder, check_fits_weights, load_checkpoint, load_into, save_weights, write_atomically
from unplant.models import build
from unplant.runs import ModelCard, open_classifier, save_classifier

pytestmark = pytest.mark.timeout(60)  # a FIFO or a bomb must not hang


def net(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build("small_cnn:width=2", num_classes=3, channels=1)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture
def weights():
    return dict(net().state_dict())


# Writing.


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_file_is_written_and_replaced_whole(tmp_path):
    path = tmp_path / "result.json"
    write_atomically(path, "erste Fassung: ä\n")
    assert path.read_text(encoding="utf-8") == "erste Fassung: ä\n"
    write_atomically(path, b"\x00second")
    assert path.read_bytes() == b"\x00second"
    assert os.listdir(tmp_path) == ["result.json"]  # noqa: PTH208


def test_names_that_are_no_unicode_are_escaped_not_a_crash(tmp_path):
    write_atomically(tmp_path / "names.json", json.dumps("caf\udce9", ensure_ascii=False))
    assert json.loads((tmp_path / "names.json").read_text(encoding="utf-8")) == "caf\udce9"


@pytest.mark.parametrize("broken", ["os.fsync", "os.fdopen", "pathlib.Path.replace", "pathlib.Path.chmod"])
def test_the_old_file_stays_when_writing_fails(tmp_path, monkeypatch, broken):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"old")
    monkeypatch.setattr(broken, no_space)
    with pytest.raises(WriteError, match=f"can't write {path}: No space left"):
        write_atomically(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path], "a temporary file was left behind"


def test_an_interrupt_leaves_no_temporary_file(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a", "new")
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_or_a_folder_in_the_way_is_a_write_error(tmp_path):
    (tmp_path / "taken").mkdir()
    for path in (tmp_path / "no" / "a", tmp_path / "taken"):
        with pytest.raises(WriteError, match=f"can't write {path}"):
            write_atomically(path, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def filled(path, text, result=True):
    path.mkdir()
    (path / "model.safetensors").write_text(text)
    if result:
        (path / "result.json").write_text("{}")


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_output_folder_appears_at_the_end_only(tmp_path):
    out = tmp_path / "out"
    with OutputFolder(out) as part:
        (part / "result.json").write_text("{}")
        assert not out.exists()
    assert contents(tmp_path) == {"out/result.json": b"{}"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("existing", [False, True])
def test_a_failed_run_leaves_what_was_there(tmp_path, error, existing):
    out = tmp_path / "out"
    if existing:
        filled(out, "old")
    before = contents(tmp_path)

    def run():
        with OutputFolder(out, force=existing) as part:
            (part / "model.safetensors").write_text("half")
            raise error

    with pytest.raises(error):
        run()
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if existing else [])


def test_a_full_disk_inside_the_run_is_a_write_error(tmp_path):
    with pytest.raises(WriteError, match="No space left"), OutputFolder(tmp_path / "out"):
        no_space()
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_needs_force_and_is_replaced_whole(tmp_path):
    out = tmp_path / "out"
    filled(out, "old")
    (out / "more").write_text("left over")
    with pytest.raises(WriteError, match=r"exists already.*--force"):
        OutputFolder(out)
    with OutputFolder(out, force=True) as part:
        (part / "result.json").write_text("new")
    assert contents(tmp_path) == {"out/result.json": b"new"}


@pytest.mark.parametrize("kind", ["foreign folder", "file", "link to a run", "broken link"])
def test_force_replaces_nothing_that_unplant_did_not_write(tmp_path, kind):
    out = tmp_path / "out"
    if kind == "foreign folder":
        filled(out, "thesis", result=False)
    elif kind == "file":
        out.write_text("thesis")
    else:
        filled(tmp_path / "run", "old")
        out.symlink_to(tmp_path / ("run" if kind == "link to a run" else "nothing"))
    before = contents(tmp_path)
    with pytest.raises(WriteError, match="not a folder that unplant wrote"):
        OutputFolder(out, force=True)
    assert contents(tmp_path) == before


def test_force_takes_an_empty_folder(tmp_path):
    (tmp_path / "out").mkdir()
    with OutputFolder(tmp_path / "out", force=True) as part:
        (part / "result.json").write_text("{}")
    assert contents(tmp_path) == {"out/result.json": b"{}"}


def test_the_old_folder_comes_back_when_the_last_step_fails(tmp_path, monkeypatch):
    out, rename = tmp_path / "out", Path.rename

    def fails(self, target):
        if self.suffix == ".part":
            no_space()
        return rename(self, target)

    filled(out, "old")
    before = contents(tmp_path)
    folder = OutputFolder(out, force=True)
    (folder.part / "result.json").write_text("new")
    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(WriteError, match="No space left"):
        folder.__exit__(None, None, None)
    assert contents(tmp_path) == before


def test_no_parent_folder_is_told_at_once(tmp_path):
    with pytest.raises(WriteError, match="there is no folder"):
        OutputFolder(tmp_path / "a" / "b")


# Honest checkpoints.


def test_safetensors_round_trip_bit_for_bit_with_metadata(tmp_path, weights):
    path, card = tmp_path / "model.safetensors", {"arch": "small_cnn:width=2", "classes": ["ä", "b"], "mean": [0.1]}
    save_weights(path, net(), card)
    loaded = load_checkpoint(path)
    assert same(loaded.weights, weights)
    assert loaded.metadata == card
    assert load_checkpoint(tmp_path).path == path, "a folder means the model.safetensors in it"


@pytest.mark.parametrize(
    "name", ["a.pth", "models.pth", "code.pt", "archive_format.pth", "constants.pkl", "ein netz.bin"]
)
@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
def test_a_pickled_state_dict_loads_under_any_file_name(tmp_path, weights, name, new_format):
    path = tmp_path / name
    torch.save(weights, path, _use_new_zipfile_serialization=new_format)
    assert same(load_checkpoint(path).weights, weights)


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "wrap", ["net", "state_dict", "model", "model_state_dict", "model/state_dict", "module", "net+module"]
)
def test_wrappers_and_data_parallel_prefixes_are_taken_off(tmp_path, weights, wrap, new_format):
    inner = {f"module.{key}": value for key, value in weights.items()} if wrap.endswith("module") else weights
    for key in reversed([part for part in wrap.replace("+module", "").split("/") if part != "module"]):
        inner = {key: inner, "epoch": 3, "acc": 0.5, "name": "run"}
    torch.save(inner, tmp_path / "a.pth", _use_new_zipfile_serialization=new_format)
    assert same(load_checkpoint(tmp_path / "a.pth").weights, weights)


def test_one_key_alone_under_module_is_no_prefix(tmp_path, weights):
    mixed = {"module.a": torch.zeros(1), "b": torch.zeros(1)}
    torch.save(mixed, tmp_path / "a.pth")
    assert load_checkpoint(tmp_path / "a.pth").weights.keys() == mixed.keys()


def test_a_checkpoint_saved_on_a_gpu_loads_on_the_cpu(tmp_path, weights):
    torch.save(weights, tmp_path / "cpu.pth")
    with zipfile.ZipFile(tmp_path / "cpu.pth") as old, zipfile.ZipFile(tmp_path / "cuda.pth", "w") as new:
        for name in old.namelist():
            cpu, cuda = (b"X" + struct.pack("<I", len(place)) + place for place in (b"cpu", b"cuda:0"))
            content = old.read(name)
            new.writestr(name, content.replace(cpu, cuda) if name.endswith("data.pkl") else content)
    loaded = load_checkpoint(tmp_path / "cuda.pth").weights
    assert b"cuda:0" in (tmp_path / "cuda.pth").read_bytes()
    assert same(loaded, weights)


def test_loading_into_a_network_copies_every_weight(tmp_path):
    donor, network = net(1), net(2)
    assert not same(donor.state_dict(), network.state_dict())
    torch.save(donor.state_dict(), tmp_path / "a.pth")
    load_into(network, load_checkpoint(tmp_path / "a.pth"))
    assert same(donor.state_dict(), network.state_dict())


def test_half_precision_weights_are_widened_and_old_batch_norms_fit(tmp_path, weights):
    old = {key: value.half() for key, value in weights.items() if not key.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "a.pth")
    network = net(2)
    load_into(network, load_checkpoint(tmp_path / "a.pth"))
    assert all(torch.equal(network.state_dict()[key], value.float()) for key, value in old.items())
    assert network[0].weight.dtype == torch.float32


# Bad and hostile files: each maker writes one at `path`; the error is one line with the path in it.


def torchscript():
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), stream)
    return stream.getvalue()


STATE = dict(net().state_dict())
ZIP, LEGACY = saved(STATE), saved(STATE, new_format=False)

CARD = {"w": F32, "__metadata__": {"unplant": "[" * 100_000}}

BAD_CONTENT = {
    "empty": (b"", "is empty"),
    "random bytes": (np.random.default_rng(0).bytes(5000), "not a model file"),
    "one byte": (b"\x80", "damaged or no torch checkpoint"),
    "html": (b"<!DOCTYPE html><html><body>404</body></html>", "HTML page"),
    "html without doctype": (b"<html><body>404</body></html>", "HTML page"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(500), "HDF5"),
    "onnx": (b"\x08\x07\x12\x07pytorch" + bytes(500), "ONNX"),
    "npy": (b"\x93NUMPY\x01\x00" + bytes(500), "NumPy"),
    "npz": (npz(), "no torch checkpoint"),
    "truncated zip": (ZIP[: len(ZIP) // 2], "damaged"),
    "zip without its end": (ZIP[:-10], "damaged"),
    "truncated legacy": (LEGACY[: len(LEGACY) // 2], "damaged"),
    "legacy without its end": (LEGACY[:-10], "damaged"),
    "legacy header alone": (LEGACY[:40], "damaged"),
    "flipped bit": (flipped(ZIP), "checksum of .*data/0 is wrong"),
    "deflated": (rezipped(ZIP, zipfile.ZIP_DEFLATED), "bomb"),
    "missing data": (rezipped(ZIP, drop=("archive/data/0",)), "damaged"),
    "torchscript": (torchscript(), "TorchScript"),
    "torchscript names": (rezipped(ZIP, extra=("archive/code/__torch__.py",)), "TorchScript"),
    "exported program": (rezipped(ZIP, extra=("archive/models/model.json",)), "exported program"),
    "exported program format": (rezipped(ZIP, extra=("archive/archive_format",)), "exported program"),
    "plain pickle": (pickle.dumps({"w": 1}), "damaged or no torch checkpoint"),
    "whole module": (saved(nn.Linear(2, 2)), "names torch.nn.modules.linear.Linear"),
    "whole module, legacy": (saved(nn.Linear(2, 2), new_format=False), "names torch.nn.modules.linear.Linear"),
    "stride bomb": (saved({"w": torch.zeros(1).expand(2**40)}), "bomb"),
    "stride bomb, legacy": (saved({"w": torch.zeros(1).expand(2**40)}, new_format=False), "bomb"),
    "meta tensor": (saved({"w": torch.empty(2**44, device="meta")}), "device meta|meta"),
    "nested list": (saved({"w": nested(60)}), "no weights that unplant recognises; its keys are: w"),
    "huge number for a key": (saved({10**5000: 1}), "no weights|damaged"),
    "a list": (saved([torch.zeros(2)]), "holds a list"),
    "a tensor": (saved(torch.zeros(2)), "holds a Tensor"),
    "no weights": (saved({"epoch": 3}), "its keys are: epoch"),
    "nothing": (saved({}), "its keys are: none"),
    "numbered keys": (saved({0: torch.zeros(2)}), "keys that aren't text"),
    "two wrappers": (saved({"net": STATE, "state_dict": STATE}), r"several models \(net, state_dict\)"),
    "deep wrappers": (saved({"net": {"net": {"net": {"net": {"net": STATE}}}}}), "more than four times"),
    "sparse": (saved({"w": torch.eye(3).to_sparse()}), "sparse"),
    "complex": (saved({"w": torch.zeros(2, dtype=torch.complex64)}), "complex"),
    "safetensors: header longer than the file": (struct.pack("<Q", 2**60) + b"{}" + bytes(99), "not a model file"),
    "safetensors: no JSON": (safetensors_with(b"{not json" + b" " * 50), "damaged safetensors"),
    "safetensors: offsets beyond the file": (
        safetensors_with({"w": {**F32, "shape": [2**40], "data_offsets": [0, 2**42]}}),
        "damaged safetensors",
    ),
    "safetensors: shape beyond the bytes": (safetensors_with({"w": {**F32, "shape": [2**62]}}), "damaged safetensors"),
    "safetensors: overlapping": (safetensors_with({"v": F32, "w": F32}), "damaged safetensors"),
    "safetensors: unknown dtype": (safetensors_with({"w": {**F32, "dtype": "PICKLE"}}), "damaged safetensors"),
    "safetensors: nested card": (safetensors_with(CARD), "damaged safetensors"),
    "safetensors: truncated": (safetensors.torch.save(STATE)[:-3], "damaged safetensors"),
    "safetensors: no tensors": (safetensors_with({}, b""), "no weights"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_CONTENT)
def test_a_bad_file_is_refused_in_one_line_with_its_path(tmp_path, kind):
    content, message = BAD_CONTENT[kind]
    path = tmp_path / "path.pth"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=message) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert "weights_only" not in str(caught.value), "torch's advice to turn safety off must not get through"
    assert path.read_bytes() == content


def test_torch_itself_takes_what_is_refused_here(tmp_path):
    """Before-check: without the file policy these would have been loaded."""
    for kind in ("flipped bit", "stride bomb", "deflated"):
        loaded = torch.load(io.BytesIO(BAD_CONTENT[kind][0]), weights_only=True)
        assert loaded.keys()


def as_folder(path):
    path.mkdir()


def as_loop(path):
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "there is no model file"),
        (as_folder, "folder without a model.safetensors"),
        (os.mkfifo, "not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
        (as_loop, "can't read"),
        (lambda path: path.symlink_to("nothing"), "there is no model file"),
    ],
    ids=["missing", "folder", "fifo", "device", "loop", "dangling link"],
)
def test_what_is_no_file_is_refused_in_one_line_with_its_path(tmp_path, make, message):
    path = tmp_path / "a.pth"
    make(path)
    with pytest.raises(ModelFileError, match=message) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unreadable_file_is_refused(tmp_path, monkeypatch):
    def denied(self, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    path = tmp_path / "a.pth"
    path.write_bytes(ZIP)
    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(ModelFileError, match=f"can't read {path}: Permission denied"):
        load_checkpoint(path)


def test_a_huge_file_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "a.pth"
    with path.open("wb") as file:
        file.truncate(9 * 2**30)  # sparse: takes no space
    with pytest.raises(ModelFileError, match="more than the limit"):
        load_checkpoint(path)


# Nothing in a file is ever run.

watching: list[str] | None = None


def watch(event, _):
    if watching is not None and event in {"os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.mkdir"}:
        watching.append(event)


sys.addaudithook(watch)


class Payload:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("place", ["value", "key's neighbour", "alone"])
@pytest.mark.parametrize("function", ["os.system", "os.mkdir", "eval"])
def test_a_payload_is_not_run(tmp_path, new_format, place, function):
    global watching
    marker = tmp_path / "owned"
    evil = {
        "os.system": Payload(os.system, f"mkdir {marker}"),
        "os.mkdir": Payload(os.mkdir, str(marker)),
        "eval": Payload(eval, f"__import__('os').mkdir({str(marker)!r})"),
    }[function]
    value = {"value": {"net": {"w": evil}}, "key's neighbour": {"net": STATE, "x": evil}, "alone": evil}[place]
    path = tmp_path / "a.pth"
    path.write_bytes(saved(value, new_format))
    torch.load(path, weights_only=False)  # before-check: the payload is alive, and the watch sees it
    assert marker.is_dir()
    marker.rmdir()
    watching = []
    try:
        with pytest.raises(ModelFileError) as caught:
            load_checkpoint(path)
        seen = watching
    finally:
        watching = None
    assert not marker.exists()
    assert seen == []
    assert str(path) in str(caught.value)
    assert function.rpartition(".")[2] in str(caught.value), "the culprit is named"
    assert "known to run code" in str(caught.value)


def test_the_watch_sees_what_it_watches(tmp_path):
    global watching
    watching = []
    try:
        os.mkdir(tmp_path / "x")  # noqa: PTH102
        os.system("true")
        assert watching == ["os.mkdir", "os.system"]
    finally:
        watching = None


# Weights and networks that don't fit.


def test_keys_that_do_not_fit_are_named_ten_at_most(tmp_path, weights):
    wrong = {f"other.{k}": torch.zeros(1) for k in range(13)}
    wrong["0.weight"] = torch.zeros(2, 3, 3, 3)
    torch.save(wrong, tmp_path / "a.pth")
    with pytest.raises(ModelFileError) as caught:
        check_fits_weights(net(), load_checkpoint(tmp_path / "a.pth"))
    text = str(caught.value)
    assert str(tmp_path / "a.pth") in text
    assert "\n" not in text
    missing = [key for key in weights if key != "0.weight" and not key.endswith("num_batches_tracked")]
    assert f"missing: {', '.join(missing[:10])} and {len(missing) - 10} more" in text
    assert f"left over: {', '.join(list(wrong)[:10])} and 3 more" in text
    assert "mis-shaped: 0.weight is (2, 3, 3, 3) in the file, (2, 1, 3, 3) in the network" in text


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_one_wrong_key_is_enough_and_nothing_is_loaded(tmp_path, weights, change):
    if change == "missing":
        del weights["4.running_var"]
    elif change == "extra":
        weights["5.weight"] = torch.zeros(1)
    else:
        weights["16.bias"] = torch.zeros(43)
    torch.save(weights, tmp_path / "a.pth")
    network, before = net(2), dict(net(2).state_dict())
    with pytest.raises(
        ModelFileError, match={"missing": "4.running_var", "extra": "5.weight", "shape": "16.bias"}[change]
    ):
        load_into(network, load_checkpoint(tmp_path / "a.pth"))
    assert same(dict(network.state_dict()), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_neither_loaded_nor_saved(tmp_path, weights, value):
    weights["16.weight"][1, 2] = value
    torch.save(weights, tmp_path / "a.pth")
    with pytest.raises(ModelFileError, match=r"NaN or infinite weights in 16\.weight") as caught:
        load_into(net(), load_checkpoint(tmp_path / "a.pth"))
    assert str(tmp_path / "a.pth") in str(caught.value)
    broken = net()
    broken.load_state_dict(weights)
    with pytest.raises(NumericalError, match=r"16\.weight"):
        save_weights(tmp_path / "b.safetensors", broken, {})
    assert not (tmp_path / "b.safetensors").exists()


# Model cards: files lie.


def test_a_classifier_comes_back_from_its_file_alone(tmp_path, trained, digits_test):
    path = tmp_path / "model.safetensors"
    mean, std = (tuple(value.flatten().tolist()) for value in (trained.mean, trained.std))
    card = ModelCard(arch="small_cnn:width=8", classes=digits_test.classes, mean=mean, std=std, shape=digits_test.shape)
    save_classifier(path, trained, card)
    model, read = open_classifier(path, digits_test)
    assert read == card
    assert not model.training
    assert same(dict(model.state_dict()), dict(trained.state_dict()))
    with torch.no_grad():
        difference = model(digits_test.pixels(slice(0, 50))) - trained(digits_test.pixels(slice(0, 50)))
    assert difference.abs().max() < 1e-4  # the trained one is in channels_last: convolutions add up in another order


def test_the_callers_words_go_before_the_files(tmp_path, trained, digits_test):
    torch.save(trained.backbone.state_dict(), tmp_path / "a.pth")
    with pytest.raises(UsageError, match="needs --arch"):
        open_classifier(tmp_path / "a.pth", digits_test)
    given = {"arch": "small_cnn:width=8", "mean": (0.25,), "std": (0.5,)}
    model, card = open_classifier(tmp_path / "a.pth", digits_test, **given)
    assert isinstance(model, Classifier)
    assert (model.mean.item(), model.std.item()) == (0.25, 0.5)
    assert (card.arch, card.classes) == ("small_cnn:width=8", digits_test.classes)
    with pytest.raises(ModelFileError, match="mis-shaped"):
        open_classifier(tmp_path / "a.pth", digits_test, arch="small_cnn:width=9")


def with_card(path, trained, card):
    state = {key: value.contiguous() for key, value in trained.backbone.state_dict().items()}
    text = card if isinstance(card, str) else json.dumps(card)
    path.write_bytes(safetensors.torch.save(state, metadata={"unplant": text}))
    return path


@pytest.mark.parametrize("spelling", ["{}:net", "{}", "./{}:net", "small_cnn:{}:net", "{}:net:width=8"])
def test_a_python_file_named_in_a_file_is_never_run(tmp_path, trained, digits_test, spelling):
    marker, source = tmp_path / "owned", tmp_path / "evil.py"
    source.write_text(
        f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
        "from unplant.models.small_cnn import small_cnn as net\n"
    )
    path = with_card(tmp_path / "a.safetensors", trained, {"arch": spelling.format(source)})
    with pytest.raises(UnplantError) as caught:
        open_classifier(path, digits_test)
    assert not marker.exists()
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelFileError, match="mis-shaped"):  # before-check: named by the user, it is run
        open_classifier(path, digits_test, arch=f"{source}:net")
    assert marker.exists()


def test_a_card_cannot_make_us_allocate_a_larger_net_than_its_file_holds(tmp_path, trained, digits_test, monkeypatch):
    places = []

    def watched(*arguments, **settings):
        places.append(torch.empty(0).device.type)
        return build(*arguments, **settings)

    monkeypatch.setattr("unplant.runs.build", watched)
    path = with_card(tmp_path / "a.safetensors", trained, {"arch": "preact_resnet18:width=256"})
    with pytest.raises(ModelFileError, match="doesn't fit the architecture"):
        open_classifier(path, digits_test)
    assert places == ["meta"]


@pytest.mark.parametrize(
    "card",
    [
        {"arch": "preact_resnet18:width=100000"},
        {"arch": "small_cnn:width=1000000000"},
        {"arch": "small_cnn:width=99999999999999999999"},
        {"arch": "small_cnn:width=0"},
        {"arch": "small_cnn:width=2.5"},
        {"arch": "small_cnn:depth=4"},
        {"arch": "os.system"},
        {"arch": 3},
        {"arch": ["small_cnn"]},
        {"arch": "small_cnn:width=8", "std": [0.0]},
        {"arch": "small_cnn:width=8", "std": [-1.0]},
        {"arch": "small_cnn:width=8", "mean": [float("nan")]},
        {"arch": "small_cnn:width=8", "mean": [0.1, 0.2, 0.3]},
        {"arch": "small_cnn:width=8", "mean": []},
        {"arch": "small_cnn:width=8", "classes": ["a"] * 3},
        {"arch": "small_cnn:width=8", "classes": [[1]]},
        {"arch": "small_cnn:width=8", "shape": [-1, 2, 3]},
        {"arch": "small_cnn:width=8", "unknown": 1},
        {"arch": "small_cnn:width=8", "self": 1},
        "not json",
        "[1, 2]",
        "NaN",
    ],
    ids=str,
)
def test_a_hostile_card_is_one_line(tmp_path, trained, digits_test, card):
    path = with_card(tmp_path / "a.safetensors", trained, card)
    with pytest.raises(UnplantError) as caught:
        open_classifier(path, digits_test)
    assert "\n" not in str(caught.value)


def test_a_folder_that_appears_during_the_run_is_kept_and_so_are_the_results(tmp_path):
    target = tmp_path / "out"
    folder = OutputFolder(target)
    part = folder.__enter__()
    (part / "result.json").write_text("{}")
    target.mkdir()
    (target / "notes.txt").write_text("somebody else's")
    with pytest.raises(WriteError, match="appeared meanwhile") as caught:
        folder.__exit__(None, None, None)
    assert (target / "notes.txt").read_text() == "somebody else's"
    assert not part.exists()
    (results,) = (path for path in tmp_path.iterdir() if path != target)
    assert contents(results) == {"result.json": b"{}"}
    assert str(results) in str(caught.value)
