"Tests of 01b_tensors. Generated from nbs/01b_tensors.ipynb: edit that, then run pythia_book build."
import json
import os
import pytest
import re
import torch
from pathlib import Path
from pythia_nb.config import PythiaConfig
from pythia_nb.model import Pythia
from pythia_nb.tensors import (
    _check_tensors, _fill, _index_bin, _index_folder, _index_safetensors, _our_names, _read_into,
)
from safetensors.torch import save_file


@pytest.mark.parametrize("damage, words", [
    (lambda f: os.truncate(f, 5), ["truncated"]),
    (lambda f: os.truncate(f, 500), ["truncated"]),
    (lambda f: os.truncate(f, 50_000), ["truncated", "50,000"]),
    (lambda f: f.write_bytes(b"\x10" + bytes(7) + b"no header at all" * 9), ["makes no sense"]),
    (lambda f: f.write_bytes(b"\x0a" + bytes(7) + b'{"a":"bc"}'), ["makes no sense"]),
])
def test_damaged_safetensors(tmp_path, damage, words):
    "Cut off within the length, the header or the tensors; a header that is no text, or describes no tensors."
    path = tmp_path / "model.safetensors"
    save_file({f"layer{i}": torch.zeros(1000) for i in range(20)}, path)
    assert len(_index_safetensors(path)) == 20
    damage(path)
    with pytest.raises(ValueError) as e: _index_safetensors(path)
    assert "\n" not in str(e.value) and all(word in str(e.value) for word in [path.name, *words]), str(e.value)


def test_damaged_bins(tmp_path):
    "A truncated .bin, and one that would run code."
    path = tmp_path / "pytorch_model.bin"
    torch.save({f"layer{i}": torch.zeros(5000) for i in range(20)}, path)
    assert len(_index_bin(path)) == 20 and path.stat().st_size > 400_000
    for size in (200_000, 1000, 0):
        os.truncate(path, size)
        with pytest.raises(ValueError, match="pytorch_model.bin is truncated"): _index_bin(path)
    torch.save({"x": Path("an object")}, path)
    with pytest.raises(ValueError, match="no file of tensors"): _index_bin(path)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("odd", ["none", "transposed", "shared"])
def test_odd_bin(tmp_path, legacy, odd):
    "Transposed tensors, tensors that share a storage, and the archive of before torch 1.6 are read as well."
    tensors = {"a": torch.randn(30, 50), "b": torch.randn(64), "c": torch.randn(64)}
    if odd == "transposed": tensors["a"] = tensors["a"].t().contiguous().t()
    if odd == "shared": tensors["b"], tensors["c"] = torch.cat([tensors["b"], tensors["c"]]).split(64)
    path = tmp_path / "x.bin"
    torch.save(tensors, path, _use_new_zipfile_serialization=not legacy)
    index = _index_bin(path)
    assert list(index) == list(tensors) and (index["a"].value is None) == (not legacy and odd != "transposed")
    for name, spec in index.items():
        target = torch.full(spec.shape, torch.nan)
        with open(path, "rb") as f: _read_into(f, spec, target, buffer_bytes=100)
        assert torch.equal(target, tensors[name])


def test_file_that_gets_shorter(tmp_path):
    "A file that is cut off after it was indexed."
    save_file({"a": torch.zeros(1000)}, path := tmp_path / "x.safetensors")
    spec = _index_safetensors(path)["a"]
    os.truncate(path, 3000)
    with open(path, "rb") as f, pytest.raises(ValueError, match="x.safetensors is truncated: it ends within a tensor"):
        _read_into(f, spec, torch.empty(1000))


def write(tensors, folder, stem="model.safetensors", shards=1):
    "Tensors in one file, or in shards with an index."
    folder.mkdir(parents=True, exist_ok=True)
    save, (name, end) = torch.save if stem.endswith(".bin") else save_file, stem.split(".")
    files = [f"{name}-{i + 1:05}-of-{shards:05}.{end}" for i in range(shards)] if shards > 1 else [stem]
    cuts = [len(tensors) * i // shards for i in range(shards + 1)]
    parts = {file: list(tensors)[i:j] for file, i, j in zip(files, cuts, cuts[1:])}
    for file, part in parts.items(): save({n: tensors[n] for n in part}, folder / file)
    if shards > 1:
        weight_map = {n: file for file, part in parts.items() for n in part}
        (folder / f"{stem}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@torch.no_grad()
def numbered(**changes):
    "A small model whose parameters count through all their entries."
    model = Pythia(PythiaConfig(vocab_size=97, hidden_size=64, num_layers=2, num_heads=2, **changes)).eval()
    start = 0
    for p in model.parameters():
        p.copy_(torch.arange(start, start + p.numel()).view_as(p))
        start += p.numel()
    return model


@pytest.mark.parametrize("stem", ["model.safetensors", "pytorch_model.bin"])
def test_damaged_shards(tmp_path, stem):
    "A shard without its tensor, a missing shard, an index that has no map, no file at all."
    folder = write(dict(numbered().state_dict()), tmp_path / "m", stem, shards=3)
    shard = sorted(folder.glob("*-of-*"))[1]
    lost, *held = [name for name, spec in _index_folder(folder).items() if spec.path == shard]
    (torch.save if stem.endswith(".bin") else save_file)({name: torch.zeros(1) for name in held}, shard)
    with pytest.raises(ValueError, match=f"{re.escape(lost)}.*{shard.name}"): _index_folder(folder)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name): _index_folder(folder)
    for content in ({}, {"weight_map": 3}, {"weight_map": {"a": 1}}):
        (folder / f"{stem}.index.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match="index.json in .* has no map"): _index_folder(folder)
    (folder / f"{stem}.index.json").unlink()
    with pytest.raises(FileNotFoundError, match="no weights.*model.safetensors"): _index_folder(folder)


def check_changed(change, model, folder):
    "The tensors of a model, changed, written and compared with the model."
    tensors = {n if n.startswith("embed_out") else f"gpt_neox.{n}": t for n, t in model.state_dict().items()}
    change(tensors)
    specs = _our_names(_index_folder(write(tensors, folder)), model.config.tie_embeddings)
    _check_tensors(specs, model, folder)

NORM, QKV = "gpt_neox.final_layer_norm.weight", "gpt_neox.layers.0.attention.query_key_value.weight"
EMBED = "gpt_neox.embed_in.weight"


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop(NORM), ["lacks", "final_layer_norm.weight"]),
    (lambda t: [t.pop(n) for n in list(t) if "layers.1" in n], ["lacks", "layers.1", "more"]),
    (lambda t: t.update(extra=torch.zeros(1)), ["holds extra"]),
    (lambda t: t.update({QKV: torch.zeros(3, 3)}), [QKV[9:], "[3, 3]", "[192, 64]"]),
    (lambda t: t.update({EMBED: torch.tensor(1.0)}), [EMBED[9:], "[]", "[97, 64]"]),
    (lambda t: t.update({NORM: torch.zeros(64).long()}), [NORM[9:], "int64"]),
    (lambda t: t.update({"lm_head.weight": torch.zeros(97, 64)}), ["embed_out", "twice"]),
    (lambda t: t.update({EMBED: torch.zeros(100, 64)}), ["vocabulary", "97", "100 rows", "config.json"]),
])
def test_tensors_of_another_model(tmp_path, change, words):
    "One sentence that names the tensor."
    check_changed(lambda t: None, numbered(), tmp_path / "whole")
    with pytest.raises(ValueError) as e: check_changed(change, numbered(), tmp_path / "m")
    assert "\n" not in str(e.value) and all(word in str(e.value) for word in words), str(e.value)


def read_model(folder, config, dtype=None):
    "A model from a folder's tensors, by the steps of this chapter; what no file fills stays NaN."
    specs = _our_names(_index_folder(folder), config.tie_embeddings)
    model = Pythia(config, device="meta", dtype=dtype)
    _check_tensors(specs, model, folder)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters(): p.fill_(torch.nan)
    return _fill(model, specs)


@pytest.mark.parametrize("stem", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("unembedding", ["embed_out.weight", "lm_head.weight", None])
@pytest.mark.parametrize("prefix", ["gpt_neox.", ""])
def test_published_forms(tmp_path, stem, shards, unembedding, prefix):
    "Either form, single and in shards, either name of the unembedding or none, with and without prefix; buffers ignored."
    model = numbered(tie_embeddings=unembedding is None)
    state = {unembedding if k == "embed_out.weight" else prefix + k: v for k, v in model.state_dict().items()}
    for i in range(model.config.num_layers):
        at = f"{prefix}layers.{i}.attention."
        state |= {at + "bias": torch.ones(1, 1, 8, 8, dtype=torch.bool), at + "masked_bias": torch.tensor(-1e9),
                  at + "rotary_emb.inv_freq": torch.ones(4)}
    folder = write(state, tmp_path / "m", stem, shards)
    for dtype in (torch.float32, torch.bfloat16):
        again = read_model(folder, model.config, dtype)
        for a, b in zip(model.parameters(), again.parameters(), strict=True):
            assert b.dtype == dtype and torch.equal(a.to(dtype), b)
