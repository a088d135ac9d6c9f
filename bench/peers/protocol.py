"""What the Python peers share: JSON lines on stdin and stdout, the gradients, a cold cache, the clock.

    <- {"peer": "pytorch", "version": "torch 2.15.0", "ops": [...], "dtypes": ["f32", "bf16"]}
    -> {"do": "load", "dtype": "f32", "shapes": [[768], ...], "cold_bytes": 134217728}
    <- {}
    -> {"do": "check", "op": "clip_adamw", "max_norm": 0.5, "lr": 0.001, ...}
    <- {"norm": 1.7, "sum": 0.25, "samples": [...]}
    -> {"do": "time", "rounds": 1}
    <- {"ms": [3.2]}

The first line comes unasked. `check` prepares an operation and shows what it does; `time` times the one prepared last. An answer
with "error" in it says why not.
"""

import argparse
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

# Every this-many-th element of all is shown, so that there are about so many of them.
SAMPLES = 4096
# Parameters come from indices that no gradient has, and are small, as in a model.
PARAMS_START, PARAMS_SCALE = 1 << 40, 0.0625
STEPS = ("clip_adamw", "clip_sgd")


def uniform(start, count):
    """Numbers in [-1, 1) for the indices from `start`: the top 24 bits of splitmix64, exact in f32."""
    out = np.empty(count, np.float32)
    for first in range(0, count, 1 << 20):
        end = min(first + (1 << 20), count)
        z = np.arange(start + first + 1, start + end + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
        out[first:end] = (z >> np.uint64(40)).astype(np.float32) * np.float32(2**-23) - np.float32(1)
    return out


def split(flat, shapes):
    ends = np.cumsum([np.prod(shape, dtype=np.int64) for shape in shapes])
    return [part.reshape(shape) for part, shape in zip(np.split(flat, ends[:-1]), shapes)]


def threads_from_args():
    """Pins the process to as many cores as it may have threads; before the framework is imported."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    threads = parser.parse_args().threads
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    return threads


class Bench:
    """Serves one framework, an object with

    - `name`, `version`, `ops`, `dtypes`, and `max_tensors` if more are not worth the wait for its compiler;
    - `load(grads, params, dtype)`: gradients to keep as arrays in f32, and a function that makes the parameters;
    - `prepare(op, settings)`: parameters and optimizer as at the start;
    - `set_grads(scale)`: gradients as a backward pass leaves them, times `scale`;
    - `run()`: what is timed; returns the norm, or None where its users don't get it;
    - `grads()`, `params()`: what it left, as arrays in f32.
    """

    def __init__(self, framework, threads):
        self.framework = framework
        self.threads = ThreadPoolExecutor(threads)

    def load(self, request):
        shapes = request["shapes"]
        count = sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes)
        grads = split(uniform(0, count), shapes)

        def params():
            return split(uniform(PARAMS_START, count) * np.float32(PARAMS_SCALE), shapes)

        self.framework.load(grads, params, request["dtype"])
        self.other = np.ones(request["cold_bytes"] // 8, np.uint64)
        return {}

    def check(self, request):
        self.op = request["op"]
        self.framework.prepare(self.op, request)
        self.framework.set_grads(1)
        norm = self.framework.run()
        if self.op in STEPS:
            # AdamW's first step is the same for any coefficient. The second shows it: half the gradient is below the limit.
            self.framework.set_grads(0.5)
            self.framework.run()
        after = self.framework.params() if self.op in STEPS else self.framework.grads()
        flat = np.concatenate([array.reshape(-1) for array in after])
        samples = flat[:: max(1, len(flat) // SAMPLES)]
        return {"norm": norm, "sum": float(flat.sum(dtype=np.float64)), "samples": samples.tolist()}

    def time(self, request):
        return {"ms": [self.time_once() for _ in range(request["rounds"])]}

    def time_once(self):
        self.framework.set_grads(1)
        sum(self.threads.map(np.sum, np.array_split(self.other, 64)))
        start = time.perf_counter_ns()
        self.framework.run()
        return (time.perf_counter_ns() - start) / 1e6

    def serve(self):
        # Frameworks print on stdout when they like.
        answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        framework = self.framework
        hello = {key: getattr(framework, key, None) for key in ("version", "ops", "dtypes", "max_tensors")}
        print(json.dumps({"peer": framework.name} | hello), file=answers, flush=True)
        for line in sys.stdin:
            request = json.loads(line)
            try:
                answer = getattr(self, request["do"])(request)
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"[:500]}
            print(json.dumps(answer), file=answers, flush=True)
