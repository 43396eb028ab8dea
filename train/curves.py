"""training_curves.png in the run folder: losses, those of each source, gradients of the mask loss, and the probe."""

import time
from pathlib import Path

from swim.data_tools.files import written_whole
from swim.train.metrics import METRICS_FILE, read_jsonl

CURVES_FILE = "training_curves.png"
_EVERY_S = 60.0


class Curves:
    """Draws the picture of a run, at most once a minute unless it is the last time."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._drawn = folder, time.monotonic()

    def draw(self, *, last: bool) -> None:
        """Draw what is logged so far; what goes wrong is said and ends nothing."""
        if not last and time.monotonic() - self._drawn < _EVERY_S:
            return
        try:
            from swim.evaluation.figures import curves_png

            picture = curves_png({self._folder.name: read_jsonl(self._folder / METRICS_FILE)})
            if picture is not None:
                with written_whole(self._folder / CURVES_FILE) as hidden:
                    hidden.write_bytes(picture)
        except Exception as error:  # a picture is no reason to lose a run
            print(f"{self._folder / CURVES_FILE} not drawn: {type(error).__name__}: {error}", flush=True)
        self._drawn = time.monotonic()
