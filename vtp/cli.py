"""The command line: parse, override, run. It holds no science, and imports nothing heavy before it knows what to do."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtp.recipes import DITS, PRETRAIN

if TYPE_CHECKING:
    from collections.abc import Callable


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `vtp` and `python -m vtp`. A mistake of the user's is one line on stderr and exit code 2."""
    args = _parser().parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loader workers fork after the tokenizer was used
    from vtp.config import ConfigError
    from vtp.engine.loop import NonFiniteError

    try:
        args.run(args)
    except (ConfigError, FileNotFoundError, NonFiniteError) as error:
        print(f"vtp: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vtp", description="Pre-train visual tokenizers, judge them, generate on them.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    p = _command(commands, "quickstart", quickstart, "everything at toy size on a CPU, ending with report.html")
    p.add_argument("--out", type=Path, default=Path("runs/quickstart"))

    p = _command(commands, "pretrain", pretrain, "pre-train a tokenizer")
    _recipe(p, PRETRAIN)

    p = _command(commands, "train-dit", train_dit, "train a diffusion transformer on latents")
    _recipe(p, DITS)

    return parser


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    return parser


def _recipe(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    parser.add_argument("recipe", metavar="RECIPE|config.yaml", help=f"one of {', '.join(names)}; or a saved config.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields to change, as in model.vision.depth=6")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and stop")
    parser.set_defaults(names=names)


def _resolve(args: argparse.Namespace, recipe: Callable[[str], Any], default: Callable[[], Any]) -> Any:
    """Recipe or file, then overrides; printed."""
    from difflib import get_close_matches

    from vtp import config, dist

    if args.recipe in args.names:
        cfg = config.merge(recipe(args.recipe), args.overrides)
    elif args.recipe.endswith((".yaml", ".yml")):
        cfg = config.merge(default(), args.overrides, Path(args.recipe))
    else:
        near = get_close_matches(args.recipe, args.names, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise config.ConfigError(f"no recipe '{args.recipe}'{hint} There are {', '.join(args.names)}, or a config.yaml")
    if dist.is_main():
        print(config.dump(cfg), flush=True)
    return cfg


def pretrain(args: argparse.Namespace) -> None:
    """vtp pretrain"""
    from vtp.pretrain.config import PretrainConfig
    from vtp.recipes import pretrain_recipe

    cfg = _resolve(args, pretrain_recipe, PretrainConfig)
    if not args.dry_run:
        from vtp.pretrain.run import pretrain

        pretrain(cfg)


def train_dit(args: argparse.Namespace) -> None:
    """vtp train-dit"""
    from vtp.generation.run import DiTTrainConfig, train_dit
    from vtp.recipes import dit_recipe

    cfg = _resolve(args, dit_recipe, DiTTrainConfig)
    if not args.dry_run:
        train_dit(cfg)


def quickstart(args: argparse.Namespace) -> None:
    """vtp quickstart"""
    raise NotImplementedError


if __name__ == "__main__":
    main()
