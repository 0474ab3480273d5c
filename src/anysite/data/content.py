"""Whether a dataset is still what it was: a digest of its labels and the sizes of its images."""

from __future__ import annotations

import hashlib

from anysite.data import files
from anysite.data.case import Dataset


def digest_content(dataset: Dataset) -> str:
    """Return what changes with any case's name, site, patient or label, and with the size of its image.

    Labels are read whole, since they are small and get mended. Of images the size alone counts, so that it takes
    seconds. Of a folder its files count, of what does not lie there nothing, and where all of it lies does not matter.
    """
    digest = hashlib.sha256()
    for case in dataset.cases:
        told = [case.domain, case.patient, case.id]
        told += [
            str(path.stat().st_size)
            for image in case.image_paths
            if files.exists(image)
            for path in files.files_of(image)
        ]
        if case.label_path is not None:
            told += ["label", files.digest_of(case.label_path) if files.exists(case.label_path) else ""]
        digest.update("\0".join([*told, "\n"]).encode())
    return digest.hexdigest()[:12]
