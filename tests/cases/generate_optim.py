#!/usr/bin/env python3
"""Writes the optimizer cases: python generate_optim.py

Runs PyTorch's AdamW and SGD on the parameters and gradients of optim_inputs.py, compares where they
end with the formulas of optim_oracle.py, and writes them to optim_pytorch.json. A difference above
the dtype's tolerance stops the script.

The versions that made the committed file, on Python 3.11 and CPU: torch==2.15.0 numpy==2.4.6
"""

import json
import math
from collections import Counter
from pathlib import Path

import run_optim_pytorch as pytorch
from generate import RELATIVE, number, numbers
from optim_inputs import NORM_EPS, OptimCase, makers
from optim_oracle import HALVES, Answer, answer

# Of PyTorch and of the formulas in f64, relative to the largest value an element had, or to the
# learning rate: as in tests/support/optimizer_cases.rs. f64 is given a whole run, f32 a step.
F64_ERROR = 1e-12
F32_ERROR_A_STEP = 4 * 2.0**-24
# Halves are exact, and cases in which f32's error could round to another half are made again.
TRIES = 100


def distances(case: OptimCase, norms: list[float], ends: list[list[float]], right: Answer):
    """How far PyTorch is from the formulas, by dtype and in tolerances: 1 is the most."""
    for theirs, ours in zip(norms, right.total_norms, strict=True):
        relative = max(RELATIVE["f32" if p.dtype in HALVES else p.dtype] for p in case.params)
        yield "norm", away(theirs, ours, relative * ours)
    for param, theirs, ours, reaches in zip(
        case.params, ends, right.ends, right.reaches, strict=True
    ):
        for x, y, reach in zip(theirs, ours, reaches, strict=True):
            scale = max(reach, *case.lrs)
            match param.dtype:
                case "f64":
                    allowed = F64_ERROR * scale
                case "f32":
                    allowed = F32_ERROR_A_STEP * len(case.lrs) * scale
                case _:
                    allowed = 0.0
            yield param.dtype, away(x, y, allowed)


def away(theirs: float, ours: float, allowed: float) -> float:
    if math.isnan(theirs) and math.isnan(ours) or theirs == ours:
        return 0.0
    if not (math.isfinite(theirs) and math.isfinite(ours) and allowed):
        return math.inf
    return abs(theirs - ours) / allowed


def encode(case: OptimCase, norms: list[float], ends: list[list[float]], right: Answer) -> dict:
    hyper = {
        key: value if isinstance(value, bool) else number(value)
        for key, value in case.hyper.items()
    }
    encoded = {"id": case.id, "optimizer": {case.optimizer: hyper}}
    if case.is_scheduled:
        encoded["lrs"] = [number(lr) for lr in case.lrs]
    if case.master_weights:
        encoded["master_weights"] = True
    if case.clip:
        method, limit = case.clip
        encoded["clip"] = {method: number(limit)}
    if norms:
        encoded["total_norms"] = [number(norm) for norm in norms]
    encoded["tensors"] = []
    for param, end, reaches in zip(case.params, ends, right.reaches, strict=True):
        one = {"dtype": param.dtype, "shape": list(param.shape)}
        one["start"] = numbers(param.dtype, param.start)
        one["grads"] = [numbers(param.dtype, grad) for grad in param.grads]
        one["end"] = numbers(param.dtype, end)
        if any(was_further(*three) for three in zip(param.start, end, reaches, strict=True)):
            one["reach"] = [number(float(f"{reach:.2g}")) for reach in reaches]
        encoded["tensors"].append(one)
    return encoded


def was_further(start: float, end: float, reach: float) -> bool:
    return math.isfinite(end) and reach > 1.05 * max(abs(start), abs(end))


def main() -> None:
    counts, worst, encoded = Counter(), Counter(), {}
    for make in makers():
        for again in range(TRIES):
            case = make(again)
            right = answer(case, 2 * F32_ERROR_A_STEP)
            if not right.is_near_a_tie:
                break
            counts["made again"] += 1
        else:
            raise AssertionError(f"{case.id}: always near a tie")
        assert case.id not in encoded, case.id
        norms, ends = pytorch.run(case)
        for what, distance in distances(case, norms, ends, right):
            assert distance <= 1, f"{case.id}: {what} is {distance:.3g} tolerances away"
            key = f"{case.optimizer} {what}"
            worst[key] = max(worst[key], distance)
        encoded[case.id] = encode(case, norms, ends, right)
        counts[case.optimizer] += 1
    lines = [json.dumps(one, separators=(",", ":"), allow_nan=False) for one in encoded.values()]
    head = {"framework": pytorch.NAME, "version": pytorch.VERSION, "eps": NORM_EPS}
    head = json.dumps(head, separators=(",", ":"))[:-1]
    text = head + ',"cases":[\n' + ",\n".join(lines) + "\n]}\n"
    Path(__file__).with_name("optim_pytorch.json").write_text(text)
    print(f"pytorch {pytorch.VERSION}: {dict(counts)}, {len(text) / 1e3:.0f} kB")
    print("worst, in tolerances:", {key: float(f"{x:.2g}") for key, x in worst.items()})


if __name__ == "__main__":
    main()
