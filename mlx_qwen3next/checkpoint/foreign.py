"""Quantized forms of other libraries, which are recognised in order to be refused.

Tensors decide: a config may name a quantization although the weights beside it are whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..model.config import read_json
from ..storage.safetensors import Tensor
from .match import FLOATS

# The last part of a tensor's name -> the forms that have such tensors, by their quant_method in a
# config. The first of these parts that a checkpoint has decides.
_FORMS = {
    "g_idx": ("GPTQ",),
    "qweight": ("AWQ", "GPTQ", "auto-round"),
    "qzeros": ("AWQ", "GPTQ", "auto-round"),
    "weight_packed": ("compressed-tensors",),
    "weight_scale_2": ("modelopt",),
    "absmax": ("bitsandbytes",),
    "quant_map": ("bitsandbytes",),
    "bitsandbytes__nf4": ("bitsandbytes",),
    "bitsandbytes__fp4": ("bitsandbytes",),
    "SCB": ("bitsandbytes",),  # in 8 bits
    "weight_scale": ("compressed-tensors", "modelopt", "fbgemm_fp8", "quark"),
    "input_scale": ("compressed-tensors", "modelopt", "fbgemm_fp8", "quark"),
}
_FP8, _FACTORS = "F8_E4M3", "_scale_inv"
_CONVERT_FIRST = (
    "is FP8, which is not loaded directly; convert it first: "
    "python -m mlx_qwen3next.convert --hf-path …"
)


def find_fp8(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of a weight in FP8 with a factor for every block; None if there is none."""
    stored = (name for name, tensor in tensors.items() if tensor.dtype == _FP8)
    return next((name for name in stored if name + _FACTORS in tensors), None)


def refuse_fp8(tensors: Mapping[str, Tensor]) -> None:
    """Checks that no weight is FP8, which the converter alone reads.

    Raises:
        ValueError: one is.
    """
    if name := find_fp8(tensors):
        raise ValueError(f"{tensors[name].file}: {name} {_CONVERT_FIRST}")


def refuse_foreign(tensors: Mapping[str, Tensor], directory: Path) -> None:
    """Checks that no weight is in the form of another library, FP8 in blocks excepted.

    Args:
        tensors: the checkpoint's, by name.
        directory: the checkpoint's; its config is read where tensors leave the form open.

    Raises:
        ValueError: one is; the message names the form and a tensor that shows it.
    """
    name, forms = _find_foreign(tensors)
    if name is None and find_fp8(tensors) is None:
        name = next((name for name in tensors if not _is_known(name, tensors)), None)
    if name is None:
        return
    method = _method(read_json(directory / "config.json"))
    if forms or method:
        raise ValueError(_message(f"{tensors[name].file}: {name}", forms, method))


def refuse_unloadable_names(repo: str, names: Iterable[str], config: Mapping[str, Any]) -> None:
    """Checks as far as names show it that a repository can be loaded, before it is fetched.

    Args:
        repo: for the message.
        names: its tensors'.
        config: the content of its config.json.

    Raises:
        ValueError: its weights are FP8 or in the form of another library.
    """
    names, method = list(names), _method(config)
    name, forms = _find_foreign(names)
    if name is not None:
        raise ValueError(_message(f"{repo}: {name}", forms, method))
    factors = next((name for name in names if name.endswith(_FACTORS)), None)
    if factors is not None and method == "fp8":
        raise ValueError(f"{repo}: {factors.removesuffix(_FACTORS)} {_CONVERT_FIRST}")


def _find_foreign(names: Iterable[str]) -> tuple[str | None, tuple[str, ...]]:
    """The name of a tensor that shows a form of :data:`_FORMS`, and the forms that have it."""
    examples = {name.rpartition(".")[2]: name for name in names}
    for part, forms in _FORMS.items():
        if part in examples:
            return examples[part], forms
    return None, ()


def _is_known(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a tensor is floating point, or a part of a module in MLX's quantized form."""
    return tensors[name].dtype in FLOATS or f"{name.rpartition('.')[0]}.scales" in tensors


def _method(config: Mapping[str, Any]) -> str | None:
    """The method that a config's ``quantization_config`` names, or None."""
    quantization = config.get("quantization_config")
    if isinstance(quantization, Mapping):
        quantization = quantization.get("quant_method")
    return quantization if isinstance(quantization, str) else None


def _message(where: str, forms: tuple[str, ...], method: str | None) -> str:
    """The refusal of a form: the one among ``forms`` that ``method`` names, where several are."""
    named = [form for form in forms if form.lower() == str(method).lower()]
    form = " or ".join(named or forms) or method
    return (
        f"{where} is in the quantized form of {form}, which can be neither loaded nor converted "
        "here; use the unquantized repository or a conversion for MLX"
    )
