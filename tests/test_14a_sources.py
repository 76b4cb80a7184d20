"Tests of 14a_sources. Generated from nbs/14a_sources.ipynb: edit that, then run pythia_book build."
import datasets
import gzip
import json
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pythia_nb.corpora import read_corpus, train_tokenizer
from pythia_nb.sources import open_source, sample_texts


TEXTS = ["one", "two\nlines", "", "  \n", "drei Äpfel 🦊", "a" * 300, "x\n\n\ny" * 50]

def write_sources(folder, texts=TEXTS, field="text"):
    "The same documents in every format, one below the other in a folder"
    folder.mkdir(exist_ok=True)
    kept = [t for t in texts if t.strip()]
    lines = "".join(json.dumps({field: t, "n": 1}) + "\n" for t in texts).encode()
    (folder/"a.txt").write_bytes("<|endoftext|>".join(texts).encode())
    (folder/"b.txt.gz").write_bytes(gzip.compress((folder/"a.txt").read_bytes()))
    (folder/"c.jsonl").write_bytes(lines)
    (folder/"d.jsonl.gz").write_bytes(gzip.compress(lines))
    with pa.CompressedOutputStream(str(folder/"e.jsonl.zst"), "zstd") as file: file.write(lines)
    pq.write_table(pa.table({"n": range(len(texts)), field: texts}), folder/"f.parquet", row_group_size=3)
    return kept

def texts_of(pieces):
    "Whole documents"
    texts, held = [], ""
    for piece in pieces:
        held += piece.text
        if piece.last: texts.append(held); held = ""
    return texts

def test_every_format_gives_the_same_documents(tmp_path):
    kept = write_sources(tmp_path/"in")
    for path in sorted((tmp_path/"in").iterdir()): assert texts_of(open_source(path).pieces()) == kept, path
    assert texts_of(open_source(tmp_path/"in").pieces()) == 6 * kept
    assert texts_of(open_source(tmp_path/"in"/"a.txt").pieces()) == read_corpus(tmp_path/"in"/"a.txt").texts

def test_a_stream_can_be_entered_behind_every_document(tmp_path):
    write_sources(tmp_path/"in", ["a<|endoftext|>b", *TEXTS])
    source = open_source(tmp_path/"in")
    whole = list(source.pieces())
    assert [p.read for p in whole] == sorted(p.read for p in whole) and whole[-1].read == source.size
    for n, piece in enumerate(whole):
        if piece.cursor is not None:
            assert list(source.pieces(json.loads(json.dumps(piece.cursor)))) == whole[n + 1:], n
    assert sum(p.cursor is None for p in whole) == 4  # behind "a" in records of two documents

def test_long_documents_come_in_pieces_that_change_no_token(tmp_path, monkeypatch):
    monkeypatch.setattr("pythia_nb.sources.PIECE", 100)
    text = "def f(x):\n\n    return x  \n\t\ny = 1   \n\r\n" * 40 + "z" * 500 + "\n  \n end \n\n"
    clean = text.replace("\r\n", "\n")
    (tmp_path/"a.txt").write_bytes(("short<|endoftext|>" + text + "<|endoftext|>" + text).encode())
    (tmp_path/"b.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("short", clean, clean)))
    a, b = (list(open_source(tmp_path/name).pieces()) for name in ("a.txt", "b.jsonl"))
    assert [p[:2] for p in a] == [p[:2] for p in b] and texts_of(a) == ["short", clean, clean] and len(a) > 20
    assert list(open_source(tmp_path/"a.txt").pieces(a[0].cursor)) == a[1:]
    for n, p in enumerate(a): assert (p.cursor is not None) == p.last
    tok = train_tokenizer([text], 280, cache=False)
    assert sum((tok.encode(p.text) for p in a[1:1 + len(a) // 2]), []) == tok.encode(clean)

def test_hugging_face_data_sets(tmp_path):
    kept = write_sources(tmp_path/"in")
    (tmp_path/"c.csv").write_text("text,n\nhello,1\nworld,2\n")
    data = datasets.Dataset.from_dict({"text": TEXTS})
    data.save_to_disk(tmp_path/"saved", num_shards=2)
    datasets.DatasetDict({"test": data}).save_to_disk(tmp_path/"dict")
    for spec, texts in [(f"hf:{tmp_path/'saved'}", kept), (f"hf:{tmp_path/'dict'}:test", kept),
                        (f"hf:{tmp_path/'c.csv'}:train", ["hello", "world"]), (f"hf:{tmp_path/'in'/'f.parquet'}", kept)]:
        source = open_source(spec)
        whole = list(source.pieces())
        assert texts_of(whole) == texts and source.facts()
        for n, piece in enumerate(whole):
            assert texts_of(source.pieces(json.loads(json.dumps(piece.cursor)))) == texts[n + 1:], (spec, n)
        assert texts_of(source.pieces()) == texts and source.facts() == open_source(spec).facts()

def test_folders_and_prefixes(tmp_path):
    for name in ("b/x.jsonl", "a.json", "c.bin", ".hidden.txt", "d.md.gz"):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/name).write_bytes(gzip.compress(b"dd") if name.endswith("gz") else b'{"text": "t"}\n')
    assert [(n, k) for _, n, k, _ in open_source(tmp_path).files] == [("a.json", "text"), ("b/x.jsonl", "jsonl"), ("d.md.gz", "text")]
    assert texts_of(open_source(f"jsonl:{tmp_path}").pieces()) == ["t", "t"]
    assert texts_of(open_source(f"jsonl:{tmp_path/'c.bin'}").pieces()) == ["t"]
    before = open_source(tmp_path).facts()
    (tmp_path/"a.json").write_bytes(b'{"text": "u"}\n')
    assert {n for n, fact in open_source(tmp_path).facts().items() if before[n] != fact} == {"a.json"}

@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", b'{"text": "x"}\n\n{"body": "y"}\n', "a.jsonl, line 3 has no field 'text', it has 'body'; name .* --text_field"),
    ("a.jsonl", b'{"text": null}\n', "a.jsonl, line 1: the field 'text' is NoneType, not text"),
    ("a.jsonl", b'[1]\n', "a.jsonl, line 1 is not a JSON object"), ("a.jsonl", b'{"text": \n', "a.jsonl, line 1 is not JSON"),
    ("a.jsonl", b'{"text": "K\xf6ln"}\n', "a.jsonl, line 1 is not UTF-8"),
    ("a.txt", b"ok\n" * 500_000 + b"K\xf6ln", r"a.txt is not UTF-8 text \(byte 1,500,001 is 0xf6\)"),
    ("a.txt", b"a\0b", "a.txt is a binary file"), ("a.txt.gz", b"no", "cannot read .*a.txt.gz: Not a gzipped"),
    ("a.txt.gz", gzip.compress(b"text" * 999, mtime=0)[:-9], "cannot read .*a.txt.gz: Compressed file ended"),
    ("a.jsonl.zst", b"no zstd at all", "cannot read .*a.jsonl.zst"), ("a.parquet", b"no", "cannot read .*a.parquet")])
def test_mistakes_in_files(tmp_path, name, content, message):
    (tmp_path/name).write_bytes(content)
    with pytest.raises((ValueError, OSError), match=message) as e: list(open_source(tmp_path/name).pieces())
    assert "\n" not in str(e.value)

def test_mistakes_in_sources(tmp_path, monkeypatch):
    (tmp_path/"bin").mkdir()
    (tmp_path/"bin"/"x.json.bin").write_bytes(b"x")
    pq.write_table(pa.table({"a": ["x"], "n": [1]}), tmp_path/"p.parquet")
    datasets.Dataset.from_dict({"body": ["x"]}).save_to_disk(tmp_path/"saved")
    for spec, field, message in [
            (tmp_path/"none", "text", "there is no file or folder"), (f"jsonl:{tmp_path/'bin'}", "text", "no jsonl in the folder"),
            (tmp_path/"p.parquet", "text", "p.parquet has no field 'text', it has 'a', 'n'"),
            (tmp_path/"p.parquet", "n", "p.parquet, row 1: the field 'n' is int, not text"),
            (f"hf:{tmp_path/'saved'}", "text", "example 1 has no field 'text', it has 'body'"),
            (f"hf:{tmp_path/'p.parquet'}:test", "a", "cannot open the data set .* check its name"),
            ("hf:", "text", "is not hf:NAME")]:
        with pytest.raises((ValueError, OSError), match=message) as e: list(open_source(spec, field).pieces())
        assert "\n" not in str(e.value)
    monkeypatch.setattr("pythia_nb.sources.importlib.import_module", lambda name: (_ for _ in ()).throw(ModuleNotFoundError(name=name)))
    with pytest.raises(ImportError, match=r"needs datasets, which is not installed: pip install 'pythia_nb\[data\]'"): open_source("hf:x")

def test_samples_are_spread_over_the_sources(tmp_path):
    for name in "ab": (tmp_path/f"{name}.jsonl").write_text("".join(json.dumps({"text": f"{name}{i:07}" * 4}) + "\n" for i in range(1000)))
    sources = [open_source(tmp_path/f"{name}.jsonl") for name in "ab"]
    assert len(sample_texts(sources)) == 2000
    some = sample_texts(sources, 6400)
    assert sum(map(len, some)) <= 6400 and {t[0] for t in some} == {"a", "b"} and int(some[-1][1:8]) > 800 and len(some) > 100
