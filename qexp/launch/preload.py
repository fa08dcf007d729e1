"""What the process imports from which workers are forked, so that each of them starts at once."""

import qexp.run  # noqa: F401
