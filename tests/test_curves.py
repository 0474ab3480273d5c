"""Curves over numbers of labels and over severities of corruptions."""

from __future__ import annotations

import re

import pytest

from anysite.report.charts import line_plot
from anysite.report.curves import describe_corruptions, describe_labels
from anysite.report.page import write_report
from anysite.report.read import Row
from anysite.statistics import Estimate


def row(value: float, case: str = "A1", **fields: object) -> Row:
    given = {"dataset": "phantom", "method": "baseline", "seed": "0", "train_domains": "north+east", "domain": "west",
             "split": "unseen", "patient": case, "case": case, "class": "organ", "metric": "dice", "labels": "all",
             "corruption": "none", "severity": "0"}  # fmt: skip
    return Row.model_validate(given | {"value": value} | fields)


def test_label_curves_are_in_order_and_by_method() -> None:
    rows = [row(v, labels=count) for count, v in (("10", 0.7), ("2", 0.5), ("all", 0.8), ("1", 0.4))]
    rows += [row(v, method="t_ae", labels=count) for count, v in (("1", 0.6), ("all", 0.9))]
    rows += [row(0.95, case="B1", split="in_domain", domain="north")]
    curves = describe_labels(rows)
    assert curves is not None
    assert curves.counts == ("1", "2", "10", "all")
    means = {(split, name): [e and round(e.mean, 6) for e in es] for split, name, es in curves.table}
    assert means == {
        ("unseen", "baseline"): [0.4, 0.5, 0.7, 0.8],
        ("unseen", "t_ae"): [0.6, None, None, 0.9],
        ("trained on, other patients", "baseline"): [None, None, None, 0.95],
    }
    assert describe_labels([row(0.5), row(0.6, case="A2")]) is None


def test_corruption_drops_are_relative_to_the_same_cases_clean() -> None:
    rows = [row(0.8), row(0.1, case="never corrupted"), row(0.2, labels="5")]
    rows += [row(0.8 - 0.1 * s, corruption="blur", severity=str(s)) for s in (1, 2, 3)]
    rows += [row(0.3, corruption="noise", severity="4"), row(0.9, corruption="noise", severity="5")]
    rows += [row(0.4, method="t_ae"), row(0.4, method="t_ae", corruption="blur", severity="1")]
    curves = describe_corruptions(rows)
    assert curves is not None
    assert curves.names == ("blur", "noise")
    plain, other = curves.results
    assert plain.method == "baseline"
    assert plain.clean is not None
    assert plain.clean.mean == pytest.approx(0.8)
    assert plain.drops == pytest.approx({"blur": 0.125})  # all that both were measured on
    assert plain.gap == pytest.approx(0.1)
    assert other.drops == {"blur": 0.0}
    assert (curves.alone, curves.alike) == (4, True)
    (only,) = (describe_corruptions([r for r in rows if r.method == "baseline"]) or curves).results
    assert only.drops == pytest.approx({"blur": 0.25, "noise": 0.25})
    assert only.gap == pytest.approx(0.8 - 0.6)
    assert describe_corruptions([row(0.5)]) is None


def test_of_different_corruptions_the_page_says_that_they_do_not_compare() -> None:
    rows = [row(0.8), row(0.4, corruption="blur", severity="1")]
    rows += [row(0.8, method="t_ae"), row(0.6, method="t_ae", corruption="noise", severity="1")]
    curves = describe_corruptions(rows)
    assert curves is not None
    assert (curves.alone, curves.alike) == (0, False)
    assert [result.corrupted and result.corrupted.mean for result in curves.results] == [0.4, 0.6]


def test_a_corruption_that_was_changed_counts_as_two() -> None:
    rows = [row(0.8)]
    for version, value in (("blur/1", 0.6), ("blur/2", 0.4)):
        rows.append(row(value, corruption="blur", severity="1", corruption_version=version))
    curves = describe_corruptions(rows)
    assert curves is not None
    assert curves.results[0].drops == pytest.approx({"blur/1": 0.25, "blur/2": 0.5})


def test_label_curves_are_of_the_cases_and_training_sites_of_every_number() -> None:
    rows = [row(0.4, labels="5"), row(0.6, labels="all")]
    rows += [row(0.9, "B1", labels="5", train_domains="west", domain="north")]  # the other way round, once
    curves = describe_labels(rows)
    assert curves is not None
    ((_, _, estimates),) = curves.table
    assert [estimate and estimate.mean for estimate in estimates] == [0.4, 0.6]
    assert curves.alone == 1


def test_lines_hold_every_estimate_and_leave_gaps_out() -> None:
    curve = (Estimate(0.5, 0.4, 0.6, 10, 10), None, Estimate(0.75, None, None, 1, 1))
    chart = str(line_plot(("1", "5", "all"), {"<b>": curve, "other": (None, None, None)}, "few labels"))
    assert chart.count("<title>&lt;b&gt;: ") == 2
    assert "&lt;b&gt;: 1 50.0, all 75.0" in chart
    points = re.search(r'polyline points="([^"]+)"', chart)
    assert points is not None
    (_, first), (_, last) = (map(float, p.split(",")) for p in points[1].split())
    assert last < first  # higher Dice stands higher


def test_the_page_shows_both_and_compares_at_all_labels_alone(tmp_path) -> None:
    rows = [row(v, labels=n, method=m) for m in ("baseline", "t_ae") for n, v in (("1", 0.3), ("all", 0.8))]
    rows += [row(0.6, method=m, corruption="ghosting", severity="2") for m in ("baseline", "t_ae")]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(r.model_dump_json(by_alias=True) + "\n" for r in rows))
    text = write_report([path], tmp_path / "report.html").read_text()
    assert "Few labels" in text
    assert "ghosting <small>drop</small>" in text
    assert "(1 labels)" not in text
    assert "25.0 %" in text
