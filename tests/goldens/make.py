"""Writes the golden fixtures: tiny Qwen3-Next checkpoints and what transformers computes with them.

    python tests/goldens/make.py            # writes every fixture below this directory
    python tests/goldens/make.py --check    # makes them elsewhere and compares byte for byte

Needs torch and transformers 5. The trunk is `transformers.Qwen3NextForCausalLM`; the MTP head, that
transformers lacks, is written after vLLM's `qwen3_next_mtp` around transformers' own decoder layer.

Each case is a directory in the hub's layout: `config.json` (the hub's dialect), `model.safetensors`
(bf16, one tensor per expert, `mtp.*` included) and `expected.safetensors`, float32 results of those
weights (L = 130 tokens, H hidden_size, V vocab_size):

    tokens [L]               hidden.0 [L, H]          the embedding
    logits [L, V]            hidden.{i + 1} [L, H]    the output of decoder layer i
    greedy [n]               hidden.final [L, H]      after model.norm
                             argmax continuation of tokens[:10]
    mtp_hidden [L − 1, H]    the head's m_i, from hidden.final[i] and tokens[i + 1]
    mtp_logits [L − 1, V]
    draft_points [p]         context lengths n, and for each of them, after tokens[:n]:
    draft_first_tokens [p]   the trunk's own greedy token
    drafts [p, 5]            what the head drafts recursively after that token
    draft_logits [p, 5, V]

`base_fused` is `base` as transformers 5 saves it: its config dialect, fused experts, no MTP head.

`yarn` has no weights: `settings.json` names changes of the config of `base`, and
`expected.safetensors` has for each of them, with the tokens of `base` (R rotary dimensions):

    {name}.logits [L, V]    {name}.mtp_logits [L − 1, V]    {name}.inverse_frequencies [R / 2]
    {name}.attention_factor []

`80B` has the last two alone, for the published config and YaRN as Qwen recommends it.
"""

import argparse
import copy
import filecmp
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM
from transformers.models.qwen3_next.modeling_qwen3_next import (
    Qwen3NextDecoderLayer,
    Qwen3NextGatedDeltaNet,
    Qwen3NextRMSNorm,
    Qwen3NextRotaryEmbedding,
)
from transformers.utils import logging

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "helpers"))
from configs import CASES, EXTENDED, HUB, SEEDS, YARN  # noqa: E402

LENGTH, PROMPT, DEPTH = 130, 10, 5
CONTINUATION = {"permutation": 200}  # greedy tokens, 24 elsewhere
DRAFT_POINTS = [1, 2, 10, 64, 65, 100, 130]
SMALLEST_MARGIN = 1e-3  # between the two largest logits, relative: no argmax hangs on rounding


class MTP(nn.Module):
    """The multi-token-prediction head, parameters named as below `mtp.` on the hub."""

    def __init__(self, config):
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        # the head's layer has index 0, but full attention
        config = copy.deepcopy(config)
        config.layer_types = ["full_attention"] * config.num_hidden_layers
        self.fc = nn.Linear(2 * size, size, bias=False)
        self.layers = nn.ModuleList([Qwen3NextDecoderLayer(config, layer_idx=0)])
        self.norm = Qwen3NextRMSNorm(size, eps)
        self.pre_fc_norm_embedding = Qwen3NextRMSNorm(size, eps)
        self.pre_fc_norm_hidden = Qwen3NextRMSNorm(size, eps)

    def forward(self, hidden, embeddings, rotary):
        """m [L, H] for positions 0 … L−1; hidden [L, H] from the trunk, embeddings [L, H] of the
        tokens after each, `rotary` the trunk's rotary embedding."""
        normed = self.pre_fc_norm_embedding(embeddings), self.pre_fc_norm_hidden(hidden)
        x = self.fc(torch.cat(normed, dim=-1))[None]
        length = x.shape[1]
        mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
        position_embeddings = rotary(x, torch.arange(length)[None])
        return self.norm(self.layers[0](x, position_embeddings, mask)[0])


# Standard deviation of each projection, times the square root of its input width.
GAIN = {
    "embed_tokens": 8.0,
    "lm_head": 2.0,
    "in_proj_qkvz": 1.5,
    "out_proj": 1.5,
    "o_proj": 3.0,
    "gate": 2.0,
    "shared_expert_gate": 2.0,
    "gate_up_proj": 1.5,
    "down_proj": 2.5,
}


def fill(model, rng):
    """Random weights under which no part of the model is negligible or neutral: layer outputs of
    the order of the residual stream, sharp routers and gates, norm weights away from 0 and 1,
    decays from 0.3 to 0.999."""
    for name, parameter in model.named_parameters():
        module, leaf = f".{name}".removesuffix(".weight").split(".")[-2:]
        values = torch.from_numpy(rng.normal(size=tuple(parameter.shape)))
        if module == "linear_attn" and leaf == "norm":
            values = 1 + 0.3 * values
        elif "norm" in leaf:
            values *= 0.3
        elif leaf not in ("A_log", "dt_bias"):
            values *= GAIN.get(leaf, 1.0) * parameter.shape[-1] ** -0.5
        parameter.copy_(values)
    for layer in model.modules():
        if isinstance(layer, Qwen3NextGatedDeltaNet):
            decay = torch.from_numpy(rng.permutation(1 - np.geomspace(0.7, 1e-3, len(layer.A_log))))
            layer.A_log.copy_(torch.log(-decay.log() / nn.functional.softplus(layer.dt_bias)))


def shrink_queries_and_keys(model, rng):
    """Rows of q and k so small that their squared length is of the order of rms_norm_eps."""
    for layer in model.modules():
        if isinstance(layer, Qwen3NextGatedDeltaNet):
            rows = layer.in_proj_qkvz.weight.unflatten(0, (layer.num_k_heads, -1))
            rows[:, : 2 * layer.head_k_dim] *= 0.1


def follow_permutation(model, rng):
    """A next-token law: the vocabulary in one cycle, seen through the noise of the layers.

    The head's row of a token's successor is that token's embedding; the MTP head passes the
    embedding of the sampled token on, so that it knows the law too, but has noise of its own.
    """
    embedding, size = model.model.embed_tokens.weight, model.config.hidden_size
    embedding.copy_(torch.from_numpy(rng.normal(size=tuple(embedding.shape))))
    cycle = torch.from_numpy(rng.permutation(len(embedding)))
    model.lm_head.weight[cycle.roll(-1)] = embedding[cycle] * 0.5
    for name, parameter in model.named_parameters():
        if name.endswith(("out_proj.weight", "o_proj.weight", "down_proj", "down_proj.weight")):
            parameter *= 0.3
    model.mtp.fc.weight[:, :size] = torch.eye(size)
    model.mtp.fc.weight[:, size:] *= 0.3


ADJUST = {"eps": shrink_queries_and_keys, "permutation": follow_permutation}


def build(config, seed, adjust):
    """The model of a case, its weights rounded to bf16 and held in float32."""
    rng = np.random.default_rng(seed)
    config = Qwen3NextConfig(**config)
    model = Qwen3NextForCausalLM._from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    model.mtp = MTP(model.config).eval()
    fill(model, rng)
    if adjust:
        adjust(model, rng)
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())
    return model, rng


def hub_tensors(model):
    """The state dict as it lies on the hub: bf16, one tensor per expert, no tied lm_head."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            for e, (gate, up) in enumerate(tensor.unflatten(1, (2, -1))):
                tensors[name.replace("gate_up_proj", f"{e}.gate_proj.weight")] = gate
                tensors[name.replace("gate_up_proj", f"{e}.up_proj.weight")] = up
        elif name.endswith("experts.down_proj"):
            for e, down in enumerate(tensor):
                tensors[name.replace("down_proj", f"{e}.down_proj.weight")] = down
        elif not (name == "lm_head.weight" and model.config.tie_word_embeddings):
            tensors[name] = tensor
    return {name: tensor.bfloat16().contiguous() for name, tensor in tensors.items()}


def trunk(model, tokens):
    """(layer states [embedding, after layer 0, …], final hidden [L, H], logits [L, V])."""
    states = []
    hooks = [model.model.embed_tokens, *model.model.layers]
    hooks = [m.register_forward_hook(lambda _, __, out: states.append(out[0])) for m in hooks]
    hidden = model.model(torch.tensor(tokens)[None], use_cache=False).last_hidden_state[0]
    for hook in hooks:
        hook.remove()
    return states, hidden, model.lm_head(hidden)


def argmax(logits):
    """The largest logit's index as an int; raises ValueError if the next one is too close."""
    (first, second), (token, _) = logits.topk(2)
    margin = float((first - second) / logits.abs().max())
    if margin < SMALLEST_MARGIN:
        raise ValueError(f"logits tie within {margin:.1e}: choose another seed")
    return int(token)


def greedy(model, tokens, count):
    """The `count` tokens that follow `tokens`."""
    tokens = list(tokens)
    for _ in range(count):
        tokens.append(argmax(trunk(model, tokens)[2][-1]))
    return tokens[-count:]


def head(model, hidden, next_tokens):
    """The MTP head's m [L, H] from final hidden states [L, H] and the tokens after them [L]."""
    embeddings = model.model.embed_tokens(torch.tensor(next_tokens))
    return model.mtp(hidden, embeddings, model.model.rotary_emb)


def draft(model, hidden, next_tokens, depth):
    """(tokens, logits [depth, V]) the head drafts after next_tokens[-1].

    Each step runs the head over the whole context: under a causal mask the rows before the last are
    what a cache would hold, first the entries of verified tokens, then those of earlier drafts.
    """
    next_tokens, rows = list(next_tokens), []
    for _ in range(depth):
        m = head(model, hidden, next_tokens)[-1:]
        rows.append(model.lm_head(m)[0])
        hidden = torch.cat([hidden, m])
        next_tokens.append(argmax(rows[-1]))
    return next_tokens[-depth:], torch.stack(rows)


def expected(model, tokens, continuation):
    """The tensors of `expected.safetensors`."""
    states, hidden, logits = trunk(model, tokens)
    first, drafts, draft_logits = [], [], []
    for n in DRAFT_POINTS:
        first.append(argmax(logits[n - 1]))
        drafted, rows = draft(model, hidden[:n], [*tokens[1:n], first[-1]], DEPTH)
        drafts.append(drafted)
        draft_logits.append(rows)
    mtp_hidden = head(model, hidden[:-1], tokens[1:])
    integers = {
        "tokens": tokens,
        "greedy": continuation,
        "draft_points": DRAFT_POINTS,
        "draft_first_tokens": first,
        "drafts": drafts,
    }
    return {
        **{name: torch.tensor(value, dtype=torch.int32) for name, value in integers.items()},
        **{f"hidden.{i}": state.clone() for i, state in enumerate(states)},
        "hidden.final": hidden,
        "logits": logits,
        "mtp_hidden": mtp_hidden,
        "mtp_logits": model.lm_head(mtp_hidden),
        "draft_logits": torch.stack(draft_logits),
    }


def check_acceptance(model, tokens):
    """How often the head's first 1, 2, 3 drafts are what the trunk goes on to say, as [3] floats;
    raises ValueError unless a speculative run over `tokens` both accepts and rejects."""
    hidden, depth = trunk(model, tokens)[1], 3
    agreed = np.zeros(depth)
    points = range(PROMPT, len(tokens) - depth)
    for n in points:
        drafted, _ = draft(model, hidden[:n], tokens[1 : n + 1], depth)
        agreed += np.cumprod(np.equal(drafted, tokens[n + 1 : n + 1 + depth]))
    rates = agreed / len(points)
    distinct = len(set(tokens[PROMPT:]))
    if not 0.6 < rates[0] < 0.85 or distinct < 100:
        raise ValueError(f"accepts {rates} with {distinct} distinct tokens: choose another seed")
    return rates


def make(name, directory):
    """Writes the case `name` into `directory / name`."""
    case = directory / name
    case.mkdir(parents=True, exist_ok=True)
    config = dict(sorted((HUB | CASES[name]).items()))
    (case / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    model, rng = build(config, SEEDS[name], ADJUST.get(name))
    save_file(hub_tensors(model), case / "model.safetensors", metadata={"format": "pt"})

    tokens = rng.integers(config["vocab_size"], size=LENGTH).tolist()
    continuation = greedy(model, tokens[:PROMPT], CONTINUATION.get(name, 24))
    if name == "permutation":
        tokens = tokens[:PROMPT] + continuation[: LENGTH - PROMPT]
        rates = check_acceptance(model, tokens[:PROMPT] + continuation)
        print("acceptance of the first, second, third draft:", *rates.round(3))
    results = expected(model, tokens, continuation)
    save_file(results, case / "expected.safetensors")

    # transformers must read back what it was computed with: the layout is the hub's
    reread = Qwen3NextForCausalLM.from_pretrained(case, dtype=torch.float32)
    assert torch.allclose(trunk(reread, tokens)[2], results["logits"], rtol=1e-3, atol=1e-4)


def make_fused(directory):
    """Writes `base_fused` from the files of `base`."""
    model = Qwen3NextForCausalLM.from_pretrained(directory / "base", dtype=torch.bfloat16)
    model.save_pretrained(directory / "base_fused", save_original_format=False)


def make_yarn(directory):
    """Writes `yarn`: the weights of `base` under other configs."""
    folder = directory / "yarn"
    folder.mkdir(exist_ok=True)
    (folder / "settings.json").write_text(json.dumps(YARN, indent=2) + "\n")
    unscaled = load_file(directory / "base" / "expected.safetensors")
    results = {}
    for name, changes in YARN.items():
        model, rng = build(HUB | CASES["base"] | changes, SEEDS["base"], None)
        tokens = rng.integers(model.config.vocab_size, size=LENGTH).tolist()
        assert tokens == unscaled["tokens"].tolist()
        _, hidden, logits = trunk(model, tokens)
        m = head(model, hidden[:-1], tokens[1:])
        results |= {f"{name}.logits": logits, f"{name}.mtp_logits": model.lm_head(m)}
        results |= rope_of(name, model.model.rotary_emb)
    published = Qwen3NextRotaryEmbedding(Qwen3NextConfig(**EXTENDED))
    save_file(results | rope_of("80B", published), folder / "expected.safetensors")


def rope_of(name, rotary):
    """The frequencies and the factor of transformers' rotary embedding, as golden tensors."""
    factor = torch.tensor(rotary.attention_scaling, dtype=torch.float32)
    return {
        f"{name}.inverse_frequencies": rotary.inv_freq.float().clone(),
        f"{name}.attention_factor": factor,
    }


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the files here")
    check = parser.parse_args().check
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # the order of float32 sums, and so the bytes, depend on it
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) if check else HERE
        for name in CASES:
            make(name, directory)
        make_fused(directory)
        make_yarn(directory)
        if check:
            made = [file.relative_to(directory) for file in directory.rglob("*.*")]
            _, differing, missing = filecmp.cmpfiles(HERE, directory, made, shallow=False)
            if differing or missing:
                raise SystemExit(f"not reproduced: {differing + missing}")


if __name__ == "__main__":
    main()
