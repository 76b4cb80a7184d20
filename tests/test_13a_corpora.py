"Tests of 13a_corpora. Generated from nbs/13a_corpora.ipynb: edit that, then run pythia_book build."
import numpy as np
import os
import pytest
from pythia_nb.corpora import NOT_TEXT, cache_folder, learn_bpe, read_corpus, stdlib_corpus, train_tokenizer
from pythia_nb.tokenizer import END_OF_TEXT


def write_files(folder, files):
    "Write {name: text or bytes} below a folder"
    for name, content in files.items():
        path = folder/name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder

def test_read_corpus_takes_text_in_order(tmp_path):
    write_files(tmp_path, {"b.txt": "two\r\n", "a/z.py": "one", "a.md": "\ufeffzero", "c.bin": b"\0",
                           ".git/x.txt": "no", "d.txt": "  \n",
                           "e.txt": "three<|endoftext|>\nfour"})
    corpus = read_corpus(tmp_path)
    assert corpus.texts == ["zero", "one", "two\n", "three", "\nfour"]
    assert corpus.names == ["a.md", "a/z.py", "b.txt", "e.txt", "e.txt"]
    assert read_corpus(tmp_path, extensions=[".py"]).texts == ["one"]
    assert read_corpus(tmp_path/"b.txt").texts == ["two\n"]
    assert "1 document," in repr(read_corpus(tmp_path/"b.txt")) and corpus.nbytes == sum(len(t) for t in corpus)

def test_corpus_mistakes(tmp_path, monkeypatch):
    write_files(tmp_path, {"empty.txt": "", "bin.txt": b"a\0b", "latin.txt": b"K\xf6ln", "none/x.exe": "x"})
    for name, error, message in [("empty.txt", ValueError, "is empty: there is nothing to train on"),
                                 ("bin.txt", ValueError, "is a binary file"),
                                 ("latin.txt", ValueError, r"is not UTF-8 text \(byte 1 is 0xf6\)"),
                                 ("none", ValueError, "no text in the folder"),
                                 ("nothing", FileNotFoundError, "there is no file or folder")]:
        with pytest.raises(error, match=message) as e: read_corpus(tmp_path/name)
        assert "\n" not in str(e.value)
    with pytest.raises(FileNotFoundError, match="has no library sources"): stdlib_corpus(tmp_path)
    def scandir(folder, real=os.scandir):
        if str(folder).endswith("locked"): raise PermissionError(13, "Permission denied", str(folder))
        return real(folder)
    write_files(tmp_path, {"texts/a.txt": "a", "texts/locked/b.txt": "b", "texts/.locked/c.txt": "c"})
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(OSError, match="cannot read the folder .*texts/locked: Permission"): read_corpus(tmp_path/"texts")
    if hasattr(os, "geteuid") and os.geteuid() != 0:
        (tmp_path/"empty.txt").chmod(0)
        with pytest.raises(OSError, match="cannot read"): read_corpus(tmp_path/"empty.txt")

def test_stdlib_corpus_is_source_and_nothing_else(tmp_path):
    corpus = read_corpus()
    assert corpus.texts == stdlib_corpus().texts and len(corpus) > 300
    assert {"argparse.py", "json/decoder.py"} <= set(corpus.names)
    assert not any(NOT_TEXT & set(n.split("/")[:-1]) for n in corpus.names)
    write_files(tmp_path, {"site-packages/a.py": "x", "test/b.py": "x", "c.py": "y", "_sysconfigdata_1.py": "x",
                           "lib/tests/d.py": "x"})
    assert stdlib_corpus(tmp_path).names == ["c.py"]


WORDS = "def class return import self for while if else None True False lambda yield raise try except with pass".split()

def toy_texts(n=40, words=200, seed=0):
    "Documents of random Python words and numbers"
    rng = np.random.default_rng(seed)
    return [" ".join(f"{WORDS[i]}{i * j % 97}" for i, j in rng.integers(0, len(WORDS), (words, 2))) for _ in range(n)]

def test_tokenizer_is_deterministic_and_cached(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYTHIA_NB_CACHE", str(tmp_path/"cache"))
    texts = toy_texts()
    a = train_tokenizer(texts, 400)
    files = list((tmp_path/"cache").iterdir())
    assert len(files) == 1 and a.vocab_size == 400 and a.eos_id == 0 and a.encode(END_OF_TEXT) == [0]
    assert train_tokenizer(texts, 400, cache=False).hash == a.hash
    monkeypatch.setattr("pythia_nb.corpora.learn_bpe", None)  # from here on only the cache can answer
    assert train_tokenizer(list(texts), 400).hash == a.hash
    monkeypatch.undo(); monkeypatch.setenv("PYTHIA_NB_CACHE", str(tmp_path/"cache"))
    train_tokenizer(texts, 401); train_tokenizer(texts[::-1], 400)
    assert len(list((tmp_path/"cache").iterdir())) == 3
    for damage in (b"", b"{", files[0].read_bytes()[:-200]):
        files[0].write_bytes(damage)
        assert train_tokenizer(texts, 400).hash == a.hash and "is damaged; training it again" in capsys.readouterr().out
    assert train_tokenizer(texts, 400).hash == a.hash and not capsys.readouterr().out
    assert a.decode(a.encode("ünï 🦊\n\n  x")) == "ünï 🦊\n\n  x"

def test_cache_folder(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PYTHIA_NB_CACHE", str(tmp_path)); assert cache_folder() == tmp_path
    monkeypatch.delenv("PYTHIA_NB_CACHE"); monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path/"pythia_nb"
    monkeypatch.setenv("XDG_CACHE_HOME", "~nobody-of-this-name/cache"); assert cache_folder().is_absolute()
    assert "there is no home folder" in capsys.readouterr().out
    (tmp_path/"file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path/"file"))  # as good as a home folder that can't be written
    tok, folder = train_tokenizer(toy_texts(), 300), cache_folder()
    assert capsys.readouterr().out.count("can't be written") == 1 and len(list(folder.glob("bpe-*.json"))) == 1
    assert cache_folder() == folder and train_tokenizer(toy_texts(), 300).hash == tok.hash
    monkeypatch.setenv("PYTHIA_NB_CACHE", str(tmp_path/"file"))
    with pytest.raises(OSError, match="cannot write the cache .* set PYTHIA_NB_CACHE"):
        train_tokenizer(toy_texts(), 300)

def test_tokenizer_mistakes():
    with pytest.raises(ValueError, match="the corpus is empty"): train_tokenizer([])
    with pytest.raises(ValueError, match="vocab_size is 256; a byte-level tokenizer needs 257"):
        train_tokenizer(["x"], 256, cache=False)
    with pytest.raises(ValueError, match=r"enough material for \d+ ids only, 10,000 were asked for"):
        train_tokenizer(["abc abc"], cache=False)
    assert learn_bpe(toy_texts(), 300, sample=1000).hash == learn_bpe(toy_texts(), 300, sample=1000).hash
