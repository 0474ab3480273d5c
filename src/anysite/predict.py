"""Predicting a batch of cases into a folder: masks, probabilities, and a manifest of what is done."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

from anysite import __version__, atomic, provenance, runs
from anysite.config import choose_adapter
from anysite.data import files
from anysite.data.case import Case, Dataset
from anysite.data.layouts import find_cases, open_dataset, open_images
from anysite.data.probabilities import read_probabilities, write_probabilities
from anysite.data.volume import Volume
from anysite.errors import CASE_ERRORS, AnysiteError, ConfigError, DataError, describe_error
from anysite.manifest import (
    Manifest,
    describe_case,
    describe_dataset,
    drawings_name,
    image_digests,
    manifest_path,
    mask_name,
    probabilities_name,
    read_manifests,
    unadapted_name,
)
from anysite.maps import Prediction
from anysite.plan import Plan
from anysite.previews import write_preview
from anysite.roles import patients_judged_from, split_of
from anysite.runs import Run
from anysite.segment import Segmenter, segments_as_judged
from anysite.settings import MaskFormat, PredictSettings
from anysite.verdicts import VERDICT_FILES, write_verdicts

__all__ = [
    "CaseOutcome",
    "manifest_path",
    "open_input",
    "predict",
    "read_manifests",
    "read_probabilities",
    "select_part",
    "write_probabilities",
]


@dataclass(frozen=True)
class CaseOutcome:
    """What became of one case: "done", "failed" with an error text, or "skipped" as done before.

    Attributes:
        verdict: On the mask of a case that is done or was, "" where no run judges.
    """

    case: Case
    status: str
    seconds: float = 0.0
    error: str = ""
    verdict: str = ""


def select_part(cases: Sequence[Case], part: str) -> tuple[Case, ...]:
    """Return every n-th case: part "2/8" is the second of eight shares.

    Raises:
        ConfigError: not of the form I/N with 1 <= I <= N.
    """
    index, _, count = part.partition("/")
    if not (re.fullmatch(r"[0-9]+/[0-9]+", part) and 1 <= int(index) <= int(count)):
        raise ConfigError(f"--part {part}", expected="I/N with 1 <= I <= N, such as 2/8")
    return tuple(cases[int(index) - 1 :: int(count)])


def open_input(path: Path, plan: Plan) -> tuple[Dataset, bool]:
    """Return the images at `path`, and whether they are a dataset, which knows the sites of its cases.

    A folder of images or one image names no sites. Classes that no dataset.json declares and no label shows
    are those of the plan.

    Raises:
        DataError: nothing that can be read lies there.
    """
    try:
        dataset = find_cases(path)
    except DataError:
        cases = open_images(path)  # says again what is wrong where it is a dataset after all
        counts = {len(case.image_paths) for case in cases}
        if counts - {1, plan.channels} and (plan.channels == 1 or plan.channels not in counts):
            cases = _one_file_a_case(cases)
        return Dataset(path.resolve().name, cases, plan.classes, plan.label_values), False
    try:
        return open_dataset(path), True
    except DataError:  # labels that are missing or damaged hinder no prediction
        return Dataset(dataset.name, dataset.cases, plan.classes, plan.label_values), True


def _one_file_a_case(cases: Sequence[Case]) -> tuple[Case, ...]:
    """Return cases of which none has several files: those were numbered pictures, and no channels."""
    single = [replace(case, image_paths=(path,)) for case in cases for path in case.image_paths]
    names = [files.stem_of(case.image_paths[0]) for case in single]
    return tuple(replace(case, id=name, patient=name) for case, name in zip(single, names, strict=True))


def judged_by_image_alone(run_folders: Sequence[Run], flips: bool | None, task: str | None) -> bool:
    """Tell whether verdicts leave out what speaks of segmentations, made otherwise than in training."""
    asked = {name: value for name, value in {"flips": flips, "task": task}.items() if value is not None}
    settings = run_folders[0].config.predict.model_copy(update=asked)
    return any(
        run.judge is not None and not segments_as_judged(run.config, run.plan, settings)
        for run in run_folders
    )


def predict(
    run_folders: Sequence[Run],
    cases: Sequence[Case],
    output: Path,
    *,
    flips: bool | None = None,
    format: str | None = None,
    calibrate: bool | None = None,
    postprocess: bool | None = None,
    least_dice: float | None = None,
    task: str | None = None,
    adapt: str | None = None,
    save_probabilities: bool = False,
    part: str = "1/1",
    referral: float | None = None,
    dataset: Dataset | None = None,
    sites_known: bool = True,
    accelerator: str = "auto",
) -> Iterator[CaseOutcome]:
    """Segment cases one by one into `output`, yielding what became of each.

    A mask is written beside others under its case id, on the image's grid and in the image's kind of file (NIfTI
    for DICOM) unless `format` says otherwise, read back, and only then entered in the manifest as done; a case done
    before by the same runs from the same image is skipped. A case that fails is entered with its error and the rest
    goes on.

    Args:
        flips: Whether to average over mirrored views; like the six after it, none: as the first run's settings.
        format: Kind of the masks: "auto", "nifti", "dicom_seg" or "dicom_seg_labelmap".
        calibrate: Whether saved probabilities are scaled by the run's temperature.
        postprocess: Whether fragments are taken out of masks.
        least_dice: A mask is sent to review where only a lower Dice can be counted on.
        task: Of runs trained on several datasets, the one that all images are like.
        adapt: Adapter of a copy of the network to each image, "auto" or "none"; NAME:always without checks.
        referral: Share of the cases that a person can look at, for the verdicts of all of them together.
        dataset: What the cases are of, for the manifest.
        sites_known: Whether the domains of the cases are sites, and not just names of folders.

    Raises:
        DataError: two cases with one id, or another process predicts this part into this folder.
        ConfigError: a malformed part, an unknown format, a share to refer outside 0 to 1, or an output folder
            where a mask would replace a file that is not ours.
        FileFormatError: the output folder cannot be written.
        RunError: runs that cannot be averaged.
    """
    _require_unique(cases)
    share = select_part(cases, part)
    settings = run_folders[0].config.predict
    if format is not None and format not in get_args(MaskFormat):
        raise ConfigError(f"--format {format}", expected=f"one of {', '.join(get_args(MaskFormat))}")
    asked = {
        "flips": flips, "format": format, "calibrate": calibrate, "postprocess": postprocess,
        "least_dice": least_dice, "task": task,
    }  # fmt: skip
    settings = settings.model_copy(update={name: value for name, value in asked.items() if value is not None})
    if adapt is not None:
        settings = choose_adapter(settings, adapt)
    _require_apart(cases, output, settings.format)
    _require_fitting(cases, settings.format)
    counted = [runs.WEIGHTS, runs.CALIBRATION, runs.POSTPROCESSING, runs.JUDGE]
    if settings.adapt.method != "none":
        counted.append(runs.REFLECTION)
    origin = {
        "runs": [[run.manifest["files"].get(name) for name in counted] for run in run_folders],
        "settings": settings.model_dump(),
    }
    facts = {
        "anysite": __version__,
        "created": provenance.now(),
        "dataset": describe_dataset(dataset) if dataset else {},
        "runs": [_describe_run(run) for run in run_folders],
        "settings": settings.model_dump(mode="json"),
    }
    outputs = [name for case in share for name in _outputs_of(case, save_probabilities, settings)]
    with atomic.locked(manifest_path(output, part)):
        manifest = Manifest(output, part, provenance.fingerprint(origin), facts)
        manifest.require_free([*outputs, *VERDICT_FILES])
        manifest.sweep(outputs)
        manifest.write()
        manifest.claim(VERDICT_FILES)
        _write_verdicts(manifest, referral)  # those of other runs would pass for these
        segmenter: Segmenter | None = None
        learned_from = patients_judged_from(run_folders, cases)
        try:
            for case in share:
                if manifest.is_done(case, save_probabilities):
                    yield CaseOutcome(case, "skipped", verdict=_decision_of(manifest.cases[case.id]))
                    continue
                segmenter = segmenter or Segmenter(run_folders, settings, accelerator)
                split = split_of(case, run_folders, sites_known)
                learned = split == "in_domain" and (case.domain, case.patient) in learned_from
                role = {"split": split} | ({"judge_learned": True} if learned else {})
                yield _attempt_case(segmenter, case, role, manifest, save_probabilities)
        finally:
            manifest.write()
        _write_verdicts(manifest, referral)


def _write_verdicts(manifest: Manifest, referral: float | None) -> None:
    """Write the verdicts of all parts of one origin beside the masks; parts that end at once take turns."""
    with atomic.locked(manifest.output / VERDICT_FILES[0], wait=True):
        atomic.sweep(manifest.output, VERDICT_FILES)
        entries = read_manifests(manifest.output, manifest.content["origin"])["cases"]
        judged = {name: entry["verdict"] for name, entry in entries.items() if entry.get("verdict")}
        write_verdicts(manifest.output, judged, referral)


def _attempt_case(
    segmenter: Segmenter, case: Case, role: dict[str, Any], manifest: Manifest, save_probabilities: bool
) -> CaseOutcome:
    """Predict one case, and enter in the manifest what became of it."""
    began = time.monotonic()
    entry = describe_case(case, manifest.output) | role
    manifest.claim(_outputs_of(case, save_probabilities, segmenter.settings))
    error = ""
    try:
        entry |= _predict_case(segmenter, case, manifest, save_probabilities)
    except CASE_ERRORS as caught:
        error = describe_error(caught)
        entry |= {"status": "failed", "error": _without_folders(error, case, manifest.output)}
        # Files of an earlier call would pass for this one's.
        manifest.remove_files([probabilities_name(case), drawings_name(case), *_masks_of(case)])
    seconds = time.monotonic() - began
    manifest.enter(case, entry | {"seconds": round(seconds, 3)})
    verdict = _decision_of(manifest.cases[case.id])
    return CaseOutcome(case, "failed" if error else "done", seconds, error, verdict)


def _predict_case(
    segmenter: Segmenter, case: Case, manifest: Manifest, save_probabilities: bool
) -> dict[str, Any]:
    prediction: Prediction = segmenter.segment(case.image())
    settings = segmenter.settings
    mask, probabilities = mask_name(case, settings.format), probabilities_name(case)
    classes = segmenter.plan.classes
    _write_mask(prediction.label, manifest.output / mask, case, settings, classes)
    digest = manifest.add_file(mask)
    unadapted = unadapted_name(mask)
    manifest.remove_files([name for name in _masks_of(case) if name not in (mask, unadapted)])
    if save_probabilities:
        write_probabilities(prediction.probabilities, manifest.output / probabilities)
        manifest.add_file(probabilities)
    else:
        manifest.remove_files([probabilities])  # of another mask
    if prediction.unadapted is not None:
        (manifest.output / unadapted).parent.mkdir(exist_ok=True)
        _write_mask(prediction.unadapted, manifest.output / unadapted, case, settings, classes)
        manifest.add_file(unadapted)
    else:
        manifest.remove_files([unadapted])
    drawings = drawings_name(case)
    if prediction.drawings:
        plan = segmenter.plan
        colour = plan.network_channels == plan.channels == 3
        write_preview(manifest.output / drawings, prediction.drawings, colour)
        manifest.add_file(drawings)
    else:
        manifest.remove_files([drawings])
    adaptation = [asdict(one) for one in prediction.adaptations]
    verdict = asdict(prediction.verdict) if prediction.verdict else None
    images = image_digests(case)
    return {
        "verdict": verdict,
        **({"adaptation": adaptation} if adaptation else {}),
        **({"drawings": drawings} if prediction.drawings else {}),
        "status": "done",
        "mask": mask,
        "sha256": digest,
        "image_sha256": images,
        "error": None,
    }


def _decision_of(entry: dict[str, Any]) -> str:
    return (entry.get("verdict") or {}).get("decision", "")


def _write_mask(
    label: Volume, path: Path, case: Case, settings: PredictSettings, classes: Sequence[str]
) -> None:
    if files.suffix_of(path) == files.DICOM:
        labelmap = settings.format == "dicom_seg_labelmap"
        files.write_segmentation(label, path, case.image_paths[0], classes, labelmap)
    else:
        files.write_label(label, path, case.image_paths[0])


def _outputs_of(case: Case, probabilities: bool, settings: PredictSettings) -> list[str]:
    mask = mask_name(case, settings.format)
    adapted = [unadapted_name(mask), drawings_name(case)] if settings.adapt.method != "none" else []
    return [mask, *([probabilities_name(case)] if probabilities else []), *adapted]


def _masks_of(case: Case) -> list[str]:
    """Return the names that masks of a case have, whatever the format."""
    masks = dict.fromkeys(mask_name(case, kind) for kind in get_args(MaskFormat))
    return [name for mask in masks for name in (mask, unadapted_name(mask))]


def _require_fitting(cases: Sequence[Case], kind: str) -> None:
    """Refuse a format of masks that an image cannot have, before anything is predicted.

    Raises:
        ConfigError: NIfTI for an image in pixels, or DICOM segmentations of what is not DICOM.
    """
    for case in cases:
        path, unfit = case.image_paths[0], ""
        with suppress(OSError, AnysiteError):  # a file that cannot be read is named where it is predicted
            if kind == "nifti" and files.is_in_pixels(path):
                unfit = "an image in pixels, with no place in a patient"
            elif kind.startswith("dicom_seg") and files.suffix_of(path) != files.DICOM:
                unfit = "an image that is not DICOM"
        if unfit:
            raise ConfigError(
                f"--format {kind} for {unfit}",
                where=case.id,
                expected="--format auto, or images of that kind",
            )


def _inputs_of(case: Case) -> list[Path]:
    return [*case.image_paths, *([case.label_path] if case.label_path else [])]


def _describe_run(run: Run) -> dict[str, Any]:
    known = ("preset", "dataset", "train_domains", "versions", "commit", "seconds", "steps", "threads")
    return {
        "path": run.path.name,
        "seed": run.config.seed,
        "temperature": list(run.temperature.values),
        "postprocessing": run.postprocessing.model_dump(mode="json"),
        "config": run.config.model_dump(mode="json"),
        "plan": run.plan.model_dump(mode="json"),
        **{key: run.manifest[key] for key in known if key in run.manifest},
    }


def _require_apart(cases: Sequence[Case], output: Path, kind: str) -> None:
    folder = output.resolve()
    masks = {mask_name(case, kind): case.id for case in cases}
    for path in (path for case in cases for path in _inputs_of(case)):
        if path.name in masks and path.resolve() == folder / path.name:
            raise ConfigError(
                f"the mask of case {masks[path.name]!r} would replace {path.name}",
                where=output,
                fix="choose another output folder",
            )


def _require_unique(cases: Sequence[Case]) -> None:
    seen: dict[str, Case] = {}
    for case in cases:
        if case.id in seen:
            raise DataError(
                f"two cases named {case.id!r}: {case.image_paths[0].name} and {seen[case.id].image_paths[0].name}",
                fix="rename one, since masks are named after cases",
            )
        seen[case.id] = case


def _without_folders(text: str, case: Case, output: Path) -> str:
    """Keep folder names, which may identify people, out of what is stored."""
    text = case.without_folders(text)
    return text.replace(f"{output}/", "").replace(f"{output.absolute()}/", "") if output.name else text
