"""The command ``python -m mlx_qwen3next.generate``, through main()."""

import io
import json
import re

import pytest
from helpers_generate import (
    RAW,
    bundled,
    endless,
    library_answer,
    message,
    tokens_of,
)
from helpers_metal import by_host

from mlx_qwen3next import load, stream_generate
from mlx_qwen3next.compute import proof
from mlx_qwen3next.generate import DEMO_PROMPT, main


@pytest.fixture
def request_of(run, monkeypatch):
    """Runs main() without generating; returns the prompt as text and the options."""

    def request_of(*args):
        calls = []

        def record(model, tokenizer, prompt, max_tokens, **options):
            calls.append((tokenizer.decode(prompt), {"max_tokens": max_tokens} | options))
            return (response for response in ())

        monkeypatch.setattr("mlx_qwen3next.terminal.stream_generate", record)
        assert run(*args)[0] == 0
        return calls[0]

    return request_of


# --- flags --------------------------------------------------------------------------------------


def test_default_prompts(request_of, model_dir):
    assert "\nhello<" in request_of("--model", model_dir)[0]
    assert DEMO_PROMPT in request_of()[0]


def test_flags_reach_the_library(request_of, model_dir):
    given = {
        "max_tokens": 3,
        "mtp": 2,
        "lookup": 3,
        "prefill_step_size": 5,
        "kv_bits": 4,
        "kv_group_size": 32,
        "quantized_kv_start": 6,
        "temp": 0.7,
        "top_p": 0.9,
        "min_p": 0.1,
        "min_tokens_to_keep": 2,
        "top_k": 8,
        "xtc_probability": 0.3,
        "xtc_threshold": 0.2,
    }
    flags = [x for name, v in given.items() for x in ("--" + name.replace("_", "-"), v)]
    _, options = request_of("--model", model_dir, *flags)
    _, tokenizer = load(model_dir)
    special = {*tokenizer.encode("\n"), *tokenizer.eos_token_ids}
    assert set(options.pop("xtc_special_tokens")) == special
    assert callable(options.pop("prompt_progress_callback"))
    assert options == given | {"prompt_cache": None}
    assert request_of("--mtp", "off")[1]["mtp"] == "off"


# --- what the checkpoint recommends -------------------------------------------------------------


@pytest.fixture
def recommending(tmp_path):
    """Makes a model whose generation_config.json has these fields."""

    def recommending(**fields):
        directory = endless(tmp_path / "model")
        file = directory / "generation_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))
        return directory

    return recommending


@pytest.mark.parametrize(
    ("flags", "options", "said"),
    [
        ([], {"temp": 0.7, "top_p": 0.8, "top_k": 20}, "temperature 0.7, top-p 0.8, top-k 20"),
        (["--top-p", 0.9], {"temp": 0.7, "top_p": 0.9, "top_k": 20}, "temperature 0.7, top-k 20"),
        (["--temp", 0.5], {"temp": 0.5, "top_p": 0.8, "top_k": 20}, "top-p 0.8, top-k 20"),
        (["--temp", 0.5, "--top-p", 1, "--top-k", 0], {"temp": 0.5, "top_p": 1, "top_k": 0}, None),
        (["--temp", 0], {"temp": 0, "top_p": 0.8, "top_k": 20}, None),
    ],
    ids=["none", "top-p", "temp", "all", "greedy"],
)
def test_flags_that_are_not_given_are_what_the_checkpoint_recommends(
    request_of, recommending, monkeypatch, flags, options, said
):
    lines = []
    monkeypatch.setattr("builtins.print", lambda line="", **_: lines.append(line))
    directory = recommending(temperature=0.7, top_p=0.8, top_k=20)
    _, taken = request_of("--model", directory, *flags)
    assert {name: taken[name] for name in options} == options
    assert "min_p" not in taken
    line = f"sampling as the checkpoint recommends: {said} (--temp 0 for greedy)"
    assert [x for x in lines if "recommends" in x] == ([line] if said else [])


def test_the_recommendation_is_said_in_one_line(run, recommending):
    directory = recommending(temperature=0.7, top_p=0.8, top_k=20)
    args = ("--model", directory, *RAW, "-m", 5)
    line = "sampling as the checkpoint recommends: temperature 0.7, top-p 0.8, top-k 20"
    assert run(*args)[2] == f"{line} (--temp 0 for greedy)\n"
    assert run(*args, "--temp", 0)[2] == ""
    drawn = run(*args, "--verbose", "F", "--seed", 5)[1]
    plain = ("--temp", 0.7, "--top-p", 0.8, "--top-k", 20)
    assert run(*args, "--verbose", "F", "--seed", 5, *plain)[1:] == (drawn, "")


def test_do_sample_false_is_greedy(answer, recommending):
    directory = recommending(do_sample=False, temperature=0.7)
    expected = library_answer(directory, "import os\n", 20)
    assert answer("--model", directory, *RAW, "-m", 20) == expected


def test_a_recommendation_that_cannot_be_used_is_refused_before_loading(
    run, recommending, monkeypatch
):
    directory = recommending(top_p="most")
    monkeypatch.setattr("mlx_qwen3next.terminal.load", None)
    said = f"error: {directory}/generation_config.json: top_p must be a number, got 'most'\n"
    assert run("--model", directory) == (2, "", said)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", " \\n"], "the prompt is empty"),
        (["--prompt", "a\udcff"], "not valid UTF-8"),
        (["--prompt", "word " * 70], "max_position_embeddings is 64"),
        (["--max-tokens", "0"], "max_tokens"),
        (["--max-tokens", "-5"], "max_tokens"),
        (["--max-tokens", "many"], "--max-tokens"),
        (["--temp", "-1"], "temp"),
        (["--top-p", "2"], "top_p"),
        (["--top-k", "5000"], "top_k"),
        (["--kv-bits", "7"], "kv_bits"),
        (["--prefill-step-size", "0"], "prefill_step_size"),
        (["--mtp", "0"], "--mtp: must be 'auto', 'off' or 1 to 8, got '0'"),
        (["--mtp", "9"], "--mtp: must be 'auto', 'off' or 1 to 8, got '9'"),
        (["--mtp", "-1"], "--mtp"),
        (["--mtp", "x"], "--mtp: must be 'auto', 'off' or 1 to 8, got 'x'"),
        (["--seed", "-1"], "--seed"),
        (["--seed", str(2**64)], "--seed"),
        (["--chat-template-config", "{"], "--chat-template-config is not valid JSON"),
        (["--chat-template-config", "[]"], "--chat-template-config must be a JSON object"),
        (["--chat-template-config", '{"tokenize": true}'], "the chat template fails"),
        (["--extra-eos-token", "no such token"], "no such token"),
        (["--extra-eos-token", "5000"], "5000"),
        (["--adapter-path", "/no/such/adapter"], "/no/such/adapter"),
        (["--prompt-cache-file", "/no/such/cache.safetensors"], "there is no such directory"),
        (["--image", "cat.png"], "--image is not supported"),
        (["--draft-model", "x"], "x does not exist"),
        (["--num-draft-tokens", "5"], "--num-draft-tokens is not supported"),
        (["--quantize-activations"], "--quantize-activations is not supported"),
        (["--max-kv-size", "9"], "--max-kv-size is not supported"),
        (["--no-such-flag"], "--no-such-flag"),
    ],
    ids=lambda x: (
        " ".join(x)[:40].encode("ascii", "replace").decode() if isinstance(x, list) else ""
    ),
)
def test_bad_input(run, model_dir, args, said):
    status, out, err = run("--model", model_dir, *args)
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and said in err
    assert err.count("\n") == 1 and err.endswith("\n")


def test_bad_input_for_the_demo_model_is_one_line_too(run):
    status, out, err = run("--prompt", "word " * 9000)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "max_position_embeddings" in err


def test_bad_input_is_refused_before_the_model_is_loaded(run, monkeypatch):
    def load(*args, **options):
        raise AssertionError("loaded")

    monkeypatch.setattr("mlx_qwen3next.terminal.load", load)
    for args in ("--max-tokens 0", "--temp -1", "--seed -1", "--max-kv-size 9", "--prompt="):
        assert run(*args.split())[0] == 2


def test_depth_for_a_model_without_a_head_is_refused(run, tmp_path):
    directory = endless(tmp_path / "model")
    (directory / "mtp.safetensors").unlink()
    status, out, err = run("--model", directory, "--mtp", "2")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "no MTP head" in err


# --- prompts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "messages", "options"),
    [
        (["-p", "hi"], [message("hi")], {"add_generation_prompt": True}),
        (["-p", r"a\n\tb"], [message("a\n\tb")], {"add_generation_prompt": True}),
        (
            ["-p", "hi", "--system-prompt", "Be brief."],
            [{"role": "system", "content": "Be brief."}, message("hi")],
            {"add_generation_prompt": True},
        ),
        (
            ["-p", "hi", "--prefill-response", "Well,"],
            [message("hi"), {"role": "assistant", "content": "Well,"}],
            {"continue_final_message": True},
        ),
        (
            ["-p", "hi", "--chat-template-config", '{"tools": [{"name": "f"}]}'],
            [message("hi")],
            {"add_generation_prompt": True, "tools": [{"name": "f"}]},
        ),
    ],
    ids=["message", "escapes", "system", "prefill", "template-config"],
)
def test_prompt_goes_through_the_chat_template(request_of, model_dir, args, messages, options):
    _, tokenizer = bundled()
    expected = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    assert request_of("--model", model_dir, *args)[0] == expected


def test_ignore_chat_template(request_of, model_dir):
    prompt, _ = request_of("--model", model_dir, "--ignore-chat-template", "-p", "a\\nb")
    assert prompt == "a\nb"


def test_prompt_from_stdin(request_of, run, model_dir, monkeypatch):
    text = "first line\nsecond \\n line\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    prompt, _ = request_of("--model", model_dir, "--ignore-chat-template", "-p", "-")
    assert prompt == text
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert run("--model", model_dir, "-p", "-") == (2, "", "error: the prompt is empty\n")


# --- answers ------------------------------------------------------------------------------------


def test_answer_is_the_librarys(answer, model_dir):
    expected = library_answer(model_dir, "import os\n", 20)
    assert answer("--model", model_dir, *RAW, "-m", 20) == expected


def test_verbose_frames_the_answer_and_adds_statistics(run, model_dir):
    status, out, err = run("--model", model_dir, *RAW, "-m", 20)
    rule = "=" * 10
    text = re.escape(library_answer(model_dir, "import os\n", 20))
    prompt = len(bundled()[1].encode("import os\n"))
    assert (status, err) == (0, "")
    assert re.fullmatch(
        rf"{rule}\n{text}\n{rule}\n"
        rf"Prompt: {prompt} tokens, [\d.]+ tokens-per-sec\n"
        r"Generation: 20 tokens, [\d.]+ tokens-per-sec\n"
        r"Peak memory: [\d.]+ GB\n"
        r"(Speculation: .*\n)?",
        out,
    )


@by_host
def test_kernels(run, answer, model_dir):
    expected = library_answer(model_dir, "import os\n", 20)
    assert answer("--model", model_dir, *RAW, "-m", 20, "--kernels", "off") == expected
    assert proof._mode == "off"
    assert answer("--model", model_dir, *RAW, "-m", 20) == expected
    assert proof._mode == "auto"
    status, out, err = run("--model", model_dir, *RAW, "--kernels", "on")
    assert (status, out) == (2, "")
    assert (
        err.startswith("error: kernels are 'on', but there is no Metal GPU")
        and err.count("\n") == 1
    )


@pytest.mark.parametrize("max_tokens", [-1, 10**12])
def test_answer_ends_with_the_context(run, model_dir, max_tokens):
    _, out, _ = run("--model", model_dir, *RAW, "-m", max_tokens)
    generated = 64 - len(bundled()[1].encode("import os\n"))
    assert f"\nGeneration: {generated} tokens," in out


def test_seed_fixes_the_answer(answer, model_dir):
    def sample(seed):
        return answer("--model", model_dir, *RAW, "-m", 30, "--temp", 1, "--seed", seed)

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


@pytest.mark.parametrize("form", [str, lambda token: bundled()[1].convert_ids_to_tokens(token)])
def test_extra_eos_token_stops(answer, model_dir, form):
    model, tokenizer = load(model_dir)
    tokens = tokens_of(stream_generate(model, tokenizer, tokenizer.encode("import os\n"), 20))
    stop = [token for i, token in enumerate(tokens) if token not in tokens[:i]][-1]
    text = answer("--model", model_dir, *RAW, "-m", 20, "--extra-eos-token", form(stop))
    assert text == tokenizer.decode(tokens[: tokens.index(stop)])


def test_terminal_that_cannot_show_the_text(monkeypatch, model_dir):
    class Response:
        text, token = "né 漢", 1

    monkeypatch.setattr(
        "mlx_qwen3next.terminal.stream_generate",
        lambda *args, **options: (response for response in [Response]),
    )
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", terminal)
    assert main(["--model", model_dir, "--verbose", "F"]) == 0
    terminal.seek(0)
    assert terminal.read() == "n? ?\n"
