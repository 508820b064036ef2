"""Continue a prompt with a trained model, in the precision of its training.

python sample.py --out-dir out/nano-fp4_mean --prompt "HAMLET:" --tokens 200
"""

import argparse
import sys

import torch

import fp4
from data.tokenizer import encoding_of, prompt_ids
from model import GPT


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out-dir", required=True, help="a run's folder, or a checkpoint in it")
    parser.add_argument("--prompt", default="", help="text to continue")
    parser.add_argument("--tokens", type=int, default=200, help="tokens to add (200)")
    parser.add_argument("--samples", type=int, default=1, help="continuations (1)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest (0.8)")
    parser.add_argument("--top-k", type=int, default=50, help="draw from the k likeliest (50)")
    parser.add_argument("--seed", type=int, default=1337, help="of the draws (1337)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    model = GPT.load(args.out_dir, args.device)
    if model.config.precision.startswith("fp4"):
        print(fp4.use_fast_path(torch.device(args.device)), file=sys.stderr)
    run = model.run
    encoding = encoding_of(run["folder"], run["tokenizer"], run["tokenizer_hash"])
    prompt = torch.tensor([prompt_ids(encoding, args.prompt)], device=args.device)
    generator = torch.Generator().manual_seed(args.seed)
    torch.manual_seed(args.seed)  # for recipes that round at random
    for _ in range(args.samples):
        tokens = model.generate(prompt, args.tokens, args.temperature, args.top_k, generator)
        text = [t for t in tokens[0].tolist() if t < encoding.n_vocab]  # the rest is padding
        print(encoding.decode(text), end="\n---\n")


if __name__ == "__main__":
    main()
