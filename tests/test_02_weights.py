"Tests of 02_weights. Generated from nbs/02_weights.ipynb: edit that, then run pythia_book build."
import importlib
import json
import os
import pytest
import re
import subprocess
import sys
import torch
from pathlib import Path
from pythia_nb.config import PythiaConfig
from pythia_nb.model import Pythia
from pythia_nb.spellings import config_to_hf
from pythia_nb.weights import load_config
from transformers import GPTNeoXForCausalLM


def small(**changes):
    "A small model with random parameters, biases and layer norms included."
    shape = dict(vocab_size=97, hidden_size=64, num_layers=2, num_heads=2, max_position_embeddings=64)
    config = PythiaConfig.from_dict(shape | changes)
    model = Pythia(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm.weight" in name else 0.0, 0.3 if p.ndim == 1 else 0.1, generator=generator)
    return model

IDS = torch.arange(3 * 31).view(3, 31) % 97

@torch.no_grad()
def same_logits(a, b):
    "Do two models agree to the last bit?"
    a, b = ((m(IDS).logits if isinstance(m, GPTNeoXForCausalLM) else m(IDS)) for m in (a, b))
    return torch.equal(a, b)


def save_bin(model, folder, shards=1):
    "Save as `pytorch_model.bin`, as transformers 4 did."
    folder = Path(folder)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_to_hf(model.config, model.dtype)))
    state = {name if name.startswith("embed_out") else f"gpt_neox.{name}": t for name, t in model.state_dict().items()}
    state["gpt_neox.layers.0.attention.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    names = sorted(state)
    file = lambda i: f"pytorch_model-{i + 1:05}-of-{shards:05}.bin" if shards > 1 else "pytorch_model.bin"
    files = {file(i): names[i::shards] for i in range(shards)}
    for file, part in files.items(): torch.save({n: state[n] for n in part}, folder / file)
    if shards > 1:
        weight_map = {n: file for file, part in files.items() for n in part}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_legacy_bin(tmp_path, shards, tied):
    "The older form is read as the newer one, in its own type or another."
    model = small(tie_embeddings=tied)
    save_bin(model, tmp_path / "m", shards)
    assert same_logits(model, Pythia.from_pretrained(tmp_path / "m"))
    low = Pythia.from_pretrained(tmp_path / "m", dtype="bfloat16")
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(model.parameters(), low.parameters()))


def test_hub_folder(tmp_path, monkeypatch):
    "A name on the Hub is fetched: safetensors first, .bin if there are none; a name that leads nowhere says so."
    model, asked = small(), []
    save_bin(model, tmp_path / "bin")
    model.save_pretrained(tmp_path / "safe")
    class Hub:
        @staticmethod
        def snapshot_download(name, revision=None, allow_patterns=None):
            asked.append((revision, "*.bin" in allow_patterns))
            return tmp_path / name.split("/")[1]
    monkeypatch.setattr(importlib, "import_module", lambda name: Hub)
    assert same_logits(model, Pythia.from_pretrained("x/safe", revision="step3000")) and asked == [("step3000", False)]
    assert same_logits(model, Pythia.from_pretrained("x/bin", "step1"))
    assert asked[1:] == [("step1", False), ("step1", True)]
    with pytest.raises(FileNotFoundError, match="no folder"): Pythia.from_pretrained(tmp_path / "none")


def change_config(folder, **values):
    "Rewrite fields of a folder's config.json."
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | values))

@pytest.mark.parametrize("damage, words", [
    (lambda f: (f / "config.json").unlink(), ["config.json", "no "]),
    (lambda f: (f / "config.json").write_text("{"), ["config.json", "read"]),
    (lambda f: (f / "config.json").write_text("[]"), ["config.json", "object"]),
    (lambda f: change_config(f, model_type="llama"), ["llama", "gpt_neox"]),
    (lambda f: change_config(f, num_attention_heads=3), ["3 heads", "64"]),
    (lambda f: (f / "model.safetensors").unlink(), ["no weights", "model.safetensors"]),
    (lambda f: change_config(f, vocab_size=100), ["vocabulary", "100", "97 rows", "config.json"]),
    (lambda f: change_config(f, num_hidden_layers=9), ["lacks", "layers.2", "more"]),
    (lambda f: os.truncate(f / "model.safetensors", 50_000), ["model.safetensors", "truncated", "50,000"]),
])
def test_damaged_folders(tmp_path, damage, words):
    "One sentence that names the file or the tensor."
    folder = small().save_pretrained(tmp_path / "m")
    damage(folder)
    with pytest.raises((ValueError, OSError)) as e: Pythia.from_pretrained(folder)
    assert "\n" not in str(e.value) and all(word in str(e.value) for word in words), str(e.value)


@pytest.mark.parametrize("shard_size", ["5GB", "150KB"])
@pytest.mark.parametrize("changes", [
    {}, dict(tie_embeddings=True), dict(parallel_residual=False, rotary_pct=1.0, intermediate_size=100),
    dict(attention_bias=False), dict(hidden_act="relu", layer_norm_eps=1e-3, rotary_base=500.0),
    dict(rope_scaling={"type": "linear", "factor": 2.0}),
    dict(rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, rotary_pct=1.0),
    dict(rope_scaling={"type": "ntk", "factor": 4.0}, rotary_pct=1.0)])
def test_round_trips(tmp_path, changes, shard_size):
    "ours -> folder -> transformers -> folder -> ours, with identical logits at every station."
    model = small(**changes)
    model.save_pretrained(tmp_path / "ours", max_shard_size=shard_size)
    assert (tmp_path / "ours/model.safetensors.index.json").exists() == (shard_size == "150KB")
    theirs, info = GPTNeoXForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert same_logits(model, theirs.eval()) and same_logits(model, Pythia.from_pretrained(tmp_path / "ours"))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=shard_size)
    again = Pythia.from_pretrained(tmp_path / "theirs")
    assert same_logits(model, again) and not again.training
    if changes.get("rope_scaling", {}).get("type") != "ntk": assert again.config == model.config
    assert load_config(tmp_path / "ours") == model.config


def test_types_devices_overrides(tmp_path):
    "The saved type unless another is asked for; configuration fields can be overridden; block and pattern come back."
    model = small().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "m")
    assert Pythia.from_pretrained(tmp_path / "m").dtype == torch.bfloat16
    assert Pythia.from_pretrained(str(tmp_path / "m"), dtype=torch.float32).dtype == torch.float32
    other = Pythia.from_pretrained(tmp_path / "m", hidden_dropout=0.1, max_position_embeddings=128, block=32)
    assert (other.config.hidden_dropout, other.config.max_position_embeddings, other.block) == (0.1, 128, 32)
    other.save_pretrained(tmp_path / "n")
    assert Pythia.from_pretrained(tmp_path / "n").block == 32
    for bad in ("int8", torch.int64, "float31"):
        with pytest.raises(ValueError, match="dtype"): Pythia.from_pretrained(tmp_path / "m", dtype=bad)
    with pytest.raises(ValueError, match="hiden_dropout"): Pythia.from_pretrained(tmp_path / "m", hiden_dropout=0.1)


class NamedPattern:
    "Stands for a pattern: something with a text, that set_pattern understands."
    def __init__(self, text): self.text = text
    def __str__(self): return self.text
    def __call__(self, q, k, v, **kwargs): return v

def test_pattern_text(tmp_path, monkeypatch):
    "A pattern is saved as its text and handed back to set_pattern; functions are not saved."
    model = small()
    model.set_pattern(NamedPattern("local(window=1)")).save_pretrained(tmp_path / "m")
    assert json.loads((tmp_path / "m/config.json").read_text())["pythia_nb"]["pattern"] == "local(window=1)"
    seen = []
    monkeypatch.setattr(Pythia, "set_pattern", lambda self, pattern=None: seen.append(pattern))
    Pythia.from_pretrained(tmp_path / "m")
    Pythia.from_pretrained(tmp_path / "m", pattern="dense")
    assert seen == ["local(window=1)", "dense"]
    monkeypatch.undo()
    for pattern in (None, lambda q, k, v, **kwargs: v, [None, lambda q, k, v, **kwargs: v]):
        model.set_pattern(pattern).save_pretrained(tmp_path / "m")
        assert "pattern" not in json.loads((tmp_path / "m/config.json").read_text())["pythia_nb"]


def content(folder): return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.is_file()}

class PowerCut(BaseException):
    "After it, nothing is done any more."

@pytest.mark.parametrize("old_size, new_size", [("5GB", "5GB"), ("150KB", "5GB"), ("5GB", "150KB"), ("150KB", "120KB")])
@pytest.mark.parametrize("dead", [False, True])
def test_overwriting_is_safe(tmp_path, monkeypatch, old_size, new_size, dead):
    "Stopped at any renaming, the folder is the old model or the new one; after a power cut the old one may be beside it."
    old, new = small(), small(rotary_pct=1.0)
    with torch.no_grad(): new.embed_in.weight.mul_(2.0)
    real, outcomes = os.replace, set()
    for stop in range(40):
        folder = tmp_path / f"m{stop}"
        old.save_pretrained(folder, max_shard_size=old_size)
        (folder / "tokenizer.json").write_text("mine")
        calls = []
        def replace_or_die(a, b):
            calls.append(b)
            if len(calls) == stop + 1 or (dead and len(calls) > stop): raise PowerCut
            real(a, b)
        with monkeypatch.context() as m:
            m.setattr(os, "replace", replace_or_die)
            try: done = bool(new.save_pretrained(folder, max_shard_size=new_size))
            except PowerCut: done = False
        assert (folder / "tokenizer.json").read_text() == "mine" and (dead or not list(tmp_path.glob(".*")))
        try: loaded = Pythia.from_pretrained(folder)
        except FileNotFoundError as e:
            loaded = Pythia.from_pretrained(re.search(r"whole in (.*)", str(e))[1])
            assert same_logits(loaded, old)
            outcomes.add("beside")
        else: outcomes.add("new" if same_logits(loaded, new) else "old" if same_logits(loaded, old) else "mixture")
        if done: break
    assert done and outcomes == ({"beside", "new"} if dead else {"old", "new"})
    fresh = new.save_pretrained(tmp_path / "fresh", max_shard_size=new_size)
    assert content(folder) == content(fresh) | {"tokenizer.json": b"mine"}


def test_failures_leave_the_old_save(tmp_path, monkeypatch):
    "A full disk while writing, a file in the way, a folder that cannot be written, a size that is none."
    folder = small().save_pretrained(tmp_path / "m")
    before = content(folder)
    def full(tensors, path, metadata=None):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setitem(Pythia.save_pretrained.__globals__, "save_file", full)
    for target in (folder, tmp_path / "new"):
        with pytest.raises(OSError, match="No space left"): small(rotary_pct=1.0).save_pretrained(target)
    monkeypatch.undo()
    assert content(folder) == before and [p.name for p in tmp_path.iterdir()] == ["m"]
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file of that name"): small().save_pretrained(tmp_path / "file")
    with pytest.raises(OSError, match="choose a folder"): small().save_pretrained(tmp_path / "file/inside")
    with pytest.raises(OSError, match="choose a folder"): small().save_pretrained("/proc/nowhere/model")
    for size in ("5 apples", -1, 0, "", True):
        with pytest.raises(ValueError, match="size"): small().save_pretrained(tmp_path / "x", max_shard_size=size)


PEAK_PROGRAM = """
import ctypes, gc, json, sys, torch
from safetensors.torch import load_file
from pythia_nb.model import Pythia
from pythia_nb.weights import load_config

def status(key): return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
def plain(folder):
    model = Pythia(load_config(folder), device="meta").to_empty(device="cpu")
    model.load_state_dict({k.removeprefix("gpt_neox."): v for k, v in load_file(folder + "/model.safetensors").items()})
    return model
Pythia.from_pretrained(sys.argv[1])  # what torch sets up once does not count
peaks = {}
for case, folder, dtype in json.loads(sys.argv[2]):
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"): libc.malloc_trim(0)  # no room left from the case before
    open("/proc/self/clear_refs", "w").write("5")  # forget the highest value so far
    before = status("VmRSS")
    model = plain(folder) if case == "plain" else Pythia.from_pretrained(folder, dtype=dtype)
    peaks[case] = [status("VmHWM") - before, sum(p.nbytes for p in model.parameters())]
    del model
print(json.dumps(peaks))
"""

def measure_peaks(warmup, cases):
    "name -> (highest memory while loading, bytes of the model), for cases of (name, folder, dtype), in a new process."
    command = [sys.executable, "-c", PEAK_PROGRAM, str(warmup), json.dumps(cases)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_copy_in_memory(tmp_path):
    "Highest memory while loading 120 MB is below 1.3 copies, whatever the form; through a dictionary it is not."
    model = Pythia(PythiaConfig(vocab_size=20_000, hidden_size=640, num_layers=2, num_heads=8))
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20MB")
    save_bin(model, tmp_path / "bin")
    small().save_pretrained(tmp_path / "small")
    cases = [("plain", "one", None), ("one", "one", None), ("shards", "shards", None), ("bin", "bin", None),
             ("bf16", "one", "bfloat16")]
    peaks = measure_peaks(tmp_path / "small", [(name, str(tmp_path / folder), dtype) for name, folder, dtype in cases])
    assert peaks["one"][1] > 120e6 and peaks["plain"][0] > 1.7 * peaks["plain"][1]
    for name in ("one", "shards", "bin", "bf16"): assert peaks[name][0] < 1.3 * peaks[name][1], (name, peaks[name])
