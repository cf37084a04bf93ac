"""A model infected by somebody else, through the command line. Needs ../shared/data, else skipped."""

import json
from pathlib import Path

import pytest
import torch

from unplant.cli import main
from unplant.devices import check_precision

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
MODEL = SHARED / "third_party" / "ibau_badnets_8.pth"
FASTER = "float32" if check_precision("bfloat16", torch.device("cpu")) else "bfloat16"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MODEL.is_file(), reason="needs ../shared/data (CIFAR-10 and a model infected by others)"),
]


def test_its_published_backdoor_is_measured_as_its_notes_say(capsys):
    arguments = [
        "evaluate", MODEL, "--arch", f"{ROOT / 'examples' / 'ibau_net.py'}:network",
        "--test", SHARED / "cifar10.zip" / "test", "--max-images", 2000,
        "--attack", "badnets:preset=ibau", "--target", 8, "--json",
    ]  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        main([str(part) for part in arguments])
    assert stop.value.code == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    # ACC 78.1 %, ASR 98.2 % on all 10,000 images; three standard errors of 2,000.
    assert scores["acc"] == pytest.approx(0.781, abs=0.028)
    assert scores["asr"] == pytest.approx(0.982, abs=0.010)


@pytest.mark.timeout(1800)  # ten minutes and more in float32 on a busy, older processor
def test_aft_erases_it_with_2500_clean_images(tmp_path):
    # By itself AFT takes 300 steps where it is sure of a trigger; 150 do for the same bounds, in half of the time.
    arguments = [
        "erase", MODEL, "--arch", f"{ROOT / 'examples' / 'ibau_net.py'}:network",
        "--clean", SHARED / "cifar10.zip" / "train", "--max-images", 2500,
        "--test", SHARED / "cifar10.zip" / "test", "--attack", "badnets:preset=ibau", "--target", 8,
        "--precision", FASTER, "--set", "steps=150", "-o", tmp_path / "erased",
    ]  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        main([str(part) for part in arguments])
    assert stop.value.code == 0
    report = json.loads((tmp_path / "erased" / "result.json").read_text(encoding="utf-8"))
    before, after = report["before"], report["after"]
    # The pass rule; another machine's rounding gives another run of the same kind.
    assert before["asr"] > 0.97
    assert after["asr_upper"] <= 0.05
    assert after["acc"] >= before["acc"] - 0.02
    assert after["ra"] >= 0.9 * after["acc"]
    # It says so itself, with the label (8: ship) and about what is left.
    said = report["findings"]
    assert (said["infected"], said["targets"], said["by"]) == (True, [8], "inversion")
    assert said["asr_estimate"] == pytest.approx(after["asr"], abs=0.05)
    assert (tmp_path / "erased" / "trigger.png").is_file()
