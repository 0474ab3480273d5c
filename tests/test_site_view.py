"""The page as a view of the sites: its contents, its list of cases, and the volumes that it carries."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from pathlib import Path

import nibabel
import numpy as np
import pytest

from anysite.data.volume import Volume
from anysite.errors import FileFormatError
from anysite.report import write_report
from anysite.report.images import CaseImages
from anysite.report.viewer import FOLDER
from anysite.report.volumes import LONGEST, embed
from test_report import Page, row, write_lines
from volumes_predicted import SECRET, SHAPE, SPACING_MM, ball, write_predictions

AUDIT = {
    "problems": [
        {"severity": "warning", "case": "c", "file": "/home/x/c.png", "rule": "blank image", "observed": "o",
         "expected": "e", "fix": "f"},
    ],
    "sites": [
        {"domain": site, "cases": 3, "patients": 3, "labelled": 3, "dimensions": [2], "channels": [1],
         "shape": [[32, 32], [32, 48]], "spacing": [[1.0, 1.0], [1.0, 1.0]], "unit": "px",
         "class_share": {"background": 0.9, "disc": 0.1}}
        for site in "AB"
    ],
    "shift": [
        {"sites": [{"domain": site, "cases": 3, "histogram": [0.2, 0.5, 0.3], "distance": 0.4, "spacing": [1.0, 1.0],
                    "shape": [32, 32]} for site in "AB"],
         "edges": [-1.0, 0.0, 1.0, 2.0], "normalisation": "case", "intensity": [[0.0, 0.4], [0.4, 0.0]],
         "spacing": [[1.0, 1.0], [1.0, 1.0]], "shape": [[1.0, 1.0], [1.0, 1.0]], "classes": [[0.0, 0.0], [0.0, 0.0]]},
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def predictions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_predictions(tmp_path_factory.mktemp("view") / "secret")


def sections_of(html: str) -> list[str]:
    """Return the titles in the contents, after checking that each leads to one heading of that name."""
    contents = html[html.index('<nav class="contents"') : html.index("</nav>")]
    links = re.findall(r'<a href="#([^"]+)">([^<]+)', contents)
    assert len(links) == len(re.findall("<a ", contents))
    identifiers = re.findall(r'\bid="([^"]+)"', html)
    assert len(set(identifiers)) == len(identifiers)
    for identifier, title in links:
        assert f'<h2 id="{identifier}">{title.strip()}' in html
    return [title.strip() for _, title in links]


def volumes_in(html: str) -> list[tuple[str, nibabel.Nifti1Image]]:
    found = re.findall(r'<script type="application/gzip" data-part="(\w+)">([^<]+)</script>', html)
    return [
        (name, nibabel.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(text))))
        for name, text in found
    ]


def test_the_contents_list_what_there_is_in_the_order_of_the_questions(tmp_path, predictions):
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"preset": "baseline", "train_domains": ["A"]}))
    (run / "log.jsonl").write_text('{"step": 1, "total": 2.0}\n{"step": 2, "total": 1.0}\n')
    (tmp_path / "check.json").write_text(json.dumps(AUDIT))
    html = write_report([predictions, run, tmp_path / "check.json"], tmp_path / "r.html").read_text("utf-8")
    assert sections_of(html) == [
        "Overview", "Data shift audit", "Training", "Results by site", "Verdicts", "Cases", "How this was made",
    ]  # fmt: skip
    text = Page(html).text
    assert "0 errors, which stop a training, and 1 warning (blank image 1)" in text
    assert "/home/x" not in html
    assert "0.40" in text


def test_sections_with_nothing_to_show_are_left_out(tmp_path):
    place = {"case": "c", "domain": "B", "class": "x"}
    rows = write_lines(tmp_path / "rows.jsonl", [row("dice", 0.5, **place)])
    html = write_report([rows], tmp_path / "r.html").read_text("utf-8")
    assert sections_of(html) == ["Overview", "Results by site", "Cases", "How this was made"]
    for absent in ("viewer-script", 'class="open-viewer"', "<figure>", "Training", "audit", 'name="verdict"'):
        assert absent not in html
    assert "connect-src" not in html


def test_training_by_test_site_is_crossed_also_for_one_method(tmp_path):
    values = {("A", "A"): 0.9, ("A", "B"): 0.5, ("B", "A"): 0.6, ("B", "B"): 0.8}
    rows = [
        row("dice", value, train_domains=[train], domain=test, case=test + "1", **{"class": "x"},
            split="in_domain" if train == test else "unseen")
        for (train, test), value in values.items()
    ]  # fmt: skip
    path = write_lines(tmp_path / "rows.jsonl", rows)
    html = write_report([path], tmp_path / "r.html").read_text("utf-8")
    assert "Trained where, tested where" in sections_of(html)
    matrix = html[html.index('id="matrix"') :]
    matrix = matrix[: matrix.index("</table>")]
    assert re.findall(r'<th scope="row">(\w)</th>', matrix) == ["A", "B"]
    cells = re.findall(r'number heat"[^>]*>(○ )?([\d.]+)', matrix)
    assert cells == [("○ ", "90.0"), ("", "50.0"), ("", "60.0"), ("○ ", "80.0")]
    only = write_lines(tmp_path / "one.jsonl", rows[:2])
    assert "matrix" not in write_report([only], tmp_path / "r.html").read_text("utf-8").split("</style>")[1]


def test_every_row_of_the_list_has_what_stands_beside_it(tmp_path, predictions):
    html = write_report([predictions], tmp_path / "r.html", pictures=4).read_text("utf-8")
    listed = re.findall(r'<tr data-case="(\w+)" data-site="(\w)" data-verdict="(\w+)">', html)
    assert [case for case, *_ in listed] == [f"case{number:03d}" for number in (5, 4, 3, 2, 1, 0)]
    assert {(case, site) for case, site, _ in listed} == {(f"case{n:03d}", "AB"[n % 2]) for n in range(6)}
    assert [case for case, *_ in listed] == re.findall(r'<article class="one-case" data-case="(\w+)">', html)
    assert re.findall(r"<option>(\w+)</option>", html) == ["accept", "review", "reject"]
    assert "Pictures are drawn of" in Page(html).text
    keys = html[html.index('<p class="keys">') :]
    assert [key in keys for key in ("<kbd>j</kbd>", "<kbd>k</kbd>", "<kbd>?</kbd>")] == [True] * 3


def test_only_so_many_cases_carry_a_volume_and_the_page_says_so(tmp_path, predictions):
    html = write_report([predictions], tmp_path / "r.html", volumes=3).read_text("utf-8")
    assert html.count('class="open-viewer"') == 3
    assert len(volumes_in(html)) == 9
    assert "3 volumes: the middle case of every site, then those of lowest Dice." in Page(html).text
    assert "3 more volumes are left out" in Page(html).text
    carrying = re.findall(r'data-case="(\w+)">(?:(?!</article>).)*?open-viewer', html, flags=re.DOTALL)
    assert "case005" in carrying
    none = write_report([predictions], tmp_path / "r.html", volumes=0).read_text("utf-8")
    assert 'class="open-viewer"' not in none
    assert 'id="viewer-script"' not in none
    assert "every volume" in Page(write_report([predictions], tmp_path / "r.html").read_text("utf-8")).text


def test_volumes_hold_the_image_and_nothing_of_its_header(tmp_path, predictions):
    html = write_report([predictions], tmp_path / "r.html").read_text("utf-8")
    found = volumes_in(html)
    assert [name for name, _ in found[:3]] == ["image", "prediction", "truth"]
    blank = nibabel.Nifti1Header()
    for _, image in found:
        header = image.header
        assert image.get_data_dtype() == np.uint8
        assert header.get_zooms() == pytest.approx(SPACING_MM)
        assert [bytes(header[key]) for key in ("descrip", "aux_file", "db_name", "intent_name")] == [
            bytes(blank[key]) for key in ("descrip", "aux_file", "db_name", "intent_name")
        ]
        assert not header.extensions
        assert image.affine is not None
        middle = image.affine @ [*((np.array(image.shape) - 1) / 2), 1]  # not where the patient lay
        assert middle[:3] == pytest.approx((0, 0, 0), abs=1e-3)
        assert nibabel.aff2axcodes(image.affine) == ("R", "A", "S")
    assert SECRET not in html
    # The best mask, and its truth; the grid of the file is mirrored along the first axis.
    best = {name: np.asarray(image.dataobj) for name, image in found[-3:]}
    centre = tuple(size / 2 for size in SHAPE)
    label = np.maximum(ball(centre, 14), 2 * ball(centre, 7))[::-1]
    assert (best["prediction"] == best["truth"]).all()
    assert np.bincount(best["truth"].ravel()).tolist()[1:] == np.bincount(label.ravel()).tolist()[1:]
    assert best["image"][best["truth"] == 2].mean() > best["image"][best["truth"] == 1].mean() > 100


def test_large_volumes_become_small_without_a_new_class():
    shape = (300, 200, 40)
    label = Volume(np.zeros((1, *shape), np.int32), np.diag([0.5, 0.5, 2.0, 1.0]))
    label.array[0, 20:240, 30:150, 10:30] = 3
    image = label.with_array(label.array.astype(np.float32))
    small = embed(CaseImages(image, label, None))
    assert small is not None
    assert list(small.parts) == ["image", "prediction"]
    mask = nibabel.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(small.parts["prediction"])))
    assert max(mask.shape) <= LONGEST
    assert set(np.unique(np.asarray(mask.dataobj))) == {0, 3}
    volume_mm3 = float((np.asarray(mask.dataobj) == 3).sum() * np.prod(mask.header.get_zooms()))
    assert volume_mm3 == pytest.approx(220 * 120 * 20 * 0.5, rel=0.03)
    assert "of less detail than the image" in small.text
    flat = Volume.of_pixels(np.zeros((1, 8, 8), np.uint8))
    assert embed(CaseImages(flat, flat, None)) is None


@pytest.mark.parametrize(
    "content",
    ["[]", '{"sites": []}', '{"problems": [], "sites": [{"domain": "A"}]}', "{", json.dumps(
        {**AUDIT, "shift": [{**AUDIT["shift"][0], "intensity": [[0.4]]}]})],
)  # fmt: skip
def test_a_file_that_is_no_check_is_refused(tmp_path, content):
    (tmp_path / "check.json").write_text(content)
    with pytest.raises(FileFormatError, match=r"check\.json"):
        write_report([tmp_path / "check.json"], tmp_path / "r.html")


def test_the_viewer_is_the_published_one():
    """What is shipped is byte for byte what its makers published, below the size a repository should hold."""
    packed = (FOLDER / "niivue.umd.js.gz").read_bytes()
    assert len(packed) < 2**20
    said = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert hashlib.sha256(gzip.decompress(packed)).hexdigest() in said
    assert (FOLDER / "VERSION").read_text().strip() in said
    assert "BSD 2-Clause" in (FOLDER / "LICENSE").read_text(encoding="utf-8")
