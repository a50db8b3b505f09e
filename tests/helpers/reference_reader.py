"""The safetensors library as the judge of the files that this project writes."""

import safetensors

from mlx_qwen3next.storage.safetensors import read_header


def assert_reads_the_same(file):
    """Checks that the library finds the names, dtypes, shapes, data and metadata that we find."""
    tensors, metadata = read_header(file)
    with safetensors.safe_open(file, framework="np") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        described = {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
        assert described == {name: (x.dtype, x.shape) for name, x in tensors.items()}
        assert opened.metadata() == metadata
    content = file.read_bytes()
    assert {name: bytes(x["data"]) for name, x in safetensors.deserialize(content)} == {
        name: content[x.start : x.start + x.nbytes] for name, x in tensors.items()
    }
