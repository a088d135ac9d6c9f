"""PyTorch's AdamW and SGD, after its clip_grad_norm_ or clip_grad_value_."""

import torch
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from optim_inputs import OptimCase
from optim_oracle import HALVES
from run_pytorch import DTYPES, NAME, VERSION  # noqa: F401 (the last two for generate_optim.py)


def optimizer(case: OptimCase, params: list[torch.Tensor]) -> torch.optim.Optimizer:
    hyper = dict(case.hyper)
    if case.optimizer == "sgd":
        return torch.optim.SGD(params, **hyper)
    betas = hyper.pop("beta1"), hyper.pop("beta2")
    return torch.optim.AdamW(params, betas=betas, **hyper)


def widened(dtype: str) -> torch.dtype:
    """Of what PyTorch trains: its state has the parameter's dtype, where ours is f32 for halves."""
    return torch.float32 if dtype in HALVES else DTYPES[dtype]


def filled(values: list[float], dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    as_f64 = torch.tensor(values, dtype=torch.float64).reshape(shape)
    return as_f64.to(DTYPES[dtype]).to(widened(dtype))


def run(case: OptimCase) -> tuple[list[float], list[list[float]]]:
    """The norms of the clipped steps, and the parameters after the last."""
    params = [filled(p.start, p.dtype, p.shape) for p in case.params]
    opt = optimizer(case, params)
    norms = []
    for step, lr in enumerate(case.lrs):
        opt.param_groups[0]["lr"] = lr
        for param, one in zip(params, case.params, strict=True):
            grad = one.grads[step]
            param.grad = None if grad is None else filled(grad, one.dtype, one.shape)
        match case.clip:
            case ("norm", limit):
                norms.append(clip_grad_norm_(params, limit).double().item())
            # PyTorch raises where no parameter has a gradient.
            case ("value", limit) if any(p.grad is not None for p in params):
                clip_grad_value_(params, limit)
        opt.step()
        if not case.master_weights:
            for param, one in zip(params, case.params, strict=True):
                param.copy_(param.to(DTYPES[one.dtype]))
    ends = [p.to(DTYPES[one.dtype]) for p, one in zip(params, case.params, strict=True)]
    return norms, [end.double().flatten().tolist() for end in ends]
