"""Structured logs: one JSON object a line, with the id of the request that it is about."""

import logging
import sys
from contextvars import ContextVar
from typing import TextIO

from pythonjsonlogger.json import JsonFormatter

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Of the request being answered; empty outside of one."""


class _RequestId(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        if identity := request_id.get():
            record.request_id = identity
        return True


def log_as_json(command: str, stream: TextIO | None = None) -> None:
    """Send the logs of this process to standard error as JSON lines.

    Args:
        command: which process of the server this is.
        stream: instead of standard error.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(
        JsonFormatter(
            ["levelname", "name", "message"],
            rename_fields={"levelname": "level", "name": "logger"},
            static_fields={"process": command},
            timestamp="time",
        )
    )
    handler.addFilter(_RequestId())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
