"""A PDF from LaTeX source, by whichever TeX is installed. Everything but the PDF stays in a temporary folder."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from fl_taskarith.errors import ReportError
from fl_taskarith.storage.files import scratch_folder

LATEX = ["-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape"]
COMMANDS = {  # program: what makes NAME.pdf from NAME.tex and its .bib files; the first that is installed is used
    "latexmk": [["latexmk", "-norc", "-pdf", "-interaction=nonstopmode", "-halt-on-error",
                 "-latexoption=-no-shell-escape"]],
    "tectonic": [["tectonic", "--keep-intermediates", "--keep-logs"]],
    "pdflatex": [["pdflatex", *LATEX], ["bibtex"], ["pdflatex", *LATEX], ["pdflatex", *LATEX]],
}  # fmt: skip
LONGEST = 300  # seconds of one command
END_OF_TEXT = "end-of-text"  # main.tex's \label before the references


@dataclass(frozen=True)
class Typeset:
    """The PDF, and the pages of its text: those up to the references, or None if the source does not mark them."""

    content: bytes
    text_pages: int | None


def find_tex() -> str | None:
    """The first of latexmk, tectonic and pdflatex that is installed."""
    usable = (name for name in COMMANDS if shutil.which(name))
    return next((name for name in usable if name != "latexmk" or shutil.which("pdflatex")), None)


def typeset(tex: Path, program: str, inputs: Path) -> Typeset:
    """The PDF of `tex`. What it inputs lies beside it or below, figures and references too: nothing is written there.

    Args:
        program: one of COMMANDS.
        inputs: a folder with further files that the source names, such as classes and logos.

    Raises:
        ReportError: TeX fails, and what it says is quoted; or a file cannot be copied.
    """
    with scratch_folder() as folder:
        hidden = shutil.ignore_patterns(".*")
        try:
            shutil.copytree(tex.parent, folder, dirs_exist_ok=True, ignore=hidden, ignore_dangling_symlinks=True)
        except OSError as error:
            raise ReportError(f"Cannot copy {tex.parent} to typeset {tex.name}, which is kept: {error}.") from error
        (folder / f"{tex.stem}.pdf").unlink(missing_ok=True)
        environment = os.environ | {
            "TEXINPUTS": f".{os.pathsep}{inputs}{os.pathsep}",
            "BIBINPUTS": f".{os.pathsep}{inputs}{os.pathsep}",
            "SOURCE_DATE_EPOCH": "0",  # so that equal results give equal bytes
            "FORCE_SOURCE_DATE": "1",
        }
        for command in COMMANDS[program]:
            target = tex.stem if command[0] == "bibtex" else tex.name
            try:
                done = subprocess.run(
                    [*command, target], cwd=folder, env=environment, capture_output=True, timeout=LONGEST, check=False
                )
            except (OSError, subprocess.SubprocessError) as error:
                raise ReportError(f"{command[0]} did not end well on {tex}: {error}.") from error
            if done.returncode and command[0] != "bibtex":  # without a citation, bibtex complains
                said = _complaint(folder / f"{tex.stem}.log", done.stdout)
                raise ReportError(f"{command[0]} failed on {tex}, which is kept: {said}")
        return Typeset((folder / f"{tex.stem}.pdf").read_bytes(), _text_pages(folder / f"{tex.stem}.aux"))


def _complaint(log: Path, printed: bytes) -> str:
    """TeX's own error with the lines that follow it."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = printed.decode(errors="replace").splitlines()
    begun = next((index for index, line in enumerate(lines) if line.startswith("!")), max(0, len(lines) - 5))
    return " ".join(" ".join(lines[begun : begun + 5]).split())


def _text_pages(aux: Path) -> int | None:
    try:
        found = re.search(rf"\\newlabel\{{{END_OF_TEXT}\}}\{{\{{[^}}]*\}}\{{(\d+)\}}", aux.read_text(errors="replace"))
    except OSError:
        return None
    return int(found[1]) if found else None
