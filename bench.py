"""Time the quantizer, the kernels and a training step. On a CPU only ratios within one run count.

python bench.py                      the quantizer, the kernels on a GPU, steps of the nano preset
python bench.py --preset 124m --precisions bf16 fp4 fp4_mean fp4_hadamard
python bench.py --init hf/smollm2    steps of that model
python bench.py --resources          what the compiler makes of each kernel; needs no GPU
"""

import dataclasses
import re
import statistics
import subprocess
import tempfile
import time

import torch

import fp4
from cli import Parser, UserError, number, script
from experiments.recipes import RECIPES
from model import GPT
from run import PRESETS, Config, World, adopt, read_config

SIZES = (8192, 1024), (8192, 4096), (16384, 8192)  # tokens, features


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
    """ns a value for fp4.quantize (amax, scales, codes, packing), a 2048 x 1024 FP32 matrix."""
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
    backend = fp4.fuse()
    fused = [
        (seconds(lambda a=a: fp4.quantize(x, **a), repeats, device), fp4.quantize(x, **a))
        for a in cases.values()
    ]
    for name, (slow, q), (fast, r) in zip(cases, plain, fused, strict=True):
        pairs = zip(q.tensors(), r.tensors(), strict=True)
        same = all(torch.equal(a.float(), b.float()) for a, b in pairs)
        print(f"{name:24} {fast / x.numel() * 1e9:8.2f} {slow / x.numel() * 1e9:8.2f} {same!s:>10}")
    total = time.perf_counter() - start
    print(f"{backend}; compiled and measured in {total:.0f} s")


def gpu_seconds(run, inputs, repeats=20):
    """Median GPU time of run(*input), by a CUDA graph over all inputs: they take turns, so that
    little is found in L2, and nothing waits for Python."""
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


def kernel_table(device):
    """The kernels against two limits measured in the same run: one read and one write of 1 GiB, and
    cuBLAS's BF16 product of the same shape."""
    if device.type != "cuda":
        print("kernels: not measured, for want of a CUDA GPU")
        return
    from gemm import along, backend, gemm_cublas, gemm_fused
    from kernels import center_quantize, quantize_weight
    from kernels import round_residual as round_
    from kernels import statistics as stats

    def random(*shape):
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    a, b = random(1 << 29), random(1 << 29)
    copy = 4 * a.numel() / gpu_seconds(lambda x, y: torch.neg(x, out=y), [(a, b)])
    del a, b
    print(f"{backend()}; copy {copy / 1e12:.2f} TB/s")
    print(f"{'tokens x features':42} {'us':>9} {'TB/s':>6} {'/ copy':>7}")
    seeds = torch.tensor([1, 2], dtype=torch.int32, device=device)
    for rows, cols in SIZES:
        xs = [random(rows, cols) for _ in range(max(2, (1 << 29) // (2 * rows * cols)))]  # 512 MB
        inputs = [(x, *stats(x, True)) for x in xs]
        cases = {
            "statistics, mean": (2, lambda x, *_: stats(x, True)),
            "statistics, no mean": (2, lambda x, *_: stats(x, False)),
            "round, to nearest": (3.125, lambda *a: round_(*a, True, True, None, False)),
            "round, stochastic": (3.125, lambda *a: round_(*a, True, True, seeds, False)),
        }
        for name, (size, run) in cases.items():
            t = gpu_seconds(run, inputs)
            rate = size * rows * cols / t
            label = f"{rows} x {cols} {name}"
            print(f"{label:42} {t * 1e6:9.1f} {rate / 1e12:6.2f} {rate / copy:7.1%}")
        del xs, inputs
    print(
        f"{'GEMM of tokens x features by a square W':42} {'us':>9} {'TFLOP/s':>8} {'/ cuBLAS':>9}"
    )
    for rows, cols in SIZES:
        variants = {"one kernel": gemm_fused, "cuBLAS": gemm_cublas}
        names = [(gemm, variant) for gemm in ("fprop", "dgrad", "wgrad") for variant in variants]
        runs = {"BF16, cuBLAS": (torch.mm, [])} | {
            f"{gemm}, {variant}": (variants[variant], []) for gemm, variant in names
        }
        for _ in range(max(2, (1 << 28) // (rows * cols + cols * cols))):  # 256 MB in FP4
            x, d, w = random(rows, cols), random(rows, cols), random(cols, cols)
            runs["BF16, cuBLAS"][1].append((x, w.t()))
            (_, x, x_col), (_, d, d_col), w = *(center_quantize(t, True) for t in (x, d)), w.float()
            w = quantize_weight(w)
            one, row = torch.ones(rows, device=device), torch.ones(cols, device=device)
            for name, a, b, left, dtype in (
                ("fprop", x, w.t(), one, torch.bfloat16),
                ("dgrad", d, w, one, torch.bfloat16),
                ("wgrad", d_col.t(), x_col, row, torch.float32),
            ):
                scales = a.tensor_scale, b.tensor_scale
                args = *along(a, 1), *along(b, 0), *scales, left, row, dtype
                for variant in variants:
                    runs[f"{name}, {variant}"][1].append(args)
        times = {name: gpu_seconds(*run) for name, run in runs.items()}
        for name, t in times.items():
            rate, share = 2e-12 * rows * cols * cols / t, times["BF16, cuBLAS"] / t
            print(f"{f'{rows} x {cols} {name}':42} {t * 1e6:9.1f} {rate:8.0f} {share:9.1%}")


def step(preset, init, precisions, rounds, device):
    """Median time of a training step by precision, the precisions taking turns. With init, a
    directory or a run, in its architecture, and the defaults otherwise."""
    preset_values = read_config(PRESETS / f"{preset}.json") | {"vocab_size": 4096}
    config = Config(**(adopt({"init": init}) if init else preset_values))
    shape = (config.batch_size // config.grad_accum, config.block_size + 1)
    window = torch.randint(config.vocab_size, shape, device=device)
    runs, memory = {}, {}
    for precision in precisions:
        model = GPT(dataclasses.replace(config, precision=precision)).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)

        def run(model=model, optimizer=optimizer):
            model(window[:, :-1], window[:, 1:]).backward()
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
            memory[precision] = torch.cuda.max_memory_allocated() - before
        runs[precision] = run
    times = {precision: [] for precision in runs}
    for _ in range(rounds):
        for precision, run in runs.items():
            times[precision].append(seconds(run, 1, device))
    times = {precision: statistics.median(t) for precision, t in times.items()}
    columns = "ms", "tokens/s", "/ bf16", "/ fp4", "peak GB"
    print(f"{(init or preset) + ' step':20}" + "".join(f"{c:>12}" for c in columns))
    for precision, t in times.items():
        ratio = [f"{t / times[base]:.3f}" if base in times else "-" for base in ("bf16", "fp4")]
        gb = f"{memory[precision] / 1e9:.2f}" if memory else "-"
        cells = f"{t * 1e3:.1f}", f"{window[:, 1:].numel() / t:,.0f}", *ratio, gb
        print(f"{precision:20}" + "".join(f"{c:>12}" for c in cells))


def compiled(arch):
    """Every kernel as its launcher configures it, compiled for a GPU that need not be there: case,
    kernel's name, Triton's CompiledKernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    import gemm
    import kernels

    class Driver:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", arch, 32))
        get_current_device = staticmethod(lambda: arch)  # the key of Triton's cache
        get_current_stream = staticmethod(lambda device: 0)
        get_active_torch_device = staticmethod(lambda: torch.device("cpu"))

    launches, launch = [], JITFunction.run

    def warm_up(self, *args, **kwargs):
        launches.append((self.fn.__name__, launch(self, *args, **{**kwargs, "warmup": True})))

    def byte(*shape):
        return torch.zeros(shape, dtype=torch.uint8)

    x = torch.zeros(4096, 1024, dtype=torch.bfloat16)
    seeds, one, row = torch.zeros(2, dtype=torch.int32), torch.ones(()), torch.zeros(1024)
    a, a_s, a_col, a_col_s = (
        byte(4096, 512),
        byte(4096, 64),
        byte(2048, 1024).t(),
        byte(256, 1024).t(),
    )
    w, w_s, w_col = byte(1024, 512), byte(64, 64), byte(512, 1024).t()
    args = one, one, one.expand(4096), row
    odd = torch.zeros(33, 80, dtype=torch.bfloat16)
    cases = {
        "centered": lambda: kernels.center_quantize(x, True),
        "stochastic": lambda: kernels.center_quantize(x, True, seeds=seeds),
        "FP32": lambda: kernels.center_quantize(x.float(), False, seeds=seeds),
        "weight": lambda: kernels.quantize_weight(torch.zeros(1024, 1024)),
        "fprop": lambda: gemm.gemm_fused(a, a_s, w, w_s, *args, x.dtype),
        "dgrad": lambda: gemm.gemm_fused(a, a_s, w_col, w_s.t(), *args, x.dtype),
        "wgrad": lambda: gemm.gemm_fused(
            a_col, a_col_s, a_col, a_col_s, one, one, row, row, row.dtype
        ),
        "odd": lambda: kernels.center_quantize(odd, True, seeds=seeds, headroom=True),
        "odd_gemm": lambda: gemm.gemm_fused(
            byte(33, 40), byte(33, 5), byte(48, 40), byte(3, 5), one, one, None, None, x.dtype
        ),
        "rows": lambda: gemm.decode(a, a_s),
        "columns": lambda: gemm.decode(a_col, a_col_s),
    }
    triton.runtime.driver.set_active(Driver())
    JITFunction.run = warm_up
    for case, run in cases.items():
        run()
        yield from ((case, *kernel) for kernel in launches)
        launches.clear()
    JITFunction.run = launch


PIPES = {  # machine instructions by the unit of an SM that executes them; all others are the ALU's
    "FP32": r"FADD|FMUL|FFMA|HFMA2|HADD2|HMUL2",
    "IMAD": r"IMAD",
    "convert": r"I2F|F2I|F2F|MUFU",
    "memory": r"LD|ST|SHFL|BAR|MEMBAR|FENCE",
    "control": r"U[A-Z]|R2UR|CS2R|S2|BRA|EXIT|NOP|WARPSYNC|BSSY|BSYNC|DEPBAR|CALL|RET",
}
H100 = 132 * 1.755e9, 128, 64, 2.9e12  # SM clocks a second; lanes that issue, the ALU's; bytes/s


def instructions(kernel, elements):
    """Lane instructions an element by pipe, from machine code without loops, where each instruction
    runs once in every thread; a program rounds so many elements."""
    verbs = re.findall(r"\t(?:@!?U?P\w+ )?([A-Z]\w+)", kernel.asm["sass"])
    if verbs.count("BRA") != 1:  # the jump to itself that follows the code
        raise UserError(f"{kernel.name} has a loop here, and its instructions cannot be counted")
    counts = dict.fromkeys((*PIPES, "ALU"), 0)
    for verb in verbs:
        pipe = next((pipe for pipe, those in PIPES.items() if re.match(those, verb)), "ALU")
        counts[pipe] += 32 * kernel.metadata.num_warps / elements
    return counts


def rounding(compiled_kernels):
    """Table of the rounding kernels' instructions, and the least time an element that an H100 needs
    to issue them, for its ALU, and to move the bytes: the largest bounds the kernel. Conversions,
    few and of a rate that is not public, have no bound."""
    from kernels import QUANTIZE

    columns, bounds = ("all", *PIPES, "ALU"), ("issue", "ALU", "memory")
    print("\nlane instructions an element of the rounding kernels; ps an element on an H100")
    print(f"{'kernel':16} {'case':11} {'target':8}", *(f"{c:>7}" for c in columns + bounds))
    clock, issue, alu, bandwidth = H100
    for (name, case, target), kernel in compiled_kernels.items():
        size = {"weight": 4 + 1 + 1 / 256, "FP32": 4 + 1.125}.get(case, 2 + 1.125)
        counts = instructions(kernel, 16 * QUANTIZE[0])
        total = sum(counts.values())
        ps = total / issue / clock, counts["ALU"] / alu / clock, size / bandwidth
        cells = [f"{n:7.1f}" for n in (total, *counts.values())]
        print(f"{name:16} {case:11} {target:8}", *cells, *(f"{t * 1e12:7.2f}" for t in ps))


def resources(targets=(80, 90, 100, 120)):
    """Registers, shared memory and spills by ptxas, the widest load, and the tensor core's verb.
    Then the rounding kernels' instructions."""
    from triton.backends.nvidia.compiler import get_ptxas

    head = f"{'kernel':18} {'case':11} {'target':8}"
    print(f"{head} {'registers':>9} {'shared':>7} {'spilled':>7} {'load':>5}  tensor cores")
    loads = {"b8": 1, "b16": 2, "b32": 4, "b64": 8, "v2.b32": 8, "v2.b64": 16, "v4.b32": 16}
    quantize = {}  # {(kernel's name, case, target): CompiledKernel}
    for arch in targets:
        listed = set()
        for case, name, kernel in compiled(arch):
            ptx = kernel.asm["ptx"]
            if (name, ptx) in listed:
                continue
            listed.add((name, ptx))
            target = re.search(r"\.target (\w+)", ptx).group(1)
            with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
                file.write(ptx)
                file.flush()
                command = [get_ptxas(arch).path, "-v", f"--gpu-name={target}", file.name]
                report = subprocess.run(
                    [*command, "-o", "/dev/null"], check=True, capture_output=True, text=True
                ).stderr
            registers = re.search(r"Used (\d+) registers", report).group(1)
            spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", report))
            widths = [loads[w] for w in re.findall(r"ld\.global\.(?:\w+::\w+\.)*([\w.]+)", ptx)]
            widths += [int(n, 16) for n in re.findall(r"cp\.async\.c.*?, (0x\w+),", ptx)]
            verbs = set(re.findall(r"(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\S+", ptx))
            print(
                f"{name.strip('_'):18} {case:11} {target:8} {registers:>9} "
                f"{kernel.metadata.shared:7} {spilled:7} {max(widths):5}  {' '.join(verbs) or '-'}"
            )
            if "quantize" in name:
                quantize[name.strip("_"), case, target] = kernel
    rounding(quantize)


def main(argv=None):
    parser = Parser(__doc__)
    presets = sorted(p.stem for p in PRESETS.glob("*.json"))
    parser.add_argument("--preset", default="nano", choices=presets)
    parser.add_argument("--init", help="a Hugging Face directory or a run, instead of a preset")
    parser.add_argument(
        "--precisions", nargs="+", choices=list(RECIPES), default=["bf16", "fp4", "fp4_mean"]
    )
    parser.add_argument(
        "--rounds", type=number(int), default=15, help="steps of each precision (15)"
    )
    parser.add_argument(
        "--threads", type=number(int), default=torch.get_num_threads(), help="for the steps"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    parser.add_argument("--resources", action="store_true", help="compile the kernels, and no more")
    args = parser.parse_args(argv)
    if args.resources:
        resources()
        return
    device = World(args.device).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}")
    if device.type == "cpu":
        torch.set_num_threads(1)
        quantizer(device)
        torch.set_num_threads(args.threads)
    kernel_table(device)
    step(args.preset, args.init, args.precisions, args.rounds, device)


if __name__ == "__main__":
    script(main)
