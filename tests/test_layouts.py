from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from anysite.data import classes
from anysite.data.classes import count_values, infer_classes
from anysite.data.layouts import find_cases, open_dataset, open_images
from anysite.errors import DataError, LabelError

SHARED = Path(__file__).parents[2] / "shared" / "data"


def save(path: Path, *values: int) -> None:
    """Write a picture of 4x4 pixels that holds `values`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.zeros((4, 4), np.uint8)
    array.flat[: len(values)] = values
    Image.fromarray(array).save(path)


def declare(path: Path, **content) -> None:
    path.write_text(json.dumps(content))


def files_of(dataset) -> dict[str, list[str]]:
    return {case.id: [path.name for path in case.image_paths] for case in dataset.cases}


def test_manifest_with_everything(tmp_path):
    for name in ("a_t1", "a_t2", "b_t1", "b_t2", "la"):
        save(tmp_path / "files" / f"{name}.png", 0, 40, 90)
    (tmp_path / "index.csv").write_bytes(
        b"\xef\xbb\xbfCase;patient;domain;image;image_1;label;task;age\r\n"
        b"a;p;X;files/a_t1.png;files/a_t2.png;files/la.png;heart;61\r\n"
        b'"b";p;Y;files/b_t1.png;files/b_t2.png;;heart\r\n'
    )
    labels = {"scar": 90, "background": 0, "vessel": 40}
    declare(
        tmp_path / "dataset.json", name="N", labels=labels, licence="CC0", modality={"0": "T1", "1": "T2"}
    )
    for path in (tmp_path, tmp_path / "index.csv"):
        dataset = open_dataset(path)
        assert (dataset.name, dataset.classes, dataset.label_values) == (
            "N",
            ("background", "vessel", "scar"),
            (0, 40, 90),
        )
        assert dataset.provenance == {"licence": "CC0", "modality": "T1, T2"}
        assert [(c.id, c.patient, c.domain, c.task) for c in dataset.cases] == [
            ("a", "p", "X", "heart"),
            ("b", "p", "Y", "heart"),
        ]
        assert [c.id for c in dataset.labelled] == ["a"]
        assert dataset.cases[0].image().array.shape == (2, 4, 4)


def test_manifest_defaults(tmp_path):
    (tmp_path / "manifest.csv").write_text(f"image,case\n{tmp_path / 'else' / 'a.png'},a\nmissing.png,b\n")
    dataset = find_cases(tmp_path)  # a file that does not exist is no error here
    assert [(c.patient, c.domain, c.label_path) for c in dataset.cases] == [
        ("a", tmp_path.name, None),
        ("b", tmp_path.name, None),
    ]
    assert dataset.cases[0].image_paths == (tmp_path / "else" / "a.png",)
    with pytest.raises(LabelError, match="no label files and no declared classes"):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("case,patient\na,b\n", "no column 'image' among case, patient"),
        ("image\na\n", "no column 'case'"),
        ("", "no column 'case'"),
        ("case,image\na,x\nb,y\na,z\n", r"a \(lines 2, 4\)"),
        ("case,image,patient\na,x,\n", "no patient in line 2"),
        ("case,image\na,x,y\n", "line 2 has more fields"),
        ("case,image,case\na,x,y\n", "two columns of one name"),
        ("case,image,image_2\na,x,y\n", "channel columns image_2"),
        ("case,image,image_1,image_2\na,x,,z\n", "channel is missing in line 2"),
        ('case,image\na,"x\n', "not readable as CSV"),
        ("case,image\n../a,x\n", "identifier that can name a file"),
        ("case,image\n", "without cases"),
        ("case,image\n\xe4,x\n", "not readable"),
    ],
)
def test_manifest_faults(tmp_path, text, complaint):
    (tmp_path / "index.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=complaint):
        find_cases(tmp_path)


@pytest.fixture
def nnunet(tmp_path):
    folder = tmp_path / "Dataset007_Toy"
    for case in ("a", "b"):
        save(folder / "imagesTr" / f"{case}_0000.png", 1)
        save(folder / "imagesTr" / f"{case}_0001.png", 2)
        save(folder / "labelsTr" / f"{case}.png", 0, 1, 3)
    save(folder / "imagesTs" / "t_0000.png", 1)
    save(folder / "imagesTs" / "t_0001.png", 1)
    save(folder / "labelsTs" / "t.png", 1)
    (folder / "imagesTr" / "._a_0000.png").write_bytes(b"")
    labels = {"background": 0, "core": 1, "ring": 3}
    declare(folder / "dataset.json", labels=labels, channel_names={"0": "T1", "1": "CT"}, file_ending=".png")
    return folder


def test_a_byte_order_mark_before_json_is_passed_over(nnunet):
    file = nnunet / "dataset.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert open_dataset(nnunet).classes == ("background", "core", "ring")
    joint = nnunet.parent / "organs.json"
    content = {"name": "organs", "datasets": {"toy": {"path": nnunet.name}}}
    joint.write_text(json.dumps(content), encoding="utf-8-sig")
    assert {case.id for case in open_dataset(joint).cases} == {"toy_a", "toy_b"}


def test_nnunet_folder(nnunet):
    dataset = open_dataset(nnunet)
    assert files_of(dataset) == {c: [f"{c}_0000.png", f"{c}_0001.png"] for c in "ab"}
    assert (dataset.classes, dataset.label_values) == (("background", "core", "ring"), (0, 1, 3))
    assert dataset.domains == (nnunet.name,)
    assert len(dataset.labelled) == 2
    assert dataset.provenance == {"modality": "T1, CT"}
    test = open_dataset(nnunet / "imagesTs")  # never mixed with the training cases
    assert [(c.id, c.label_path) for c in test.cases] == [("t", nnunet / "labelsTs" / "t.png")]


@pytest.mark.parametrize("mapping", [{"a": "X", "b": "Y"}, {"X": ["a"], "Y": ["b"]}])
def test_nnunet_sites(nnunet, mapping):
    declare(nnunet / "domain_mapping_00.json", **mapping)
    assert [c.domain for c in open_dataset(nnunet).cases] == ["X", "Y"]
    declare(nnunet / "domain_mapping_01.json", a="Z")
    with pytest.raises(DataError, match="case a at the sites X and Z"):
        open_dataset(nnunet)
    declare(nnunet / "domain_mapping_01.json", a="X")
    declare(nnunet / "domain_mapping_00.json", a="X")
    with pytest.raises(DataError, match="1 cases without a site, such as b"):
        open_dataset(nnunet)


def test_nnunet_regions(nnunet):
    labels = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}
    declare(nnunet / "dataset.json", labels=labels, regions_class_order=[1, 2, 3])
    dataset = open_dataset(nnunet)
    assert dataset.classes == ("background", "class_1", "class_2", "enhancing")
    assert dataset.regions == ((1, 2, 3), (2, 3), (3,))
    assert (dataset.region_names, dataset.region_classes) == (("whole", "core", "enhancing"), (1, 2, 3))
    for order in ([], [1, 2], [1, 1, 3]):
        declare(nnunet / "dataset.json", labels=labels, regions_class_order=order)
        with pytest.raises(LabelError, match="regions_class_order"):
            open_dataset(nnunet)


def test_decathlon_folder_and_listed_files(nnunet, tmp_path):
    folder = tmp_path / "Task04_Toy"
    save(folder / "imagesTr" / "toy_001.png", 1)
    save(folder / "labelsTr" / "toy_001.png", 1)
    declare(folder / "dataset.json", labels={"0": "background", "1": "core"}, modality={"0": "MRI"})
    dataset = open_dataset(folder)
    assert (files_of(dataset), dataset.classes) == ({"toy_001": ["toy_001.png"]}, ("background", "core"))
    listed = {"k": {"images": ["imagesTr/a_0000.png"], "label": "labelsTr/b.png"}}
    declare(nnunet / "dataset.json", labels={"background": 0, "a": 1}, dataset=listed)
    assert files_of(open_dataset(nnunet)) == {"k": ["a_0000.png"]}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({"labels": {"a": 1, "b": 2}}, "labels"),
        ({"labels": {"background": 0, "a": 1, "b": 1}}, "one value for two classes"),
        ({"labels": {"background": 0, "a": 1, "ignore": 2}}, "ignore"),
        ({"labels": {"background": 0, "a": -1}}, "labels.a"),
        ({"labels": {"background": 0, "a": 10**12}}, "label value 1000000000000; expected values below"),
        ({"labels": {"background": 0, "a": "one"}}, "labels"),
        ({"labels": [0, 1]}, "labels"),
        ({"name": 7}, "name is 7"),
        ({"labels": {"background": 0, "a": 1}, "dataset": {"k": {"images": []}}}, "dataset.k.images"),
    ],
)
def test_declarations_that_make_no_sense(nnunet, content, complaint):
    declare(nnunet / "dataset.json", **content)
    with pytest.raises(DataError, match=f"dataset.json: .*{complaint}"):
        open_dataset(nnunet)
    (nnunet / "dataset.json").write_text("{")
    with pytest.raises(DataError, match="JSON"):
        open_dataset(nnunet)


def test_folders_of_sites(tmp_path):
    for site, masks, cases in (("X", "masks", ("a", "b")), ("Y", "labels", ("c",))):
        for case in cases:
            save(tmp_path / site / "images" / f"{case}.png", 9)
            save(tmp_path / site / masks / f"{case}.png", 0, 255)
    save(tmp_path / "Y" / "images" / "d.png", 9)
    dataset = open_dataset(tmp_path)
    assert [(c.id, c.patient, c.domain) for c in dataset.cases] == [
        *(("a", "a", "X"), ("b", "b", "X"), ("c", "c", "Y"), ("d", "d", "Y"))
    ]
    assert dataset.cases[3].label_path is None
    assert (dataset.classes, dataset.label_values) == (("background", "foreground"), (0, 255))
    assert open_dataset(tmp_path / "X").domains == ("X",)
    save(tmp_path / "Y" / "images" / "a.png", 9)  # the same name at two sites: two patients
    renamed = find_cases(tmp_path).cases
    assert [(c.id, c.patient) for c in renamed if c.id.endswith("_a")] == [("X_a", "X_a"), ("Y_a", "Y_a")]
    save(tmp_path / "X" / "masks" / "e.png", 1)
    with pytest.raises(DataError, match="1 labels without an image, such as e.png"):
        open_dataset(tmp_path)
    (tmp_path / "X" / "masks" / "e.png").rename(tmp_path / "X" / "masks" / "a.tif")
    with pytest.raises(DataError, match="a.png and a.tif have one name"):
        open_dataset(tmp_path)
    (tmp_path / "Y" / "masks").mkdir()
    (tmp_path / "X" / "masks" / "a.tif").unlink()
    with pytest.raises(DataError, match="both masks and labels"):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    ("names", "cases"),
    [
        (["a_0000", "a_0001", "b_0000"], {"a": 2, "b": 1}),
        (["a_0000", "b_0000"], {"a": 1, "b": 1}),
        (["a_0000", "b"], {"a_0000": 1, "b": 1}),
        (["a_0001", "a_0002"], {"a_0001": 1, "a_0002": 1}),
        (["a", "b_01"], {"a": 1, "b_01": 1}),
    ],
)
def test_channels_are_grouped_only_where_every_name_counts_up(tmp_path, names, cases):
    for name in names:
        save(tmp_path / "in" / f"{name}.png", 1)
    (tmp_path / "in" / "notes.txt").write_text("no image")
    opened = open_images(tmp_path / "in")
    assert {c.id: len(c.image_paths) for c in opened} == cases
    assert all((c.domain, c.label_path) == ("in", None) for c in opened)
    for name in names:  # masks of the full names say that the number is no channel
        save(tmp_path / "site" / "images" / f"{name}.png", 1)
        save(tmp_path / "site" / "masks" / f"{name}.png", 1)
    assert sorted(files_of(find_cases(tmp_path / "site"))) == sorted(names)


def test_images_to_segment(tmp_path, nnunet):
    save(tmp_path / "one.png", 1)
    assert [(c.id, c.label_path) for c in open_images(tmp_path / "one.png")] == [("one", None)]
    assert [c.id for c in open_images(nnunet)] == ["a", "b"]
    for path in (tmp_path / "empty", tmp_path / "notes.txt", tmp_path / "nowhere"):
        if path.name == "empty":
            path.mkdir()
        elif path.suffix:
            path.write_text("")
        with pytest.raises(DataError, match=f"{path.name}: .*expected"):
            open_images(path)
    with pytest.raises(DataError, match=r"the folder holds Dataset007_Toy, empty, .*write index\.csv"):
        open_dataset(tmp_path)


@given(st.sets(st.integers(1, 255), min_size=1, max_size=40))
def test_inferred_classes_hold_every_value_or_are_refused(values):
    if values == {255}:
        assert infer_classes({0, 255})[1] == (0, 255)
    elif len(values) + 1 > (max(values) + 1) / 2:
        classes, label_values = infer_classes({0, *values})
        assert label_values == tuple(range(max(values) + 1))
        assert len(classes) == len(label_values)
    else:
        with pytest.raises(LabelError, match=rf"values 0, {min(values)}\b.*dataset\.json"):
            infer_classes({0, *values})


@pytest.mark.parametrize("values", [{0}, {0, 85, 170, 255}, {0, 1, 255}, {0, 4}, {0, 1000}])
def test_values_that_need_a_declaration(values):
    with pytest.raises(LabelError):
        infer_classes(values)


@pytest.mark.data
@pytest.mark.parametrize(
    ("pack", "cases", "patients", "classes"),
    [
        (
            "fundus_vessels_512",
            {"drive": 40, "stare": 20, "chasedb1": 28, "hrf": 45},
            {"drive": 40, "stare": 20, "chasedb1": 14, "hrf": 45},
            2,
        ),
        (
            "cardiac_mr_3d",
            {"mnms_vendorA_centre1": 80, "acdc_dijon": 90},
            {"mnms_vendorA_centre1": 40, "acdc_dijon": 45},
            4,
        ),
        ("hippocampus_3d", {"vanderbilt": 200}, {"vanderbilt": 200}, 3),
    ],
)
def test_shared_packs(pack, cases, patients, classes):
    if not (SHARED / pack).is_dir():
        pytest.skip(f"{SHARED / pack} is absent")
    dataset = open_dataset(SHARED / pack)
    assert Counter(c.domain for c in dataset.labelled) == cases
    assert {d: len({c.patient for c in dataset.cases if c.domain == d}) for d in dataset.domains} == patients
    assert len(dataset.classes) == classes
    with (SHARED / pack / "index.csv").open() as file:
        assert [row["case"] for row in csv.DictReader(file)] == [c.id for c in dataset.cases]
    folders = find_cases(SHARED / pack / next(iter(cases)))  # one site of it, by its folders alone
    assert {c.image_paths[0].name for c in folders.labelled} == {
        c.image_paths[0].name for c in dataset.cases if c.domain == next(iter(cases))
    }


def test_labels_of_unseen_sites_are_not_looked_at(tmp_path: Path) -> None:
    for site, values in (("a", (0, 1)), ("b", (0, 1, 2))):
        for folder in ("images", "masks"):
            (tmp_path / site / folder).mkdir(parents=True)
        array = np.resize(np.array(values, np.uint8), (8, 8))
        Image.fromarray(array * 50).save(tmp_path / site / "images" / f"{site}1.png")
        Image.fromarray(array).save(tmp_path / site / "masks" / f"{site}1.png")
    assert len(open_dataset(tmp_path).classes) == 3
    assert len(open_dataset(tmp_path, unseen=("b",)).classes) == 2
    (tmp_path / "b" / "masks" / "b1.png").write_bytes(b"not a picture")
    assert len(open_dataset(tmp_path, unseen=("b",)).classes) == 2


def test_a_datalist_names_every_file(tmp_path):
    for name in ("images/a.png", "images/a2.png", "images/b.png", "masks/a_seg.png", "masks/b_seg.png"):
        save(tmp_path / name, 0, 1)
    training = [
        {
            "image": ["images/a.png", "images/a2.png"],
            "label": "masks/a_seg.png",
            "site": "X",
            "patient_id": 7,
        },
        {"image": ["images/b.png", "images/b.png"], "label": "masks/b_seg.png", "case": "b", "fold": 2},
    ]
    declare(
        tmp_path / "list.json", name="N", training=training, validation=["images/b.png"],
        labels={"0": "background", "1": "vessel"}, test=["images/z.png"],
    )  # fmt: skip
    with pytest.raises(DataError, match=r"2 names of two cases|1 names of two cases: b"):
        open_dataset(tmp_path / "list.json")
    declare(tmp_path / "dataset.json", name="N", training=training, labels={"0": "background", "1": "vessel"})
    for path in (tmp_path, tmp_path / "dataset.json"):
        dataset = open_dataset(path)
        assert dataset.classes == ("background", "vessel")
        assert files_of(dataset) == {"a_seg": ["a.png", "a2.png"], "b": ["b.png", "b.png"]}
        assert [(c.patient, c.domain) for c in dataset.cases] == [("7", "X"), ("b", "N")]
    assert not any(case.held_out for case in dataset.cases)
    declare(
        tmp_path / "dataset.json", name="N", training=training[:1], validation=training[1:],
        labels={"0": "background", "1": "vessel"},
    )  # fmt: skip
    assert [case.held_out for case in open_dataset(tmp_path).cases] == [False, True]
    declare(
        tmp_path / "dataset.json",
        training=training,
        validation=None,
        labels={"0": "background", "1": "vessel"},
    )
    assert len(open_dataset(tmp_path).cases) == 2
    for wrong in (3, {"image": "images/b.png"}):
        declare(tmp_path / "dataset.json", training=training, validation=wrong)
        with pytest.raises(DataError, match="validation: .*; expected a list of images"):
            open_dataset(tmp_path)
    declare(tmp_path / "dataset.json", training=[{"label": "a"}])
    with pytest.raises(DataError, match=r"training.0.image: Field required; expected"):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        "SubjectID,Channel_0,Channel_1,Label",
        "case_id,image_0,image_1,mask",
        "case,modality_0,modality_1,ground_truth",
    ],
)
def test_manifests_under_other_names(tmp_path, header):
    for name in ("a.png", "b.png", "m.png"):
        save(tmp_path / name, 0, 1)
    (tmp_path / "train.csv").write_text(f"{header},Site\n1,a.png,b.png,m.png,X\n2,b.png,a.png,m.png,Y\n")
    dataset = open_dataset(tmp_path / "train.csv")
    assert files_of(dataset) == {"1": ["a.png", "b.png"], "2": ["b.png", "a.png"]}
    assert dataset.domains == ("X", "Y")
    assert all(case.label_path == tmp_path / "m.png" for case in dataset.cases)


@pytest.fixture
def bids(tmp_path):
    root = tmp_path / "study"
    for subject in ("01", "02"):
        for session in ("pre", "post"):
            stem = f"sub-{subject}_ses-{session}"
            anat = f"sub-{subject}/ses-{session}/anat"
            for suffix in ("T1w", "FLAIR"):
                save(root / anat / f"{stem}_{suffix}.png", 0, 1, 2)
            save(root / "derivatives/manual" / anat / f"{stem}_space-orig_desc-rater1_dseg.png", 0, 1, 2)
    declare(root / "dataset_description.json", Name="study", BIDSVersion="1.8.0")
    (root / "participants.tsv").write_text("participant_id\tage\tsite\nsub-01\t61\tX\nsub-02\t62\tY\n")
    (root / "derivatives" / "manual" / "dseg.tsv").write_text("index\tname\n1\tlesion\n2\tcyst\n")
    return root


def test_bids(bids):
    dataset = open_dataset(bids)
    assert dataset.classes == ("background", "lesion", "cyst")
    assert files_of(dataset)["sub-01_ses-post"] == ["sub-01_ses-post_FLAIR.png", "sub-01_ses-post_T1w.png"]
    assert [(c.patient, c.domain) for c in dataset.cases] == [("sub-01", "X")] * 2 + [("sub-02", "Y")] * 2
    assert len(dataset.labelled) == 4
    (bids / "participants.tsv").unlink()
    assert open_dataset(bids).domains == ("study",)


def test_every_bids_subject_needs_a_site_where_others_have_one(bids):
    table = bids / "participants.tsv"
    table.write_text("participant_id\tsite\n01\tX\n02\tY\n")
    assert set(open_dataset(bids).domains) == {"X", "Y"}
    table.write_text("participant_id\tsite\nsub-01\tX\n")
    with pytest.raises(DataError, match="no row for sub-02"):
        open_dataset(bids)


def test_columns_that_tell_people_or_places_are_not_overlooked(tmp_path):
    image = Image.fromarray(np.zeros((4, 4), np.uint8))
    image.save(tmp_path / "a.png")
    table = tmp_path / "index.csv"
    table.write_text("Case,Patient ID,Site-Name,Image,Label\na,p,lyon,a.png,a.png\n")
    (case,) = find_cases(tmp_path).cases
    assert (case.patient, case.domain) == ("p", "lyon")
    for column, meant in (("Patient number", "patient"), ("treating hospital", "domain")):
        table.write_text(f"case,{column},image\na,p,a.png\n")
        with pytest.raises(DataError, match=f"which may tell the {meant}"):
            find_cases(tmp_path)
    table.write_text("case,patient,patient_age,image\na,p,61,a.png\n")
    assert find_cases(tmp_path).cases[0].patient == "p"


def test_a_list_that_names_patients_counts_more_than_the_folders_beside_it(tmp_path):
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / folder).mkdir()
    entries = []
    for number in range(4):
        for path in (tmp_path / f"imagesTr/s{number}_0000.png", tmp_path / f"labelsTr/s{number}.png"):
            Image.fromarray(np.full((4, 4), number % 2, np.uint8)).save(path)
        entries.append({"image": f"imagesTr/s{number}_0000.png", "label": f"labelsTr/s{number}.png"})
    facts = {
        "channel_names": {"0": "grey"},
        "labels": {"background": 0, "thing": 1},
        "numTraining": 4,
        "file_ending": ".png",
    }
    listed = tmp_path / "dataset.json"
    listed.write_text(json.dumps(facts | {"training": entries}))
    assert len({case.patient for case in open_dataset(tmp_path).cases}) == 4
    people = [entry | {"patient": str(n // 2), "site": "x"} for n, entry in enumerate(entries)]
    listed.write_text(json.dumps(facts | {"training": people[:3], "validation": people[3:]}))
    dataset = open_dataset(tmp_path)
    assert [case.patient for case in dataset.cases] == ["0", "0", "1", "1"]
    assert [case.held_out for case in dataset.cases] == [False, False, False, True]


def test_masks_with_smoothed_edges_are_not_taken_for_255_classes():
    with pytest.raises(LabelError, match="no declared classes"):
        infer_classes(range(256))
    assert len(infer_classes(range(208))[0]) == 208  # as of a brain in all its regions


def test_bids_faults(bids):
    twin = bids / "derivatives/automatic/sub-01/ses-pre/anat/sub-01_ses-pre_dseg.png"
    save(twin, 0, 1)
    with pytest.raises(DataError, match="two segmentations of sub-01_ses-pre"):
        find_cases(bids)
    twin.unlink()
    (bids / "participants.tsv").write_text("participant_id\tsite\nsub-01\tn/a\n")
    with pytest.raises(DataError, match="no site for sub-01"):
        find_cases(bids)
    (bids / "participants.tsv").unlink()
    (bids / "sub-02/ses-pre/anat/sub-02_ses-pre_FLAIR.png").unlink()
    with pytest.raises(DataError, match="sub-02_ses-pre has T1w; expected FLAIR, T1w"):
        find_cases(bids)
    (bids / "derivatives/manual/dseg.tsv").write_text("index\tlabel\n1\tlesion\n")
    (bids / "sub-02/ses-pre/anat/sub-02_ses-pre_T1w.png").unlink()
    with pytest.raises(DataError, match="columns index and name"):
        find_cases(bids)
    save(bids / "sub-02/ses-pre/anat/sub-02_pre_T1w.png", 0)
    (bids / "derivatives/manual/dseg.tsv").unlink()
    with pytest.raises(DataError, match="the name sub-02_pre_T1w.png"):
        find_cases(bids)


@pytest.mark.parametrize("highest", [3, 2**20])
def test_values_are_counted_as_numpy_counts_them(highest, monkeypatch):
    monkeypatch.setattr(classes, "BLOCK_VOXELS", 7)
    label = np.random.default_rng(0).choice([0, 1, highest], (3, 4, 5)).astype(np.int32)
    values, counts = np.unique(label, return_counts=True)
    assert count_values(label) == dict(zip(values.tolist(), counts.tolist(), strict=True))
