"""The command ``generate`` with adapters and files of prompt caches."""

import json

import mlx.core as mx
import pytest
from helpers_generate import (
    GOLDENS,
    RAW,
    bundled,
    forward_cache,
    golden,
    library_answer,
    message,
)
from mlx.utils import tree_flatten
from mlx_lm import cache_prompt
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_adapters

from mlx_qwen3next import load, stream_generate
from mlx_qwen3next.checkpoint.hub import BUNDLED


@pytest.fixture
def adapter(tmp_path, model_dir):
    """A LoRA adapter with noise in place of training, and dropout, in mlx_lm.lora's layout."""
    parameters = {"rank": 2, "scale": 5.0, "dropout": 0.5}
    model, _ = load(model_dir, pack=False)
    model.freeze()
    linear_to_lora_layers(model, 4, parameters)
    weights = {
        name: mx.random.normal(w.shape, key=mx.random.key(i)) * 0.1
        for i, (name, w) in enumerate(tree_flatten(model.trainable_parameters()))
    }
    config = {"fine_tune_type": "lora", "num_layers": 4, "lora_parameters": parameters}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), weights)
    return tmp_path


def test_adapter(answer, model_dir, adapter):
    model, tokenizer = load(model_dir, pack=False)
    load_adapters(model, str(adapter))
    model.eval()
    tokens = tokenizer.encode("import os\n")
    expected = "".join(r.text for r in stream_generate(model, tokenizer, tokens, 20))
    assert expected != library_answer(model_dir, "import os\n", 20)
    assert answer("--model", model_dir, *RAW, "-m", 20, "--adapter-path", adapter) == expected


def test_bad_adapters_are_refused(run, model_dir, adapter):
    def assert_refused():
        status, out, err = run("--model", model_dir, "--adapter-path", adapter)
        assert (status, out, err.count("\n")) == (2, "", 1)

    mx.save_safetensors(str(adapter / "adapters.safetensors"), {"x.lora_a": mx.ones(3)})
    assert_refused()
    for config in ("{}", "[", '{"num_layers": 1, "lora_parameters": {}}'):
        (adapter / "adapter_config.json").write_text(config)
        assert_refused()


def test_prompt_cache_made_by_mlx_lm(run, answer, model_dir, tmp_path, monkeypatch):
    file = tmp_path / "cache.safetensors"
    made = ("--model", model_dir, "--prompt", "import os, sys", "--prompt-cache-file", str(file))
    monkeypatch.setattr("sys.argv", ["cache_prompt", *made])
    cache_prompt.main()
    # The prompt follows the cached text, which holds the opening of the template.
    _, tokenizer = bundled()
    template = tokenizer.apply_chat_template(
        [message("QUERY")], tokenize=False, add_generation_prompt=True
    )
    rest = "\nimport re" + template.partition("QUERY")[2]
    expected = library_answer(model_dir, rest, 20, prompt_cache=load_prompt_cache(str(file)))
    # The file names the model.
    args = ("--prompt-cache-file", file, "-p", "\\nimport re", "-m", 20)
    assert answer(*args) == expected
    assert f"Prompt: {len(tokenizer.encode(rest))} tokens" in run(*args)[1]


def test_prompt_cache_of_ours(answer, model_dir, tmp_path):
    file = tmp_path / "cache.safetensors"
    model, tokenizer = load(model_dir)
    save_prompt_cache(
        str(file), forward_cache(model, tokenizer.encode("def add(first, second):\n"))
    )
    expected = library_answer(
        model_dir, "    return ", 20, prompt_cache=load_prompt_cache(str(file))
    )
    assert expected != library_answer(model_dir, "    return ", 20)
    args = ("--model", model_dir, "--prompt-cache-file", file, "--ignore-chat-template")
    assert answer(*args, "-p", "    return ", "-m", 20) == expected


def test_a_prompt_cache_file_of_ours(run, model_dir, tmp_path):
    """The file is made, used by a prompt with the same beginning, and tied to its model."""
    file = tmp_path / "chat.safetensors"
    flags = ("--model", model_dir, "-m", 5, "--ignore-chat-template", "--verbose", "T")
    _, fresh, _ = run(*flags, "-p", "import os, sys\nimport re")
    status, _, _ = run(*flags, "-p", "import os, sys\n", "--prompt-cache-file", file)
    assert status == 0 and file.exists()
    flags += ("--prompt-cache-file", file)
    _, out, _ = run(*flags, "-p", "import os, sys\nimport re")
    text, _, after = out.partition("\nPrompt: ")
    assert text == fresh.partition("\nPrompt: ")[0]
    assert "of them cached)" in after and "cached" not in fresh
    status, _, err = run(*flags, "-p", "import os", "--kv-bits", 8)
    assert (status, err.count("\n")) == (2, 1) and "belongs to another model" in err
    file.write_bytes(file.read_bytes()[:-1])
    status, _, err = run(*flags, "-p", "import os")
    assert (status, err.count("\n")) == (2, 1) and str(file) in err


def test_wrong_prompt_cache_files_are_refused(run, model_dir, tmp_path):
    text = tmp_path / "text.safetensors"
    text.write_text("not a cache")
    other = tmp_path / "other.safetensors"
    save_prompt_cache(str(other), forward_cache(golden("base")[0], [1, 2, 3]))
    foreign = tmp_path / "foreign.safetensors"
    save_prompt_cache(str(foreign), forward_cache(bundled()[0], [1, 2]), {"model": "someone/else"})
    for file, said in [
        (text, "is no prompt cache"),
        (tmp_path, "is no prompt cache"),
        (BUNDLED / "model.safetensors", "is no prompt cache"),
        (GOLDENS / "base" / "config.json", "is no prompt cache"),
        (other, "prompt_cache[0]"),
        (foreign, "made with someone/else"),
    ]:
        status, out, err = run("--model", model_dir, "--prompt-cache-file", file)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert said in err
