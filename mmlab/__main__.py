"""`python -m mmlab`, the same as the command `mmlab`."""

import sys

from mmlab.cli import main

sys.exit(main())
