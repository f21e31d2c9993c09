"""Recipe options on the command line: each field of a recipe is one, so that new ones appear automatically."""

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from fastgate.training.recipe import OLD_NAMES, OPTIONS, Option, Recipe, list_values


def with_recipe_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace a command's `**overrides` by the options of a recipe, for typer."""
    own = [p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]
    extra = [
        inspect.Parameter(
            option.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_command_line_option(option)
        )
        for option in OPTIONS.values()
    ]
    signature = inspect.Signature([*own, *extra])
    command.__signature__ = signature  # type: ignore[attr-defined]
    command.__annotations__ = {name: p.annotation for name, p in signature.parameters.items()}
    return command


def _command_line_option(option: Option) -> Any:
    names = [option.name, *(old for old, new in OLD_NAMES.items() if new == option.name)]
    kinds = "|".join(
        [*("true|false" if kind is bool else kind.__name__ for kind in option.kinds), *["none"] * option.optional]
    )
    return Annotated[
        str | None,
        typer.Option(
            *(f"--{name.replace('_', '-')}" for name in names),
            help=f"{option.help}; default {_spell(option.default)}",
            metavar=kinds.replace("str", "text").replace("int", "number").replace("float", "number"),
            show_default=False,
            rich_help_panel=f"Recipe: {option.section}",
        ),
    ]


def describe_recipe(recipe: Recipe) -> str:
    """List the value of every option by section, spelled as on the command line."""
    values = list_values(recipe)
    width = max(map(len, values)) + 2
    lines: list[str] = []
    for name, option in OPTIONS.items():
        if f"{option.section}:" not in lines:
            lines.append(f"{option.section}:")
        lines.append(f"  --{name.replace('_', '-'):<{width}}{_spell(values[name])}")
    return "\n".join(lines)


def _spell(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
