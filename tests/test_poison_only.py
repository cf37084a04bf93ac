"""`plant` without a model, with the cache, and with each recipe; `gallery`; attack.json from strangers."""

import base64
import csv
import html.parser
import io
import itertools
import json
import os
import re

import pytest
import torch
from PIL import Image
from test_cli import call, everything_below

from unplant import gallery, pictures
from unplant.attacks import parse_attack, triggers
from unplant.data import digits, read_folder, write_folder
from unplant.errors import UsageError
from unplant.images import LabeledImages
from unplant.planting import TrainConfig, poison_only

FAST = ["--arch", "small_cnn:width=4", "--set", "epochs=0.1", "--set", "batch_size=50"]
TRAINING_ATTACKS = sorted(name for name in triggers if triggers[name].access == "training")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder with 150 digits in `data`."""
    root = tmp_path_factory.mktemp("source")
    (root / "data").mkdir()
    write_folder(digits("test").sample(150, torch.Generator().manual_seed(0)), root / "data")
    return root


def manifest(folder):
    return list(csv.DictReader(io.StringIO((folder / "truth" / "poison.csv").read_text())))


# --poison-only.


@pytest.mark.parametrize(
    ("attack", "options", "recipe"),
    [
        ("badnets", [], {}),
        ("blended:alpha=0.3", ["--target", "3", "--rate", "1/20"], {"target": 3, "poisoning_rate": 0.05}),
        ("adaptive_blend", ["--all-to-all"], {"label_map": "all-to-all"}),
        ("adaptive_patch", ["--cover-rate", "0.3"], {"cover_rate": 0.3}),
        ("tact", ["--rate", "0.05", "--sources", "4,5"], {"poisoning_rate": 0.05, "sources": (4, 5)}),
        ("sig", ["--clean-label", "--rate", "0.05"], {"clean_label": True, "poisoning_rate": 0.05}),
        ("ctrl", ["--rate", "0.05"], {"clean_label": True, "poisoning_rate": 0.05}),
        ("ctrl", ["--dirty-label"], {"clean_label": False}),
        ("label_consistent:surrogate_epochs=0.1,steps=1", [], {"clean_label": True, "poisoning_rate": 0.05}),
    ],
)
def test_a_poisoned_tree_and_its_manifest_agree_file_by_file(source, tmp_path, capsys, attack, options, recipe):
    out = tmp_path / "out"
    code, printed, err = call(
        capsys, "plant", source / "data", "--attack", attack, *options, "--poison-only", "-o", out, "--json"
    )
    assert (code, err) == (0, "")
    result = json.loads(printed)
    assert result == json.loads((out / "result.json").read_text())
    assert sorted(path.name for path in out.iterdir()) == ["result.json", "suspect", "truth"], "no model"
    assert sorted(path.name for path in (out / "truth").iterdir()) == ["attack.json", "poison.csv"]

    planned = parse_attack(attack, **{"target": 0, **recipe})
    clean = read_folder(source / "data")
    expected, _ = poison_only(clean, planned)
    found, rows = read_folder(out / "suspect"), manifest(out)
    assert (len(rows), found.classes) == (150, clean.classes)
    assert sorted(row["file"] for row in rows) == sorted(found.names)
    place = {name: index for index, name in enumerate(found.names)}
    for index, row in enumerate(rows):
        here = place[row["file"]]
        assert torch.equal(found.images[here], expected.data.images[index])
        assert int(row["label"]) == int(found.labels[here]) == int(expected.data.labels[index])
        assert int(row["true_label"]) == int(expected.true_labels[index])
        assert row["poisoned"] == str(int(expected.poisoned[index]))
        assert row["cover"] == str(int(expected.covered[index]))
    assert result["poisoned"] == round(planned.poisoning_rate * 150) == sum(int(row["poisoned"]) for row in rows)
    assert result["cover"] == sum(int(row["cover"]) for row in rows)
    told = json.loads((out / "truth" / "attack.json").read_text())
    back = parse_attack(json.dumps(told))
    assert back.but(trigger=planned.trigger) == planned
    assert result["attack"] == back.to_json(weights=False)


def test_nothing_in_the_suspect_folder_tells_what_is_poisoned(source, tmp_path, capsys):
    out = tmp_path / "out"
    assert call(capsys, "plant", source / "data", "--attack", "adaptive_blend", "--poison-only", "-o", out)[0] == 0
    rows = manifest(out)
    changed = [int(row["poisoned"]) or int(row["cover"]) for row in rows]
    assert sum(changed) == 30
    files = [path for path in (out / "suspect").rglob("*") if path.is_file()]
    assert len(files) == 150
    numbers = []
    for row in rows:
        path = out / "suspect" / row["file"]
        assert re.fullmatch(r"[0-9]/[0-9]{6}\.png", row["file"])
        numbers.append(int(path.stem))
        with Image.open(path) as picture:
            assert (picture.mode, picture.size, picture.info) == ("L", (16, 16), {}), "no text in the file"
        assert path.stat().st_mode == files[0].stat().st_mode
    assert numbers == list(range(150)), "numbers count through the whole shuffled set, without gaps"
    # Numbers are the order in which files are written, so time stamps tell no more than numbers do.
    times = [(out / "suspect" / row["file"]).stat().st_mtime_ns for row in rows]
    assert times == sorted(times)
    # Neither true labels nor poison lie in a block or at a regular distance: runs are as many as chance gives.
    for column in (changed, [row["true_label"] for row in rows]):
        share = sum(column.count(value) ** 2 for value in set(column)) / 150**2
        turns = sum(a != b for a, b in itertools.pairwise(column))
        assert abs(turns - 149 * (1 - share)) < 4 * (149 * share * (1 - share)) ** 0.5 + 4
    text = json.dumps(everything_below(out / "suspect"))
    assert not re.search("poison|truth|attack|blend|clean|trigger", text)


@pytest.mark.parametrize("attack", TRAINING_ATTACKS)
def test_attacks_that_control_training_have_no_data_alone(source, tmp_path, capsys, attack):
    code, out, err = call(capsys, "plant", source / "data", "--attack", attack, "--poison-only", "-o", tmp_path / "out")
    assert (code, out) == (2, "")
    assert err == f"unplant: {attack} controls training: its data alone would infect no model\n"
    assert not list(tmp_path.iterdir())


WRONG = {
    # what: (options after `plant DATA`, words of the message)
    "a test set without a model": (["--attack", "badnets", "--poison-only", "--test", "{d}"], "--poison-only"),
    "settings without a model": (["--attack", "badnets", "--poison-only", "--set", "lr=1"], "leave out --test, --set"),
    "the cache without a model": (["--attack", "badnets", "--poison-only", "--reuse"], "and --reuse"),
    "sources of letters": (["--attack", "tact", "--sources", "a"], "--sources is labels with commas"),
    "sources of nothing": (["--attack", "tact", "--sources", ""], "--sources is labels with commas"),
    "a gap in the sources": (["--attack", "tact", "--sources", "1,,2"], "--sources is labels with commas"),
    "a source below 0": (["--attack", "tact", "--sources", "-1"], "--sources is labels with commas"),
    "digits of another script": (["--attack", "tact", "--sources", "１"], "--sources is labels with commas"),
    "a source that there is not": (["--attack", "tact", "--sources", "1,10"], "source labels must lie in [0, 10)"),
    "a very large source": (["--attack", "tact", "--sources", "9" * 30], "source labels must lie in [0, 10)"),
    "the target as the only source": (["--attack", "badnets", "--sources", "0"], "it must be 1 to 0"),
    "sources and all-to-all": (["--attack", "tact", "--all-to-all"], "source labels need one target"),
    "sources and clean-label": (["--attack", "tact", "--clean-label"], "can't have source labels"),
    "clean-label and all-to-all": (["--attack", "ctrl", "--all-to-all"], "keeps the labels"),
    "more than the class has": (["--attack", "badnets", "--clean-label", "--rate", "0.5"], "means 75 poisoned ones"),
    "a rate above 1": (["--attack", "badnets", "--rate", "10"], "poisoning_rate must be"),
    "a rate of nothing": (["--attack", "badnets", "--rate", "0"], "poisoning_rate must be"),
    "a rate in words": (["--attack", "badnets", "--rate", "half"], "poisoning_rate must be"),
    "a cover of 1": (["--attack", "badnets", "--cover-rate", "1"], "cover_rate must be"),
    "a cover below 0": (["--attack", "badnets", "--cover-rate", "-0.1"], "cover_rate must be"),
    "a cover in words": (["--attack", "badnets", "--cover-rate", "much"], "cover_rate must be"),
    "more cover than is left": (["--attack", "badnets", "--cover-rate", "0.95"], "means 142 cover ones"),
    "a target that there is not": (["--attack", "badnets", "--target", "10"], "target label 10 doesn't exist"),
    "an unknown attack": (["--attack", "wanet9"], "unknown attack 'wanet9'"),
    "a setting without an end": (["--attack", "wanet:grid=99999999"], "grid must be"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_recipe_is_one_line_and_writes_nothing(source, tmp_path, capsys, what):
    options, words = WRONG[what]
    filled = [part.format(d=source / "data") for part in options]
    code, out, err = call(capsys, "plant", source / "data", *filled, "-o", tmp_path / "out")
    assert (code, out) == (2, "")
    assert len(err.strip().splitlines()) == 1
    assert words in err
    assert not list(tmp_path.iterdir())


# --reuse.


def test_what_was_planted_before_comes_from_the_cache_as_the_same_files(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("UNPLANT_CACHE", str(tmp_path / "cache"))
    results, trees = [], []
    for name in ("a", "b", "c"):
        reuse = [] if name == "c" else ["--reuse"]
        code, out, _ = call(
            capsys, "plant", source / "data", "--attack", "wanet", *FAST, *reuse,
            "--test", source / "data", "-o", tmp_path / name, "--json",
        )  # fmt: skip
        assert code == 0
        results.append(json.loads(out))
        files = (path for path in (tmp_path / name).rglob("*") if path.is_file() and path.name != "result.json")
        trees.append({path.relative_to(tmp_path / name): path.read_bytes() for path in files})
    assert [result.pop("from_cache", None) for result in results] == [False, True, None]
    assert results[0] == results[1] == results[2]
    assert trees[0] == trees[1] == trees[2]
    assert len(trees[0]) == 150 + 4
    assert [path.name[:6] for path in (tmp_path / "cache").iterdir()] == ["wanet-"]


def test_a_cache_that_cannot_be_written_is_exit_code_5(source, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("UNPLANT_CACHE", str(tmp_path / "file"))
    code, out, err = call(
        capsys, "plant", source / "data", "--attack", "badnets", *FAST, "--reuse", "-o", tmp_path / "out"
    )
    assert (code, out) == (5, "")
    assert "can't write the cache" in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


# The gallery.


class Page(html.parser.HTMLParser):
    """The pictures, links and anchors of a page."""

    def __init__(self, text):
        super().__init__()
        self.pictures, self.links, self.anchors = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag == "img":
            self.pictures.append(values["src"])
        self.links += [values[name] for name in ("href", "src") if name in values]
        self.anchors += [values["id"]] if "id" in values else []


@pytest.fixture
def quick(monkeypatch):
    """Learning that takes a moment; the settings stay those of the attacks otherwise."""
    monkeypatch.setattr(gallery, "TRAINING", TrainConfig(epochs=0.1, batch_size=50))
    real = gallery._learnt
    tiny = {"surrogate": "small_cnn:width=4", "surrogate_epochs": 0.1, "steps": 2, "mask_steps": 2, "width": 4}

    def learnt(data, attack, seed, progress):
        fields = type(attack.trigger).model_fields
        trigger = attack.trigger.but(**{name: value for name, value in tiny.items() if name in fields})
        return real(data, attack.but(trigger=trigger), seed, progress)

    monkeypatch.setattr(gallery, "_learnt", learnt)


@pytest.mark.parametrize(
    "names", [("badnets", "input_aware"), pytest.param((), marks=pytest.mark.slow)], ids=["two", "all"]
)
def test_the_gallery_is_a_page_that_needs_nothing_else(source, tmp_path, capsys, quick, names):
    """With no attack named, it shows each that is registered."""
    out = tmp_path / "out"
    options = [part for name in names for part in ("--attack", name)]
    code, printed, err = call(capsys, "gallery", source / "data", *options, "-o", out, "--json")
    assert (code, err) == (0, "")
    result = json.loads(printed)
    assert result == json.loads((out / "result.json").read_text())
    rows = result["attacks"]
    assert [row["attack"]["attack"] for row in rows] == (list(names) or sorted(triggers))
    text = (out / "index.html").read_text()
    assert "http" not in text
    assert "<script" not in text
    page = Page(text)
    assert len(page.pictures) == len(rows)
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert {link[1:] for link in page.links if link.startswith("#")} == set(page.anchors)
    for picture, row in zip(page.pictures, rows, strict=True):
        content = base64.b64decode(picture.removeprefix("data:image/png;base64,"), validate=True)
        assert content == (out / row["picture"]).read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            assert image.format == "PNG"
            assert len(image.getcolors(maxcolors=2**24)) > 10, "an empty picture"
        assert row["access"] == triggers[row["attack"]["attack"]].access
        assert row["psnr"] is None or row["psnr"] > 0
        assert -1 <= row["ssim"] <= 1
        assert row["attack"]["attack"] in text
    assert {path.name for path in out.iterdir()} == {
        "index.html",
        "overview.png",
        "result.json",
        *(row["picture"] for row in rows),
    }


def test_the_same_attack_twice_has_two_anchors(source, tmp_path, capsys):
    out = tmp_path / "out"
    specs = ["--attack", "sig", "--attack", "sig:delta=0.1"]
    code, printed, _ = call(capsys, "gallery", source / "data", *specs, "-o", out)
    assert code == 0
    assert printed.count("sig") == 2
    page = Page((out / "index.html").read_text())
    assert len(page.pictures) == len(set(page.anchors)) == len(page.anchors) == 2
    assert {link[1:] for link in page.links if link.startswith("#")} == set(page.anchors)
    assert "delta=0.1," in (out / "index.html").read_text(), "the settings tell them apart"


def test_an_exhibit_holds_what_the_trigger_does(source, monkeypatch):
    data = read_folder(source / "data")
    attack = parse_attack("adaptive_blend", target=3)
    shown = gallery.exhibit(data, attack, count=5)
    assert len(shown.clean) == len(shown.triggered) == 5
    assert torch.equal(shown.triggered, attack.trigger.stamp(shown.clean))
    before, during = shown.training
    assert len(before) == len(during) == 5
    assert (before != during).flatten(1).any(1).all()
    assert not torch.equal(during, attack.trigger.stamp(before))
    kept = data.images[data.labels != 3]
    assert all((kept == image).flatten(1).all(1).any() for image in (*shown.clean, *before))
    assert shown.psnr == pytest.approx(gallery.metrics.psnr(kept, attack.trigger.stamp(kept)))
    assert shown.ssim == pytest.approx(gallery.metrics.ssim(kept, attack.trigger.stamp(kept)))
    drawn = []
    monkeypatch.setattr(pictures, "grid", lambda rows, **_: drawn.extend(rows) or b"")
    shown.picture()
    assert [title for title, _, _ in drawn] == [
        "Clean", "With the trigger", "Ten times the difference", "Clean", "In training", "Ten times the difference"
    ]  # fmt: skip
    for clean, changed, difference in (drawn[:3], drawn[3:]):
        expected = (changed[1].int() - clean[1].int()).abs() * 10
        assert torch.equal(difference[1].int(), expected.clamp(max=255))


@pytest.mark.parametrize(
    ("attack", "recipe", "true", "trained"),
    [
        ("badnets", {}, None, None),
        ("ctrl:preset=weak-training", {}, None, 0),
        ("tact", {}, 1, None),
        ("adaptive_patch", {"sources": (2,)}, 2, 2),
    ],
)
def test_an_exhibit_shows_images_that_the_attack_may_use(attack, recipe, true, trained):
    """The true label is written into each image; a source-specific trigger is shown on its sources only."""
    images = torch.randint(0, 200, (60, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels = torch.arange(60) % 3
    images[:, 0, 0, 0] = labels.to(torch.uint8)
    shown = gallery.exhibit(LabeledImages(images, labels, tuple("abc")), parse_attack(attack, **recipe), count=6)
    assert len(shown.clean) == 6
    assert set(shown.clean[:, 0, 0, 0].tolist()) == ({1, 2} if true is None else {true})
    assert (shown.training is None) == (trained is None)
    if shown.training is not None:
        assert set(shown.training[0][:, 0, 0, 0].tolist()) == {trained}


@pytest.mark.parametrize("attack", ["tact", "badnets"])
def test_images_that_cannot_show_a_trigger_are_refused(attack):
    images = LabeledImages(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64), ("a", "b"))
    with pytest.raises(UsageError, match=f"{attack}: none of the images can show it") as caught:
        gallery.exhibit(images, parse_attack(attack))
    assert "\n" not in str(caught.value)


def test_an_attack_json_is_shown_as_it_was_learnt(source, tmp_path, capsys, monkeypatch):
    code, _, _ = call(
        capsys, "plant", source / "data", "--attack", "ssba:steps=2,width=4", "--target", "4", "--poison-only",
        "-o", tmp_path / "planted",
    )  # fmt: skip
    assert code == 0
    monkeypatch.setattr(gallery, "poison_only", lambda *_, **__: pytest.fail("learnt again"))
    file = tmp_path / "planted" / "truth" / "attack.json"
    code, out, _ = call(capsys, "gallery", source / "data", "--attack", file, "-o", tmp_path / "out", "--json")
    assert code == 0
    (row,) = json.loads(out)["attacks"]
    assert row["attack"] == parse_attack(file.read_text()).to_json(weights=False)
    assert row["attack"]["target"] == 4


# attack.json from strangers.


def some(path, content):
    (path.write_bytes if isinstance(content, bytes) else path.write_text)(content)


def huge(path):
    with path.open("wb") as file:
        file.truncate(2**27 + 1)  # a hole: takes no room on disk


STRANGE = {
    # what: (how it is made, words of the message)
    "nowhere": (lambda path: None, "can't read"),
    "a folder": (lambda path: path.mkdir(), "is no attack.json: not a file"),
    "a pipe": (os.mkfifo, "is no attack.json: not a file"),
    "a huge file": (huge, "more than 134,217,728 bytes"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "is no attack.json: not a file"),
    "no UTF-8": (lambda path: some(path, b"\xff\xfe{"), "can't read"),
    "empty": (lambda path: some(path, ""), "there is no JSON object in it"),
    "a list": (lambda path: some(path, "[1, 2]" + "x" * 10_000), "there is no JSON object in it"),
    "a spec": (lambda path: some(path, "badnets:size=3"), "there is no JSON object in it"),
    "half": (lambda path: some(path, '{"attack": "sig", "trig'), "JSON is damaged"),
    "very deep": (lambda path: some(path, '{"a":' * 100_000), "JSON is damaged"),
    "a very long number": (lambda path: some(path, '{"target": ' + "9" * 5000 + "}"), "JSON is damaged"),
    "no trigger": (lambda path: some(path, '{"attack": "sig"}'), "is described by"),
    "an unknown attack": (lambda path: some(path, '{"attack": "no", "trigger": {}}'), "unknown attack 'no'"),
    "not a number": (lambda path: some(path, '{"attack": "sig", "trigger": {"delta": NaN}}'), "delta must be"),
    "a large target": (lambda path: some(path, '{"attack": "sig", "trigger": {}, "target": 1e99}'), "target must be"),
    "a target that there is not": (
        lambda path: some(path, '{"attack": "sig", "trigger": {}, "target": 77}'), "target label 77 doesn't exist"),
    "a source that there is not": (
        lambda path: some(path, '{"attack": "sig", "trigger": {}, "sources": [-3]}'), "source labels must lie in"),
    "too wide a network": (
        lambda path: some(path, '{"attack": "input_aware", "trigger": {"width": 100000000}}'), "width must be"),
    "garbage as weights": (
        lambda path: some(path, '{"attack": "ssba", "trigger": {"weights": "AAAA"}}'), "weights of the trigger ssba"),
    "a file that would be run": (
        lambda path: some(path, '{"attack": "trojannn", "trigger": {"surrogate": "evil.py:x"}}'), "surrogate must be"),
}  # fmt: skip


@pytest.mark.parametrize("what", STRANGE)
def test_a_strange_attack_json_is_one_line(source, tmp_path, capsys, what):
    make, words = STRANGE[what]
    path = tmp_path / "attack.json"
    make(path)
    code, out, err = call(capsys, "gallery", source / "data", "--attack", path, "-o", tmp_path / "out")
    assert (code, out) == (2, "")
    assert len(err.strip().splitlines()) == 1
    assert words in err
    assert len(err) < 600
    assert not (tmp_path / "out").exists()
