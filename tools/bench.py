"""Time the quantizer, the kernels, and training steps by precision.

    python -m tools.bench
    python -m tools.bench --shape 124m --precisions bf16 fp4 fp4_mean fp4_hadamard
    python -m tools.bench --run out/smollm2
    python -m tools.bench --report out/report     all that a GPU can show, in 8 minutes

First fp4.quantize on a CPU, fused and plain. Then the kernels on a GPU, against what bounds them: a
copy of the same bytes, and cuBLAS's BF16 product of the same shape. Last whole steps, forward,
backward, clipping and AdamW, of a shape or of a run's model. On a CPU only ratios within one run
count: it is shared, and its clock moves. A report runs each part in a process of its own, most
valuable first, with a log that is there even if the part never ends; on a CPU with tiny sizes, in
Triton's interpreter.
"""

import argparse
import collections
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import fp4
from model import GPT, ModelConfig

ROOT = Path(__file__).parents[1]
SHAPES = {  # of train.py's presets: the model, sequences a micro-step, tokens of one
    "nano": ({}, 16, 128),
    "small": ({"n_layer": 8, "n_head": 8, "n_kv_head": 4, "dim": 512, "ffn_dim": 1536}, 64, 256),
    "124m": ({"n_layer": 12, "n_head": 12, "n_kv_head": 6, "dim": 768, "ffn_dim": 2304}, 16, 1024),
}
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# Tokens, features: of the kernels' table.
MATRICES = ((8192, 1024), (8192, 4096), (16384, 8192)) if GPU else ((32, 64),)
# Kernels of a step, by their names; what is neither is the rest.
KINDS = {
    "rounding": r"_column|_center_quantize|_quantize_weight|_project_quantize|_make_table",
    "GEMM": r"gemm|cutlass|nvjet|cublas|xmma|_decode_matrix",
}


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


# ------------------------------------------------------------------------------------------------
# The quantizer, on a CPU.


def quantizer(repeats=30):
    """ns a value for fp4.quantize (amax, scales, codes, packing) of a 2048 x 1024 FP32 matrix."""
    cpu = torch.device("cpu")
    x = torch.randn(2048, 1024)
    cases = {  # block, seed
        "1x16": ((1, 16), None),
        "1x16 stochastic": ((1, 16), 1),
        "16x1": ((16, 1), None),
        "16x16": ((16, 16), None),
    }

    def measure(repeats):
        results = {}
        for name, (block, seed) in cases.items():
            t = seconds(lambda b=block, s=seed: fp4.quantize(x, b, s), repeats, cpu)
            results[name] = t / x.numel() * 1e9, fp4.quantize(x, block, seed)
        return results

    plain = measure(repeats=5)
    start = time.perf_counter()
    line = fp4.use_fast_path(cpu)
    fused = measure(repeats)
    print(f"{'quantize, ns a value':24} {'fused':>8} {'plain':>8} {'same bits':>10}")
    for name, (fast, q) in fused.items():
        slow, want = plain[name]
        pairs = zip(q.tensors(), want.tensors(), strict=True)
        same = all(torch.equal(a.float(), b.float()) for a, b in pairs)
        print(f"{name:24} {fast:8.2f} {slow:8.2f} {same!s:>10}")
    print(f"{line}; compiled and measured in {time.perf_counter() - start:.0f} s")


# ------------------------------------------------------------------------------------------------
# The kernels, on a GPU.


def gpu_seconds(run, inputs, repeats=20):
    """Median GPU time of run(*input), by a CUDA graph over all inputs: they take turns, so that
    little is found in L2, and nothing waits for Python."""
    if not GPU:
        return seconds(lambda: run(*inputs[0]), 1, torch.device("cpu"))
    run(*inputs[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [run(*args) for args in inputs]  # or all would be written to the same place
    times = []
    for _ in range(repeats + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3 / len(inputs))
    del kept
    return statistics.median(times[1:])


def random(*shape):
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)


def rounding_table(kernels):
    """Statistics and rounding, against one read and one write of 1 GiB in the same run."""
    a, b = (random(1 << 29 if GPU else 1 << 10) for _ in range(2))
    copy = 4 * a.numel() / gpu_seconds(lambda x, y: torch.neg(x, out=y), [(a, b)])
    del a, b
    print(f"\n{kernels.backend()}; copy {copy / 1e12:.2f} TB/s")
    print(f"{'tokens x features':42} {'us':>9} {'TB/s':>6} {'/ copy':>7}")
    seeds = torch.tensor([1, 2], dtype=torch.int32, device=DEVICE)

    def round_both(x, mean, table, seeds=None):
        return kernels.round_residual(x, mean, table, True, True, seeds)

    cases = {  # bytes a value, and what runs
        "statistics, mean": (2, lambda x, mean, table: kernels.statistics(x, True)),
        "statistics, no mean": (2, lambda x, mean, table: kernels.statistics(x, False)),
        "round, to nearest": (3.125, round_both),
        "round, stochastic": (3.125, lambda *args: round_both(*args, seeds)),
    }
    for tokens, m in MATRICES:
        count = max(2, (1 << 29) // (2 * tokens * m)) if GPU else 1  # 512 MB
        xs = [random(tokens, m) for _ in range(count)]
        inputs = [(x, *kernels.statistics(x, True)) for x in xs]
        for name, (size, run) in cases.items():
            t = gpu_seconds(run, inputs)
            rate = size * tokens * m / t
            label = f"{tokens} x {m} {name}"
            print(f"{label:42} {t * 1e6:9.1f} {rate / 1e12:6.2f} {rate / copy:7.1%}")


def gemm_table(kernels):
    """The three GEMMs of a square W with their means, by one kernel and by way of cuBLAS, against
    cuBLAS's product of BF16."""
    variants = {"one kernel": kernels.gemm_fused}
    if GPU:
        variants["cuBLAS"] = kernels.gemm_cublas
    title = "GEMM of tokens x features by a square W"
    print(f"\n{title:42} {'us':>9} {'TFLOP/s':>8} {'/ cuBLAS':>9}")
    for tokens, m in MATRICES:
        row = torch.ones(m, device=DEVICE)
        inputs = {"BF16": [], "fprop": [], "dgrad": [], "wgrad": []}
        count = max(2, (1 << 28) // (tokens * m + m * m)) if GPU else 1  # 256 MB in FP4
        for _ in range(count):
            x, d, w = random(tokens, m), random(tokens, m), random(m, m)
            _, r, r_t = fp4.center_quantize(x, True)
            _, s, s_t = fp4.center_quantize(d, True)
            w_q, w_t = fp4.quantize_weight(w)
            inputs["BF16"].append((x, w.t()))
            for name, a, b, left, dtype in (
                ("fprop", r, w_q, None, torch.bfloat16),
                ("dgrad", s, w_t, None, torch.bfloat16),
                ("wgrad", s_t, r_t, row, torch.float32),
            ):
                scales = a.scales.view(torch.uint8), b.scales.view(torch.uint8)
                factors = a.tensor_scale, b.tensor_scale
                args = a.codes, scales[0], b.codes, scales[1], *factors, left, row, dtype
                inputs[name].append(args)
        times = {"BF16, cuBLAS": gpu_seconds(torch.mm, inputs.pop("BF16"))}
        for name, args in inputs.items():
            for variant, gemm in variants.items():
                times[f"{name}, {variant}"] = gpu_seconds(gemm, args)
        for name, t in times.items():
            rate, share = 2e-12 * tokens * m * m / t, times["BF16, cuBLAS"] / t
            print(f"{f'{tokens} x {m} {name}':42} {t * 1e6:9.1f} {rate:8.0f} {share:9.1%}")


# ------------------------------------------------------------------------------------------------
# Steps.


def split(run):
    """Milliseconds of a step's kernels on a GPU: of rounding, of GEMMs, of the rest."""
    with torch.profiler.profile() as profile:
        run()
        torch.cuda.synchronize()
    times = collections.Counter()
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kinds = [kind for kind, names in KINDS.items() if re.search(names, event.name)]
            times[(kinds or ["rest"])[0]] += event.self_device_time_total / 1e3
    return " ".join(f"{kind} {times[kind]:.1f}" for kind in (*KINDS, "rest"))


def steps(make_model, precisions, batch_size, length, rounds, compiled, device):
    """Median time of a training step by precision, the precisions taking turns."""
    runs, memory = {}, {}
    for precision in precisions:
        model = make_model(precision).train()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        shape = batch_size, length + 1
        window = torch.randint(model.config.vocab_size, shape, device=device)

        forward = torch.compile(model) if compiled else model

        def run(forward=forward, model=model, optimizer=optimizer, window=window):
            forward(window[:, :-1], window[:, 1:]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        start = time.perf_counter()
        run()
        print(f"{precision:20} first step {time.perf_counter() - start:6.1f} s")
        if device.type == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            run()
            memory[precision] = f"{(torch.cuda.max_memory_allocated() - before) / 1e9:.2f}"
        runs[precision] = run
    times = {precision: [] for precision in runs}
    for _ in range(rounds):
        for precision, run in runs.items():
            times[precision].append(seconds(run, 1, device))
    times = {precision: statistics.median(t) for precision, t in times.items()}
    columns = "ms", "tokens/s", "/ bf16", "/ fp4", "peak GB"
    print(f"{f'step of {batch_size} x {length}':20}" + "".join(f"{c:>12}" for c in columns))
    for precision, t in times.items():
        ratios = [f"{t / times[base]:.3f}" if base in times else "-" for base in ("bf16", "fp4")]
        speed = f"{t * 1e3:.1f}", f"{batch_size * length / t:,.0f}"
        cells = *speed, *ratios, memory.get(precision, "-")
        print(f"{precision:20}" + "".join(f"{c:>12}" for c in cells))
    for precision, run in runs.items() if device.type == "cuda" else ():
        print(f"{precision:20} ms of kernels: {split(run)}", flush=True)


# ------------------------------------------------------------------------------------------------
# A report.


def report(folder, before, limit=480):
    """Run all parts, each in a process, until `limit` seconds are over. Into folder: PART.log, a
    JUnit file for each part of the tests, and on a GPU its clocks all the while. before: another
    checkout, whose kernels are timed too."""
    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    bench = [sys.executable, "-m", "tools.bench"]
    alone = "compiles_once", "operators", "model_step", "on_the_gpu"  # once failed, nobody saw why
    rest = " and ".join(f"not {name}" for name in (*alone, "compiles", "report", "interpreter"))
    if not GPU:
        alone, rest = (), "bf16_rounding"
    shapes = ("124m", "small") if GPU else ("nano",)
    recipes = ["bf16", "fp4", "fp4_mean", "fp4_project_1d", "fp4_lowrank"] if GPU else ["fp4_mean"]
    tiny = [] if GPU else ["--batch-size=1", "--length=16", "--rounds=1"]
    parts = {"machine": [sys.executable, "-m", "torch.utils.collect_env"]}
    for name in alone:
        parts[f"test_{name}"] = ["-k", name]
    parts |= {"kernels": [*bench, "--only", "kernels"], "test_rest": ["-k", rest]}
    for compiled in ([], ["--compile"]) if GPU else ([],):
        for shape in shapes:
            flags = ["--shape", shape, "--precisions", *recipes, *tiny, *compiled]
            only = ["--only", "steps"] if GPU else []
            parts["_".join(["steps", shape, *compiled])] = [*bench, *only, *flags]
    start, clocks = time.monotonic(), None
    if shutil.which("nvidia-smi"):
        query = "--query-gpu=name,driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu"
        with open(folder / "clocks.csv", "w") as out:
            clocks = subprocess.Popen(["nvidia-smi", query, "--format=csv", "-lms=500"], stdout=out)
    runs = [(name, command, ROOT) for name, command in parts.items()]
    if before:
        runs.insert(-2 * len(shapes), ("kernels_before", [*bench, "--rounds=1"], before))
    for name, command, tree in runs:
        if name.startswith("test_"):
            junit = f"--junitxml={folder / name}.xml"
            pytest = [sys.executable, "-m", "pytest", "-v", junit, "tests/test_kernels.py"]
            command = [*pytest, *command]
        left = min(300, limit - (time.monotonic() - start))
        began = time.monotonic()
        with open(folder / f"{name}.log", "w") as log:
            print(*command, file=log, flush=True)
            interpret = {} if GPU or name != "kernels" else {"TRITON_INTERPRET": "1"}
            out = {"stdout": log, "stderr": subprocess.STDOUT, "cwd": tree}
            out["env"] = os.environ | interpret
            try:
                code = subprocess.run(command, timeout=max(left, 0.1), **out).returncode
            except subprocess.TimeoutExpired:
                code = "out of time"
        print(f"{name:24} {time.monotonic() - began:6.1f} s  exit {code}", flush=True)
    if clocks:
        clocks.terminate()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="nano", choices=SHAPES, help="of the steps (nano)")
    parser.add_argument("--run", help="a run's folder: steps of its model instead")
    parser.add_argument("--batch-size", type=int, help="sequences a step (the shape's; a run: 16)")
    parser.add_argument("--length", type=int, help="tokens of one (the shape's; a run: 128)")
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp4", "fp4_mean"])
    parser.add_argument("--rounds", type=int, default=15, help="steps of each precision (15)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--only", choices=["kernels", "steps"], help="not the rest")
    parser.add_argument("--report", metavar="DIR", help="all parts, each with its log in DIR")
    parser.add_argument("--before", metavar="TREE", help="of a report: a checkout to compare with")
    parser.add_argument("--device", default=DEVICE)
    args = parser.parse_args()
    if args.report:
        return report(args.report, args.before)
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    if args.only != "steps":
        if device.type == "cpu" and not args.only:
            quantizer()
        elif fp4.KERNELS:
            rounding_table(fp4.kernels)
            gemm_table(fp4.kernels)
    if args.only == "kernels":
        return
    shape, batch_size, length = SHAPES["nano" if args.run else args.shape]

    def make_model(precision):
        if args.run:
            return GPT.load(args.run, device, precision)
        return GPT(ModelConfig(precision=precision, vocab_size=4096, **shape)).to(device)

    batch_size, length = args.batch_size or batch_size, args.length or length
    steps(make_model, args.precisions, batch_size, length, args.rounds, args.compile, device)


if __name__ == "__main__":
    main()
