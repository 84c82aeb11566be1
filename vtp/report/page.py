"""`vtp report`: run folders -> one self-contained HTML page. Text from data and files is escaped, always."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import groupby, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray
from omegaconf import OmegaConf
from PIL import Image

from vtp.report import findings, markup, pictures, plots
from vtp.report.findings import duration, show
from vtp.report.pictures import Confusion, HeldOut, Hit, Retrieval, Tokenizer
from vtp.report.runs import Run, read_runs

LOSSES = {
    "total": "Total <span>weighted sum</span>",
    "clip": "Image-text contrast <span>InfoNCE, nats</span>",
    "siglip": "Image-text contrast <span>SigLIP, nats</span>",
    "dino": "Self-distillation <span>DINO, class tokens, nats</span>",
    "ibot": "Masked patches <span>iBOT, nats</span>",
    "koleo": "Spread of features <span>KoLeo</span>",
    "l1": "Pixels <span>L1, normalised pixels</span>",
    "perceptual": "Perceptual distance",
}
MACHINERY = {
    "lr": "Learning rate",
    "grad_norm": "Gradient norm <span>before clipping</span>",
    "images_per_second": "Speed <span>images/s</span>",
    "utilisation": "Utilisation <span>of the matmul rate</span>",
    "data_wait": "Waiting for data <span>share of the time</span>",
    "memory_gb": "Most memory <span>GB</span>",
    **{f"grad_{name}": f"Gradient <span>{name}, at the trunk's output</span>" for name in ("clip", "ssl", "rec")},
    "center_norm": "Teacher's centre <span>norm</span>",
    "logit_scale": "Logit scale <span>1 / temperature</span>",
    "skipped": "Skipped steps <span>gradient not finite</span>",
}
TEACHER = {"teacher_entropy_mean": "mean prediction", "teacher_entropy_single": "single predictions"}
NOT_CURVES = ("step", "images", "seconds", *TEACHER)
SHEET = 4  # samples shown of each class


class Section(NamedTuple):
    title: str
    body: str  # HTML

    @property
    def anchor(self) -> str:
        return self.title.lower().replace(" ", "-")


class Group(NamedTuple):
    """Runs whose pictures show the same held-out images."""

    held_out: HeldOut
    is_held_out: bool  # not what the run was trained on
    runs: list[tuple[int, Run, Tokenizer]]


def write_report(
    runs: Sequence[Path], out: Path | None = None, data: str | None = None, annotations: str | None = None
) -> Path:
    """Write one self-contained HTML page about run folders, side by side in the order given.

    Only files are read: config.yaml, environment.json, metrics.jsonl, eval/*.json, tokenizer/, latents/stats.json,
    dit/metrics.jsonl, samples/. What is missing is left out and said at the end of the page.

    Args:
        runs: run folders.
        out: the page; report.html in the (one) run's folder if None, beside the folders if there are several.
        data: held-out images for the pictures. If None: `scenes:test` for `scenes`, else what the evaluations in
            eval/ read, else the run's own training data, and the page says so.
        annotations: captions and labels of `data` by key, beside tar shards.

    Returns:
        The page's path.

    Raises:
        ConfigError: no run, or a folder that is none.
    """
    read = read_runs(runs)
    if out is None:
        out = read[0].path / "report.html" if len(read) == 1 else read[0].path.parent / "report.html"
    groups = _open(read, data, annotations)
    sections = [
        Section("Key figures", _key_figures(read)),
        Section("Loss curves", _curves(read)),
        Section("Teacher", _teacher(read)),
        Section("Reconstructions", _reconstructions(groups)),
        Section("Patch features", _features(groups)),
        Section("Zero-shot", _confusions(groups)),
        Section("Retrieval", _retrieval(groups)),
        Section("Generation", _generation(read, groups)),
        Section("Files", _files(read)),
    ]
    sections = [s for s in sections if s.body]
    title = "What " + " and ".join(run.name for run in read) + " learned"
    body = _header(title, read, sections)
    body += "".join(f'<section><h2 id="{s.anchor}">{s.title}</h2>{s.body}</section>\n' for s in sections)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(markup.self_contained(title, body + _missing(read)), encoding="utf-8")
    return out


# --- opening ---


def _open(runs: Sequence[Run], data: str | None, annotations: str | None) -> list[Group]:
    """Tokenizers, grouped by the held-out images they are shown."""
    opened: dict[tuple[str, str | None, int], Group] = {}
    for index, run in enumerate(runs):
        source, table, held_out = _held_out(run, data, annotations)
        if run.tokenizer is None or source is None:
            if source is None:
                run.notes.append("Neither the configuration nor a result names data, so no pictures were computed.")
            continue
        try:
            tokenizer = Tokenizer(run.tokenizer)
            key = (source, table, tokenizer.size)
            if key not in opened:
                opened[key] = Group(pictures.read_held_out(*key), held_out, [])
            if not opened[key].held_out.samples:
                run.notes.append(f"{source} holds no picture that can be read, so no pictures were computed.")
                continue
            opened[key].runs.append((index, run, tokenizer))
        except Exception as error:  # weights and data fail in many ways; a page about such a run is still wanted
            run.notes.append(f"Pictures were left out: {type(error).__name__}: {error}")
    return [group for group in opened.values() if group.runs]


def _held_out(run: Run, data: str | None, annotations: str | None) -> tuple[str | None, str | None, bool]:
    """(data, annotations, whether the run was not trained on it)."""
    if data is not None:
        return data, annotations, True
    trained = run.setting("data")
    if trained in ("scenes", "scenes:test"):
        return "scenes:test", None, trained == "scenes"
    protocols = [r["protocol"] for r in run.results.values() if isinstance(r.get("protocol"), Mapping)]
    for protocol in protocols:
        if isinstance(protocol.get("data"), str) and protocol["data"] != trained:
            return protocol["data"], protocol.get("annotations"), True
    table = run.setting("annotations")
    return (trained if isinstance(trained, str) else None), (table if isinstance(table, str) else None), False


# --- sections ---


def _header(title: str, runs: Sequence[Run], sections: Sequence[Section]) -> str:
    html = f"<header><h1>{escape(title)}</h1>"
    toy = "At toy size, one seed" if all(run.setting("data") == "scenes" for run in runs) else "One seed"
    for answer in findings.question(runs):
        html += (
            '<div class="answer"><p class="asked">Does a tokenizer that understands make a better latent space for '
            f"generation? {toy}; distances under {findings.TIE:.0%} apart are called a tie.</p>"
            f'<p class="said">{escape(answer.headline)}</p>'
            + "".join(f"<p>{escape(sentence)}</p>" for sentence in answer.sentences)
            + "</div>"
        )
    html += "".join(f'<p class="lead">{escape(findings.summary(run))}</p>' for run in runs)
    html += f'<nav>{"".join(f"""<a href="#{s.anchor}">{s.title}</a>""" for s in sections)}</nav>'
    html += '<div class="columns">'
    for index, run in enumerate(runs):
        html += f"<div>{markup.key(index, run)}<dl class='facts'>"
        html += "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in _facts(run)) + "</dl></div>"
    return html + "</div></header>\n"


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    env = run.environment
    if env.get("command"):
        yield "command", f"<code>{escape(str(env['command']))}</code>"
    if env.get("started"):
        yield "started", escape(str(env["started"]).replace("T", " "))
    seconds, images, step = run.last("seconds"), run.last("images"), run.last("step")
    if seconds is not None:
        yield "pre-training", duration(seconds) + (f", {step:,.0f} steps" if step is not None else "")
    if images is not None:
        yield "images seen", f"{images:,.0f} of <code>{escape(str(run.setting('data')))}</code>"
    left_out = _left_out(run)
    if left_out:
        yield "left out", escape(left_out)
    if run.dit_metrics and "seconds" in run.dit_metrics[-1]:
        last = run.dit_metrics[-1]
        yield "diffusion model", f"{duration(last['seconds'])}, {last.get('images', math.nan):,.0f} latents seen"
    shape = _shape(run)
    if shape:
        yield "tokenizer", shape
    if findings.hardware(run):
        yield "hardware", escape(findings.hardware(run))
    versions = env.get("versions")
    if isinstance(versions, Mapping):
        known = {"python": env.get("python"), **versions}
        yield "versions", escape(", ".join(f"{name} {version}" for name, version in known.items() if version))


def _left_out(run: Run) -> str:
    """What of the data could not be used, by data.json."""
    try:
        read = json.loads((run.path / "data.json").read_text(encoding="utf-8"))
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in read["broken"].items())
        return reasons and f"{reasons}; of {read['reads']:,} reads, each epoch's counted"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""


def _shape(run: Run) -> str:
    if run.tokenizer is None:
        return ""
    try:
        config = json.loads((run.tokenizer / "config.json").read_text())
        side, patch = int(config["image_size"]), int(config["vision_patch_size"])
        width = config["vision_feature_bottleneck"]
        channels = int(config["vision_embed_dim"] if width is None else width)
    except (ValueError, KeyError, TypeError):
        return ""
    return f"{side} x {side} pixels to {side // patch} x {side // patch} x {channels} latents"


def _key_figures(runs: Sequence[Run]) -> str:
    groups = findings.key_figures(runs)
    if not groups:
        return ""
    names, short = [run.name for run in runs], ""
    for task, of_task in groupby(groups, key=lambda group: group.task):
        short += f'<tr class="group"><th colspan="{len(runs) + 2}">{escape(task)}</th></tr>'
        for group in of_task:
            before = f"{group.subject}: " if group.subject else ""
            short += "".join(markup.figures_row(row, before) for row in group.main())
    full = ""
    for group in groups:
        note = group.protocol if group.same_protocol else f"{group.protocol} (protocols differ: no best is marked)"
        full += f'<tr class="group"><th colspan="{len(runs) + 2}">{escape(group.title)}'
        full += f'<span class="note">{escape(note)}</span></th></tr>' + "".join(
            markup.figures_row(row) for row in group.rows
        )
    legend = '<p class="note"><span class="best">best</span> of the runs, one seed each.</p>' if len(runs) > 1 else ""
    return (
        f"{legend}{markup.figures_table(names, short)}<details><summary>Every figure with its protocol</summary>"
        f"{markup.figures_table(names, full)}</details>"
    )


def _curves(runs: Sequence[Run]) -> str:
    names = list(dict.fromkeys(name for run in runs for name in run.losses() if name not in NOT_CURVES))
    alike = len({frozenset(LOSSES) & frozenset(run.losses()) for run in runs if run.metrics}) == 1
    losses = [name for name in LOSSES if name in names and (alike or name != "total")]  # unlike sums do not compare
    rest = [name for name in names if name not in LOSSES]
    html = "".join(_panel(runs, name, LOSSES[name]) for name in losses)
    diffusion = list(dict.fromkeys(n for run in runs for line in run.dit_metrics for n in line))
    for name in diffusion:
        if name not in (*NOT_CURVES, *MACHINERY):
            html += _panel(runs, name, f"Diffusion model <span>{escape(name)}</span>", diffusion=True)
    if not html:
        return ""
    text = "<p class='note'>Thin: as logged. Thick: moving mean over a twentieth of the run. </p>"
    html = f'{markup.legend(runs)}{text}<div class="panels">{html}</div>'
    if rest:
        inner = "".join(_panel(runs, name, MACHINERY.get(name, escape(name.replace("_", " ")))) for name in rest)
        html += (
            f'<details><summary>Learning rate, gradients, speed</summary><div class="panels">{inner}</div></details>'
        )
    return html


def _panel(runs: Sequence[Run], name: str, title: str, diffusion: bool = False) -> str:
    curves = []
    for index, run in enumerate(runs):
        lines = [line for line in (run.dit_metrics if diffusion else run.metrics) if name in line]
        if lines:
            curves.append(plots.Curve(*_xy(lines, name), index))
    if not curves:
        return ""
    xlabel = "latents seen" if diffusion else "images seen"
    drawing = plots.panel(curves, f"{name} over {xlabel}", None if diffusion else _reference(runs, name), xlabel)
    return f'<figure class="panel"><figcaption>{title}</figcaption>{drawing}</figure>'


def _xy(lines: Sequence[Mapping[str, float]], name: str) -> tuple[ndarray, ndarray]:
    return (
        np.array([line["images"] if "images" in line else line["step"] for line in lines]),
        np.array([line[name] for line in lines]),
    )


def _reference(runs: Sequence[Run], name: str) -> tuple[float, str] | None:
    """What a loss is when nothing has been learned, where all runs that have it agree."""
    having = [run for run in runs if name in run.losses()]
    if name in ("dino", "ibot"):
        values = {findings.prototypes(run) for run in having}
        symbol = "K"
    elif name == "clip":
        values = {_global_batch(run) for run in having}
        symbol = "B"
    else:
        return None
    value = values.pop() if len(values) == 1 else None
    return None if value is None else (math.log(value), f"ln {symbol}, {symbol} = {value}")


def _global_batch(run: Run) -> int | None:
    size, ranks = run.setting("batch", "clip"), run.environment.get("world_size", 1)
    return size * ranks if isinstance(size, int) and isinstance(ranks, int) else None


def _teacher(runs: Sequence[Run]) -> str:
    html = ""
    for index, run in enumerate(runs):
        state, k = findings.teacher(run), findings.prototypes(run)
        if state is None or k is None:
            if "dino" in run.losses() or "ibot" in run.losses():
                run.notes.append("The teacher's entropies were not logged (or K is unknown), so it was not judged.")
            continue
        curves = []
        for field, name in (
            ("teacher_entropy_mean", "mean prediction"),
            ("teacher_entropy_single", "single predictions"),
        ):
            lines = [line for line in run.metrics if field in line]
            curves.append(plots.Curve(*_xy(lines, field), index, name))
        drawing = plots.panel(curves, f"teacher entropies of {run.name}", (math.log(k), f"ln K, K = {k}"), floor=0.0)
        mood = "good" if state.state == "not collapsed" else "bad"
        head, _, rest = state.sentence.partition(": ")
        balanced = ""
        if run.setting("distil", "centering") == "sinkhorn":
            balanced = (
                "<p class='note'>Sinkhorn-Knopp spreads every batch over the prototypes, so the mean prediction stays "
                "high by construction; a collapse shows as single predictions rising to ln K.</p>"
            )
        html += (
            f'<div>{markup.key(index, run)}<p><span class="state {mood}">{escape(head)}:</span> {escape(rest)}</p>'
            f'{balanced}</div><figure class="panel"><figcaption>Entropy of predictions <span>nats</span></figcaption>'
            f"{drawing}</figure>"
        )
    if not html:
        return ""
    rule = (
        "The entropy of the teacher's mean prediction must stay high, that of single ones well under it. Judged "
        f"over the last tenth of the run. Collapsed: the mean's is below {findings.COLLAPSED} ln K. Not started: the "
        f"single ones' is above {findings.UNIFORM} ln K, or no self-distillation loss is below "
        f"{findings.UNLEARNED} ln K."
    )
    return f'<p class="note">{rule}</p><div class="columns">{html}</div>'


def _reconstructions(groups: Sequence[Group]) -> str:
    html = ""
    for group in groups:
        drawing = [(i, run, tokenizer) for i, run, tokenizer in group.runs if tokenizer.draws]
        if not drawing:
            continue
        shown = group.held_out.shown()
        made = [(i, run, tokenizer.reconstructions(shown)) for i, run, tokenizer in drawing]
        html += _about(group, drawing) + f'<div class="cards" style="--tiles:{1 + len(made)}">'
        for n, sample in enumerate(shown):
            tiles = markup.tile(made[0][2][0][n], "original")
            tiles += "".join(markup.tile(rec[n], f"{run.name} {db[n]:.1f} dB") for _, run, (_, rec, db) in made)
            html += markup.card(tiles, sample.captions)
        html += "</div>"
    return html and f"<p class='note'>PSNR of each picture under it.</p>{html}"


def _features(groups: Sequence[Group]) -> str:
    html = ""
    for group in groups:
        shown = group.held_out.shown()
        made = [(run, tokenizer.feature_colours(shown)) for _, run, tokenizer in group.runs]
        html += _about(group, group.runs) + f'<div class="cards" style="--tiles:{1 + len(made)}">'
        for n in range(len(shown)):
            tiles = markup.tile(made[0][1][0][n], "image")
            tiles += "".join(markup.tile(colours[n], run.name) for run, (_, colours) in made)
            html += markup.card(tiles, ())
        html += "</div>"
    text = (
        "The first three principal components of the trunk's patch features over all images shown, as red, green and "
        "blue, one square a patch. Like colours are like features, within one run; colours of two runs do not compare."
    )
    return html and f"<p class='note'>{text}</p>{html}"


def _confusions(groups: Sequence[Group]) -> str:
    html = ""
    for group in groups:
        aligned = [(i, run, t) for i, run, t in group.runs if t.aligned]
        seen = [(i, run, t, t.image_features(group.held_out.samples)) for i, run, t in aligned]
        cards = ""
        for label in group.held_out.classes:
            for index, run, tokenizer, features in seen:
                confusion = tokenizer.confusion(group.held_out, features, label)
                if confusion is not None:
                    key = markup.key(index, run) if len(seen) > 1 else ""
                    cards += f'<div class="card"><h3>{escape(label)} {key}</h3>{_heat(confusion)}</div>'
        html += f'{_about(group, aligned)}<div class="cards loose">{cards}</div>' if cards else ""
    text = (
        "Classes are named to the text tower only: prompts, no training on labels. Rows: the truth, columns: the "
        "answer, each row in per cent of its images; the outlined diagonal is right."
    )
    return html and f"<p class='note'>{text}</p>{html}"


def _heat(confusion: Confusion) -> str:
    n = len(confusion.names)
    rows = confusion.counts / confusion.counts.sum(1, keepdims=True)
    accuracy = confusion.counts.trace() / confusion.counts.sum()
    dense = n > 12
    head = "".join(f"<th><span>{escape(name)}</span></th>" for name in confusion.names)
    body = ""
    for i, name in enumerate(confusion.names):
        cells = ""
        for j in range(n):
            share = rows[i, j]
            classes = " ".join(c for c, on in (("strong", share > 0.6), ("truth", i == j)) if on)
            text = "" if dense or share < 0.005 else f"{100 * share:.0f}"
            tip = escape(f"{name}, answered {confusion.names[j]}: {share:.0%} of {confusion.counts[i].sum()}")
            cells += f'<td class="{classes}" style="--v:{share:.2f}" title="{tip}">{text}</td>'
        body += f"<tr><th>{escape(name)}</th>{cells}</tr>"
    said = f"{accuracy:.0%} of {confusion.counts.sum()} right, chance {1 / n:.0%}"
    if confusion.left_out:
        said += f"; {confusion.left_out} rarer classes left out"
    return (
        f'<p class="note">{said}</p><div class="scroll">'
        f'<table class="confusion{" dense" * dense}"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _retrieval(groups: Sequence[Group]) -> str:
    html = ""
    for group in groups:
        aligned = [(i, run, t) for i, run, t in group.runs if t.aligned]
        found = [(markup.key(i, run) if len(aligned) > 1 else "", t.retrieval(group.held_out)) for i, run, t in aligned]
        cells = "".join(_found(retrieval, key) for key, retrieval in found if retrieval is not None)
        html += _about(group, aligned) + cells if cells else ""
    return html


def _found(found: Retrieval, key: str) -> str:
    recalls = "".join(
        f'<tr><th>{name}</th><td class="value">{recall:.1%}</td><td class="value">{chance:.1%}</td></tr>'
        for name, (recall, chance) in found.recalls.items()
    )
    html = (
        f"{key}<p class='note'>A pool of {len(found.pool)} images with {len(found.captions)} distinct captions.</p>"
        f'<table class="figures" style="width:auto"><thead><tr><th>over the pool</th><th class="value">recall</th>'
        f'<th class="value">chance</th></tr></thead><tbody>{recalls}</tbody></table><div class="columns"><div>'
        "<h3>Image to its five nearest captions</h3>"
    )
    for query, hits in zip(found.queries, found.texts, strict=True):
        items = "".join(f'<li class="{_mark(hit)}">{escape(found.captions[hit.place][:200])}</li>' for hit in hits)
        html += f'<div class="query">{markup.img(found.pool[query].image, "query", 128)}<ol>{items}</ol></div>'
    html += "</div><div><h3>Caption to its five nearest images</h3>"
    for query, hits in zip(found.queries, found.images, strict=True):
        pairs = [(_mark(hit), found.pool[hit.place].image) for hit in hits]
        images = "".join(f'<figure class="{mark}">{markup.img(image, mark, 128)}</figure>' for mark, image in pairs)
        caption = escape(found.pool[query].captions[0][:200])
        html += f'<div class="query"><div><p>{caption}</p><div class="row">{images}</div></div></div>'
    return html + "</div></div>"


def _mark(hit: Hit) -> str:
    return "hit" if hit.right else "miss"


def _generation(runs: Sequence[Run], groups: Sequence[Group]) -> str:
    real = ""
    sheets: dict[tuple[float, str], str] = {}  # by how the samples were drawn: runs are compared within one
    folders = sorted({folder.name for run in runs for folder in run.path.glob("samples*") if folder.is_dir()})
    for name, (index, run) in product(folders, enumerate(runs)):
        drawn = _samples(run, name)
        if drawn is None:
            continue
        by_class, protocol = drawn
        real = real or _real_sheet(run, groups, list(by_class))
        keys = ("num", "sampler", "steps", "shift", "cfg_scale", "seed")
        said = ", ".join(f"{key.replace('_', ' ')} {protocol[key]}" for key in keys if key in protocol)
        how = findings.guidance(protocol, otherwise=name)
        sheet = f"<div>{markup.key(index, run)}{markup.sheet(by_class)}<p class='note'>{escape(said)}</p></div>"
        sheets[how] = sheets.get(how, "") + sheet
    html = "".join(
        f'<h3>Samples, {escape(words)}</h3><div class="columns">{sheet}</div>'
        for (_, words), sheet in sorted(sheets.items())
    )
    return _distance_table(runs) + (f'<div class="columns">{real}</div>' if real else "") + html


def _samples(run: Run, name: str) -> tuple[dict[str, list[UInt8[ndarray, "h w 3"]]], dict[str, Any]] | None:
    """(samples of each class, the protocol they were drawn by); None where the run has none."""
    folder = run.path / name
    if not folder.is_dir():
        return None
    try:
        protocol = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
        classes = [str(name) for name in protocol["classes"]]
        files = sorted(folder.glob("[0-9]*.png"))
        by_class: dict[str, list[Any]] = {name: [] for name in classes}
        for i, file in enumerate(files[: SHEET * len(classes)]):  # picture i is of class i modulo their number
            by_class[classes[i % len(classes)]].append(np.asarray(Image.open(file).convert("RGB")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        run.notes.append(f"{name}/ cannot be shown: {type(error).__name__}: {error}")
        return None
    if not files:
        run.notes.append(f"{name}/ holds no pictures.")
        return None
    return {name: images for name, images in list(by_class.items())[:16] if images}, protocol


def _real_sheet(run: Run, groups: Sequence[Group], names: Sequence[str]) -> str:
    """Held-out images of the same classes, for comparison."""
    try:
        stats = json.loads((run.path / "latents" / "stats.json").read_text(encoding="utf-8"))
        label, classes = str(stats["label"]), list(stats["classes"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        run.notes.append(f"No real images are shown beside the samples: latents/stats.json: {error}")
        return ""
    held_out = next((g.held_out for g in groups if any(r is run for _, r, _ in g.runs)), None)
    if held_out is None or tuple(classes) != held_out.classes.get(label):
        return ""
    size = next(t.size for g in groups for _, r, t in g.runs if r is run)
    rows: dict[str, list[Any]] = {name: [] for name in names}
    for sample in held_out.samples:
        name = classes[sample.labels[label]] if label in sample.labels else None
        if name in rows and len(rows[name]) < SHEET:
            rows[name].append(np.asarray(pictures.center_crop(Image.fromarray(sample.image), size)))
    return f"<div><span class='key'>real, held out</span>{markup.sheet(rows)}</div>"


def _distance_table(runs: Sequence[Run]) -> str:
    """Real and reconstructed pictures, then for every way of drawing samples: samples, difference, class agreement."""
    tables = [{d.how: d for d in findings.distances(run)} for run in runs]
    hows = list(dict.fromkeys(how for table in tables for how in table))
    if not hows:
        return ""
    known = [d for table in tables for d in table.values()]
    fair = len({(d.network, d.count) for d in known}) == 1
    first = [next(iter(table.values()), None) for table in tables]
    rows = _distances("other real images", [None if d is None else d.real for d in first], fair)
    rows += _distances("the same, reconstructed", [None if d is None else d.reconstruction for d in first], fair)
    for how in hows:
        of_how = [table.get(how) for table in tables]
        rows += _distances(f"samples, {how}", [None if d is None else d.generation for d in of_how], fair)
        added = [None if d is None else d.added for d in of_how]
        rows += _distances("difference: what generation adds", added, fair)
    agreement = {}  # of real pictures and reconstructions it is the same, however samples were drawn
    for group in findings.key_figures(runs):
        for row in group.rows:
            if row.metric == "class_agreement":
                agreement[group.subject] = markup.figures_row(row, f"{group.subject}: ")
            elif row.metric.endswith(".class_agreement"):
                agreement[row.metric] = markup.figures_row(row)
    rows += "".join(agreement.values())
    networks = " and ".join(dict.fromkeys(f"{d.features} ({d.network})" for d in known))
    counts = " or ".join(dict.fromkeys(f"{d.count:,}" for d in known if isinstance(d.count, int)))
    each = f", each of {counts} pictures: a smaller set reads higher" if counts else ""
    return (
        f"<p class='note'>Fr&eacute;chet distances to real images: <b>{escape(networks)}</b>{each}.</p>"
        f"{markup.figures_table([run.name for run in runs], rows)}"
    )


def _distances(label: str, values: Sequence[float | None], fair: bool) -> str:
    known = [v for v in values if v is not None]
    best = values.index(min(known)) if fair and findings.decided(known) else None
    shown = [None if v is None else show("fd", v) for v in values]
    return markup.figures_row(findings.Row("fd", label, shown, list(values), -1, best)) if known else ""


def _files(runs: Sequence[Run]) -> str:
    html = ""
    for index, run in enumerate(runs):
        parts = [("config.yaml", OmegaConf.to_yaml(OmegaConf.create(run.config)))] if run.config else []
        parts += [("environment.json", json.dumps(run.environment, indent=2))] if run.environment else []
        parts += [(f"eval/{name}.json", json.dumps(result, indent=2)) for name, result in run.results.items()]
        if parts:
            inner = "".join(
                f'<details class="long"><summary>{escape(name)}</summary><pre>{escape(text)}</pre></details>'
                for name, text in parts
            )
            html += (
                f"<div>{markup.key(index, run)}<p class='note'><code>{escape(str(run.path))}</code></p>{inner}</div>"
            )
    return html and f'<div class="columns">{html}</div>'


def _missing(runs: Sequence[Run]) -> str:
    items = "".join(f"<li>{escape(run.name)}: {escape(note)}</li>" for run in runs for note in dict.fromkeys(run.notes))
    return f'<footer><h2 id="left-out">Left out</h2><ul>{items}</ul></footer>' if items else ""


def _about(group: Group, runs: Sequence[tuple[int, Run, Tokenizer]]) -> str:
    kind = "held-out images" if group.is_held_out else "training images (no held-out data is known: give data)"
    names = " and ".join(run.name for _, run, _ in runs)
    return f"<p class='note'>{escape(names)} on {kind} of <code>{escape(group.held_out.data)}</code>.</p>"
