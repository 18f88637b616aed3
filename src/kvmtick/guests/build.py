"""Assemble the built-in guests: ``python -m kvmtick.guests.build`` writes the ``.bin`` files.

Needs nasm. The bytes are kept under version control, so this runs only after a source changed.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

__all__ = ["FOLDERS", "HERE", "assemble", "main", "sources"]

HERE = Path(__file__).parent
FOLDERS = (HERE, HERE / "linux", HERE.parent / "bench")
"""The guests, Linux's init, and those that only `kvmtick bench` runs, with the ROM that starts them
elsewhere.
"""


def sources(folder: Path = HERE) -> list[Path]:
    """The sources of a folder, in order of their names."""
    return sorted(folder.glob("*.asm"))


def assemble(source: Path) -> bytes:
    """The image nasm makes of `source`; warnings count as errors.

    Raises FileNotFoundError without nasm, RuntimeError with nasm's message if it refuses.
    """
    nasm = shutil.which("nasm")
    if nasm is None:
        raise FileNotFoundError("nasm not found: install the package nasm")
    with tempfile.TemporaryDirectory() as scratch:
        image = Path(scratch, "image.bin")
        done = subprocess.run(
            [nasm, "-f", "bin", "-Wall", "-Werror", "-o", str(image), source.name],
            cwd=source.parent,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if done.returncode:
            raise RuntimeError(done.stderr.strip())
        return image.read_bytes()


def main() -> int:
    """Assemble every source; say what changed. Returns the exit code."""
    for source in [source for folder in FOLDERS for source in sources(folder)]:
        target = source.with_suffix(".bin")
        try:
            image = assemble(source)
        except (FileNotFoundError, RuntimeError) as error:
            print(error, file=sys.stderr)
            return 1
        old = target.read_bytes() if target.exists() else None
        if image != old:
            target.write_bytes(image)
        print(f"{target.name}: {len(image)} bytes, {'unchanged' if image == old else 'written'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
