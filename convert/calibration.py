"""Measuring what the bits of each part of a model do to its hidden state, on a text.

The text goes through the source's model in windows, one layer after the other. While a layer is in
memory, each of its units (:mod:`convert.units`) is quantized to every width in turn and run on the
layer's own inputs. The unit's error is the sum of squares of the difference in what the unit adds
to the hidden state, relative to the hidden state behind it. So channels and experts count as much
as the text makes them count. An expert that no token chose counts nothing; it gets the width of its
stack, since MLX gives all experts of a stack the same.

Memory holds one layer of the source, one quantized unit, and the hidden states. After each layer
those are saved, so that a measurement can go on after any stop.
"""

from __future__ import annotations

import hashlib
import json
import math
import sysconfig
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_attention_mask
from tokenizers import Tokenizer
from tqdm import tqdm

from mlx_qwen3next.checkpoint.loading import default_dtype
from mlx_qwen3next.model.qwen3_next import DecoderLayer, RMSNorm, SparseMoE
from mlx_qwen3next.storage.replacing import replacing, write_text

from .layers import load_part, reader
from .plan import Conversion
from .progress import CALIBRATION, HIDDEN, PROGRESS_FILE, Progress
from .quantize import dequantize, quantize
from .units import Errors, Unit, Width

WINDOW = 512  # tokens
WINDOWS = 16  # at most
_TOGETHER = 4  # windows that run at a time
_LOGITS_STEP = 8  # of so many tokens one has its logits compared
_FEWEST = 64  # tokens
_NUMBERS = 2**22  # of a weight, rounded at a time
# The text where none is given.
_MODULES = ("argparse.py", "asyncio/base_events.py", "typing.py")
_PIECE = 2_000  # characters
_CHARACTERS = 30_000  # of prose, and of code

Run = Callable[[mx.array], mx.array]


def default_text() -> str:
    """English prose and code: Python's language reference and modules of its library, in turns."""
    prose = "\n".join(topics[name] for name in sorted(topics))
    library = Path(sysconfig.get_path("stdlib"))
    code = "\n".join((library / name).read_text(encoding="utf-8") for name in _MODULES)
    starts = range(0, min(len(prose), len(code), _CHARACTERS), _PIECE)
    return "\n\n".join(text[at : at + _PIECE] for at in starts for text in (prose, code))


def read_text(file: str) -> str:
    """The text of a file.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ValueError(f"--calibration {file} cannot be read: {reason}") from None


class Calibration:
    """The measurement of a conversion's units on a text.

    Attributes:
        identity: of the measurement, as JSON values.
        layers: of the model.
    """

    def __init__(self, conversion: Conversion, units: Sequence[Unit], text: str):
        self._conversion, self._units, self._text = conversion, units, text
        self._read = reader(conversion)
        self.layers = conversion.source.config.num_hidden_layers
        self.identity: dict[str, Any] = {
            "version": conversion.mark["version"],
            "contents": conversion.mark["contents"],
            "text": hashlib.sha256(text.encode()).hexdigest()[:16],
            "dtypes": [str(default_dtype()), str(conversion.dtype)],
            "units": [[unit.name, *map(list, unit.widths)] for unit in units],
        }

    @property
    def memory(self) -> int:
        """About the bytes that measuring takes: the largest layer, and as much for its copies."""
        layers: Counter[str] = Counter()
        for parameters in self._conversion.parameters.values():
            for p in parameters:
                layers[".".join(p.path.split(".")[:3])] += p.size * default_dtype().size
        return 2 * max(layers.values())

    def tokenize(self, name: str | None) -> mx.array:
        """The text's tokens in windows ``[N, L]``, from the text's beginning.

        Args:
            name: the text's, for messages.

        Raises:
            ValueError: the source has no tokenizer, or the text is too short.
        """
        file = self._conversion.source.directory / "tokenizer.json"
        if not file.exists():
            raise ValueError(
                f"{file} does not exist, which calibration needs; --calibration none does without"
            )
        tokens = Tokenizer.from_file(str(file)).encode(self._text).ids
        if len(tokens) < _FEWEST:
            raise ValueError(
                f"--calibration {name} has {len(tokens)} tokens; at least {_FEWEST} are needed, "
                f"and up to {WINDOW * WINDOWS} are used"
            )
        length = min(WINDOW, len(tokens))
        count = min(WINDOWS, len(tokens) // length)
        return mx.array(tokens[: count * length]).reshape(count, length)

    def find(self, folder: Path) -> Errors | None:
        """The errors that a folder keeps from the same measurement; None if there are none."""
        try:
            saved = json.loads((folder / CALIBRATION).read_text())
            return _from_json(saved["errors"]) if saved["task"] == self.identity else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def measure(self, tokens: mx.array, folder: Path, progress: Progress) -> Errors:
        """Measures the errors, or what is left of them, and keeps them in the folder.

        Args:
            tokens: windows of the text, ``[N, L]``.
            progress: of the measurement, in layers; the folder's.

        Raises:
            ValueError: the source cannot be read.
            OSError: the folder cannot be written.
        """
        done, x, errors = self._resume(folder, tokens)
        config = self._conversion.source.config
        with tqdm(desc="calibrating", total=self.layers, initial=done, unit="layer") as bar:
            for i in range(done, self.layers):
                x = self._measure_layer(i, x, errors)
                self._save(folder, i + 1, x, errors)
                progress.record(i + 1)
                bar.update()
        if not config.tie_word_embeddings:
            self._measure_output(x, errors)
        (folder / PROGRESS_FILE).unlink()  # the conversion has its own
        kept = {"task": self.identity, "errors": _to_json(errors)}
        write_text(folder / CALIBRATION, json.dumps(kept, indent=1) + "\n")
        (folder / HIDDEN).unlink()
        return errors

    # --- going on --------------------------------------------------------------------------------
    def _resume(self, folder: Path, tokens: mx.array) -> tuple[int, mx.array, Errors]:
        """The number of finished layers, the hidden states behind them, and the errors so far."""
        try:
            loaded: Any = mx.load(str(folder / HIDDEN), return_metadata=True)
            tensors, saved = loaded
            if saved["task"] == json.dumps(self.identity):
                return int(saved["done"]), tensors["x"], _from_json(json.loads(saved["errors"]))
        except (RuntimeError, ValueError, KeyError):  # there is none, or another
            pass
        errors: Errors = {}
        return 0, self._embed(tokens, errors), errors

    def _save(self, folder: Path, done: int, x: mx.array, errors: Errors) -> None:
        saved = {
            "task": json.dumps(self.identity),
            "done": str(done),
            "errors": json.dumps(_to_json(errors)),
        }
        with replacing(folder / HIDDEN, ".new.safetensors") as file:
            mx.save_safetensors(str(file), {"x": x}, saved)

    # --- measuring -------------------------------------------------------------------------------
    def _embed(self, tokens: mx.array, errors: Errors) -> mx.array:
        """The tokens' embeddings ``[N, L, H]``."""
        path = "model.embed_tokens"
        self._fetch(path)
        x = self._read(f"{path}.weight")[tokens]
        mx.eval(x)
        for unit in self._of(path):
            norm = _squares(x) or 1.0
            errors[unit.name] = {w: _squares(self._round(x, w) - x) / norm for w in unit.widths}
        return x

    def _measure_layer(self, i: int, x: mx.array, errors: Errors) -> mx.array:
        """Runs a layer on ``x`` and returns its output, both ``[N, L, H]``."""
        config, prefix = self._conversion.source.config, f"model.layers.{i}."
        self._fetch(prefix)
        linear = config.is_linear(i)
        layer = DecoderLayer(config, linear=linear, sparse=config.is_sparse(i))
        load_part(self._conversion, self._read, layer, prefix)
        mask = None if linear else create_attention_mask(x)

        def mix(x: mx.array) -> mx.array:
            return layer.mixer(layer.input_layernorm(x), mask)

        mixed = x + _in_parts(mix, x)
        y = layer.post_attention_layernorm(mixed)
        runs: list[tuple[str, Run, mx.array]] = [("linear_attn" if linear else "self_attn", mix, x)]
        if isinstance(layer.mlp, SparseMoE):
            runs += [("mlp.switch_mlp", _routed(layer.mlp), y)]
            runs += [("mlp.shared_expert", _shared(layer.mlp), y)]
        else:
            runs += [("mlp", layer.mlp, y)]
        behind = mixed + _in_parts(layer.mlp, y)
        modules = dict(layer.named_modules())
        for part, run, inputs in runs:
            stream = mixed if run is mix else behind
            plain = _in_parts(run, inputs)
            for unit in self._of(f"{prefix}{part}."):
                members = [modules[path.removeprefix(prefix)] for path in unit.paths]
                errors[unit.name] = self._errors(unit, members, run, inputs, plain, stream)
        return behind

    def _measure_output(self, x: mx.array, errors: Errors) -> None:
        """Measures the output matrix on the last layer's output ``[N, L, H]``."""
        config, path = self._conversion.source.config, "lm_head"
        self._fetch("model.norm", path)
        norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        x = load_part(self._conversion, self._read, norm, "model.norm.")(x[:, ::_LOGITS_STEP])
        weight = self._read(f"{path}.weight")

        def logits(weight: mx.array) -> Run:
            # A constant added to all logits changes nothing.
            return lambda x: (y := x @ weight.T) - y.mean(axis=-1, keepdims=True)

        for unit in self._of(path):
            squares = sum(_squares(logits(weight)(part)) for part in x) or 1.0
            errors[unit.name] = {
                width: _distance(logits(weight), logits(self._round(weight, width)), x) / squares
                for width in unit.widths
            }

    def _errors(
        self,
        unit: Unit,
        modules: Sequence[nn.Module],
        run: Run,
        inputs: mx.array,
        plain: mx.array,
        stream: mx.array,
    ) -> dict[Width, float]:
        """The errors of a unit in memory: width -> squares of the noise relative to the stream's.

        Args:
            modules: the unit's.
            plain: what ``run`` gives for the inputs while they are whole.
        """
        whole, norm = [module.weight for module in modules], _squares(stream) or 1.0
        errors = {}
        for width in unit.widths:
            for module, weight in zip(modules, whole, strict=True):
                module.weight = self._round(weight, width)
                mx.eval(module.weight)
            errors[width] = _squares(_in_parts(run, inputs) - plain) / norm
        for module, weight in zip(modules, whole, strict=True):
            module.weight = weight
        return errors

    def _round(self, weight: mx.array, width: Width) -> mx.array:
        """The weight as it will be read from the conversion."""
        q = width.quantization
        step = max(1, _NUMBERS // math.prod(weight.shape[1:]))
        parts = []
        for first in range(0, weight.shape[0], step):
            rows = weight[first : first + step].astype(self._conversion.dtype)
            stored = quantize(rows, q, searched=True)
            parts.append(dequantize(stored, q).astype(weight.dtype))
            mx.eval(parts[-1])
        return mx.concatenate(parts)

    def _of(self, start: str) -> list[Unit]:
        """The units whose modules' paths begin so."""
        return [unit for unit in self._units if unit.paths[0].startswith(start)]

    def _fetch(self, *starts: str) -> None:
        """Makes sure that the files are there of the parameters whose paths begin so."""
        source = self._conversion.source
        for parameters in self._conversion.parameters.values():
            names = {n for p in parameters if p.path.startswith(starts) for n in p.origin.names}
            for file in sorted({file for name in names for file in source.files_of(name)}):
                source.fetch(file)


def _routed(mlp: SparseMoE) -> Run:
    """The part of the experts that the router chooses."""

    def run(x: mx.array) -> mx.array:
        experts, weights = mlp.route(x)
        y = mlp.switch_mlp(x, experts)
        return (y * weights[..., None].astype(y.dtype)).sum(axis=-2)

    return run


def _shared(mlp: SparseMoE) -> Run:
    """The part of the shared expert."""
    return lambda x: mx.sigmoid(mlp.shared_expert_gate(x)) * mlp.shared_expert(x)


def _in_parts(run: Run, x: mx.array) -> mx.array:
    """``run(x)``, some windows at a time, evaluated."""
    results = []
    for first in range(0, x.shape[0], _TOGETHER):
        results.append(run(x[first : first + _TOGETHER]))
        mx.eval(results)
    return mx.concatenate(results)


def _squares(x: mx.array) -> float:
    return mx.square(x.astype(mx.float32)).sum().item()  # type: ignore[return-value]


def _distance(a: Run, b: Run, x: mx.array) -> float:
    """The sum of squares of the difference of two functions, a window at a time."""
    return sum(_squares(b(part) - a(part)) for part in x)


def _to_json(errors: Errors) -> dict[str, list[list[float]]]:
    return {name: [[*width, error] for width, error in of.items()] for name, of in errors.items()}


def _from_json(saved: dict[str, list[list[Any]]]) -> Errors:
    return {name: {Width(b, g): float(e) for b, g, e in rows} for name, rows in saved.items()}
