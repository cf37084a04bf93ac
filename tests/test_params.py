"""Settings: what users may write, and the one line that they get otherwise."""

from typing import Literal

import pytest
from pydantic import Field, ValidationError

from unplant.errors import (
    DataError,
    ModelFileError,
    NumericalError,
    OutOfMemoryError,
    UnplantError,
    UsageError,
    WriteError,
)
from unplant.params import Config, Pixel, Real, Share, number, parse_settings, parse_spec
from unplant.registry import Registry


class Knobs(Config):
    eps: Pixel = Field(8 / 255, description="radius")
    rate: Share = 0.1
    lr: Real = Field(0.1, gt=0)
    steps: int = Field(5, ge=0)
    kind: Literal["a", "b"] = "a"
    note: str | None = None


@pytest.mark.parametrize(
    ("text", "value"),
    [("8/255", 8 / 255), (" 8 / 255 ", 8 / 255), ("1/3", 1 / 3), ("-1/2", -0.5), (0.5, 0.5), (None, None)],
)
def test_fractions_become_floats(text, value):
    assert number(text) == value


@pytest.mark.parametrize("text", ["1/0", "a/b", "1/2/3", "/", "8/", "9" * 400 + "/1", "9" * 5000 + "/1"])
def test_what_is_no_fraction_is_left_for_the_error_message(text):
    assert number(text) == text
    with pytest.raises(UsageError, match="eps must be"):
        Knobs(eps=text)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eps": 8}, "eps must be less than or equal to 1, got 8; did you mean 8/255"),
        ({"eps": 1.5}, "did you mean 1.5/255"),
        ({"eps": -1}, "eps must be greater than or equal to 0, got -1$"),
        ({"eps": 300}, "eps must be less than or equal to 1, got 300$"),
        ({"eps": "nan"}, "eps must be"),
        ({"lr": float("inf")}, "lr must be .*finite"),
        ({"lr": 0}, "lr must be greater than 0, got 0"),
        ({"steps": 1.5}, "steps must be .*integer.*got 1.5"),
        ({"steps": -1}, "steps must be greater than or equal to 0, got -1"),
        ({"steps": "many"}, "steps must be .*integer.*got 'many'"),
        ({"kind": "c"}, "kind must be 'a' or 'b', got 'c'"),
        ({"epz": 0.1}, "there is no setting 'epz'; there are: eps, rate, lr, steps, kind, note"),
        ({"self": 1}, "there is no setting 'self'"),
    ],
)
def test_a_wrong_setting_says_what_was_expected_what_came_and_what_to_do(values, message):
    with pytest.raises(UsageError, match=message) as caught:
        Knobs(**values)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("Knobs: ")


def test_all_problems_come_together():
    with pytest.raises(UsageError) as caught:
        Knobs(eps=8, steps=-1, nothing=3)
    assert all(word in str(caught.value) for word in ("eps must", "steps must", "'nothing'"))


def test_settings_are_frozen_and_copies_are_validated_anew():
    knobs = Knobs(steps=3)
    with pytest.raises(ValidationError):
        knobs.steps = 4
    changed = knobs.but(eps="1/2")
    assert (changed.eps, changed.steps, knobs.eps) == (0.5, 3, 8 / 255)
    with pytest.raises(UsageError, match="steps"):
        knobs.but(steps=-1)
    with pytest.raises(UsageError, match="no setting 'size'"):
        knobs.but(size=1)


def test_settings_on_the_command_line():
    pairs = ["eps=8/255", "steps=7", "lr=1e-3", "flip=True", "note=none", "kind=b", "path=a=b", " pad = 2 "]
    assert parse_settings(pairs) == {
        "eps": 8 / 255,
        "steps": 7,
        "lr": 1e-3,
        "flip": True,
        "note": None,
        "kind": "b",
        "path": "a=b",
        "pad": 2,
    }


@pytest.mark.parametrize(
    ("pairs", "message"), [(["eps"], "NAME=VALUE"), (["=3"], "NAME=VALUE"), (["a=1", "a=2"], "twice")]
)
def test_a_setting_that_is_none_is_refused(pairs, message):
    with pytest.raises(UsageError, match=message):
        parse_settings(pairs)


@pytest.mark.parametrize(
    ("spec", "name", "settings"),
    [
        ("small_cnn", "small_cnn", {}),
        ("small_cnn:", "small_cnn", {}),
        ("a:x=1,y=b", "a", {"x": 1, "y": "b"}),
        ("a:x=1,", "a", {"x": 1}),
    ],
)
def test_an_id_with_settings(spec, name, settings):
    assert parse_spec(spec) == (name, settings)


def test_a_registry_names_what_there_is_and_takes_a_name_once():
    things = Registry("thing")
    assert things.register("b")(2) == 2
    things.add("a", 1)
    assert dict(things) == {"b": 2, "a": 1}
    assert "a" in things
    assert len(things) == 2
    with pytest.raises(UsageError, match="unknown thing 'c'; there are: a, b"):
        things["c"]
    with pytest.raises(ValueError, match="registered twice"):
        things.add("a", 3)


def test_each_error_has_the_documented_exit_code():
    codes = {UsageError: 2, ModelFileError: 3, DataError: 4, WriteError: 5, NumericalError: 6, OutOfMemoryError: 7}
    assert {kind: kind.exit_code for kind in codes} == codes
    assert all(issubclass(kind, UnplantError) for kind in codes)
