"""The command `lm_eval` with the model `jaxtune`: lm_eval finds no models of other packages.

python -m jaxtune.cli.lm_eval --model jaxtune --model_args pretrained=DIR,dtype=float32 --tasks …
"""

from __future__ import annotations

import os
import sys

from jaxtune.core.errors import RequestError


def main() -> int:
    """Runs lm_eval's command line; returns 2, with one line, for a wrong request."""
    # Its bootstrap would fork a process that has jax's threads.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    try:
        try:
            from lm_eval.__main__ import cli_evaluate

            from jaxtune.recipes.evaluation import harness_model
        except ImportError as error:
            raise RequestError(
                f"needs lm-evaluation-harness: pip install 'jaxtune[eval]' ({error})"
            ) from error
        del harness_model  # importing it has registered the model
        cli_evaluate()
    except RequestError as error:
        print(f"jaxtune: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
