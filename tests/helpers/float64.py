"""Qwen3-Next in float64 numpy, one token at a time: the oracle the other tests are judged by.

It follows the equations of the modeling file in Hugging Face transformers (trunk) and of vLLM's
`qwen3_next_mtp` (MTP head), and shares no code with the package, torch or MLX. Nothing is chunked,
fused or cached.

Symbols: L tokens, H hidden_size, V vocab_size, Hk/Hv linear key/value heads, Dk/Dv their dims,
r = Hv/Hk, K conv taps, E experts. Weights are float64 arrays under their names in the checkpoint,
stripped of the module's prefix (`sub`). Arguments whose shape starts with `...` may be batched.
"""

import json
import struct
from pathlib import Path

import numpy as np


def read_safetensors(path):
    """The tensors of a safetensors file: an 8-byte header length, a JSON header, then raw data.

    bfloat16, which numpy lacks, is the upper half of a float32 and is returned as float32.
    """
    raw = Path(path).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        dtype = {"BF16": "<u2", "F32": "<f4", "I32": "<i4"}[entry["dtype"]]
        array = np.frombuffer(data[begin:end], dtype)
        if entry["dtype"] == "BF16":
            array = (array.astype("<u4") << 16).view("<f4")
        tensors[name] = array.reshape(entry["shape"])
    return tensors


def relative_error(result, expected):
    """The relative L2 distance |result − expected| / |expected| as a float."""
    result, expected = np.asarray(result, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(result - expected) / np.linalg.norm(expected))


def sub(weights, prefix):
    """The weights below `prefix`, without it."""
    return {k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.logaddexp(x, 0)


def softmax(x):
    p = np.exp(x - x.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def rms_norm(x, weight, eps):
    """Zero-centred RMSNorm over the last axis; x [..., D], weight [D] as stored (near 0)."""
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * (1 + weight)


def gated_rms_norm(o, z, weight, eps):
    """RMSNormGated: norm first, then the gate; o, z [..., Dv], weight [Dv] as stored (near 1)."""
    return weight * o / np.sqrt((o**2).mean(-1, keepdims=True) + eps) * silu(z)


def l2_norm(x):
    """x [..., D] to unit length; this eps is fixed, it is not `rms_norm_eps`."""
    return x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)


def causal_conv(x, weight, history=None):
    """Depthwise causal convolution, then SiLU.

    x [..., L, C]; weight [C, K], whose tap K−1 meets the current token; history [..., K−1, C], the
    inputs before x (zeros if None). Returns (y [..., L, C], the last K−1 inputs).
    """
    taps = weight.shape[1]
    if history is None:
        history = np.zeros((*x.shape[:-2], taps - 1, x.shape[-1]))
    rows = np.concatenate([history, x], axis=-2)
    length = x.shape[-2]
    y = sum(weight[:, tap] * rows[..., tap : tap + length, :] for tap in range(taps))
    return silu(y), rows[..., length:, :]


def gated_delta_rule(q, k, v, g, beta, state=None):
    """The recurrence of Gated DeltaNet (arXiv 2412.06464, eq. 10), token by token.

    q, k [..., L, Hk, Dk], normalised and q already times Dk^-0.5; v [..., L, Hv, Dv];
    g (log decay), beta [..., L, Hv]; state [..., Hv, Dv, Dk] (zeros if None).
    Returns (o [..., L, Hv, Dv], state after the last token).
    """
    heads, dim = v.shape[-2:]
    # key head j serves the value heads j·r … j·r + r − 1
    q, k = (np.repeat(x, heads // x.shape[-2], axis=-2) for x in (q, k))
    if state is None:
        state = np.zeros((*v.shape[:-3], heads, dim, k.shape[-1]))
    o, gamma = np.empty(v.shape), np.exp(g)[..., None, None]
    for t in range(v.shape[-3]):
        state = state * gamma[..., t, :, :, :]
        recalled = (state @ k[..., t, :, :, None])[..., 0]
        delta = beta[..., t, :, None] * (v[..., t, :, :] - recalled)
        state = state + delta[..., :, None] * k[..., t, :, None, :]
        o[..., t, :, :] = (state @ q[..., t, :, :, None])[..., 0]
    return o, state


def gated_delta_net(x, w, config):
    """The linear-attention mixer; x [L, H], w the weights below `linear_attn.`. Returns [L, H]."""
    length = len(x)
    key_heads, value_heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
    key_dim, value_dim = config["linear_key_head_dim"], config["linear_value_head_dim"]
    r = value_heads // key_heads
    # both projections are laid out per key head: [q | k | v × r | z × r] and [b × r | a × r]
    qkvz = (x @ w["in_proj_qkvz.weight"].T).reshape(length, key_heads, -1)
    ends = np.cumsum([key_dim, key_dim, r * value_dim])
    q, k, v, z = (part.reshape(length, -1) for part in np.split(qkvz, ends, axis=-1))
    ba = (x @ w["in_proj_ba.weight"].T).reshape(length, key_heads, 2 * r)
    b, a = (part.reshape(length, -1) for part in np.split(ba, 2, axis=-1))

    qkv, _ = causal_conv(np.concatenate([q, k, v], axis=-1), w["conv1d.weight"][:, 0])
    q, k, v = np.split(qkv, [key_heads * key_dim, 2 * key_heads * key_dim], axis=-1)
    q = l2_norm(q.reshape(length, key_heads, key_dim)) * key_dim**-0.5
    k = l2_norm(k.reshape(length, key_heads, key_dim))
    v = v.reshape(length, value_heads, value_dim)
    g = -np.exp(w["A_log"]) * softplus(a + w["dt_bias"])
    o, _ = gated_delta_rule(q, k, v, g, sigmoid(b))
    o = gated_rms_norm(o, z.reshape(o.shape), w["norm.weight"], config["rms_norm_eps"])
    return o.reshape(length, -1) @ w["out_proj.weight"].T


def rope(x, config, first=0):
    """Rotary embedding, half-split, of the first `head_dim · partial_rotary_factor` dims.

    x [L, heads, head_dim], row i at position first + i. Returns the same shape.
    """
    dims = int(config["head_dim"] * config["partial_rotary_factor"])
    frequency, factor = frequencies(dims, float(config["rope_theta"]), config)
    angle = np.arange(first, first + len(x))[:, None, None] * frequency
    cos, sin = factor * np.cos(angle), factor * np.sin(angle)
    x, y, rest = np.split(x, [dims // 2, dims], axis=-1)
    rotated = [x * cos - y * sin, y * cos + x * sin, rest]
    return np.concatenate(rotated, axis=-1)


def frequencies(dims, theta, config):
    """RoPE's radians a position [dims / 2], and the factor of cosine and sine: 1 without YaRN.

    YaRN's paper, sections 3.2 to 3.4. A dimension turns L · radians / 2π times within the original
    length L; the ramp between beta_fast and beta_slow turns is linear in the dimension's index.
    """
    radians = theta ** (-np.arange(0, dims, 2) / dims)
    yarn = config["rope_scaling"]
    if yarn is None:
        return radians, 1.0
    s = yarn["factor"]
    length = yarn.get("original_max_position_embeddings", config["max_position_embeddings"])
    turns = np.array([yarn.get("beta_fast", 32), yarn.get("beta_slow", 1)])
    first, last = np.log(length / (2 * np.pi * turns)) / np.log(theta) * dims / 2
    if yarn.get("truncate", True):
        first, last = np.floor(first), np.ceil(last)
    first, last = max(first, 0), min(last, dims - 1)
    kept = np.clip((last - np.arange(dims // 2)) / (last - first), 0, 1)
    m, all_dim = yarn.get("mscale", 1), yarn.get("mscale_all_dim", 0)
    factor = (0.1 * m * np.log(s) + 1) / (0.1 * all_dim * np.log(s) + 1)
    return kept * radians + (1 - kept) * radians / s, yarn.get("attention_factor", factor)


def attention(x, w, config):
    """The full-attention mixer; x [L, H], w the weights below `self_attn.`. Returns [L, H]."""
    return attention_of_last(x, w, config, len(x))[0]


def attention_of_last(x, w, config, last):
    """`attention` at the last positions alone [last, H], and its weights, [last, heads, L]."""
    length, dim, eps = len(x), config["head_dim"], config["rms_norm_eps"]
    q = (x[length - last :] @ w["q_proj.weight"].T).reshape(last, -1, 2 * dim)
    q, gate = np.split(q, 2, axis=-1)
    k = (x @ w["k_proj.weight"].T).reshape(length, -1, dim)
    v = (x @ w["v_proj.weight"].T).reshape(length, -1, dim)
    q = rope(rms_norm(q, w["q_norm.weight"], eps), config, length - last)
    k = rope(rms_norm(k, w["k_norm.weight"], eps), config)
    k, v = (np.repeat(y, q.shape[1] // y.shape[1], axis=1) for y in (k, v))
    o, weights = np.empty((last, *q.shape[1:])), np.zeros((last, q.shape[1], length))
    for i, t in enumerate(range(length - last, length)):
        scores = np.einsum("hd,shd->hs", q[i], k[: t + 1]) * dim**-0.5
        weights[i, :, : t + 1] = softmax(scores)
        o[i] = np.einsum("hs,shd->hd", weights[i, :, : t + 1], v[: t + 1])
    o = o * sigmoid(gate)
    return o.reshape(last, -1) @ w["o_proj.weight"].T, weights


def mlp(x, w):
    """SwiGLU; x [..., H], w holds {gate,up,down}_proj.weight. Returns [..., H]."""
    hidden = silu(x @ w["gate_proj.weight"].T) * (x @ w["up_proj.weight"].T)
    return hidden @ w["down_proj.weight"].T


def route(logits, config):
    """Router logits [..., E] → (experts [..., k] by falling probability, weights [..., k])."""
    p = softmax(logits)
    experts = np.argsort(-p, axis=-1, kind="stable")[..., : config["num_experts_per_tok"]]
    weights = np.take_along_axis(p, experts, axis=-1)
    if config["norm_topk_prob"]:
        weights = weights / weights.sum(-1, keepdims=True)
    return experts, weights


def moe(x, w, config):
    """The sparse MLP with its shared expert; x [L, H], w the weights below `mlp.`."""
    experts, weights = route(x @ w["gate.weight"].T, config)
    y = sigmoid(x @ w["shared_expert_gate.weight"].T) * mlp(x, sub(w, "shared_expert."))
    for e in range(config["num_experts"]):
        t, slot = np.nonzero(experts == e)
        y[t] += weights[t, slot, None] * mlp(x[t], sub(w, f"experts.{e}."))
    return y


def decoder_layer(x, w, config):
    """One layer; x [L, H] → [L, H]. The names in w tell which mixer and which MLP it has."""
    eps = config["rms_norm_eps"]
    y = rms_norm(x, w["input_layernorm.weight"], eps)
    if mixer := sub(w, "linear_attn."):
        x = x + gated_delta_net(y, mixer, config)
    else:
        x = x + attention(y, sub(w, "self_attn."), config)
    y = rms_norm(x, w["post_attention_layernorm.weight"], eps)
    feed_forward = sub(w, "mlp.")
    sparse = "gate.weight" in feed_forward
    return x + (moe(y, feed_forward, config) if sparse else mlp(y, feed_forward))


class Model:
    """A checkpoint directory in the hub's layout, as float64."""

    def __init__(self, directory):
        directory = Path(directory)
        self.config = json.loads((directory / "config.json").read_text())
        tensors = read_safetensors(directory / "model.safetensors")
        self.weights = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}

    def embed(self, tokens):
        """tokens [L] → [L, H]."""
        return self.weights["model.embed_tokens.weight"][np.asarray(tokens)]

    def layers(self, tokens):
        """tokens [L] → 1 + num_hidden_layers arrays [L, H]: the embedding, each layer's output."""
        states = [self.embed(tokens)]
        for i in range(self.config["num_hidden_layers"]):
            weights = sub(self.weights, f"model.layers.{i}.")
            states.append(decoder_layer(states[-1], weights, self.config))
        return states

    def final_norm(self, x):
        """The last layer's output [..., H] → the final hidden state [..., H]."""
        return rms_norm(x, self.weights["model.norm.weight"], self.config["rms_norm_eps"])

    def logits(self, hidden):
        """The final hidden state, or the MTP head's, [..., H] → [..., V]."""
        tied = self.config["tie_word_embeddings"]
        name = "model.embed_tokens.weight" if tied else "lm_head.weight"
        return hidden @ self.weights[name].T

    def mtp(self, hidden, next_tokens):
        """The MTP head over positions 0 … L−1.

        hidden [L, H], the trunk's states after `model.norm`; next_tokens [L], the token after each.
        Returns m [L, H]; `logits(m[i])` predicts the token two after position i.
        """
        w, eps = sub(self.weights, "mtp."), self.config["rms_norm_eps"]
        embedding = rms_norm(self.embed(next_tokens), w["pre_fc_norm_embedding.weight"], eps)
        hidden = rms_norm(hidden, w["pre_fc_norm_hidden.weight"], eps)
        x = np.concatenate([embedding, hidden], axis=-1) @ w["fc.weight"].T
        u = decoder_layer(x, sub(w, "layers.0."), self.config)
        return rms_norm(u, w["norm.weight"], eps)

    def drafts(self, hidden, next_tokens, depth):
        """Greedy recursive drafts of the MTP head.

        hidden [n, H] of a context of n tokens; next_tokens [n], the last one sampled by the trunk.
        Returns (drafts [depth], their logits [depth, V]).
        """
        hidden, next_tokens, rows = np.array(hidden), list(next_tokens), []
        for _ in range(depth):
            m = self.mtp(hidden, next_tokens)[-1:]
            rows.append(self.logits(m)[0])
            hidden = np.concatenate([hidden, m])
            next_tokens.append(int(rows[-1].argmax()))
        return np.array(next_tokens[-depth:]), np.array(rows)
