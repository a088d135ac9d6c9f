#!/usr/bin/env python3
"""The example's model, data and loss in PyTorch: the reference that tests/model/pytorch_parity.rs compares with.

    python -m venv .venv && .venv/bin/pip install -r requirements.txt
    .venv/bin/python train.py            # writes reference.safetensors beside this file
    .venv/bin/python train.py --sweep    # prints final test losses over learning rates, writes nothing

Runs on one CPU thread in f32 with deterministic kernels. Tensors in reference.safetensors:

    init.NAME                          initial weights (seed 0)
    batches            [200, 32]       indices into the train windows, uint32
    sgd.loss           [200]           loss before each step: clip_grad_norm_(1.0), then SGD(lr 3e-3), p = 4
    sgd.total_norm     [200]           what clip_grad_norm_ returned
    sgd.final.NAME                     weights after the last step
    adamw.*                            the same with AdamW(lr 1e-3, betas .9 .999, eps 1e-8, weight_decay .01)
    data.train_sums, data.test_sums    sum of x plus sum of y of every window, f64, in order
    data.first_x, data.first_y         the first train window
"""

import argparse
import csv
import datetime
import math
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import nn

HERE = Path(__file__).resolve().parent
CONTEXT, WIDTH, HEADS, LAYERS, FEATURES = 32, 32, 4, 2, 7
STEPS, BATCH, MAX_NORM, POWER, ALPHA = 200, 32, 1.0, 4.0, 4.0


def read_days(path):
    """Rows of features per city, in the order of the file."""
    cities = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            rows = cities.setdefault(row["location"], [])
            season = 2 * math.pi * datetime.date.fromisoformat(row["date"]).timetuple().tm_yday / 365.25
            rows.append((
                (float(row["temp_max"]) - 15) / 10,
                (float(row["temp_min"]) - 8) / 10,
                float(row["precipitation"]) / 10,
                float(row["wind"]) / 5,
                math.sin(season),
                math.cos(season),
                list(cities).index(row["location"]),
            ))
    return [np.array(rows, dtype=np.float64) for rows in cities.values()]


def windows(cities):
    """(x [n, 32, 7], y [n, 32]) to train on and to test on: the first 75 % of a city's days, and the rest."""
    parts = ([], [])
    for days in cities:
        cut = len(days) * 3 // 4
        for part, segment in zip(parts, (days[:cut], days[cut:])):
            part.extend(segment[i : i + CONTEXT + 1] for i in range(len(segment) - CONTEXT))
    return [
        (torch.from_numpy(all[:, :-1]).float().contiguous(), torch.from_numpy(all[:, 1:, 0]).float().contiguous())
        for all in (np.stack(part) for part in parts)
    ]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = (layer(x).view(b, t, HEADS, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = q @ k.transpose(2, 3) / math.sqrt(WIDTH // HEADS)
        future = torch.ones(t, t, dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(future, -math.inf).softmax(-1) @ v
        return self.o(mixed.transpose(1, 2).reshape(b, t, WIDTH))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln1, self.attn = nn.LayerNorm(WIDTH), Attention()
        self.ln2, self.mlp = nn.LayerNorm(WIDTH), Mlp()

    def forward(self, h):
        h = h + self.attn(self.ln1(h))
        return h + self.mlp(self.ln2(h))


class Forecaster(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(FEATURES, WIDTH)
        self.pos = nn.Parameter(0.02 * torch.randn(CONTEXT, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.ln_f, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, x):
        h = self.embed(x) + self.pos
        for block in self.blocks:
            h = block(h)
        return self.head(self.ln_f(h)).squeeze(-1)


def weighted_power(pred, target, power):
    """mean(w |e|^p) with w = 1 + alpha |target|."""
    return ((1 + ALPHA * target.abs()) * (pred - target).abs() ** power).mean()


def train(model, make_optimizer, x, y, batches, power, max_norm):
    """The loss before each step and the norm before clipping."""
    optimizer = make_optimizer(model.parameters())
    losses, norms = [], []
    for indices in batches:
        loss = weighted_power(model(x[indices]), y[indices], power)
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm).item())
        optimizer.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
    return losses, norms


OPTIMIZERS = {
    "sgd": lambda lr: lambda params: torch.optim.SGD(params, lr=lr),
    "adamw": lambda lr: lambda params: torch.optim.AdamW(
        params, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01
    ),
}


def fresh_model():
    torch.manual_seed(0)
    return Forecaster()


def arrays(model, prefix):
    return {f"{prefix}.{name}": tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}


def write_reference(train_set, test_set):
    x, y = train_set
    batches = np.random.default_rng(1).integers(len(x), size=(STEPS, BATCH))
    out = arrays(fresh_model(), "init") | {"batches": batches.astype(np.uint32)}
    for name, lr in (("sgd", 3e-3), ("adamw", 1e-3)):
        model = fresh_model()
        losses, norms = train(model, OPTIMIZERS[name](lr), x, y, torch.from_numpy(batches), POWER, MAX_NORM)
        out[f"{name}.loss"] = np.array(losses)
        out[f"{name}.total_norm"] = np.array(norms)
        out |= arrays(model, f"{name}.final")
        clipped = sum(norm > MAX_NORM for norm in norms) / STEPS
        print(f"{name}: loss {losses[0]:.4f} -> {losses[-1]:.4f}, norm up to {max(norms):.1f}, clipped {clipped:.0%}")
    for part, (px, py) in (("train", train_set), ("test", test_set)):
        out[f"data.{part}_sums"] = (px.double().sum((1, 2)) + py.double().sum(1)).numpy()
    out |= {"data.first_x": x[0].numpy(), "data.first_y": y[0].numpy()}
    made_by = f"train.py with torch {torch.__version__}, numpy {np.__version__}, python {sys.version.split()[0]}"
    save_file(out, HERE / "reference.safetensors", metadata={"made_by": made_by})


def final_test_loss(train_set, test_set, optimizer, lr, power, max_norm, steps=500):
    model = fresh_model()
    x, y = train_set
    batches = torch.from_numpy(np.random.default_rng(1).integers(len(x), size=(steps, BATCH)))
    train(model, OPTIMIZERS[optimizer](lr), x, y, batches, power, max_norm)
    with torch.no_grad():
        return weighted_power(model(test_set[0]), test_set[1], power).item()


def sweep(train_set, test_set):
    x, y = test_set
    for power in (3.0, 4.0):
        grid = torch.arange(-2, 2.01, 0.05)
        constant = min(weighted_power(value.expand_as(y), y, power).item() for value in grid)
        print(f"p {power:g}: best constant {constant:.3f}, persistence {weighted_power(x[..., 0], y, power).item():.3f}")
    sgd_rates, adamw_rates = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1), (1e-4, 1e-3, 1e-2)
    for optimizer, power, rates in (("sgd", 3.0, sgd_rates), ("sgd", 4.0, sgd_rates), ("adamw", 4.0, adamw_rates)):
        for label, max_norm in (("none", math.inf), ("norm:1.0", 1.0)):
            found = [final_test_loss(train_set, test_set, optimizer, lr, power, max_norm) for lr in rates]
            cells = "  ".join(f"{lr:g}: {loss:.3f}" for lr, loss in zip(rates, found))
            print(f"{optimizer} p {power:g} {label:9} {cells}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="print final test losses over learning rates instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    train_set, test_set = windows(read_days(HERE.parent / "data" / "weather.csv"))
    (sweep if args.sweep else write_reference)(train_set, test_set)


if __name__ == "__main__":
    main()
