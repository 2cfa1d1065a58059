"""The command line: `python -m metaopt`, or `metaopt`."""

import argparse
import sys
from collections.abc import Sequence

import metaopt
from metaopt.demo import cli

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Parameters
    ----------
    arguments : sequence of str, optional
        Those of the process by default.
    """
    parser = argparse.ArgumentParser(
        prog="metaopt",
        description="MetaOptimize: step sizes that tune themselves.",
        epilog="Try: metaopt demo",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"metaopt {metaopt.__version__}")
    cli.add_parser(parser.add_subparsers(title="commands", metavar="command"))
    try:
        options = parser.parse_args(arguments)
        if not hasattr(options, "run"):
            parser.print_help()
            return 0
        return options.run(options)
    except KeyboardInterrupt:
        sys.stderr.write("\nInterrupted.\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
