"""A tiny model with the true pattern, and a long text for it whose needles its attention must find.

One period: three linear layers, then attention, which is the last layer. So all of a text's logits
but the last ones can be left out, and with them the attention's queries: the float64 oracle then
takes time that is linear in the text's length.
"""

import json

import float64
import mlx.core as mx
import numpy as np
from float64 import sub

CONFIG = {
    "model_type": "qwen3_next",
    **{"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "full_attention_interval": 4},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64},
    **{"linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_conv_kernel_dim": 4},
    **{"linear_key_head_dim": 16, "linear_value_head_dim": 16},
    **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    **{"shared_expert_intermediate_size": 16, "intermediate_size": 32, "decoder_sparse_step": 1},
    **{"mlp_only_layers": [], "norm_topk_prob": True, "tie_word_embeddings": False},
    **{"partial_rotary_factor": 0.25, "rope_theta": 10_000_000, "rope_scaling": None},
    **{"rms_norm_eps": 1e-6, "max_position_embeddings": 262_144 + 1024},
}
NEEDLES = {58: 0.01, 59: 0.5, 60: 0.99}  # tokens that occur once, and where
ASKS = 3  # the token that asks for needle n is n + 3
IDENTITY = 8  # dimensions that tell what a token is, and as many that tell what it asks for
SHARP = 1.0  # weight of attention's q and k norms, less 1


def write(directory):
    """Writes a checkpoint in the hub's layout."""
    rng = np.random.default_rng(0)
    c, weights = CONFIG, {}
    H, I, hd = c["hidden_size"], c["moe_intermediate_size"], c["head_dim"]
    K, V, Hv = 16, 32, c["linear_num_value_heads"]

    def put(name, *shape, scale=None):
        scale = shape[-1] ** -0.5 if scale is None else scale
        weights[name] = scale * rng.standard_normal(shape)

    put("model.embed_tokens.weight", c["vocab_size"], H, scale=1)
    embedding, m = weights["model.embed_tokens.weight"], IDENTITY
    embedding[:, [*range(3), *range(m, m + 3)]] = 0
    for i, needle in enumerate(NEEDLES):
        embedding[needle, :m] = embedding[needle + ASKS, m : 2 * m] = m**0.5 * np.eye(m)[i]
    put("lm_head.weight", c["vocab_size"], H)
    put("model.norm.weight", H, scale=0.1)
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            put(f"{layer}.{norm}.weight", H, scale=0.1)
        if i < 3:
            mixer = f"{layer}.linear_attn"
            put(f"{mixer}.in_proj_qkvz.weight", 2 * K + 2 * V, H)
            put(f"{mixer}.in_proj_ba.weight", 2 * Hv, H)
            put(f"{mixer}.conv1d.weight", 2 * K + V, 1, 4)
            put(f"{mixer}.out_proj.weight", H, V, scale=0.02)
            weights[f"{mixer}.A_log"] = np.log(rng.uniform(0.001, 0.1, Hv))
            weights[f"{mixer}.dt_bias"] = rng.uniform(-3, 0, Hv)
            weights[f"{mixer}.norm.weight"] = np.ones(V // Hv)
        else:
            mixer = f"{layer}.self_attn"
            put(f"{mixer}.q_proj.weight", 2 * c["num_attention_heads"] * hd, H)
            put(f"{mixer}.v_proj.weight", hd, H)
            put(f"{mixer}.o_proj.weight", H, c["num_attention_heads"] * hd, scale=0.03)
            # The first head finds the tokens that are what a token asks for.
            put("alike", hd, m)
            alike, others = weights.pop("alike"), np.zeros((hd, H - 2 * m))
            weights[f"{mixer}.q_proj.weight"][:hd] = np.hstack([0 * alike, alike, others])
            weights[f"{mixer}.k_proj.weight"] = np.hstack([alike, 0 * alike, others])
            for norm in ("q_norm", "k_norm"):
                weights[f"{mixer}.{norm}.weight"] = np.full(hd, SHARP)
        put(f"{layer}.mlp.gate.weight", c["num_experts"], H)
        put(f"{layer}.mlp.shared_expert_gate.weight", 1, H)
        for part in ("shared_expert", *(f"experts.{e}" for e in range(c["num_experts"]))):
            for name in ("gate_proj", "up_proj"):
                put(f"{layer}.mlp.{part}.{name}.weight", I, H)
            put(f"{layer}.mlp.{part}.down_proj.weight", H, I, scale=0.02)
    arrays = {name: mx.array(w.astype(np.float32)) for name, w in weights.items()}
    mx.save_safetensors(str(directory / "model.safetensors"), arrays, {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(CONFIG))


def text(length, more):
    """Token ids ``[length + more]``: noise with the needles, who asks for them, and noise."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, min(NEEDLES), length + more)
    for needle, share in NEEDLES.items():
        tokens[int(length * share)] = needle
    tokens[length : length + len(NEEDLES)] = [needle + ASKS for needle in NEEDLES]
    return tokens


def oracle(directory, tokens, last):
    """The float64 logits ``[last, V]`` of a text's last positions, and what attention does there.

    The second result is the first head's weights ``[last, L]``.
    """
    model = float64.Model(directory)
    x, config = model.embed(tokens), model.config
    *linear, layer = (sub(model.weights, f"model.layers.{i}.") for i in range(4))
    for weights in linear:
        x = float64.decoder_layer(x, weights, config)
    y = float64.rms_norm(x, layer["input_layernorm.weight"], config["rms_norm_eps"])
    y, weights = float64.attention_of_last(y, sub(layer, "self_attn."), config, last)
    x = x[-last:] + y
    y = float64.rms_norm(x, layer["post_attention_layernorm.weight"], config["rms_norm_eps"])
    x = x + float64.moe(y, sub(layer, "mlp."), config)
    return model.final_norm(x) @ model.weights["lm_head.weight"].T, weights[:, 0]
