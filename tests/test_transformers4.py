"""The model under the oldest transformers that is supported; the other tests run under the newest."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OLDEST = ("transformers==4.57.1", "huggingface_hub==0.36.2", "tokenizers==0.22.2", "diffusers==0.36.0")
TESTS = ("models", "test_published_quick_start.py", "test_tokenizers.py")
# diffusers 0.36 asks for autocast on a GPU while it is imported, which torch remarks on where there is none.
NO_CUDA = "ignore:CUDA is not available or torch_xla is imported:UserWarning"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_tokenizer_on_transformers_4(tmp_path):
    """The older packages lie in a folder that is searched first; all else comes from this environment."""
    older = str(tmp_path / "packages")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--target", older, *OLDEST], check=True)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([older, str(ROOT)]), "OMP_NUM_THREADS": "1"}
    program = "import transformers, vtp.models.vtp_hf; print(transformers.__version__)"
    seen = subprocess.run(
        [sys.executable, "-c", program], env=env, cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert seen.stdout.strip() == "4.57.1"
    tests = [str(ROOT / "tests" / name) for name in TESTS]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", NO_CUDA, *tests],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
