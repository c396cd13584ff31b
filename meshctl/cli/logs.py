"""How a long-running command logs: for people on a terminal, else one JSON object per line. On stderr."""

from __future__ import annotations

import logging
import os
import sys

import orjson
import structlog


def configure_logs() -> None:
    """Changes at info, everything at debug with --debug."""
    people = sys.stderr.isatty()
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(colors="NO_COLOR" not in os.environ)
        if people
        else structlog.processors.JSONRenderer(serializer=lambda value, **_: orjson.dumps(value, default=str).decode())
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([] if people else [structlog.processors.format_exc_info]),  # the console draws tracebacks by itself
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.DEBUG if "MESHCTL_DEBUG" in os.environ else logging.INFO
        ),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,  # a test may configure again
    )
