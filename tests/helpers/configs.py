"""Configs of the tests' checkpoints: the published ones, and those of the goldens."""

# config.json of Qwen/Qwen3-Next-80B-A3B-Instruct and -Thinking
INSTRUCT = {
    "architectures": ["Qwen3NextForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5120,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "model_type": "qwen3_next",
    "moe_intermediate_size": 512,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "num_hidden_layers": 48,
    "num_key_value_heads": 2,
    "output_router_logits": False,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000000,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 512,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.0.dev0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
CODER = INSTRUCT | {"rope_theta": 5000000}

SIZES = [
    *("hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "linear_num_key_heads"),
    *("linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim", "num_experts"),
    *("num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size"),
]
# All else that the hub's configs have.
HUB = {k: v for k, v in INSTRUCT.items() if k not in [*SIZES, "bos_token_id", "eos_token_id"]}


def dims(hidden, layers, vocab, dense, attention, linear, experts):
    """The sizes of a config; `attention` is heads, kv heads and head_dim; `linear` key heads, value
    heads, key dim, value dim; `experts` their count, top-k, width and the shared expert's width."""
    values = [hidden, layers, vocab, dense, *attention, *linear, *experts]
    return dict(zip(SIZES, values, strict=True))


# Each case shows mistakes that others hide.
CASES = {
    # every matmul's input a multiple of 32, so that it can be quantized
    "base": dims(64, 4, 96, 160, (4, 2, 32), (2, 4, 96, 32), (8, 3, 32, 32)),
    # eps so large, q and k so small, that a wrong eps in their normalisation shows
    "eps": dims(32, 6, 88, 56, (3, 1, 16), (2, 6, 24, 16), (6, 2, 12, 20))
    | {
        "rms_norm_eps": 1e-2,
        "full_attention_interval": 3,
        "linear_conv_kernel_dim": 3,
        "norm_topk_prob": False,
        "partial_rotary_factor": 0.5,
        "rope_theta": 10000,
    },
    # dense layers by both rules (the head, whose index is 0, among them), tied embeddings
    "dense": dims(40, 5, 92, 72, (4, 1, 16), (1, 2, 32, 64), (8, 2, 16, 24))
    | {"mlp_only_layers": [1], "decoder_sparse_step": 2, "tie_word_embeddings": True},
    # greedy decoding follows a permutation of the vocabulary that trunk and head see with noise
    "permutation": dims(48, 2, 224, 64, (2, 1, 32), (1, 2, 32, 16), (6, 2, 16, 16))
    | {"full_attention_interval": 2},
}
# Changes of the config of `base`: original lengths below those 130 tokens, so that positions lie on
# both sides, and rotary widths with frequencies that are kept, mixed and divided.
YARN = {
    "plain": {
        "max_position_embeddings": 48,
        "partial_rotary_factor": 0.75,
        "rope_theta": 100,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
    },
    "betas": {
        "partial_rotary_factor": 0.5,
        "rope_theta": 300,
        "rope_scaling": {
            "type": "yarn",
            "factor": 2.5,
            "original_max_position_embeddings": 64,
            "beta_fast": 6.0,
            "beta_slow": 0.4,
            "truncate": False,
        },
    },
    "mscale": {
        "partial_rotary_factor": 1.0,
        "rope_theta": 50,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 40,
            "original_max_position_embeddings": 32,
            "beta_fast": 4,
            "mscale": 1.0,
            "mscale_all_dim": 0.1,
        },
    },
    "attention_factor": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 100,
            "attention_factor": 1.6,
        },
    },
}
EXTENDED = INSTRUCT | {  # as Qwen recommends it for longer texts
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 262144,
    },
}
SEEDS = {"base": 2, "eps": 1, "dense": 0, "permutation": 2}  # without ties along greedy paths
