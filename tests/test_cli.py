"""The command line: two ways through it that work, and every wrong turn with one clear line and the right exit code."""

import csv
import dataclasses
import io
import json
import os
import shutil

import numpy as np
import pytest
import torch

from unplant.cli import main
from unplant.cli.evaluate import most_lost
from unplant.cli.output import verdict
from unplant.data import digits, open_data, write_folder
from unplant.erasers.examination import Examination
from unplant.images import LabeledImages
from unplant.results import Findings, Scores
from unplant.runs import ModelCard, open_classifier, save_classifier

QUICK = ["--set", "steps=2", "--set", "final_steps=2", "--set", "rounds=1", "--set", "pgd_steps=1"]


def call(capsys, *arguments):
    """Exit code, standard output, standard error."""
    with pytest.raises(SystemExit) as stop:
        main([str(part) for part in arguments])
    out, err = capsys.readouterr()
    return stop.value.code, out, err


@pytest.fixture(scope="module")
def workshop(tmp_path_factory, trained):
    """A folder with a good model, a good data set and an array of bad things."""
    root = tmp_path_factory.mktemp("workshop")
    data = digits("test")
    card = ModelCard.of(trained, "small_cnn:width=8", data)
    save_classifier(root / "model.safetensors", trained, card)
    (root / "data").mkdir()
    write_folder(data.sample(200, torch.Generator().manual_seed(0)), root / "data")
    (root / "empty").mkdir()
    (root / "text").mkdir()
    for name in ("a", "b"):
        (root / "text" / name).mkdir()
        (root / "text" / name / "notes.txt").write_text("no image")
    return root


def everything_below(folder):
    return sorted((path.relative_to(folder).as_posix(), path.stat().st_size) for path in folder.rglob("*"))


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return (os.mkdir, (self.marker,))


def hostile(path, marker):
    """A torch checkpoint whose pickle runs code."""
    torch.save({"weight": torch.zeros(2), "payload": Payload(marker)}, path)


WRONG = {
    # what: (arguments after `erase`, exit code, words of the message)
    "no such model": (["{w}/nowhere.pth", "--arch", "small_cnn", "--suspect", "{w}/data"], 3, "nowhere.pth"),
    "a model that runs code": (["{w}/hostile.pth", "--arch", "small_cnn", "--suspect", "{w}/data"], 3, "hostile.pth"),
    "a model of text": (["{w}/page.pth", "--arch", "small_cnn", "--suspect", "{w}/data"], 3, "HTML"),
    "a model without an architecture": (["{w}/plain.pth", "--suspect", "{w}/data"], 2, "--arch"),
    "another architecture": (
        ["{w}/model.safetensors", "--arch", "small_cnn:width=4", "--suspect", "{w}/data"], 3, "doesn't fit"),
    "an unknown architecture": (["{w}/model.safetensors", "--arch", "vgg99", "--suspect", "{w}/data"], 2, "small_cnn"),
    "a missing architecture file": (
        ["{w}/model.safetensors", "--arch", "{w}/no.py:net", "--suspect", "{w}/data"], 2, "no.py"),
    "no such data": (["{w}/model.safetensors", "--suspect", "{w}/nowhere"], 4, "nowhere"),
    "a folder without images": (["{w}/model.safetensors", "--suspect", "{w}/empty"], 4, "no images"),
    "a folder of text files": (["{w}/model.safetensors", "--suspect", "{w}/text"], 4, "no images"),
    "one class only": (["{w}/model.safetensors", "--suspect", "{w}/data/3"], 4, "{w}/data/3"),
    "too many classes": (["{w}/model.safetensors", "--suspect", "{w}/eleven"], 3, "classes"),
    "colour images for a grey model": (["{w}/model.safetensors", "--suspect", "{w}/colour"], 3, "shape"),
    "labels that the model doesn't know": (["{w}/model.safetensors", "--suspect", "{w}/shuffled.npz"], 3, "guessing"),
    "eps in grey levels": (["{w}/model.safetensors", "--suspect", "{w}/data", "--eps", "8"], 2, "8/255"),
    "eps below 0": (["{w}/model.safetensors", "--suspect", "{w}/data", "--eps", "-0.1"], 2, "eps"),
    "eps that is no number": (["{w}/model.safetensors", "--suspect", "{w}/data", "--eps", "much"], 2, "eps"),
    "steps 0": (["{w}/model.safetensors", "--suspect", "{w}/data", "--set", "steps=0"], 2, "steps"),
    "lr nan": (["{w}/model.safetensors", "--suspect", "{w}/data", "--set", "lr=nan"], 2, "lr"),
    "an unknown setting": (["{w}/model.safetensors", "--suspect", "{w}/data", "--set", "speed=9"], 2, "speed"),
    "a setting without a value": (["{w}/model.safetensors", "--suspect", "{w}/data", "--set", "lr"], 2, "NAME=VALUE"),
    "an unknown preset": (["{w}/model.safetensors", "--suspect", "{w}/data", "--preset", "magic"], 2, "released"),
    "an unknown method": (["{w}/model.safetensors", "--suspect", "{w}/data", "--method", "magic"], 2, "pbe"),
    "a method that needs clean data": (
        ["{w}/model.safetensors", "--suspect", "{w}/data", "--method", "aft"], 2, "clean"),
    "neither suspect nor clean": (["{w}/model.safetensors"], 2, "--suspect"),
    "both suspect and clean": (
        ["{w}/model.safetensors", "--suspect", "{w}/data", "--clean", "{w}/data"], 2, "exactly one"),
    "an unknown device": (["{w}/model.safetensors", "--suspect", "{w}/data", "--device", "toaster"], 2, "toaster"),
    "an attack without test images": (
        ["{w}/model.safetensors", "--suspect", "{w}/data", "--attack", "badnets"], 2, "--test"),
    "an unknown option": (["{w}/model.safetensors", "--suspect", "{w}/data", "--quick"], 2, "--quick"),
    "an image size without a height": (
        ["{w}/model.safetensors", "--suspect", "{w}/data", "--image-size", "32"], 2, "WIDTHxHEIGHT"),
}  # fmt: skip


@pytest.fixture(scope="module")
def wrong_things(workshop):
    hostile(workshop / "hostile.pth", workshop / "it-ran")
    (workshop / "page.pth").write_text("<!DOCTYPE html><html></html>")
    torch.save({"weight": torch.zeros(2)}, workshop / "plain.pth")
    for name, count, channels in (("eleven", 11, 1), ("colour", 10, 3)):
        (workshop / name).mkdir()
        images = torch.randint(0, 256, (count * 5, channels, 16, 16), dtype=torch.uint8)
        classes = tuple(str(k) for k in range(count))
        write_folder(LabeledImages(images, torch.arange(count * 5) % count, classes), workshop / name)
    data = digits("test")
    np.savez(
        workshop / "shuffled.npz", images=data.images.numpy(), labels=np.random.default_rng(0).permutation(data.labels)
    )
    return workshop


@pytest.mark.parametrize("what", WRONG, ids=str)
def test_a_wrong_call_gives_one_line_and_its_exit_code_and_writes_nothing(what, wrong_things, capsys):
    arguments, code, words = WRONG[what]
    before = everything_below(wrong_things)
    filled = [part.format(w=wrong_things) for part in arguments]
    got, out, err = call(capsys, "erase", *filled, "-o", wrong_things / "out")
    assert (got, out) == (code, "")
    assert len(err.strip().splitlines()) == 1
    assert words.format(w=wrong_things) in err
    assert everything_below(wrong_things) == before
    assert not (wrong_things / "it-ran").exists()


def test_the_hostile_checkpoint_of_these_tests_would_run(tmp_path):
    """Without our gate the payload does run: the test above can fail."""
    hostile(tmp_path / "hostile.pth", tmp_path / "ran")
    torch.load(tmp_path / "hostile.pth", weights_only=False)
    assert (tmp_path / "ran").exists()


def test_an_existing_output_is_kept_unless_forced(workshop, tmp_path, capsys):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    arguments = ["erase", workshop / "model.safetensors", "--suspect", workshop / "data", "-o", mine, *QUICK]
    code, _, err = call(capsys, *arguments)
    assert (code, "--force" in err) == (5, True)
    code, _, err = call(capsys, *arguments, "--force")
    assert (code, "not a folder that unplant wrote" in err) == (5, True)
    assert (mine / "thesis.txt").read_text() == "years of work"


def test_output_may_not_replace_the_model(workshop, capsys):
    code, _, err = call(
        capsys, "erase", workshop / "model.safetensors", "--suspect", workshop / "data", "-o", workshop, "--force"
    )
    assert code == 2
    assert "another folder" in err
    assert (workshop / "model.safetensors").exists()


def test_output_needs_an_existing_parent(workshop, tmp_path, capsys):
    code, _, err = call(
        capsys, "erase", workshop / "model.safetensors", "--suspect", workshop / "data", "-o", tmp_path / "a" / "b"
    )
    assert code == 5
    assert "no folder" in err


def test_plant_evaluate_and_erase_work_on_files(tmp_path, capsys):
    """The researcher's way: nothing of the truth is in the folder that the defender gets."""
    planted, erased = tmp_path / "planted", tmp_path / "erased"
    fast = ["--arch", "small_cnn:width=8", "--set", "epochs=4", "--set", "batch_size=32"]
    code, out, _ = call(
        capsys, "plant", "digits:train", "--attack", "badnets", "--test", "digits:test", *fast, "-o", planted, "--json"
    )
    assert code == 0
    result = json.loads(out)
    assert result["scores"]["asr"] > 0.9
    assert result["poisoned"] == 144
    rows = list(csv.DictReader(io.StringIO((planted / "truth" / "poison.csv").read_text())))
    assert sum(int(row["poisoned"]) for row in rows) == 144
    assert all((planted / "suspect" / row["file"]).is_file() for row in rows)
    assert sorted(p.name for p in (planted / "suspect").iterdir()) == list("0123456789")

    code, out, _ = call(
        capsys, "evaluate", planted, "--test", "digits:test", "--attack", planted / "truth" / "attack.json", "--json"
    )
    assert code == 0
    assert json.loads(out)["scores"] == result["scores"]

    code, out, err = call(
        capsys, "erase", planted, "--suspect", planted / "suspect", "-o", erased, *QUICK,
        "--preset", "released", "--set", "epochs=0.1",
        "--test", "digits:test", "--attack", planted / "truth" / "attack.json", "--json",
    )  # fmt: skip
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["before"] == result["scores"]
    assert 0 <= report["after"]["acc"] <= 1
    assert json.loads((erased / "result.json").read_text()) == report
    assert json.loads((erased / "config.json").read_text())["eraser"]["steps"] == 2
    suspects = list(csv.DictReader(io.StringIO((erased / "suspects.csv").read_text())))
    assert len(suspects) == report["suspects"] == 1437 - 287
    assert all((planted / "suspect" / row["file"]).is_file() for row in suspects)
    scores = [float(row["suspicion"]) for row in suspects]
    assert scores == sorted(scores, reverse=True)

    code, out, _ = call(
        capsys, "evaluate", erased, "--test", "digits:test", "--attack", planted / "truth" / "attack.json", "--json"
    )
    assert json.loads(out)["scores"] == report["after"]


def test_the_class_that_loses_most_is_named():
    before = Scores(0.8, None, None, None, class_acc=(0.9, 0.75, None))
    after = dataclasses.replace(before, class_acc=(0.895, 0.625, None))
    told = most_lost(before, after, ("cat", "dog", "owl"))
    assert told == "The class that loses most is dog: 75.0 % of its test images are right before, 62.5 % after"
    assert most_lost(before, before, ("cat", "dog", "owl")) is None
    assert most_lost(after, before, ("cat", "dog", "owl")) is None


def test_erase_names_the_class_that_loses_most(workshop, tmp_path, capsys):
    arguments = ["erase", workshop / "model.safetensors", "--clean", workshop / "data", "-o", tmp_path / "out"]
    harsh = ["--set", "steps=3", "--set", "lr=0.5", "--set", "examination=0"]
    code, _, err = call(capsys, *arguments, "--test", "digits:train", *harsh)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    falls = [b - a for b, a in zip(result["before"]["class_acc"], result["after"]["class_acc"], strict=True)]
    assert (code, max(falls) > 0) == (0, True)
    assert f"loses most is {falls.index(max(falls))}: " in err


def test_clean_data_means_aft(workshop, tmp_path, capsys):
    out_folder = tmp_path / "out"
    code, out, err = call(
        capsys, "erase", workshop / "model.safetensors", "--clean", workshop / "data", "-o", out_folder,
        "--set", "steps=2", "--set", "clean_steps=1", "--json",
    )  # fmt: skip
    assert code == 0
    report = json.loads(out)
    assert (report["method"], report["suspects"], report["before"]) == ("aft", None, None)
    assert "keep some back" in err
    assert not (out_folder / "suspects.csv").exists()


def test_images_in_doubt_are_told_of_listed_and_shown(workshop, tmp_path, capsys, monkeypatch):
    """Where nobody is convicted, too."""

    def doubtful(split, carrying, infected, before, labels, purify, many, config):
        nobody, few = torch.zeros(len(labels), dtype=torch.bool), torch.zeros(10)
        score = torch.linspace(0, 0.49, len(labels))
        return Examination(nobody, score, before, infected, few, few, nobody, few > 0, few > 0, nobody, labels == 3)

    monkeypatch.setattr("unplant.erasers.pbe_run.cross_examine", doubtful)
    command = ["erase", workshop / "model.safetensors", "--suspect", workshop / "data"]
    code, _, said = call(capsys, *command, "-o", tmp_path / "out")
    assert code == 0
    assert "In doubt: 3. Some images there stand apart" in said
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / "in_doubt.csv").read_text())))
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert {row["label"] for row in rows} == {"3"}
    assert len(rows) == result["in_doubt"] == len(list((workshop / "data" / "3").iterdir()))
    assert [float(row["suspicion"]) for row in rows] == sorted((float(row["suspicion"]) for row in rows), reverse=True)
    assert result["findings"]["in_doubt"] == [3]
    assert (tmp_path / "out" / "in_doubt.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "out" / "suspects.png").exists()
    monkeypatch.undo()
    assert call(capsys, *command, "-o", tmp_path / "sure")[0] == 0
    assert not (tmp_path / "sure" / "in_doubt.csv").exists()


def test_two_runs_give_the_same_weights(workshop, tmp_path, capsys):
    weights = []
    for name in ("a", "b"):
        arguments = ["erase", workshop / "model.safetensors", "--suspect", workshop / "data", "-o", tmp_path / name]
        code, _, _ = call(capsys, *arguments, *QUICK, "--set", "initial=random", "--json")
        assert code == 0
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    model, _ = open_classifier(tmp_path / "a", open_data(workshop / "data"))
    before, _ = open_classifier(workshop / "model.safetensors", open_data(workshop / "data"))
    assert any(not torch.equal(before.state_dict()[key], value) for key, value in model.state_dict().items())


@pytest.fixture(scope="module")
def odd_data(workshop):
    """The good data, but one image lies under a second label too, in a class whose name would drive a terminal."""
    shutil.copytree(workshop / "data", workshop / "odd")
    first = min((workshop / "odd" / "3").iterdir())
    shutil.copy(first, workshop / "odd" / "4" / "copy\x1b[2J\udc80.png")
    return workshop / "odd"


@pytest.mark.parametrize("json_wanted", [True, False])
def test_warnings_are_lines_on_standard_error_and_in_the_result(workshop, odd_data, tmp_path, capsys, json_wanted):
    arguments = ["erase", workshop / "model.safetensors", "--suspect", odd_data, "--test", workshop / "data"]
    code, out, err = call(capsys, *arguments, "-o", tmp_path / "out", *QUICK, *(["--json"] if json_wanted else []))
    assert code == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    torn, shared = result["warnings"]
    assert "2 of 201 images lie under several labels" in torn
    assert "200 of 200 test images are in the data too" in shared
    said = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert len(said) == 2
    assert "copy\\x1b[2J\\udc80.png" in said[0]
    assert "\x1b" not in err
    assert "warning: " not in out
    if json_wanted:
        assert json.loads(out)["warnings"] == result["warnings"]


def test_good_data_and_a_good_model_give_no_warnings(workshop, tmp_path, capsys):
    arguments = ["erase", workshop / "model.safetensors", "--suspect", workshop / "data", "--test", "digits:train"]
    code, out, err = call(capsys, *arguments, "-o", tmp_path / "out", *QUICK, "--json")
    assert (code, json.loads(out)["warnings"]) == (0, [])
    assert "warning" not in err


def test_evaluate_warns_of_the_test_images(workshop, odd_data, capsys):
    arguments = ["evaluate", workshop / "model.safetensors", "--test", odd_data, "--json"]
    code, out, err = call(capsys, *arguments)
    assert code == 0
    (line,) = json.loads(out)["warnings"]
    assert "several labels" in line
    assert err.startswith("warning: 2 of 201 images")


def test_images_that_are_all_alike_are_bad_data(workshop, tmp_path, capsys):
    np.savez(tmp_path / "alike.npz", images=np.zeros((40, 16, 16), np.uint8), labels=np.arange(40) % 10)
    arguments = ["erase", workshop / "model.safetensors", "--suspect", tmp_path / "alike.npz", "-o", tmp_path / "out"]
    code, _, err = call(capsys, *arguments)
    assert (code, "all 40 images are alike" in err) == (4, True)
    assert not (tmp_path / "out").exists()


def test_a_model_that_ends_in_softmax_is_told_of_and_erased(workshop, tmp_path, trained, capsys):
    (tmp_path / "net.py").write_text(
        "from torch import nn\nfrom unplant.models import build\n"
        "def net(**size):\n    return nn.Sequential(build('small_cnn:width=8', **size), nn.Softmax(1))\n"
    )
    weights = torch.nn.Sequential(trained.backbone).state_dict()
    torch.save(weights, tmp_path / "net.pth")
    mean, std = (float(part) for part in (trained.mean, trained.std))
    model = [tmp_path / "net.pth", "--arch", f"{tmp_path / 'net.py'}:net", "--mean", mean, "--std", std]
    settings = ["--set", "steps=3", "--set", "warm_up=1", "--json"]
    code, _, err = call(capsys, "erase", *model, "--clean", workshop / "data", "-o", tmp_path / "out", *settings)
    assert code == 0
    assert "warning: the model's outputs are probabilities" in err
    from safetensors.torch import load_file

    assert load_file(tmp_path / "out" / "model.safetensors").keys() == weights.keys()


@pytest.mark.parametrize("place", ["{d}", "{d}/erased", "{d}/3", "{d}/../data/3/x", "{z}", "{z}/x"])
@pytest.mark.parametrize("command", ["erase", "erase --test", "plant", "gallery"])
def test_an_output_among_the_data_is_refused_before_anything_is_written(workshop, tmp_path, capsys, place, command):
    data = tmp_path / "data"
    shutil.copytree(workshop / "data", data)
    shutil.make_archive(str(data), "zip", data)
    source = str(data) if "{d}" in place else f"{data}.zip"
    out = place.format(d=data, z=f"{data}.zip")
    before = everything_below(tmp_path)
    model = workshop / "model.safetensors"
    arguments = {
        "erase": ["erase", model, "--suspect", source],
        "erase --test": ["erase", model, "--suspect", workshop / "data", "--test", f"folder:{source}"],
        "plant": ["plant", source, "--attack", "badnets"],
        "gallery": ["gallery", source],
    }[command]
    code, _, err = call(capsys, *arguments, "-o", out, "--force")
    assert (code, "apart from the data" in err) == (2, True)
    assert len(err.strip().splitlines()) == 1
    assert everything_below(tmp_path) == before


def test_an_output_that_holds_the_data_is_refused(workshop, tmp_path, capsys):
    shutil.copytree(workshop / "data", tmp_path / "run" / "suspect")
    (tmp_path / "run" / "result.json").write_text("{}")
    arguments = ["erase", workshop / "model.safetensors", "--suspect", tmp_path / "run" / "suspect", "--force"]
    code, _, err = call(capsys, *arguments, "-o", tmp_path / "run")
    assert (code, "apart from the data" in err) == (2, True)
    assert (tmp_path / "run" / "suspect").is_dir()


def test_no_memory_is_exit_code_7_and_leaves_nothing(workshop, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("unplant.training.augment", full)
    code, _, err = call(
        capsys, "erase", workshop / "model.safetensors", "--clean", workshop / "data", "-o", tmp_path / "out"
    )
    assert code == 7
    assert err.splitlines()[-1].startswith("unplant: not enough memory to train on 2 images at a time; use smaller")
    assert not list(tmp_path.iterdir())


def test_the_verdict_is_said_in_words():
    found = Findings(True, (1, 0), "suspects", 0.0512, 20, 0.05, 0.2, 0.99, 0.02)
    lines = verdict(found, ("ant", "bee", "cat"))
    assert lines[0] == (
        "Verdict: infected. Target labels: bee, ant; estimated poisoning rate 5.1 %, estimated ASR that is left 2.0 %."
    )
    assert "99.0 % of other images, the purified model's on 2.0 %" in lines[1]
    (counted, *_) = verdict(dataclasses.replace(found, flagged=(1234, 1)), ("ant", "bee", "cat"))
    assert counted.startswith("Verdict: infected. Target labels: bee (1,234 images), ant (1 image); estimated")
    picky = verdict(dataclasses.replace(found, sources=(2,)), ("ant", "bee", "cat"))
    assert picky[1] == f"{lines[1]} It works on images of cat alone."
    assert "Of 20 suspects" in lines[2]
    assert "5.0 % their suspicious label (at most 20.0 %)" in lines[2]
    unheard = dataclasses.replace(
        found, targets=(2,), witnesses=0, asr_left=None, trigger_before=None, trigger_after=None
    )
    assert verdict(unheard, ("ant", "bee", "cat")) == [
        "Verdict: infected. Target label: cat; estimated poisoning rate 5.1 %, estimated ASR that is left unknown."
    ]
    moving = dataclasses.replace(found, trigger_before=None, trigger_after=None)
    assert (found.asr_estimate, moving.asr_estimate, unheard.asr_estimate) == (0.02, 0.05, None)
    assert moving.to_json()["asr_estimate"] == 0.05
    (nothing,) = verdict(dataclasses.replace(found, infected=False, targets=()), ("ant", "bee", "cat"))
    assert nothing.startswith("Verdict: no backdoor found.")
    for infected in (True, False):
        *said, last = verdict(dataclasses.replace(found, infected=infected, in_doubt=(0, 2)), ("ant", "bee", "cat"))
        assert said == (lines if infected else [nothing])
        assert last.startswith(
            "In doubt: ant, cat. Some images there stand apart from their class, or hang on their label, as poisoned"
        )
    assert len(verdict(dataclasses.replace(found, targets=tuple(range(30))), [f"c{k}" for k in range(30)])[0]) < 250


def test_what_was_found_in_the_model_itself_is_said_in_other_words():
    found = Findings(True, (2,), "inversion", trigger_before=0.99, trigger_after=0.02)
    assert verdict(found, ("ant", "bee", "cat")) == [
        "Verdict: infected. Target label: cat; estimated ASR that is left 2.0 %.",
        "A trigger found in the infected model changes its mind on 99.0 % of other images, the purified "
        "model's on 2.0 %.",
    ]
    (nothing,) = verdict(Findings(False, (), "inversion"), ("ant", "bee", "cat"))
    assert nothing.startswith("Verdict: no trigger found.")
    assert "would look the same" in nothing


@pytest.mark.slow
def test_aft_names_the_target_of_an_infected_model_and_shows_the_trigger(capsys, tmp_path):
    planted = ["plant", "digits:train", "--attack", "badnets", "--target", 3, "--test", "digits:test"]
    assert call(capsys, *planted, "--set", "epochs=20", "-o", tmp_path / "infected")[0] == 0
    erase = ["erase", tmp_path / "infected", "--clean", "digits:train", "--max-images", 100, "--set", "steps=20"]
    code, out, _ = call(capsys, *erase, "--seed", 1, "-o", tmp_path / "out", "--json")
    said = json.loads(out)["findings"]
    assert (code, said["infected"], said["targets"], said["by"]) == (0, True, [3], "inversion")
    assert said["trigger_before"] >= 0.9
    assert said["poisoning_rate"] is None
    assert (tmp_path / "out" / "trigger.png").read_bytes().startswith(b"\x89PNG")


def test_methods_lists_every_setting_with_its_default(capsys):
    code, out, _ = call(capsys, "methods", "--json")
    assert code == 0
    listed = json.loads(out)
    assert {"pbe", "aft", "fine_tune"} <= set(listed["erasers"])
    assert {"badnets", "blended", "sig"} <= set(listed["attacks"])
    assert listed["erasers"]["pbe"]["settings"]["eps"]["default"] is None
    assert listed["erasers"]["pbe"]["settings"]["lr"]["default"] == 0.01
    code, out, _ = call(capsys, "methods")
    assert code == 0
    assert "attack sig" in out


def test_version_is_printed(capsys):
    import unplant

    assert call(capsys, "--version")[:2] == (0, f"{unplant.__version__}\n")
