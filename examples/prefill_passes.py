"""Computes the bytes that the experts' part of a layer moves for a prompt's chunk, pass by pass.

    python examples/prefill_passes.py [--verbose]

Nothing here is measured. Each launch reads its inputs and writes its output once, in the 80B
model's shapes, 4 bits and bfloat16; the experts' weights are read once a launch that needs them.
So these are lower bounds: tiles of a product read again what no cache holds, and MLX sorts many
pairs in several passes. Launches of a period are counted in the graph (examples/launches.py).
"""

import argparse

import launches

from mlx_qwen3next.bench import shapes
from mlx_qwen3next.bench.on_metal import mlx_lm, ours

H, I, E, TOP = (
    shapes.SHAPES["80b"][name]
    for name in (
        *("hidden_size", "moe_intermediate_size"),
        *("num_experts", "num_experts_per_tok"),
    )
)
ALL = TOP + 1  # experts of a token; here the shared one is one of the stack
T, WORD = 2, 4  # bytes of a bfloat16, and of a float32 or uint32
WEIGHTS = (E + 1) * 3 * H * I * (shapes.BITS + 2 * 8 * T / shapes.GROUP) / 8  # bytes of a layer
TOKENS = (2048, 8192)

# Bytes read and written a token, by launch.
Passes = dict[str, tuple[int, int]]

LOGITS: Passes = {"router's logits": (H * T, (E + 1) * T)}
ROUTER = LOGITS | {
    "logits in float32, and negative": (E * T, 2 * E * WORD),
    "experts by logit": (E * WORD, E * WORD),
    "softmax": (E * WORD, E * WORD),
    "weights of the best": (2 * TOP * WORD, TOP * WORD),
    "their sum": (TOP * WORD, WORD),
    "their shares": ((TOP + 1) * WORD, TOP * T),
    "shared expert's weight": (T, T),
    "all experts": (ALL * WORD, ALL * WORD),
    "all weights": (ALL * T, ALL * T),
}


def products(k: int, *gate_up: str) -> Passes:
    """Sorting, gate and up in the products that are named, SwiGLU, down, of k experts a token."""
    outputs = 2 * I // len(gate_up)
    return {
        "pairs by expert": (k * WORD, k * WORD),
        "rows of the pairs": (k * WORD, k * WORD),
        "x by expert": (k * WORD + H * T, k * H * T),
        "experts of the pairs": (2 * k * WORD, k * WORD),
        **{name: (k * H * T, k * outputs * T) for name in gate_up},
        "SwiGLU": (2 * k * I * T, k * I * T),
        "down": (k * I * T, k * H * T),
        "places of the pairs": (k * WORD, k * WORD),
    }


UNSORTED = {"results by token": (ALL * (WORD + H * T), ALL * H * T)}
OWN = ROUTER | products(ALL, "gate and up")
SEPARATE: Passes = OWN | UNSORTED
SEPARATE |= {
    "times weights": (ALL * (H + 1) * T, ALL * H * T),
    "their sum over experts": (ALL * H * T, H * T),
    "plus residual": (2 * H * T, H * T),
}
PLAIN = OWN | UNSORTED | {"weighted sum and residual": ((ALL * (H + 1) + H) * T, H * T)}
KERNELS = LOGITS | {"choose": ((E + 1) * T, ALL * (WORD + T))} | products(ALL, "gate and up")
KERNELS |= {"combine": (ALL * (WORD + T) + (ALL + 1) * H * T, H * T)}
STOCK: Passes = {
    "router's logits": (H * T, E * T),
    "softmax": (E * T, E * T),
    "experts by logit": (E * T, E * WORD),
    "weights of the best": (TOP * (WORD + T), TOP * T),
    "their sum": (TOP * T, T),
    "their shares": ((TOP + 1) * T, TOP * T),
}
STOCK |= products(TOP, "gate", "up")
STOCK |= {
    "results by token": (TOP * (WORD + H * T), TOP * H * T),
    "times weights": (TOP * (H + 1) * T, TOP * H * T),
    "their sum over experts": (TOP * H * T, H * T),
    "shared gate": (H * T, I * T),
    "shared up": (H * T, I * T),
    "shared SwiGLU": (2 * I * T, I * T),
    "shared down": (I * T, H * T),
    "shared expert's gate": (H * T, T),
    "its sigmoid": (T, T),
    "times the shared expert": ((H + 1) * T, H * T),
    "plus the shared expert": (2 * H * T, H * T),
    "plus residual": (2 * H * T, H * T),
}
FORMS = {
    "mlx-lm": STOCK,
    "here, weights, sum and residual apart": SEPARATE,
    "here, MLX's own operations": PLAIN,
    "here, kernels": KERNELS,
}
COUNTED = {  # the forms that run, for examples/launches.py
    "mlx-lm": (mlx_lm, False),
    "here, MLX's own operations": (ours, False),
    "here, kernels": (ours, True),
}


def moved(passes: Passes) -> int:
    """Returns the bytes a token."""
    return sum(map(sum, passes.values()))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--verbose", action="store_true", help="list the passes")
    args = parser.parse_args()
    chunks = [f"{form} of {n:,} tokens, GB" for n in TOKENS for form in ("activations", "all")]
    heads = "", "launches of a period", "of them experts", "KB a token", *chunks
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for name, passes in FORMS.items():
        queued = "-"
        if name in COUNTED:
            make, kernels = COUNTED[name]
            queued = str(launches.per_period(make, 512, kernels=kernels).total())
        cells = [queued, str(shapes.PERIOD * len(passes)), f"{moved(passes) / 1e3:.0f}"]
        for tokens in TOKENS:
            activations = tokens * moved(passes)
            cells += [f"{size / 1e9:.2f}" for size in (activations, activations + WEIGHTS)]
        print(f"| {' | '.join([name, *cells])} |")
    if args.verbose:
        for name, passes in FORMS.items():
            print(f"\n{name}: KB read and written a token")
            for launch, (read, written) in passes.items():
                print(f"  {launch:32} {read / 1e3:8.1f} {written / 1e3:8.1f}")


if __name__ == "__main__":
    main()
