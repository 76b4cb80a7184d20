"Tests of 05c_native. Generated from nbs/05c_native.ipynb: edit that, then run pythia_book build."
import ctypes
import os
import pytest
import subprocess
import sys
from pythia_nb.native import BuildError, compiled, compiler, intact, target


TINY = 'extern "C" int answer() { return 41 + 1; }'
def answer(): return ctypes.CDLL(str(compiled(TINY))).answer()

def test_a_corrupted_file_is_rebuilt(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHIA_NB_CACHE", str(tmp_path))
    assert answer() == 42
    path = compiled(TINY)
    whole = path.read_bytes()
    for broken in (whole[:1000], whole[:-1], b"", whole[:500] + b"x" + whole[501:]):
        damaged = tmp_path / "damaged"
        damaged.write_bytes(broken)
        os.replace(damaged, path)
        assert not intact(path) and intact(compiled(TINY)) and answer() == 42

RACE = '''
import ctypes, sys
from pythia_nb.native import compiled
print(ctypes.CDLL(str(compiled(sys.argv[1]))).answer())
'''

def test_two_processes_may_start_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHIA_NB_CACHE", str(tmp_path))
    both = [subprocess.Popen([sys.executable, "-c", RACE, TINY], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [p.communicate()[0].strip() for p in both] == ["42"] * 3
    assert [f.suffix for f in tmp_path.iterdir()] == [".so"]


def test_a_missing_or_failing_compiler_gets_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHIA_NB_CACHE", str(tmp_path))
    with pytest.raises(BuildError, match="failed: .*error") as error: compiled("this is no code")
    assert "\n" not in str(error.value)
    monkeypatch.setenv("PATH", str(tmp_path)); monkeypatch.delenv("CXX", raising=False)
    compiler.cache_clear(); target.cache_clear()
    with pytest.raises(BuildError, match="no C\\+\\+ compiler; install one"): compiled(TINY)
    monkeypatch.undo()
    compiler.cache_clear(); target.cache_clear()
    monkeypatch.setenv("PYTHIA_NB_CACHE", "/dev/null/cache")
    with pytest.raises(BuildError, match="name another folder"): compiled(TINY)
