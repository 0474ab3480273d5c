from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean, median

import nibabel
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from scipy import stats

from anysite.errors import DataError, FileFormatError
from anysite.report import write_report
from anysite.report.charts import Strip, strip_plot
from anysite.report.configuration import describe_run
from anysite.report.contours import boundary_loops
from anysite.report.format import number, points, without_folders
from anysite.report.methods import split_by_method, summarise_methods, tell_runs_apart
from anysite.report.pictures import draw_case
from anysite.report.read import PredictedCase, PredictedDataset, Row, read_sources
from anysite.report.summary import score_cases
from anysite.statistics import adjust_holm, compare_paired, estimate_mean

VOID = {"meta", "br", "input", "link", "img", "hr"}
HOSTILE = "<script>alert('x')</script>&\"b"
CASES = ("a0", "a1", HOSTILE, "b0", "b1", "b2")
DICE = {
    "a0": (0.9, 0.8),
    "a1": (0.95, None),
    HOSTILE: (0.85, 0.75),
    "b0": (0.7, 0.5),
    "b1": (0.6, 0.4),
    "b2": (0.1, 0.0),
}


class Page(HTMLParser):
    """Checks that every element is closed where it should be, and collects attributes and visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.stack):
            self.words += data.split()

    @property
    def text(self) -> str:
        return " ".join(self.words)


BASE_ROW = {
    "dataset": "toy",
    "method": "erm",
    "adapt": "none",
    "seed": 0,
    "train_domains": ["A"],
    "split": "unseen",
    "patient": "",
    "corruption": "",
    "severity": 0,
    "labels": None,
    "commit": "abc1234",
    "config": "f00d",
    "unit": "",
}


def row(metric: str, value: float | None, **changes) -> dict:
    return {**BASE_ROW, "metric": metric, "value": value, **changes}


def site_of(case: str) -> str:
    return "B" if case.startswith("b") else "A"


def split_of(case: str) -> str:
    return "unseen" if case.startswith("b") else "in_domain"


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images, folder = tmp_path / "secret patients" / "raw", tmp_path / "predicted"
    images.mkdir(parents=True)
    folder.mkdir()
    rng = np.random.default_rng(0)
    cases = {}
    rows = [row("dice", 0.01, case="b2", domain="B", corruption="noise", severity=3, **{"class": "cup"})]
    for index, case in enumerate(CASES):
        label = np.zeros((24, 30), np.uint8)
        label[6:16, 8:20], label[9:13, 11:16] = 100, 200
        mask = np.roll(np.searchsorted([0, 100, 200], label), index, axis=1).astype(np.uint8)
        image, truth = images / f"{index}.png", images / f"{index}_l.png"
        Image.fromarray(rng.integers(0, 255, (24, 30), np.uint8)).save(image)
        Image.fromarray(label).save(truth)
        Image.fromarray(mask).save(folder / f"{index}.png")
        patient = "p0" if case in ("a0", "a1") else case
        place = {"case": case, "domain": site_of(case), "split": split_of(case), "patient": patient}
        for name, value in zip(("disc", "cup"), DICE[case], strict=True):
            rows.append(row("dice", value, **place, **{"class": name}))
            distance = None if value is None else 10 * value
            rows.append(row("hd95", distance, **place, **{"class": name}, unit="mm"))
        files = {"mask": f"{index}.png", "images": [str(image)], "label": str(truth)}
        cases[case] = {"status": "done", "seconds": 1.5, "error": None, **files, **place}
    failure = {"status": "failed", "mask": None, "error": f"{images}/bad.png: file is truncated"}
    cases["bad"] = {**cases["b0"], **failure}
    run = {
        "path": str(images / "run"),
        "preset": "erm",
        "train_domains": ["A"],
        "config": {"data": {"root": str(images)}, "epochs": 7},
        "versions": {"torch": "2.13"},
        "plan": {"patch_size": [24, 24], "reasons": ["the median image"]},
    }
    dataset = {"name": "toy", "classes": ["background", "disc", "cup"], "label_values": [0, 100, 200]}
    content = {"created": "2025-01-01T00:00:00Z", "dataset": dataset, "runs": [run], "cases": cases}
    (folder / "predictions.json").write_text(json.dumps(content))
    write_lines(folder / "rows.jsonl", rows)
    return folder


def written(paths: list[Path], output: Path) -> tuple[str, Page]:
    html = write_report(paths, output).read_text(encoding="utf-8")
    return html, Page(html)


def test_headline_numbers_equal_those_computed_from_the_rows(folder, tmp_path):
    _, page = written([folder], tmp_path / "report.html")
    case = {name: fmean(v for v in values if v is not None) for name, values in DICE.items()}
    in_domain = fmean([(case["a0"] + case["a1"]) / 2, case[HOSTILE]])  # patients count, not cases
    unseen = fmean([case["b0"], case["b1"], case["b2"]])
    low, high = sorted([(case["a0"] + case["a1"]) / 2, case[HOSTILE]])
    assert f"Dice, in-domain {100 * in_domain:.1f}" in page.text
    assert f"{100 * low:.1f} to {100 * high:.1f} 2 patients, 3 cases" in page.text
    assert f"Dice, unseen sites {100 * unseen:.1f}" in page.text
    assert "3 patients, 3 cases" in page.text
    difference = f"Difference between sites {100 * (in_domain - unseen):.1f} in-domain minus unseen patients"
    assert difference in page.text
    assert "lost" not in page.text
    assert "Weights and settings digest f00d" in page.text
    assert f"{100 * fmean([0.7, 0.6, 0.1]):.1f}" in page.text  # the disc at site B
    assert "1 Dice value undefined" in page.text
    distances = [fmean([10 * v for v in DICE[c] if v is not None]) for c in ("b0", "b1", "b2")]
    assert f"{median(distances):.1f} {fmean(distances):.1f}" in page.text
    assert "1 value measured on corrupted images, which only the section on corruptions counts" in page.text


def test_worst_cases_come_first_and_the_median_case_stands_for_its_site(folder, tmp_path):
    html, page = written([folder], tmp_path / "report.html")
    worst = html[html.index("Worst cases first") : html.index('id="cases"')]
    assert re.findall(r"Dice <b>([\d.]+)</b>", worst) == ["5.0", "50.0", "60.0", "80.0", "85.0", "95.0"]
    sites = html[html.index("Sites side by side") : html.index("Every case by site")]
    assert re.findall(r'class="id">(\w+)<', sites) == ["a0", "b1"]
    assert sites.count('<g class="truth c0">') == sites.count('<g class="prediction c1">') == 2
    assert "bad bad.png: file is truncated" in page.text
    assert "1 case failed" in page.text


def test_page_is_self_contained_well_formed_and_names_no_folder(folder, tmp_path):
    html, page = written([folder], tmp_path / "report.html")
    assert "secret" not in html
    assert str(tmp_path) not in html
    assert "http" not in re.sub(r'http-equiv="', "", html)
    for _, name, value in page.attributes:
        if name in ("src", "href"):
            assert value.startswith(("data:image/jpeg;base64,", "#"))
    assert HOSTILE in page.text
    assert HOSTILE not in html
    assert html.count("<script") == 2
    for part in ("<style>", "<h1>", 'lang="en"', "<desc>", "the median image", "abc1234", "f00d", "2.13"):
        assert part in html


def test_an_image_too_large_for_memory_costs_no_report(folder, tmp_path, monkeypatch):
    def fail(path: Path) -> None:
        raise MemoryError(f"no memory for {path}")

    monkeypatch.setattr("anysite.report.images.files.read", fail)
    html, page = written([folder], tmp_path / "report.html")
    assert "A file of this case cannot be read: MemoryError." in page.text
    assert "secret" not in html


def test_missing_images_and_labels_are_said_in_place_of_the_picture(folder, tmp_path):
    for image in (tmp_path / "secret patients" / "raw").glob("*.png"):
        image.unlink()
    html, page = written([folder], tmp_path / "report.html")
    assert "no longer where it was" in page.text
    assert "data:image" not in html.replace("img-src data:", "")
    (folder / "rows.jsonl").unlink()
    _, page = written([folder], tmp_path / "report.html")
    assert "No case has a label" in page.text


def test_volume_shows_the_slice_of_largest_disagreement_as_radiologists_see_it(tmp_path):
    label, mask = np.zeros((20, 24, 6), np.uint8), np.zeros((20, 24, 6), np.uint8)
    label[4:10, 5:12, 1:5] = 1
    mask[4:10, 5:12, 1:5] = 1
    mask[14:19, 2:6, 3] = 1  # right-hand part of a RAS grid, near the back, in slice 4 of the file
    image = np.random.default_rng(0).normal(size=label.shape).astype(np.float32)
    affine = np.diag([1.0, 1.0, 5.0, 1.0])
    for name, array in (("image", image), ("label", label), ("mask", mask)):
        nibabel.save(nibabel.Nifti1Image(array, affine), tmp_path / f"{name}.nii.gz")
    case = PredictedCase(mask="mask.nii.gz", images=["image.nii.gz"], label="label.nii.gz")
    picture = draw_case(tmp_path, "v", case, PredictedDataset(label_values=[0, 1]))
    assert picture.problem == ""
    assert picture.slice_text == "slice 4 of 6"
    extra = re.findall(r'<path d="([^"]+)"', picture.svg)[-1]
    loops = [np.array(re.findall(r"([\d.]+) ([\d.]+)", part), float) for part in extra.split("M")[1:]]
    centres = sorted(loop.mean(axis=0).tolist() for loop in loops)
    # The patient's right lies left, the back below.
    assert len(loops) == 2
    assert centres[0][0] < centres[1][0]
    assert centres[0][1] > centres[1][1]
    other = PredictedCase(mask="mask.nii.gz", images=["image.nii.gz"], label="gone.nii.gz")
    assert "truth" not in draw_case(tmp_path, "v", other, PredictedDataset()).svg


def test_a_single_slice_is_shown_whole_however_uneven_its_spacing(tmp_path):
    array = np.zeros((20, 24, 1), np.uint8)
    array[4:10, 5:12] = 1
    for name in ("image", "mask"):
        nibabel.save(nibabel.Nifti1Image(array, np.diag([3.0, 1.0, 1.0, 1.0])), tmp_path / f"{name}.nii.gz")
    case = PredictedCase(mask="mask.nii.gz", images=["image.nii.gz"])
    picture = draw_case(tmp_path, "v", case, PredictedDataset(label_values=[0, 1]))
    assert picture.slice_text == "slice 1 of 1"


@pytest.mark.parametrize(
    "content",
    [
        {"unseen": {"voxels": [1, 2], "right": [1], "confidence": [1, 2]}},
        {"unseen": {"voxels": [1], "right": [-1], "confidence": [1]}},
        {"unseen": {"voxels": [1], "right": [1], "confidence": ["much"]}},
        {name: {key: [1] * count for key in ("voxels", "right", "confidence")}
         for count, name in enumerate(("unseen", "in_domain"), start=1)},
        [],
    ],
)  # fmt: skip
def test_damaged_counts_of_reliability_are_refused_by_name(folder, tmp_path, content):
    (folder / "reliability.json").write_text(json.dumps(content))
    with pytest.raises(FileFormatError, match=r"reliability\.json"):
        write_report([folder], tmp_path / "r.html")


@given(arrays.arrays(bool, st.tuples(st.integers(1, 7), st.integers(1, 7))))
def test_boundary_loops_enclose_the_mask(mask):
    loops = boundary_loops(mask)
    area = 0.0
    for loop in loops:
        x, y = loop.T
        area += (x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2
        assert (np.abs(np.roll(loop, -1, axis=0) - loop).sum(axis=1) == 1).all()
    assert area == mask.sum()
    padded = np.pad(mask, 1).astype(int)
    edges = np.abs(np.diff(padded, axis=0)).sum() + np.abs(np.diff(padded, axis=1)).sum()
    assert sum(len(loop) for loop in loops) == edges


def benchmark_rows() -> list[dict]:
    rng = np.random.default_rng(1)
    rows = []
    for method, gain in (("erm", 0.0), ("mix", 0.03), ("bad", -0.01)):
        for seed, left in itertools.product((0, 1), "ABC"):
            train = "+".join(site for site in "ABC" if site != left)
            run = {"method": method, "seed": seed, "train_domains": train}
            rows.append(row("train_seconds", 90.0, **run, case=""))
            for site, index in itertools.product("ABC", range(5)):
                split = "unseen" if site == left else "in_domain"
                shift = gain - 0.1 * (left == "B") if site == left else 0.05
                place = {"domain": site, "case": f"{site}{index}", "patient": f"{site}{index // 2}"}
                value = 0.8 + shift + rng.normal(0, 0.01)
                rows.append(row("dice", value, **{**run, **place, "split": split, "class": "x"}))
    return rows


def test_methods_are_compared_as_computed_directly(tmp_path):
    raw = benchmark_rows()
    _, page = written([write_lines(tmp_path / "results.jsonl", raw)], tmp_path / "report.html")

    def unseen(method: str) -> dict[str, float]:
        chosen = [r for r in raw if r["method"] == method and r["split"] == "unseen" and r["case"]]
        return {c: fmean(r["value"] for r in chosen if r["case"] == c) for c in {r["case"] for r in chosen}}

    patients = {r["case"]: r["patient"] for r in raw if r["case"]}
    base = unseen("erm")
    comparisons = {m: compare_paired(unseen(m), base, patients) for m in ("mix", "bad")}
    adjusted = dict(zip(comparisons, adjust_holm([c.p_value for c in comparisons.values()]), strict=True))
    summaries = summarise_methods(split_by_method([Row.model_validate(r) for r in raw]), "erm")
    assert [s.name for s in summaries] == ["erm", "mix", "bad"]
    assert summaries[0].comparison is None
    for summary in summaries[1:]:
        assert summary.comparison is not None
        assert summary.comparison.difference.mean == pytest.approx(comparisons[summary.name].difference.mean)
        assert summary.p_adjusted == pytest.approx(adjusted[summary.name])
        paired = {c: unseen(summary.name)[c] - base[c] for c in base}
        assert dict(summary.differences) == pytest.approx(paired)
        by_patient = {p: [] for p in patients.values()}
        for case, value in paired.items():
            by_patient[patients[case]].append(value)
        differences = [fmean(v) for v in by_patient.values()]
        assert summary.comparison.p_value == pytest.approx(stats.wilcoxon(differences)[1])
        assert points(fmean(differences), True) in page.text
        assert summary.left_out == (0, 0)
    for summary in summaries:
        mean = estimate_mean(list(unseen(summary.name).values()), [patients[c] for c in unseen(summary.name)])
        assert summary.unseen is not None
        assert summary.unseen.mean == pytest.approx(mean.mean)
        assert points(mean.mean) in page.text
        assert summary.worst_site == "B"
        assert summary.train_seconds == 90
        assert summary.matrix.cells["A, C", "B"].worst
        assert sum(cell.worst for cell in summary.matrix.cells.values()) == 1
        assert summary.matrix.cells["A, C", "A"].split == "in_domain"
        assert summary.seeds == ("0", "1")
    assert "1.5 min" in page.text


def unseen_rows(method: str, seed: int, values: dict[str, float], **changes) -> list[Row]:
    """Rows of unseen cases; the first letter of a case is its site, the rest its patient."""
    places = [{"domain": c[0], "case": c, "patient": c[1:], "class": "x"} for c in values]
    return [
        Row.model_validate(row("dice", values[p["case"]], method=method, seed=seed, **p, **changes))
        for p in places
    ]


def test_what_a_method_costs_at_home_is_shown_without_unseen_sites(tmp_path):
    cases = [f"B{i}" for i in range(8)]
    rows = [
        r.model_copy(update={"split": "in_domain"})
        for method, value in (("baseline", 0.5), ("robust", 0.6))
        for r in unseen_rows(method, 0, dict.fromkeys(cases, value))
    ]
    lines = [r.model_dump(mode="json", by_alias=True) for r in rows]
    _, page = written([write_lines(tmp_path / "rows.jsonl", lines)], tmp_path / "report.html")
    assert "+10.0" in page.text


def test_scores_of_other_masks_are_left_out_and_said(folder, tmp_path):
    path = folder / "predictions.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "origin": "f00d"}))
    _, page = written([folder], tmp_path / "report.html")
    assert "run anysite evaluate again" not in page.text
    path.write_text(json.dumps({**json.loads(path.read_text()), "origin": "another run"}))
    _, page = written([folder], tmp_path / "report.html")
    assert "run anysite evaluate again" in page.text
    assert "mean over patients" not in page.text


def test_cases_that_could_not_be_scored_are_named(folder, tmp_path):
    rows = [r for r in map(json.loads, (folder / "rows.jsonl").read_text().splitlines()) if r["case"] != "b1"]
    write_lines(folder / "rows.jsonl", rows)
    summary = {"failed": {"b1": "a mask of shape (2, 2)"}, "unpredicted": ["c0"]}
    (folder / "summary.json").write_text(json.dumps(summary))
    _, page = written([folder], tmp_path / "report.html")
    assert "2 cases failed or not scored" in page.text
    assert "a mask of shape (2, 2)" in page.text
    assert "1 other labelled case without a mask here, such as c0" in page.text
    assert "not scored" in page.text


def test_runs_of_one_name_and_seed_stay_apart():
    first, second = (
        unseen_rows("robust", 0, {"B1": v, "B2": v}, config=c) for v, c in ((0.9, "a"), (0.3, "b"))
    )
    another_seed = unseen_rows("robust", 1, {"B1": 0.5, "B2": 0.5}, config="c")
    named = tell_runs_apart([*first, *second, *another_seed])
    assert {(row.method, row.value) for row in named} == {
        ("robust #1", 0.9),
        ("robust #2", 0.3),
        ("robust", 0.5),
    }
    of_jobs = [row.model_copy(update={"job": "x"}) for row in [*first, *second]]
    assert tell_runs_apart(of_jobs) == of_jobs


def test_methods_equal_at_every_seed_differ_in_nothing_whatever_seeds_each_has(tmp_path):
    cases = [f"B{i}" for i in range(8)]
    base = [r for s in (0, 1, 2) for r in unseen_rows("baseline", s, dict.fromkeys(cases, 0.6 + 0.1 * s))]
    fewer = unseen_rows("fewer", 2, dict.fromkeys(cases, 0.8))
    _, compared = summarise_methods(split_by_method([*base, *fewer]), "baseline")
    assert compared.comparison is not None
    assert compared.comparison.difference.mean == 0
    assert compared.comparison.p_value == 1
    assert compared.left_out == (0, 16)
    lines = [r.model_dump(mode="json", by_alias=True) for r in [*base, *fewer]]
    _, page = written([write_lines(tmp_path / "rows.jsonl", lines)], tmp_path / "report.html")
    assert "no counterpart: 0 values of fewer, 16 values of baseline" in page.text


def test_only_what_both_methods_measured_alike_is_paired():
    base = unseen_rows("baseline", 0, {"B1": 0.5, "B2": 0.4, "C1": 0.9})
    other = unseen_rows("other", 0, {"B1": 0.6, "B2": 0.6, "D1": 0.1})
    elsewhere = unseen_rows("other", 0, {"C1": 0.2}, train_domains=["A", "B"])
    undefined = unseen_rows("baseline", 0, {"D1": float("nan")})
    rows = [*base, *other, *elsewhere, *undefined]
    _, compared = summarise_methods(split_by_method(rows), "baseline")
    assert compared.comparison is not None
    assert compared.comparison.difference.mean == pytest.approx(0.15)
    assert dict(compared.differences) == pytest.approx({"B1": 0.1, "B2": 0.2})
    assert compared.left_out == (2, 1)
    apart = summarise_methods(split_by_method([*base, *unseen_rows("late", 1, {"B1": 0.6})]), "baseline")[1]
    assert apart.comparison is None
    assert apart.left_out == (1, 3)


def test_patients_of_one_id_at_two_sites_are_two_people():
    values = {"B1": 0.2, "B2": 0.4, "C1": 0.6, "C2": 0.9}
    rows = unseen_rows("baseline", 0, values) + unseen_rows("other", 0, {c: v / 2 for c, v in values.items()})
    _, compared = summaries = summarise_methods(split_by_method(rows), "baseline")
    assert [s.unseen.n_patients for s in summaries if s.unseen] == [4, 4]
    assert compared.comparison is not None
    assert compared.comparison.difference.n_patients == 4
    assert compared.comparison.p_value == pytest.approx(stats.wilcoxon(list(values.values()))[1])


def test_ablations_stay_apart_and_are_named_by_what_differs(tmp_path):
    shared, reach = "train.steps=500", "plan.patch_size=[32, 32]"
    variants = {f"{shared} {reach}": 0.5, f"{reach} {shared} predict.flips=false": 0.7}
    rows = [r for text, dice in variants.items() for r in unseen_rows("erm", 0, {"B1": dice}, overrides=text)]
    rows += unseen_rows("mix", 0, {"B1": 0.9}, overrides=shared)
    path = tmp_path / "rows.jsonl"
    write_lines(path, [r.model_dump(mode="json", by_alias=True) for r in rows])
    (source,) = read_sources([path])
    methods = split_by_method(source.rows)
    assert {name: [r.value for r in found] for name, found in methods.items()} == {
        "erm": [0.5],
        "erm (predict.flips=false)": [0.7],
        "mix": [0.9],
    }
    (score,) = score_cases(rows[:2])
    assert score.value == pytest.approx(0.6)
    orders = [*unseen_rows("erm", 0, {"B1": 0}, overrides="a=1 a=2"),
              *unseen_rows("erm", 0, {"B1": 1}, overrides="a=2 a=1")]  # fmt: skip
    assert [len(found) for found in split_by_method(orders).values()] == [1, 1]
    assert "/home" not in "".join(
        split_by_method([r.model_copy(update={"overrides": f"a=/home/{r.value}/f"}) for r in rows])
    )


def test_rows_of_one_method_need_no_prediction_folder(tmp_path):
    rows = [r for r in benchmark_rows() if r["method"] == "mix"]
    (tmp_path / "results").mkdir()
    write_lines(tmp_path / "results" / "a.jsonl", rows + rows[:3])
    (tmp_path / "results" / "log.jsonl").write_text('{"step": 1}\n')
    sources = read_sources([tmp_path / "results"])
    assert [len(source.rows) for source in sources] == [len(rows)]
    _, page = written([tmp_path / "results"], tmp_path / "report.html")
    assert "Dice, unseen sites" in page.text
    assert "after averaging 2 seeds" in page.text
    assert "Worst cases first" not in page.text


def test_sources_that_cannot_be_used_are_refused(tmp_path):
    with pytest.raises(FileFormatError, match="no such file"):
        write_report([tmp_path / "none.jsonl"], tmp_path / "r.html")
    with pytest.raises(DataError, match="neither"):
        write_report([tmp_path], tmp_path / "r.html")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"metric": "dice", "value": 1}\n{"metric": "di')
    with pytest.raises(FileFormatError, match=r"bad.jsonl: line 2 is not JSON"):
        write_report([bad], tmp_path / "r.html")
    bad.write_text('{"metric": "dice", "value": "high"}\n')
    with pytest.raises(FileFormatError, match="value"):
        write_report([bad], tmp_path / "r.html")
    bad.write_text("\n")
    with pytest.raises(DataError, match="no rows"):
        write_report([bad], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_non_finite_values_and_missing_classes_are_undefined():
    rows = [
        Row.model_validate(
            row(metric="dice", case="c", domain="B", value=value, seed=seed, **{"class": name})
        )
        for seed, name, value in ((0, "x", 0.5), (0, "y", float("inf")), (1, "x", 0.7), (1, "y", 0.1))
    ]
    (score,) = score_cases(rows)
    assert score.undefined == 1
    assert score.by_class == {"x": pytest.approx(0.6), "y": pytest.approx(0.1)}
    assert score.value == pytest.approx((0.5 + 0.4) / 2)


def test_strip_plot_places_marks_on_its_axis():
    values = (("low", 0.42), ("mid", 0.8), ("high", 1.0))
    svg = strip_plot(
        [Strip("B", "unseen", "unseen", 0.74, values), Strip("C", "", "in_domain", None, ())], "t"
    )
    tick = r'class="tick" x="([\d.]+)" y="\d+" text-anchor="middle">(\d+)<'
    ticks = {int(text): float(x) for x, text in re.findall(tick, svg)}
    scale = (ticks[100] - ticks[40]) / 60
    marks = [float(x) for x in re.findall(r'class="mark" d="M([\d.]+) ', svg)]
    assert marks == pytest.approx([ticks[40] + scale * (100 * v - 40) for _, v in values], abs=0.11)
    assert svg.count("<circle") == 0
    assert "74.0" in svg


def test_texts_lose_folders_and_keep_the_rest():
    assert without_folders("/home/anna/x y/scan.nii.gz") == "scan.nii.gz"
    assert without_folders("C:\\data\\site\\scan.png: damaged") == "scan.png: damaged"
    assert without_folders("no file '/data/site/scan.png'; see https://host.org/a/b") == (
        "no file 'scan.png'; see https://host.org/a/b"
    )
    assert without_folders("/my site/a b.png: bad", {"/my site"}) == "a b.png: bad"
    assert without_folders("Dice 3/4 and/or mm") == "Dice 3/4 and/or mm"
    plan = {"patch": 3, "reasons": ["why"]}
    facts = describe_run({"preset": "m", "plan": plan, "config": {"a": {"b": None}}})
    assert facts.plan == (("patch", "3", ""), ("", "", "why"))
    assert facts.config == (("a.b", "none"),)
    assert [number(v, True) for v in (-0.04, 2.25, -1.0, None)] == ["0.0", "+2.2", "−1.0", "–"]


def test_importing_the_report_loads_no_torch():
    code = "import sys, anysite.report; sys.exit('torch' in sys.modules or 'monai' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_batch_statistics_are_named_even_where_every_row_used_them():
    rows = unseen_rows("ram_dsir", 0, {"A1": 0.5})
    told = [row.model_copy(update={"overrides": "train.steps=5 predict.normalisation=batch"}) for row in rows]
    assert list(split_by_method(told)) == ["ram_dsir (predict.normalisation=batch)"]
    both = split_by_method([*told, *(r.model_copy(update={"overrides": "train.steps=5"}) for r in rows)])
    assert list(both) == ["ram_dsir (predict.normalisation=batch)", "ram_dsir"]
