"Tests of 14_data. Generated from nbs/14_data.ipynb: edit that, then run pythia_book build."
import numpy as np
import pickle
import pytest
import torch
from pythia_nb.data import Batches, TokenView, held_out, merged, quotas, shuffled, split
from pythia_nb.tokens import JoinedTokens, TokenFile, open_tokens, write_tokens


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
    both = both[both[:, 0].argsort()]
    assert both[0, 0] == 0 and both[-1, 1] == len(file) and (both[1:, 0] == both[:-1, 1]).all()
    assert np.isin(both, file.offsets).all() and len(a.spans) <= len(b.spans) + 1

def test_split_of_shards_is_that_of_one_file(tmp_path):
    lengths = np.random.default_rng(5).integers(0, 200, 400)
    file = toy_file(tmp_path, lengths)
    for number, (a, b) in enumerate([(0, 150), (150, 151), (151, 400)]):
        write_tokens(tmp_path/"parts"/f"{number}.safetensors", [file[s:t] for s, t in file.bounds(np.arange(a, b))], 1000)
    for one, other in zip(split(file, 0.1), split(open_tokens(tmp_path/"parts"), 0.1)):
        assert np.array_equal(one.spans, other.spans) and np.array_equal(one[0:len(one)], other[0:len(other)])
        a, b = Batches(one, 32, 4, documents=True)[7], Batches(other, 32, 4, documents=True)[7]
        assert all(map(torch.equal, a, b))
    assert Batches(open_tokens(tmp_path/"parts"), 32, 4).fingerprint == Batches(open_tokens(tmp_path/"parts"), 32, 8).fingerprint

def test_merged_spans():
    assert merged(np.array([[0, 3], [3, 3], [3, 5], [7, 9], [9, 10], [12, 12]])).tolist() == [[0, 5], [7, 10]]
    assert merged(np.array([[4, 4]])).shape == merged(np.zeros((0, 2), np.int64)).shape == (0, 2)

def test_split_looks_at_few_documents(tmp_path, monkeypatch):
    file, seen = toy_file(tmp_path, np.random.default_rng(6).integers(1, 30, 5000)), []
    monkeypatch.setattr(TokenFile, "bounds", lambda self, d, real=TokenFile.bounds: seen.append(len(d)) or real(self, d))
    held = held_out(file, 0.01 * len(file), 0, block=20)
    lengths = np.diff(file.offsets)[held]
    assert 0.0095 * len(file) < lengths.sum() <= 0.01 * len(file) and sum(seen) < 200 and (np.diff(held) > 0).all()

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

def test_parts_make_the_batch(tmp_path):
    file = toy_file(tmp_path, np.random.default_rng(8).integers(1, 40, 100))
    batches = Batches(file, 16, 12, seed=4, documents=True)
    for step in (0, 5, 10**9):
        for world in (1, 2, 3, 4, 6, 12):
            parts = [batches.part(step, rank, world) for rank in range(world)]
            assert all(torch.equal(torch.cat(p), whole) for p, whole in zip(zip(*parts), batches[step]))
    assert torch.equal(batches.rows(3, 2, 5)[0], batches[3][0][2:5])
    with pytest.raises(ValueError, match="a batch of 12 samples can't be divided among 5 ranks"): batches.part(0, 0, 5)
    with pytest.raises(ValueError, match="rank 2 is not one of 0 to 1"): batches.part(0, 2, 2)

def test_a_mixture_keeps_its_weights_and_every_sample(tmp_path):
    parts = [write_tokens(tmp_path/str(s), [np.full(n, s)], 1000, "h") for s, n in enumerate([1000, 5000, 300])]
    batches = Batches(JoinedTokens(parts, [5, 3, 2]), 10, 64, seed=2)
    assert batches.windows == 99 + 499 + 29 and batches.first.tolist() == [0, 99, 598, 627]
    seen = np.concatenate([batches.chosen(step) for step in range(128)])  # two blocks of 4096
    source = np.searchsorted(batches.first, seen, side="right") - 1
    assert np.bincount(source).tolist() == (2 * quotas([0.5, 0.3, 0.2])).tolist()
    for s in range(3):  # within a source every window once an epoch
        counts = np.bincount(seen[source == s] - batches.first[s], minlength=batches.first[s + 1] - batches.first[s])
        assert counts.max() - counts.min() <= 1
    ids, targets = batches[77]
    assert (ids == torch.from_numpy(source[77 * 64:78 * 64])[:, None]).all() and (targets == ids).all()
    assert batches.fingerprint != Batches(JoinedTokens(parts, [5, 3, 3]), 10, 64, seed=2).fingerprint
    train, valid = split(batches.tokens, 0.1)
    assert train.weights == valid.weights == [0.5, 0.3, 0.2] and [len(p) for p in valid.parts] == [100, 500, 30]
    Batches(valid, 10, 4, documents=True)[3]
    with pytest.raises(ValueError, match="a weight of .* is less than one sample in 4,096"):
        Batches(JoinedTokens(parts, [1, 1, 1e-5]), 10, 4)

def test_quotas():
    for weights in ([1.0], [0.5, 0.5], [1 / 3] * 3, [0.999, 0.001], np.random.default_rng(0).dirichlet([1] * 9)):
        found = quotas(weights)
        assert found.sum() == 4096 and np.abs(found - np.asarray(weights) * 4096).max() < 1

def test_loader_gives_the_same_batches():
    batches = Batches(np.arange(5000), 16, 8, seed=1)
    for start, stop, ahead in [(0, 7, 2), (5, 6, 0), (3, 3, 2), (1, 4, 9)]:
        got = list(batches.loader(start, stop, rank=1, world=2, ahead=ahead))
        assert len(got) == stop - start
        for step, batch in zip(range(start, stop), got): assert all(map(torch.equal, batch, batches.part(step, 1, 2)))
    endless = batches.loader(40)
    assert torch.equal(next(endless)[0], batches[40][0]) and torch.equal(next(endless)[0], batches[41][0])
    endless.close()
    with pytest.raises(ValueError, match="can't be divided among 3"): next(batches.loader(rank=0, world=3))

def test_fingerprint_is_of_data_and_order(tmp_path):
    file = toy_file(tmp_path, [400, 300, 200])
    base = Batches(file, 16, 8, seed=1).fingerprint
    assert Batches(pickle.loads(pickle.dumps(file)), 16, 4, seed=1, documents=True).fingerprint == base
    others = [Batches(file, 15, 8, seed=1), Batches(file, 16, 8, seed=2), Batches(split(file, 0.3)[0], 16, 8, seed=1),
              Batches(split(file, 0.3)[1], 16, 8, seed=1), Batches(file.tokens, 16, 8, seed=1)]
    assert len({base, *(b.fingerprint for b in others)}) == 6
    assert others[-1].fingerprint == Batches(file.tokens.copy(), 16, 8, seed=1).fingerprint
