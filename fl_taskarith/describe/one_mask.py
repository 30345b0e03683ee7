"""The command `mask` as a function that returns the mask."""

from pathlib import Path

from fl_taskarith.config.settings import load
from fl_taskarith.describe.masks import MASK, make_masks
from fl_taskarith.masking.mask import Mask, load_mask
from fl_taskarith.storage.paths import conf_file


def mask(
    conf: Path | str | None = None,
    *,
    output: Path | str | None = None,
    overwrite: bool = False,
    **overrides: object,
) -> Mask:
    """Calibrate the mask that a run of these settings would use, write it with its figure, and return it.

    Args:
        conf: a settings file or its name below conf/; None for the defaults.
        output: folder for the mask, its summary and figure; by default masks/NAME in the results folder.
        overwrite: whether files that are there may be replaced.
        overrides: settings by their Python names.

    Returns:
        A bool tensor per maskable parameter, of its shape; True where the run would update it.

    Raises:
        FlTaskarithError: the settings have no mask, or anything else that the user can mend.
    """
    config = load(None if conf is None else conf_file(conf), overrides)
    folder = make_masks(config, None if output is None else Path(output), overwrite=overwrite)
    return load_mask(folder / MASK)[0]
