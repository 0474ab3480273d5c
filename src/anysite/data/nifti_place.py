"""Where a NIfTI header places its voxels: the sform, the qform, or voxel sizes alone."""

from __future__ import annotations

import nibabel
import numpy as np
from nibabel.nifti1 import Nifti1Header

from anysite.data.volume import require_usable
from anysite.errors import GeometryError

MM_PER_UNIT = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # unknown, metre, millimetre, micrometre
SPACING_TOLERANCE = 0.01
MAX_CONDITION = 1e6
QUATERNION = ("quatern_b", "quatern_c", "quatern_d")
OFFSET = ("qoffset_x", "qoffset_y", "qoffset_z")
ROWS = ("srow_x", "srow_y", "srow_z")


def find_affine(header: Nifti1Header) -> np.ndarray:
    """Return the affine `(4, 4)` from voxel index to RAS in mm that a header means.

    The sform counts where its code says it is there, else the qform, else voxel sizes alone, the first axis
    from right to left as in nibabel. Where both forms are there they may differ in where they place the image
    (scanner and atlas), which no mask depends on, but not in what they say of its axes.

    Raises:
        GeometryError: a form that is there and unusable, forms that contradict each other, axes that are not
            at right angles, or voxel sizes that cannot be.
    """
    sform, qform = _sform(header), _qform(header)
    if sform is not None and qform is not None:
        _require_alike(sform, qform)
    affine = sform if sform is not None else qform if qform is not None else header.get_base_affine()
    affine = np.array(affine, float)
    unit = int(header["xyzt_units"]) & 7
    if unit not in MM_PER_UNIT:
        raise GeometryError(f"the unit of length {unit}", expected=f"one of {list(MM_PER_UNIT)}")
    affine[:3] *= MM_PER_UNIT[unit]
    require_usable(affine)
    return affine


def copy_place(source: Nifti1Header, target: Nifti1Header) -> None:
    """Repeat in `target` what `source` says of the place of its voxels, word for word, and nothing else."""
    for name in ("qform_code", "sform_code", *QUATERNION, *OFFSET, *ROWS):
        target[name] = source[name]
    sizes = np.array(target["pixdim"])
    sizes[:4] = np.asarray(source["pixdim"])[:4]
    target["pixdim"] = sizes
    target["xyzt_units"] = int(source["xyzt_units"]) & 7  # without the unit of time


def _sform(header: Nifti1Header) -> np.ndarray | None:
    code = int(header["sform_code"])
    if code <= 0:
        return None
    sform = np.array([*(header[name] for name in ROWS), [0, 0, 0, 1]], float)
    if not np.isfinite(sform).all() or np.linalg.cond(sform[:3, :3]) > MAX_CONDITION:
        raise GeometryError(
            f"an sform of code {code} that is singular or not finite",
            expected="an invertible affine, or the code 0",
            fix="mend the header",
        )
    return sform


def _qform(header: Nifti1Header) -> np.ndarray | None:
    """Return the qform; none where its code says so, or where it is unusable beside an sform."""
    code = int(header["qform_code"])
    if code <= 0:
        return None
    quaternion = np.array([header[name] for name in QUATERNION], float)
    offset = np.array([header[name] for name in OFFSET], float)
    sizes = np.array(header["pixdim"], float)[1:4]
    finite = np.isfinite([*quaternion, *offset, *sizes]).all()
    if finite and (sizes > 0).all() and (quaternion**2).sum() < 1.0001:
        known = header.copy()
        known["pixdim"][0] = -1 if header["pixdim"][0] < 0 else 1  # 0 counts as 1, as the standard has it
        return np.array(known.get_qform(coded=False), float)
    if int(header["sform_code"]) > 0:
        return None
    raise GeometryError(
        f"a qform of code {code} that is no rotation with voxel sizes",
        expected="a unit quaternion and voxel sizes above 0",
        fix="mend the header",
    )


def _require_alike(sform: np.ndarray, qform: np.ndarray) -> None:
    sizes = [np.linalg.norm(form[:3, :3], axis=0) for form in (sform, qform)]
    if not np.allclose(*sizes, rtol=SPACING_TOLERANCE, atol=0):
        raise GeometryError(
            f"voxels of {_listed(sizes[0])} mm in the sform and {_listed(sizes[1])} mm in the qform",
            expected="one size in both",
            fix="set the code of the wrong form to 0",
        )
    directions = [form[:3, :3] / size for form, size in zip((sform, qform), sizes, strict=True)]
    if (np.sum(directions[0] * directions[1], axis=0) < np.cos(np.pi / 4)).any():
        named = ["".join(nibabel.aff2axcodes(form)) for form in (sform, qform)]
        raise GeometryError(
            f"axes {named[0]} in the sform and {named[1]} in the qform",
            expected="axes that point the same way in both",
            fix="set the code of the wrong form to 0",
        )


def _listed(numbers: np.ndarray) -> str:
    return " x ".join(f"{number:g}" for number in numbers)
