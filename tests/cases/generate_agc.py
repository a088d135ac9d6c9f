#!/usr/bin/env python3
"""Writes the cases of adaptive gradient clipping by units: python generate_agc.py timm|optax

Random weights and gradients of three digits, of every rank the framework knows, in f64, and what the framework makes of
them: `timm.utils.agc.adaptive_clip_grad` or `optax.adaptive_grad_clip`. Into agc_FRAMEWORK.json.

The versions that made the committed files, on Python 3.11 and CPU:

    timm:   torch==2.15.0 numpy==2.4.6, and timm==1.0.31 without its dependencies (pip install --no-deps)
    optax:  optax==0.2.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
"""

import importlib.metadata
import importlib.util
import json
import random
import sys
from pathlib import Path

CASES = 60
SHAPES = {
    "timm": [(), (5,), (4, 3), (3, 5), (1, 4), (4, 1), (3, 2, 2), (2, 2, 2, 3)],
    "optax": [(), (5,), (3, 4), (5, 3), (1, 4), (1, 4, 1), (2, 2, 3), (2, 2, 2, 3)],
}


def size(shape) -> int:
    product = 1
    for n in shape:
        product *= n
    return product


def numbers(rng: random.Random, n: int) -> list[float]:
    """Some of each size, and zeros."""
    run, scale = rng.randint(1, 4), 10 ** rng.uniform(-3, 1)
    parts = [1.0, rng.choice([0.0, 0.1]), 20.0, 0.3]
    return [float(f"{scale * parts[i // run % 4] * rng.uniform(-1, 1):.3g}") for i in range(n)]


def by_timm(clipping: float, eps: float, tensors) -> list[list[float]]:
    import torch

    # The package imports all of torchvision; this file needs torch only.
    path = Path(importlib.util.find_spec("timm").origin).parent / "utils" / "agc.py"
    spec = importlib.util.spec_from_file_location("agc", path)
    agc = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(agc)

    params = []
    for shape, weights, grad in tensors:
        param = torch.tensor(weights, dtype=torch.float64).reshape(shape).requires_grad_()
        param.grad = torch.tensor(grad, dtype=torch.float64).reshape(shape)
        params.append(param)
    agc.adaptive_clip_grad(params, clip_factor=clipping, eps=eps)
    return [param.grad.flatten().tolist() for param in params]


def by_optax(clipping: float, eps: float, tensors) -> list[list[float]]:
    import jax
    import jax.numpy as jnp
    import optax

    jax.config.update("jax_enable_x64", True)
    array = lambda values, shape: jnp.array(values, jnp.float64).reshape(shape)
    params = [array(weights, shape) for shape, weights, _ in tensors]
    grads = [array(grad, shape) for shape, _, grad in tensors]
    clip = optax.adaptive_grad_clip(clipping, eps)
    after, _ = clip.update(grads, clip.init(params), params)
    return [x.flatten().tolist() for x in after]


def main(name: str) -> None:
    run = {"timm": by_timm, "optax": by_optax}[name]
    cases = []
    for at in range(CASES):
        rng = random.Random(f"{name}/{at}")
        clipping = rng.choice([0.01, 0.1, 0.5, 2.0])
        eps = rng.choice([1e-3, 1e-2])
        shapes = rng.sample(SHAPES[name], 3)
        tensors = [(s, numbers(rng, size(s)), numbers(rng, size(s))) for s in shapes]
        after = run(clipping, eps, tensors)
        tensors = [
            {"shape": shape, "weights": weights, "grad": grad, "expect": expect}
            for (shape, weights, grad), expect in zip(tensors, after, strict=True)
        ]
        cases.append({"clipping": clipping, "eps": eps, "tensors": tensors})
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases)
    version = importlib.metadata.version(name)
    head = f'{{"framework":"{name}","version":"{version}","cases":[\n'
    Path(__file__).with_name(f"agc_{name}.json").write_text(f"{head}{lines}\n]}}\n")


if __name__ == "__main__":
    main(sys.argv[1])
