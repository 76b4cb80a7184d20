"Tests of 14b_prepare. Generated from nbs/14b_prepare.ipynb: edit that, then run pythia_book build."
import errno
import json
import numpy as np
import os
import pytest
import shutil
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from pythia_nb.corpora import learn_bpe
from pythia_nb.prepare import Load, _folder, encoded, prepare, report
from pythia_nb.tokenizer import Tokenizer
from pythia_nb.tokens import MANIFEST, TokenWriter, open_tokens


def write_library(folder, documents=60, words=300):
    "Two sources of Python-like text, as text and as JSON lines"
    rng = np.random.default_rng(0)
    def text(n): return " ".join(f"def f{i}(x{j}): return x{j} + {i}\n" for i, j in rng.integers(0, 99, (rng.integers(1, n), 2)))
    (folder/"text").mkdir(parents=True)
    for i in range(documents): (folder/"text"/f"{i:03}.txt").write_text(text(words // 4))
    (folder/"lines.jsonl").write_text("".join(json.dumps({"body": text(words // 4)}) + "\n" for _ in range(documents)))
    return [folder/"text", folder/"lines.jsonl"]

def folder_content(folder):
    "Every file and its bytes"
    return {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir())}

def small(folder, sources, **options):
    "A preparation in many small shards"
    return prepare(sources, folder, **dict(tokenizer="train", vocab_size=300, text_field="body", workers=1, shard_tokens=3000) | options)

def test_prepared_tokens_are_those_of_the_documents(tmp_path):
    sources = write_library(tmp_path)
    tokens = small(tmp_path/"out", sources, validation=0.2)
    tok = Tokenizer.from_file(tmp_path/"out"/"tokenizer.json")
    texts = [p.read_text() for p in sorted(sources[0].iterdir())] + [json.loads(line)["body"] for line in open(sources[1])]
    rows = [tok.encode(text) + [tok.eos_id] for text in texts]
    assert tokens[0:len(tokens)].tolist() == sum(rows, []) and len(tokens.parts) > 8 and tokens.validation == 0.2
    assert np.diff(tokens.bounds(np.arange(tokens.documents)))[:, 0].tolist() == [len(r) for r in rows]
    assert tokens.tokenizer_hash == tok.hash and tokens.vocab_size == tok.vocab_size == 300
    nbytes = sum(len(t.encode()) for t in texts)
    assert f"120 documents, {len(tokens):,} tokens of 300 ids" in report(tmp_path/"out")
    assert f"{nbytes / len(tokens):.2f} bytes per token, 2.0 s" in report(tmp_path/"out", 2.0)
    assert small(tmp_path/"mix", sources, weights=[3, 1]).weights == [0.75, 0.25]

@pytest.mark.parametrize("stops", [[1], [37], [5, 9, 9, 40], [119]])
def test_an_interrupted_preparation_goes_on(tmp_path, monkeypatch, stops):
    sources = write_library(tmp_path)
    small(tmp_path/"whole", sources)
    for stop in stops:
        calls = []
        def encode(self, texts, real=Tokenizer.encode_batch):
            calls.extend(texts)
            if len(calls) > stop: raise KeyboardInterrupt
            return real(self, texts)
        with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
            m.setattr(Tokenizer, "encode_batch", encode)
            small(tmp_path/"out", sources)
        with pytest.raises(ValueError, match="are not finished"): open_tokens(tmp_path/"out")
        (tmp_path/"out"/".00-00001.safetensors.abc.new").write_bytes(b"left by a kill")
    small(tmp_path/"out", sources)
    assert folder_content(tmp_path/"out") == folder_content(tmp_path/"whole")
    with monkeypatch.context() as m:  # a finished one is not made again
        m.setattr(Tokenizer, "encode_batch", None)
        small(tmp_path/"out", sources)
        (tmp_path/"out"/"00-00001.safetensors").write_bytes(b"damaged")
        with pytest.raises(TypeError): small(tmp_path/"out", sources)
    small(tmp_path/"out", sources)
    assert folder_content(tmp_path/"out") == folder_content(tmp_path/"whole")

def test_the_number_of_workers_changes_nothing(tmp_path):
    sources = write_library(tmp_path)
    small(tmp_path/"one", sources)
    small(tmp_path/"two", sources, workers=2)
    assert folder_content(tmp_path/"one") == folder_content(tmp_path/"two")


def test_what_has_changed_is_said(tmp_path):
    sources = write_library(tmp_path)
    small(tmp_path/"out", sources)
    before = folder_content(tmp_path/"out")
    for options, message in [(dict(vocab_size=301), "vocab_size 300, now it is 301"), (dict(shard_tokens=4000), "shard_tokens 3000, now"),
                             (dict(tokenizer=learn_bpe(["other text"] * 9, 260)), "was begun with the tokenizer"),
                             (dict(sources=sources[:1]), "was begun with the sources .*text, .*lines.jsonl, not .*text")]:
        with pytest.raises(ValueError, match=message) as e: small(tmp_path/"out", **dict(sources=sources) | options)
        assert "\n" not in str(e.value) and "to begin anew" in str(e.value)
    (sources[0]/"007.txt").write_text("another")
    with pytest.raises(ValueError, match=r"the source .*text has changed since .* \(007.txt is another\)"): small(tmp_path/"out", sources)
    (sources[0]/"007.txt").unlink()
    with pytest.raises(ValueError, match=r"\(007.txt is gone\)"): small(tmp_path/"out", sources)
    assert folder_content(tmp_path/"out") == before

def test_nothing_to_prepare(tmp_path):
    (tmp_path/"empty.txt").write_text(" \n"); (tmp_path/"a.txt").write_text("a text " * 50)
    tok = learn_bpe([f"a text {i}" * 9 for i in range(99)], 270)
    for options, message in [(dict(sources=tmp_path/"empty.txt"), "the sources hold no text: there is nothing to train"),
                             (dict(sources=tmp_path/"empty.txt", tokenizer=tok, vocab_size=270), "there is no text in .*empty.txt; leave it out"),
                             (dict(sources=[tmp_path/"a.txt", tmp_path/"empty.txt"], tokenizer=tok), "there is no text in .*empty.txt; leave"),
                             (dict(tokenizer=tok, vocab_size=200), r"vocab_size 200 is too small: the tokenizer has ids up to 269; give 270"),
                             (dict(vocab_size=256), "needs 257 or more"), (dict(vocab_size=5000), "enough material for"),
                             (dict(tokenizer="no/such/file.json"), "there is no tokenizer file no/such/file.json"),
                             (dict(end_of_text="<eos>", tokenizer=tmp_path/"tok.json"), "has no token '<eos>' to put behind"),
                             (dict(workers=0), "workers is 0"), (dict(validation=1.5), "validation is 1.5; give a number above 0 and below 1"),
                             (dict(weights=[1, 2]), "2 weights for 1 sources"), (dict(out=tmp_path/"a.txt"/"out"), "can't be written .*choose another")]:
        tok.save(tmp_path/"tok.json")
        with pytest.raises((ValueError, OSError), match=message) as e:
            prepare(**dict(sources=tmp_path/"a.txt", out=tmp_path/"out", workers=1) | options)
        assert "\n" not in str(e.value)
        shutil.rmtree(tmp_path/"out", ignore_errors=True)

def test_a_vocabulary_beyond_16_bits(tmp_path):
    (tmp_path/"a.txt").write_text("some text " * 50)
    tok = learn_bpe([f"some text {i}" * 9 for i in range(99)], 270)
    tokens = prepare(tmp_path/"a.txt", tmp_path/"out", tok, vocab_size=70_000, workers=1)
    assert tokens[0:3].dtype == np.uint32 and tokens[0:len(tokens)].tolist() == tok.encode("some text " * 50) + [0]

def test_any_tokenizer_file(tmp_path):
    (tmp_path/"a.txt").write_text("some text " * 50)
    tok = learn_bpe([f"some text {i} @@" * 9 for i in range(99)], 270)
    tok.inner.enable_truncation(5); tok.inner.enable_padding(length=9)  # as files made for short sentences have it
    tok.save(tmp_path/"short.json")
    end = tok.inner.token_to_id("@")
    for workers in (1, 2):
        tokens = prepare(tmp_path/"a.txt", tmp_path/f"out{workers}", tmp_path/"short.json", workers=workers, end_of_text="@")
        tok.inner.no_truncation(); tok.inner.no_padding()
        assert tokens[0:len(tokens)].tolist() == tok.encode("some text " * 50) + [end]

def test_a_folder_has_one_writer(tmp_path):
    sources = write_library(tmp_path)
    with _folder(tmp_path/"out"), pytest.raises(OSError, match="another pythia_prepare is writing to it"): small(tmp_path/"out", sources)
    small(tmp_path/"out", sources)

@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_keeps_what_is_finished(tmp_path, monkeypatch, number):
    sources, written = write_library(tmp_path), []
    small(tmp_path/"whole", sources)
    def add(self, ids, ends, real=TokenWriter.add):
        written.append(len(ids))
        if sum(written) > 12_000: raise OSError(number, os.strerror(number))
        real(self, ids, ends)
    with monkeypatch.context() as m, pytest.raises(OSError, match=f"cannot write to .*out: {os.strerror(number)}; make room and run"):
        m.setattr(TokenWriter, "add", add)
        small(tmp_path/"out", sources)
    assert 0 < len(json.loads((tmp_path/"out"/MANIFEST).read_text())["shards"]) and not list((tmp_path/"out").glob(".*"))
    small(tmp_path/"out", sources)
    assert folder_content(tmp_path/"out") == folder_content(tmp_path/"whole")

def test_a_worker_that_dies(tmp_path, monkeypatch):
    class Dead:
        def submit(self, *args): return self
        def result(self): raise BrokenProcessPool
    with pytest.raises(OSError, match="a worker process has died: .* fewer workers"):
        list(encoded([Load(["x"], [True], None, 0)], None, None, Dead(), 1))
