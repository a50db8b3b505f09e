"""The flags of ``python -m mlx_qwen3next.generate``, compared with those of mlx_lm.generate."""

import re
from typing import get_args

import pytest
from mlx_lm.generate import setup_arg_parser

from mlx_qwen3next.compute.proof import Mode
from mlx_qwen3next.decoding.draft_depth import MAX_DEPTH, MOST_COPIED
from mlx_qwen3next.decoding.drafters.speculation import check_depth, check_lookup
from mlx_qwen3next.decoding.sampling import Sampling
from mlx_qwen3next.generate import DEFAULT_PROMPT, UNSUPPORTED, main, parser

STOCK = {action.dest: action for action in setup_arg_parser()._actions}
OURS = {action.dest: action for action in parser()._actions}


def test_the_flags_are_mlx_lms_and_ours():
    ours = {"mtp", "mtp_from", "draft_model", "lookup", "kernels", "rope_scaling"}
    ours |= {"pipeline", "expert_parallel", "experts_in_memory"}
    assert OURS.keys() == STOCK.keys() | ours


def meaning(convert):
    """The meaning of a flag's type: the type itself, or its results."""
    if convert in (None, str, int, float):
        return convert
    return [convert(text) for text in ("True", "T", "1", "", "False", "false", "F", "f", "no")]


@pytest.mark.parametrize("dest", STOCK)
def test_a_flag_is_declared_as_by_mlx_lm(dest):
    ours, stock = OURS[dest], STOCK[dest]
    assert type(ours) is type(stock)
    assert meaning(ours.type) == meaning(stock.type)
    for name in ("option_strings", "nargs", "const", "choices", "required"):
        assert getattr(ours, name) == getattr(stock, name), name
    if dest == "prompt":  # None here: the demo model has a default of its own
        assert (ours.default, DEFAULT_PROMPT) == (None, stock.default)
    elif dest == "prefill_step_size":  # None here: chosen by time and memory
        assert ours.default is None
    elif dest in ("temp", "top_p", "top_k", "min_p"):  # None: the checkpoint may recommend one
        assert (ours.default, getattr(Sampling, dest)) == (None, stock.default)
    else:
        assert ours.default == stock.default


def test_flags_of_ours_take_the_values_of_the_library():
    assert OURS["kernels"].choices == get_args(Mode)
    for text in ("auto", "off", "1", str(MAX_DEPTH)):
        depth = parser().parse_args(["--mtp", text]).mtp
        assert check_depth(depth) == depth and str(depth) == text
    for text in ("auto", "off", "1", str(MOST_COPIED)):
        lookup = parser().parse_args(["--lookup", text]).lookup
        assert check_lookup(lookup, "auto") == lookup and str(lookup) == text
    with pytest.raises(SystemExit):
        parser().parse_args(["--lookup", str(MOST_COPIED + 1)])
    assert parser().parse_args([]).lookup is None
    defaults = parser().parse_args([])
    assert (defaults.mtp, defaults.kernels) == ("auto", "auto")


def test_help_names_every_flag(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    status, out, err = call(main, "--help")
    assert (status, err) == (0, "")
    for action in OURS.values():
        assert action.help
        for option in action.option_strings:
            assert re.search(rf"(^|[ ,]){option}[ ,\n]", out, re.M), option
    assert out.count("Not supported: ") == len(UNSUPPORTED)
    essential = out[: out.index("\noptions:")]
    assert all(f"  {option}" in essential for option in ("--model", "--prompt", "--mtp"))
    assert "--temp" not in essential
