"""The command `fl-taskarith merge`; its methods and their parameters are the table of merge rules."""

import argparse
import contextlib
import re
import textwrap
from collections.abc import Sequence

from fl_taskarith.cli.arguments import LateParser
from fl_taskarith.errors import ConfigError

USUAL = "task-arithmetic"
ADDRESS_SPACE = 4_000_000_000  # bytes that Python and torch map before a model is read
NUMBER = re.compile(r"[-+]?((\d+\.?\d*|\.\d+)(e[-+]?\d+)?|inf|infinity|nan)$", re.IGNORECASE)


def add_merge(merge: LateParser) -> None:
    """Add what depends on the rules, which import torch, once the command is chosen."""
    merge.formatter_class = argparse.RawDescriptionHelpFormatter
    merge.fill = _add_rules
    merge.description = textwrap.fill(merge.description or "", 100)


def _add_rules(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """Add --method, and an option for every rule's parameter, that of a module:function among `arguments` included."""
    _check_address_space(parser)
    from fl_taskarith.merging.merge_rules import find_rule, merge_rules

    early = argparse.ArgumentParser(add_help=False)
    early.add_argument("--method", default=USUAL)
    try:
        rule = find_rule(early.parse_known_args(arguments)[0].method)
    except ConfigError as error:
        parser.error(f"argument --method: {error}")
    parser.add_argument("--method", default=USUAL, metavar="RULE", help="a name below, or module:function of your own "
                        "(default: %(default)s)")  # fmt: skip
    rules = {**merge_rules(), rule.name: rule}
    parameters = {each.parameter: each for each in rules.values() if each.parameter}
    for name, each in parameters.items():
        parser.add_argument(f"--{name}", type=float, help=f"{each.name}: {each.meaning}")
    parser.set_defaults(parameters=tuple(parameters))
    table = [f"  {each.name:<16} {each.about}{f' ({each.source})' if each.source else ''}" for each in rules.values()]
    parser.epilog = "\n".join(["rules:", *table, "", parser.epilog or ""])
    parser._negative_number_matcher = NUMBER  # argparse's own knows no exponents
    if isinstance(arguments, list):
        arguments[:] = _numbers_joined(arguments)


def _check_address_space(parser: argparse.ArgumentParser) -> None:
    """End with a message where a limit such as `ulimit -v` leaves no room for torch, which would abort."""
    with contextlib.suppress(ImportError):  # Windows has no such limits
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY and limit < ADDRESS_SPACE:
            parser.error(
                f"a merge needs about {ADDRESS_SPACE / 1e9:.0f} GB of address space for Python and torch, and more for "
                f"the models, but it is limited to {limit / 1e9:.1f} GB: raise the limit (ulimit -v)"
            )


def run_merge(parsed: argparse.Namespace) -> None:
    """Merge as the arguments say."""
    from fl_taskarith.one_shot.merge_models import merge

    named = ("base", "task_vectors", "method", "scale", "steps", "seed", "search", "data", "output", "overwrite")
    given = {name: value for name in parsed.parameters if (value := getattr(parsed, name)) is not None}
    merge(parsed.words, **{name: getattr(parsed, name) for name in named}, **given)
    print(parsed.output.resolve())


def _numbers_joined(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with the numbers behind --steps in one word: argparse would take models behind them too."""
    joined = [""]
    for argument in arguments:
        steps = joined[-2:-1] and len(joined[-2]) > 3 and "--steps".startswith(joined[-2])
        if steps and NUMBER.match(joined[-1].split(" ")[0]) and NUMBER.match(argument):
            joined[-1] += f" {argument}"
        else:
            joined.append(argument)
    return joined[1:]
