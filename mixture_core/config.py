"""The options, `MixtureConfig`, checked when they are set, and validators for them."""

import math
import reprlib
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, Literal

import attrs

Check = Callable[[Any, "attrs.Attribute[Any]", Any], None]

LONGEST = 80  # characters of a value in an error message
_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2  # lists of aliases in a YAML file may stand for billions of elements
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = LONGEST


def shown(value: object) -> str:
    """Returns a value as an error message shows it: on one line, and cut to 80 characters."""
    try:
        text = " ".join(_SHORT.repr(value).split())
    except ValueError:  # Python refuses to print integers of more than 4,300 digits
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def as_integer(value: int) -> int:
    """Returns NumPy's and other integers as an int, and anything else unchanged, for the validator to refuse."""
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else value


def as_number(value: float) -> float:
    """Returns NumPy's and other real numbers as a float, and anything else unchanged, for the validator to refuse."""
    try:
        return float(value) if isinstance(value, Real) and not isinstance(value, bool) else value
    except OverflowError:  # an integer beyond all floats
        return value


def integer(*, at_least: int, at_most: float = float("inf")) -> Check:
    """Returns an attrs validator for integers."""

    def check(_: Any, attribute: "attrs.Attribute[Any]", value: Any) -> None:
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"`{attribute.name}` must be an integer, got {shown(value)}.")
        if value < at_least:
            raise ValueError(f"`{attribute.name}` must be at least {at_least}, got {shown(value)}.")
        if value > at_most:
            raise ValueError(f"`{attribute.name}` must be at most {at_most}, got {shown(value)}.")

    return check


def number(expected: str, accepts: Callable[[float], bool]) -> Check:
    """Returns an attrs validator for numbers that `accepts` returns true for; `expected` describes them."""

    def check(_: Any, attribute: "attrs.Attribute[Any]", value: Any) -> None:
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise TypeError(f"`{attribute.name}` must be a number, got {shown(value)}.")
        if not accepts(value):
            raise ValueError(f"`{attribute.name}` must be {expected}, got {shown(value)}.")

    return check


def one_of(*words: str) -> Check:
    """Returns an attrs validator for a closed set of words."""

    def check(_: Any, attribute: "attrs.Attribute[Any]", value: Any) -> None:
        if not isinstance(value, str) or value not in words:
            raise ValueError(f"`{attribute.name}` must be one of {', '.join(words)}, got {shown(value)}.")

    return check


def string(_: Any, attribute: "attrs.Attribute[Any]", value: Any) -> None:
    """Is an attrs validator for strings."""
    if not isinstance(value, str):
        raise TypeError(f"`{attribute.name}` must be a string, got {shown(value)}.")


def boolean(_: Any, attribute: "attrs.Attribute[Any]", value: Any) -> None:
    """Is an attrs validator for true and false."""
    if not isinstance(value, bool):
        raise TypeError(f"`{attribute.name}` must be true or false, got {shown(value)}.")


def boolean_or(*words: str) -> Check:
    """Returns an attrs validator for true, false, and a closed set of words."""

    def check(_: Any, attribute: "attrs.Attribute[Any]", value: Any) -> None:
        if not isinstance(value, (bool, str)):
            raise TypeError(f"`{attribute.name}` must be true or false, or {' or '.join(words)}, got {shown(value)}.")
        if isinstance(value, str) and value not in words:
            raise ValueError(f"`{attribute.name}` must be true or false, or {' or '.join(words)}, got {shown(value)}.")

    return check


@attrs.frozen(kw_only=True)
class MixtureConfig:
    """The options of one mixture: static and hashable, never a tensor.

    Attributes:
        K: Number of mixture components, at least 1.
        assigner: Where responsibilities come from, `kmeans_online` or `label_supervised`.
        mode: What a step keeps of earlier steps: `ema` averages, `per_batch` keeps nothing but the centroids, and
            `label_supervised` is `per_batch` with responsibilities from labels.
        ema_decay: Factor by which the weights of earlier samples are multiplied each step, in (0, 1); for `mode: ema`.
        max_assign_iters: Lloyd iterations (assign, then recompute) per step, at least 1.
        relocate: Whether `relocate` moves wasted components; it only does in `mode: ema` with k-means.

    Raises:
        TypeError: A value has the wrong type; the message names the option, the expected type and the value.
        ValueError: A value is out of range; likewise.

    Example:
        >>> import mixture_core
        >>> mixture_core.MixtureConfig(K=4, ema_decay=0.9).window
        10
        >>> mixture_core.MixtureConfig(K=0)
        Traceback (most recent call last):
        ValueError: `K` must be at least 1, got 0.
    """

    K: int = attrs.field(default=8, converter=as_integer, validator=integer(at_least=1))
    assigner: Literal["kmeans_online", "label_supervised"] = attrs.field(
        default="kmeans_online", validator=one_of("kmeans_online", "label_supervised")
    )
    mode: Literal["per_batch", "ema", "label_supervised"] = attrs.field(
        default="ema", validator=one_of("per_batch", "ema", "label_supervised")
    )
    ema_decay: float = attrs.field(
        default=0.95,
        converter=as_number,
        validator=number("greater than 0 and less than 1", lambda value: 0 < value < 1),
    )
    max_assign_iters: int = attrs.field(default=2, converter=as_integer, validator=integer(at_least=1))
    relocate: bool = attrs.field(default=True, validator=boolean)

    @property
    def uses_labels(self) -> bool:
        """Whether responsibilities come from labels."""
        return "label_supervised" in (self.assigner, self.mode)

    @property
    def averages(self) -> bool:
        """Whether a step keeps anything of earlier steps."""
        return self.mode == "ema"

    @property
    def relocates(self) -> bool:
        """Whether components are moved between steps."""
        return self.relocate and self.averages and not self.uses_labels

    @property
    def window(self) -> int:
        """Length of the averaging window in steps: ceil(1 / (1 - ema_decay)) in `mode: ema`, otherwise 1."""
        # Rounded first: 1 / (1 - 0.9) is slightly more than 10.
        return math.ceil(round(1 / (1 - self.ema_decay), 6)) if self.averages else 1
