"""What is installed is what is in the tree."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAPPED = ("kernels", "passes", "export")


def setuptools_table():
    """The ``[tool.setuptools]`` table."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def source_files():
    """Every file of Python or C that should be in the wheel, by its path there."""
    files = {path.relative_to(ROOT) for path in (ROOT / "uta_fx").rglob("*.py")}
    sources = [path for folder in MAPPED for path in (ROOT / folder).iterdir()]
    files |= {Path("uta_fx") / p.relative_to(ROOT) for p in sources if p.suffix in (".py", ".c")}
    return {path.as_posix() for path in files}


def test_every_folder_is_listed_as_a_package():
    """A folder that is missing from the list is silently absent from the wheel."""
    folders = {Path(path).parent.as_posix().replace("/", ".") for path in source_files()}
    assert folders == set(setuptools_table()["packages"])


@pytest.mark.parametrize("folder", MAPPED)
def test_mapped_folders_are_flat_and_shadow_nothing(folder):
    """No __init__.py: a bare ``import kernels`` must keep finding Hugging Face's."""
    assert not (ROOT / folder / "__init__.py").exists()
    assert not [path for path in (ROOT / folder).iterdir() if path.is_dir() and path.name[0] != "_"]
    assert (ROOT / "uta_fx" / folder).is_symlink()


def test_a_wheel_holds_every_file(tmp_path):
    """Built from the tree, with the weights and the marker for type checkers."""
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert source_files() <= names
    assert "uta_fx/py.typed" in names
    weights = ROOT / "uta_fx" / "moving_shapes" / "weights"
    shipped = {p.relative_to(ROOT).as_posix() for p in weights.rglob("*") if p.is_file()}
    assert shipped and shipped <= names
    assert sum(path.stat().st_size for path in weights.rglob("*") if path.is_file()) <= 30e6
