"""A Mamba of transformers before and after one call: milliseconds, and how far the logits are apart.

python examples/transformers_mamba.py --model FalconMamba --hidden 768 --layers 4 --tokens 512
"""

from __future__ import annotations

import argparse
import timeit
from collections.abc import Callable

import torch
import transformers

from pydiffuse.integrations import transformers as kernels


def milliseconds(call: Callable[[], object], runs: int) -> float:
    call()
    return 1e3 * min(timeit.repeat(call, number=1, repeat=runs))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=["Mamba", "FalconMamba"], default="Mamba")
    for name, size in (("hidden", 768), ("layers", 4), ("tokens", 512), ("runs", 3)):
        parser.add_argument(f"--{name}", type=int, default=size)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    config = getattr(transformers, f"{args.model}Config")(
        vocab_size=1000,
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        pad_token_id=0,
        eos_token_id=None,
    )
    model = getattr(transformers, f"{args.model}ForCausalLM")(config).eval()
    tokens = torch.randint(1, 1000, (1, args.tokens))
    calls = {
        "forward": torch.no_grad()(lambda: model(tokens, use_cache=False)),
        "forward and backward": lambda: model(tokens, use_cache=False).logits.square().mean().backward(),
        "16 tokens more": lambda: model.generate(tokens, max_new_tokens=16, do_sample=False),
    }
    before = {name: milliseconds(call, args.runs) for name, call in calls.items()}
    logits = model(tokens).logits
    kernels.patch(model)
    after = {name: milliseconds(call, args.runs) for name, call in calls.items()}
    for name in calls:
        print(f"{name:22} {before[name]:10.1f} ms before {after[name]:10.1f} ms after")
    print(
        f"logits apart by {(model(tokens).logits - logits).abs().max() / logits.std():.1e} of their deviation"
    )
    kernels.unpatch()


if __name__ == "__main__":
    main()
