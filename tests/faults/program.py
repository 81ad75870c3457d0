"""What torchrun starts in trials: `program.py RUN DATA STEPS` trains, or goes on where there is something."""

import os
import sys

from swamla.errors import SwamlaError
from tests.faults import acts

acts.slow_down(float(os.environ.get("SWAMLA_SLOWLY", "0")))
try:
    settings: dict[str, float] = {"steps": int(sys.argv[3]), "batch_size": 8}
    if "SWAMLA_LIMIT" in os.environ:
        settings["rank_timeout_minutes"] = float(os.environ["SWAMLA_LIMIT"]) / 60
    acts.train_run(sys.argv[1], sys.argv[2], {"settings": settings})
except SwamlaError as error:
    print(f"swamla: error: {error}", file=sys.stderr)
    sys.exit(error.exit_status)
