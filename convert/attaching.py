"""``--attach-mtp``: putting a source's MTP head beside a model that was converted without it.

Only the weight files that hold ``mtp.*`` are fetched. Head and trunk of different checkpoints fit
each other's shapes, and a wrong pair drafts badly without failing; so the configs must agree, and
some small tensors of the source's trunk (read by range requests) must equal those of the model's.
With ``--any-trunk`` the shapes alone must agree.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
from huggingface_hub import snapshot_download

from mlx_qwen3next.checkpoint.files import MTP_FILE
from mlx_qwen3next.checkpoint.heads import check_fit
from mlx_qwen3next.checkpoint.hub import hub_errors, local_directory
from mlx_qwen3next.model import layouts
from mlx_qwen3next.model.config import Config
from mlx_qwen3next.model.qwen3_next import Model

from .plan import Conversion, plan_conversion
from .quantize import MTP_BITS, UNQUANTIZED
from .source import Source

EFFECT = "drafts are less often right than with the head's own trunk, the text stays the same"

# The config's fields that may differ between two checkpoints of one model.
_MAY_DIFFER = {"quantization", "max_position_embeddings", "rope_scaling"}


def find_model(path_or_repo: str | Path) -> Path:
    """The folder of a converted model: a local one, or a repository's in the hub's cache.

    Raises:
        ValueError: there is no such folder.
    """
    directory = local_directory(path_or_repo)
    if directory is not None:
        return directory
    with hub_errors(str(path_or_repo)):
        return Path(snapshot_download(str(path_or_repo), local_files_only=True))


def plan_head(
    source: Source,
    model: Path,
    dtype: mx.Dtype | None,
    mtp_bits: int | None,
    any_trunk: bool = False,
) -> Conversion:
    """The conversion of the head alone, after checking that it belongs to the model.

    Args:
        any_trunk: whether it may belong to another model of the same shapes.

    Raises:
        ValueError: it does not belong to it, or there is no head, or the model has one already.
    """
    if not source.has_head:
        raise ValueError(f"{source.name} has no MTP head (no tensor named mtp.*)")
    trunk = Source(model)
    if any(layouts.is_mtp(n) and t.file.name != MTP_FILE for n, t in trunk.tensors.items()):
        raise ValueError(f"{model} has an MTP head in its own shards")
    check_fit(source.head_config, trunk.config, source.name)
    if not any_trunk:
        _check_configs(source.head_config, trunk.config, source.name)
    if mtp_bits is None:
        mtp_bits = MTP_BITS if trunk.is_quantized else UNQUANTIZED
    result = plan_conversion(source, dtype=dtype, trunk=False, mtp_bits=mtp_bits)
    if not any_trunk:
        _check_trunks(source, trunk)
    return result


def _check_configs(head: Config, trunk: Config, name: str) -> None:
    theirs, ours = head.to_dict(), trunk.to_dict()
    for key in sorted({*theirs, *ours} - _MAY_DIFFER):
        if theirs.get(key) != ours.get(key):
            difference = f"{key} is {theirs.get(key)!r} there, {ours.get(key)!r} here"
            raise _refusal(name, difference)


def _refusal(name: str, difference: str) -> ValueError:
    return ValueError(
        f"the head of {name} does not belong to this model: {difference}; --any-trunk attaches it "
        f"all the same: {EFFECT}"
    )


def _check_trunks(source: Source, trunk: Source) -> None:
    """Compares the final norm and the first and last layers' tensors that are never quantized."""
    config = trunk.config
    kinds = [config.is_linear(i) for i in range(config.num_hidden_layers)]
    layers = {kinds.index(True), len(kinds) - 1} if True in kinds else {0, len(kinds) - 1}
    prefixes = ("model.norm.", *(f"model.layers.{i}." for i in layers))
    shapes = {
        path: shape
        for path, shape in Model(config).parameter_shapes().items()
        if path.startswith(prefixes)
        and (layouts.is_float32(path) or path.endswith("conv1d.weight"))
    }
    theirs, ours = source.find_origins(shapes), trunk.find_origins(shapes)
    for path in shapes:
        a = theirs[path].build([source.peek(name) for name in theirs[path].names])
        b = ours[path].build([trunk.peek(name) for name in ours[path].names])
        # mlx-lm adds the norms' 1 in the source's dtype, before it casts to another.
        as_in_mlx_lm = a.astype(mx.bfloat16).astype(b.dtype)
        if not mx.array_equal(a.astype(b.dtype), b) and not mx.array_equal(as_in_mlx_lm, b):
            raise _refusal(source.name, f"{path} differs between the two trunks")
