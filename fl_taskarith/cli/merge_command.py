"""The command `fl-taskarith merge`; its methods and their parameters are the table of merge rules."""

import argparse
import contextlib
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

from fl_taskarith.cli.arguments import LateParser
from fl_taskarith.errors import ConfigError

USUAL = "task-arithmetic"
ADDRESS_SPACE = 4_000_000_000  # bytes that Python and torch map before a model is read
NUMBER = re.compile(r"[-+]?((\d+\.?\d*|\.\d+)(e[-+]?\d+)?|inf|infinity|nan)$", re.IGNORECASE)


def add_merge(merge: LateParser) -> None:
    """Add the arguments; what depends on the rules, which import torch, follows once the command is chosen."""
    merge.formatter_class = argparse.RawDescriptionHelpFormatter
    merge.fill = _add_rules
    merge.description = textwrap.fill(merge.description or "", 100)
    merge.add_argument("words", nargs="*", metavar="MODEL.safetensors", help="fine-tuned models or folders")
    merge.add_argument("--base", type=Path, help="θ₀, the model they were fine-tuned from")
    merge.add_argument("--task-vectors", action="store_true", help="the files hold θ - θ₀ already")
    merge.add_argument("--scale", type=float, help="λ (default: where equal models merge into themselves)")
    merge.add_argument("--steps", type=float, nargs="+", default=(), help="local steps of each model, for fednova")
    merge.add_argument("--seed", type=int, default=0, help="of what dare drops, and of tasks (default: %(default)s)")
    merge.add_argument("--search", type=Path, metavar="BENCHMARK.toml", help="choose λ and the rest on validation of "
                       "these tasks, one per model in order (see one-shot)")  # fmt: skip
    merge.add_argument("--data", default="", metavar="LEVEL", help="of the tasks, under --search (default: the first)")
    merge.add_argument("--output", type=Path, default=Path("merged.safetensors"), help="default: %(default)s; an "
                       "earlier merge there is replaced, an input never")  # fmt: skip


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
        arguments[:] = _models_first(parser, arguments)


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


def _models_first(parser: argparse.ArgumentParser, arguments: list[str]) -> list[str]:
    """Return the arguments with words that are no option's before all options, in their order.

    Argparse takes such words in one place only, and --steps would take those behind its numbers.
    """
    words: list[str] = []
    options: list[str] = []
    taken, several = 0, False
    for place, argument in enumerate(arguments):
        if argument == "--":
            words += arguments[place + 1 :]
            break
        action = _option(parser, argument.partition("=")[0])
        if action is not None or (argument.startswith("-") and not NUMBER.match(argument) and not taken):
            options.append(argument)
            several = action is not None and action.nargs == "+"
            taken = int(action is not None and action.nargs is None and "=" not in argument)
        elif taken or (several and NUMBER.match(argument)):
            options.append(argument)
            taken = 0
        else:
            words.append(argument)
            several = False
    return [*options, "--", *words] if words else options


def _option(parser: argparse.ArgumentParser, word: str) -> argparse.Action | None:
    """Return the option that a word or an unambiguous start of its name means."""
    actions = parser._option_string_actions
    meant = {id(action): action for name, action in actions.items() if word.startswith("--") and name.startswith(word)}
    return actions.get(word) or (next(iter(meant.values())) if len(meant) == 1 else None)
