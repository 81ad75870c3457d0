"""What torchrun starts in trials: `program.py RUN DATA STEPS` trains, or goes on where there is something."""

import os
import sys

from swamla.errors import SwamlaError
from tests.faults import acts

acts.slow_down(float(os.environ.get("SWAMLA_SLOWLY", "0")))
try:
    acts.train_run(sys.argv[1], sys.argv[2], {"settings": {"steps": int(sys.argv[3]), "batch_size": 8}})
except SwamlaError as error:
    print(f"swamla: error: {error}", file=sys.stderr)
    sys.exit(error.exit_status)
