"""Commands that tests run in this process find torch imported, so they do not say that they load it."""

import torch  # noqa: F401
