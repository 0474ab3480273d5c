"""Judging masks that other programs made, from images and masks known to be good."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from anysite.data import files
from anysite.data.case import Case, Dataset
from anysite.data.probabilities import read_probabilities
from anysite.data.volume import Volume
from anysite.detectors import Output
from anysite.errors import CASE_ERRORS, ConfigError, DataError, GeometryError, describe_error
from anysite.evaluate import as_class_indices
from anysite.judge import LEAST, Judge, Reference
from anysite.manifest import MANIFESTS
from anysite.normalisation import Normalisation
from anysite.observations import count_agreement
from anysite.plan import Plan
from anysite.planning import learn_plan
from anysite.settings import JudgeSettings, PlanSettings

AGREE = 0.99  # share of what either finds in which probabilities and mask of one case must agree


@dataclass(frozen=True)
class JudgedMask:
    """The verdict on one case, as `verdicts.json` holds it, or the error that prevented it."""

    case: Case
    verdict: Mapping[str, Any] | None
    error: str = ""


class MaskJudge:
    """A judge of masks without the network that made them.

    It knows how the images' intensities are distributed, what sizes and shapes masks have, how far several masks
    of one image agree, and with probabilities how sure the other program was. What it cannot know is the network's
    features.

    Args:
        reference: Labelled images like those the masks' maker was trained on.
        folders: Folders of its masks of the reference images, one for each folder to be judged; none: the labels
            stand for them, and of agreement and certainty nothing can be said.
        members: How many folders will be judged at a time.
        false_alarms: Share of images like the reference that is sent to review.

    Raises:
        ConfigError: a rate of false alarms outside 0 to 1.
        DataError: not as many folders as members, fewer than five patients, or masks that are missing.
    """

    def __init__(
        self, reference: Dataset, folders: Sequence[Path], members: int, false_alarms: float = 0.1
    ) -> None:
        if not 0 < false_alarms < 1:
            raise ConfigError(f"{false_alarms:g}", where="--false-alarms", expected="above 0 and below 1")
        if folders and len(folders) != members:
            raise DataError(
                f"{len(folders)} folders of reference masks", expected=f"one for each of {members} to judge"
            )
        self.dataset, self.members = reference, members
        self.plan = learn_plan(reference, PlanSettings())
        cases = [case for case in reference.labelled if not folders or _is_complete(folders, case)]
        if len({(case.domain, case.patient) for case in cases}) < LEAST:
            raise DataError(
                f"{len(cases)} reference cases with masks", where=reference.name,
                expected=f"cases of {LEAST} patients or more", fix="give more of them",
            )  # fmt: skip
        names = ["histogram", "power_spectrum", "shading", "shape"]
        if folders and members > 1:
            names += ["pairwise_dice"]
        if folders and all(_probabilities_of(folder, case.id) for folder in folders for case in cases):
            names += ["entropy", "soft_dice"]
        self.judge = Judge(
            JudgeSettings(detectors={name: {} for name in names}, false_alarms=false_alarms, shifted_copies=0)
        )
        described = []
        for case in cases:
            output = self._observe(case, folders)
            described.append(Reference(self.judge.describe(output), f"{case.domain}/{case.patient}"))
        self.judge.fit(described, [])

    def judge_folders(self, folders: Sequence[Path], cases: Sequence[Case]) -> Iterator[JudgedMask]:
        """Yield the verdict on the masks of every case, which the folders hold under its id.

        Raises:
            DataError: no folder holds a mask of any case.
        """
        if not any(_mask_of(folder, case.id) for folder in folders for case in cases):
            raise DataError(
                "no mask of any case", where=", ".join(map(str, folders)), expected="masks named after cases",
                fix=f"such as {cases[0].id}.nii.gz or {cases[0].id}.png" if cases else "",
            )  # fmt: skip
        for case in cases:
            try:
                verdict = self.judge.judge(self._observe(case, folders))
            except CASE_ERRORS as error:
                text = case.without_folders(describe_error(error))
                for folder in (folder for folder in folders if folder.name):
                    text = text.replace(f"{folder}/", "").replace(str(folder), folder.name)
                yield JudgedMask(case, None, text)
                continue
            yield JudgedMask(case, asdict(verdict))

    def _observe(self, case: Case, folders: Sequence[Path]) -> Output:
        """Return what the judge may know of one case, on the reference's grid; without folders its own label."""
        image = case.image()
        grid = self.plan.to_grids(image)  # first, because it says what does not fit
        if folders:
            maps = [self._read_maps(folder, case, image) for folder in folders]
        else:
            label = self.dataset.label_of(case)
            maps = [self._as_maps(label, image)]
        mean = np.mean(maps, 0)
        views = [torch.from_numpy(one)[None] for one in maps]
        agreement = count_agreement(views, bool(self.plan.regions)) if len(views) > 1 else None
        return Output(
            grid.seen.numpy(), mean, bool(self.plan.regions), (), agreement,
            None if grid.whole is None else grid.whole.numpy(), grid.nothing,
            self.plan.slice_wise, self.plan.decide,
        )  # fmt: skip

    def _read_maps(self, folder: Path, case: Case, image: Volume) -> Float[np.ndarray, "k *s"]:
        path = _mask_of(folder, case.id)
        if path is None:
            raise DataError("no mask", where=folder, expected=f"one named {case.id}")
        mask = files.read_label(path, case.image_paths[0])
        if not any(folder.glob(MANIFESTS)):  # anysite's own masks hold class indices already
            mask = as_class_indices(mask, path, self.dataset, case)
        if (beyond := int(mask.array.max())) >= len(self.dataset.classes):
            expected = f"0 to {len(self.dataset.classes) - 1}"
            raise DataError(f"class index {beyond}", where=path, expected=expected)
        if not mask.same_grid(image):
            raise GeometryError(
                f"a mask of shape {mask.shape}", where=path, expected=f"the grid of the image, {image.shape}"
            )
        if "entropy" not in self.judge.detectors:
            return self._as_maps(mask, image)
        saved = _probabilities_of(folder, case.id)
        if saved is None:
            raise DataError(
                "no probabilities", where=folder, expected=f"{case.id}.npz, as for the reference masks",
                fix="save them for both, or for neither",
            )  # fmt: skip
        turned = _turn(read_probabilities(saved), self.plan, mask, saved)
        return self._on_grid(image.with_array(turned), image)

    def _as_maps(self, label: Volume, image: Volume) -> Float[np.ndarray, "k *s"]:
        found = self.plan.label_to_grid(label, image).numpy()
        maps = self.plan.as_maps(found.ravel()).reshape(-1, *found.shape)
        return maps.astype(np.float32)

    def _on_grid(self, probabilities: Volume, image: Volume) -> Float[np.ndarray, "k *s"]:
        count = len(probabilities.array)
        own = self.plan.variant_of(image)
        plain = (Normalisation(kind="none"),) * count
        untouched = {"channels": count, "normalisation": plain, "variants": (), "spacing": own.spacing}
        return self.plan.model_copy(update=untouched).to_grid(probabilities).clamp(0, 1).numpy()


def _turn(
    probabilities: Float[np.ndarray, "*k"], plan: Plan, mask: Volume, where: Path
) -> Float[np.ndarray, "k *t"]:
    """Return probabilities in the axes of their mask: those of nnU-Net have theirs in reverse order.

    Raises:
        GeometryError: in neither order do they give the mask.
    """
    if probabilities.ndim == mask.dimension + 2 and probabilities.shape[1] == 1:  # of a picture
        probabilities = probabilities[:, 0]
    if probabilities.ndim == mask.dimension + 1 and len(probabilities) == plan.outputs:
        orders = (probabilities, np.moveaxis(probabilities, 0, -1).T)
        fitting = [turned for turned in orders if turned.shape[1:] == mask.shape]
        alike = [_agreement(mask.with_array(plan.decide(turned)[None]), mask) for turned in fitting]
        if alike and max(alike) >= AGREE:
            return np.ascontiguousarray(fitting[int(np.argmax(alike))])
    raise GeometryError(
        f"probabilities of shape {probabilities.shape} that do not give the mask", where=where,
        expected=f"{plan.outputs} maps of {mask.shape}, or of that shape reversed",
        fix="save both in one run, without postprocessing the masks",
    )  # fmt: skip


def _agreement(one: Volume, other: Volume) -> float:
    """Return in how much of what either finds two label maps agree; all of it where both find nothing."""
    found = (one.array > 0) | (other.array > 0)
    return float((one.array == other.array)[found].mean()) if found.any() else 1.0


def _is_complete(folders: Sequence[Path], case: Case) -> bool:
    return all(_mask_of(folder, case.id) for folder in folders)


def _mask_of(folder: Path, case: str) -> Path | None:
    suffixes = (*files.FORMATS, files.DICOM)
    return next((path for suffix in suffixes if (path := folder / f"{case}{suffix}").is_file()), None)


def _probabilities_of(folder: Path, case: str) -> Path | None:
    path = folder / f"{case}.npz"
    return path if path.is_file() else None
