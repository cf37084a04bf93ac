"""`unplant inspect` on honest, hostile and foreign files, and limits as options."""

import json
import os
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from unplant.cli import main
from unplant.data import digits
from unplant.files import load_checkpoint
from unplant.runs import ModelCard, save_classifier

pytestmark = pytest.mark.timeout(120)


def call(capsys, *arguments):
    """Exit code, standard output, standard error."""
    with pytest.raises(SystemExit) as stop:
        main([str(part) for part in arguments])
    out, err = capsys.readouterr()
    return stop.value.code, out, err


def report(capsys, *arguments):
    """Exit code, the JSON object, standard error; the text for people must say the same verdict."""
    code, out, err = call(capsys, "inspect", *arguments, "--json")
    plain, text, plain_err = call(capsys, "inspect", *arguments)
    found = json.loads(out)
    assert (plain, plain_err) == (code, err)
    assert ("verdict     loads\n" in text) == found["loads"]
    assert all(line.isprintable() for line in text.splitlines())
    return code, found, err


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return (os.mkdir, (self.marker,))


def test_a_file_that_unplant_wrote(tmp_path, trained, capsys):
    path = tmp_path / "model.safetensors"
    save_classifier(path, trained, ModelCard.of(trained, "small_cnn:width=8", digits("test")))
    code, found, err = report(capsys, tmp_path)
    assert (code, err, found["loads"], found["cause"], found["format"]) == (0, "", True, None, "safetensors")
    state = trained.backbone.state_dict()
    assert found["tensors"] == len(state)
    assert found["numbers"] == sum(value.numel() for value in state.values())
    assert sum(found["dtypes"].values()) == len(state)
    assert found["guessed_classes"] == 10
    assert found["card"] == {"arch": "small_cnn:width=8", "classes": list("0123456789")}
    assert found["bytes"] == path.stat().st_size
    assert found["checksums"] == "none in this format"


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
def test_a_training_state(tmp_path, capsys, new_format):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 43))
    path = tmp_path / "a.pth"
    torch.save({"net": net.state_dict(), "acc": np.float64(1)}, path, _use_new_zipfile_serialization=new_format)
    code, found, _ = report(capsys, path)
    assert (code, found["loads"]) == (0, True)
    assert found["first"][0] == {"key": "0.weight", "dtype": "float32", "shape": [4, 3, 3, 3]}
    assert (found["guessed_classes"], found["candidates"]) == (43, ["net"])
    assert any("scalar" in name for name in found["names"]["harmless"])
    assert "unknown" not in found["names"]
    assert "torch.FloatStorage" in found["names"]["tensor"]
    assert found["checksums"] == ("all right" if new_format else "none in this format")


def test_a_file_that_runs_code_is_shown_and_its_tensors_are_saved_without_running_it(tmp_path, capsys):
    path, marker, out = tmp_path / "a.pth", tmp_path / "owned", tmp_path / "out.safetensors"
    torch.save({"state_dict": {"w": torch.arange(6.0).view(2, 3)}, "x": Payload(marker)}, path)
    code, found, err = report(capsys, path)
    assert (code, found["loads"]) == (3, False)
    assert found["names"]["runs code"] == [f"{os.mkdir.__module__}.mkdir"]
    assert "known to run code" in found["cause"]
    assert err == f"unplant: {found['cause']}\n"
    assert found["tensors"] == 1, "it is described although it is refused"
    code, text, err = call(capsys, "inspect", path, "--weights", out)
    assert (code, err) == (0, "")
    assert f"written     {out}" in text
    assert torch.equal(load_checkpoint(out).weights["w"], torch.arange(6.0).view(2, 3))
    assert not marker.exists()
    torch.load(path, weights_only=False)  # before-check: the payload is alive
    assert marker.is_dir()
    code, _, err = call(capsys, "inspect", path, "--weights", out)
    assert (code, "exists already" in err) == (5, True)
    code, _, err = call(capsys, "inspect", path, "--weights", tmp_path / "out.pth")
    assert (code, ".safetensors" in err or "safetensors file" in err) == (2, True)
    assert not (tmp_path / "out.pth").exists()


def test_one_of_several_models_is_chosen_by_key(tmp_path, capsys):
    path, out = tmp_path / "a.pth", tmp_path / "out.safetensors"
    torch.save({"net": {"w": torch.zeros(2)}, "model": nn.Linear(3, 1)}, path)
    code, found, err = report(capsys, path)
    assert (code, found["candidates"], found["tensors"]) == (3, ["net", "model"], 0)
    assert "several models (net, model)" in found["problem"]
    assert "tensors     none: " in call(capsys, "inspect", path)[1]
    code, _, err = call(capsys, "inspect", path, "--weights", out)
    assert (code, "several models (net, model)" in err, out.exists()) == (3, True, False)
    code, found, _ = report(capsys, path, "--key", "model")
    assert [one["key"] for one in found["first"]] == ["weight", "bias"]
    assert call(capsys, "inspect", path, "--weights", out, "--key", "model")[0] == 0
    assert load_checkpoint(out).weights["weight"].shape == (1, 3)


def torchscript(path):
    with zipfile.ZipFile(path, "w") as new:
        new.writestr("a/code/__torch__.py", "")
        new.writestr("a/data.pkl", b"N.")


def with_nan(path):
    torch.save({"w": torch.tensor([1.0, float("nan")])}, path)


def with_bad_card(path):
    path.write_bytes(
        safetensors.torch.save({"w": torch.zeros(1)}, {"unplant": json.dumps({"arch": 3, "classes": "\x1b"})})
    )


def flipped(path):
    torch.save({"w": torch.full((100,), 7.0)}, path)
    content = bytearray(path.read_bytes())
    content[content.index(torch.full((3,), 7.0).numpy().tobytes())] ^= 1
    path.write_bytes(content)


def write(content):
    return lambda path: path.write_bytes(content)


BAD = {
    "missing": (lambda path: None, "no model file", "unknown"),
    "empty": (write(b""), "empty", "unknown"),
    "html": (write(b"<!DOCTYPE html>"), "HTML", "unknown"),
    "lfs": (write(b"version https://git-lfs.github.com/spec/v1"), "git lfs pull", "unknown"),
    "onnx": (write(b"\x08\x07pytorch"), "ONNX", "unknown"),
    "random": (write(np.random.default_rng(0).bytes(999)), "not a model file", "unknown"),
    "fifo": (os.mkfifo, "not a regular file", "unknown"),
    "a folder": (lambda path: path.mkdir(), "folder without", "unknown"),
    "torchscript": (torchscript, "TorchScript", "torch zip"),
    "half a zip": (write(b"PK\3\4" + bytes(500)), "damaged", "torch zip"),
    "half a pickle": (write(b"\x80\2}"), "damaged", "torch legacy"),
    "safetensors without JSON": (write(struct.pack("<Q", 9) + b"{not JSON"), "damaged safetensors", "safetensors"),
    "NaN": (with_nan, "NaN or infinite weights in w", "torch zip"),
    "a card that can't be": (with_bad_card, "damaged metadata", "safetensors"),
    "a flipped bit": (flipped, "checksum", "torch zip"),
}


@pytest.mark.parametrize("what", BAD)
def test_any_bad_file_gives_a_report_and_one_line(what, tmp_path, capsys):
    make, cause, kind = BAD[what]
    path = tmp_path / "a.pth"
    make(path)
    code, found, err = report(capsys, path)
    assert (code, found["loads"], found["format"]) == (3, False, kind)
    assert cause in found["cause"]
    assert err == f"unplant: {found['cause']}\n"
    code, _, err = call(capsys, "inspect", path, "--weights", tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").exists() == (code == 0) == (what in ("NaN", "a card that can't be"))


def test_what_a_file_says_cannot_control_the_terminal(tmp_path, capsys):
    nasty = "\x1b[2J\x9b\u202e\n" + "x" * 300
    torch.save({nasty: torch.zeros(2, 2)}, tmp_path / "key.pth")
    with zipfile.ZipFile(tmp_path / "name.pth", "w") as new:
        new.writestr("a/data.pkl", b"\x80\2c\x1b[2J\n\x1b[2J\n.")
    card = {"arch": nasty, "classes": [nasty, "b"]}
    content = safetensors.torch.save({"w": torch.zeros(1)}, {"unplant": json.dumps(card)})
    (tmp_path / "card.safetensors").write_bytes(content)
    for path in sorted(tmp_path.iterdir()):
        for arguments in ([], ["--json"]):
            _, out, err = call(capsys, "inspect", path, *arguments)
            assert (out + err).replace("\n", "").isprintable()
            assert "\\x1b[2J" in out.replace("\\\\", "\\")


def test_limits_are_options(tmp_path, capsys):
    path = tmp_path / "a.pth"
    torch.save({f"w{k}": torch.zeros(1) for k in range(30)}, path)
    assert report(capsys, path)[0] == 0
    code, found, _ = report(capsys, path, "--limit", "tensors=29")
    assert (code, "--limit tensors=N" in found["cause"]) == (3, True)
    assert report(capsys, path, "--limit", "tensors=3e1", "--limit", "model_bytes=8e9")[0] == 0
    for wrong, words in (
        ("tensor=3", "tensors"),
        ("tensors", "NAME=VALUE"),
        ("tensors=0", "greater"),
        ("tensors=x", "tensors"),
    ):
        code, out, err = call(capsys, "inspect", path, "--limit", wrong)
        assert (code, out, words in err, len(err.splitlines())) == (2, "", True, 1)


@pytest.mark.parametrize("command", ["erase", "evaluate", "plant", "gallery"])
def test_every_command_that_reads_files_takes_limits(command, tmp_path, capsys):
    torch.save({f"w{k}": torch.zeros(1) for k in range(30)}, tmp_path / "a.pth")
    arguments = {
        "erase": [tmp_path / "a.pth", "--suspect", "digits", "--arch", "small_cnn", "-o", tmp_path / "out"],
        "evaluate": [tmp_path / "a.pth", "--test", "digits", "--arch", "small_cnn"],
        "plant": ["digits", "--attack", "badnets", "--poison-only", "-o", tmp_path / "out"],
        "gallery": ["digits", "--attack", "badnets", "--max-images", "10", "-o", tmp_path / "out"],
    }[command]
    code, _, err = call(capsys, command, *arguments, "--limit", "speed=1")
    assert (code, "there is no setting 'speed'" in err) == (2, True)
    if command in ("erase", "evaluate"):
        code, _, err = call(capsys, command, *arguments, "--limit", "tensors=29")
        assert (code, "--limit tensors=N" in err) == (3, True)
        code, _, err = call(capsys, command, *arguments)
        assert (code, "doesn't fit" in err) == (3, True)


def test_methods_lists_the_limits(capsys):
    listed = json.loads(call(capsys, "methods", "--json")[1])["limits"]
    assert listed["tensors"] == {"default": 100_000, "meaning": "tensors in a model file"}
    assert "pickle_opcodes" in call(capsys, "methods")[1]


def test_help_is_quick():
    run = "from unplant.cli import main\ntry:\n    main(['inspect', '--help'])\nexcept SystemExit:\n    pass\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{run}import sys\nassert 'torch' not in sys.modules"], check=True, capture_output=True
    )
    assert b"--weights" in done.stdout
