"""A C++ compiler for tests of builds: it takes the checkout's object where it would compile the same files anew.

These must be the same bytes, compiled with the same flags, and no younger than the object. All else is compiled without
optimisations, which take most of the time: values are tested on the build of the checkout.

    python tests/quick_compiler.py COMPILER SOURCES COMMANDS ARGUMENTS...

SOURCES is the folder in which a copy of the checkout is built. COMMANDS is a file with what the build of the checkout
ran, one command a line.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

CHECKOUT = str(Path(__file__).parents[1])


def main(compiler: str, sources: str, commands: str, *arguments: str) -> None:
    def without_folders(command: str) -> str:
        return command.replace(sources, "").replace(CHECKOUT, "")

    ran = [command.split() for command in Path(commands).read_text().splitlines()]
    known = {without_folders(" ".join(words[1:])) for words in ran}
    if "-c" in arguments and without_folders(" ".join(arguments)) in known:
        *others, output = arguments  # ... -o OUTPUT
        built = Path(output.replace(sources, CHECKOUT))
        # This reads all files that the compiler would, fails where one is missing, and lists them for ninja.
        preprocess = ["-E" if argument == "-c" else argument for argument in others]
        subprocess.run([compiler, *preprocess, os.devnull, "-MT", output], check=True)
        listed = Path(arguments[arguments.index("-MF") + 1]).read_text()
        files = listed.partition(":")[2].replace("\\\n", " ").split()
        if all(is_older_twin(Path(file), Path(file.replace(sources, CHECKOUT)), built) for file in files):
            shutil.copyfile(built, output)
            return
    os.execvp(compiler, [compiler, *arguments, "-O0"])


def is_older_twin(file: Path, twin: Path, built: Path) -> bool:
    return file.read_bytes() == twin.read_bytes() and twin.stat().st_mtime <= built.stat().st_mtime


if __name__ == "__main__":
    main(*sys.argv[1:])
