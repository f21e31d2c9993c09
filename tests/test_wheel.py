"""The source archive, and the wheel made of it, as `python -m build` does: installed alone, used from elsewhere."""

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import fastgate as fg

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    archive = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", archive, folder, cwd=ROOT)
    (sources,) = folder.glob("*.tar.gz")
    options = ("--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--wheel-dir", folder)
    run(sys.executable, "-m", "pip", "wheel", "-q", *options, sources, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


def test_everything_is_in_it(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, package in (("fastgate", "fastgate"), ("kernels", "fastgate/kernels")):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".jinja", ".typed"):
                assert f"{package}/{path.relative_to(ROOT / folder)}" in names
    assert not any(name.startswith(("tests", "bench", "kernels", "examples")) for name in names)
    (metadata,) = (name for name in names if name.endswith("METADATA"))
    text = zipfile.ZipFile(wheel).read(metadata).decode()
    assert f"Version: {fg.__version__}\n" in text and "Provides-Extra: export" in text
    # what the library itself needs, and no more
    needed = {line.split()[1].split(">")[0].split("<")[0] for line in text.splitlines()
              if line.startswith("Requires-Dist") and "extra ==" not in line}  # fmt: skip
    assert needed == {"torch", "numpy", "nvidia-ml-py", "safetensors"}


@pytest.mark.slow
def test_it_works_installed_alone(wheel: Path, tmp_path: Path) -> None:
    """In an environment that shares what is installed here, but not this checkout."""
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    (Path(packages) / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(python, "-m", "pip", "install", "-q", "--no-deps", "--disable-pip-version-check", wheel, cwd=tmp_path)
    assert run(python, "-c", "import fastgate; print(fastgate.__file__)", cwd=tmp_path).startswith(packages)
    command = tmp_path / "venv" / "bin" / "fastgate"
    assert fg.__version__ in run(command, "env", cwd=tmp_path)
    table = run(
        command, "train", "--preset", "demo", "--epochs", "3", "--output", "run", "--device", "cpu", cwd=tmp_path
    )
    assert "compact" in table
    run(command, "report", "run", cwd=tmp_path)


def test_without_what_the_command_line_needs(tmp_path: Path) -> None:
    code = "import sys; sys.modules['typer'] = None; from fastgate.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: typer is not installed; the command line needs `pip install 'fastgate[train]'`\n"
