"""Compares modeling.py with transformers' Qwen3NextForCausalLM on random weights, in float32."""

import torch
from modeling import Config, Qwen3Next
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The relative L2 error of ``got``."""
    return ((got - wanted).norm() / wanted.norm()).item()


def main() -> None:
    torch.manual_seed(0)
    config = Config()
    ours = Qwen3Next(config)
    with torch.no_grad():  # leave no weight at a value that hides a mistake
        for name, p in ours.named_parameters():
            if p.dim() > 1 and "conv1d" not in name:
                p.normal_(std=0.08)
            elif not name.endswith("A_log"):
                p.add_(torch.randn_like(p) * 0.3)
    theirs = Qwen3NextForCausalLM(Qwen3NextConfig(**config.hub())).eval()
    weights = {k: v for k, v in ours.state_dict().items() if not k.startswith("mtp.")}
    theirs.load_state_dict(weights)

    tokens = torch.randint(0, config.vocab_size, (2, 100))
    wanted = theirs(tokens)
    hidden, _ = ours.model(tokens)
    logits = ours.lm_head(hidden)
    print(f"logits, relative error       {relative(logits, wanted.logits):.1e}")
    loss = torch.nn.functional.cross_entropy
    targets = tokens[:, 1:].flatten()
    loss(logits[:, :-1].flatten(0, 1), targets).backward()
    loss(wanted.logits[:, :-1].flatten(0, 1), targets).backward()
    grads = dict(theirs.named_parameters())
    errors = {k: relative(p.grad, grads[k].grad) for k, p in ours.named_parameters() if k in grads}
    worst = max(errors, key=errors.get)
    print(f"gradients, relative error   {errors[worst]:.1e} at worst ({worst})")


if __name__ == "__main__":
    main()
