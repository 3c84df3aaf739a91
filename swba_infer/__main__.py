"""Run the command line: `python -m swba_infer`."""

from __future__ import annotations

import sys

from .cli import main

sys.exit(main())
