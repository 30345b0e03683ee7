"""Text that a client wrote, made fit for a log, a table or an error message: one short line that can be printed."""

LONGEST = 320  # characters of a client's own text
ENDING = 100  # of them at the end of a text that is cut: errors end with what to do


def one_line(text: object) -> str:
    """Return `text` on one line of at most `LONGEST` characters, with a ? for each that cannot be printed."""
    try:
        full = str(text)
        if len(full) > 4 * LONGEST:
            full = full[: 2 * LONGEST] + full[-2 * LONGEST :]
        line = " ".join("".join(each if each.isprintable() or each.isspace() else "?" for each in full).split())
    except KeyboardInterrupt:
        raise
    except BaseException:  # an object of the client's own, which says what it likes, and exits if it likes
        return "(text that cannot be read)"
    return line if len(line) <= LONGEST else f"{line[: LONGEST - ENDING - 5]} ... {line[-ENDING:]}"


def named_error(error: BaseException) -> str:
    """Return the type and the text of an exception that a client raised, on one line."""
    return one_line(f"{one_line(type(error).__name__)}: {one_line(error)}")
