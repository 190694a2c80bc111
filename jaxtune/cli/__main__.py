"""`python -m jaxtune.cli`."""

import sys

from jaxtune.cli.main import main

sys.exit(main())
