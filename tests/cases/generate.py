#!/usr/bin/env python3
"""Writes the reference cases of one framework: python generate.py pytorch|tensorflow|optax

Runs the framework on the gradients of inputs.py, compares what it returns with the exact answer of
oracle.py, and writes both to FRAMEWORK.json. Where they differ by more than the dtype's tolerance
the case says why; a difference with no reason known here stops the script.

The versions that made the committed files, on Python 3.11 and CPU, each a pip requirements list:

    pytorch:     torch==2.15.0 numpy==2.4.6
    tensorflow:  tensorflow-cpu==2.21.0 numpy==2.4.6
    optax:       optax==0.2.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
"""

import importlib
import json
import math
import sys
from collections import Counter
from pathlib import Path

from formats import FORMATS, shortest
from oracle import answer

# As in tests/support/cases.rs: one unit in the last place of the halves.
RELATIVE = {"f64": 1e-12, "f32": 1e-6, "f16": 1e-3, "bf16": 8e-3}
# A distance in tolerances between these says neither "agrees" nor "differs" with a margin.
AGREES, DIFFERS = 0.98, 1.1


def distance(dtype: str, theirs: float, ours: float) -> float:
    """How many tolerances lie between two numbers."""
    if math.isnan(theirs) and math.isnan(ours) or theirs == ours:
        return 0.0
    if not (math.isfinite(theirs) and math.isfinite(ours)):
        return math.inf
    # Subnormal numbers have fewer digits.
    return abs(theirs - ours) / (RELATIVE[dtype] * abs(ours) + float(FORMATS[dtype].smallest))


def coarsest(case) -> str:
    return max((t.dtype for t in case.tensors), key=RELATIVE.__getitem__)


def furthest(case, norms, afters) -> float:
    """The largest distance in a case: of the norm and of all elements."""
    (their_norm, our_norm), (theirs, ours) = norms, afters
    distances = [0.0]
    if our_norm is not None:
        distances.append(distance(coarsest(case), their_norm, our_norm))
    if case.op != "total_norm":
        for tensor, their, our in zip(case.tensors, theirs, ours, strict=True):
            pairs = zip(their or (), our or (), strict=True)
            distances += [distance(tensor.dtype, a, b) for a, b in pairs]
    return max(distances)


def reason(case, name: str, their_norm: float | None, our_norm: float | None) -> str:
    """Why the framework's answer is not ours."""
    dtypes = {t.dtype for t in case.tensors}
    writes_nan = name == "tensorflow" or not case.is_finite or their_norm == math.inf
    if case.limit == math.inf and writes_nan:
        return "an infinite limit writes NaN; ours changes nothing"
    if case.limit == 0 and our_norm == 0:
        return "a zero limit and a zero norm give NaN; ours gives zeros"
    assert case.is_finite, f"{case.id}: {their_norm} for {our_norm}"
    if their_norm == math.inf:
        return "the norm overflows"
    if their_norm is not None and their_norm < our_norm / 2:
        return "the norm underflows"
    if "/subnormal/" in case.id:
        return "subnormal numbers become zero"
    if len(dtypes) > 1:
        return "each tensor's norm is rounded to its own dtype"
    if dtypes <= {"f16", "bf16"}:
        return "the norm and the scaling are computed in half precision"
    if dtypes == {"f32"} and case.norm_type not in (1, 2, math.inf):
        return "powers and roots in f32 lose digits"
    raise AssertionError(f"{case.id}: {their_norm} for {our_norm}")


def encode(case, framework) -> tuple[dict | None, str]:
    """The case as JSON, and a word for the count."""
    their_norm, theirs = framework.run(case)
    our_norm, ours = answer(case)
    away = furthest(case, (their_norm, our_norm), (theirs, ours))
    if AGREES < away < DIFFERS:
        return None, "too close to call"
    differs = away >= DIFFERS
    encoded = {"id": case.id, "op": case.op}
    if case.op != "clip_grad_value":
        encoded["norm_type"] = number(case.norm_type)
    for key in ["limit", "known_norm"]:
        if getattr(case, key) is not None:
            encoded[key] = number(getattr(case, key))
    encoded["policy"] = "error" if case.is_finite else "propagate"
    if differs:
        encoded["differs"] = reason(case, framework.NAME, their_norm, our_norm)
    if our_norm is not None:
        encoded["exact_norm"] = number(our_norm)
        encoded["total_norm"] = number(their_norm)
    encoded["tensors"] = []
    for tensor, our, their in zip(case.tensors, ours, theirs, strict=True):
        one = {"dtype": tensor.dtype, "shape": list(tensor.shape)}
        one["grad"] = numbers(tensor.dtype, tensor.grad)
        if tensor.grad is not None and case.op != "total_norm":
            one["expect"] = numbers(tensor.dtype, our if differs else their)
            if differs:
                one["theirs"] = numbers(tensor.dtype, their)
        encoded["tensors"].append(one)
    return encoded, "differs" if differs else "agrees"


def number(x: float) -> float | int | str:
    """JSON has no NaN and no infinity."""
    if not math.isfinite(x):
        return "nan" if math.isnan(x) else "inf" if x > 0 else "-inf"
    short = x.is_integer() and abs(x) < 1e6 and str(x) != "-0.0"
    return int(x) if short else x


def numbers(dtype: str, values: list[float] | None) -> list | None:
    return None if values is None else [number(shortest(dtype, x)) for x in values]


def main() -> None:
    name = sys.argv[1] if len(sys.argv) == 2 else sys.exit(__doc__)
    framework = importlib.import_module(f"run_{name}")
    count, encoded = Counter(), []
    cases = framework.cases().cases
    assert len({case.id for case in cases}) == len(cases), "ids must differ"
    for case in cases:
        one, word = encode(case, framework)
        count[word] += 1
        if one:
            encoded.append(json.dumps(one, separators=(",", ":"), allow_nan=False))
    head = {"framework": name, "version": framework.VERSION, "eps": framework.EPS}
    head = json.dumps(head, separators=(",", ":"))[:-1]
    text = head + ',"cases":[\n' + ",\n".join(encoded) + "\n]}\n"
    Path(__file__).with_name(f"{name}.json").write_text(text)
    print(f"{name} {framework.VERSION}: {dict(count)}, {len(text) / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
