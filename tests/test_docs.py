"""The pages under docs/: what they show runs, and every public name is in the reference."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastgate as fg
from bench import families
from tests.training.data.pictures import write_splits

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path.stem for path in DOCS.glob("*.md"))
# what a page says for real images, as small as a test can be
SMALLER = (
    ("--image-size 224", "--image-size 32 --weights none"),
    ("--output run\n", "--output run --epochs 3 --batch-size 8\n"),
)


def blocks(page: str, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", (DOCS / f"{page}.md").read_text(), re.M | re.S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the pages' commands run: with a folder of images."""
    folder = tmp_path_factory.mktemp("docs")
    write_splits(folder / "images", train={"cats": 12, "dogs": 12}, val={"cats": 4, "dogs": 4})
    return folder


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "(?:python|sh)")])
def test_what_a_page_shows_runs(page: str, folder: Path) -> None:
    commands = "".join(blocks(page, "sh"))
    for real, small in SMALLER:
        commands = commands.replace(real, small)
    # the command of this installation, whichever environment the tests run in
    bin_folder = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    scripts = {"bash": f"set -e\n{commands}", sys.executable: "\n".join(blocks(page, "python"))}
    for program, script in scripts.items():
        done = subprocess.run(
            [program, "-c", script],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def test_every_public_name_is_in_the_reference() -> None:
    text = (DOCS / "reference.md").read_text()
    named = set(re.findall(r"^::: fastgate(?:\.\w+)*\.(\w+)$", text, re.M))
    assert named == set(fg.__all__)


def test_the_families_are_those_of_the_result_file() -> None:
    rows = families.read(families.RESULTS / "families.jsonl")
    text = (DOCS / "networks.md").read_text()
    assert families.overview(rows) in text
    layer, channel = (
        sum(row["gating"] == gating and row["result"] == "ok" for row in rows) for gating in ("layer", "channel")
    )
    assert f"Of {len({row['network'] for row in rows})} networks" in text
    assert f"{layer} take layer gates and {channel} channel gates" in text


def test_links_and_pictures_are_there() -> None:
    for page in PAGES:
        text = (DOCS / f"{page}.md").read_text()
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
            if not target.startswith("http"):
                assert (DOCS / target).exists(), f"{page}: {target}"
        # files of the repository that are named
        for target in re.findall(r"`((?:bench|examples|fastgate|kernels|tests)/[\w./-]+)`", text):
            if "X" not in target:
                assert (ROOT / target).exists(), f"{page}: {target}"
