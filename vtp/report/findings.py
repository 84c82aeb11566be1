"""What a run's figures say, in words. Every sentence is chosen by the numbers and its thresholds are named here."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vtp.report.runs import Run, numbers, read_runs

if TYPE_CHECKING:
    from rich.table import Table

COLLAPSED = 0.5  # of ln K: a mean prediction below this means most prototypes are unused
UNIFORM = 0.95  # of ln K: single predictions above this say nothing about their image
BEGUN = 0.8  # of ln K: single predictions below this told images apart
UNLEARNED = 0.98  # of ln K: a self-distillation loss above this has not left the uniform answer
TIE = 0.05  # relative difference of distances below which one seed decides nothing

UNDERSTANDING = ("clip", "siglip", "dino", "ibot")  # losses that ask for more than pixels


class Kind(NamedTuple):
    """How a metric is written and which way is better: 1 higher, -1 lower, 0 neither."""

    pattern: str
    label: str
    better: int
    unit: str = ""


KINDS = (
    Kind(r"psnr", "PSNR", 1, "dB"),
    Kind(r"ssim", "SSIM", 1),
    Kind(r"lpips", "LPIPS", -1),
    Kind(r"[rg]?fid", "FID", -1),
    Kind(r"[rg]?fd(_.+)?", "Fréchet distance", -1),
    Kind(r"kid", "KID", -1),
    Kind(r"inception_score|is", "Inception score", 1),
    Kind(r"held_out_accuracy", "accuracy on the training images that chose the penalty", 0, "%"),
    Kind(r"mean_top_?1", "top-1 accuracy, mean over classes", 1, "%"),
    Kind(r"class_agreement|agreement", "class agreement", 1, "%"),
    Kind(r"precision", "precision", 1, "%"),
    Kind(r"recall", "recall", 1, "%"),
    Kind(r"(mean_)?(top|recall|hit)_?@?\d+", "", 1, "%"),
    Kind(r"(.*_)?(accuracy|acc)(_.+)?", "", 1, "%"),
    Kind(r"chance(_.+)?", "chance", 0, "%"),
)
FRECHET = re.compile(r"[rg]?(fid|fd(_.+)?)")
SECONDARY = re.compile(
    r"top_?5|mean_top_?1|chance|held_out_accuracy|penalty|(real|reconstructed)\..+"
)  # not in the short table
# What was measured, or where it lay, is not how: these may differ between runs that are compared.
WHEREABOUTS = ("tokenizer", "model", "images", "samples", "dit", "latents", "out", "tokenizer_sha256", "dit_sha256")


def kind(metric: str) -> Kind:
    """What is known about a metric of this name; nothing about an unknown one."""
    name = metric.rsplit(".", 1)[-1]
    found = next((k for k in KINDS if re.fullmatch(k.pattern, name)), Kind("", "", 0))
    feature = re.fullmatch(r"[rg]?fd_(.+)", name)
    label = found.label or re.sub(r"^top_?(\d+)$", r"top-\1 accuracy", name).replace("_", " ")
    return found._replace(label=f"{label} ({feature[1]})" if feature else label)


def show(metric: str, value: float) -> str:
    """A value as a reader wants it: shares in per cent, figures of one size with as many decimals."""
    unit = kind(metric).unit
    if unit == "%" and 0 <= value <= 1:
        return f"{100 * value:.1f}%"
    if unit == "dB":
        return f"{value:.2f} dB"
    size = abs(value)
    decimals = 0 if size >= 1000 or (value == int(value) and kind(metric).better == 0) else 1 if size >= 100 else 2
    return f"{value:,.{decimals if size >= 1 or decimals == 0 else 3}f}"


class Row(NamedTuple):
    """One figure of all runs; `best` is the index of the winning run, None where they cannot be compared."""

    metric: str
    label: str
    shown: list[str | None]
    values: list[float | None]
    better: int
    best: int | None


class Group(NamedTuple):
    """The rows of one results file, with the protocol they were measured under."""

    task: str
    subject: str  # what tells it from others of its task: label, features, guidance
    protocol: str
    rows: list[Row]
    same_protocol: bool

    @property
    def title(self) -> str:
        """Task and subject."""
        return f"{self.task}: {self.subject}" if self.subject else self.task

    def main(self) -> list[Row]:
        """The rows of the short table, with the chance level where it is known."""
        chance = next((r for r in self.rows if r.metric == "chance"), None)
        level = "" if chance is None else next(f" (chance {text})" for text in chance.shown if text is not None)
        return [row._replace(label=row.label + level) for row in self.rows if not SECONDARY.fullmatch(row.metric)]


def key_figures(runs: Sequence[Run]) -> list[Group]:
    """The figures of all runs, results files of one name side by side."""
    stems = list(dict.fromkeys(stem for run in runs for stem in run.results))
    return [_group(stem, runs) for stem in sorted(stems, key=lambda s: _place(s, runs))]


def _place(stem: str, runs: Sequence[Run]) -> tuple[int, float, str]:
    """By task, then what was drawn with the least guidance first."""
    order = ("zero-shot", "linear", "knn", "reconstruction", "generation")
    result = next(run.results[stem] for run in runs if stem in run.results)
    task, protocol = str(result.get("task", stem)), result.get("protocol")
    scale, _ = guidance(protocol if isinstance(protocol, Mapping) else {})
    return (order.index(task) if task in order else len(order)), scale, stem


def _group(stem: str, runs: Sequence[Run]) -> Group:
    results = [run.results.get(stem) for run in runs]
    first = next(r for r in results if r is not None)
    same = len({_comparable(run, r) for run, r in zip(runs, results, strict=True) if r is not None}) == 1
    tables = [dict(numbers(r["metrics"])) if r is not None else {} for r in results]
    rows = []
    for name in dict.fromkeys(name for table in tables for name in table):
        values = [table.get(name) for table in tables]
        known, better = [v for v in values if v is not None], kind(name).better
        best = None
        distance = FRECHET.fullmatch(name.rsplit(".", 1)[-1])
        if better != 0 and same and (decided(known) if distance else len(set(known)) > 1):
            best = values.index((max if better > 0 else min)(known))
        prefix = name.rsplit(".", 1)[0].replace(".", " ") + " " if "." in name else ""
        shown = [None if v is None else show(name, v) for v in values]
        rows.append(Row(name, prefix + kind(name).label, shown, values, better, best))
    return Group(str(first.get("task", stem)), _subject(first), _protocol(first), rows, same)


def decided(distances: Sequence[float]) -> bool:
    """Whether the smallest of several distances is smaller than the next by more than a tie."""
    first, *rest = sorted(distances)
    return bool(rest) and abs(_relative(first, rest[0])) >= TIE


def _subject(result: Mapping[str, Any]) -> str:
    parts = [_label(result)]
    protocol = result.get("protocol")
    if isinstance(protocol, Mapping):
        if isinstance(protocol.get("features"), str):
            parts.append(protocol["features"].partition(":")[0] + " features")
        parts.append(guidance(protocol)[1])
    return ", ".join(part for part in parts if part)


def _label(result: Mapping[str, Any]) -> str:
    protocol = result.get("protocol")
    label = protocol.get("label") if isinstance(protocol, Mapping) else None
    return label if isinstance(label, str) else ""


def _protocol(result: Mapping[str, Any]) -> str:
    protocol = result.get("protocol", {})
    parts = []
    for name, value in protocol.items() if isinstance(protocol, Mapping) else [("", protocol)]:
        if _whereabouts(name, value) or str(name).endswith("_sha256"):  # the whole file is on the page as well
            continue
        if isinstance(value, list | dict) and len(json.dumps(value)) > 60:
            value = f"{len(value)} of them"
        parts.append(f"{str(name).replace('_', ' ')}: {value}" if name else str(value))
    if result.get("seed") is not None:
        parts.append(f"seed: {result['seed']}")
    return "; ".join(parts)


def _whereabouts(name: str, value: Any) -> bool:
    return isinstance(value, str) and name in WHEREABOUTS


def _comparable(run: Run, result: Mapping[str, Any]) -> str:
    """The protocol without the places of files."""
    protocol = result.get("protocol", {})
    if isinstance(protocol, Mapping):
        protocol = {k: v for k, v in protocol.items() if not _whereabouts(k, v)}
    protocol = [protocol, result.get("data_sha256")]
    return json.dumps(protocol, sort_keys=True, default=str).replace(str(run.path), "")


def find_results(run: Run, task: str) -> dict[str, dict[str, Any]]:
    """The results of a task by file; the file that bears the task's name first."""
    found = {stem: r for stem, r in run.results.items() if r.get("task") == task}
    return dict(sorted(found.items(), key=lambda item: item[0] != task))


# --- the teacher ---


class Teacher(NamedTuple):
    """How self-distillation stands: state is "collapsed", "not started" or "not collapsed"."""

    state: str
    sentence: str


def prototypes(run: Run) -> int | None:
    """K, the number of prototypes, from the configuration."""
    value = run.setting("distil", "prototypes")
    return value if isinstance(value, int) else None


def teacher(run: Run) -> Teacher | None:
    """Read the teacher's entropies against ln K; None where they were not logged or K is not known.

    H of the mean prediction below 0.5 ln K: collapsed to few prototypes. H of single predictions above 0.95 ln K, or
    both self-distillation losses above 0.98 ln K: not started, or collapsed to the uniform answer if it had started.
    """
    k = prototypes(run)
    mean, single = run.mean_of_last("teacher_entropy_mean"), run.mean_of_last("teacher_entropy_single")
    if k is None or k < 2 or mean is None or single is None:
        return None
    ceiling = math.log(k)
    losses = [loss for loss in (run.mean_of_last("dino"), run.mean_of_last("ibot")) if loss is not None]
    silent = single > UNIFORM * ceiling
    later = run.metrics[len(run.metrics) // 10 :]  # a random head may begin with opinions
    had_started = min(line.get("teacher_entropy_single", ceiling) for line in later) < BEGUN * ceiling
    figures = (
        f"At the end the mean prediction has an entropy of {mean:.2f} nats (it uses as many as {math.exp(mean):.0f} of "
        f"{k} prototypes evenly used would) and single predictions one of {single:.2f}, against ln K = {ceiling:.2f}."
    )
    if mean < COLLAPSED * ceiling:
        return Teacher("collapsed", f"Collapsed: nearly all images get the same few prototypes. {figures}")
    if silent and had_started:
        return Teacher("collapsed", f"Collapsed: back at the uniform answer after it had begun to differ. {figures}")
    if silent:
        return Teacher("not started", f"Not started: single predictions are still nearly uniform. {figures}")
    if losses and min(losses) > UNLEARNED * ceiling:
        why = f"the student's loss is still {min(losses):.2f}, no better than the uniform answer"
        return Teacher("not started", f"Not started: {why}. {figures}")
    return Teacher("not collapsed", f"Not collapsed: it uses many prototypes and tells images apart. {figures}")


# --- the paper's question ---


class Answer(NamedTuple):
    """An answer to whether understanding makes a better latent space, for one pair of runs."""

    headline: str
    sentences: list[str]


class Distances(NamedTuple):
    """Frechet distances of one run to real images, all of equally many pictures, in the features of one network."""

    features: str  # the figure's name, without g
    network: str  # the features as the protocol describes them
    how: str  # the samples were drawn: guidance, or the results file
    count: Any  # pictures measured, of each kind
    generation: float
    reconstruction: float | None  # of other real pictures, encoded and decoded
    real: float | None  # of those pictures as they are: the least that can be measured of so many

    @property
    def added(self) -> float | None:
        """What generation adds on top of reconstruction."""
        return None if self.reconstruction is None else self.generation - self.reconstruction

    def text(self, field: str) -> str:
        """One of the distances as it is written, an en dash where it is missing."""
        value = getattr(self, field)
        return "\N{EN DASH}" if value is None else show("fd", value)


def understands(run: Run) -> bool | None:
    """Whether the run learned from more than pixels; None where neither its log nor its configuration says."""
    if run.metrics:
        return any(name in run.losses() for name in UNDERSTANDING)
    weights = run.setting("weights")
    if not isinstance(weights, Mapping):
        return None
    return any(weights.get(name, 0) > 0 for name in ("clip", "ssl"))


def guidance(protocol: Mapping[str, Any], otherwise: str = "") -> tuple[float, str]:
    """The scale by which samples were guided, and in words; (inf, otherwise) where their files do not say."""
    scale = protocol.get("cfg_scale")
    if not isinstance(scale, int | float):
        return math.inf, otherwise
    return float(scale), "no guidance" if scale == 1 else f"guidance {scale:g}"


def distances(run: Run) -> list[Distances]:
    """Distances of samples, reconstructions and real images; for every way samples were drawn, the least guided first.

    The paper compares tokenizers without guidance, which hides much of what a latent space is like.
    """
    found = []
    for stem, result in find_results(run, "generation").items():
        metrics = dict(numbers(result["metrics"]))
        name = next((n for n in metrics if FRECHET.fullmatch(n)), None)
        if name is None:
            continue
        protocol = result["protocol"] if isinstance(result.get("protocol"), Mapping) else {}
        features = re.sub(r"^g(?=fi?d)", "", name)
        scale, how = guidance(protocol, otherwise=stem)
        among = (metrics[name], metrics.get(f"reconstructed.{name}"), metrics.get(f"real.{name}"))
        network = str(protocol.get("extractor", features))
        found.append((scale, Distances(features, network, how, protocol.get("num"), *among)))
    return [d for _, d in sorted(found, key=lambda pair: pair[0])]


def question(runs: Sequence[Run]) -> list[Answer]:
    """Compare every run that understands with the first that only reconstructs; [] where the files cannot say."""
    baseline = next((r for r in runs if understands(r) is False and distances(r)), None)
    learned = [r for r in runs if understands(r) and distances(r)]
    return [] if baseline is None else [_answer(run, baseline) for run in learned]


def _answer(run: Run, baseline: Run) -> Answer:
    a, b = run.name, baseline.name
    theirs = {(d.network, d.how): d for d in distances(baseline)}
    pairs = [(d, theirs[key]) for d in distances(run) if (key := (d.network, d.how)) in theirs]
    if not pairs:
        ways = "; ".join(f"{r.name}: {d.network}, {d.how}" for r in (run, baseline) for d in distances(r))
        return Answer("The files do not say.", [f"These distances cannot be compared ({ways})."])
    verdicts = {ours.how: _verdict(_relative(ours.generation, other.generation)) for ours, other in pairs}
    sentences = [_samples_sentence(a, b, ours, other) for ours, other in pairs]
    smaller = set()
    for ours, other in pairs[:1]:
        if ours.added is not None and other.added is not None:
            smaller.add(_verdict(_relative(ours.added, other.added)))
            sentences.append(_added_sentence(a, b, ours, other))
    if len(set(verdicts.values())) > 1:
        said = [f"{verdict} with {how}" for how, verdict in verdicts.items()]
        headline = f"{said[0][0].upper()}{said[0][1:]}; {'; '.join(said[1:])}."
    else:
        headline = {"yes": "Yes, in this run.", "no": "No, not in this run."}.get(
            next(iter(verdicts.values())), "Too close to call in this run."
        )
        if headline.startswith("No") and smaller == {"yes"}:
            headline = "Not by the samples; yes by what generation adds to reconstruction."
    return Answer(headline, [" ".join(sentences), " ".join(_budget_sentences(run, baseline))])


def _verdict(closer: float) -> str:
    """Yes where the run that understands is closer to real images by more than a tie."""
    return "too close to call" if abs(closer) < TIE else "yes" if closer < 0 else "no"


def _relative(x: float, y: float) -> float:
    """x - y as a share of the larger: -0.1 means that x is 10 % below y."""
    return (x - y) / max(abs(x), abs(y), 1e-12)


def _samples_sentence(a: str, b: str, ours: Distances, theirs: Distances) -> str:
    closer = _relative(ours.generation, theirs.generation)
    figures = f"{a} {ours.text('generation')}, {b} {theirs.text('generation')}"
    how = f"{ours.how[0].upper()}{ours.how[1:]}: "
    if abs(closer) < TIE:
        return f"{how}samples from both latent spaces lie equally far from real images, within {TIE:.0%} ({figures})."
    winner = a if closer < 0 else b
    return f"{how}samples from {winner}'s latent space are closer to real images ({figures}; {abs(closer):.0%} lower)."


def _added_sentence(a: str, b: str, ours: Distances, theirs: Distances) -> str:
    added = _relative(ours.added or 0.0, theirs.added or 0.0)
    count = f"{ours.count:,} " if isinstance(ours.count, int) else "as many "
    rec = (
        f"Measured of {count}pictures like the samples, reconstructions are at {ours.text('reconstruction')} for {a} "
        f"and {theirs.text('reconstruction')} for {b}"
    )
    if ours.real is not None:
        rec += f", real pictures at {ours.text('real')}"
    figures = f"{a} {ours.text('added')}, {b} {theirs.text('added')}, {ours.how}"
    if abs(added) < TIE:
        return f"{rec}; what generation adds to reconstruction is the same for both, within {TIE:.0%} ({figures})."
    return f"{rec}; what generation adds to reconstruction is smaller for {a if added < 0 else b} ({figures})."


def _budget_sentences(run: Run, baseline: Run) -> list[str]:
    images, others = run.last("images"), baseline.last("images")
    seconds, theirs = run.last("seconds"), baseline.last("seconds")
    sentences = []
    if images is not None and others is not None:
        if images == others:
            sentences.append(f"Both tokenizers saw {images:,.0f} images.")
        else:
            sentences.append(
                f"They did not see equally many images ({run.name} {images:,.0f}, {baseline.name} {others:,.0f}), so "
                "this is not the comparison at equal images."
            )
    if seconds is not None and theirs is not None:
        sentences.append(
            f"Pre-training took {duration(seconds)} for {run.name} and {duration(theirs)} for {baseline.name} "
            f"({seconds / max(theirs, 1e-9):.1f} times as long)."
        )
    latents, their_latents = (r.dit_metrics[-1].get("images") if r.dit_metrics else None for r in (run, baseline))
    if latents is not None and their_latents is not None:
        same = f"Both diffusion models saw {latents:,.0f} latents."
        other = (
            f"The diffusion models saw {latents:,.0f} ({run.name}) and {their_latents:,.0f} ({baseline.name}) latents."
        )
        sentences.append(same if latents == their_latents else other)
    return sentences


# --- a run in words ---


def duration(seconds: float) -> str:
    """As people say it: 48 s, 4 min 10 s, 3 h 05 min."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    return f"{s // 60} min {s % 60:02d} s" if s < 3600 else f"{s // 3600} h {s % 3600 // 60:02d} min"


def learned_from(run: Run) -> str:
    """The objectives of a run in words."""
    names = run.losses()
    parts = [
        ("image-text contrast", ("clip", "siglip")),
        ("self-distillation", ("dino", "ibot")),
        ("reconstruction", ("l1", "perceptual")),
    ]
    on = [words for words, losses in parts if any(name in names for name in losses)]
    return " + ".join(on)


def hardware(run: Run) -> str:
    """Accelerators and processor of a run, and how much of the latter it used."""
    env = run.environment
    gpus = env.get("gpus") if isinstance(env.get("gpus"), list) else []
    parts = [", ".join(f"{gpus.count(g)} x {g}" for g in dict.fromkeys(gpus))] if gpus else []
    if isinstance(env.get("cpus"), int):
        threads = env.get("torch_threads")
        used = f"{threads} of " if isinstance(threads, int) and threads < env["cpus"] and not gpus else ""
        parts.append(f"{used}{env['cpus']} CPU cores")
    return ", ".join(parts)


def summary(run: Run) -> str:
    """The run in two or three plain sentences."""
    parts = [f"{run.name} learned from {learned_from(run)}" if learned_from(run) else run.name]
    images, seconds = run.last("images"), run.last("seconds")
    if images is not None:
        parts.append(f"over {images:,.0f} images of {run.setting('data') or 'unnamed data'}")
    if seconds is not None:
        parts.append(f"in {duration(seconds)}")
    if hardware(run):
        parts.append(f"on {hardware(run)}")
    text = " ".join(parts) + "."
    said = "; ".join(_said(run))
    if said:
        text += f" On held-out images: {said}."
    state = teacher(run)
    return text + (f" Its teacher has {_TEACHER[state.state]}." if state is not None else "")


_TEACHER = {"collapsed": "collapsed", "not started": "not started to learn", "not collapsed": "not collapsed"}


def _said(run: Run) -> Iterator[str]:
    """Headline figures as clauses."""
    for task, how in (("zero-shot", "by zero-shot"), ("linear", "by a linear probe")):
        named = []
        for result in find_results(run, task).values():
            share, chance = _metric(result, r"top_?@?1|accuracy"), _metric(result, "chance")
            if share is not None and "latent" not in _subject(result):
                named.append(f"{_label(result) or 'class'} {share:.0%}")
                named[-1] += "" if chance is None else f" (chance {chance:.0%})"
        if named:
            yield f"{', '.join(named)} right {how}"
    value = next((_metric(r, "psnr") for r in find_results(run, "reconstruction").values()), None)
    if value is not None:
        yield f"reconstruction at {value:.1f} dB PSNR"


def _metric(result: Mapping[str, Any], pattern: str) -> float | None:
    return next((v for n, v in numbers(result["metrics"]) if re.fullmatch(pattern, n.rsplit(".", 1)[-1])), None)


def summary_table(runs: Sequence[Path]) -> Table:
    """The key figures of run folders as a rich table for the terminal: `rich.print(summary_table(runs))`.

    Raises:
        ConfigError: no run, or a folder that is none.
    """
    from rich.markup import escape
    from rich.table import Table

    read = read_runs(runs)
    table = Table("figure", *(escape(run.name) for run in read), "better")
    for column in table.columns[1:-1]:
        column.justify = "right"
    for group in key_figures(read):
        for row in group.main():
            cells = [
                "" if text is None else f"[bold]{escape(text)}[/]" if i == row.best else escape(text)
                for i, text in enumerate(row.shown)
            ]
            table.add_row(
                f"{escape(group.title)}, {escape(row.label)}", *cells, {1: "higher", -1: "lower"}.get(row.better, "")
            )
        table.add_section()
    for name, unit in (("images", "images seen"), ("seconds", "wall time")):
        last = [run.last(name) for run in read]
        cells = ["" if v is None else duration(v) if name == "seconds" else f"{v:,.0f}" for v in last]
        table.add_row(unit, *cells, "")
    return table
