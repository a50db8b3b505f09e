"""Bits per byte of held-out text, and the share of the MTP head's drafts that the trunk accepts."""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from modeling import Qwen3Next
from torch import Tensor
from tqdm import tqdm

LENGTH, DEPTHS = 512, 3


@dataclass(frozen=True)
class Score:
    """The result of an evaluation."""

    bits_per_byte: float
    accepted: list[float]  # by depth: the share of drafts accepted, if all before them were

    def __str__(self) -> str:
        shares = " ".join(f"{share:.3f}" for share in self.accepted)
        return f"held-out bits/byte {self.bits_per_byte:.4f}  drafts accepted by depth {shares}"


def spans(offsets: list[int]) -> list[tuple[int, int, int]]:
    """Windows (first token, first scored position, end) that overlap by half.

    Each token is scored once, with at least LENGTH / 2 tokens of its document before it, or with
    all of them if there are fewer.
    """
    half, found = LENGTH // 2, []
    for start, end in itertools.pairwise(offsets):
        found.append((start, start, min(start + LENGTH, end - 1)))
        for scored in range(start + LENGTH, end - 1, half):
            found.append((scored - half, scored, min(scored + half, end - 1)))
    return found


def drafts(model: Qwen3Next, hidden: Tensor, window: Tensor, greedy: Tensor, scored: int):
    """The numbers of drafts (asked, right) by depth in one window ``[1, L + 1]``.

    A draft counts only if the text up to it is the trunk's own choice and the drafts before it were
    right, as in a round of greedy speculation.
    """
    length = hidden.shape[1] - DEPTHS
    asked, right = torch.zeros(DEPTHS), torch.zeros(DEPTHS)
    if length <= scored:
        return asked, right
    states, _ = model.drafts(hidden[:, :length], window, DEPTHS)
    alive = torch.ones(length - scored, dtype=torch.bool)
    for depth, state in enumerate(states, 1):
        draft = model.lm_head(state)[0, scored:].argmax(-1)
        read = window[0, scored + depth : length + depth]
        alive &= greedy[scored + depth - 1 : length + depth - 1] == read
        asked[depth - 1] = alive.sum()
        alive &= draft == greedy[scored + depth : length + depth]
        right[depth - 1] = alive.sum()
    return asked, right


@torch.no_grad()
def evaluate(model: Qwen3Next, path: Path, windows: int | None = None) -> Score:
    """Scores the documents of ``path`` (heldout.npz), or ``windows`` evenly spaced windows."""
    stored = np.load(path)
    tokens = torch.from_numpy(stored["tokens"].astype(np.int64))
    every = spans(stored["offsets"].tolist())
    chosen = every
    if windows and windows < len(every):
        chosen = [every[i * len(every) // windows] for i in range(windows)]
    nats, asked, right = 0.0, torch.zeros(DEPTHS), torch.zeros(DEPTHS)
    for start, first, end in tqdm(chosen, desc="held-out", leave=False, disable=None):
        window, scored = tokens[None, start : end + 1], first - start
        with torch.autocast("cpu", torch.bfloat16):
            hidden, _ = model.model(window[:, :-1])
            logits = model.lm_head(hidden)[0].float()
            counts = drafts(model, hidden, window, logits.argmax(-1), scored)
        nats += F.cross_entropy(logits[scored:], window[0, scored + 1 :], reduction="sum").item()
        asked, right = asked + counts[0], right + counts[1]
    share = sum(end - first for _, first, end in chosen) / sum(e - f for _, f, e in every)
    bits = nats / math.log(2) / (stored["bytes"].sum() * share)
    return Score(float(bits), (right / asked.clamp(min=1)).tolist())
