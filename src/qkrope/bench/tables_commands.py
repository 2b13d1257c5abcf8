"""The page of the `qkrope` command, from the parsers that read it."""

from __future__ import annotations

import argparse

from qkrope.cli import _parser

_EVERYWHERE = ("-h", "--json")  # said once, above the commands


def render_commands() -> str:
    """A heading and a table of arguments for each command; what several share, once at the end."""
    (commands,) = (a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
    says = {action.dest: action.help or "" for action in commands._choices_actions}
    lines, shared = list[str](), dict[str, argparse._ArgumentGroup]()
    for name, parser in commands.choices.items():
        lines += [f"## qkrope {name}", "", _sentence(says[name]), ""]
        described = (parser.description or "").removeprefix(says[name]).strip()
        lines += [described, ""] if described else []
        own, groups = list[argparse.Action](), list[str]()
        for group in parser._action_groups:
            if group.description and group.title:
                shared[group.title] = group
                groups.append(group.title)
            else:
                own += group._group_actions
        lines += _table(own)
        if groups:
            lines += [f"And {', '.join(f'[{g}](#{_anchor(g)})' for g in groups)}.", ""]
    for title, group in shared.items():
        lines += [f"## {title.capitalize()}", "", _sentence(group.description or ""), ""]
        lines += _table(group._group_actions)
    return "\n".join(lines)


def _table(actions: list[argparse.Action]) -> list[str]:
    rows = [a for a in actions if not set(a.option_strings) & set(_EVERYWHERE)]
    if not rows:
        return []
    cells = [f"| `{_written(a)}` | {(a.help or '').replace('|', chr(92) + '|')} |" for a in rows]
    return ["| argument | meaning |", "|---|---|", *cells, ""]


def _written(action: argparse.Action) -> str:
    value = action.metavar if isinstance(action.metavar, str) else None
    if value is None and action.choices is not None:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    if not action.option_strings:
        return value or action.dest
    if action.nargs != 0:
        value = value or action.dest.upper()
        value = f" [{value}]" if action.nargs == "?" else f" {value}"
    return ", ".join(action.option_strings) + (value or "")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")
