"""nnU-Net v2 folders: dataset.json, imagesTr, labelsTr, and which site a case is from where a file says so."""

from __future__ import annotations

from pathlib import Path

from anysite import atomic
from anysite.data.case import Case
from anysite.data.classes import Declaration
from anysite.data.folders import pair_files
from anysite.errors import DataError


def find_nnunet_cases(folder: Path, images: str, declaration: Declaration) -> list[Case]:
    """List the cases of an nnU-Net v2 folder.

    Args:
        folder: That holds dataset.json.
        images: "imagesTr" or "imagesTs".
        declaration: What dataset.json says.

    Raises:
        DataError: labels without an image, or a mapping of sites that contradicts itself or leaves cases out.
    """
    if declaration.dataset and images == "imagesTr":
        found = {
            id: (
                tuple(folder / image for image in entry.images),
                folder / entry.label if entry.label else None,
            )
            for id, entry in declaration.dataset.items()
        }
    else:
        found = pair_files(
            folder / images, folder / images.replace("images", "labels"), declaration.file_ending
        )
    mapping = _site_mapping(folder)
    unmapped = [id for id in found if id not in mapping]
    if mapping and unmapped and images == "imagesTr":
        raise DataError(
            f"{len(unmapped)} cases without a site, such as {', '.join(unmapped[:5])}",
            where=folder,
            fix="add them to domain_mapping*.json",
        )
    default = declaration.name or folder.resolve().name
    return [Case(id, id, mapping.get(id, default), *paths) for id, paths in found.items()]


def _site_mapping(folder: Path) -> dict[str, str]:
    sites: dict[str, str] = {}
    for path in sorted(folder.glob("domain_mapping*.json")):
        content = atomic.read_json(path)
        if not isinstance(content, dict):
            raise DataError("not an object", where=path, expected="{case: site} or {site: [cases]}")
        for key, value in content.items():
            pairs = [(case, key) for case in value] if isinstance(value, list) else [(key, value)]
            for case, site in pairs:
                if sites.setdefault(str(case), str(site)) != str(site):
                    raise DataError(f"case {case} at the sites {sites[str(case)]} and {site}", where=path)
    return sites
