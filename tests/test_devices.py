"""Which device and precision are taken, and what is said of one that is slow."""

import warnings

import pytest
import torch

import unplant
from unplant.cli import main
from unplant.data import digits
from unplant.devices import check_precision, pick_device, pick_precision
from unplant.erasers import erasers
from unplant.errors import UnplantWarning, UsageError

CPU = torch.device("cpu")
QUICK = {"steps": 2, "rounds": 1, "final_steps": 2, "pgd_steps": 1}


@pytest.fixture(params=["AVX2", "AVX512"])
def processor(request, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: request.param)
    return request.param


def test_precisions_are_what_they_are_called_and_auto_is_exact_on_a_processor():
    assert [pick_precision(name, CPU) for name in ("auto", "float32", "bfloat16")] == ["float32", "float32", "bfloat16"]
    with pytest.raises(UsageError, match="float16"):
        pick_precision("float16", CPU)


def test_a_device_that_does_not_exist_is_refused_in_one_line():
    assert pick_device("cpu") == CPU
    with pytest.raises(UsageError, match="--device cpu") as refused:
        pick_device("toaster")
    assert "\n" not in str(refused.value)


def test_only_a_processor_that_emulates_bfloat16_is_warned_of(processor):
    said = check_precision("bfloat16", CPU)
    assert [("bfloat16" in line) for line in said] == ([True] if processor == "AVX2" else [])
    assert check_precision("float32", CPU) == []
    assert check_precision("bfloat16", torch.device("cuda")) == []


def test_python_tells_it_as_a_warning(processor, trained):
    data = digits("test").sample(60, torch.Generator().manual_seed(0))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UnplantWarning)
        unplant.erase(trained, data, config=erasers["pbe"].configure(precision="bfloat16", **QUICK))
    told = [str(warning.message) for warning in said if "emulates bfloat16" in str(warning.message)]
    assert len(told) == (processor == "AVX2")


def test_the_command_line_tells_it_before_it_trains(processor, tmp_path, capsys):
    arguments = [
        "plant",
        "digits:test",
        "--attack",
        "badnets",
        "--arch",
        "small_cnn:width=4",
        "--set",
        "epochs=0.1",
        "--precision",
        "bfloat16",
    ]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "-o", str(tmp_path / "planted")])
    assert stop.value.code == 0
    assert ("warning: this processor only emulates bfloat16" in capsys.readouterr().err) == (processor == "AVX2")
