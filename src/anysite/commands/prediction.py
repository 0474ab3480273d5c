"""Predicting masks, and judging those of other programs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anysite.commands import AsJson, Plugins, trust
from anysite.errors import BatchError, ConfigError, DataError, RejectedMasks

if TYPE_CHECKING:
    from anysite.predict import CaseOutcome


def predict(
    runs_and_input: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN... INPUT", help="run folders, then a dataset, a folder of images or one file"
        ),
    ],
    output: Annotated[Path, typer.Option(help="folder for the masks")],
    save_probabilities: Annotated[
        bool, typer.Option("--save-probabilities", help="write CASE.npz beside each mask")
    ] = False,
    part: Annotated[
        str, typer.Option(help="the I-th of N shares of the cases, for several machines")
    ] = "1/1",
    flips: Annotated[
        bool | None,
        typer.Option(
            help="test-time augmentation by mirroring, of runs trained with it; default: the run's setting"
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            help="of masks: auto, nifti, dicom_seg or dicom_seg_labelmap; default: the run's setting, which is the "
            "image's own kind, and NIfTI for DICOM"
        ),
    ] = None,
    calibrate: Annotated[
        bool | None, typer.Option(help="probabilities by the run's temperature; default: the run's setting")
    ] = None,
    postprocess: Annotated[
        bool | None,
        typer.Option(help="take fragments out of masks as the run has learned; default: the run's setting"),
    ] = None,
    least_dice: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="review masks where only a lower Dice can be counted on; default: the run's setting",
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="of runs trained on several datasets the one that all images are like; default: any of them"
        ),
    ] = None,
    adapt: Annotated[
        str | None,
        typer.Option(
            help="adapt a copy of the network where image or mask are in doubt: none, auto or an adapter's name; "
            "default: the run's setting"
        ),
    ] = None,
    include_training: Annotated[
        bool, typer.Option("--include-training", help="also cases the run was trained on")
    ] = False,
    referral: Annotated[
        float | None,
        typer.Option(
            help="share of the images that a person can look at, such as 0.2; default: as verdicts say"
        ),
    ] = None,
    accelerator: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    plugin: Plugins = None,
) -> None:
    """Segment images with one run, or with several whose probabilities are averaged."""
    if len(runs_and_input) < 2:
        raise ConfigError("one path", expected="one or more run folders, then the input")
    trust(plugin)
    from anysite import console, runs
    from anysite import predict as prediction
    from anysite.roles import split_of
    from anysite.verdicts import VERDICTS, read_verdicts

    *folders, source = runs_and_input
    opened = [runs.open_run(folder) for folder in folders]
    dataset, sites_known = prediction.open_input(source, opened[0].plan)
    cases = dataset.cases
    if not include_training:
        cases = tuple(c for c in cases if split_of(c, opened, sites_known) != "training")
        if left_out := len(dataset.cases) - len(cases):
            console.say(f"{left_out} cases were trained on and are left out (--include-training keeps them)")
    if prediction.judged_by_image_alone(opened, flips, task):
        console.say(
            "verdicts rest on the images alone: with these flips or this task segmentations are made otherwise "
            "than those that limits were learned from"
        )
    share = prediction.select_part(cases, part)
    outcomes: list[CaseOutcome] = []
    with console.case_bar(len(share), "predicting") as advance:
        for outcome in prediction.predict(
            opened, cases, output, flips=flips, format=format, calibrate=calibrate,
            postprocess=postprocess, least_dice=least_dice, task=task, adapt=adapt,
            save_probabilities=save_probabilities, part=part, referral=referral, dataset=dataset,
            sites_known=sites_known, accelerator=accelerator,
        ):  # fmt: skip
            outcomes.append(outcome)
            advance(outcome)
    count = Counter(outcome.status for outcome in outcomes)
    console.say(
        f"{count['done']} masks written to {output}, {count['skipped']} were there already, "
        f"{count['failed']} cases failed"
    )
    verdicts = read_verdicts(output)
    judged = {case.id: verdicts[case.id] for case in share if case.id in verdicts}
    console.show_verdicts(judged, len(share), output)
    if count["failed"]:
        raise BatchError(
            f"{count['failed']} of {len(share)} cases failed",
            fix=f"the reasons are above and in {prediction.manifest_path(output, part)}",
        )
    if rejected := sum(verdict["verdict"] == "reject" for verdict in judged.values()):
        raise RejectedMasks(
            f"{rejected} of {len(share)} masks were rejected",
            fix=f"the reasons are in {output / VERDICTS}; all masks are written",
        )


def judge(
    masks_and_images: Annotated[
        list[Path],
        typer.Argument(
            metavar="MASKS... IMAGES",
            help="folders of masks, one a model, then their images; or a prediction folder alone",
        ),
    ],
    reference: Annotated[
        Path | None, typer.Option(help="a dataset of images and labels like those the models were trained on")
    ] = None,
    reference_masks: Annotated[
        list[Path] | None,
        typer.Option(
            help="the models' masks of the reference images, a folder for each of MASKS (repeatable)"
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="folder for the verdicts on masks of other programs")
    ] = None,
    false_alarms: Annotated[
        float, typer.Option(help="share of images like the reference that is sent to review")
    ] = 0.1,
    referral: Annotated[
        float | None, typer.Option(help="share of the images that a person can look at, such as 0.2")
    ] = None,
    json: AsJson = False,
) -> None:
    """Say which masks of other programs to trust, or refer another share of one's own."""
    from anysite import console
    from anysite.verdicts import VERDICTS, require_own, write_verdicts

    failed: dict[str, str] = {}
    if reference is None:
        if output or reference_masks:
            raise ConfigError(
                "--output or --reference-masks without --reference", fix="give --reference DATASET"
            )
        folder, judged, cases = _judged_before(masks_and_images)
    else:
        if output is None:
            raise ConfigError("no --output", expected="a folder for the verdicts")
        require_own(output)
        judged, failed = _judge_masks(masks_and_images, reference, reference_masks or [], false_alarms, json)
        folder, cases = output, len(judged)
        folder.mkdir(parents=True, exist_ok=True)
    verdicts = write_verdicts(folder, judged, referral)
    if json:
        console.as_json({"cases": verdicts, "failed": failed})
    else:
        console.show_verdicts(verdicts, cases, folder)
    for case, error in failed.items():
        console.complain(DataError(f"not judged: {error}", where=case))
    if failed:
        raise BatchError(f"{len(failed)} of {len(failed) + len(judged)} cases could not be judged")
    if rejected := sum(verdict["verdict"] == "reject" for verdict in verdicts.values()):
        raise RejectedMasks(
            f"{rejected} of {len(verdicts)} masks were rejected", fix=f"see {folder / VERDICTS}"
        )


def _judged_before(paths: list[Path]) -> tuple[Path, dict[str, Any], int]:
    from anysite.manifest import read_manifests

    if len(paths) != 1:
        raise ConfigError(
            f"{len(paths)} paths without --reference",
            expected="one folder of anysite predict, or masks and images with --reference DATASET",
        )
    cases = read_manifests(paths[0])["cases"]
    judged = {name: entry["verdict"] for name, entry in cases.items() if entry.get("verdict")}
    return paths[0], judged, len(cases)


def _judge_masks(
    paths: list[Path], reference: Path, reference_masks: list[Path], false_alarms: float, quiet: bool
) -> tuple[dict[str, Any], dict[str, str]]:
    from anysite import console
    from anysite.data.layouts import open_dataset, open_images
    from anysite.foreign import MaskJudge

    *folders, images = paths
    if not folders:
        raise ConfigError("one path with --reference", expected="folders of masks, then their images")
    cases = open_images(images)
    mask_judge = MaskJudge(open_dataset(reference), reference_masks, len(folders), false_alarms)
    if not quiet:
        console.say(f"judging by {', '.join(mask_judge.judge.detectors)}")
    judged: dict[str, Any] = {}
    failed: dict[str, str] = {}
    with console.case_bar(len(cases), "judging") as advance:
        for outcome in mask_judge.judge_folders(folders, cases):
            if outcome.verdict is None:
                failed[outcome.case.id] = outcome.error
            else:
                judged[outcome.case.id] = outcome.verdict
            advance()
    return judged, failed
