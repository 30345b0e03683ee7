"""Tables and figures of a section as LaTeX floats, for main.tex to input: how many there are depends on the results."""

from collections.abc import Sequence

from fl_taskarith.report.figure_files import Figure
from fl_taskarith.report.latex import Latex, not_run, source
from fl_taskarith.report.wording import Section

GENERATED = "% Written by fl-taskarith report, and anew each time that it runs: do not edit.\n"


def table_floats(section: Section) -> str:
    """The tables of a section, labelled tab:SECTION-1 and so on; wide ones span both columns."""
    floats = []
    for number, table in enumerate(section.tables, start=1):
        kind, place = ("table*", "b") if table.wide else ("table", "t")
        floats.append(
            f"\\begin{{{kind}}}[{place}]\\centering\\footnotesize\n"
            f"\\caption{{{table.caption}}}\\label{{tab:{section.name}-{number}}}\n"
            f"{table.body}\n\\end{{{kind}}}\n"
        )
    return GENERATED + "".join(floats)


def figure_floats(figures: Sequence[Figure]) -> str:
    """The figures of a section, labelled fig:NAME; wide ones span both columns."""
    floats = []
    for figure in figures:
        kind, width = ("figure*", r"0.85\textwidth") if figure.wide else ("figure", r"\columnwidth")
        floats.append(
            f"\\begin{{{kind}}}[t]\\centering\n"
            f"\\includegraphics[width={width},height=0.3\\textheight,keepaspectratio]{{figures/{figure.name}.pdf}}\n"
            f"\\caption{{{source(figure.caption)}}}"
            f"\\label{{fig:{figure.name}}}\n\\end{{{kind}}}\n"
        )
    return GENERATED + "".join(floats)


def settings_float(settings: Latex | None) -> str:
    """The table of settings with a sentence on it, or the mark that they are not known."""
    if settings is None:
        return GENERATED + not_run("settings not recorded") + "\n"
    return (
        GENERATED + "Table~\\ref{tab:settings} lists the settings.\n\n\\begin{table}[t]\\centering\\footnotesize\n"
        "\\caption{Settings, and the values they take over all studies.}\\label{tab:settings}\n"
        f"{settings}\n\\end{{table}}\n"
    )
