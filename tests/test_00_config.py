"Tests of 00_config. Generated from nbs/00_config.ipynb: edit that, then run pythia_book build."
import json
import pytest
from dataclasses import replace
from pythia_nb.config import PythiaConfig, SUITE


PUBLISHED = {"14m": 14_067_712, "31m": 30_494_720, "70m": 70_426_624, "160m": 162_322_944, "410m": 405_334_016,
             "1b": 1_011_781_632, "1.4b": 1_414_647_808, "2.8b": 2_775_208_960, "6.9b": 6_857_302_016,
             "12b": 11_846_072_320}


@pytest.mark.parametrize("name", SUITE)
def test_suite_counts(name):
    "Every size has exactly the published number of parameters, and its own vocabulary."
    config = PythiaConfig.preset(name)
    assert config.num_parameters() == PUBLISHED[name]
    assert config.vocab_size == {"6.9b": 50_432, "12b": 50_688}.get(name, 50_304)
    tables = 2 * config.vocab_size * config.hidden_size
    assert config.num_parameters(embeddings=False) == PUBLISHED[name] - tables


def test_overrides_and_spellings():
    "Presets take overrides, and the Hub's names."
    assert PythiaConfig.preset("pythia-160m-deduped") == PythiaConfig.preset("160m") == PythiaConfig.preset("160M")
    small = PythiaConfig.preset("70m", vocab_size=10_000)
    assert small.vocab_size == 10_000 and small.num_parameters() == PUBLISHED["70m"] - 2 * (50_304 - 10_000) * 512
    assert replace(small, intermediate_size=7).intermediate == 7


@pytest.mark.parametrize("values, words", [
    (dict(hidden_size=512, num_heads=7), ["7 heads", "512", "8"]),
    (dict(vocab_size=0), ["vocab_size", "0"]),
    (dict(vocab_size=True), ["vocab_size", "True"]),
    (dict(num_layers=2.5), ["num_layers", "2.5", "integer"]),
    (dict(hidden_size=96, num_heads=8), ["rotary_pct", "3 rotary", "even"]),
    (dict(rotary_pct=1.5), ["rotary_pct", "1.5"]),
    (dict(hidden_dropout=1.0), ["hidden_dropout", "1.0"]),
    (dict(hidden_act="swish"), ["swish", "gelu"]),
    (dict(init="xavier"), ["xavier", "small", "normal"]),
    (dict(rope_scaling="yarn"), ["rope_scaling", "dictionary"]),
    (dict(rope_scaling={"type": "dynamic", "factor": 2.0}), ["dynamic", "linear, ntk, yarn"]),
    (dict(rope_scaling={"type": "linear"}), ["factor"]),
    (dict(rope_scaling={"type": "linear", "factor": 0.5}), ["factor", "0.5"]),
    (dict(rope_scaling={"type": "linear", "factor": 2.0, "beta_fast": 3}), ["beta_fast"]),
])
def test_bad_values(values, words):
    "Each bad value gives one sentence that names what was given."
    with pytest.raises(ValueError) as e: PythiaConfig(**values)
    assert "\n" not in str(e.value) and all(word in str(e.value) for word in words), str(e.value)


def test_unknown_names():
    "An unknown size lists the known ones; an unknown field names its neighbour."
    with pytest.raises(ValueError, match="71m.*14m.*12b"): PythiaConfig.preset("71m")
    with pytest.raises(ValueError, match="did you mean vocab_size"): PythiaConfig.preset("70m", vocabsize=3)


def test_dictionaries():
    "A configuration survives JSON, hashes, and does not share its rope_scaling with the caller."
    scaling = {"rope_type": "yarn", "factor": 4.0, "attention_factor": None}
    config = PythiaConfig(rope_scaling=scaling)
    assert config.rope_scaling == {"type": "yarn", "factor": 4.0} and "rope_type" in scaling
    assert PythiaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(config) == hash(PythiaConfig.from_dict(config.to_dict()))


def test_costs():
    "Operations against a count over all pairs; scores against the same count."
    config = PythiaConfig(vocab_size=100, hidden_size=32, num_layers=3, num_heads=2)
    S, d = 10, 32
    pairs = sum(i + 1 for i in range(S))
    matrices = 3 * (3 * d * d + d * d + 8 * d * d) + 100 * d
    assert config.flops_per_token(S) * S == pytest.approx(2 * matrices * S + 3 * pairs * 2 * (2 * d))
    assert config.attention_memory(S, batch=5, bytes_per_score=2) == 5 * 2 * pairs * 2
    assert config.flops_per_token(S, density=0) == 2 * matrices
