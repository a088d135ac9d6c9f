#!/usr/bin/env python3
"""PyTorch's clipping and fused optimizers. See protocol.py."""

import protocol

threads = protocol.threads_from_args()

import torch  # noqa: E402

torch.set_num_threads(threads)


class PyTorch:
    name = "pytorch"
    version = f"torch {torch.__version__}"
    ops = ["total_norm", "clip_grad_norm", "clip_grad_norm_noop", "clip_grad_value", "clip_adamw", "clip_sgd"]
    dtypes = ["f32", "bf16"]

    def load(self, grads, params, dtype):
        self.dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[dtype]
        self.fresh = [torch.from_numpy(grad).to(self.dtype, copy=True) for grad in grads]
        self.params_at_start = params
        self.vars = [torch.nn.Parameter(torch.empty_like(grad)) for grad in self.fresh]
        for var in self.vars:
            var.grad = torch.empty_like(var)

    def prepare(self, op, settings):
        with torch.no_grad():
            for var, start in zip(self.vars, self.params_at_start()):
                var.copy_(torch.from_numpy(start))
        self.run = getattr(self, op)
        self.max_norm, self.clip_value = settings["max_norm"], settings["clip_value"]
        self.optimizer = None
        if op == "clip_adamw":
            betas = (settings["beta1"], settings["beta2"])
            decay = settings["weight_decay"]
            self.optimizer = torch.optim.AdamW(
                self.vars, settings["lr"], betas, settings["adam_eps"], decay, fused=True
            )
        elif op == "clip_sgd":
            self.optimizer = torch.optim.SGD(self.vars, settings["lr"], fused=True)

    def set_grads(self, scale):
        grads = [var.grad for var in self.vars]
        torch._foreach_copy_(grads, self.fresh)
        if scale != 1:
            torch._foreach_mul_(grads, scale)

    def total_norm(self):
        return torch.nn.utils.get_total_norm([var.grad for var in self.vars]).item()

    def clip_grad_norm(self):
        return torch.nn.utils.clip_grad_norm_(self.vars, self.max_norm).item()

    clip_grad_norm_noop = clip_grad_norm

    def clip_grad_value(self):
        torch.nn.utils.clip_grad_value_(self.vars, self.clip_value)

    def clip_step(self):
        norm = self.clip_grad_norm()
        self.optimizer.step()
        return norm

    clip_adamw = clip_sgd = clip_step

    def grads(self):
        return [var.grad.float().numpy() for var in self.vars]

    def params(self):
        return [var.detach().float().numpy() for var in self.vars]


protocol.Bench(PyTorch(), threads).serve()
