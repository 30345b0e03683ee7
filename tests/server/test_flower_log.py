"""What Flower's log shows of an error: one line where it is the user's, the traceback where it is ours."""

import io
import logging

from fl_taskarith.config.settings import from_run_config
from fl_taskarith.server.launch import show_log


def logged(error: Exception) -> str:
    """What Flower's log says of an error, in its own words."""
    show_log()
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    logger = logging.getLogger("flwr")
    logger.addHandler(handler)
    try:
        raise error
    except Exception as raised:
        logger.error("%s raised an exception", "Simulation", exc_info=raised)
    finally:
        logger.removeHandler(handler)
    return written.getvalue()


def test_an_error_of_the_user_is_one_line_and_a_bug_keeps_its_traceback() -> None:
    try:
        from_run_config({"num-rounds": 0})
    except Exception as error:
        said = logged(error)
    assert said == "ConfigError: num-rounds = 0 is not accepted: expected a whole number from 1.\n"
    said = logged(ValueError("a bug"))
    assert said.startswith("Simulation raised an exception\nTraceback") and said.endswith("ValueError: a bug\n")
