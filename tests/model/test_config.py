"""Config: what either dialect says, and what is refused by name."""

import dataclasses
import json
import math

import checkpoints
import pytest
from configs import CODER, INSTRUCT

from mlx_qwen3next.model.config import Config

REQUIRED = [
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
    "rms_norm_eps",
    "rope_theta",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
]
INTEGERS = [
    *(key for key in REQUIRED if key not in ("rms_norm_eps", "rope_theta")),
    "full_attention_interval",
    "decoder_sparse_step",
    "max_position_embeddings",
    "intermediate_size",
]
MAY_BE_ZERO = ("num_experts", "intermediate_size")


def parse(**changes):
    """The Config of `base` with some keys changed, or left out where the value is `...`."""
    raw = checkpoints.config("base") | changes
    return Config.from_dict({key: value for key, value in raw.items() if value is not ...})


def refusal(**changes):
    """The message that refuses the changes."""
    with pytest.raises(ValueError) as caught:
        parse(**changes)
    return str(caught.value)


@pytest.mark.parametrize(("raw", "theta"), [(INSTRUCT, 1e7), (CODER, 5e6)], ids=["80B", "coder"])
def test_published_configs(raw, theta):
    config = Config.from_dict(raw)
    full = [i for i in range(48) if not config.is_linear(i)]
    assert full == [3, 7, 11, 15, 19, 23, 27, 31, 35, 39, 43, 47]
    assert all(config.is_sparse(i) for i in range(48))
    assert config.rotary_dims == 64
    assert (config.linear_key_dim, config.linear_value_dim) == (2048, 4096)
    assert config.linear_conv_dim == 8192
    assert config.rope_theta == theta
    assert config.quantization is None
    stated = {f.name for f in dataclasses.fields(config)} & set(raw) - {"mlp_only_layers"}
    assert len(stated) == 25
    assert {name: getattr(config, name) for name in stated} == {name: raw[name] for name in stated}


@pytest.mark.parametrize("case", checkpoints.CASES)
def test_both_dialects_mean_the_same(case):
    raw = checkpoints.config(case)
    assert Config.from_dict(checkpoints.transformers5(raw)) == Config.from_dict(raw)


def test_transformers_own_file_means_the_same():
    directory = checkpoints.GOLDENS
    fused = Config.from_file(directory / "base_fused" / "config.json")
    assert fused == Config.from_file(directory / "base" / "config.json")


def test_which_layers_are_full_attention_and_dense():
    eps, dense = (Config.from_dict(checkpoints.config(case)) for case in ("eps", "dense"))
    assert [eps.is_linear(i) for i in range(6)] == [True, True, False, True, True, False]
    assert [dense.is_sparse(i) for i in range(5)] == [False, False, False, True, False]
    assert eps.rotary_dims == 8


def test_layer_types_override_the_interval():
    types = ["full_attention", "linear_attention", "linear_attention", "linear_attention"]
    assert parse(layer_types=types).layer_types == tuple(types)


def test_rope_parameters_override_the_top_level():
    rope = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
    config = parse(rope_parameters=rope)
    assert (config.rope_theta, config.rotary_dims) == (500.0, 16)


def test_what_may_be_left_out_has_transformers_defaults():
    optional = [
        "decoder_sparse_step",
        "full_attention_interval",
        "intermediate_size",
        "max_position_embeddings",
        "mlp_only_layers",
        "norm_topk_prob",
        "partial_rotary_factor",
        "tie_word_embeddings",
    ]
    config = parse(**dict.fromkeys(optional, ...))
    assert config == dataclasses.replace(
        parse(), intermediate_size=0, max_position_embeddings=32768
    )
    assert parse(**dict.fromkeys(optional, None)) == config


def test_unknown_keys_are_ignored():
    assert parse(something_new=[1, 2]) == parse()


@pytest.mark.parametrize("value", [{"quant_method": "gptq", "bits": 4}, "fp8", True], ids=str)
def test_tensors_and_not_quantization_config_say_how_weights_are_quantized(value):
    assert parse(quantization_config=value) == parse()


def test_a_model_without_experts_needs_no_expert_sizes():
    config = parse(num_experts=0, moe_intermediate_size=..., shared_expert_intermediate_size=...)
    assert not any(config.is_sparse(i) for i in range(4))
    # transformers writes its default of 10 experts per token all the same
    assert parse(num_experts=0, num_experts_per_tok=10).num_experts_per_tok == 0


@pytest.mark.parametrize("case", checkpoints.CASES)
def test_to_dict_round_trip(case):
    quantization = {"group_size": 32, "bits": 4, "model.layers.0.mlp.gate": {"bits": 8}}
    for extra in ({}, {"quantization": quantization}):
        config = Config.from_dict(checkpoints.config(case) | extra)
        assert Config.from_dict(config.to_dict()) == config
    assert config.to_dict()["quantization"] == quantization


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse().hidden_size = 1


@pytest.mark.parametrize("key", REQUIRED)
def test_missing_key(key):
    assert refusal(**{key: ...}) == f"the config lacks {key}"
    assert refusal(**{key: None}) == f"the config lacks {key}"


def test_all_missing_keys_are_named_at_once():
    assert refusal(hidden_size=..., head_dim=...) == "the config lacks hidden_size, head_dim"


@pytest.mark.parametrize("value", [-1, 0, 4.0, True, "4", [4], 2**31], ids=repr)
@pytest.mark.parametrize("key", INTEGERS)
def test_not_a_size(key, value):
    if value == 0 and key in MAY_BE_ZERO:
        assert getattr(parse(**{key: 0}), key) == 0
    else:
        assert refusal(**{key: value}).startswith(f"{key} must be ")


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -1e-6, 0, True, "1e-6", [1], 10**400], ids=lambda v: repr(v)[:9]
)
@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta", "partial_rotary_factor"])
def test_not_a_positive_number(key, value):
    assert refusal(**{key: value}).startswith(f"{key} must be ")


@pytest.mark.parametrize("value", [0, 1, "true"], ids=repr)
@pytest.mark.parametrize("key", ["norm_topk_prob", "tie_word_embeddings"])
def test_not_a_flag(key, value):
    assert refusal(**{key: value}) == f"{key} must be true or false, got {value!r}"


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262144}
LINEAR = ["linear_attention"]


def yarn(**changes):
    return {"rope_scaling": YARN | changes}


def test_yarn_is_read_and_written():
    config = parse(rope_scaling=YARN)
    options = config.rope_scaling
    assert (options.factor, options.original_max_position_embeddings) == (4, 262144)
    assert (options.beta_fast, options.beta_slow, options.truncate) == (32, 1, True)
    assert options.attention_factor == pytest.approx(1 + 0.1 * math.log(4))
    assert config.rope.scaling == options
    assert config.max_position_embeddings == 4 * 262144
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    for same in (
        {"rope_scaling": {"type": "yarn", "factor": 4}},
        {"rope_parameters": YARN, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": YARN},
        {"rope_scaling": YARN | dict.fromkeys(("beta_fast", "mscale", "attention_factor"))},
        {"max_position_embeddings": 2**20, "rope_scaling": YARN | {"factor": None}},
        yarn(mscale=3),  # both or none
    ):
        assert parse(**same) == config
    assert parse(max_position_embeddings=2**21, rope_scaling=YARN).max_position_embeddings == 2**21
    assert parse(rope_parameters=YARN, rope_scaling={"type": "default"}) == parse()


def test_another_scaling_stretches_the_original_length():
    asked = {"rope_type": "yarn", "factor": 2.5}
    expected = parse(rope_scaling=asked)
    assert expected.max_position_embeddings == 655360
    assert parse().with_rope_scaling(asked) == expected
    assert parse(rope_scaling=YARN).with_rope_scaling(asked) == expected
    with pytest.raises(ValueError, match="rope_type of rope_scaling is 'linear'"):
        parse().with_rope_scaling({"rope_type": "linear", "factor": 2})


IMPOSSIBLE = {
    "another model": ({"model_type": "llama"}, "model_type is 'llama'"),
    "no model_type": ({"model_type": ...}, "model_type is None"),
    "attention heads": (
        {"num_attention_heads": 5},
        "num_attention_heads (5) is not divisible by num_key_value_heads (2)",
    ),
    "linear heads": (
        {"linear_num_value_heads": 3},
        "linear_num_value_heads (3) is not divisible by linear_num_key_heads (2)",
    ),
    "one tap": ({"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim must be within 2"),
    "odd rotary dims": ({"partial_rotary_factor": 0.1}, "partial_rotary_factor (0.1) of head_dim"),
    "no rotary dims": ({"partial_rotary_factor": 0.01}, "partial_rotary_factor (0.01) of head_dim"),
    "rotary above 1": ({"partial_rotary_factor": 1.5}, "partial_rotary_factor (1.5) of head_dim"),
    "linear": ({"rope_scaling": {"rope_type": "linear"}}, "rope_type of rope_scaling is 'linear'"),
    "old key": ({"rope_scaling": {"type": "dynamic"}}, "rope_type of rope_scaling is 'dynamic'"),
    "llama3": ({"rope_parameters": {"rope_type": "llama3"}}, "rope_type of rope_parameters is 'll"),
    "llama3 beside yarn": (
        {"rope_parameters": {"rope_type": "llama3"}, "rope_scaling": YARN},
        "rope_type of rope_parameters is 'llama3'",
    ),
    "yarn that shrinks": (yarn(factor=0.5), "factor must be at least 1, and 262144 positions"),
    "yarn without end": (yarn(factor=1e5), "factor must be at least 1, and 262144 positions"),
    "factor no number": (yarn(factor="4"), "factor must be a number"),
    "original length": (yarn(original_max_position_embeddings=0), "original_max_position_embeddin"),
    "betas": (yarn(beta_fast=1, beta_slow=2), "beta_fast (1.0) must be at least beta_slow (2.0)"),
    "attention factor": (yarn(attention_factor=-1), "attention_factor must be positive"),
    "mscale": (yarn(mscale=-1, mscale_all_dim=1), "mscale must be positive"),
    "truncate": (yarn(truncate=1), "truncate must be true or false"),
    "yarn without base": (
        {"rope_theta": 1, "rope_scaling": YARN},
        "rope_theta (1.0) must be above 1 for YaRN",
    ),
    "rope no object": ({"rope_parameters": "default"}, "rope_parameters is 'default'"),
    "too few layer_types": ({"layer_types": LINEAR * 3}, "layer_types must be a list of 4 names"),
    "layer_types no list": ({"layer_types": "linear"}, "layer_types must be a list of 4 names"),
    "unknown layer type": (
        {"layer_types": [*LINEAR * 3, "sliding_attention"]},
        "layer_types has unknown ['sliding_attention']",
    ),
    "top-k above experts": (
        {"num_experts_per_tok": 9},
        "num_experts_per_tok (9) exceeds num_experts (8)",
    ),
    "layers without end": ({"num_hidden_layers": 10**9}, "num_hidden_layers must be within 1 and"),
    "dense layer": (
        {"intermediate_size": ..., "mlp_only_layers": [2]},
        "layer 2 is dense, but the config lacks intermediate_size",
    ),
    "no such dense layer": ({"mlp_only_layers": [4]}, "mlp_only_layers must list layer indices"),
    "negative dense layer": ({"mlp_only_layers": [-1]}, "mlp_only_layers must list layer indices"),
    "dense layer a flag": ({"mlp_only_layers": [True]}, "mlp_only_layers must list layer indices"),
    "dense layers no list": ({"mlp_only_layers": 0}, "mlp_only_layers must list layer indices"),
    "biases": ({"attention_bias": True}, "attention_bias is true"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "quantization a flag": ({"quantization": True}, "quantization must give group_size and bits"),
    "quantization without bits": (
        {"quantization": {"group_size": 64}},
        "quantization must give group_size and bits",
    ),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible(case):
    changes, message = IMPOSSIBLE[case]
    assert refusal(**changes).startswith(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"hidden_size": 64', "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b'{"model_type": "\xff"}', "is not valid JSON"),
        (b"[" * 200_000, "is not valid JSON"),
        (b"[1, 2]", "holds list, not a JSON object"),
        (b'{"model_type": "llama"}', "model_type is 'llama'"),
        (None, "cannot be read: No such file or directory"),
    ],
    ids=["cut off", "empty", "no UTF-8", "too deep", "a list", "another model", "no file"],
)
def test_bad_file_is_named(tmp_path, content, message):
    file = tmp_path / "config.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        Config.from_file(file)
    assert str(caught.value).startswith(f"{file}") and message in str(caught.value)
