"""Where tensors lie in the files: at multiples of a page, as far as the format allows."""

import checkpoints
import configs
import mlx.core as mx
import numpy as np
import pytest
from checkpoints import GOLDENS
from reference_reader import assert_reads_the_same
from safetensors import safe_open

from mlx_qwen3next.convert import convert, weights
from mlx_qwen3next.convert.weights import Parameter
from mlx_qwen3next.model.config import Config
from mlx_qwen3next.model.qwen3_next import DecoderLayer
from mlx_qwen3next.storage.safetensors import read_header

PAGE = 16_384


def test_whole_pages_come_first_and_begin_at_pages(tmp_path, monkeypatch):
    """With small pages, of which tiny tensors can be multiples."""
    page = 512
    monkeypatch.setattr(weights, "_ALIGNMENT", page)
    convert(str(GOLDENS / "base"), str(tmp_path / "out"), quantize=True, q_group_size=32)
    for file in (tmp_path / "out").glob("*.safetensors"):
        tensors = sorted(read_header(file).tensors.values(), key=lambda tensor: tensor.start)
        whole = [tensor.nbytes % page == 0 for tensor in tensors]
        assert whole == sorted(whole, reverse=True) and tensors[0].start % page == 0
        assert all(t.start % page == 0 for t, w in zip(tensors, whole, strict=True) if w)
        assert_reads_the_same(file)
        with safe_open(file, "np") as reference:
            assert set(reference.keys()) == set(mx.load(str(file)))
    assert sum(whole) > 0 or file.name == "norms.safetensors"


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_each_expert_of_the_80b_model_begins_at_a_page(tmp_path, bits):
    config = Config.from_dict(configs.INSTRUCT)
    layer = DecoderLayer(config, linear=True, sparse=True)
    q = {"group_size": 64, "bits": bits, "mode": "affine"}
    parameters = [
        Parameter(path, array.shape, None, mx.bfloat16, q if "proj" in path else None)
        for path, array in checkpoints.parameters(layer).items()
    ]
    files = weights.lay_out({weights.TRUNK: parameters}, tmp_path, {"format": "mlx"})
    experts = [t for f in files for name, t in f.places.items() if "switch_mlp" in name]
    assert len(experts) == 9
    for tensor in experts:
        each = np.arange(512) * (tensor.nbytes // 512) + tensor.start
        assert not (each % PAGE).any()
