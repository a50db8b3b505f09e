"""A model divided among ranks: who has what, and that together they compute what one does."""

import functools
import json
import re
import sys
from collections import Counter

import checkpoints
import configs
import mlx.core as mx
import numpy as np
import pytest
import rank
from helpers_group import results
from machines import sent_a_step

from mlx_qwen3next.bench import shapes
from mlx_qwen3next.checkpoint.hub import BUNDLED
from mlx_qwen3next.checkpoint.loading import load_model
from mlx_qwen3next.group import Group
from mlx_qwen3next.model import mtp_head
from mlx_qwen3next.model.config import Config
from mlx_qwen3next.model.parallel import divide, shard
from mlx_qwen3next.model.qwen3_next import Model
from mlx_qwen3next.model.sharding import Shard, plan, split_layers, take

BASE = checkpoints.GOLDENS / "base"


class Ranks(Group):
    """One of several ranks whose others are not there."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size

    def gather(self, what, value):
        return [value] * self.size


@pytest.fixture(scope="module")
def quantized_dir(tmp_path_factory):
    """`base` in 4 bits, as mlx-lm converts it: without a head."""
    directory = tmp_path_factory.mktemp("model") / "quantized"
    return checkpoints.convert(directory, bits=4, group_size=32, mode="affine")


@pytest.fixture(scope="module")
def wide_dir(tmp_path_factory):
    """Random 4-bit weights whose experts four ranks can divide: 64 channels each."""
    directory = tmp_path_factory.mktemp("model")
    widths = {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 256}
    small = {"hidden_size": 128, "vocab_size": 512, "num_experts": 8}
    shapes.SHAPES["wide"] = shapes.SHAPES["small"] | widths | small
    try:
        shapes.write(directory, "wide", 4)
    finally:
        del shapes.SHAPES["wide"]
    return directory


@pytest.fixture
def path_of(quantized_dir, wide_dir):
    """A case's directory."""
    known = {"demo": BUNDLED, "quantized": quantized_dir, "wide": wide_dir}
    return lambda case: str(known.get(case, checkpoints.GOLDENS / case))


def config_of(directory, **changes):
    return Config.from_dict(
        checkpoints.json.loads((directory / "config.json").read_text()) | changes
    )


# --- which elements are whose --------------------------------------------------------------------


def parts_of(config, path, shape, size, mode):
    """Each rank's elements of a parameter, numbered as in the whole."""
    whole = np.arange(np.prod(shape)).reshape(shape)
    indices = [Shard(config, r, size, mode).index(path, shape) for r in range(size)]
    return [whole if index is None else whole[index] for index in indices]


def times(config, path, size, mode):
    """The number of ranks that have each element, the same for all elements of a parameter."""
    own_experts = mode == "expert" and ".shared_expert" in path
    if own_experts or re.search(r"norm|\.mlp\.gate\.|shared_expert_gate|mtp\.fc", path):
        return size
    if "k_proj" in path or "v_proj" in path:
        return max(1, size // config.num_key_value_heads)
    return 1


@pytest.mark.parametrize("mode", ["tensor", "expert"])
@pytest.mark.parametrize(
    ("case", "size"),
    [("base", 2), ("base", 4), ("demo", 2), ("dense", 2), ("permutation", 2), ("quantized", 2)],
)
def test_parts_together_are_the_whole(path_of, case, size, mode):
    model = load_model(path_of(case), dtype=mx.float32, pack=False)
    for path, shape in model.parameter_shapes().items():
        if mode == "tensor" and case == "quantized" and "down_proj" in path:
            continue  # refused, see below
        parts = parts_of(model.args, path, shape, size, mode)
        counts = Counter(np.concatenate([part.ravel() for part in parts]).tolist())
        assert len(counts) == np.prod(shape), path
        assert all((np.diff(part.ravel()) > 0).all() for part in parts), path
        if not re.search("in_proj|conv1d", path):  # see the next test
            assert set(counts.values()) == {times(model.args, path, size, mode)}, path
            assert len({part.shape for part in parts}) == 1, path
        firsts = [part.ravel()[0] for part in parts]
        assert firsts == sorted(firsts), path


def rows(name, config, keys, values):
    """The meaning of each row of a linear layer's parameter, with these key and value heads."""
    Dk, Dv = config.linear_key_head_dim, config.linear_value_head_dim
    r = config.linear_num_value_heads // config.linear_num_key_heads

    def of(kind, heads, width):
        return [(kind, head, i) for head in heads for i in range(width)]

    if name == "conv1d":
        return of("q", keys, Dk) + of("k", keys, Dk) + of("v", values, Dv)
    result = []
    for key in keys:
        own = [head for head in values if head // r == key]
        if name == "in_proj_ba":
            result += of("b", own, 1) + of("a", own, 1)
        else:
            result += of("q", [key], Dk) + of("k", [key], Dk) + of("v", own, Dv) + of("z", own, Dv)
    return result


@pytest.mark.parametrize("name", ["in_proj_qkvz", "in_proj_ba", "conv1d"])
@pytest.mark.parametrize(
    ("config", "size"),
    [(checkpoints.config("base"), 2), (checkpoints.config("base"), 4),
     (checkpoints.config("dense"), 2), (checkpoints.config("permutation"), 2),
     (configs.INSTRUCT, 2), (configs.INSTRUCT, 4), (configs.INSTRUCT, 16)],
)  # fmt: skip
def test_a_key_head_stays_with_its_value_heads(name, config, size):
    config = Config.from_dict(config)
    Hk, Hv = config.linear_num_key_heads, config.linear_num_value_heads
    whole = rows(name, config, range(Hk), range(Hv))
    for r in range(size):
        values = range(r * Hv // size, (r + 1) * Hv // size)
        keys = sorted({head * Hk // Hv for head in values})
        part = Shard(config, r, size)
        index = part.index(f"model.layers.0.linear_attn.{name}.weight", (len(whole), 7))
        picked = np.arange(len(whole))[index[0]]
        assert [whole[i] for i in picked] == rows(name, config, keys, values)
        assert (list(part.key_heads), list(part.value_heads)) == (keys, list(values))


def test_queries_have_their_keys_where_several_ranks_share_one():
    config = config_of(BASE)  # 4 heads, 2 of keys and values
    parts = [Shard(config, r, 4) for r in range(4)]
    assert [(list(part.heads), list(part.kv_heads)) for part in parts] == [
        ([0], [0]), ([1], [0]), ([2], [1]), ([3], [1])
    ]  # fmt: skip


@pytest.mark.parametrize("mode", ["tensor", "expert", "pipeline"])
@pytest.mark.parametrize("case", ["base", "base_fused", "dense", "demo", "quantized"])
def test_a_rank_reads_what_dividing_the_whole_leaves_it(path_of, case, mode):
    if (case, mode) == ("quantized", "tensor"):
        mode = None  # tensor is refused, see below
    for r in range(2):
        group = Ranks(r, 2)
        own = checkpoints.parameters(
            load_model(path_of(case), dtype=mx.float32, pack=False, group=group, mode=mode)
        )
        whole = load_model(path_of(case), dtype=mx.float32, pack=False)
        parameters = checkpoints.parameters(whole)
        part = divide(whole, group, mode)
        divided = checkpoints.parameters(whole)
        assert own.keys() == divided.keys()
        for path, value in own.items():
            source = parameters[part.whole_path(path)]
            index = part.index(part.whole_path(path), source.shape)
            expected = source if index is None else take(source, index)
            assert value.dtype == expected.dtype and mx.array_equal(value, expected), path
            assert mx.array_equal(divided[path], expected), path


@pytest.mark.parametrize(
    ("changes", "size", "what"),
    [
        ({"num_attention_heads": 3, "num_key_value_heads": 1}, 2, "3 attention heads"),
        ({"num_key_value_heads": 3, "num_attention_heads": 6}, 2, "3 key-value heads"),
        ({"linear_num_value_heads": 6, "num_attention_heads": 8}, 4, "6 linear value heads"),
        ({"linear_num_key_heads": 3, "linear_num_value_heads": 6}, 2, "3 linear key heads"),
        ({"vocab_size": 97}, 2, "97 tokens of the vocabulary"),
        ({"moe_intermediate_size": 31}, 2, "31 intermediate channels"),
        ({"shared_expert_intermediate_size": 31}, 2, "31 intermediate channels"),
        ({"num_experts": 9}, 2, "9 experts"),
    ],
)
def test_what_does_not_divide_is_refused(changes, size, what):
    model = Model(config_of(BASE, **changes))
    before = model.parameter_shapes()
    mode = "expert" if "num_experts" in changes else "tensor"
    with pytest.raises(ValueError, match=f"^{what} cannot be divided among {size} ranks$"):
        divide(model, Ranks(0, size), mode)
    assert model.parameter_shapes() == before


@pytest.mark.parametrize("r", [0, 1])
def test_half_a_quantization_group_is_refused_by_name(path_of, r):
    said = (
        r"model\.layers\.\d\.mlp\.switch_mlp\.down_proj cannot be divided among 2 ranks: "
        r"16 of its 32 inputs for each would cut through its quantization groups or words of 32$"
    )
    with pytest.raises(ValueError, match=said):
        load_model(path_of("quantized"), group=Ranks(r, 2), mode="tensor")


def test_without_a_mode_experts_are_divided_where_their_channels_cannot_be(path_of):
    demo = load_model(pack=False)
    assert [plan(demo, Ranks(0, size)).mode for size in (2, 4)] == ["tensor", "expert"]
    quantized = load_model(path_of("quantized"), pack=False)
    assert plan(quantized, Ranks(0, 2)).mode == "expert"
    assert plan(load_model(BASE, pack=False), Ranks(0, 4)).mode == "tensor"


def test_a_packed_model_is_not_divided():
    with pytest.raises(ValueError, match=r"packed for inference; load it with pack=False to shard"):
        divide(load_model(BASE), Ranks(0, 2))


# --- pipelines -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "shares", "counts"),
    [
        (48, [1, 1], [24, 24]),
        (48, [64e9, 128e9], [16, 32]),
        (48, [192e9, 64e9, 36e9], [32, 10, 6]),
        (4, [1e9, 1, 1], [2, 1, 1]),
        (4, [1, 0, 1e12], [1, 1, 2]),
        (3, [1, 5, 9], [1, 1, 1]),
        (7, [3], [7]),
    ],
)
def test_layers_are_split_by_memory(layers, shares, counts):
    ranges = split_layers(layers, shares)
    assert [len(own) for own in ranges] == counts
    assert [i for own in ranges for i in own] == list(range(layers))


def test_more_ranks_than_layers_are_refused():
    with pytest.raises(ValueError, match=r"^4 layers cannot be divided among 5 ranks$"):
        split_layers(4, [1] * 5)
    with pytest.raises(ValueError, match=r"^4 layers cannot be divided among 5 ranks$"):
        divide(Model(config_of(BASE)), Ranks(0, 5), "pipeline")


def test_each_rank_of_a_pipeline_has_its_layers_and_their_config():
    config = config_of(checkpoints.GOLDENS / "dense")  # 5 layers, some of them dense
    names = []
    for r in range(3):
        model = Model(config)
        mtp_head.attach(model)
        part = divide(model, Ranks(r, 3), "pipeline", [1, 3, 1])
        kinds = [(layer.is_linear, "switch_mlp" in layer.mlp) for layer in model.layers]
        own = model.args
        assert kinds == [(config.is_linear(i), config.is_sparse(i)) for i in part.layers]
        assert kinds == [(own.is_linear(i), own.is_sparse(i)) for i in range(own.num_hidden_layers)]
        names += [part.whole_path(path) for path in model.parameter_shapes() if ".layers" in path]
    whole = Model(config)
    mtp_head.attach(whole)
    layers = [path for path in whole.parameter_shapes() if ".layers" in path]
    trunk = [path for path in names if path.startswith("model.")]
    assert sorted(trunk) == sorted(path for path in layers if path.startswith("model."))
    assert Counter(names) - Counter(trunk) == Counter(3 * [p for p in layers if p[:3] == "mtp"])


@pytest.mark.parametrize("counts", [[4], [2, 1], [2, 3], [4, 0], [5, -1], [1, 1, 2], []])
def test_wrong_counts_of_layers_are_refused(counts):
    said = rf"^--pipeline {','.join(map(str, counts))} must give each of 2 ranks a layer or more, 4"
    with pytest.raises(ValueError, match=said):
        divide(Model(config_of(BASE)), Ranks(1, 2), "pipeline", counts)


# --- running -------------------------------------------------------------------------------------

PLAIN, DRAFTS, CHANCE = ("off", 0.0), (3, 0.0), (3, 0.9)
OTHER_WISHES = ("auto", 0.0)  # each rank would draft to other depths


def case(model, mode, *kinds, pack=True, layers=None, prompt, tokens=6):
    numbers = np.random.default_rng(prompt)
    return {
        "name": f"{model}-{mode}-{pack}",
        "model": model,
        "mode": mode,
        "layers": layers,
        "pack": pack,
        "prompt": numbers.integers(0, 80, prompt).tolist(),
        "tokens": tokens,
        "kinds": kinds or [PLAIN],
        "traffic": [1, 3] if sys.platform == "linux" else [],  # rows
    }


FEW = {"prompt": 8, "tokens": 5}
TWO = [
    case("demo", "tensor", PLAIN, DRAFTS, CHANCE, OTHER_WISHES, prompt=12),
    case("demo", "expert", PLAIN, DRAFTS, **FEW),
    case("demo", "pipeline", PLAIN, DRAFTS, CHANCE, OTHER_WISHES, **FEW, layers=[3, 1]),
    case("base", "tensor", PLAIN, DRAFTS, prompt=20),
    case("base", "tensor", **FEW, pack=False),
    case("base", "expert", PLAIN, DRAFTS, **FEW),
    case("base", "pipeline", PLAIN, DRAFTS, **FEW, layers=[1, 3]),
    case("dense", "tensor", PLAIN, DRAFTS, **FEW),
    case("dense", "expert", PLAIN, DRAFTS, **FEW, pack=False),
    case("permutation", "tensor", **FEW),
    case("quantized", "expert", **FEW, pack=False),
    case("eps", "pipeline", PLAIN, DRAFTS, **FEW, layers=[4, 2]),
]
FOUR = [
    case("wide", "tensor", PLAIN, DRAFTS, **FEW),
    case("base", "tensor", PLAIN, DRAFTS, **FEW),
    case("base", "pipeline", PLAIN, DRAFTS, **FEW, layers=[1, 1, 1, 1]),
    case("demo", "expert", PLAIN, DRAFTS, **FEW),
    case("quantized", "expert", PLAIN, **FEW, pack=False),
]


OF_ONE = "model", "pack", "prompt", "tokens", "kinds"  # what a case is without its division


@functools.cache
def by_one(case):
    """The results of all cases that differ in their division alone, given as JSON."""
    return rank.run(json.loads(case))


whole_model = functools.cache(functools.partial(load_model, dtype=mx.float32, pack=False))


@pytest.mark.parametrize(("size", "cases"), [(2, TWO), (4, FOUR)])
def test_together_they_compute_what_one_does(tmp_path, path_of, size, cases):
    cases = [
        case | {"name": str(number), "model": path_of(case["model"]), "called": case["name"]}
        for number, case in enumerate(cases)
    ]
    reports = results(tmp_path, size, cases)
    accepted = 0  # drafts
    for case in cases:
        of_ranks = [report[case["name"]] for report in reports]
        logits = [np.load(tmp_path / f"{case['name']}-{r}.npy") for r in range(size)]
        alone, expected = by_one(json.dumps({name: case[name] for name in OF_ONE}))
        called = f"{case['called']} {size}"

        for of_rank in logits:
            assert np.abs(of_rank - expected).max() <= 1e-5 * np.abs(expected).max(), called
            # In a pipeline each rank multiplies by the output matrix for itself.
            assert case["mode"] == "pipeline" or np.array_equal(of_rank, logits[0]), called
        assert [own["generated"] for own in of_ranks] == size * [alone["generated"]], called
        check_memory(case, of_ranks, alone, called)
        config = Config.from_file(f"{case['model']}/config.json")
        for i, rows in enumerate(case["traffic"]):
            sent = sent_a_step(config, size, case["mode"], itemsize=4, rows=rows)
            assert [own["sent"][i] for own in of_ranks] == sent, called
        accepted += sum(map(sum, (drafts for _, drafts in alone["generated"])))
    assert accepted > 0


def check_memory(case, of_ranks, alone, called):
    """Checks a rank's memory: its share of the divided parameters, and those all ranks have."""
    size, mode = len(of_ranks), case["mode"]
    whole = whole_model(case["model"])
    for r, own in enumerate(of_ranks):
        expected = sum(
            value.nbytes * share(whole.args, path, r, size, mode, case["layers"])
            for path, value in checkpoints.parameters(whole).items()
        )
        expected += alone["memory"] - alone["parameters"]  # what MLX holds beside them
        assert abs(own["memory"] / expected - 1) < 0.1, (called, r)
        if not case["pack"]:  # while loading, too, no more than that; packing has copies
            assert own["peak"] < 1.1 * own["memory"], (called, r)


def share(config, path, rank, size, mode, layers):
    """The share of a parameter's elements that a rank has, from 0 to 1."""
    if mode == "pipeline":
        layer = re.match(r"model\.layers\.(\d+)", path)
        before = sum(layers[:rank])
        return 1 if layer is None else before <= int(layer[1]) < before + layers[rank]
    if mode == "expert" and ".shared_expert" in path:
        return rank == 0
    if re.search(r"in_proj_qkvz|conv1d", path):
        keys, values = 2 * config.linear_key_dim, config.linear_value_dim
        values *= 2 if "qkvz" in path else 1
        of_keys = min(size, config.linear_num_key_heads)
        return (keys / of_keys + values / size) / (keys + values)
    return times(config, path, size, mode) / size


def test_a_model_that_was_loaded_whole_is_divided_in_place():
    model = load_model(BASE, dtype=mx.float32, pack=False)
    group = Ranks(1, 2)
    shard(model, group, plan(model, group, "tensor"))
    assert model.group is group and model.model.first_token == 48
    assert model.model.embed_tokens.weight.shape == (48, 64)
    mixers = [layer.linear_attn for layer in model.layers if layer.is_linear]
    assert {(mixer.Hk, mixer.Hv) for mixer in mixers} == {(1, 2)}
