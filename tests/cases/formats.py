"""The four floating-point formats, rounded to exactly: no framework, no double rounding."""

import math
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Format:
    bits: int  # of the significand, the hidden one included
    min_exponent: int  # of the smallest normal number
    max_exponent: int

    @property
    def largest(self) -> Fraction:
        return (2 - Fraction(1, 2 ** (self.bits - 1))) * Fraction(2) ** self.max_exponent

    @property
    def smallest(self) -> Fraction:
        """The smallest subnormal number."""
        return Fraction(2) ** (self.min_exponent - self.bits + 1)

    @property
    def smallest_normal(self) -> Fraction:
        return Fraction(2) ** self.min_exponent


FORMATS = {
    "f64": Format(53, -1022, 1023),
    "f32": Format(24, -126, 127),
    "f16": Format(11, -14, 15),
    "bf16": Format(8, -126, 127),
}


def round_to(dtype: str, x: Fraction | float) -> float:
    """The value of the format nearest to `x`, ties to even; beyond the largest one, infinity."""
    if isinstance(x, float) and not math.isfinite(x):
        return x
    x = Fraction(x)
    if x == 0:
        return 0.0
    form = FORMATS[dtype]
    exponent = abs(x.numerator).bit_length() - x.denominator.bit_length()
    if abs(x) < Fraction(2) ** exponent:
        exponent -= 1
    quantum = Fraction(2) ** (max(exponent, form.min_exponent) - form.bits + 1)
    rounded = round(x / quantum) * quantum
    if abs(rounded) > form.largest:
        return math.inf if x > 0 else -math.inf
    return float(rounded)


def shortest(dtype: str, value: float) -> float:
    """The f64 with the fewest digits that becomes `value` in `dtype`, also by way of f32."""
    if dtype == "f64" or not math.isfinite(value) or value == 0:
        return value
    for digits in range(1, 18):
        short = float(f"{value:.{digits}g}")
        if round_to(dtype, short) == value == round_to(dtype, round_to("f32", short)):
            return short
    raise AssertionError(f"{value!r} is no {dtype}")
