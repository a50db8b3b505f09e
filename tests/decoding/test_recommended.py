"""What a checkpoint recommends for sampling: which fields count, and which values are refused."""

import json

import pytest

from mlx_qwen3next.checkpoint.hub import BUNDLED
from mlx_qwen3next.decoding.recommended import recommended_sampling
from mlx_qwen3next.decoding.sampling import Sampling

QWEN = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20}


@pytest.fixture
def recommending(tmp_path):
    """Makes a model directory whose generation_config.json has this content."""

    def recommending(content):
        (tmp_path / "config.json").write_text("{}")
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "generation_config.json").write_text(text)
        return tmp_path

    return recommending


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (QWEN | {"eos_token_id": [1, 2]}, {"temp": 0.7, "top_p": 0.8, "top_k": 20}),
        ({"temperature": 1, "top_k": 40, "min_p": 0.05}, {"temp": 1, "top_k": 40, "min_p": 0.05}),
        (QWEN | {"do_sample": False}, {"temp": 0, "top_p": 0.8, "top_k": 20}),
        ({"do_sample": True}, {"temp": 1}),
        ({"top_p": 0.9, "do_sample": None, "temperature": None}, {"top_p": 0.9}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"eos_token_id": 1, "repetition_penalty": 1.05}, {}),
    ],
    ids=["qwen", "no do_sample", "greedy", "no temperature", "null", "top_k off", "nothing"],
)
def test_fields_become_options(recommending, content, expected):
    assert recommended_sampling(recommending(content)) == expected
    Sampling(**expected)


def test_no_file_and_the_demo_model_recommend_nothing(recommending):
    directory = recommending({})
    (directory / "generation_config.json").unlink()
    assert recommended_sampling(directory) == {}
    assert recommended_sampling() == recommended_sampling(BUNDLED) == {}


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ({"temperature": "hot"}, ": temperature must be a number, got 'hot'"),
        ({"temperature": -1}, ": temperature must be within 0 and 1e+06, got -1"),
        ({"temperature": True}, ": temperature must be a number, got True"),
        ('{"temperature": NaN}', ": temperature must be within 0 and 1e+06, got nan"),
        ({"top_p": 1.5}, ": top_p must be within 0 and 1, got 1.5"),
        ({"top_k": 20.0}, ": top_k must be a whole number, got 20.0"),
        ({"top_k": -2}, ": top_k must be "),
        ({"min_p": [0.1]}, ": min_p must be a number, got [0.1]"),
        ({"do_sample": 1}, ": do_sample must be true or false, got 1"),
        ({"do_sample": "no", "temperature": 1}, ": do_sample must be true or false, got 'no'"),
        ("[]", " holds list, not a JSON object"),
        ("{", " is not valid JSON: "),
    ],
)
def test_values_that_cannot_be_used_are_refused(recommending, content, fault):
    directory = recommending(content)
    with pytest.raises(ValueError) as refused:
        recommended_sampling(directory)
    assert str(refused.value).startswith(f"{directory / 'generation_config.json'}{fault}")


def test_of_a_repository_one_file_is_fetched(hub, recommending, monkeypatch):
    hub.add("maker/model", recommending(QWEN))
    assert recommended_sampling("maker/model") == {"temp": 0.7, "top_p": 0.8, "top_k": 20}
    paths = {request.path.rpartition("/")[2] for request in hub.requests}
    assert paths == {"generation_config.json"}
    # Offline it is the cached one; a repository that is cached without one recommends nothing.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert recommended_sampling("maker/model")["temp"] == 0.7
    assert recommended_sampling("maker/other") == {}


def test_a_repository_without_the_file_recommends_nothing(hub, recommending):
    directory = recommending({})
    (directory / "generation_config.json").unlink()
    hub.add("maker/model", directory)
    assert recommended_sampling("maker/model") == {}
    with pytest.raises(ValueError, match="maker/nothing is no local directory"):
        recommended_sampling("maker/nothing")
