"""Writes docs/routers.md from the tables of routers and losses, their docstrings and the presets.

    python3 scripts/document_routers.py

A test fails while the page differs from what this writes.
"""

from collections.abc import Callable, Iterator
import inspect
from pathlib import Path
import re
from typing import Any

from moe.config import import_beside
from moe.routing import table, topk
from moe.routing.gates import LinearGate
from moe.routing.loss_table import LOSSES, Loss
from moe.routing.router import Router, options_of
from moe.routing.table import ROUTERS

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "routers.md"

HEAD = """# Routers

Written by `python3 scripts/document_routers.py`; change the code, not this page.

`--config.router.name=NAME` picks a router, `--config.router.OPTION=VALUE` sets an option, and
`--config=configs/quickstart.py:router=PRESET` takes a paper's settings. How to add one: `adding_a_router.md`.

In equations x is a token, l its logits, p their softmax, S the chosen experts; costs are multiply-adds a token,
with D the model width, E the experts, k the experts a token.
"""

CAUSALITY = """## Causality

What a token's choice may depend on decides where a router may be used.

| class | a choice depends on | language models |
|---|---|---|
| C0 | its own token, the parameters, and state from earlier steps | safe |
| C1 | also earlier tokens of its own document | safe |
| C3 | also later tokens of the row | refused unless `allow_noncausal=true` |

C2 is no router's own class: it is a C0 or C1 router behind a capacity, safe while nothing drops or while
drops are decided token by token (`dispatch.priority=token_major`). A C3 router lowers the training loss by what
it sees of the future, so its loss is not that of a model that can generate. Some have another form in
evaluation that is causal: the difference between the two losses is the causal gap, and evaluation reports it.
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD, _overview(), CAUSALITY]
    for title, names in groups():
        parts.append(f"## {title}\n")
        parts += [_router(name, ROUTERS[name]) for name in names]
    parts += [_losses(), _presets()]
    return "\n".join(parts)


def groups() -> Iterator[tuple[str, list[str]]]:
    """The titles that the table's comments give to the rows below them, with these rows."""
    source = inspect.getsource(table)
    rows = source[source.index("ROUTERS: dict") :]
    title, names = "", []
    for line in rows[: rows.index("\n}\n")].splitlines():
        if heading := re.fullmatch(r"    # (.+)\.", line):
            if names:
                yield title, names
            title, names = heading[1], []
        elif row := re.match(r'    "(\w+)":', line):
            names.append(row[1])
    yield title, names


def _overview() -> str:
    lines = ["## At a glance\n", "| router | causality | when to use it |", "|---|---|---|"]
    for name, router in ROUTERS.items():
        lines.append(f"| [`{name}`](#{name}) | {router.causality} | {_cell(router.use)} |")
    return "\n".join(lines) + "\n"


def _router(name: str, router: Router) -> str:
    lines = [
        f"### {name}\n",
        _about(name, router) + "\n",
        f"* paper: {router.paper}",
        f"* equation: `{router.equation}`",
        f"* causality: {_causality(router)}",
        f"* cost: {router.cost}",
        f"* when: {router.use}",
    ]
    lines += [f"* note: {fact}" for fact in _facts(router)]
    if router.options:
        told = _told_options(router)
        lines += ["", "| option | default | |", "|---|---|---|"]
        lines += [
            f"| `{option}` | `{default!r}` | {_cell(told.get(option, ''))} |"
            for option, default in router.options.items()
        ]
    return "\n".join(lines) + "\n"


def _causality(router: Router) -> str:
    if router.causality != "C3":
        return router.causality
    return "C3 in training, causal in evaluation" if router.causal_in_eval else "C3, no causal form"


def _facts(router: Router) -> Iterator[str]:
    if router.gate is None:
        yield "nothing to learn: no gate."
    if router.stateful:
        yield "keeps state, which checkpoints hold."
    if router.needs_key_in_eval:
        yield "draws in evaluation too."
    if router.plan != "choices":
        yield f"its plan is {router.plan}."
    elif not router.fixed_k:
        yield "the number of experts differs from token to token."


def _about(name: str, router: Router) -> str:
    """The docstring of a router's file, or, for further rows of the same file, of its function."""
    module = _module(router)
    first = next(n for n, row in ROUTERS.items() if _module(row) == module)
    return inspect.getdoc(module) or "" if name == first else _summary(router.route)


def _module(router: Router) -> Any:
    """The file of a router; those that share the choice of top-k are their gate's."""
    shared = router.route is topk.route and router.gate not in (None, LinearGate)
    return inspect.getmodule(router.gate if shared else router.route)


def _told_options(router: Router) -> dict[str, str]:
    """What docstrings say of each option: those of its functions, then of others of the same file."""
    kin = [row for row in ROUTERS.values() if _module(row) == _module(router)]
    functions = [*router.functions, *(f for row in kin for f in row.functions)]
    told: dict[str, str] = {}
    for function in functions:
        for option, text in arguments(function).items():
            if option in options_of(function):
                told.setdefault(option, _with_names(function, text))
    return told


def _with_names(function: Callable[..., Any], text: str) -> str:
    """With the values of tuples and tables of names in place of their own names."""

    def values(match: re.Match[str]) -> str:
        found = getattr(inspect.getmodule(function), match[1], None)
        return ", ".join(f"`{v}`" for v in found) if isinstance(found, tuple | dict) else match[0]

    return re.sub(r"`([A-Z][A-Z_]+)`", values, text)


def arguments(function: Callable[..., Any]) -> dict[str, str]:
    """The section `Args` of a docstring: text by parameter, on one line."""
    doc = inspect.getdoc(function) or ""
    section = re.search(r"^Args:\n((?:    .*\n?|\n)+)", doc, re.MULTILINE)
    told: dict[str, str] = {}
    name = ""
    for line in section[1].splitlines() if section else ():
        if entry := re.match(r"    (\w+): (.*)", line):
            name, text = entry[1], entry[2]
            told[name] = text
        elif name and line.strip():
            told[name] += " " + line.strip()
    return told


def _losses() -> str:
    lines = [
        "## Losses\n",
        "`--config.losses.NAME=WEIGHT`; options are `--config.losses.NAME_OPTION=VALUE`. Any number at once.\n",
        "| loss | what it is | paper | options |",
        "|---|---|---|---|",
    ]
    for name, loss in LOSSES.items():
        options = ", ".join(f"`{n}={v!r}`" for n, v in loss.options.items())
        cells = (f"`{name}`", _of_loss(name, loss), loss.paper, options)
        lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    return "\n".join(lines) + "\n"


def _of_loss(name: str, loss: Loss) -> str:
    if loss.function.__doc__:
        return _summary(loss.function)
    return f"The mean over tokens of `{', '.join(loss.terms) or name}`, which layers report."


def _presets() -> str:
    presets = import_beside(str(ROOT / "configs" / "quickstart.py"), "routers.py").PRESETS
    lines = [
        "## Presets\n",
        "`--config=configs/quickstart.py:router=NAME`, of `configs/routers.py`.\n",
    ]
    for name, preset in presets.items():
        lines.append(f"* `{name}`: {' '.join((preset.__doc__ or '').split())}")
    return "\n".join(lines) + "\n"


def _summary(function: Callable[..., Any]) -> str:
    return " ".join((inspect.getdoc(function) or "").split("\n\n")[0].split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"{PAGE}: {len(ROUTERS)} routers, {len(LOSSES)} losses")
