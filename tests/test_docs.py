"""What the documents say is so: commands exist, links lead somewhere, the Python example runs."""

import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import unplant
from unplant.classifier import Classifier
from unplant.cli import app as application
from unplant.erasers import erasers

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
COMMANDS = sorted(
    {
        line.strip().removeprefix("    ").split("#")[0].strip()
        for page in PAGES
        for line in re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8")).splitlines()
        if re.match(r"(    |\t)?unplant [a-z]+ ", line)
    }
)


def options(command):
    """The option names of a subcommand, from its declaration."""
    function = getattr(application, command)
    names = {"--help", "--debug"}
    for name, parameter in inspect.signature(function).parameters.items():
        # In an annotation, typer keeps the first name of an option in `default`.
        declared = [
            text for item in parameter.annotation.__metadata__ for text in (item.default, *(item.param_decls or ()))
        ]
        declared = [part for text in declared if isinstance(text, str) for part in text.split("/")]
        names |= {text for text in declared if text.startswith("-")} or {f"--{name.replace('_', '-')}"}
    return names


def test_there_are_commands_to_check():
    assert len(COMMANDS) >= 5


@pytest.mark.parametrize("line", COMMANDS, ids=str)
def test_a_command_in_the_documents_has_only_options_that_exist(line):
    _, command, *words = shlex.split(line)
    used = {word.split("=")[0] for word in words if word.startswith("-")}
    assert used <= options(command)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_repository_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_python_example_of_the_readme_runs(trained, digits_test, monkeypatch):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    quick = erasers["pbe"].configure(steps=1, final_steps=1, rounds=1, pgd_steps=1)
    full = unplant.erase
    monkeypatch.setattr(unplant, "erase", lambda *data: full(*data, config=quick), raising=False)
    names = {"model": trained, "train_data": digits_test.sample(100, torch.Generator().manual_seed(0))}
    exec(code, names)
    assert isinstance(names["result"].model, Classifier)


def test_the_page_on_adding_an_attack_is_true(tmp_path):
    """One file and one import line, in a copy of the source: it is registered, usable, and tested."""
    page = (ROOT / "docs" / "adding-an-attack.md").read_text(encoding="utf-8")
    (path,) = re.findall(r"^`(src/\S+\.py)`:$", page, flags=re.MULTILINE)
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    for part in ("src", "tests", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, tmp_path / part)
    (tmp_path / path).write_text(code, encoding="utf-8")
    names = tmp_path / "src/unplant/attacks/__init__.py"
    text = names.read_text(encoding="utf-8")
    names.write_text(text.replace("    ssba,\n", "    ssba,\n    stripes,\n"), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "src"), "OMP_NUM_THREADS": "1"}

    def run(*command):
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    assert "attack stripes, controls the data; presets: faint" in run("unplant", "methods")
    (spec,) = re.findall(r"--attack (stripes:\S+)", page)
    run("unplant", "plant", "digits:train", "--attack", spec, "--poison-only", "-o", "poisoned")
    assert (tmp_path / "poisoned/suspect/0").is_dir()
    (words,) = re.findall(r"^    python -m (pytest .*)$", page, flags=re.MULTILINE)
    passed = re.search(r"(\d+) passed", run(*words.split(), "-q", "-p", "no:cacheprovider"))
    assert passed is not None
    assert int(passed[1]) >= 30, "the conformance suite didn't pick the attack up"
