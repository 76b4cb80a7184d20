"Tests of 13b_tokens. Generated from nbs/13b_tokens.ipynb: edit that, then run pythia_book build."
import json
import numpy as np
import os
import pickle
import pytest
from pythia_nb.corpora import train_tokenizer
from pythia_nb.tokens import JoinedTokens, MANIFEST, TokenFile, open_tokens, token_writer, tokenize, write_tokens


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
    texts = [" ".join(f"word{i * j % 97}" for j in range(20)) for i in range(300)]
    tok = train_tokenizer(texts, 270)
    a, b = tokenize(texts, tok, progress=False), tokenize(texts, tok, tmp_path/"mine")
    assert np.array_equal(a.tokens, b.tokens) and a.tokenizer_hash == tok.hash and a.documents == 300
    for i in (0, 255, 256, 299): assert a[a.offsets[i]:a.offsets[i + 1]].tolist() == tok.encode(texts[i]) + [0]
    a.path.write_bytes(a.path.read_bytes()[:-1])
    assert len(tokenize(texts, tok)) == len(b) and "is damaged; writing it again" in capsys.readouterr().out
    assert len(tokenize(texts[:-1], tok)) < len(b)



def test_a_document_in_several_calls(tmp_path):
    with token_writer(tmp_path/"t", 100, "h") as writer:
        for ids, ends in [([1, 2], []), ([3], [1]), ([4, 5, 6, 7], [1, 3]), ([8], [1])]: writer.add(np.array(ids), ends)
    file = TokenFile(tmp_path/"t")
    assert file.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8] and file.offsets.tolist() == [0, 3, 4, 6, 8]
    assert file.bounds(np.array([2, 0])).tolist() == [[4, 6], [0, 3]]

def test_a_token_file_that_changes_while_in_use(tmp_path):
    path = tmp_path/"t"
    file, late, whole = write_tokens(path, [[1, 2, 3], [4, 0]], 10), TokenFile(path), path.read_bytes()
    assert file[0:5].tolist() == [1, 2, 3, 4, 0] and len(late) == 5
    os.truncate(path, 1000)
    for read in (lambda: file[0:2], lambda: file.segments(0, 2), lambda: file.bounds(np.array([0])), lambda: late[0:2]):
        with pytest.raises(ValueError, match="changed while it was in use|is damaged"): read()
    path.write_bytes(whole)
    file, late = TokenFile(path), TokenFile(path)
    assert file[0:2].tolist() == [1, 2]
    path.unlink()
    assert file[0:5].tolist() == [1, 2, 3, 4, 0] and file.segments(2, 4).tolist() == [0, 1]  # the map outlives the name
    for read in (lambda: late[0:2], lambda: TokenFile(path)):
        with pytest.raises(FileNotFoundError, match="cannot read the token file"): read()
    path.write_bytes(whole)
    again = pickle.loads(pickle.dumps(file))
    assert again.fingerprint == file.fingerprint and len(pickle.dumps(file)) < 500


def toy_parts(folder, seed=0):
    "Three token files, one of them with empty documents at its ends, and all documents in one list"
    rng, parts, everything = np.random.default_rng(seed), [], []
    for number, lengths in enumerate([[3, 4], [0, 1, 0, 9, 0], [5, 2, 6]]):
        documents = [rng.integers(1, 1000, n).tolist() for n in lengths]
        parts.append(write_tokens(folder/f"{number}.safetensors", documents, 1000, "h"))
        everything += documents
    return parts, everything

def test_joined_files_read_like_one(tmp_path):
    parts, documents = toy_parts(tmp_path/"parts")
    whole = write_tokens(tmp_path/"whole", documents, 1000, "h")
    for joined in (JoinedTokens(parts), open_tokens(tmp_path/"parts"), JoinedTokens([JoinedTokens(parts[:2]), parts[2]]),
                   open_tokens([tmp_path/"parts"/f"{i}.safetensors" for i in range(3)])):
        assert (len(joined), joined.documents) == (len(whole), whole.documents) == (30, 10)
        for a in range(31):
            for b in range(a, 31):
                assert np.array_equal(joined[a:b], whole[a:b]) and joined[a:b].dtype == np.uint16
                assert np.array_equal(joined.segments(a, b), whole.segments(a, b))
        some = np.array([9, 0, 4, 5, 2, 7])
        assert np.array_equal(joined.bounds(some), whole.bounds(some))
    assert joined.fingerprint == open_tokens(tmp_path/"parts").fingerprint != JoinedTokens(parts[::-1]).fingerprint
    assert pickle.loads(pickle.dumps(joined)).fingerprint == joined.fingerprint

def test_fingerprints_notice_changes(tmp_path):
    rows = [list(range(1, 2000)), [5, 6, 7]]
    base, seen = write_tokens(tmp_path/"t", rows, 5000, "h").fingerprint, set()
    assert write_tokens(tmp_path/"copy", rows, 5000, "h").fingerprint == base
    for n, (changed, vocab, tok) in enumerate([([[9, *rows[0][1:]], rows[1]], 5000, "h"), (rows, 5001, "h"),
            (rows, 5000, "g"), ([rows[0], [5, 6, 8]], 5000, "h"), ([rows[0] + [5], [6, 7]], 5000, "h"), (rows[:1], 5000, "h")]):
        seen.add(write_tokens(tmp_path/str(n), changed, vocab, tok).fingerprint)
    assert len(seen) == 6 and base not in seen

def test_open_tokens_mistakes(tmp_path):
    parts, _ = toy_parts(tmp_path/"parts")
    other = write_tokens(tmp_path/"other", [[1]], 1000, "another")
    (tmp_path/"none").mkdir()
    for call, error, message in [
            (lambda: open_tokens(tmp_path/"none"), FileNotFoundError, "there are no token files in .* pythia_prepare"),
            (lambda: open_tokens(tmp_path/"missing"), FileNotFoundError, "cannot read the token file .*missing"),
            (lambda: open_tokens([]), ValueError, "there are no token files to join"),
            (lambda: open_tokens(other.path, [1]), ValueError, "is a single file, there is nothing to mix"),
            (lambda: open_tokens([tmp_path/"parts", other.path]), ValueError, "were made with different tokenizers"),
            (lambda: JoinedTokens(parts, [1, 2]), ValueError, "there are 2 weights for 3 sources"),
            (lambda: JoinedTokens(parts, [1, 2, 0]), ValueError, "weights are 1, 2, 0; give positive numbers")]:
        with pytest.raises(error, match=message) as e: call()
        assert "\n" not in str(e.value)

def test_manifest_of_a_folder(tmp_path):
    parts, _ = toy_parts(tmp_path)
    shards = [dict(name=p.path.name, source=s, tokens=len(p), documents=p.documents) for p, s in zip(parts, (0, 0, 1))]
    def put(**changes):
        manifest = dict(sources=["a", "b"], shards=shards, complete=True, validation=0.1) | changes
        (tmp_path/MANIFEST).write_text(json.dumps(manifest)); return tmp_path
    assert len(open_tokens(put()).parts) == 3 and open_tokens(put()).validation == 0.1
    assert open_tokens(put(), [1, 3]).weights == open_tokens(put(weights=[1, 3])).weights == [0.25, 0.75]
    assert [len(p) for p in open_tokens(put(), [1, 3]).parts] == [17, 13]
    for folder, message in [(lambda: put(complete=False), r"not finished \(3 shards so far\); run the same"),
                            (lambda: put(shards=[shards[0] | dict(tokens=8)]), "has 7 tokens, but tokens.json says 8")]:
        with pytest.raises(ValueError, match=message): open_tokens(folder())
    (put()/parts[1].path.name).unlink()
    with pytest.raises(FileNotFoundError, match="cannot read the token file .*1.safetensors"): open_tokens(tmp_path)
    (tmp_path/MANIFEST).write_text("{")
    with pytest.raises(ValueError, match="tokens.json is damaged"): open_tokens(tmp_path)
