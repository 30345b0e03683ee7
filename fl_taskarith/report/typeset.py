"""A PDF from LaTeX source, by whichever TeX is installed. Everything but the PDF stays in a temporary folder."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

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


class Typeset(NamedTuple):
    """The PDF, and the pages of its text: those up to the references, or None if the source does not mark them."""

    content: bytes
    text_pages: int | None


def find_tex() -> str | None:
    """Return the first of latexmk, tectonic and pdflatex that is installed."""
    usable = (name for name in COMMANDS if shutil.which(name))
    return next((name for name in usable if name != "latexmk" or shutil.which("pdflatex")), None)


def typeset(tex: Path, program: str, inputs: Path) -> Typeset:
    """Typeset `tex`. What it inputs lies beside it or below, figures and references too: nothing is written there.

    Args:
        program: one of COMMANDS.
        inputs: a folder with further files that the source names, such as classes and logos.

    Raises:
        ReportError: TeX fails, and what it says is quoted; or a file cannot be copied.
    """
    with scratch_folder() as folder:
        pdf, log, aux = (folder / f"{tex.stem}.{ending}" for ending in ("pdf", "log", "aux"))
        hidden = shutil.ignore_patterns(".*")
        try:
            shutil.copytree(tex.parent, folder, dirs_exist_ok=True, ignore=hidden, ignore_dangling_symlinks=True)
        except OSError as error:
            raise ReportError(f"Cannot copy {tex.parent} to typeset {tex.name}, which is kept: {error}.") from error
        pdf.unlink(missing_ok=True)
        # Equal results give equal bytes, whatever the time.
        environment = os.environ | {"SOURCE_DATE_EPOCH": "0", "FORCE_SOURCE_DATE": "1"}
        environment |= dict.fromkeys(("TEXINPUTS", "BIBINPUTS"), f".{os.pathsep}{inputs}{os.pathsep}")
        for command in COMMANDS[program]:
            target = tex.stem if command[0] == "bibtex" else tex.name
            try:
                done = subprocess.run(
                    [*command, target], cwd=folder, env=environment, capture_output=True, timeout=LONGEST, check=False
                )
            except (OSError, subprocess.SubprocessError) as error:
                raise ReportError(f"{command[0]} did not end well on {tex}: {error}.") from error
            if done.returncode and command[0] != "bibtex":  # without a citation, bibtex complains
                said = _complaint(_text(log) or done.stdout.decode(errors="replace"))
                raise ReportError(f"{command[0]} failed on {tex}, which is kept: {said}")
        pages = re.search(rf"\\newlabel\{{{END_OF_TEXT}\}}\{{\{{[^}}]*\}}\{{(\d+)\}}", _text(aux))
        return Typeset(pdf.read_bytes(), int(pages[1]) if pages else None)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _complaint(log: str) -> str:
    """Return TeX's own error with the lines that follow it."""
    lines = log.splitlines()
    begun = next((index for index, line in enumerate(lines) if line.startswith("!")), max(0, len(lines) - 5))
    return " ".join(" ".join(lines[begun : begun + 5]).split())
