"""Time the quantizer and a training step. On a CPU only ratios within one run mean anything.

python bench.py                      the quantizer on one thread, then steps of the nano preset
python bench.py --preset small --rounds 20
"""

import argparse
import dataclasses
import json
import statistics
import time

import torch

import fp4
from model import GPT
from train import PRESETS, Config, make_optimizer


def seconds(run, repeats, device):
    """Median time of run() over repeats, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def quantizer(device, repeats=50):
    """ns a value for quantize (amax, scales, codes, packing), a 2048 x 1024 FP32 matrix."""
    x = torch.randn(2048, 1024, device=device)
    cases = {
        "1x16": {},
        "1x16 stochastic": {"stochastic": True, "seed": 1},
        "16x1": {"block": (16, 1)},
        "16x16": {"block": (16, 16)},
    }
    print(f"{'quantize, ns a value':24} {'fused':>8} {'plain':>8} {'same bits':>10}")
    plain = [
        (seconds(lambda a=a: fp4.quantize(x, **a), 5, device), fp4.quantize(x, **a))
        for a in cases.values()
    ]
    start = time.perf_counter()
    backend = fp4.fuse() if device.type == "cpu" else "plain PyTorch on the GPU"
    fused = [
        (seconds(lambda a=a: fp4.quantize(x, **a), repeats, device), fp4.quantize(x, **a))
        for a in cases.values()
    ]
    for name, (slow, q), (fast, r) in zip(cases, plain, fused, strict=True):
        same = all(
            torch.equal(a.view(torch.uint8), b.view(torch.uint8))
            for a, b in zip(q.tensors()[:2], r.tensors()[:2], strict=True)
        )
        print(f"{name:24} {fast / x.numel() * 1e9:8.2f} {slow / x.numel() * 1e9:8.2f} {same!s:>10}")
    total = time.perf_counter() - start
    print(f"{backend}; compiled and measured in {total:.0f} s")


def step(preset, precisions, rounds, device):
    """Median time of a training step by precision, the precisions taking turns."""
    values = json.loads((PRESETS / f"{preset}.json").read_text())
    config = Config(**values, vocab_size=4096)
    shape = (config.batch_size // config.grad_accum, config.block_size + 1)
    window = torch.randint(config.vocab_size, shape, device=device)
    runs = {}
    for precision in precisions:
        model = GPT(dataclasses.replace(config, precision=precision)).to(device)
        optimizer = make_optimizer(model, config)

        def run(model=model, optimizer=optimizer):
            model(window[:, :-1], window[:, 1:]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        start = time.perf_counter()
        run()
        print(f"{precision:20} first step {time.perf_counter() - start:6.1f} s")
        runs[precision] = run
    times = {precision: [] for precision in runs}
    for _ in range(rounds):
        for precision, run in runs.items():
            times[precision].append(seconds(run, 1, device))
    base = statistics.median(times["bf16"])
    vanilla = statistics.median(times["fp4"])
    print(f"{preset + ' step':20} {'ms':>8} {'/ bf16':>8} {'/ fp4':>8}")
    for precision, t in times.items():
        t = statistics.median(t)
        print(f"{precision:20} {t * 1e3:8.1f} {t / base:8.3f} {t / vanilla:8.3f}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--preset", default="nano", choices=sorted(p.stem for p in PRESETS.glob("*"))
    )
    parser.add_argument("--precisions", nargs="*", default=[p for p in fp4.RECIPES if p != "fp32"])
    parser.add_argument("--rounds", type=int, default=15, help="steps of each precision (15)")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="for the steps"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}")
    torch.set_num_threads(1)
    quantizer(device)
    torch.set_num_threads(args.threads)
    step(args.preset, args.precisions, args.rounds, device)


if __name__ == "__main__":
    main()
