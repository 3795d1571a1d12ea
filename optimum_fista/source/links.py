"""Symbolic links in model folders: which of them may be read as files of the model.

A model folder may come from somebody else, or hold a link that its owner has forgotten. What a run copies to its result
is uploaded by `--push-to-hub`, so a link to a private file elsewhere must not be followed.
"""

import os
from pathlib import Path


def leads_out(path: Path, folder: Path) -> bool:
    """Tell whether `path`, a file or folder below `folder`, really lies somewhere else, or nowhere.

    Every link on the way from `folder` to `path` counts, and a link to itself or to nothing leads nowhere. `folder`
    itself may be a link. In the cache of the Hub, files of a snapshot are links into `blobs`, the folder beside
    `snapshots`: those are files of the model.
    """
    real_folder = Path(os.path.realpath(folder))
    try:
        real_path = Path(os.path.realpath(path, strict=True))
    except OSError:  # there is no such file, or links run in a circle
        return True

    allowed = [real_folder]
    is_snapshot = real_folder.parent.name == "snapshots"
    if is_snapshot:
        allowed.append(real_folder.parent.parent / "blobs")
    return not any(real_path.is_relative_to(place) for place in allowed)
