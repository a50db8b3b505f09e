"""Trains the demo model: a true Qwen3-Next of 12 million parameters, on a CPU, in about an hour.

One folder (--out) holds everything: the data and the tokenizer from data.py, checkpoint.pt,
train.log and, after training, hf/ with the model in the hub's layout. Run the same command again
after an interruption (Ctrl-C is safe): training continues from the last checkpoint.
"""

import argparse
import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path

import data
import numpy as np
import torch
from evaluate import evaluate
from export import export
from functions import LinearCrossEntropy
from modeling import Config, Qwen3Next
from optim import Optimizer
from torch import Tensor, multiprocessing
from tqdm import tqdm

LENGTH, BATCH = 512, 16  # tokens a window, windows a step
DRAFT_DEPTHS, DRAFT_SHARE = 3, 8  # the MTP head trains on one window of every eight
DRAFT_WEIGHT, BALANCE_WEIGHT = 0.3, 0.01
WARMUP = 0.02  # share of the time budget
LOG_SECONDS, SAVE_SECONDS, EVAL_SECONDS = 30, 180, 420
WAIT_SECONDS = 600  # for another process; after that it counts as dead


def keep_memory() -> None:
    """Makes glibc keep freed blocks: page faults of fresh ones cost a third of the speed."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def rate(progress: float) -> float:
    """The learning rate's factor at a share of the time budget: warm-up, then linear to zero."""
    return min(1, (progress + 1e-3) / WARMUP) * max(0, 1 - progress)


class Windows:
    """The training tokens as windows, with a new order of documents and windows in every epoch."""

    def __init__(self, path: Path, seed: int):
        stored = np.load(path)
        self.tokens, self.offsets, self.seed = stored["tokens"], stored["offsets"], seed
        self.span = LENGTH + DRAFT_DEPTHS + 1
        self.per_epoch = (len(self.tokens) - self.span) // LENGTH // BATCH  # steps
        self.epoch = -1

    def batch(self, step: int) -> Tensor:
        """The tokens ``[BATCH, LENGTH + DRAFT_DEPTHS + 1]`` of a step."""
        epoch, index = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            rng = np.random.default_rng((self.seed, epoch))
            order = rng.permutation(len(self.offsets) - 1)
            starts, ends = self.offsets[:-1], self.offsets[1:]
            self.stream = np.concatenate([self.tokens[starts[i] : ends[i]] for i in order])
            self.order = rng.permutation((len(self.stream) - self.span) // LENGTH) * LENGTH
            self.epoch = epoch
        starts = self.order[index * BATCH : (index + 1) * BATCH]
        return torch.from_numpy(np.stack([self.stream[s : s + self.span] for s in starts])).long()


def losses(model: Qwen3Next, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The cross-entropy of the trunk and of each MTP depth, and the routers' balance."""
    some = max(1, len(tokens) // DRAFT_SHARE)

    def entropy(hidden, ahead):
        targets = tokens[: len(hidden), ahead : ahead + LENGTH].flatten()
        return LinearCrossEntropy.apply(hidden.flatten(0, 1), model.lm_head.weight, targets)

    with torch.autocast("cpu", torch.bfloat16):
        hidden, balance = model.model(tokens[:, :LENGTH])
        drafts, more = model.drafts(hidden[:some], tokens[:some], DRAFT_DEPTHS)
        drafted = torch.stack([entropy(h, depth + 2) for depth, h in enumerate(drafts)])
        return entropy(hidden, 1), drafted, (balance + more) / 2


class Team:
    """Single-threaded processes that split each batch and each update, with shared memory.

    They are faster than one process with as many threads, and a busy machine slows them far less.
    """

    def __init__(self, model: Qwen3Next, optimizer: Optimizer, data: Path, seed: int, size: int):
        self.model, self.optimizer, self.size = model, optimizer, size
        self.data, self.seed = data, seed
        self.shares = optimizer.shares(size)
        moments = [*optimizer.first.values(), *optimizer.second.values()]
        for tensor in [*model.parameters(), *moments]:
            tensor.share_memory_()
        self.grads = torch.zeros(size, sum(p.numel() for p in model.parameters())).share_memory_()
        self.values = torch.zeros(size, DRAFT_DEPTHS + 2).share_memory_()  # the losses
        self.order = torch.zeros(2, dtype=torch.float64).share_memory_()  # step (-1: stop), rate
        self.context = multiprocessing.get_context("spawn")
        self.barrier = self.context.Barrier(size)
        self.others = []

    def __enter__(self):
        others = [
            self.context.Process(target=self.follow, args=(rank,), daemon=True)
            for rank in range(1, self.size)
        ]
        for process in others:
            process.start()
        self.others = others
        self.prepare(0)
        return self

    def __exit__(self, kind, value, traceback):
        self.order[0] = -1
        if kind is None:
            self.wait()
        for process in self.others:
            process.join(10) if kind is None else process.terminate()

    def wait(self) -> None:
        """Waits for all processes; exits if one of them died."""
        try:
            self.barrier.wait(WAIT_SECONDS)
        except threading.BrokenBarrierError:
            sys.exit("a training process died: run again to continue from the last checkpoint")

    def prepare(self, rank: int) -> None:
        """Sets this process up; its gradients accumulate in its row of the shared gradients."""
        keep_memory()
        torch.set_num_threads(1)
        self.windows = Windows(self.data, self.seed)
        for p, grad in zip(self.model.parameters(), self.split(self.grads[rank]), strict=True):
            p.grad = grad.view_as(p)

    def split(self, grads: Tensor) -> tuple[Tensor, ...]:
        """Splits the last dimension of the gradients into the parts of the parameters."""
        return grads.split([p.numel() for p in self.model.parameters()], -1)

    def follow(self, rank: int) -> None:
        """The work of the other processes: every step, until the stop signal in ``order``."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.prepare(rank)
        while self.work(rank):
            pass

    def step(self, step: int, factor: float) -> list[float]:
        """Makes one optimiser step with all processes; returns the mean losses of the batch."""
        self.order.copy_(torch.tensor([step, factor]))
        self.work(0)
        return self.values.mean(0).tolist()

    def work(self, rank: int) -> bool:
        """Does this process's part of a step; returns False at the stop signal."""
        self.wait()
        step, factor = self.order.tolist()
        if step < 0:
            return False
        tokens = self.windows.batch(int(step))[rank :: self.size]
        loss, drafted, balance = losses(self.model, tokens)
        self.grads[rank].zero_()
        (loss + DRAFT_WEIGHT * drafted.mean() + BALANCE_WEIGHT * balance).backward()
        self.values[rank] = torch.stack([loss, *drafted, balance]).detach()
        self.wait()
        parts = zip(self.model.named_parameters(), self.split(self.grads), strict=True)
        for (name, p), grads in parts:
            if name in self.shares[rank]:
                self.optimizer.update(name, grads.mean(0).view_as(p), int(step), factor)
        self.wait()
        return True


class Training:
    """The model, its optimiser and its progress, saved in ``out/checkpoint.pt``."""

    def __init__(self, out: Path, seed: int):
        self.out, self.seed = out, seed
        torch.manual_seed(seed)
        self.model = Qwen3Next(Config())
        self.optimizer = Optimizer(self.model)
        self.step, self.seconds = 0, 0.0
        self.stopped = False

    def resume(self) -> None:
        """Loads the checkpoint, if there is one."""
        path = self.out / "checkpoint.pt"
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for kept, moments in (("first", self.optimizer.first), ("second", self.optimizer.second)):
            for name, tensor in moments.items():
                tensor.copy_(state[kept][name])
        self.step, self.seconds = state["step"], state["seconds"]

    def save(self) -> None:
        """Writes the checkpoint to a temporary file, then renames it."""
        state = {
            "model": self.model.state_dict(),
            "first": self.optimizer.first,
            "second": self.optimizer.second,
            "step": self.step,
            "seconds": self.seconds,
        }
        path = self.out / "checkpoint.pt"
        partial = path.with_suffix(".partial")
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)

    def log(self, line: str) -> None:
        """Prints a line, and appends it to ``train.log``."""
        line = f"{time.strftime('%H:%M:%S')} step {self.step:5d} {line}"
        tqdm.write(line)
        sys.stdout.flush()
        with open(self.out / "train.log", "a") as file:
            file.write(line + "\n")

    def stop(self, *_) -> None:
        """Handles a signal: training ends after this step."""
        self.stopped = True

    def report(self, windows: int | None = None) -> None:
        """Logs the score of the held-out files, or of some windows of them."""
        self.log(str(evaluate(self.model, self.out / "heldout.npz", windows)))

    def run(self, minutes: float, processes: int, path: Path) -> None:
        """Trains on ``path`` until a signal, or for ``minutes``, which include earlier runs."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.stop)
        budget = minutes * 60
        bar = tqdm(total=round(budget), initial=round(self.seconds), unit="s", disable=None)
        with bar, Team(self.model, self.optimizer, path, self.seed, processes) as team:
            per_epoch = team.windows.per_epoch
            self.log(f"starts at {self.seconds / 60:.1f} of {minutes:g} minutes")
            mean, first_step = None, self.step
            began = last = saved = evaluated = logged = time.monotonic()
            while self.seconds < budget and not self.stopped:
                values = torch.tensor(team.step(self.step, rate(self.seconds / budget)))
                mean = values if mean is None else mean.lerp(values, 0.05)
                self.step += 1
                now = time.monotonic()
                self.seconds += now - last
                last = now
                bar.update(round(self.seconds) - bar.n)
                if now - logged > LOG_SECONDS:
                    loss, *drafted, balance = mean.tolist()
                    speed = (self.step - first_step) * BATCH * LENGTH / (now - began)
                    self.log(
                        f"{self.seconds / 60:6.2f} min  loss {loss:.3f}  mtp "
                        + " ".join(f"{d:.3f}" for d in drafted)
                        + f"  balance {balance:.2f}  epoch {self.step / per_epoch:.2f}"
                        + f"  {speed:.0f} tokens/s"
                    )
                    logged = now
                if now - saved > SAVE_SECONDS:
                    self.save()
                    saved = now
                if now - evaluated > EVAL_SECONDS:
                    self.report(windows=40)
                    evaluated = now
        self.save()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/demo_model"), help="the folder")
    parser.add_argument(
        "--minutes", type=float, default=75, help="training time of all runs together"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of data, weights and order")
    parser.add_argument(
        "--processes", type=int, help="number of processes (default: one per CPU, at most 16)"
    )
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="continue from the checkpoint; --no-resume starts anew",
    )
    parser.add_argument(
        "--finish",
        action="store_true",
        help="the last phase: mostly chats; give more --minutes than before",
    )
    parser.add_argument("--export", action="store_true", help="only write hf/ from the checkpoint")
    parser.add_argument("--evaluate", action="store_true", help="only score the held-out files")
    args = parser.parse_args()
    cpus = os.cpu_count()
    processes = args.processes or min(cpus, BATCH)
    if not 0 < processes <= BATCH:
        parser.error(f"--processes: got {processes}, use 1 to {BATCH}")

    torch.set_num_threads(1)  # several threads are slow beside other programs
    training = Training(args.out, args.seed)
    if args.export or args.evaluate:
        if not (args.out / "checkpoint.pt").exists():
            parser.error(f"no checkpoint in {args.out}: train first")
        training.resume()
        if args.evaluate:
            print(evaluate(training.model, args.out / "heldout.npz"))
        if args.export:
            print(export(training.model, args.out))
        return
    if not (args.out / "train.npz").exists():
        data.build(args.out, args.seed)
    path = args.out / ("finish.npz" if args.finish else "train.npz")
    if not path.exists():
        data.build_finish(args.out, args.seed)
    if args.resume:
        training.resume()
    training.run(args.minutes, processes, path)
    if training.stopped:
        sys.exit(f"stopped; run again to continue from {args.out / 'checkpoint.pt'}")
    training.log(f"exported to {export(training.model, args.out)}")
    training.report()


if __name__ == "__main__":
    main()
