"Tests of 14_data. Generated from nbs/14_data.ipynb: edit that, then run pythia_book build."
import numpy as np
import os
import pytest
import torch
from pythia_nb.data import (
    Batches, NOT_TEXT, TokenFile, TokenView, cache_folder, learn_bpe, read_corpus, shuffled, split, stdlib_corpus,
    tokenize, train_tokenizer, write_tokens,
)
from pythia_nb.generate import END_OF_TEXT


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
    monkeypatch.setattr("pythia_nb.data.learn_bpe", None)  # from here on only the cache can answer
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
    tok = train_tokenizer(toy_texts(), 300)
    tokens = tokenize(toy_texts(), tok)
    assert capsys.readouterr().out.count("can't be written") == 1 and len(tokens) > 0
    assert cache_folder() == tokens.path.parent and train_tokenizer(toy_texts(), 300).hash == tok.hash
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


@pytest.mark.parametrize("vocab_size, dtype", [(300, np.uint16), (65_536, np.uint16), (65_537, np.uint32),
                                               (150_000, np.uint32)])
@pytest.mark.parametrize("lengths", [[5], [1, 2, 3], [7, 0, 1], [1000, 1, 999]])
def test_token_file_round_trip(tmp_path, vocab_size, dtype, lengths):
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, vocab_size, n) for n in lengths]
    documents[0][0] = vocab_size - 1
    file = write_tokens(tmp_path/"x"/"t.safetensors", iter(documents), vocab_size, "abc")
    assert (file.tokens.dtype, len(file), file.documents) == (dtype, sum(lengths), len(lengths))
    assert (file.vocab_size, file.tokenizer_hash) == (vocab_size, "abc")
    for i, d in enumerate(documents): assert np.array_equal(file[file.offsets[i]:file.offsets[i + 1]], d)
    assert file.segments(0, len(file)).tolist() == [i for i, n in enumerate(lengths) for _ in range(n)]
    assert not file.tokens.flags.writeable and [p.name for p in (tmp_path/"x").iterdir()] == ["t.safetensors"]

def test_token_file_is_safetensors(tmp_path):
    from safetensors.numpy import load_file
    write_tokens(tmp_path/"t", [[1, 2, 3], [4, 0]], 10)
    arrays = load_file(tmp_path/"t")
    assert arrays["tokens"].tolist() == [1, 2, 3, 4, 0] and arrays["offsets"].tolist() == [0, 3, 5]

def test_token_file_mistakes(tmp_path):
    path = tmp_path/"t"
    whole = write_tokens(path, [[1, 2, 3], [4, 0]], 10) and path.read_bytes()
    for damaged in (whole[:-1], whole + b"x", whole[:1040], whole[:500]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged: its header speaks of"): TokenFile(path)
    for other in (b"", b"hello", b"\xff" * 2000, (10).to_bytes(8, "little") + b"{}        ", whole[:200]):
        path.write_bytes(other)
        with pytest.raises(ValueError, match="is not a token file"): TokenFile(path)
    with pytest.raises(FileNotFoundError, match="cannot read the token file"): TokenFile(tmp_path/"none")
    for ids in ([3, 10], [-1]):
        with pytest.raises(ValueError, match="document 1 has ids from .* outside a vocabulary of 10"):
            write_tokens(tmp_path/"u", [[1], ids], 10)
    with pytest.raises(ValueError, match="there are no tokens to write"): write_tokens(tmp_path/"u", [], 10)
    assert not (tmp_path/"u").exists()
    with pytest.raises(ValueError, match="the corpus is empty"): tokenize([], None)

def test_tokenize_and_its_cache(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYTHIA_NB_CACHE", str(tmp_path/"cache"))
    texts = toy_texts(300, 20)
    tok = train_tokenizer(texts, 300)
    a, b = tokenize(texts, tok, progress=False), tokenize(texts, tok, tmp_path/"mine")
    assert np.array_equal(a.tokens, b.tokens) and a.tokenizer_hash == tok.hash and a.documents == 300
    for i in (0, 255, 256, 299): assert a[a.offsets[i]:a.offsets[i + 1]].tolist() == tok.encode(texts[i]) + [0]
    a.path.write_bytes(a.path.read_bytes()[:-1])
    assert len(tokenize(texts, tok)) == len(b) and "is damaged; writing it again" in capsys.readouterr().out
    assert len(tokenize(texts[:-1], tok)) < len(b)


def toy_file(folder, lengths, vocab_size=1000, seed=0):
    "A token file with documents of these lengths and ids that are all different from their neighbours"
    rng = np.random.default_rng(seed)
    return write_tokens(folder/f"{seed}.tokens", [rng.integers(1, vocab_size, n) for n in lengths], vocab_size)

@pytest.mark.parametrize("seed", range(5))
def test_a_view_reads_like_one_row(tmp_path, seed):
    rng = np.random.default_rng(seed)
    file = toy_file(tmp_path, rng.integers(0, 30, 20) + (np.arange(20) == 3))
    spans = np.sort(rng.integers(0, len(file) + 1, (8, 2)), axis=1)
    view, row = TokenView(file, spans), np.concatenate([file[a:b] for a, b in spans])
    documents = np.concatenate([file.segments(a, b) for a, b in spans])
    assert len(view) == len(row)
    for _ in range(50):
        a, b = np.sort(rng.integers(0, len(row) + 1, 2))
        assert np.array_equal(view[a:b], row[a:b]) and view[a:b].dtype == file.tokens.dtype
        if a < b: assert np.array_equal(view.segments(a, b), documents[a:b])

def test_split_is_by_documents_and_repeatable(tmp_path):
    file = toy_file(tmp_path, np.random.default_rng(1).integers(10, 200, 300))
    (a, b), (c, d), (e, f) = split(file), split(file), split(file, seed=1)
    assert np.array_equal(b.spans, d.spans) and not np.array_equal(b.spans, f.spans)
    assert 0.045 < len(b) / len(file) <= 0.05 and len(a) + len(b) == len(file)
    both = np.concatenate([a.spans, b.spans])
    assert np.array_equal(both[both[:, 0].argsort()], np.stack([file.offsets[:-1], file.offsets[1:]], 1))

@pytest.mark.parametrize("lengths", [[1000], [900, 100], [10_000, 5, 5], [20]])
def test_split_of_few_documents_cuts_the_end(tmp_path, lengths):
    file = toy_file(tmp_path, lengths)
    a, b = split(file, 0.05)
    assert np.array_equal(np.concatenate([a[0:len(a)], b[0:len(b)]]), file.tokens)
    assert len(b) == max(1, sum(lengths) // 20)

def test_split_mistakes(tmp_path):
    for part in (0, 1, -1, 2):
        with pytest.raises(ValueError, match=f"validation is {part}; give the part"):
            split(toy_file(tmp_path, [10]), part)


@pytest.mark.parametrize("n", [*range(1, 40), 255, 256, 257, 10_000, 99_999])
def test_shuffled_is_a_permutation(n):
    for seed, epoch in [(0, 0), (0, 1), (7, 0), (2**40, 3)]:
        assert np.array_equal(np.sort(shuffled(np.arange(n), n, seed, epoch)), np.arange(n))

def test_shuffled_looks_random():
    n = 20_000
    p, q, s = (shuffled(np.arange(n), n, *key) for key in [(0, 0), (0, 1), (1, 0)])
    for x in (p, q, s):
        assert abs(np.corrcoef(x, np.arange(n))[0, 1]) < 0.03 and abs(np.corrcoef(x[1:], x[:-1])[0, 1]) < 0.03
    for x, y in ((p, q), (p, s), (q, s)): assert abs(np.corrcoef(x, y)[0, 1]) < 0.03 and (x == y).sum() < 20
    assert (np.diff(p) == 1).sum() < 10  # hardly any neighbours stay neighbours
    first = shuffled(np.zeros(4000), 10, 0, np.arange(4000))  # a short permutation over many epochs
    assert np.abs(np.bincount(first, minlength=10) - 400).max() < 5 * np.sqrt(400)

def test_shuffled_entries_stand_alone():
    n = 10**12 + 39
    i = np.random.default_rng(0).integers(0, n, 100)
    all_at_once, epochs = shuffled(i, n, 5, 2), np.arange(100) % 3
    assert all_at_once.max() < n and np.array_equal(all_at_once[[7, 3]], shuffled(i[[7, 3]], n, 5, 2))
    assert [int(shuffled(i[k], n, 5, epochs[k])) for k in range(9)] == shuffled(i, n, 5, epochs)[:9].tolist()


@pytest.mark.parametrize("n, seq_len, batch_size",
                         [(1001, 10, 7), (100, 99, 1), (1000, 10, 10), (57, 4, 20), (2, 1, 1)])
def test_an_epoch_sees_every_window_once(n, seq_len, batch_size):
    batches, seen = Batches(np.arange(n), seq_len, batch_size, seed=3), []
    assert batches.windows == (n - 1) // seq_len
    for step in range(-(-3 * batches.windows // batch_size)):
        ids, targets = batches[step]
        assert ids.dtype == targets.dtype == torch.int64 and ids.shape == targets.shape == (batch_size, seq_len)
        assert torch.equal(targets, ids + 1)
        seen += (ids[:, 0] // seq_len).tolist()
    epochs = [seen[e * batches.windows:(e + 1) * batches.windows] for e in range(3)]
    for e in epochs: assert sorted(e) == list(range(batches.windows))
    if batches.windows > 50: assert epochs[0] != epochs[1] != epochs[2]

def test_batches_are_a_function_of_seed_and_step(tmp_path):
    train, valid = split(toy_file(tmp_path, np.random.default_rng(2).integers(10, 90, 200)))
    a, b = Batches(train, 16, 4, seed=1), Batches(train, 16, 4, seed=1)
    for step in (9, 0, 500, 3, 9): b[step]
    for step in (3, 10**12, 0): assert all(torch.equal(x, y) for x, y in zip(a[step], b[step]))
    assert not torch.equal(a[0][0], Batches(train, 16, 4, seed=2)[0][0])
    whole, halves = Batches(train, 16, 8, seed=1), [Batches(train, 16, 4, seed=1)[s][0] for s in (6, 7)]
    assert torch.equal(whole[3][0], torch.cat(halves))  # the order of samples does not depend on the batch size

def test_segments_number_the_documents_of_a_sample(tmp_path):
    file = toy_file(tmp_path, [5, 0, 7, 1, 20, 3, 30])
    truth = np.repeat(np.arange(7), [5, 0, 7, 1, 20, 3, 30])
    for view in (file, TokenView(file, [(0, 12), (13, 66)])):
        kept = truth if view is file else np.concatenate([truth[:12], truth[13:]])
        batches = Batches(view, 8, 3, documents=True)
        for step in range(4):
            ids, targets, segments = batches[step]
            for row, w in zip(segments, batches.chosen(step)):
                d = kept[8 * w:8 * w + 8]
                assert row.tolist() == (d - d[0]).tolist() and segments.dtype == torch.int64

def test_batches_mistakes():
    with pytest.raises(ValueError, match="the text has 10 tokens, but one sample of seq_len 10 needs 11"):
        Batches(np.arange(10), 10, 1)
    for options in (dict(seq_len=0), dict(batch_size=0), dict(seed=-1)):
        with pytest.raises(ValueError, match=r"(seq_len|batch_size|seed) is"):
            Batches(np.arange(10), **{**dict(seq_len=2, batch_size=1), **options})
    with pytest.raises(IndexError, match="step -1 is negative"): Batches(np.arange(10), 2, 1)[-1]
