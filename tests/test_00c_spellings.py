"Tests of 00c_spellings. Generated from nbs/00c_spellings.ipynb: edit that, then run pythia_book build."
import json
import pytest
from dataclasses import replace
from pythia_nb.config import PythiaConfig
from pythia_nb.spellings import config_from_hf, config_to_hf
from transformers import GPTNeoXConfig


def test_the_hubs_configuration():
    "The configuration as it stands beside the published pythia-70m."
    values = json.loads("""{"architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0,
        "hidden_act": "gelu", "hidden_size": 512, "initializer_range": 0.02, "intermediate_size": 2048,
        "layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "model_type": "gpt_neox",
        "num_attention_heads": 8, "num_hidden_layers": 6,
        "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": false, "torch_dtype": "float16",
        "transformers_version": "4.24.0", "use_cache": true, "use_parallel_residual": true, "vocab_size": 50304}""")
    assert config_from_hf(values) == PythiaConfig.preset("70m")


def test_config_spellings():
    "rotary_pct, rope_parameters, rope_scaling and the names in between give the same configuration."
    base = config_to_hf(PythiaConfig(rotary_pct=0.5, rotary_base=500.0))
    base = {k: v for k, v in base.items() if not k.startswith(("rot", "rope"))}
    scaling = {"type": "linear", "factor": 2.0}
    old = {"rotary_pct": 0.5, "rotary_emb_base": 500}
    middle = {"partial_rotary_factor": 0.5, "rope_theta": 500.0}
    new = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}}
    assert {config_from_hf(base | x) for x in (old, middle, new)} == {PythiaConfig(rotary_pct=0.5, rotary_base=500.0)}
    scaled = {"rope_parameters": {"rope_type": "linear", "factor": 2.0} | middle}
    for x in (old | {"rope_scaling": scaling}, scaled):
        assert config_from_hf(base | x) == PythiaConfig(rotary_pct=0.5, rotary_base=500.0, rope_scaling=scaling)
    theirs = GPTNeoXConfig(**config_to_hf(PythiaConfig(rotary_pct=0.5, rotary_base=500.0, rope_scaling=scaling)))
    assert theirs.rope_parameters.items() >= scaled["rope_parameters"].items()
    assert config_from_hf(base | {"hidden_act": "gelu_fast"}).hidden_act == "gelu_new"


@pytest.mark.parametrize("scaling", [None, {"type": "linear", "factor": 2.0}, {"type": "ntk", "factor": 4.0},
                                     {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}])
def test_each_spelling_is_complete(scaling):
    "What transformers 4 reads and what transformers 5 reads are the same model, with ntk as the base that it amounts to."
    config = PythiaConfig(rotary_pct=0.5, rotary_base=500.0, rope_scaling=scaling)
    values = {k: v for k, v in config_to_hf(config).items() if k != "pythia_nb"}
    older = {k: v for k, v in values.items() if k != "rope_parameters"}
    newer = {k: v for k, v in values.items() if k not in ("rotary_pct", "rotary_emb_base", "rope_scaling")}
    if scaling and scaling["type"] == "ntk":
        config = replace(config, rope_scaling=None, rotary_base=500.0 * 4.0 ** (32 / 30))  # 32 rotary dimensions
    assert config_from_hf(older) == config_from_hf(newer) == config
    assert older.get("rope_scaling", {}).get("rope_type") == (config.rope_scaling or {}).get("type")


HF = config_to_hf(PythiaConfig(vocab_size=97, hidden_size=64, num_layers=2, num_heads=2))


@pytest.mark.parametrize("values, words", [
    (HF | {"model_type": "llama"}, ["llama", "gpt_neox"]),
    ({"model_type": "gpt_neox"}, ["vocab_size"]),
    (HF | {"num_attention_heads": 3}, ["3 heads", "64"]),
    (HF | {"rope_parameters": "x"}, ["rope_parameters", "'x'", "object"]),
    (HF | {"rope_parameters": None, "rotary_emb_base": "x"}, ["rotary_base", "'x'"]),
    (HF | {"pythia_nb": 3}, ["pythia_nb", "3", "object"]),
])
def test_configurations_that_are_none(values, words):
    "One sentence that names the field."
    with pytest.raises(ValueError) as e: config_from_hf(values)
    assert "\n" not in str(e.value) and all(word in str(e.value) for word in words), str(e.value)
