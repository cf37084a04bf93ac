"""Settings: declared once, with default, meaning and limits; flags, validation and docs come from that declaration."""

from collections.abc import Iterable
from fractions import Fraction
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from unplant.errors import UsageError


def number(value: Any) -> Any:
    """Turns `"8/255"` into the float it means; leaves everything else to pydantic.

    >>> round(number("8/255"), 4)
    0.0314
    """
    if isinstance(value, str) and "/" in value:
        try:
            return float(Fraction(value.replace(" ", "")))
        except (ValueError, ZeroDivisionError, OverflowError):
            return value
    return value


Real = Annotated[float, BeforeValidator(number), Field(allow_inf_nan=False)]
"""A finite float, also written as a fraction."""

Pixel = Annotated[float, BeforeValidator(number), Field(ge=0, le=1, allow_inf_nan=False)]
"""A size in pixel units: 1 is the whole range from black to white, 8/255 is eight grey levels."""

Share = Annotated[float, BeforeValidator(number), Field(ge=0, le=1, allow_inf_nan=False)]
"""A fraction of something."""


class Config(BaseModel):
    """Frozen, keyword-only settings of one method.

    Raises `UsageError` with every problem in one line.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UsageError(explain(type(self), error)) from None

    def but(self, /, **changes: Any) -> Self:
        """A copy with some settings changed, validated anew."""
        return type(self)(**{**{name: getattr(self, name) for name in type(self).model_fields}, **changes})


def explain(config: type[BaseModel], error: ValidationError) -> str:
    """All that pydantic found wrong, in one line that says what was expected, what came and what to do."""
    problems = []
    for item in error.errors(include_url=False):
        name = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            problems.append(f"there is no setting {name!r}; there are: {', '.join(config.model_fields)}")
            continue
        value = item["input"]
        hint = f"; did you mean {value:g}/255?" if _looks_like_grey_levels(config, name, value) else ""
        expected = item["msg"][0].lower() + item["msg"][1:].replace("Input should be ", "")
        expected = expected.removeprefix("input should be ")
        problems.append(f"{name} must be {expected}, got {value!r}{hint}")
    return f"{config.__name__}: " + "; ".join(problems)


def _looks_like_grey_levels(config: type[BaseModel], name: str, value: Any) -> bool:
    field = config.model_fields.get(name)
    limited_to_one = field is not None and "le=1" in repr(field)  # also within Optional
    return limited_to_one and isinstance(value, (int, float)) and 1 < value <= 255


def parse_settings(pairs: Iterable[str]) -> dict[str, Any]:
    """Turns `["eps=8/255", "steps=7"]` into a dictionary of numbers, booleans and strings.

    >>> parse_settings(["pattern=white", "size=4", "flip=true"])
    {'pattern': 'white', 'size': 4, 'flip': True}
    """
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.strip():
            raise UsageError(f"a setting is written NAME=VALUE, got {pair!r}")
        if name.strip() in settings:
            raise UsageError(f"setting {name.strip()!r} is given twice")
        settings[name.strip()] = _value(text.strip())
    return settings


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """Splits an id with settings.

    >>> parse_spec("preact_resnet18:width=16")
    ('preact_resnet18', {'width': 16})
    """
    name, _, settings = spec.partition(":")
    return name.strip(), parse_settings(part for part in settings.split(",") if part.strip())


def _value(text: str) -> Any:
    if text.lower() in {"true", "false"}:
        return text.lower() == "true"
    if text.lower() in {"none", "null"}:
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return number(text)
