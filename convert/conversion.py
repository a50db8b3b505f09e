"""The converter as a function: what ``python -m mlx_qwen3next.convert`` does."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from mlx_qwen3next import checkpoint, shards

from . import attaching, package, report, weights
from .plan import DTYPES, Plan, make_plan
from .progress import FILE, PARTIAL, STREAMED, Progress
from .quantize import Predicate, base_quantization
from .source import Repository, open_source
from .verify import verify as compare
from .weights import File, Piece


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
    stream: bool = False,
    dry_run: bool = False,
    verify: bool = False,
) -> None:
    """Converts a Qwen3-Next checkpoint to MLX, its MTP head included.

    The arguments up to ``trust_remote_code`` (nothing here needs it) are mlx_lm.convert's. A
    conversion that was stopped goes on when it is called again with the same arguments.

    Args:
        hf_path: a local directory or a hub repository, in any layout, FP8 included.
        mlx_path: the folder to make; with ``attach_mtp``, the converted model to add the head to.
        q_group_size, q_bits, q_mode: of the quantization, if ``quantize``; None for the mode's own.
        dtype: of what stays floating point; None for what the source's config says.
        quant_predicate: a mixed recipe's name or a function (path, module) -> bool or dict.
        mtp: "keep" or "drop" the MTP head.
        mtp_bits: of the head; None for the default beside a quantized trunk, else unquantized.
        attach_mtp: convert the head alone and put it beside the model at ``mlx_path``.
        stream: keep a repository's weight files only as long as they are needed.
        dry_run: print what would be done, and do nothing.
        verify: read the result again and compare it with the source.

    Raises:
        ValueError: an argument or the source is not usable, or the result would not fit on disk.
    """
    if quantize and dequantize:
        raise ValueError("choose either -q (--quantize) or -d (--dequantize)")
    base = base_quantization(q_mode, q_bits, q_group_size) if quantize else None
    if not quantize and (q_bits or q_group_size or q_mode != "affine"):
        raise ValueError("--q-bits, --q-group-size and --q-mode need -q (--quantize)")
    if attach_mtp and (quantize or dequantize or quant_predicate or mtp == "drop"):
        raise ValueError(
            "--attach-mtp converts the head alone: of all bits only --mtp-bits applies"
        )
    if upload_repo is not None and not dry_run:
        package.check_upload()

    target = attaching.find_model(mlx_path) if attach_mtp else Path(mlx_path).expanduser()
    partial = attaching.work_folder(target) if attach_mtp else _beside(target)
    source = open_source(hf_path, revision, streamed=partial / STREAMED if stream else None)
    if stream and not isinstance(source, Repository):
        raise ValueError(f"--stream is for hub repositories; {hf_path} is read in place")
    if source.is_quantized and not dequantize:
        raise ValueError(f"{hf_path} is quantized already; -d (--dequantize) makes it whole")
    if dequantize and not source.is_quantized:
        raise ValueError(f"{hf_path} is not quantized: there is nothing to dequantize")
    if attach_mtp:
        plan = attaching.plan(source, target, DTYPES.get(dtype or ""), mtp_bits)
    else:
        plan = make_plan(
            source,
            dtype=DTYPES.get(dtype or ""),
            base=base,
            predicate=quant_predicate,
            head=mtp == "keep",
            mtp_bits=mtp_bits,
        )

    files = plan.files(partial)
    work = weights.pieces(files, source)
    if dry_run:
        print(report.describe(plan, files, work))
        return
    result = target / shards.HEAD if attach_mtp else target
    if _mark(result) == plan.mark:
        _say(f"{result} is there already, made from the same source in the same way")
    elif result.exists() and (attach_mtp or any(result.iterdir())):
        raise ValueError(f"{result} exists already; move it away or choose another --mlx-path")
    else:
        report.check_disk(partial, report.disk_needed(plan, files, work))
        with Progress(partial, plan.mark) as progress:
            _write(plan, files, work, progress)
            if attach_mtp:
                os.replace(partial / shards.HEAD, result)
            else:
                package.complete(plan, files, partial, upload_repo or target.name)
                shutil.rmtree(partial / STREAMED, ignore_errors=True)
                os.rename(partial, target)
        _say(f"{result}: {plan.bits_per_weight:.3f} bits per weight")
    # What is left of a run that was stopped at its very end goes, too.
    (target / FILE).unlink(missing_ok=True)
    if (partial / FILE).exists():
        shutil.rmtree(partial)
    if verify:
        print(compare(plan, target))
    if upload_repo is not None:
        _say(f"uploaded to {package.upload(target, upload_repo)}")


def _beside(target: Path) -> Path:
    return target.with_name(target.name + PARTIAL)


def _mark(result: Path) -> Any:
    """What a converted model or head says of how it was made; None if it says nothing."""
    if result.is_dir():
        files = sorted(result.glob("model*.safetensors"))
        if not files:
            return None
        result = files[0]
    if not result.exists():
        return None
    return json.loads(shards.read_metadata(result).get(checkpoint.MARK, "null"))


def _write(plan: Plan, files: list[File], work: list[Piece], progress: Progress) -> None:
    try:
        weights.write(files, work, plan.source, progress)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted with {progress.done / len(work):.0%} done; the same command goes on from "
            f"there, deleting {progress.folder} gives it up"
        ) from None


def _say(text: str) -> None:
    print(text, file=sys.stderr)
