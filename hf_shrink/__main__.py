"""`python -m hf_shrink`, which `accelerate launch -m` needs."""

import sys

from hf_shrink.cli import main

sys.exit(main())
