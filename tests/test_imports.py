"""`import unplant` and `unplant --help` are quick: neither imports torch. Every public name is there."""

import json
import subprocess
import sys

import pytest

import unplant

HEAVY = ("torch", "numpy", "scipy", "sklearn", "PIL", "matplotlib", "safetensors")


def modules_after(code):
    """What a fresh interpreter has imported after that code; the last line of its output."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted(m for m in sys.modules if '.' not in m)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    return set(json.loads(done.stdout.splitlines()[-1])), done.stdout


def test_import_unplant_imports_nothing_heavy():
    found, _ = modules_after("import unplant; unplant.__version__; dir(unplant)")
    assert "unplant" in found
    assert not found & {*HEAVY, "typer", "rich", "pydantic"}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["plant", "--help"], ["erase", "--help"]])
def test_help_and_version_do_not_import_torch(arguments):
    run = f"try:\n    main({arguments!r})\nexcept SystemExit as end:\n    assert not end.code"
    code = f"from unplant.cli import main\n{run}"
    found, output = modules_after(code)
    assert not found & set(HEAVY)
    assert ("Usage" in output) == ("--help" in arguments)


@pytest.mark.parametrize("name", unplant.__all__)
def test_every_public_name_is_there(name):
    assert getattr(unplant, name) is not None
    assert name in dir(unplant)


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'purify'"):
        _ = unplant.purify


def test_importing_everything_leaves_seeds_threads_and_default_device():
    code = """
import random, torch
before = torch.get_rng_state(), torch.get_num_threads(), random.getstate(), torch.get_default_dtype()
import unplant.attacks, unplant.planting, unplant.evaluation, unplant.runs, unplant.data, unplant.files
assert torch.equal(before[0], torch.get_rng_state())
assert before[1:] == (torch.get_num_threads(), random.getstate(), torch.get_default_dtype())
"""
    found, _ = modules_after(code)
    assert "torch" in found
