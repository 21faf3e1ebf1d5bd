"""Builds the release in build/dist, installs its wheel in an empty environment, and draws with it.

    python scripts/release_check.py

Exits with 1 and one line if a file is missing, a link of the README would not work on a package index, or the picture differs from
the one that the checkout draws.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build"
PROMPT = "Can you generate a photo of a red circle?"
RELATIVE_LINK = re.compile(r"\]\((?!https?://|#)([^)]+)\)")


def run(*command: str | Path, cwd: Path = ROOT) -> None:
    print("+", *command, flush=True)
    subprocess.run([str(part) for part in command], cwd=cwd, check=True)


def tracked(*folders: str) -> set[str]:
    """The paths that git knows below `folders`, relative to the repository."""
    out = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return set(out.splitlines())


def check_contents(wheel: Path, sdist: Path) -> None:
    """Exits if the archives lack files, or the wheel's README has links that work in the repository alone."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
    if missing := tracked("scale_rae") - names:
        sys.exit(f"the wheel lacks {', '.join(sorted(missing))}")
    if broken := RELATIVE_LINK.findall(text):
        sys.exit(f"the README's links work in the repository alone: {', '.join(broken)}")
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    if missing := tracked() - inside:
        sys.exit(f"the sdist lacks {', '.join(sorted(missing))}")


def drawn(program: Path, folder: Path) -> bytes:
    """The PNG that `program` draws in `folder`."""
    folder.mkdir(parents=True)
    run(program, "t2i", "--model-path", "shapes", "--prompt", PROMPT, "--output-dir", folder, cwd=folder)
    return next(folder.glob("*.png")).read_bytes()


def main() -> None:
    shutil.rmtree(BUILD / "dist", ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", BUILD / "dist")
    (wheel,), (sdist,) = (BUILD / "dist").glob("*.whl"), (BUILD / "dist").glob("*.tar.gz")
    check_contents(wheel, sdist)

    with tempfile.TemporaryDirectory() as folder:  # an environment is 1.4 GB
        empty = Path(folder) / "environment"
        venv.create(empty, with_pip=True)
        programs = empty / ("Scripts" if sys.platform == "win32" else "bin")
        run(programs / "python", "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", wheel)
        if drawn(programs / "scale-rae", Path(folder) / "installed") != drawn(
            Path(sys.executable).with_name("scale-rae"), Path(folder) / "checkout"
        ):
            sys.exit("the installed wheel draws another picture than the checkout")
    print(f"{wheel.name} and {sdist.name} are complete, and the wheel draws in an empty environment")


if __name__ == "__main__":
    main()
