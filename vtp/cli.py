"""The command line: parse, override, run. It holds no science, and imports nothing heavy before it knows what to do."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from vtp.files import FULL, path_of
from vtp.recipes import DITS, PRETRAIN

if TYPE_CHECKING:
    from collections.abc import Callable

LOST = ("by peer", "remote process exited")  # gloo's and NCCL's words for a rank that has gone


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `vtp` and `python -m vtp`. A mistake of the user's is one line on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be of the terminal's letters
    try:
        _run(_parsed(_parser(), argv))
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("vtp: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # `vtp ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain at its end
        raise SystemExit(141) from None


def _run(args: argparse.Namespace) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loader workers fork after the tokenizer was used
    if args.run is not publish:  # an upload is worth a bar; opening a file of our own is not
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from safetensors import SafetensorError
    from torch.distributed import DistNetworkError

    from vtp.config import ConfigError
    from vtp.engine.checkpoint import CheckpointError
    from vtp.engine.loop import NonFiniteError

    try:
        args.run(args)
    except (ConfigError, NonFiniteError, CheckpointError, OSError, SafetensorError) as error:
        text = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            text = f"{error.filename}: {error.strerror}"
        elif isinstance(error, OSError) and error.errno in FULL:
            text = f"{error.strerror} while writing; make room and try again"
        elif isinstance(error, OSError):  # not about a file: nothing that a user can mend
            raise
        if isinstance(error, NonFiniteError) and os.environ.get("RANK", "0") != "0":
            raise SystemExit(2) from None  # all ranks know; the first says it
        _refuse(text)
    except RuntimeError as error:
        lines = str(error).splitlines()
        if isinstance(error, DistNetworkError):
            _refuse(f"the ranks do not meet, or one has ended: {lines[0]}")
        lost = next((line for line in lines if any(words in line for words in LOST)), None)
        if lost is not None and "RANK" in os.environ:
            _refuse(f"another rank has ended, or cannot be reached ({lost.strip()}); what it said itself says why")
        if lines and lines[0].startswith("DataLoader worker"):
            _refuse(f"{lines[0].rstrip('. ')}; for want of memory? Fewer workers need less; the same command goes on")
        if lines and lines[0].startswith("InvalidCxxCompiler"):
            _refuse(f"torch.compile finds no C++ compiler ({lines[0]}); install one, or leave compile=true out")
        lacking = next((line for line in lines if "out of memory" in line or "can't allocate memory" in line), None)
        if lacking is None:
            raise
        _refuse(f"{lacking.strip()} Use a smaller batch or model; in training, parallel.recompute=true needs less, too")


def _refuse(text: str) -> NoReturn:
    rank = os.environ.get("RANK", "0")
    print(f"vtp{'' if rank == '0' else f' (rank {rank})'}: {text}", file=sys.stderr)
    raise SystemExit(2) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vtp", description="Pre-train visual tokenizers, judge them, generate with them."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    p = _command(commands, "quickstart", quickstart, "everything at toy size on a CPU, ending with report.html")
    p.add_argument("--out", type=path_of, default=Path("runs/quickstart"), metavar="DIR")

    p = _command(commands, "pretrain", pretrain, "pre-train a tokenizer")
    _recipe(p, PRETRAIN)

    p = _command(commands, "profile", profile, "a few steps of a pre-training run: where their time goes, and a trace")
    _recipe(p, PRETRAIN)
    p.add_argument("--out", type=path_of, default=Path("profile"), metavar="DIR", help="default: profile")
    p.add_argument("--steps", type=int, default=3, metavar="N", help="steps looked at, behind two to warm up (3)")

    about_data = _group(commands, "data", "look at data, and pack them for training")
    p = _command(about_data, "inspect", inspect_data, "counts, sizes, captions, duplicates, broken files, pictures")
    p.add_argument("data", metavar="DATA")
    p.add_argument("--out", type=path_of, default=Path("inspect"), metavar="DIR", help="default: inspect")
    p.add_argument("--annotations", metavar="JSONL", help="more captions and labels, by key")
    p.add_argument("--limit", type=_count, metavar="N", help="samples at most")
    p = _command(about_data, "pack", pack_data, "any data to tar shards of equal counts, with checksums")
    p.add_argument("data", metavar="SOURCE")
    p.add_argument("--out", type=path_of, required=True, metavar="DIR")
    p.add_argument("--annotations", metavar="JSONL", help="more captions and labels, by key")
    p.add_argument("--shard-size", type=int, default=1_000, metavar="N", help="samples a shard at most (1000)")
    p.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (one a core)")
    p.add_argument("--limit", type=_count, metavar="N", help="samples at most; give it for scenes, which has a million")

    evals = _group(commands, "eval", "judge a tokenizer, or generated pictures")
    p = _command(evals, "zero-shot", zero_shot, "classify images by text")
    _tokenizer_and_data(p)
    _label(p)
    p.add_argument("--templates", metavar="openai|data|FILE", help="prompts; default: the data set's own, else openai")
    p.add_argument(
        "--template", action="append", metavar="TEXT", help="a prompt with {} for the class; may be repeated"
    )
    p.add_argument(
        "--names", type=path_of, metavar="JSON", help="{class: word or [words]} where captions call it otherwise"
    )
    for name, text in (("linear", "linear probe on frozen features"), ("knn", "nearest neighbours on frozen features")):
        p = _command(evals, name, probe, text)
        _tokenizer_and_data(p)
        _label(p)
        p.add_argument("--train-data", required=True, metavar="DATA", help="images to fit on, apart from --data")
        p.add_argument("--features", default="cls", choices=("cls", "patches", "both", "latent"))
        p.set_defaults(task=name)
    p = _command(evals, "reconstruction", reconstruction, "encode and decode: PSNR, SSIM, and a Frechet distance")
    _tokenizer_and_data(p)
    p.add_argument("--extractor", metavar="NAME", help="inception[:FILE] (rFID), squeezenet:FILE or judge:FOLDER")
    p = _command(evals, "generation", generation, "Frechet distance of a folder of pictures to real ones")
    p.add_argument("images", type=path_of, metavar="IMAGES", help="a folder of pictures, as `vtp sample` writes it")
    p.add_argument("--reference", required=True, metavar="DATA", help="real pictures")
    p.add_argument(
        "--extractor",
        default="inception",
        metavar="NAME",
        help="inception[:FILE] (default), squeezenet:FILE, judge:DIR",
    )
    p.add_argument("--judge", type=path_of, metavar="FOLDER", help="also ask this classifier for the classes drawn")
    p.add_argument("--label", help="compare only with pictures that carry this label")
    p.add_argument("--real", metavar="DATA", help="the same of as many other real pictures, and of them reconstructed")
    p.add_argument("--tokenizer", type=path_of, metavar="TOKENIZER", help="where the samples' is now, if it was moved")
    _evaluation(p)

    p = _command(
        commands, "reconstruct", reconstruct, "picture files through a tokenizer and back, beside the originals"
    )
    p.add_argument("tokenizer", type=path_of, metavar="TOKENIZER", help="VTP, or diffusers' AutoencoderKL")
    p.add_argument("images", nargs="+", type=path_of, metavar="IMAGE", help="files, and folders to search")
    p.add_argument("--out", type=path_of, required=True, metavar="DIR")
    p.add_argument("--fit", default="pad", choices=("pad", "crop"), help="how sides become multiples of the patch")
    p.add_argument(
        "--tile", type=int, metavar="PIXELS", help="side of overlapping tiles; default: whole, up to 1024 pixels a side"
    )
    _machine(p)

    p = _command(commands, "compare", compare, "tokenizers side by side on the same images")
    p.add_argument("tokenizers", nargs="+", type=path_of, metavar="TOKENIZER", help="VTP, or diffusers' AutoencoderKL")
    p.add_argument("--data", required=True, metavar="DATA", help="held-out images")
    p.add_argument("--out", type=path_of, required=True, metavar="DIR")
    p.add_argument("--extractor", metavar="NAME", help="inception[:FILE] (rFID), squeezenet:FILE or judge:FOLDER")
    p.add_argument("--annotations", metavar="JSONL", help="more captions and labels, by key")
    p.add_argument("--size", type=int, metavar="PIXELS", help="side of the images; default: the tokenizers'")
    p.add_argument("--limit", type=_count, metavar="N", help="images at most")
    _machine(p)

    p = _command(commands, "convert", convert, "make a tokenizer folder of a checkpoint of the published training code")
    p.add_argument("source", type=path_of, metavar="SOURCE", help="a .safetensors, .pt or .pth file")
    p.add_argument(
        "--config", type=path_of, required=True, metavar="YAML", help="the configuration it was trained with"
    )
    p.add_argument("--out", type=path_of, required=True, metavar="DIR")
    p.add_argument("--weights", default="student", choices=("student", "teacher"), help="whose trunk (student)")

    p = _command(commands, "latents", latents, "encode images into a folder of latents")
    p.add_argument("tokenizer", type=path_of, metavar="TOKENIZER")
    p.add_argument("--data", required=True, metavar="DATA")
    p.add_argument("--out", type=path_of, required=True, metavar="DIR")
    p.add_argument("--label", help="which label becomes the class; may be left out where there is at most one")
    p.add_argument("--annotations", metavar="JSONL", help="more captions and labels, by key")
    p.add_argument("--size", type=int, metavar="PIXELS", help="side of the images; default: the tokenizer's")
    p.add_argument("--no-flip", dest="flip", action="store_false", help="leave out the mirrored images")
    p.add_argument("--limit", type=_count, metavar="N", help="images at most; give it for scenes, which has a million")
    _machine(p)

    p = _command(commands, "export", export, "write programs that run without this package")
    p.add_argument("tokenizer", type=path_of, metavar="TOKENIZER", help="a published folder")
    p.add_argument("--out", type=path_of, required=True, metavar="DIR")
    p.add_argument("--format", default="torch", choices=("torch", "onnx"), help="torch.export's .pt2, or ONNX")

    p = _command(commands, "publish", publish, "write a tokenizer's card, and send it to the Hub")
    p.add_argument("tokenizer", type=path_of, metavar="TOKENIZER", help="a published folder")
    p.add_argument("--stats", type=path_of, metavar="LATENTS|FILE", help="a folder of latents, or a latents_stats.pt")
    p.add_argument(
        "--results", type=path_of, nargs="+", default=(), metavar="JSON", help="besides those in eval/ of the run"
    )
    p.add_argument("--license", metavar="ID", help="as the Hub calls it, for the card")
    p.add_argument("--push", metavar="USER/NAME", help="the repository to send the folder to")
    p.add_argument("--private", action="store_true", help="if that repository is a new one")

    p = _command(commands, "train-dit", train_dit, "train a diffusion transformer on latents")
    _recipe(p, DITS)

    p = _command(commands, "sample", sample, "draw pictures with a trained diffusion transformer")
    p.add_argument("dit", type=path_of, metavar="DIT_RUN")
    p.add_argument("--out", type=path_of, required=True, metavar="DIR")
    p.add_argument("--num", type=int, default=64, metavar="N")
    p.add_argument("--steps", type=int, default=50, metavar="N", help="integration steps")
    p.add_argument("--cfg-scale", type=float, default=1.0, metavar="S", help="classifier-free guidance; 1 is none")
    p.add_argument("--interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("FROM", "TO"), help="when it acts")
    p.add_argument("--classes", nargs="+", metavar="CLASS", help="names or numbers; default: all")
    p.add_argument("--sampler", default="euler", choices=("euler", "heun", "dopri5"))
    p.add_argument("--shift", type=float, default=1.0, help="below 1: more steps near the noise")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--tokenizer", type=path_of, metavar="TOKENIZER", help="where it is now, if it was moved")
    _machine(p)

    p = _command(commands, "report", report, "one self-contained HTML page about runs")
    p.add_argument("runs", nargs="+", type=path_of, metavar="RUN")
    p.add_argument("--out", type=path_of, metavar="FILE", help="default: report.html in the run, or beside several")
    p.add_argument("--data", metavar="DATA", help="held-out images for the pictures")
    p.add_argument("--annotations", metavar="JSONL")
    return parser


def _group(commands: Any, name: str, text: str) -> Any:
    parser = commands.add_parser(name, help=text, description=text)
    return parser.add_subparsers(required=True, metavar="TASK")


def _tokenizer_and_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tokenizer", type=path_of, metavar="TOKENIZER", help="a published folder")
    parser.add_argument("--data", required=True, metavar="DATA", help="held-out images")
    _evaluation(parser)


def _label(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--label", default="class", help="which of the data's labels (class)")
    parser.add_argument("--top", type=int, metavar="N", help="only the N commonest classes")


def _evaluation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--annotations", metavar="JSONL", help="more captions and labels, by key")
    parser.add_argument("--size", type=int, metavar="PIXELS", help="side of the images; default: the tokenizer's")
    parser.add_argument("--limit", type=_count, metavar="N", help="images at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=path_of, metavar="results.json")
    _machine(parser)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"it must be a number of at least 1, not {text}")
    return int(text)


def _machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-size", type=int, default=64, metavar="N")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="fp32", choices=("auto", "fp32", "bf16"))


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    return parser


def _parsed(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; key=value may stand behind options too, which argparse by itself does not allow."""
    args, rest = parser.parse_known_args(argv)
    if any(word.startswith("-") or "=" not in word for word in rest) or (rest and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    return args


def _recipe(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    parser.add_argument(
        "recipe", metavar="RECIPE|config.yaml", help=f"one of {', '.join(names)}; or a saved config.yaml"
    )
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="fields to change, as in model.vision.depth=6"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and stop")
    parser.set_defaults(names=names)


def _resolve(args: argparse.Namespace, recipe: Callable[[str], Any], default: Callable[[], Any]) -> Any:
    """Recipe or file, then overrides; printed."""
    from difflib import get_close_matches

    from vtp import config, dist

    if args.recipe in args.names:
        cfg = config.merge(recipe(args.recipe), args.overrides)
    elif args.recipe.endswith((".yaml", ".yml")):
        cfg = config.merge(default(), args.overrides, path_of(args.recipe))
    else:
        near = get_close_matches(args.recipe, args.names, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise config.ConfigError(
            f"no recipe '{args.recipe}'; {hint}give one of {', '.join(args.names)}, or a config.yaml"
        )
    if dist.is_main():
        print(config.dump(cfg), flush=True)
    return cfg


def pretrain(args: argparse.Namespace) -> None:
    """vtp pretrain"""
    from vtp import dist
    from vtp.pretrain.config import PretrainConfig
    from vtp.recipes import pretrain_recipe

    with dist.group():
        cfg = _resolve(args, pretrain_recipe, PretrainConfig)
        if not args.dry_run:
            from vtp.pretrain.run import pretrain

            pretrain(cfg)


def profile(args: argparse.Namespace) -> None:
    """vtp profile"""
    from rich import print as show

    from vtp import dist
    from vtp.config import ConfigError
    from vtp.pretrain.config import PretrainConfig
    from vtp.recipes import pretrain_recipe

    if args.steps < 1:
        raise ConfigError("--steps must be at least 1")
    with dist.group():
        cfg = _resolve(args, pretrain_recipe, PretrainConfig)
        if not args.dry_run:
            from vtp.pretrain.profile import profile_step

            tables = profile_step(cfg, args.out, args.steps)
            if dist.is_main():
                show(tables)
                print(f"wrote {args.out / 'trace.json'}, profile.json")


def train_dit(args: argparse.Namespace) -> None:
    """vtp train-dit"""
    from vtp import dist
    from vtp.generation.config import DiTTrainConfig
    from vtp.generation.run import train_dit as run
    from vtp.recipes import dit_recipe

    with dist.group():
        cfg = _resolve(args, dit_recipe, DiTTrainConfig)
        if not args.dry_run:
            run(cfg)


def quickstart(args: argparse.Namespace) -> None:
    """vtp quickstart"""
    from rich import print as show

    from vtp.recipes import dit_recipe, pretrain_recipe
    from vtp.report.findings import summary_table
    from vtp.report.page import write_report
    from vtp.studies.quickstart import Comparison, compare_tokenizers

    tokenizers = {"vtp": pretrain_recipe("quickstart"), "ae": pretrain_recipe("quickstart_ae")}
    runs = compare_tokenizers(tokenizers, Comparison(dit=dit_recipe("dit_quickstart")), args.out)
    show(summary_table(runs))
    print(f"wrote {write_report(runs, args.out / 'report.html')}")


def _shared(args: argparse.Namespace) -> Any:
    """What all evaluations share."""
    from dataclasses import fields

    from vtp.evaluation.run import EvalConfig

    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)  # before the work: it may fail
    return EvalConfig(**{field.name: getattr(args, field.name) for field in fields(EvalConfig)})


def _show(result: dict[str, Any]) -> None:
    """Figures first, then the protocol without which they mean nothing."""
    width = max(map(len, result["metrics"] | result["protocol"]))
    for name, value in result["metrics"].items():
        print(f"{name:{width}}  {value:.4f}")
    for name, value in result["protocol"].items():
        print(f"{name:{width}}  {value}")


def zero_shot(args: argparse.Namespace) -> None:
    """vtp eval zero-shot"""
    from vtp.evaluation.run import zero_shot

    templates = args.template or args.templates
    cfg = _shared(args)
    options = {"label": args.label, "templates": templates, "names": args.names, "top": args.top}
    _show(zero_shot(args.tokenizer, args.data, **options, cfg=cfg))


def probe(args: argparse.Namespace) -> None:
    """vtp eval linear, vtp eval knn"""
    from vtp.evaluation.run import probe

    options = {"label": args.label, "features": args.features, "top": args.top}
    _show(probe(args.task, args.tokenizer, args.train_data, args.data, **options, cfg=_shared(args)))


def reconstruction(args: argparse.Namespace) -> None:
    """vtp eval reconstruction"""
    from vtp.evaluation.run import reconstruction

    _show(reconstruction(args.tokenizer, args.data, extractor=args.extractor, cfg=_shared(args)))


def generation(args: argparse.Namespace) -> None:
    """vtp eval generation"""
    from vtp.evaluation.run import generation

    options = {"extractor": args.extractor, "judge": args.judge, "label": args.label}
    options |= {"real": args.real, "tokenizer": args.tokenizer}
    _show(generation(args.images, args.reference, **options, cfg=_shared(args)))


def reconstruct(args: argparse.Namespace) -> None:
    """vtp reconstruct"""
    from rich import print as show

    from vtp.evaluation.reconstruct_files import reconstruct_files, table
    from vtp.evaluation.run import EvalConfig

    cfg = EvalConfig(batch_size=args.batch_size, device=args.device, precision=args.precision)
    result = reconstruct_files(args.tokenizer, args.images, args.out, fit=args.fit, tile=args.tile, cfg=cfg)
    show(table(result))
    print(f"wrote {args.out / 'reconstruct.json'}; originals beside reconstructions in {args.out / 'strips'}")


def compare(args: argparse.Namespace) -> None:
    """vtp compare"""
    from rich import print as show

    from vtp.evaluation.run import EvalConfig
    from vtp.report.comparison import table, write_comparison

    names = ("annotations", "size", "limit", "batch_size", "device", "precision")
    cfg = EvalConfig(**{name: getattr(args, name) for name in names})
    results = write_comparison(args.tokenizers, args.data, args.out, extractor=args.extractor, cfg=cfg)
    show(table(args.tokenizers, results))
    print(f"wrote {args.out / 'compare.html'}, compare.png, compare.json")


def convert(args: argparse.Namespace) -> None:
    """vtp convert"""
    from vtp.models.legacy import convert

    model = convert(args.source, args.config, args.out, args.weights)
    print(f"published {args.out}: {args.weights}, {sum(p.numel() for p in model.parameters()):,} parameters")


def latents(args: argparse.Namespace) -> None:
    """vtp latents"""
    from vtp.generation.latents import encode_latents

    names = ("label", "annotations", "size", "flip", "limit", "batch_size", "device", "precision")
    encode_latents(args.tokenizer, args.data, args.out, **{name: getattr(args, name) for name in names})


def export(args: argparse.Namespace) -> None:
    """vtp export"""
    from vtp.models.export import export

    for file in export(args.tokenizer, args.out, args.format):
        print(f"wrote {file}")


def publish(args: argparse.Namespace) -> None:
    """vtp publish"""
    from vtp.models.published import add_evidence, upload, write_card

    add_evidence(args.tokenizer, args.stats, args.results)
    print(f"card: {write_card(args.tokenizer, name=args.push, license=args.license)}")
    if args.push is not None:
        print(f"sent to {upload(args.tokenizer, args.push, private=True if args.private else None).commit_url}")


def inspect_data(args: argparse.Namespace) -> None:
    """vtp data inspect"""
    from rich import print as show

    from vtp.report.dataset import table, write_inspection

    show(table(write_inspection(args.data, args.annotations, args.limit, args.out)))
    print(f"wrote {args.out / 'inspect.html'}, contact_sheet.png, inspect.json")


def pack_data(args: argparse.Namespace) -> None:
    """vtp data pack"""
    from rich.progress import Progress

    from vtp.config import ConfigError
    from vtp.data.pack import pack

    for name in ("shard_size", "workers"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1")
    options = {name: getattr(args, name) for name in ("annotations", "shard_size", "workers", "limit")}
    with Progress() as bar:
        task = bar.add_task("", total=None)

        def progress(doing: str, done: int, total: int) -> None:
            bar.update(task, description=f"{doing} shards", completed=done, total=total)

        done = pack(args.data, args.out, **options, progress=progress)
    left_out, kept = (", ".join(f"{n} {why}" for why, n in done[name].items()) for name in ("left_out", "kept"))
    print(f"packed {done['samples']:,} samples in {done['shards']:,} shards in {args.out}", end="; ")
    print(f"left out: {left_out or 'nothing'}" + (f"; kept with a flaw: {kept}" if kept else ""))


def sample(args: argparse.Namespace) -> None:
    """vtp sample"""
    from vtp.generation.sample import sample

    names = ("num", "steps", "cfg_scale", "classes", "sampler", "shift", "seed", "tokenizer")
    options = {name: getattr(args, name) for name in (*names, "batch_size", "device", "precision")}
    sample(args.dit, args.out, interval=tuple(args.interval), **options)


def report(args: argparse.Namespace) -> None:
    """vtp report"""
    from rich import print as show

    from vtp.report.findings import summary_table
    from vtp.report.page import write_report

    page = write_report(args.runs, args.out, args.data, args.annotations)
    show(summary_table(args.runs))
    print(f"wrote {page}")


if __name__ == "__main__":
    main()
