#!/usr/bin/env python3
"""PyTorch's clipping and fused optimizers on a GPU, for `bench cuda`: the lines of protocol.py, but for

    -> {"do": "load", "dtype": "f32", "shapes": [[768], ...], "is_cold": true, "scratch_bytes": 536870912, "busy_fills": 8}
    -> {"do": "time", "start": "idle"}
    <- {"ms": 0.32}
    -> {"do": "unload"}

Gradients and the sum of what a task leaves are worked out on the GPU, and the GPU's events are the clock. Before a timed call
`scratch_bytes` of other memory are written over: `busy_fills` times for the start `busy`, and then the GPU still has that to do when the
call begins; once for `idle`, or never if the set is not cold, and the GPU is waited for.
"""

import argparse
import json
import math
import sys

try:
    import protocol
    import torch
except ImportError as error:
    print(json.dumps({"error": f"{error}; install torch and numpy"}), flush=True)
    sys.exit(1)

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
# Elements that are made at a time.
CHUNK = 1 << 24


def signed(constant):
    """The int64 with these bits, whose products wrap as those of uint64 do."""
    return constant - (1 << 64) if constant >> 63 else constant


def shifted(z, count):
    """A logical shift to the right: int64's keeps the sign."""
    return (z >> count) & ((1 << (64 - count)) - 1)


def uniform(start, count, scale, dtype, device):
    """protocol.uniform on the GPU."""
    out = torch.empty(count, dtype=dtype, device=device)
    for first in range(0, count, CHUNK):
        end = min(first + CHUNK, count)
        z = torch.arange(start + first + 1, start + end + 1, dtype=torch.int64, device=device)
        z = z * signed(0x9E3779B97F4A7C15)
        z = (z ^ shifted(z, 30)) * signed(0xBF58476D1CE4E5B9)
        z = (z ^ shifted(z, 27)) * signed(0x94D049BB133111EB)
        z = z ^ shifted(z, 31)
        out[first:end] = (shifted(z, 40).to(torch.float32) * 2**-23 - 1) * scale
    return out


class Cuda(protocol.Bench):
    name = "pytorch"
    version = f"torch {torch.__version__}"
    ops = ["total_norm", "clip_grad_norm", "clip_adamw", "clip_sgd", "none_sgd"]
    dtypes = ["f32", "bf16"]
    max_tensors = None

    def __init__(self, device):
        self.framework = self  # protocol's `serve` asks it for its name
        self.device = device
        self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.unload({})

    def unload(self, request):
        self.fresh, self.vars, self.optimizer, self.scratch = [], [], None, None
        torch.cuda.empty_cache()
        return {}

    def load(self, request):
        self.unload(request)
        dtype = DTYPES[request["dtype"]]
        start = 0
        for shape in request["shapes"]:
            count = math.prod(shape)
            self.fresh.append(uniform(start, count, 1, dtype, self.device).reshape(shape))
            start += count
            var = torch.nn.Parameter(torch.empty_like(self.fresh[-1]))
            var.grad = torch.empty_like(var)
            self.vars.append(var)
        self.scratch = torch.zeros(request["scratch_bytes"], dtype=torch.uint8, device=self.device)
        self.idle_fills, self.busy_fills = int(request["is_cold"]), request["busy_fills"]
        torch.cuda.empty_cache()
        return {}

    def prepare(self, request):
        self.optimizer = None
        start = protocol.PARAMS_START
        with torch.no_grad():
            for var in self.vars:
                values = uniform(start, var.numel(), protocol.PARAMS_SCALE, var.dtype, self.device)
                var.copy_(values.reshape(var.shape))
                start += var.numel()
        torch.cuda.empty_cache()
        op = request["op"]
        self.run, self.max_norm = getattr(self, op), request["max_norm"]
        if op == "clip_adamw":
            betas = (request["beta1"], request["beta2"])
            decay = request["weight_decay"]
            self.optimizer = torch.optim.AdamW(
                self.vars, request["lr"], betas, request["adam_eps"], decay, fused=True
            )
        elif op in ("clip_sgd", "none_sgd"):
            self.optimizer = torch.optim.SGD(self.vars, request["lr"], fused=True)
        return self.optimizer is not None

    def set_grads(self, scale):
        grads = [var.grad for var in self.vars]
        torch._foreach_copy_(grads, self.fresh)
        if scale != 1:
            torch._foreach_mul_(grads, scale)

    def check(self, request):
        is_step = self.prepare(request)
        self.set_grads(1)
        norm = float(self.run())
        if is_step:
            # AdamW's first step is the same for any coefficient. The second shows it: half the gradient is below the limit.
            self.set_grads(0.5)
            self.run()
        after = [(var if is_step else var.grad).detach().reshape(-1) for var in self.vars]
        stride = max(1, sum(len(values) for values in after) // protocol.SAMPLES)
        samples, start = [], 0
        for values in after:
            samples += values[-start % stride :: stride].float().tolist()
            start += len(values)
        return {"norm": norm, "sum": sum(float(values.sum(dtype=torch.float64)) for values in after), "samples": samples}

    def time(self, request):
        self.set_grads(1)
        is_idle = request["start"] == "idle"
        for _ in range(self.idle_fills if is_idle else self.busy_fills):
            self.scratch.zero_()
        if is_idle:
            torch.cuda.synchronize()
        self.begin.record()
        self.run()
        self.end.record()
        self.end.synchronize()
        return {"ms": self.begin.elapsed_time(self.end)}

    def total_norm(self):
        return torch.nn.utils.get_total_norm([var.grad for var in self.vars], foreach=True).item()

    # What follows stays on the GPU: PyTorch's users read the norm when they like.

    def clip_grad_norm(self):
        return torch.nn.utils.clip_grad_norm_(self.vars, self.max_norm, foreach=True)

    def clip_step(self):
        norm = self.clip_grad_norm()
        self.optimizer.step()
        return norm

    clip_adamw = clip_sgd = clip_step

    def none_sgd(self):
        norm = torch.nn.utils.get_total_norm([var.grad for var in self.vars], foreach=True)
        self.optimizer.step()
        return norm


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not torch.cuda.is_available():
        print(json.dumps({"error": f"torch {torch.__version__} finds no GPU"}), flush=True)
        sys.exit(1)
    torch.cuda.set_device(args.device)
    Cuda(torch.device("cuda", args.device)).serve()


if __name__ == "__main__":
    main()
