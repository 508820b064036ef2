"""Continue a prompt with a trained model.

python sample.py --out-dir out/nano-fp4_mean --prompt "HAMLET:" --tokens 200
python sample.py --out-dir hf/smollm2 --prompt "The capital of France is"

In FP4 means and scales are constants, measured before on text that the model was trained on, or on
that of --dataset (inference.py).
"""

import sys

import torch

import fp4
from checkpoint import encoding_of, load_model
from cli import Parser, number, script
from experiments.recipes import RECIPES
from inference import calibrate_on
from run import World


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument(
        "--out-dir", required=True, help="a run's folder, a checkpoint, or a Hugging Face directory"
    )
    parser.add_argument("--prompt", default="", help="text to continue")
    parser.add_argument("--tokens", type=number(int), default=200, help="tokens to add (200)")
    parser.add_argument("--samples", type=number(int), default=1, help="continuations (1)")
    parser.add_argument(
        "--temperature", type=number(float, 0), default=0.8, help="0: the likeliest (0.8)"
    )
    parser.add_argument(
        "--top-k", type=number(int), default=50, help="draw from the k likeliest (50)"
    )
    parser.add_argument("--seed", type=number(int, 0), default=1337, help="of the draws (1337)")
    parser.add_argument(
        "--precision", choices=list(RECIPES), help="(that of the training; of a directory bf16)"
    )
    parser.add_argument("--dataset", help="a folder under data/, or a path to one (the run's)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    args = parser.parse_args(argv)
    device = World(args.device).device
    model, config = load_model(args.out_dir, device, args.precision)
    if model.config.precision.startswith("fp4"):
        print(fp4.backend(device), file=sys.stderr, flush=True)
    encoding = encoding_of(config)
    calibrate_on(args.out_dir, model, config, args.dataset)
    start = encoding.encode(args.prompt, allowed_special="all") or [encoding.eot_token]
    seed = args.seed % 2**63
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # for recipes that round at random
    for _ in range(args.samples):
        tokens = torch.tensor([start], device=device)
        tokens = model.generate(tokens, args.tokens, args.temperature, args.top_k, generator)
        text = [t for t in tokens[0].tolist() if t < encoding.n_vocab]
        print(encoding.decode(text), end="\n---\n")


if __name__ == "__main__":
    script(main)
