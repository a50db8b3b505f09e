"""The memory traffic of the kernels at the 80B model's shapes, counted while they are executed.

    PYTHONPATH=tests:tests/helpers python tests/metal_kernels/kernel_bytes.py

For each buffer: the bytes that any kernel must move at least (every byte once), and the 128-byte
lines that this kernel's threadgroups touch, each once per threadgroup, as if they shared nothing.
"""

import metal_host
import mlx.core as mx
from helpers_metal import capture

from mlx_qwen3next import metal_kernels
from mlx_qwen3next.compute import operations
from mlx_qwen3next.compute.rope import Rope, inverse_frequencies

H, I, EXPERTS, TOP = 2048, 512, 24, 10  # as many experts as are needed to choose from
HK, HV, D, K = 16, 32, 128, 4
C = 2 * HK * D + HV * D
P = C + HV * D + 2 * HV
HEADS, KV_HEADS, HEAD_DIM = 16, 2, 256
T = mx.bfloat16


def traffic(call):
    """Kernel name -> buffer name -> Traffic, of the launches that ``call()`` makes."""
    counted = {}
    launch = metal_kernels.Kernel.launch

    def counting(kernel, **arguments):
        result = metal_host.run(capture(kernel, **arguments), "check")
        counted[kernel.name] = result.counters
        return result.outputs

    metal_kernels.Kernel.launch = counting
    try:
        call()
    finally:
        metal_kernels.Kernel.launch = launch
    return counted


def random(*shape, dtype=T):
    return mx.random.normal(shape, key=mx.random.key(sum(shape))).astype(dtype)


def quantized(*shape, bits=4):
    """Experts of as many bytes as real ones have; their values change no traffic."""
    *outer, columns = shape
    words = mx.zeros((*outer, columns * bits // 32), mx.uint32)
    groups = (*outer, columns // 64)
    return metal_kernels.Experts(words, random(*groups), random(*groups), 64, bits)


def gated_delta(rows, recording):
    """A plain step, or a round after one of which half was kept."""
    n = rows if recording else 0
    tape = (
        -mx.random.uniform(shape=(1, n, HV)),
        random(1, n, HK, D, dtype=mx.float32),
        random(1, n, HV, D, dtype=mx.float32),
    )
    return traffic(
        lambda: metal_kernels.gated_delta_step(
            *(random(1, rows, P), random(1, K - 1 + n, C), random(1, HV, D, D, dtype=mx.float32)),
            *(tape if recording else (), n // 2, random(C, K, 1), mx.ones((2 * HV + D,))),
            eps=1e-6,
            key_heads=HK,
            mask=None,
            recording=recording,
        )
    )


def experts(rows, bits=4, shared_bits=None):
    """Router, gate and up, down, on random logits; a shared expert of other bits is apart."""
    logits, x = random(rows, EXPERTS + 1)[None], random(rows, H)[None]
    shapes, stacked = ((2 * I, H), (H, I)), EXPERTS + (shared_bits is None)
    gate_up, down = (quantized(stacked, *shape, bits=bits) for shape in shapes)
    options = {"experts": EXPERTS, "top_k": TOP, "normalise": True}
    if shared_bits:
        options["shared"] = [quantized(*shape, bits=shared_bits) for shape in shapes]
    return traffic(lambda: operations._experts_kernel(x, logits, gate_up, down, x, **options))


def of_prompts(rows):
    """The kernels before and after the experts' products of many rows."""
    logits, options = random(rows, EXPERTS + 1), {"experts": EXPERTS, "top_k": TOP}
    places = mx.random.permutation(rows * (TOP + 1)).astype(mx.uint32).reshape(rows, -1)
    y, x = random(places.size, H), random(rows, H)

    def call():
        _, weights = metal_kernels.choose(logits, normalise=True, **options)
        metal_kernels.combine(y, places, weights, x)

    return traffic(call)


def chosen(rows):
    """How many distinct experts :func:`experts` reads, the shared one included."""
    logits = random(rows, EXPERTS + 1)[:, :EXPERTS]
    order = mx.argsort(-logits.astype(mx.float32), axis=-1)[:, :TOP]
    return len(set(order.flatten().tolist())) + 1


def norms(rows):
    x, weight = random(rows, H), mx.ones((H,))

    def call():
        metal_kernels.rms_norm(x, weight, 1e-6)
        metal_kernels.add_rms_norm(x, x, weight, 1e-6)

    return traffic(call)


def attention(rows):
    x = random(1, rows, (2 * HEADS + 2 * KV_HEADS) * HEAD_DIM)
    weight = mx.ones((HEAD_DIM,))
    frequencies = inverse_frequencies(Rope(64, 1e7))
    offsets = mx.array([1000], mx.int32)

    def call():
        q, _, _ = metal_kernels.attention_heads(
            *(x, weight, weight, frequencies, offsets),
            **{"eps": 1e-6, "attention_factor": 1.0, "heads": HEADS, "kv_heads": KV_HEADS},
        )
        metal_kernels.attention_gate(q, x, kv_heads=KV_HEADS)

    return traffic(call)


def least(counted):
    """Bytes of one buffer that any kernel must move."""
    return counted.unique_read + counted.unique_written


def ratio(counted):
    """Lines beside the compulsory minimum, of one buffer."""
    return (counted.lines_read + counted.lines_written) / least(counted)


def row(kernel, rows, name, counted):
    lines = counted.lines_read + counted.lines_written
    cells = kernel, rows, name, f"{least(counted):,}", f"{lines:,}", f"{ratio(counted):.2f}"
    return f"| {' | '.join(map(str, cells))} |"


def main():
    print("| kernel | rows | buffer | least bytes | in lines | ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    for rows in (1, 4):
        cases = (norms(rows), gated_delta(rows, rows > 1), attention(rows), experts(rows))
        for kernel, buffers in ((k, b) for case in cases for k, b in case.items()):
            for name, counted in buffers.items():
                if least(counted) >= 4096:
                    print(row(kernel, rows, name, counted))
    for kernel, buffers in of_prompts(32).items():
        for name, counted in buffers.items():
            print(row(kernel, 32, name, counted))
    for bits in (2, 3, 5, 6, 8):
        for kernel, buffers in experts(1, bits, shared_bits=8 if bits < 8 else None).items():
            for name, counted in buffers.items():
                if "weight" in name and least(counted) >= 4096:
                    print(row(f"{kernel}, {bits} bits", 1, name, counted))


if __name__ == "__main__":
    main()
