"""The cache of infected models: what was planted comes back to the last bit, other settings and damage never do."""

import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from attack_helpers import TINY, random_data
from safetensors.torch import load, save

from unplant import cache
from unplant.attacks import parse_attack, triggers
from unplant.cache import default_folder, key_of, plant_cached, settings_of, train_cached
from unplant.errors import UsageError, WriteError
from unplant.journal import Journal
from unplant.planting import TrainConfig
from unplant.poisoning import Attack

ARCH = "small_cnn:width=4"
CONFIG = TrainConfig(epochs=0.1, batch_size=50)
BADNETS = Attack(trigger=triggers["badnets"](), poisoning_rate=0.1)
FILES = ("attack.json", "changed.safetensors", "model.safetensors", "result.json")


@pytest.fixture(scope="module")
def data():
    """100 random images of three classes, named."""
    images = random_data((1, 8, 8), count=100)
    return type(images)(images.images, images.labels, images.classes, tuple(f"{i}.png" for i in range(100)))


def planted(data, folder, attack=BADNETS, arch=ARCH, config=CONFIG, seed=0):
    return plant_cached(data, attack, arch, config, seed=seed, folder=folder)


def tiny(name, **recipe):
    """An attack whose trigger learns in a moment."""
    kind = triggers[name]
    return Attack(trigger=kind(**{k: v for k, v in TINY.items() if k in kind.model_fields}), **recipe)


def assert_equal(first, second):
    """Weights, training set, truth and attack, to the last bit."""
    one, two = first.model.state_dict(), second.model.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert (first.model.training, second.model.training) == (False, False)
    a, b = first.training_set, second.training_set
    assert torch.equal(a.data.images, b.data.images)
    assert torch.equal(a.data.labels, b.data.labels)
    assert (a.data.classes, a.data.names) == (b.data.classes, b.data.names)
    assert torch.equal(a.poisoned, b.poisoned)
    assert torch.equal(a.covered, b.covered)
    assert torch.equal(a.true_labels, b.true_labels)
    assert first.attack == second.attack


@pytest.mark.parametrize(
    "attack",
    [
        BADNETS,
        BADNETS.but(label_map="all-to-all"),
        Attack(trigger=triggers["sig"](), clean_label=True, target=2),
        tiny("adaptive_blend"),
        tiny("wanet"),
        tiny("bpp"),
        tiny("input_aware"),
        tiny("ssba"),
        tiny("trojannn"),
        tiny("label_consistent", clean_label=True, poisoning_rate=0.05),
        tiny("tact", sources=(1,)),
    ],
    ids=lambda attack: attack.trigger.id,
)
def test_the_same_settings_come_from_the_cache_to_the_last_bit(data, tmp_path, attack):
    first, before = planted(data, tmp_path, attack)
    again, cached = planted(data, tmp_path, attack)
    assert (before, cached) == (False, True)
    assert_equal(first, again)
    (entry,) = tmp_path.iterdir()
    assert entry.name == f"{attack.trigger.id}-{key_of(settings_of(data, attack, ARCH, CONFIG, 0))}"
    assert sorted(path.name for path in entry.iterdir()) == list(FILES)
    pixels = data.pixels(slice(0, 8))
    with torch.no_grad():
        assert torch.equal(first.model(pixels), again.model(pixels))
    assert torch.equal(first.attack.trigger.stamp(data.images), again.attack.trigger.stamp(data.images))


def test_what_comes_from_the_cache_is_not_planted_again(data, tmp_path, monkeypatch):
    planted(data, tmp_path)
    monkeypatch.setattr(cache, "plant", lambda *_, **__: pytest.fail("planted again"))
    assert planted(data, tmp_path)[1]


def test_each_changed_setting_is_another_model(data):
    other = data.images.clone()
    other[3, 0, 2, 2] ^= 1
    one_bit = type(data)(other, data.labels, data.classes)
    variants = [
        {},
        {"attack": BADNETS.but(trigger=triggers["badnets"](size=4))},
        {"attack": BADNETS.but(trigger=triggers["badnets"](pattern="white"))},
        {"attack": BADNETS.but(trigger=triggers["badnets"](margin=1))},
        {"attack": BADNETS.but(poisoning_rate=0.11)},
        {"attack": BADNETS.but(target=1)},
        {"attack": BADNETS.but(label_map="all-to-all")},
        {"attack": BADNETS.but(clean_label=True)},
        {"attack": BADNETS.but(cover_rate=0.1)},
        {"attack": BADNETS.but(sources=(1,))},
        {"attack": Attack(trigger=triggers["tact"](), poisoning_rate=0.1)},
        {"seed": 1},
        {"architecture": "small_cnn:width=8"},
        {"architecture": "preact_resnet18"},
        *({"config": CONFIG.but(**{name: value})} for name, value in (
            ("epochs", 0.2), ("batch_size", 40), ("lr", 0.05), ("momentum", 0.5), ("weight_decay", 0),
            ("schedule", "cosine"), ("precision", "bfloat16"),
        )),
        {"data": one_bit},
        {"data": data.relabel((data.labels + 1) % 3)},
        {"data": data.select(torch.arange(99))},
        {"data": data.select(torch.arange(100).flip(0))},
        {"data": type(data)(data.images, data.labels, ("0", "1", "two"))},
    ]  # fmt: skip
    base = {"data": data, "attack": BADNETS, "architecture": ARCH, "config": CONFIG, "seed": 0}
    keys = [key_of(settings_of(**{**base, **variant})) for variant in variants]
    assert len(set(keys)) == len(keys)
    assert key_of(settings_of(**base)) == keys[0]
    # Names aren't trained on; the weights of a trigger that was learnt before are.
    assert key_of(settings_of(**{**base, "data": type(data)(data.images, data.labels, data.classes)})) == keys[0]
    learnt = tiny("ssba").trigger.with_tensors({"a": torch.zeros(2)})
    twin = learnt.with_tensors({"a": torch.ones(2)})
    assert len({key_of(settings_of(**{**base, "attack": Attack(trigger=t)})) for t in (learnt, twin)}) == 2


def test_another_setting_is_planted_beside_the_first(data, tmp_path):
    first, _ = planted(data, tmp_path)
    other, cached = planted(data, tmp_path, seed=1)
    assert not cached
    assert not torch.equal(first.training_set.poisoned, other.training_set.poisoned)
    assert len(list(tmp_path.iterdir())) == 2
    assert_equal(planted(data, tmp_path)[0], first)


def test_an_architecture_file_that_was_changed_is_another_model(data, tmp_path):
    code = tmp_path / "net.py"
    code.write_text(
        "from torch import nn\n"
        "def net(num_classes):\n"
        "    return nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(64, num_classes))\n"
    )
    arch = f"{code}:net"
    first, cached = planted(data, tmp_path / "cache", arch=arch)
    assert not cached
    assert_equal(planted(data, tmp_path / "cache", arch=arch)[0], first)
    code.write_text(code.read_text().replace("ReLU", "Tanh"))
    other, cached = planted(data, tmp_path / "cache", arch=arch)
    assert not cached
    assert any(isinstance(module, torch.nn.Tanh) for module in other.model.modules())


# Damage.


@pytest.fixture(scope="module")
def sound(data, tmp_path_factory):
    """What was planted, and the cache in which it lies; tests copy it."""
    folder = tmp_path_factory.mktemp("sound")
    return planted(data, folder, tiny("ssba", poisoning_rate=0.1))[0], folder


def flip(path, share, bit=0x01):
    """Flips one bit at that share of the file."""
    content = bytearray(path.read_bytes())
    content[int(share * (len(content) - 1))] ^= bit
    path.write_bytes(content)


def images(entry, change):
    """A valid file of changed images, with other content."""
    path = entry / "changed.safetensors"
    path.write_bytes(save(change(load(path.read_bytes()))))


def edited(path, old, new):
    """A JSON file in which a word is another; it stays valid."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def another_weight(path):
    """Changes one number that the trigger has learnt; all stays readable."""
    attack = parse_attack(path.read_text())
    tensors = attack.trigger.tensors()
    tensors["paint.bias"][0] += 0.01
    path.write_text(json.dumps(attack.but(trigger=attack.trigger.with_tensors(tensors)).to_json()))


def poisoned_weights(path, value):
    tensors = load(path.read_bytes())
    next(tensor for tensor in tensors.values() if tensor.is_floating_point()).flatten()[0] = value
    path.write_bytes(save(tensors, metadata=None))


DAMAGES = {
    "a flipped bit in the weights": lambda e: flip(e / "model.safetensors", 0.9),
    "a flipped bit in the card": lambda e: flip(e / "model.safetensors", 0.01),
    "weights of half the length": lambda e: (e / "model.safetensors").write_bytes(
        (e / "model.safetensors").read_bytes()[:900]
    ),
    "NaN in the weights": lambda e: poisoned_weights(e / "model.safetensors", float("nan")),
    "a flipped bit in an image": lambda e: flip(e / "changed.safetensors", 1.0),
    "truncated images": lambda e: (e / "changed.safetensors").write_bytes(
        (e / "changed.safetensors").read_bytes()[:-9]
    ),
    "garbled images": lambda e: (e / "changed.safetensors").write_bytes(os.urandom(500)),
    "no images": lambda e: (e / "changed.safetensors").write_bytes(b""),
    "other names": lambda e: images(e, lambda t: {"a": t["images"]}),
    "places that there are not": lambda e: images(e, lambda t: {**t, "places": t["places"] + 95}),
    "places before the first": lambda e: images(e, lambda t: {**t, "places": t["places"] - 500}),
    "other places": lambda e: images(e, lambda t: {**t, "places": t["places"].flip(0)}),
    "places that are no whole numbers": lambda e: images(e, lambda t: {**t, "places": t["places"].float()}),
    "fewer images than places": lambda e: images(e, lambda t: {**t, "images": t["images"][1:]}),
    "images of another shape": lambda e: images(e, lambda t: {**t, "images": t["images"][:, :, :5].contiguous()}),
    "images of floats": lambda e: images(e, lambda t: {**t, "images": t["images"].float() / 9}),
    "NaN in the images": lambda e: images(e, lambda t: {**t, "images": t["images"].float() * float("nan")}),
    "another target": lambda e: edited(e / "attack.json", '"target": 0', '"target": 1'),
    "another strength": lambda e: edited(e / "attack.json", '"strength": 0.0', '"strength": 0.1'),
    "another trigger": lambda e: (e / "attack.json").write_text(json.dumps(BADNETS.to_json())),
    "a flipped bit in the trigger": lambda e: another_weight(e / "attack.json"),
    "an attack cut off": lambda e: (e / "attack.json").write_text((e / "attack.json").read_text()[:300]),
    "an attack that is no text": lambda e: (e / "attack.json").write_bytes(b"\xff\xfe\x00"),
    "a result of half the length": lambda e: (e / "result.json").write_text((e / "result.json").read_text()[:100]),
    "a result that is a list": lambda e: (e / "result.json").write_text("[]"),
    "a result that is null": lambda e: (e / "result.json").write_text("null"),
    "a result that is empty": lambda e: (e / "result.json").write_text("{}"),
    "a result that is deep": lambda e: (e / "result.json").write_text("[" * 200_000),
    "a result that is no text": lambda e: (e / "result.json").write_bytes(b"\xff\xfe\x00"),
    "other settings": lambda e: edited(e / "result.json", '"seed": 0', '"seed": 1'),
    **{f"no {name}": lambda e, name=name: (e / name).unlink() for name in FILES},
    **{f"a folder as {name}": lambda e, name=name: ((e / name).unlink(), (e / name).mkdir()) for name in FILES},
    "an empty folder": lambda e: (shutil.rmtree(e), e.mkdir()),
    "a foreign file": lambda e: (shutil.rmtree(e), e.write_text("thesis")),
    "a link to nowhere": lambda e: (shutil.rmtree(e), e.symlink_to("nowhere")),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_entry_is_planted_anew(data, sound, tmp_path, what):
    expected, source = sound
    folder = tmp_path / "cache"
    shutil.copytree(source, folder)
    attack = tiny("ssba", poisoning_rate=0.1)
    assert planted(data, folder, attack)[1], "the copy must be sound before"
    (entry,) = folder.iterdir()
    DAMAGES[what](entry)
    found, cached = planted(data, folder, attack)
    assert not cached
    assert_equal(found, expected)
    again, cached = planted(data, folder, attack)
    assert cached, "the new entry must be sound"
    assert_equal(again, expected)
    assert [path.name for path in folder.iterdir()] == [entry.name], "nothing is left behind"


def test_no_flipped_bit_of_any_file_goes_unnoticed(data, sound, tmp_path):
    """Any bit: either it changes nothing that is read, or the model is planted anew; never something else."""
    expected, source = sound
    attack = tiny("ssba", poisoning_rate=0.1)
    random = torch.Generator().manual_seed(0)
    noticed = 0
    for turn in range(12):
        folder = tmp_path / str(turn)
        shutil.copytree(source, folder)
        (entry,) = folder.iterdir()
        share, bit = float(torch.rand((), generator=random)), 1 << int(torch.randint(8, (), generator=random))
        flip(entry / FILES[turn % 4], share, bit)
        found, cached = planted(data, folder, attack)
        assert_equal(found, expected)
        noticed += not cached
    assert noticed >= 9, "three of four files have digests"


def test_an_entry_of_the_first_kind_is_still_read(data, tmp_path):
    first, _ = planted(data, tmp_path)
    (entry,) = tmp_path.iterdir()
    about = json.loads((entry / "result.json").read_text())
    del about["attack"]
    (entry / "result.json").write_text(json.dumps(about))
    again, cached = planted(data, tmp_path)
    assert cached
    assert_equal(first, again)


def test_another_model_with_the_same_key_is_not_taken(data, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "key_of", lambda _: "0")
    planted(data, tmp_path)
    other, cached = planted(data, tmp_path, seed=1)
    assert not cached
    monkeypatch.undo()
    assert_equal(other, planted(data, tmp_path / "apart", seed=1)[0])


# Where it lies, and who else writes there.


def test_the_folder_is_that_of_the_environment(data, tmp_path, monkeypatch):
    monkeypatch.setenv("UNPLANT_CACHE", str(tmp_path / "deep" / "cache"))
    assert default_folder() == tmp_path / "deep" / "cache"
    assert not plant_cached(data, BADNETS, ARCH, CONFIG)[1]
    assert plant_cached(data, BADNETS, ARCH, CONFIG)[1]
    assert len(list((tmp_path / "deep" / "cache").iterdir())) == 1
    for empty in ("", None):
        monkeypatch.setenv("UNPLANT_CACHE", empty) if empty is not None else monkeypatch.delenv("UNPLANT_CACHE")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert default_folder() == tmp_path / ".cache" / "unplant"


@pytest.mark.parametrize("place", ["a file", "below a file", "read-only"])
def test_a_cache_that_cannot_be_written_is_refused_before_any_training(data, tmp_path, monkeypatch, place):
    (tmp_path / "file").write_text("")
    folder = {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "cache", "read-only": tmp_path / "ro"}[
        place
    ]
    if place == "read-only":
        folder.mkdir(mode=0o500)
        if os.access(folder, os.W_OK):  # root may write everywhere
            monkeypatch.setattr(cache.tempfile, "mkdtemp", denied)
    monkeypatch.setattr(cache, "plant", lambda *_, **__: pytest.fail("trained for nothing"))
    with pytest.raises(WriteError, match="can't write the cache") as caught:
        planted(data, folder)
    assert "\n" not in str(caught.value)


def denied(*_, **__):
    raise PermissionError(13, "Permission denied")


def test_a_failed_planting_leaves_nothing_behind(data, tmp_path):
    with pytest.raises(UsageError, match="poisoning rate"):
        planted(data, tmp_path, BADNETS.but(poisoning_rate=0.001))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("attack", [BADNETS, tiny("input_aware"), None], ids=["badnets", "input_aware", "clean"])
def test_a_killed_planting_goes_on_and_leaves_nothing_behind(data, tmp_path, monkeypatch, attack):
    """60 steps; killed after 40, whatever had been written down by then."""
    monkeypatch.setattr(cache, "Journal", partial(Journal, seconds=0))
    config, told = CONFIG.but(epochs=30), []

    def planting(folder, killed_after=None):
        def progress(title, share):
            told.extend([round(share * 60)] if title == "training" else [])
            if told[-1:] == [killed_after]:
                raise KeyboardInterrupt

        around = {"folder": folder, "progress": progress}
        if attack is None:
            return train_cached(data, ARCH, config, **around)[0]
        return plant_cached(data, attack, ARCH, config, **around)[0].model

    whole = planting(tmp_path / "whole").state_dict()
    with pytest.raises(KeyboardInterrupt):
        planting(tmp_path / "cache", killed_after=40)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".journal"]
    told.clear()
    resumed = planting(tmp_path / "cache").state_dict()
    assert min(told) > 40, "steps that were written down were done again"
    assert all(torch.equal(weight, resumed[name]) for name, weight in whole.items())
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [""]


def test_threads_that_plant_the_same_at_once_get_the_same(data, tmp_path, monkeypatch):
    gate, real = threading.Barrier(4), cache.plant

    def together(*arguments, **settings):
        try:
            return real(*arguments, **settings)
        finally:
            gate.wait(60)  # all have found no entry, and all write now

    monkeypatch.setattr(cache, "plant", together)
    with ThreadPoolExecutor(4) as pool:
        found = [job.result() for job in [pool.submit(planted, data, tmp_path) for _ in range(4)]]
    assert [cached for _, cached in found] == [False] * 4
    for one, _ in found[1:]:
        assert torch.equal(one.training_set.data.images, found[0][0].training_set.data.images)
    monkeypatch.undo()
    assert planted(data, tmp_path)[1]
    assert len(list(tmp_path.iterdir())) == 1


PROGRAM = """
import sys
from pathlib import Path
from unplant.attacks import parse_attack
from unplant.cache import plant_cached
from unplant.data import digits
from unplant.planting import TrainConfig
import torch
torch.set_num_threads(1)
config = TrainConfig(epochs=0.1, batch_size=50)
model = plant_cached(digits("test"), parse_attack("badnets"), "small_cnn:width=4", config, folder=Path(sys.argv[1]))[0]
print(float(sum(value.double().sum() for value in model.model.state_dict().values())))
"""


@pytest.mark.slow
def test_processes_that_plant_the_same_at_once_get_the_same(tmp_path):
    command = [sys.executable, "-W", "error", "-c", PROGRAM, str(tmp_path / "cache")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    results = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0], results
    assert results[0][0] == results[1][0] != ""
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_spec_gives_the_same_entry_as_the_attack_it_stands_for(data, tmp_path):
    planted(data, tmp_path, parse_attack("badnets:size=3"))
    assert planted(data, tmp_path, BADNETS)[1]


class TestCleanModels:
    def test_are_trained_once_and_come_back_to_the_last_bit(self, data, tmp_path):
        (first, before), (again, after) = (train_cached(data, ARCH, CONFIG, seed=1, folder=tmp_path) for _ in range(2))
        assert (before, after) == (False, True)
        one, two = first.state_dict(), again.state_dict()
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
        assert not again.training

    def test_another_setting_is_another_model_and_no_infected_one(self, data, tmp_path):
        train_cached(data, ARCH, CONFIG, seed=1, folder=tmp_path)
        assert not train_cached(data, ARCH, CONFIG, seed=2, folder=tmp_path)[1]
        assert not train_cached(data, ARCH, CONFIG.but(lr=0.05), seed=1, folder=tmp_path)[1]
        assert not planted(data, tmp_path, seed=1)[1]

    def test_damaged_weights_are_trained_anew(self, data, tmp_path):
        first, _ = train_cached(data, ARCH, CONFIG, folder=tmp_path)
        (entry,) = tmp_path.iterdir()
        weights = entry / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"x")
        again, cached = train_cached(data, ARCH, CONFIG, folder=tmp_path)
        assert not cached
        assert all(torch.equal(first.state_dict()[k], v) for k, v in again.state_dict().items())
