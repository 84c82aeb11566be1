import io
import json
import math

import pytest
from rich.console import Console

from vtp.report.findings import distances, duration, key_figures, question, show, summary, summary_table, teacher
from vtp.report.runs import read_runs


@pytest.mark.parametrize(
    ("curve", "state"),
    [
        ("healthy", "not collapsed"),
        ("one answer", "collapsed"),
        ("uniform", "not started"),
        ("back to uniform", "collapsed"),
    ],
)
def test_the_teacher_is_judged_by_its_entropies(make_run, curve, state):
    (run,) = read_runs([make_run("vtp", teacher=curve)])
    judged = teacher(run)
    assert judged.state == state
    assert judged.sentence.lower().startswith(f"{state}:")
    assert f"ln K = {math.log(256):.2f}" in judged.sentence
    assert "teacher has" in summary(run)


def test_no_verdict_on_a_teacher_that_is_not_there(make_run):
    (run,) = read_runs([make_run("ae", understands=False)])
    assert teacher(run) is None
    assert "teacher" not in summary(run)


@pytest.mark.parametrize(
    # Distances of the run that understands and of the other: reconstructed, guided, unguided.
    ("ours", "theirs", "headline"),
    [
        ((2.0, 4.0, 5.0), (1.0, 6.0, 7.0), "Yes, in this run."),
        ((2.0, 6.0, 7.0), (1.0, 5.5, 6.5), "Not by the samples; yes by what generation adds to reconstruction."),
        ((2.0, 9.0, 10.0), (1.0, 5.0, 6.0), "No, not in this run."),
        ((2.0, 5.1, 6.1), (1.0, 5.0, 6.0), "Too close to call in this run."),
        ((2.0, 6.0, 5.0), (1.0, 5.0, 6.0), "Yes with no guidance; no with guidance 2."),
        ((2.0, 6.1, 8.0), (1.0, 6.0, 6.0), "No with no guidance; too close to call with guidance 2."),
    ],
)
def test_the_answer_is_chosen_by_the_numbers(make_run, ours, theirs, headline):
    paths = [make_run("vtp", True, *ours), make_run("ae", False, *theirs)]
    for order in (paths, paths[::-1]):
        (answer,) = question(read_runs(order))
        assert answer.headline == headline
    text = " ".join(answer.sentences)
    for distance in (1, 2):
        assert f"(vtp {ours[distance]:.2f}, ae {theirs[distance]:.2f}" in text
    assert "reconstructions are at 2.00 for vtp and 1.00 for ae, real pictures at 0.500" in text
    assert f"(vtp {ours[2] - 2:.2f}, ae {theirs[2] - 1:.2f}, no guidance)" in text
    assert "Both tokenizers saw 153,600 images" in text
    assert "4 min 00 s for vtp and 2 min 00 s for ae (2.0 times as long)" in text


def test_exchanging_the_numbers_exchanges_the_winner(make_run):
    runs = read_runs([make_run("vtp", gfd=4.0), make_run("ae", False, gfd=8.0)])
    assert "No guidance: samples from vtp's latent space are closer" in question(runs)[0].sentences[0]
    runs[0].results, runs[1].results = runs[1].results, runs[0].results
    assert "Guidance 2: samples from ae's latent space are closer" in question(runs)[0].sentences[0]


def test_unequal_budgets_and_features_are_said(make_run):
    runs = read_runs([make_run("vtp"), make_run("ae", False)])
    runs[1].metrics = runs[1].metrics[:30]
    assert "did not see equally many images" in " ".join(question(runs)[0].sentences)
    for name in ("generation", "generation_unguided"):
        runs[1].results[name]["protocol"]["extractor"] = "another network"
    assert question(runs)[0].headline == "The files do not say."


def test_the_question_needs_both_kinds_of_run(make_run):
    vtp, ae = read_runs([make_run("vtp"), make_run("ae", False)])
    assert question([vtp]) == question([ae]) == question([vtp, vtp]) == []
    del ae.results["generation"], ae.results["generation_unguided"]
    assert question([vtp, ae]) == []
    for result in vtp.results.values():
        result["metrics"].pop("reconstructed.gfd_judge", None)
    assert [d.added for d in distances(vtp)] == [None, None]


def test_the_best_is_marked_only_among_equal_protocols(make_run):
    runs = read_runs([make_run("vtp", gfd=4.0), make_run("ae", False, gfd=8.0)])
    groups = {g.title: g for g in key_figures(runs)}
    assert list(groups)[0] == "zero-shot: shape"
    drawn = [title for title in groups if title.startswith("generation")]
    assert drawn == ["generation: shape, no guidance", "generation: shape, guidance 2"]
    row = groups["generation: shape, guidance 2"].rows[0]
    assert (row.better, row.best, row.values) == (-1, 0, [4.0, 8.0])
    assert groups["zero-shot: shape"].rows[0].best is None  # only one run has it
    runs[0].results["generation"]["protocol"]["extractor"] = "another network"
    group = {g.title: g for g in key_figures(runs)}["generation: shape, guidance 2"]
    assert not group.same_protocol and all(row.best is None for row in group.rows)


def test_the_terminal_table_names_runs_and_units(make_run):
    paths = [make_run("vtp"), make_run("ae", False)]
    console = Console(width=120, file=io.StringIO())
    console.print(summary_table(paths))
    text = console.file.getvalue()
    for expected in ("vtp", "ae", "24.20 dB", "top-1 accuracy (chance 12.5%)", "81.0%", "153,600", "4 min 00 s"):
        assert expected in text


def test_runs_of_one_name_are_told_apart_by_their_parents(tmp_path):
    for parent in "ab":
        (tmp_path / parent / "vtp" / "eval").mkdir(parents=True)
    assert [run.name for run in read_runs([tmp_path / "a" / "vtp", tmp_path / "b" / "vtp"])] == ["a/vtp", "b/vtp"]


def test_lines_are_sorted_and_odd_values_dropped(tmp_path):
    lines = [{"step": 2, "l1": 1.0, "note": "text", "flag": True}, {"step": 1, "l1": 2.0}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (run,) = read_runs([tmp_path])
    assert run.metrics == [{"step": 1.0, "l1": 2.0}, {"step": 2.0, "l1": 1.0}]


def test_figures_as_readers_want_them():
    assert [duration(s) for s in (4.4, 61.0, 3661.0)] == ["4 s", "1 min 01 s", "1 h 01 min"]
    assert show("top1", 0.5) == "50.0%"
    assert show("psnr", 24.0) == "24.00 dB"
    assert [show("fd_judge", v) for v in (0.0123, 5.2, 123.4, 5279.1)] == ["0.012", "5.20", "123.4", "5,279"]
