"Tests of index. Generated from nbs/index.ipynb: edit that, then run pythia_book build."
import pythia_nb
import subprocess
import sys


def test_public_names():
    script = "import pythia_nb, pythia_nb.train, sys; assert all(getattr(pythia_nb, name) is not None for name in pythia_nb.__all__) and pythia_nb.__version__; " \
             "assert 'matplotlib' not in sys.modules and 'transformers' not in sys.modules; pythia_nb.patterns.local(2).layout(256)"
    subprocess.run([sys.executable, "-c", script], check=True)
