"""The converter as a function, which ``python -m mlx_qwen3next.convert`` calls."""

from __future__ import annotations

import functools
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path

from mlx_qwen3next.checkpoint.files import MTP_FILE
from mlx_qwen3next.storage.replacing import PARTIAL

from . import attaching, package, report, weights
from . import fit as fitting
from .drafter import convert_drafter, is_drafter
from .plan import DTYPES, Conversion, plan_conversion
from .progress import HIDDEN, PROGRESS_FILE, STREAMED, Progress, saying_how_to_go_on
from .quantize import DEFAULTS, HEAD_BITS, Predicate, base_quantization
from .repository import Repository, open_source
from .verify import verify as compare


def convert(
    hf_path: str,
    mlx_path: str = "mlx_model",
    quantize: bool = False,
    q_group_size: int | None = None,
    q_bits: int | None = None,
    q_mode: str = "affine",
    dtype: str | None = None,
    upload_repo: str | None = None,
    revision: str | None = None,
    dequantize: bool = False,
    quant_predicate: str | Predicate | None = None,
    trust_remote_code: bool = False,
    mtp: str = "keep",
    mtp_bits: int | None = None,
    attach_mtp: bool = False,
    any_trunk: bool = False,
    fit: float | None = None,
    calibration: str | None = None,
    stream: bool = False,
    dry_run: bool = False,
    verify: bool = False,
) -> None:
    """Converts a Qwen3-Next checkpoint to MLX, its MTP head included.

    The arguments up to ``trust_remote_code`` (nothing here needs it) are mlx_lm.convert's. A
    conversion that was stopped goes on when this is called again with the same arguments.

    Args:
        hf_path: a local directory or a hub repository, in any layout, FP8 included.
        mlx_path: the folder to make; with ``attach_mtp``, the converted model to add the head to.
        q_group_size, q_bits, q_mode: the quantization, if ``quantize``; None for the mode's own.
        dtype: of the tensors that stay floating point; None for the one in the source's config.
        quant_predicate: a mixed recipe's name or a function (path, module) -> bool or dict.
        mtp: "keep" or "drop" the MTP head.
        mtp_bits: bits of the head; None for the default beside a quantized trunk, else
            unquantized.
        attach_mtp: convert the head alone and put it beside the model at ``mlx_path``.
        any_trunk: with ``attach_mtp``, take the head of another model of the same shapes, too.
        fit: the memory of a Mac in GB that the model is to stay in as a whole; it chooses the bits
            of each part. Of the quantization ``q_group_size`` alone may be given.
        calibration: with ``fit``, the file of the text that errors are measured on; None for the
            text that is there, "none" for expected errors.
        stream: keep a repository's weight files only as long as they are needed.
        dry_run: print sizes and needs, and do nothing.
        verify: read the result again and compare it with the source.

    Raises:
        ValueError: an argument or the source is not usable, or the result cannot be written.
    """
    _check_choices(q_mode=q_mode, dtype=dtype, mtp=mtp, mtp_bits=mtp_bits)
    if fit is None:
        if calibration is not None:
            raise ValueError("--calibration needs --fit")
    else:
        if not 0 < fit < float("inf"):
            raise ValueError(f"--fit must be a number of GB, got {fit:g}")
        if stream and calibration != fitting.NO_TEXT:
            raise ValueError(
                "calibration reads the source before it is converted: with --stream, "
                "--calibration none is needed"
            )
        if q_bits or dequantize or quant_predicate or attach_mtp or q_mode != "affine":
            raise ValueError(
                "--fit chooses the bits itself: --q-bits, --q-mode, --quant-predicate, -d and "
                "--attach-mtp do not go with it"
            )
        quantize = True
    if quantize and dequantize:
        raise ValueError("choose either -q (--quantize) or -d (--dequantize)")
    if not quantize and (q_bits, q_group_size, q_mode) != (None, None, "affine"):
        raise ValueError("--q-bits, --q-group-size and --q-mode need -q (--quantize)")
    if attach_mtp and (quantize or dequantize or quant_predicate or mtp == "drop"):
        raise ValueError(
            "--attach-mtp converts the head alone: of all bits only --mtp-bits applies"
        )
    if any_trunk and not attach_mtp:
        raise ValueError("--any-trunk needs --attach-mtp")
    base = base_quantization(q_mode, q_bits, q_group_size) if quantize else None
    if upload_repo is not None and not dry_run:
        package.check_upload()

    if not attach_mtp and is_drafter(hf_path, revision):
        _refuse_for_drafter(
            upload_repo=upload_repo,
            dequantize=dequantize,
            quant_predicate=quant_predicate,
            mtp_bits=mtp_bits,
            fit=fit,
            stream=stream,
            dry_run=dry_run,
            verify=verify,
        )
        target = _target(mlx_path)
        partial = target.with_name(target.name + PARTIAL)
        for folder in (target, partial):
            if folder.exists():
                raise ValueError(
                    f"{folder} exists already; move it away or choose another --mlx-path"
                )
        convert_drafter(hf_path, revision, target, partial, DTYPES.get(dtype or ""), base)
        _say(f"{target}: a DFlash drafter, for --draft-model")
        return

    recipe: list[str] = []
    target = attaching.find_model(mlx_path) if attach_mtp else _target(mlx_path)
    result = target / MTP_FILE if attach_mtp else target
    partial = result.with_name(result.name + PARTIAL)
    source = open_source(hf_path, revision, streamed=partial / STREAMED if stream else None)
    if stream and not isinstance(source, Repository):
        raise ValueError(f"--stream is for hub repositories; {hf_path} is read in place")
    if source.is_quantized and not dequantize:
        raise ValueError(f"{hf_path} is quantized already; -d (--dequantize) makes it whole")
    if dequantize and not source.is_quantized:
        raise ValueError(f"{hf_path} is not quantized: there is nothing to dequantize")
    if attach_mtp:
        chosen_dtype = DTYPES.get(dtype or "")
        conversion = attaching.plan_head(source, target, chosen_dtype, mtp_bits, any_trunk)
        if any_trunk:
            _say(f"not checking that the head belongs to this model; if not, {attaching.EFFECT}")
    else:
        _keep_apart(source.directory.resolve(), target, partial)
        plan = functools.partial(
            plan_conversion,
            source,
            dtype=DTYPES.get(dtype or ""),
            head=mtp == "keep",
            mtp_bits=mtp_bits,
        )
        if fit is None:
            conversion = plan(base=base, predicate=quant_predicate)
        else:
            group_size = q_group_size or DEFAULTS["affine"][0]
            conversion, recipe = fitting.fit(
                *(plan, fit, group_size, calibration, target, partial), measured=not dry_run
            )
    if dry_run:
        files = conversion.files(partial)
        print(report.describe(conversion, files, weights.chunks(files, source), recipe))
        return

    if all(weights.is_laid_out(file) for file in conversion.files(target)):
        _say(f"{result} is there already, made from the same source in the same way")
    elif result.exists() and (attach_mtp or any(result.iterdir())):
        raise ValueError(f"{result} exists already; move it away or choose another --mlx-path")
    else:
        _make(conversion, partial, result, title=upload_repo or target.name)
    # A run that was stopped at its very end may have left its progress.
    if not attach_mtp:
        (target / PROGRESS_FILE).unlink(missing_ok=True)
    elif (partial / PROGRESS_FILE).exists():
        shutil.rmtree(partial)
    if verify:
        print(compare(conversion, target))
        shutil.rmtree(partial, ignore_errors=True)  # files that were streamed once more
    if upload_repo is not None:
        _say(f"uploaded to {package.upload(target, upload_repo)}")


def _make(conversion: Conversion, partial: Path, result: Path, title: str) -> None:
    """Makes a folder, or the head's file, beside its place and moves it there.

    Args:
        partial: the folder to work in.
        title: the model's name on its card.
    """
    files = conversion.files(partial)
    work = weights.chunks(files, conversion.source)
    report.check_disk(partial, conversion, files, work)
    # A count of finished chunks means nothing for another division into chunks.
    task = {**conversion.mark, "pieces": len(work)}
    with Progress(partial, task) as progress, saying_how_to_go_on(progress, len(work)):
        weights.write(files, work, conversion.source, progress)
        if result.name == MTP_FILE:
            os.replace(partial / MTP_FILE, result)
        else:
            package.complete(conversion, files, partial, title)
            shutil.rmtree(partial / STREAMED, ignore_errors=True)
            (partial / HIDDEN).unlink(missing_ok=True)
            os.rename(partial, result)
    _say(f"{result}: {conversion.bits_per_weight:.3f} bits per weight")


def _check_choices(**arguments: object) -> None:
    choices: dict[str, tuple[object, ...]] = {
        "q_mode": tuple(DEFAULTS),
        "dtype": (None, *DTYPES),
        "mtp": ("keep", "drop"),
        "mtp_bits": (None, *HEAD_BITS),
    }
    for name, value in arguments.items():
        if value not in choices[name]:
            known = ", ".join(map(str, choices[name]))
            raise ValueError(f"{name} must be one of {known}, got {value!r}")


def _refuse_for_drafter(**arguments: object) -> None:
    for name, value in arguments.items():
        if value:
            raise ValueError(
                f"--{name.replace('_', '-')} is not for a DFlash drafter, which is written at once "
                "with -q, --q-bits, --q-group-size, --q-mode and --dtype"
            )


def _keep_apart(source: Path, target: Path, partial: Path) -> None:
    if {target, partial} & {source, *source.parents} or source in target.parents:
        raise ValueError(
            f"{target} and the source must not contain each other; choose another --mlx-path"
        )


def _target(mlx_path: str | Path) -> Path:
    """The folder to make. Links are followed, for the folder comes into place by a rename.

    Raises:
        ValueError: no folder can be there.
    """
    try:
        target = Path(mlx_path).expanduser().resolve()
        with suppress(FileNotFoundError):
            os.listdir(target)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"--mlx-path {mlx_path} is no usable folder: {error}") from None
    return target


def _say(text: str) -> None:
    print(text, file=sys.stderr)
