"""The harness against the package's own kernels: mistakes made in their text, each of them found.

A defect changes a few words of a kernel. The check that is to find it says what is wrong, and
finds nothing in the text as it is. The cases are in helpers_defects.py.
"""

import re
from functools import cache
from typing import NamedTuple

import helpers_defects
import helpers_metal
import metal_host
import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen3next import metal_kernels
from mlx_qwen3next.metal_kernels import kernel as kernel_module

# ---- running them, with the text changed ----


class Defect(NamedTuple):
    family: str  # whose kernels are changed
    old: str
    new: str
    case: object
    check: object
    message: str  # a pattern


def whole(kernel):
    """What a kernel is made of: definitions, and its body."""
    return f"{kernel_module.definitions(kernel.family)}\0{kernel.body}"


def changed(kernel, defect):
    """The kernel as MLX's object, with the defect in its text if it is of the family."""
    text = whole(kernel)
    if defect and kernel.family == defect.family:
        assert text.count(defect.old) <= 1, f"{text.count(defect.old)} times: {defect.old}"
        text = text.replace(defect.old, defect.new)
    header, source = text.split("\0")
    header, source = kernel_module.needed(header, source), kernel_module.condensed(source)
    return mx.fast.metal_kernel(kernel.name, kernel.inputs, kernel.outputs, source, header)


def execute(case, defect, dtype=mx.float32, build="fast", order=0):
    """A case's launches (kernel, launch, result), and what it returns; None runs nothing."""
    ran = []

    def launch(kernel, **arguments):
        made = helpers_metal.capture(kernel, **arguments)
        if build:
            result = metal_host.run(made, build, order=order)
        else:
            result = metal_host.Result([mx.zeros(*output) for output in made.outputs])
        ran.append((kernel, made, result))
        return result.outputs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metal_kernels.Kernel, "launch", launch)
        patch.setattr(metal_kernels.kernel, "compiled", lambda kernel: changed(kernel, defect))
        returned = case(dtype)
    assert not defect or any(defect.old in whole(kernel) for kernel, *_ in ran)
    return ran, returned


def outputs(*arguments, **options):
    """The outputs of all launches of a case, by name."""
    ran, _ = execute(*arguments, **options)
    pairs = [zip(kernel.outputs, result.outputs, strict=True) for kernel, _, result in ran]
    return [pair for launch in pairs for pair in launch]


@cache
def right(case):
    return outputs(case, None)


def is_near(values, expected):
    """Whether numbers are close; whole ones must be equal."""
    if not mx.issubdtype(expected.dtype, mx.floating):
        return mx.array_equal(values, expected)
    values, expected = (np.array(a, np.float64) for a in (values, expected))
    return np.linalg.norm(values - expected) <= 1e-4 * np.linalg.norm(expected)


# ---- checks: each returns what it has to say of a case ----


def run(case, defect):
    """Those of the harness while it runs the kernel."""
    try:
        execute(case, defect, build="check")
    except metal_host.KernelError as found:
        return str(found)
    return ""


def lint(case, defect):
    sources = [launch.source for _, launch, _ in execute(case, defect, build=None)[0]]
    return "; ".join(message for source in sources for message in metal_host.lint(source))


def types(case, defect):
    sources = [launch.source for _, launch, _ in execute(case, defect, build=None)[0]]
    return "; ".join(metal_host.type_check(*sources))


def numbers(case, defect, build="fast"):
    """Results in float32 against those of the text as it is."""
    for (name, got), (_, expected) in zip(
        outputs(case, defect, build=build), right(case), strict=True
    ):
        if not is_near(got, expected):
            return f"{name} is wrong"
    return ""


def pattern(case, defect):
    """As numbers, where variables that were never set hold a pattern."""
    return numbers(case, defect, "check")


def rounded(case, defect):
    """Results in bfloat16: they must be those in float32, rounded once, at the end."""
    for (name, got), (_, exact) in zip(
        outputs(case, defect, mx.bfloat16), right(case), strict=True
    ):
        if not mx.array_equal(got, exact.astype(got.dtype)):
            return f"{name} was rounded before its end"
    return ""


def orders(case, defect):
    """Whether bits depend on the schedule."""
    first = outputs(case, defect)
    for order in (1, 2, 8, 15):
        for (name, a), (_, b) in zip(first, outputs(case, defect, order=order), strict=True):
            if not mx.array_equal(a, b):
                return f"{name} depends on the order"
    return ""


def bits(case, defect):
    """What the case returns, also where a compiler fuses operations."""
    for build in ("fast", "fma"):
        for name, got, expected in execute(case, defect, mx.bfloat16, build)[1]:
            if not mx.array_equal(got, expected):
                return f"{build}: {name} has other bits"
    return ""


def reads(case, defect):
    """Whether an expert's weights are read more than once."""
    _, _, result = execute(case, defect, build="check")[0][-1]
    weight = result.counters["weight"]
    times = weight.lines_read / weight.unique_read
    return f"weights read {times:.1f} times" if times > 1.3 else ""


# By family: name | case | check | message, then the change of the text, old => new, whose lines
# are joined; \n stands for the end of a line of it.
TABLE = r"""
== norms
no barrier before partial sums are added | add_rms_norm | run | UNORDERED
threadgroup_barrier(mem_flags::mem_threadgroup); =>
barrier of a simdgroup there | add_rms_norm | run | UNORDERED
threadgroup_barrier => simdgroup_barrier
barrier for other memory there | add_rms_norm | run | race: read of byte .* of threadgroup memory
mem_flags::mem_threadgroup => mem_flags::mem_device
sum in order of arrival, a race | add_rms_norm | run | race: .* of threadgroup memory
shared[simdgroup] = squares; => shared[simdgroup] = 0.0f; shared[0] += squares;
sum in order of arrival, other bits | add_rms_norm | orders | normed depends on the order
shared[simdgroup] = squares; => shared[simdgroup] = 0.0f; shared[0] += squares;
partial sum not set | add_rms_norm | run | uninitialised threadgroup memory at byte 0
if (lane == 0) { => if (lane == 0 && simdgroup > 0) {
threads return before a sum | add_rms_norm | run | has returned|have returned
squares = simd_sum => if (thread_index + 32 * SG >= H) { return; } squares = simd_sum
sum of squares from no first value | add_rms_norm | types | variable 'squares' is uninitialized
float squares = 0.0f; => float squares;
read behind the last row | add_rms_norm | run | out of bounds read of 4 bytes at byte 3936 of 'x'
x, y, start + i);\n    squares => x, y, start + i + 1);\n    squares
elements not written | rms_norm | run | output 'normed' was not fully written: first byte 1024
normed[start + i] = => normed[start + thread_index] =
sum of squares in T | rms_norm | rounded | normed was rounded
squares += value * value; => squares = static_cast<T>(squares + value * value);
squares in T | rms_norm | rounded | normed was rounded
value * value; => static_cast<T>(value) * static_cast<T>(value);
norm of a sum that was not rounded | add_rms_norm | bits | fast: normed has other bits
static_cast<float>(static_cast<T>(value + load(y, i))) => value + load(y, i)
sum written over an input | add_rms_norm | types | cannot assign|read-only
sum[start + i] = => x[start + i] =
device memory for threadgroup memory | add_rms_norm | types | no matching function for .*'rms_norm'
device T* normed, threadgroup float* => device T* normed, device float*
pointer without address space | add_rms_norm | lint | without address space: const T.x
inline float residual(const device T* x => inline float residual(const T* x
double | add_rms_norm | lint | double is not Metal
float total = 0.0f; => double total = 0.0f;
static variable | add_rms_norm | lint | a static variable in a function is not Metal
float total = 0.0f; => static float total = 0.0f;
lambda | add_rms_norm | lint | a lambda is not Metal
value = load(x, i); => value = [&](uint j) { return load(x, j); }(i);

== gated_delta
maximum of float and integer | delta_step | types | call to 'max' is ambiguous
metal::max(x, 0.0f) => metal::max(x, 0)
no barrier after staging q, k and v | delta_step | run | UNORDERED
threadgroup_barrier(mem_flags::mem_threadgroup);\n\n    // The delta => // The delta
no barrier before the gated norm | delta_step | run | UNORDERED
threadgroup_barrier(mem_flags::mem_threadgroup);\n\n    // The gated => // The gated
o kept where q is | delta_step | run | UNORDERED
at.o[row] = out; => at.qkv[row] = out;
gates by all lanes | delta_step | run | race: write .* of threadgroup memory
else if (lane == 0) => else
heads that share a key all write its rows | delta_step | run | race: write .* of rows_out, .*another
(part == 2 || owns_key) => true
heads that share a key all write its tape | delta_round | run | race: write .* of k_out, .*another
part == 1 && owns_key => part == 1
a row written by all its tokens | delta_round | run | race: write .* of rows_out, .*no barrier
row >= first_kept && (j == K - 1 || t == 0) => row >= first_kept
rows before a round not written | delta_round | run | output 'rows_out' was not fully written
(j == K - 1 || t == 0) => j == K - 1
a row too many kept | delta_step | run | out of bounds write .* of 'rows_out'
first_kept = L; => first_kept = L - 1;
convolution's inputs a row late | delta_round | run | out of bounds read .* of 'before'
before += keep[0] * C; => before += (keep[0] + 1) * C;
wrong stride of the input | delta_step | numbers | o is wrong
load(x, at * P + c) => load(x, at * C + c)
wrong stride of the tape's keys | delta_round | run | out of bounds read .* of 'tape_k'
key.read(k + t * Hk => key.read(k + t * Hv
too little threadgroup memory | delta_step | run | out of bounds write .* of threadgroup memory
shared[Chunk] => shared[Chunk - 1]
too much threadgroup memory | delta_step | run | threadgroup memory, which is over 32 KiB
shared[Chunk] => shared[8 * Chunk]
state not written in a round | delta_round | run | output 'state_out' was not fully written
S[j].write(state_out + own_state + j * Dk); =>
state after a round's tokens | delta_round | numbers | state_out is wrong
leaves o alone\n  } => \n}
for (uint j = 0; j < Rows; j++) { S[j].write(state_out + own_state + j * Dk); }
no decay | delta_step | numbers | o is wrong
S[j].decay(at.gamma); =>
no Dk^-0.5 | delta_step | numbers | o is wrong
scale *= metal::precise::rsqrt(static_cast<float>(Dk)); =>
A_log for dt_bias | delta_step | numbers | o is wrong
+ vectors[Hv + head]; => + vectors[head];
dt_bias for the norm's weight | delta_step | numbers | o is wrong
vectors[2 * Hv + d] => vectors[Hv + d]
l2norm with the norm's eps | delta_step | numbers | o is wrong
simd_sum(squares) + 1e-6f => simd_sum(squares) + as_type<float>(EPS)
norm with the l2norm's eps | delta_step | numbers | o is wrong
/ Dv + as_type<float>(EPS) => / Dv + 1e-6f
gate before the norm | delta_step | numbers | o is wrong
squares += from => from[d] *= silu(load(x, token * P + C + head * Dv + d));\nsquares += from
padding written to the state | delta_step | numbers | o is wrong
padding ? 0.0f : sigmoid(b) => sigmoid(b)
sum of a diverged simdgroup | delta_step | run | divergent synchronisation: .* simd operation
const float out = S[j].dot(query);\n        if (lane == 0) { =>
if (lane == 0) {\nconst float out = S[j].dot(query);
replay without the first token | delta_replay | bits | fast: replayed state has other bits
uint t = 0; t < keep => uint t = 1; t < keep
replay of a token too many | delta_replay | bits | fast: replayed state has other bits
first_row, keep[0], S) => first_row, keep[0] + 1, S)
replay that rounds the product | delta_replay | bits | fast: replayed state has other bits
S[j].add(key, delta[ => for (int i = 0; i < N; i++) S[j].own[i] += key.own[i] * (delta[
replay fused by chance | delta_replay | bits | fma: replayed state has other bits
metal::fma(key.own[i], delta, own[i]); => key.own[i] * delta + own[i];
convolution's products in T | delta_round | rounded | o was rounded
load(taps, c * K + j) * => taps[c * K + j] * (T)
products' sum in bfloat | delta_round | rounded | o was rounded
sum += own[i] * other.own[i]; => sum = static_cast<bfloat>(sum + own[i] * other.own[i]);
reference without address space | delta_step | lint | without address space: const Vector.key
thread const Vector& key => const Vector& key

== attention
no barrier between norm and rotation | heads | run | UNORDERED
simdgroup_barrier(mem_flags::mem_threadgroup); =>
lanes return before the barrier | heads | run | has returned
simdgroup_barrier => if (lane >= Rd / 4) { return; } simdgroup_barrier
wrong strides of q | heads | numbers | q is wrong
q + ((batch * Nq + head) * L + token) * D => q + ((batch * L + token) * Nq + head) * D
write behind the values | heads | run | out of bounds write of 4 bytes at byte 2048 of 'v'
to[d] = from[d]; => to[d + 1] = from[d];
position that is too large | heads | run | signed integer overflow in [*]
offsets[batch] + => offsets[batch] * 1000000000 +
neighbours rotated | heads | numbers | q is wrong
second = shared[d + Rd / 2]; => second = shared[d + 1];
sine without the attention factor | heads | numbers | q is wrong
metal::precise::sin(angle) * attention_factor => metal::precise::sin(angle)
sum of squares in T | heads | rounded | q was rounded
squares += value * value; => squares = static_cast<T>(squares + value * value);
device memory for constant memory | heads | types | cannot initialize a variable
const device T* from = x => const constant T* from = x
gate of the next token | gate | run | out of bounds read of 4 bytes at byte .* of 'x'
row * P + (Nq => (row + 1) * P + (Nq
gate's product in T | gate | rounded | y was rounded
value * sigmoid(gate) => static_cast<T>(value) * static_cast<T>(sigmoid(gate))

== router
no barrier between keys and rank | routed | run | UNORDERED
E));\n  }\n  threadgroup_barrier(mem_flags::mem_threadgroup); => E)); }
no barrier between rank and starts | routed | run | UNORDERED
pair_weights[i];\n  }\n  threadgroup_barrier(mem_flags::mem_threadgroup); => pair_weights[i]; }
end written behind the starts | routed | run | out of bounds write .* byte 196 of 'routing'
starts[N] = N; => starts[N + 1] = N;
unused experts not written | routed | run | output 'routing' was not fully written: first byte 24
experts[i] = 0; =>
tie in a lane to the highest index | routed | numbers | routing is wrong
values[v] > best => values[v] >= best
tie of lanes to the highest index | routed | numbers | routing is wrong
simd_min(best == top ? index : static_cast<uint>(E - 1)) => simd_max(best == top ? index : 0u)
shared expert's weight without sigmoid | routed | numbers | routing is wrong
S + Top] = sigmoid(load(from, E)) => S + Top] = load(from, E)
sum of a diverged simdgroup | routed | run | divergent synchronisation: .* simd operation
if (Normalise) { => if (lane < 3) {
expert listed for every pair | gate_up | reads | weights read
sorted[i] / R != sorted[i - 1] / R) { => true) { distinct = i + 1; all = N;
shared expert not chosen | chosen | run | output 'experts' was not fully written: first byte 12
if (lane < S) { => if (lane < Top) {
shared expert's weight of a row's neighbour | chosen | numbers | weights is wrong
weight = sigmoid(load(from, E)) => weight = sigmoid(load(logits, E))
rows side by side that overlap | chosen | run | race: write of byte 12 of experts
experts[row * S + lane] = expert => experts[row * Top + lane] = expert
weights rounded on the way | chosen | rounded | weights was rounded
static_cast<T>(weight); => static_cast<T>(static_cast<T>(2 * weight / 3) * 1.5f);
same row for all simdgroups | chosen | run | race: write of byte 0 of experts
thread_position_in_grid.x / 32); => threadgroup_position_in_grid.x);

== experts
misaligned words | gate_up | run | misaligned
(const device Word*)weight => (const device Word*)((const device char*)weight + 1)
words that steps do not fill | gate_up_3 | numbers | y is wrong
Bits % 2 == 0, uint, ushort => true, uint, ushort
half of a code in the next word | gate_up_3 | numbers | y is wrong
word >> place | from[at + 1] << (size - place) => word >> place
shift by more than a word | gate_up_6 | run | shift by a negative or too large amount
<< (size - place) => << (size + place)
code that does not stay at its place | gate_up_6 | numbers | y is wrong
+ Bits > size ? 0 : => + Bits > size ? 1 :
up's rows too far | gate_up | run | out of bounds read of 4 bytes at byte .* of 'weight'
I - kPairs, x => I, x
wrong stride of the scales | gate_up | run | out of bounds read of 4 bytes at byte .* of 'scales'
load(own.scales, at / G) => load(own.scales, at / V)
sums from no first value | gate_up | pattern | y is wrong
acc[2 * kPairs][Rows] = {}; => acc[2 * kPairs][Rows];
last pair not computed | gate_up | run | output 'y' was not fully written
pair < end; pair += 2) {\n    if (pair + 1 < end) {\n      gate_up
=> pair + 1 < end; pair += 2) { if (pair + 1 < end) { gate_up
products in T | gate_up_16 | rounded | y was rounded
inputs[n][i] * values[i] => (T)inputs[n][i] * (T)values[i]
shared expert not apart | gate_up_apart | run | out of bounds read .* of 'weight'
if (Shared && expert == Shared) {\n    const One => if (false) { const One
shared expert's rows of another | down_apart | run | out of bounds read .* of 'shared_weight'
from_row<I>(shared, output) => from_row<I>(shared, expert + output)
outputs that are not there | down | run | out of bounds read .* of 'weight'|race: .* of y
if (output >= H) { => if (false) {
lanes' sum in T | gate_up | rounded | y was rounded
simd_sum(acc[p][n]) => simd_sum(static_cast<T>(acc[p][n]))
weighted sum in T | down | rounded | y was rounded
sums[o] += weight * total; => sums[o] = static_cast<T>(sums[o] + weight * total);
rows that are not there | down | run | out of bounds read of 4 bytes at byte 288 of 'residual'
lane < R => lane <= R
same outputs from every simdgroup | down | run | race: write of byte 0 of y
(block * SG + simdgroup) * kOutputs => block * SG * kOutputs
a row's last pair not added | combined | numbers | y is wrong
k = 0; k < K; k++ => k = 0; k + 1 < K; k++
weight of another pair | combined | numbers | y is wrong
load(weights, row * K + k) => load(weights, row * K)
results in the order of the rows | combined | numbers | y is wrong
(places[row * K + k]) => (row * K + k)
wrong stride of the places | combined | run | out of bounds read of 4 bytes at byte 60 of 'places'
places[row * K + k] => places[(row + 1) * K + k]
columns twice | combined | run | race: write of byte 4 of y
thread_position_in_grid.x * kColumns => thread_position_in_grid.x
columns not made | combined | run | output 'y' was not fully written: first byte 12
c < kColumns; c++) {\n    y => c + 1 < kColumns; c++) {\n    y
pairs' sum in T | combined | rounded | y was rounded
sums[c] += weight => sums[c] = static_cast<T>(sums[c]) + weight
pairs' products in T | combined | rounded | y was rounded
sums[c] += weight * load(from, c) => sums[c] += static_cast<T>(weight) * from[c]
pairs' sums from no first value | combined | pattern | y is wrong
sums[kColumns] = {}; => sums[kColumns];
residual of another row | combined | numbers | y is wrong
load(residual + start, c) => load(residual + first, c)
"""
UNORDERED = "race: .* of threadgroup memory|uninitialised threadgroup memory"


def parsed(table):
    """The defects of the table by family and name."""
    found = {}
    for part in table.split("\n== ")[1:]:
        family, *lines = part.strip().split("\n")
        for line in lines:
            how = re.fullmatch(r"(.+) \| (\w+) \| (\w+) \| (.+)", line)
            if how:
                key = f"{family}: {how[1]}"
                assert key not in found
                found[key] = [
                    family,
                    "",
                    getattr(helpers_defects, how[2]),
                    globals()[how[3]],
                    how[4],
                ]
            else:
                found[key][1] += line
    defects = {}
    for key, (family, text, case, check, message) in found.items():
        old, new = (part.strip().replace("\\n", "\n") for part in text.split("=>"))
        message = UNORDERED if message == "UNORDERED" else message
        defects[key] = Defect(family, old, new, case, check, message)
    return defects


DEFECTS = parsed(TABLE)


@cache
def of_the_text_as_it_is(case, check):
    return check(case, None)


@pytest.mark.parametrize("name", DEFECTS)
def test_defect_is_found(name):
    defect = DEFECTS[name]
    assert of_the_text_as_it_is(defect.case, defect.check) == ""
    message = defect.check(defect.case, defect)
    assert re.search(defect.message, message), message
